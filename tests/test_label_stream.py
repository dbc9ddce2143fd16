"""Stage 2 reads labels: streams of steps, held-out episodes, vision codes on disk, the command on all of it."""

import json
import shutil
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command_errors import error_of
from label_processes import make_clips
from shared_files import shared_path
from tiny_models import TINY_VISION_TOKENIZER, build

from lapa import (
    LapaForLatentAction,
    LapaImageProcessor,
    LapaProcessor,
    LapaTokenizer,
    LapaVisionTokenizer,
    LapaVisionTokenizerConfig,
)
from lapa.data.label_table import LabelFolder
from lapa.data.labelled_stream import (
    LabelledRows,
    LabelledStepStream,
    LabelSource,
    code_file,
    hold_out_episodes,
    open_label_folders,
)
from lapa.data.stream_loader import StreamLoader
from lapa.training import scripts
from lapa.training.label_vision import cache_vision_codes, vision_code_folder

CPU = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
# Of 9 clips with 4 labelled steps each, 2 have no instruction.
NUM_STEPS = 7 * 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    make_clips(folder / "clips", 9, 6)
    make_clips(folder / "more", 3, 6)
    build("nsvq").save_pretrained(folder / "quantizer")
    LapaVisionTokenizer(LapaVisionTokenizerConfig(**TINY_VISION_TOKENIZER)).save_pretrained(folder / "vision")
    for name, data, more in (
        ("labels", "clips", []),
        ("coded", "clips", ["--vision_tokenizer", str(folder / "vision")]),
        ("others", "more", []),
    ):
        arguments = [
            "--model",
            str(folder / "quantizer"),
            "--data",
            str(folder / data),
            "--output",
            str(folder / name),
        ]
        sizes = ["--frame_gap", "2", "--frequency", "10", "--episodes_per_unit", "2", "--device", "cpu"]
        assert scripts.label([*arguments, *sizes, "--num_workers", "0", *more]) == 0
    return folder


@pytest.fixture(scope="module")
def processor():
    tokenizer = LapaTokenizer(str(shared_path("fixtures/tokenizer/tiny.tokenizer.model")))
    sizes = {"text_vocab_size": 320, "vision_vocab_size": 34, "end_of_vision_id": 33, "num_image_tokens": 16}
    return LapaProcessor(LapaImageProcessor(size=8), tokenizer, **sizes)


def keys(examples):
    """Which steps, by what they are encoded to."""
    return Counter(
        (*example["input_ids"].tolist(), *example["pixel_values"].ravel()[:8].tolist()) for example in examples
    )


def plain(folder, processor):
    """The same examples without a stream."""
    return list(LabelledRows([LabelSource(LabelFolder(folder))], processor))


def test_an_epoch_has_every_step_with_an_instruction_once(place, processor):
    stream = LabelledStepStream([LabelSource(LabelFolder(place / "labels"))], processor, repeat=False, buffer_size=5)
    first, second = list(stream), list(stream)
    assert len(first) == NUM_STEPS and keys(first) == keys(second) == keys(plain(place / "labels", processor))
    assert max(keys(first).values()) == 1
    assert [e["input_ids"].tolist() for e in first] != [e["input_ids"].tolist() for e in second], "shuffled anew"
    (counts,) = stream.counts().values()
    assert counts.metrics() == {"steps": NUM_STEPS, "row_groups": 5, "dropped_steps/no_instruction": 8}


def test_examples_are_those_of_the_processor(place, processor):
    folder = LabelFolder(place / "coded")
    (table,) = folder.read_groups(0, [0], ["instruction", "latent_action_codes", "vision_codes", "image"])
    row = table.to_pylist()[2]
    by_image, by_codes = (
        LabelledRows([LabelSource(folder, vision=vision)], processor)[2] for vision in ("images", "column")
    )
    codes = {"latent_action_codes": row["latent_action_codes"]}
    expected = processor.encode_example(row["instruction"], vision_codes=row["vision_codes"], **codes)
    assert by_codes["input_ids"].tolist() == expected["input_ids"] and "pixel_values" not in by_codes
    assert by_codes["labels"].tolist() == expected["labels"]
    assert by_image["input_ids"].tolist() == processor.encode_example(row["instruction"], **codes)["input_ids"]
    assert by_image["pixel_values"].shape == (3, 8, 8) and by_image["pixel_values"].dtype == np.float32
    # The model turns the image into the stored codes.
    tokenizer = LapaVisionTokenizer.from_pretrained(place / "vision").eval()
    pixels = torch.from_numpy(by_image["pixel_values"])[None]
    assert tokenizer.encode(pixels).codes.flatten().tolist() == row["vision_codes"]


def test_ranks_and_workers_divide_the_steps(place, processor):
    shares = []
    for rank in range(2):
        stream = LabelledStepStream(
            [LabelSource(LabelFolder(place / "labels"))], processor, repeat=False, rank=rank, world_size=2
        )
        shares.append([e for batch in StreamLoader(stream, 3, num_workers=2) for e in batch])
    assert all(shares) and keys(shares[0]) + keys(shares[1]) == keys(plain(place / "labels", processor))


@pytest.mark.parametrize("num_taken", [0, 1, 11, 40])
def test_resume_goes_on_with_the_next_step(place, processor, num_taken):
    def make():
        sources = [LabelSource(LabelFolder(place / "labels"), 2.0), LabelSource(LabelFolder(place / "others"))]
        return LabelledStepStream(sources, processor, seed=3, buffer_size=6)

    stream, iterator = make(), None
    iterator = iter(stream)
    for _ in range(num_taken):
        next(iterator)
    state = json.loads(json.dumps(stream.state_dict())) if num_taken else None
    expected = [next(iterator)["input_ids"].tolist() for _ in range(30)]
    resumed = make()
    if state is not None:
        resumed.load_state_dict(state)
    again = iter(resumed)
    assert [next(again)["input_ids"].tolist() for _ in range(30)] == expected


def test_held_out_episodes_are_the_last_with_an_instruction(place, processor):
    folder = LabelFolder(place / "labels")
    # Clips 3 and 7 have no instruction: the last two are 8 and 6, in files of two clips.
    stop = hold_out_episodes(folder, 2)
    assert stop == (3, 0)
    train = LabelledStepStream([LabelSource(folder, stop=stop)], processor, repeat=False)
    held = LabelledRows([LabelSource(folder, start=stop)], processor)
    assert len(held) == 8
    assert keys(train) + keys(held[i] for i in range(8)) == keys(plain(place / "labels", processor))
    # In the middle of a file: clip 5 is its second.
    assert hold_out_episodes(folder, 3) == (2, 4)
    middle = LabelledStepStream([LabelSource(folder, stop=(2, 4))], processor, repeat=False)
    assert sum(keys(middle).values()) == NUM_STEPS - 12
    with pytest.raises(ValueError, match=r"`eval_episodes` must lie in \[0, 6\] for the 7 episodes"):
        hold_out_episodes(folder, 7)


def test_other_places_of_labels(place, processor, tmp_path):
    """A URL, a list, a mixture file; and what is none."""
    import fsspec

    (folder, _), (other, _) = open_label_folders(f"{place / 'labels'}, {place / 'others'}")
    assert (folder.num_rows, other.num_rows) == (36, 12)
    system = fsspec.filesystem("memory")
    system.put(str(place / "labels"), "/remote", recursive=True)
    remote = LabelledRows([LabelSource(LabelFolder("memory://remote"))], processor)
    assert keys(remote) == keys(plain(place / "labels", processor))
    system.rm("/remote", recursive=True)
    mixture = place / "mixture.yaml"
    mixture.write_text("- path: labels\n  weight: 3\n- others\n")
    assert [(folder.tree.name, weight) for folder, weight in open_label_folders(str(mixture))] == [
        ("labels", 3.0),
        ("others", 1.0),
    ]
    for content, named in (
        ("- path: labels\n  weight: 0\n", "`weight` of labels"),
        ("labels: 1\n", "at least one folder"),
        ("- path: labels\n  camera: top\n", "a mapping of `path` and `weight`"),
    ):
        mixture.write_text(content)
        with pytest.raises(ValueError, match=named):
            open_label_folders(str(mixture))


def test_damage_is_named(place, processor, tmp_path):
    labels = shutil.copytree(place / "labels", tmp_path / "labels")
    path = labels / "data" / "labels-00002-of-00005.parquet"
    content = bytearray(path.read_bytes())
    group = pq.read_metadata(path).row_group(0)
    (column,) = (group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "image.bytes")
    content[column.data_page_offset + 100] ^= 0xFF
    path.write_bytes(content)
    source = LabelSource(LabelFolder(labels))
    with pytest.raises(ValueError, match=r"labels-00002-of-00005.parquet cannot be read as parquet"):
        list(LabelledStepStream([source], processor, repeat=False))
    skipping = LabelledStepStream([source], processor, repeat=False, on_error="skip", max_skipped=0.5)
    assert len(list(skipping)) == NUM_STEPS - 8
    path.write_bytes((labels / "data" / "labels-00004-of-00005.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"has 4 rows where labels.json lists 8"):
        list(LabelledStepStream([source], processor, repeat=False))
    path.unlink()
    with pytest.raises(ValueError, match=r"labels-00002-of-00005.parquet cannot be read"):
        list(LabelledStepStream([source], processor, repeat=False))


def test_vision_codes_on_disk_are_those_of_the_column(place, processor, tmp_path):
    from datasets import load_dataset

    folder = LabelFolder(place / "coded")
    tokenizer = LapaVisionTokenizer.from_pretrained(place / "vision").eval()
    cache = tmp_path / "codes"
    for rank in (1, 0):
        cache_vision_codes(folder, tokenizer, processor.image_processor, cache, rank, 2, 3, show_progress=False)
    files = sorted(cache.iterdir())
    assert files == [code_file(cache, name) for name in folder.files]
    table = load_dataset(str(place / "coded"), split="train")
    codes = np.concatenate([np.load(path) for path in files])
    assert codes.dtype == np.uint16 and codes.tolist() == table["vision_codes"][:]
    times = [path.stat().st_mtime_ns for path in files]
    files[1].unlink()
    cache_vision_codes(folder, tokenizer, processor.image_processor, cache, show_progress=False)
    again = [path.stat().st_mtime_ns for path in files]
    assert [a == b for a, b in zip(times, again)] == [True, False, True, True, True], "what is there is reused"
    # A file of another number of rows is of other labels, or cut off.
    np.save(files[2], np.load(files[2])[:-1])
    files[3].write_bytes(files[3].read_bytes()[:-1])
    cache_vision_codes(folder, tokenizer, processor.image_processor, cache, show_progress=False)
    assert np.concatenate([np.load(path) for path in files]).tolist() == codes.tolist()
    folders = {vision_code_folder(tmp_path, item, "0" * 64) for item in (folder, LabelFolder(place / "coded"))}
    folder.rows = (folder.rows[0] - 1, *folder.rows[1:])
    folders.add(vision_code_folder(tmp_path, folder, "0" * 64))
    assert len(folders) == 2
    folder = LabelFolder(place / "coded")
    rows = [LabelledRows([LabelSource(folder, vision=vision)], processor) for vision in (str(cache), "column")]
    for cached, stored in zip(*rows):
        assert cached["input_ids"].tolist() == stored["input_ids"].tolist()


def pretrain(place, output, data, *more):
    arguments = [
        "--data", data, "--output_dir", str(output), "--policy_config", json.dumps({"text_config": TEXT}),
        "--vision_tokenizer", str(place / "vision"),
        "--tokenizer", str(shared_path("fixtures/tokenizer/tiny.tokenizer.model")),
        "--per_device_train_batch_size", "4", "--logging_steps", "1",
    ]  # fmt: skip
    return scripts.pretrain([*arguments, *CPU, *more])


def weights(folder):
    return LapaForLatentAction.from_pretrained(folder).state_dict()


def test_pretraining_on_images_codes_and_cached_codes_is_the_same(place, tmp_path):
    """The frozen tokenizer gives the same codes wherever it runs; codes that are there are used, others are kept on disk."""
    more = ["--max_steps", "4", "--save_strategy", "no", "--eval_episodes", "1"]
    runs = {
        "images": ("labels", ["--cache_vision_codes", "false"]),
        "cached": ("labels", []),
        "column": ("coded", []),
    }
    for name, (labels, options) in runs.items():
        assert pretrain(place, tmp_path / name, str(place / labels), *more, *options) == 0
    for name in ("cached", "column"):
        assert all(
            torch.equal(a, b) for a, b in zip(weights(tmp_path / "images").values(), weights(tmp_path / name).values())
        )
    assert not (tmp_path / "column" / "vision_codes").exists() and not (tmp_path / "images" / "vision_codes").exists()
    (cache,) = (tmp_path / "cached" / "vision_codes").iterdir()
    assert len(list(cache.iterdir())) == 5
    report = json.loads((tmp_path / "cached" / "data_report.json").read_text())
    assert report["total"]["steps"] >= 16
    metrics = json.loads((tmp_path / "cached" / "eval_results.json").read_text())
    assert {"eval_loss", "eval_latent_accuracy"} <= set(metrics)


def test_a_resumed_pretraining_ends_where_an_uninterrupted_one_does(place, tmp_path):
    data = f"{place / 'labels'},{place / 'others'}"
    more = ["--save_steps", "3", "--seed", "5"]
    assert pretrain(place, tmp_path / "whole", data, *more, "--max_steps", "6") == 0
    assert pretrain(place, tmp_path / "again", data, *more, "--max_steps", "6", "--resume_from_checkpoint",
                    str(tmp_path / "whole" / "checkpoint-3")) == 0  # fmt: skip
    assert all(
        torch.equal(a, b) for a, b in zip(weights(tmp_path / "whole").values(), weights(tmp_path / "again").values())
    )


def test_epochs_become_steps(place, tmp_path):
    more = ["--max_steps", "-1", "--num_train_epochs", "2", "--save_strategy", "no", "--eval_episodes", "1"]
    assert pretrain(place, tmp_path / "policy", str(place / "coded"), *more) == 0
    state = json.loads((tmp_path / "policy" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 * (NUM_STEPS - 4) // 4


def test_labels_that_do_not_go_together_are_refused(place, tmp_path, capsys):
    quantizer = build("nsvq")
    quantizer.vector_quantizer.codebook.data += 1
    quantizer.save_pretrained(tmp_path / "quantizer")
    arguments = ["--model", str(tmp_path / "quantizer"), "--data", str(place / "more"), "--frame_gap", "2"]
    assert (
        scripts.label([*arguments, "--output", str(tmp_path / "labels"), "--num_workers", "0", "--device", "cpu"]) == 0
    )
    code = pretrain(place, tmp_path / "policy", f"{place / 'labels'},{tmp_path / 'labels'}", "--max_steps", "1")
    assert "`data` mixes labels of different quantizers: `quantizer_hash`" in error_of(capsys, code)
    code = pretrain(place, tmp_path / "policy", f"{place / 'labels'},{place / 'labels'}", "--max_steps", "1")
    assert "twice" in error_of(capsys, code)
    code = pretrain(place, tmp_path / "policy", str(place / "clips"), "--max_steps", "1")
    assert "holds no labels: it has no labels.json" in error_of(capsys, code)
