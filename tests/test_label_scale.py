"""Labelling with many processes, and with processes that are killed: nothing lost, nothing doubled, the same bytes."""

import json
import random
import subprocess
import sys
import time

import pytest
from label_processes import contents, make_clips, run_label, start_label
from tiny_models import TINY_VISION_TOKENIZER, build

from lapa import LapaVisionTokenizer, LapaVisionTokenizerConfig
from lapa.data.label_manifest import LabelManifest
from lapa.data.label_table import LabelFolder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Clips, a quantizer with spread codes, a vision tokenizer, and the arguments that name them."""
    import torch

    folder = tmp_path_factory.mktemp("place")
    make_clips(folder / "clips")
    model = build("nsvq")
    pixels = torch.rand(16, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    embeddings = model.encode(pixels).latent_action_embeddings.detach().flatten(0, 1)
    model.vector_quantizer.codebook.data = embeddings[::8].clone()
    model.save_pretrained(folder / "quantizer")
    LapaVisionTokenizer(LapaVisionTokenizerConfig(**TINY_VISION_TOKENIZER)).save_pretrained(folder / "vision")
    return folder


def arguments(place, output, *more):
    base = ["--model", str(place / "quantizer"), "--data", str(place / "clips"), "--output", str(output)]
    sizes = ["--frame_gap", "2", "--frequency", "10", "--episodes_per_unit", "2", "--batch_size", "4"]
    return [*base, *sizes, "--device", "cpu", "--num_workers", "1", *more]


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """What an uninterrupted run of one process writes."""
    output = tmp_path_factory.mktemp("whole") / "labels"
    assert run_label(arguments(place, output)) == 0
    files = contents(output)
    assert sorted(files) == ["README.md", *[f"data/labels-0000{i}-of-00006.parquet" for i in range(6)], "labels.json"]
    assert LabelFolder(output).num_rows == 12 * 6
    return files


def kill_after(process, output, num_units, seconds):
    """Kills a process some time after it has committed so many units, or lets it end."""
    while process.is_alive() and len(list(output.glob("data/labels-*"))) < num_units:
        time.sleep(0.001)
    process.join(seconds)
    process.kill()
    process.join()


@pytest.mark.parametrize("trial", range(3))
def test_killed_at_any_moment_and_run_again(place, whole, tmp_path, trial):
    output, generator = tmp_path / "labels", random.Random(trial)
    for first, last in ((0, 2), (2, 5)):
        process = start_label(arguments(place, output))
        kill_after(process, output, generator.randint(first, last), generator.uniform(0, 0.03))
        assert process.exitcode == -9 or first
        files = contents(output)
        # What is there under its name is whole.
        assert all(files[name] == whole[name] for name in files if name.startswith("data/labels"))
    assert run_label(arguments(place, output)) == 0
    assert contents(output) == whole


def test_unfinished_files_of_dead_processes_are_cleared_away(place, whole, tmp_path):
    output = tmp_path / "labels"
    process = start_label(arguments(place, output))
    while not any(".partial-" in name and name.startswith("data/") for name in contents(output)):
        assert process.exitcode is None
        time.sleep(0.001)
    process.kill()
    process.join()
    (output / "data" / ".labels-00000-of-00006.parquet.partial-elsewhere-1").write_bytes(b"another machine is at work")
    left = [name for name in contents(output) if ".partial-" in name]
    assert len(left) > 1
    assert run_label(arguments(place, output)) == 0
    after = contents(output)
    # That of another machine is young, and stays.
    assert after.pop("data/.labels-00000-of-00006.parquet.partial-elsewhere-1")
    assert after == whole


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_write_what_one_process_does(place, whole, tmp_path, world_size):
    output = tmp_path / "labels"
    ranks = [
        start_label(arguments(place, output), RANK=str(rank), WORLD_SIZE=str(world_size)) for rank in range(world_size)
    ]
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    assert contents(output) == whole


def test_array_jobs_share_a_folder(place, whole, tmp_path):
    output = tmp_path / "labels"
    for index in (2, 0):
        assert run_label(arguments(place, output, "--shard_index", str(index), "--num_shards", "3")) == 0
    done = contents(output)
    assert sorted(name[16:17] for name in done if name.startswith("data/")) == ["0", "2", "3", "5"]
    manifest = LabelManifest.load(output)
    assert not manifest.complete and manifest.command and "--shard_index" not in manifest.command
    with pytest.raises(
        ValueError, match=r"labels is not complete: 2 of 6 units are missing. To finish it: lapa label --d"
    ):
        LabelFolder(output)
    assert run_label(arguments(place, output, "--shard_index", "1", "--num_shards", "3")) == 0
    assert contents(output) == whole


@pytest.mark.parametrize("more", [["--num_workers", "0"], ["--num_workers", "3"]], ids=" ".join)
def test_reader_processes_change_nothing(place, whole, tmp_path, more):
    assert run_label(arguments(place, tmp_path / "labels", *more)) == 0
    assert contents(tmp_path / "labels") == whole


def test_published_rows_survive_a_kill_too(place, tmp_path):
    more = ["--format", "jsonl", "--vision_tokenizer", str(place / "vision")]
    assert run_label(arguments(place, tmp_path / "whole" / "labels", *more)) == 0
    whole = contents(tmp_path / "whole" / "labels")
    assert sum(name.endswith(".jsonl") for name in whole) == 6
    output = tmp_path / "labels"
    for num_units in (1, 4):
        process = start_label(arguments(place, output, *more))
        kill_after(process, output, num_units, 0)
    assert run_label(arguments(place, output, *more)) == 0
    assert contents(output) == whole


def test_memory_does_not_grow_with_the_source(place, tmp_path):
    peaks = []
    for num_clips in (30, 300):
        clips = make_clips(tmp_path / f"clips{num_clips}", num_clips, num_frames=10, size=160, distinct=10)
        report = tmp_path / f"{num_clips}.json"
        base = [*arguments(place, tmp_path / f"labels{num_clips}"), "--data", str(clips), "--episodes_per_unit", "20"]
        process = start_label(base, report)
        process.join()
        assert process.exitcode == 0
        peaks.append(json.loads(report.read_text()))
    # Frames alone would be 200 MB more.
    for small, large in zip(*peaks):
        assert large < 1.1 * small, peaks


@pytest.mark.slow
def test_torchrun(place, whole, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29511"]
    command = [*launch, "-m", "lapa.cli", "label", *arguments(place, tmp_path / "labels")]
    subprocess.run(command, check=True, capture_output=True)
    assert contents(tmp_path / "labels") == whole
