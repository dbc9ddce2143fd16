"""The processor: recorded prompts, batches, action bins, saving and loading, clear errors."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from shared_files import shared_path

from lapa.configuration.configuration_lapa import LapaConfig
from lapa.processing.action_tokenization_lapa import ActionTokenizer
from lapa.processing.image_processing_lapa import LapaImageProcessor
from lapa.processing.processing_lapa import LapaProcessor
from lapa.processing.tokenization_lapa import LapaTokenizer

EDGES = ActionTokenizer(((0.0, 1.0, 3.0), (5.0, 5.0)))


def make_processor(name="tiny", **overrides):
    tokenizer = LapaTokenizer(str(shared_path(f"fixtures/tokenizer/{name}.tokenizer.model")))
    sizes = {"text_vocab_size": 320, "vision_vocab_size": 66, "end_of_vision_id": 65, "num_image_tokens": 4}
    sizes |= {"action_vocab_size": 16, "action_dim": 2}
    return LapaProcessor(LapaImageProcessor(size=8), tokenizer, **(sizes | overrides))


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)


@pytest.mark.parametrize("tag, target", [("delta", "latent"), ("action", "action")])
def test_equals_recorded_sampler_inputs(tag, target):
    recorded = load_file(shared_path("fixtures/e2e/e2e.safetensors"))
    meta = json.loads(shared_path("fixtures/e2e/meta.json").read_text())
    tokenizer = LapaTokenizer(str(shared_path("fixtures/tokenizer/tiny.tokenizer.model")))
    processor = LapaProcessor(LapaImageProcessor(), tokenizer, text_vocab_size=320, action_vocab_size=32)
    cropped = bool(meta[tag]["image_aug"])
    inputs = processor(
        images=shared_path("data/lapa/bridge_inference.jpg"),
        instruction=meta[tag]["question"],
        return_tensors="pt",
        target=target,
        do_center_crop=cropped,
    )
    is_vision = recorded[f"{tag}.vision_masks"] == 1
    codes = recorded[f"{tag}.vision_token_ids"]
    expected = recorded[f"{tag}.input_ids"] + is_vision * 320
    first = int(np.argmax(is_vision[0]))
    np.testing.assert_array_equal(expected[0, first : first + 256], codes + 320)
    # The image's positions hold placeholders, for the model to fill in.
    expected[0, first : first + 256] = 320
    assert inputs.input_ids.dtype == inputs.attention_mask.dtype == torch.int64
    np.testing.assert_array_equal(inputs.input_ids.numpy(), expected)
    np.testing.assert_array_equal(inputs.attention_mask.numpy(), recorded[f"{tag}.attention_mask"])
    levels = recorded["pixel_center_crop_uint8" if cropped else "pixel_uint8"]
    pixel_values = (levels / 127.5 - 1).astype(np.float32).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(inputs.pixel_values.numpy(), pixel_values)


@pytest.mark.parametrize("name", ["tiny", "llama32k"])
def test_prompts_equal_recordings(name):
    recorded = json.loads(shared_path("fixtures/tokenizer/tokenizer_golden.json").read_text())[name]
    processor = make_processor(name, text_vocab_size=len(recorded["rows"]) + 32000)
    offset = processor.vision_offset
    rows = [row for row in recorded["rows"] if row["instruction"].strip()]
    codes = np.zeros((len(rows), 4), dtype=np.int64)
    for target, tail in (("latent", "</vision> <delta>"), ("action", "</vision> <action>")):
        inputs = processor(instruction=[row["instruction"] for row in rows], vision_codes=codes, target=target)
        end = recorded["prefix_for_gen"][tail]["input_ids"][0]
        for row, ids, mask in zip(rows, inputs.input_ids.tolist(), inputs.attention_mask.tolist()):
            assert ids == row["input_ids_128"] + [offset] * 4 + [offset + 65] + end
            assert mask == row["attention_mask_128"] + [1] * (5 + len(end))


def test_batches_and_padding():
    processor = make_processor()
    texts = ["push", "take the broccoli out of the pot"]
    batch = processor(images=[image(0), image(1)], instruction=texts)
    singles = [processor(images=image(i), instruction=text) for i, text in enumerate(texts)]
    for key in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(batch[key], torch.cat([single[key] for single in singles])), key
    assert batch.pixel_values.shape == (2, 3, 8, 8)
    longest = processor(images=[image(0), image(1)], instruction=texts, padding="longest")
    width = longest.input_ids.shape[1]
    assert longest.attention_mask[1].all() and not longest.attention_mask[0, 0]
    assert torch.equal(longest.input_ids, batch.input_ids[:, -width:])
    assert batch.input_ids.shape[1] - width == 128 - len(processor.tokenizer(prompt(texts[1]))["input_ids"])
    arrays = processor(images=image(), instruction="push", return_tensors="np")
    assert isinstance(arrays.input_ids, np.ndarray) and arrays.input_ids.dtype == np.int64


def prompt(text):
    return (
        f"<s> <s> You are a helpful assistant. USER: What action should the robot take to `{text}` ASSISTANT: <vision>"
    )


def test_target_is_an_attribute_and_an_argument():
    latent, action = make_processor(), make_processor(target="action")
    kwargs = {"vision_codes": [1, 2, 3, 4], "instruction": "push"}
    assert not torch.equal(latent(**kwargs).input_ids, action(**kwargs).input_ids)
    assert torch.equal(latent(**kwargs, target="action").input_ids, action(**kwargs).input_ids)
    assert latent(**kwargs).vision_codes.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("name, sizes", [("tiny", {}), ("llama32k", {"text_vocab_size": 33000})])
def test_prompts_end_in_the_tails_that_a_config_keeps(name, sizes, tmp_path):
    processor = make_processor(name, **sizes)
    config = LapaConfig(text_config={"vocab_size": processor.text_vocab_size}, prompt_tails=processor.prompt_tails)
    config.save_pretrained(tmp_path)
    tails = LapaConfig.from_pretrained(tmp_path).prompt_tails
    assert tails == processor.prompt_tails and set(tails) == {"latent", "action"}
    for target, tail in tails.items():
        ids = processor(vision_codes=[1, 2, 3, 4], instruction="push", target=target).input_ids[0].tolist()
        assert ids[-len(tail) - 1 :] == [processor.vision_offset + 65, *tail]
    # What sets them apart is the marker, whatever follows it.
    assert tails["latent"][-len(tails["action"]) :] != tails["action"][-len(tails["latent"]) :]


def test_action_num_bins_travel_with_the_inputs():
    processor = make_processor(target="action")
    kwargs = {"vision_codes": np.zeros((2, 4), dtype=np.int64), "instruction": ["push", "pull"]}
    assert "action_num_bins" not in processor(**kwargs)
    processor.set_action_statistics("table", EDGES)
    assert processor(**kwargs).action_num_bins.tolist() == [[2, 1], [2, 1]]
    assert "action_num_bins" not in processor(**kwargs, target="latent")
    assert "action_num_bins" not in processor(**kwargs, target="latent", unnorm_key="table")
    processor.set_action_statistics("arm", ActionTokenizer(((0.0, 1.0), (0.0, 1.0, 2.0, 3.0))))
    assert "action_num_bins" not in processor(**kwargs)
    assert processor(**kwargs, unnorm_key="arm").action_num_bins.tolist() == [[1, 3], [1, 3]]
    with pytest.raises(ValueError, match="'leg' is unknown; known keys: 'arm', 'table'"):
        processor(**kwargs, unnorm_key="leg")


def test_actions_there_and_back(tmp_path):
    processor = make_processor()
    with pytest.raises(ValueError, match="known keys: none"):
        processor.decode_actions([[0, 0]])
    processor.set_action_statistics("table", EDGES)
    assert processor.encode_actions([[2.0, 5.0]], "table").tolist() == [[1, 0]]
    decoded = processor.decode_actions(torch.tensor([[1, 0], [0, 0]]))
    assert torch.equal(decoded, torch.tensor([[2.0, 5.0], [0.5, 5.0]]))
    assert isinstance(processor.decode_actions(np.array([[1, 0]])), np.ndarray)
    assert torch.equal(processor.encode_actions(decoded), torch.tensor([[1, 0], [0, 0]]))
    with pytest.raises(ValueError, match="bin 2 for dimension 0, which has 2 bins"):
        processor.decode_actions([[2, 0]])
    with pytest.raises(ValueError, match="'x' is unknown; known keys: 'table'"):
        processor.decode_actions([[0, 0]], "x")
    fitted = processor.fit_actions([[0.0, 0.0], [1.0, 1.0], [4.0, 0.0]], "fitted")
    assert fitted.num_bins == (16, 2) and processor.action_tokenizer("fitted") == fitted
    with pytest.raises(ValueError, match="must be given unless there is exactly one; known keys: 'fitted', 'table'"):
        processor.decode_actions([[0, 0]])
    EDGES.to_csv(tmp_path / "edges.csv")
    assert processor.load_action_csv(tmp_path / "edges.csv", "csv") == EDGES
    with pytest.raises(ValueError, match=r"3 dimensions, `action_dim` is 2"):
        processor.fit_actions([[0.0, 0.0, 1.0]], "wide")
    with pytest.raises(ValueError, match=r"20 bins, `action_vocab_size` is 16"):
        processor.fit_actions(np.random.default_rng(0).random((50, 2)), "fine", num_bins=20)


def test_published_csv_decodes():
    processor = make_processor(action_dim=7, action_vocab_size=256)
    processor.load_action_csv(shared_path("data/lapa/simpler.csv"), "simpler")
    row = [float(edge) for edge in shared_path("data/lapa/simpler.csv").read_text().splitlines()[1].split(",") if edge]
    action = processor.decode_actions([[0] * 6 + [1]], "simpler")
    assert action.dtype == np.float32
    assert action[0, 0] == np.float32((row[0] + row[1]) / 2) and action[0, 6] == 1.0


def test_save_and_load_is_exact(tmp_path):
    processor = make_processor(target="action", max_text_length=64)
    processor.set_action_statistics("table", ActionTokenizer(((0.1, 1 / 3, 3e-17 + 1), (5.0, 5.0))))
    processor.save_pretrained(tmp_path)
    loaded = LapaProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    for name in ("text_vocab_size", "vision_vocab_size", "latent_vocab_size", "num_latent_tokens", "action_vocab_size",
                 "action_dim", "end_of_vision_id", "num_image_tokens", "max_text_length", "target",
                 "action_statistics"):  # fmt: skip
        assert getattr(loaded, name) == getattr(processor, name) == saved[name], name
    for key, value in processor(images=image(), instruction="push").items():
        assert torch.equal(loaded(images=image(), instruction="push")[key], value), key
    loaded.save_pretrained(tmp_path / "again")
    for name in ("processor_config.json", "tokenizer.model"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_from_config():
    tokenizer = make_processor().tokenizer
    vision = {"image_size": 32, "base_channels": 32, "channel_multipliers": [1, 1, 1, 1], "codebook_size": 64}
    sizes = {"text_config": {"vocab_size": 400}, "vision_vocab_size": 66, "action_vocab_size": 16, "action_dim": 3}
    sizes |= {"latent_vocab_size": 5, "num_latent_tokens": 2}
    config = LapaConfig(vision_tokenizer_config=vision, has_action_segment=True, **sizes)
    processor = LapaProcessor.from_config(config, None, tokenizer)
    assert (processor.vision_offset, processor.latent_offset, processor.action_offset) == (400, 466, 471)
    assert processor.target == "action" and processor.num_image_tokens == 16 and processor.end_of_vision_id == 65
    inputs = processor(images=image(), instruction="push")
    assert inputs.pixel_values.shape == (1, 3, 32, 32) and (inputs.input_ids == 400).sum() == 16
    bare = LapaProcessor.from_config(LapaConfig(**sizes), LapaImageProcessor(), tokenizer, num_image_tokens=9)
    assert bare.target == "latent" and bare.num_image_tokens == 9 and bare.num_latent_tokens == 2


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"instruction": ""}, "must say what to do"),
        ({"instruction": " \n"}, "must say what to do"),
        ({"instruction": None}, "must be a string or a list of strings, got NoneType"),
        ({"instruction": 3}, "got int"),
        ({"instruction": ["push", 3]}, "got int"),
        ({"instruction": []}, "`instruction` is empty"),
        ({"instruction": ["push", "pull"]}, r"`images` \(1\) and `instruction` \(2\)"),
        ({"images": []}, "`images` is empty"),
        ({"images": None}, "exactly one of `images` and `vision_codes` must be given, got neither"),
        ({"images": object()}, "accepted: a PIL image"),
        ({"vision_codes": [1, 2, 3, 4]}, "must be given, got both"),
        ({"images": None, "vision_codes": [1, 2, 3]}, r"shape \(batch, 4\), got \(3,\)"),
        ({"images": None, "vision_codes": [1, 2, 3, 64]}, r"must lie in \[0, 63\], got 64"),
        ({"target": "delta"}, '"latent" or "action"'),
        ({"padding": True}, "`padding`"),
        ({"surprise": 1}, "surprise"),
        ({"unnorm_key": "x"}, "known keys: none"),
    ],
)
def test_bad_inputs(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_processor()(**({"images": image(), "instruction": "push"} | kwargs))


def test_bad_settings():
    with pytest.raises(ValueError, match=r"320 pieces, more than `text_vocab_size` \(100\)"):
        make_processor(text_vocab_size=100)
    with pytest.raises(ValueError, match=r"`end_of_vision_id` \(66\)"):
        make_processor(end_of_vision_id=66)
    with pytest.raises(ValueError, match="`target`"):
        make_processor(target="delta")
    with pytest.raises(ValueError, match="edges"):
        make_processor(action_statistics={"x": {"bins": []}})


def test_remembered_texts_are_those_of_the_tokenizer_in_use_and_no_part_of_the_processor():
    processor, text = make_processor(), "push the pot"
    before = processor.to_json_string()
    first = processor(images=image(), instruction=text)["input_ids"]
    processor._text_ids(text).append(0)
    assert processor(images=image(), instruction=text)["input_ids"].tolist() == first.tolist()
    assert processor._ids_of_texts and processor.to_json_string() == before
    assert pickle.loads(pickle.dumps(processor))._ids_of_texts == {}
    asked = []
    tokenizer = processor.tokenizer

    class Counting:
        pad_token_id = tokenizer.pad_token_id

        def __call__(self, words, **options):
            asked.append(words)
            return tokenizer(words, **options)

    # Another tokenizer: nothing of the old one is used, and every text is asked for once.
    processor.tokenizer = Counting()
    for _ in range(3):
        assert processor(images=image(), instruction=text)["input_ids"].tolist() == first.tolist()
    assert len(asked) == len(set(asked)) == 3
