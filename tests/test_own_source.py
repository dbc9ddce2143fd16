"""A reader of one's own, named by module and class: the example, behind commands, in mixtures and in loader workers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch.utils.data import DataLoader

from lapa.cli import main
from lapa.data.hugging_face import iterable_pair_dataset
from lapa.data.open_source import open_mixture, open_source, source_options

KIND = "npz_source:NpzSource"
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def episodes(tmp_path, monkeypatch):
    """Two episodes and a damaged one."""
    monkeypatch.syspath_prepend(EXAMPLES)
    folder = tmp_path / "episodes"
    folder.mkdir()
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 10, 3), dtype=np.uint8)
    for number in range(2):
        actions = np.full((6, 3), number, np.float64)
        np.savez(folder / f"e{number}.npz", frames=frames[number], action=actions, instruction="push")
    (folder / "broken.npz").write_bytes(b"PK")
    return folder, frames


def test_the_example_reads_what_is_there(episodes):
    folder, frames = episodes
    source = open_source(folder, kind=KIND, frequency=10, embodiment="arm")
    errors = []
    read = [episode for shard in range(3) for _, episode in source.read(shard, on_error=errors.append)]
    assert [episode.episode_id for episode in read] == ["e0", "e1"] and "broken.npz" in str(errors)
    assert np.array_equal(read[1].read_frames("frames", [4, 2]), frames[1, [4, 2]])
    assert read[1].action.dtype == np.float32 and read[1].action[0].tolist() == [1, 1, 1]
    assert read[0].timestamps[5] == 0.5 and read[0].instructions == ("push",) and read[0].embodiment == "arm"
    assert {"split", "cameras", "frame_gap_seconds", "embodiment", "unnorm_key"} <= set(source_options(KIND))
    # A pickle in an archive is not loaded.
    np.savez(folder / "objects.npz", frames=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"objects\.npz: Object arrays cannot be loaded"):
        list(open_source(folder, kind=KIND).read(3))


def test_commands_and_mixtures_take_it(episodes, tmp_path, capsys):
    folder, _ = episodes
    assert main(["inspect", str(folder), "--kind", KIND, "--frame-gap", "2", "--json"]) == 0
    (content,) = json.loads(capsys.readouterr().out)
    assert (content["kind"], content["episodes_read"], content["pairs"]["count"]) == (KIND, 2, 8)
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump([{"path": "episodes", "kind": KIND, "frequency": 5}]))
    (pairs,) = open_mixture(tmp_path / "mixture.yaml")
    assert pairs.source.frequency == 5 and type(pairs.source).__name__ == "NpzSource"


def test_workers_read_it(episodes):
    folder, _ = episodes
    made = iterable_pair_dataset({"path": folder, "kind": KIND, "frame_gap": 2}, on_error="skip")
    loader = DataLoader(made, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(row["episode_id"] for row in loader) == ["e0"] * 4 + ["e1"] * 4


def test_the_example_runs_as_it_says(episodes):
    """In a process of its own, found through PYTHONPATH; without that it is not found, wherever the data lie."""
    folder, _ = episodes
    command = [sys.executable, "-m", "lapa.cli", "inspect", str(folder), "--kind", KIND]
    environment = {"PYTHONPATH": str(EXAMPLES), "PATH": ""}
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    (folder / "npz_source.py").write_text("raise SystemExit('ran')")
    result = subprocess.run(command, env={"PATH": ""}, cwd="/", capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "cannot be imported: No module named 'npz_source'" in result.stderr


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("npz_source:Nothing", "cannot be imported"),
        ("no_such_module:Source", "cannot be imported: No module named"),
        ("npz_source:np", "is no subclass of lapa.data.episode_source.EpisodeSource"),
        ("../npz_source:NpzSource", "must read package.module:ClassName"),
        ("npz_source:", "must read package.module:ClassName"),
        ("npz", "`kind` must be one of rlds, .*, or package.module:ClassName, got 'npz'"),
    ],
)
def test_what_is_no_reader(kind, message, episodes):
    with pytest.raises(ValueError, match=message):
        open_source(episodes[0], kind=kind)
    with pytest.raises(ValueError, match="`colour` is no option"):
        open_source(episodes[0], kind=KIND, colour=1)
