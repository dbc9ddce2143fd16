"""The examples run, and what they write is what they say."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from lapa.data.frame_pairs import FrameGap
from lapa.data.jsonl import read_rows
from lapa.data.open_source import open_mixture, open_source, source_kind

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """What `small_datasets.py` writes."""
    spec = importlib.util.spec_from_file_location("small_datasets", EXAMPLES / "small_datasets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path_factory.mktemp("small")
    module.main(root)
    return root, module.record(1)


@pytest.mark.parametrize(
    ("folder", "kind", "options"),
    [
        ("rlds/1.0.0", "rlds", {"frequency": 10}),
        ("lerobot", "lerobot", {}),
        ("ssv2", "something_something", {}),
        ("videos", "videos", {}),
        ("clips", "frames", {"frequency": 10}),
    ],
)
def test_small_datasets_of_every_kind(folder, kind, options, small):
    """The same clip through every reader: the same instruction, times, pairs, and nearly the same pixels."""
    root, (frames, actions, instruction) = small
    assert source_kind(str(root / folder)) == kind
    source = open_source(root / folder, **options)
    episode = list(source)[1]
    assert len(list(source)) == 4 and episode.num_steps == 30
    if kind != "frames":
        assert episode.instruction == instruction
    assert np.allclose(episode.timestamps, np.arange(30) / 10, atol=1e-3)
    assert FrameGap(seconds=0.6).pairs(episode).steps.tolist() == [[step, step + 6] for step in range(24)]
    for step, frame in zip((0, 17, 29), episode.read_frames(source.cameras[0], [0, 17, 29])):
        assert np.abs(frame.astype(int) - frames[step]).mean() < 6
    if kind in ("rlds", "lerobot"):
        assert np.array_equal(episode.action, actions)


def test_small_rows_and_mixture(small):
    root, _ = small
    assert len(list(read_rows(root / "latent.jsonl", "latent"))) == 20
    assert next(read_rows(root / "action.jsonl", "action")).action.shape == (7,)
    robot, video = open_mixture(root / "mixture.yaml")
    assert (robot.weight, robot.gap.seconds, video.gap.seconds, len(video.filters)) == (2, 0.6, 1.2, 2)
