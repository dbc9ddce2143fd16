"""Training examples and batches equal the recorded ones of the published code, in the one id space."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from shared_files import shared_path

from lapa.data.collators import LapaTrainingCollator
from lapa.processing.image_processing_lapa import LapaImageProcessor
from lapa.processing.processing_lapa import LapaProcessor
from lapa.processing.tokenization_lapa import LapaTokenizer

# Published field names to ours.
FIELD_NAMES = {"delta": "latent", "<|bos|>": "bos", "<|eos|>": "eos"}


def make_processor(tokenizer="tiny", **overrides):
    model = str(shared_path(f"fixtures/tokenizer/{tokenizer}.tokenizer.model"))
    sizes = {"text_vocab_size": 320, "vision_vocab_size": 66, "end_of_vision_id": 65, "num_image_tokens": 16}
    sizes |= {"action_vocab_size": 16}
    return LapaProcessor(LapaImageProcessor(size=32), LapaTokenizer(model), **(sizes | overrides))


def to_id_space(processor, tokens, vision_mask, latent_mask, action_mask):
    offsets = np.asarray(vision_mask) * processor.vision_offset + np.asarray(latent_mask) * processor.latent_offset
    return np.array([int(token) for token in tokens]) + offsets + np.asarray(action_mask) * processor.action_offset


def encode_row(processor, row, number, max_num_frames=1):
    fields = row["fields"]
    if isinstance(fields, list):
        # The published code draws one layout, seeded by the line number.
        fields = random.Random(number).choice(fields)
    layout, text = [], row["instruction"]
    for name in fields.split(","):
        inner = name.strip("[]")
        if "+" in inner:
            text = " ".join(row[part] for part in inner.split("+"))
            inner = "instruction"
        inner = FIELD_NAMES.get(inner, inner)
        layout.append(f"[{inner}]" if name.startswith("[") else inner)
    return processor.encode_example(
        text,
        vision_codes=row["vision"],
        latent_action_codes=[int(code) for code in row["delta"]] if "delta" in row else None,
        action_tokens=row.get("action"),
        raw_instruction=True,
        layout=layout,
        max_num_frames=max_num_frames,
    )


def read_rows(name):
    return [json.loads(line) for line in shared_path(f"fixtures/data/{name}.jsonl").read_text().splitlines()]


def processed():
    return json.loads(shared_path("fixtures/data/processed.json").read_text())


def check_example(processor, example, recorded):
    no_mask = [False] * len(recorded["tokens"])
    expected = to_id_space(
        processor,
        recorded["tokens"],
        recorded["vision_mask"],
        recorded["delta_mask"],
        recorded.get("action_mask", no_mask),
    )
    np.testing.assert_array_equal(example["input_ids"], expected)
    expected_labels = np.where(np.asarray(recorded["loss_mask"]) == 1, expected, -100)
    np.testing.assert_array_equal(example["labels"], expected_labels)


@pytest.mark.parametrize("name", ["latent", "finetune", "mixed"])
def test_examples_equal_recordings(name):
    processor = make_processor()
    recorded = processed()[name]
    rows = read_rows(name)
    assert len(recorded) == len(rows) == 4
    for number, (row, expected) in enumerate(zip(rows, recorded)):
        check_example(processor, encode_row(processor, row, number), expected)


@pytest.mark.parametrize("max_num_frames", [2, None])
def test_several_frames_equal_recordings(max_num_frames):
    processor = make_processor()
    key = f"latent_row3_max_n_frames_{-1 if max_num_frames is None else max_num_frames}"
    recorded = processed()[key]
    example = encode_row(processor, read_rows("latent")[3], 3, max_num_frames)
    check_example(processor, example, recorded[0] if isinstance(recorded, list) else recorded)


def test_released_sizes_equal_recording():
    sizes = {"text_vocab_size": 32000, "vision_vocab_size": 8448, "end_of_vision_id": 8193, "num_image_tokens": 256}
    processor = make_processor("llama32k", **sizes)
    recorded = processed()["full_size_32k"]
    recorded = recorded[0] if isinstance(recorded, list) else recorded
    row = recorded["example"]
    example = encode_row(processor, row, 0)
    check_example(processor, example, recorded)
    # The default layout and the instruction alone give the same.
    instruction = row["instruction"].split("`")[1]
    by_name = processor.encode_example(instruction, row["vision"], [int(code) for code in row["delta"]])
    assert by_name == example


@pytest.mark.parametrize("name", ["latent", "finetune", "mixed"])
def test_batches_equal_recordings(name):
    processor = make_processor()
    batches = load_file(shared_path("fixtures/data/batches.safetensors"))
    meta = json.loads(shared_path("fixtures/data/batches_meta.json").read_text())
    order = meta["order"][name]["file_offsets_in_batch_order"]
    numbers = [meta["row_file_offsets"][name].index(offset) for offset in order]
    rows = read_rows(name)
    examples = [encode_row(processor, rows[number], number) for number in numbers]
    # The published sequence length counts inputs; inputs and targets together are one longer.
    length = meta["order"][name]["seq_length"]
    collator = LapaTrainingCollator(processor.tokenizer.bos_token_id, max_length=length + 1, pad_to_max_length=True)
    batch = collator(examples)
    # The published input stops before the last id; here the closing eos is also an input, one without a target.
    last = torch.tensor([len(example["input_ids"]) - 1 for example in examples])
    inputs, rows_of_batch = batch["input_ids"][:, :-1].clone(), torch.arange(len(examples))
    assert (inputs[rows_of_batch, last] == processor.tokenizer.eos_token_id).all()
    assert (batch["labels"][rows_of_batch, last + 1] == -100).all()
    inputs[rows_of_batch, last] = processor.tokenizer.bos_token_id
    recorded = {key.removeprefix(f"{name}."): value for key, value in batches.items() if key.startswith(f"{name}.")}
    no_mask = np.zeros_like(recorded["input_tokens"])
    for side, ids in (("input", inputs), ("target", batch["input_ids"][:, 1:])):
        expected = to_id_space(
            processor,
            recorded[f"{side}_tokens"].reshape(-1),
            recorded[f"{side}_vision_masks"].reshape(-1),
            recorded[f"{side}_delta_masks"].reshape(-1),
            recorded.get(f"{side}_action_masks", no_mask).reshape(-1),
        )
        np.testing.assert_array_equal(ids.reshape(-1).numpy(), expected)
    labels = batch["labels"][:, 1:].numpy()
    np.testing.assert_array_equal(labels != -100, recorded["loss_masks"] == 1)
    np.testing.assert_array_equal(labels[labels != -100], batch["input_ids"][:, 1:].numpy()[labels != -100])
    assert batch["attention_mask"].sum(1).tolist() == [len(example["input_ids"]) for example in examples]


def test_collator_by_hand():
    examples = [{"input_ids": [1, 5, 2], "labels": [-100, 5, 2]}, {"input_ids": [1, 2], "labels": [-100, 2]}]
    batch = LapaTrainingCollator(pad_token_id=1)(examples)
    assert batch["input_ids"].tolist() == [[1, 5, 2], [1, 2, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 5, 2], [-100, 2, -100]]
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert LapaTrainingCollator(1, pad_to_multiple_of=8)(examples)["labels"].shape == (2, 8)
    assert LapaTrainingCollator(1, max_length=5, pad_to_max_length=True)(examples)["labels"].shape == (2, 5)
    assert LapaTrainingCollator(1, max_length=5)(examples)["labels"].shape == (2, 3)


def test_collator_stacks_pixels():
    example = {"input_ids": [1], "labels": [-100], "pixel_values": np.full((3, 2, 2), 0.5, dtype=np.float32)}
    batch = LapaTrainingCollator(1)([example, example])
    assert batch["pixel_values"].shape == (2, 3, 2, 2) and batch["pixel_values"].dtype == torch.float32
    with pytest.raises(ValueError, match="same of pixel_values"):
        LapaTrainingCollator(1)([example, {"input_ids": [1], "labels": [-100]}])
    with pytest.raises(ValueError, match="'surprise'"):
        LapaTrainingCollator(1)([{"input_ids": [1], "labels": [-100], "surprise": 3}])


def test_collator_never_cuts(caplog):
    long, short = ({"input_ids": list(range(n)), "labels": list(range(n))} for n in (5, 3))
    with pytest.raises(ValueError, match=r"5 ids, more than `max_length` \(4\)"):
        LapaTrainingCollator(1, max_length=4)([long, short])
    dropping = LapaTrainingCollator(1, max_length=4, overflow="drop")
    assert dropping([long, short, long])["input_ids"].tolist() == [[0, 1, 2]]
    assert dropping.num_dropped == 2 and "dropped an example of 5 ids" in caplog.text
    with pytest.raises(ValueError, match="no example is left of 1"):
        dropping([long])
    with pytest.raises(ValueError, match="overflow"):
        LapaTrainingCollator(1, overflow="cut")


def test_placeholder_and_errors():
    processor = make_processor()
    codes = list(range(16))
    with_codes = processor.encode_example("push", codes, [1, 2, 3, 4])
    without = processor.encode_example("push", None, [1, 2, 3, 4])
    start = with_codes["input_ids"].index(processor.vision_offset)
    assert with_codes["input_ids"][start : start + 17] == [320 + code for code in [*codes, 65]]
    assert without["input_ids"][start : start + 17] == [320] * 16 + [385]
    assert without["labels"] == with_codes["labels"]
    trained = [label for label in with_codes["labels"] if label >= 320]
    assert trained == [processor.latent_offset + code for code in (1, 2, 3, 4)]
    with pytest.raises(ValueError, match="puts a loss on the image"):
        processor.encode_example("push", None, [1, 2, 3, 4], layout=["instruction", "vision", "latent"])
    with pytest.raises(ValueError, match=r"`latent_action_codes` must lie in \[0, 7\], got 8"):
        processor.encode_example("push", codes, [1, 2, 3, 8])
    with pytest.raises(ValueError, match="must hold 4 codes"):
        processor.encode_example("push", codes, [1, 2, 3])
    with pytest.raises(ValueError, match="multiple of 7 bins"):
        processor.encode_example("push", codes, action_tokens=[1, 2, 3])
    with pytest.raises(ValueError, match=r"`action_tokens` must lie in \[0, 15\], got 16"):
        processor.encode_example("push", codes, action_tokens=[16] * 7)
    with pytest.raises(ValueError, match="multiple of 16"):
        processor.encode_example("push", codes[:-1], [1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"`vision_codes` must lie in \[0, 63\], got 64"):
        processor.encode_example("push", [*codes[:-1], 64], [1, 2, 3, 4])
    with pytest.raises(ValueError, match="field '\\[delta\\]'"):
        processor.encode_example("push", codes, layout=["[delta]"])
    with pytest.raises(ValueError, match="`action_tokens` must be given"):
        processor.encode_example("push", codes, layout=["action"])
    with pytest.raises(ValueError, match="`instruction`"):
        processor.encode_example(" ", codes, [1, 2, 3, 4])
