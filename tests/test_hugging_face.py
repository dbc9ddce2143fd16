"""Sources as Hugging Face data sets: the reader's own frames, shared out over nodes and workers, resumed, cached."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Image, List, Value
from datasets.distributed import split_dataset_by_node
from memory_source import MemorySource
from shared_files import shared_path
from torch.utils.data import DataLoader
from video_files import encode_video, moving_frames

from lapa.data.episode_source import raise_error
from lapa.data.frame_pairs import FrameGap, episode_frame_pairs, resize_frame
from lapa.data.hugging_face import (
    episode_dataset,
    iterable_episode_dataset,
    iterable_pair_dataset,
    iterable_step_dataset,
    pair_dataset,
    step_dataset,
)
from lapa.data.mixture import FramePairSource
from lapa.data.open_source import open_source
from lapa.data.pair_filters import StaticPairs
from lapa.data.schema import ReadError

LENGTHS = [[5, 4, 6], [3, 9], [7]]
BRIDGE = "data/bridge_rlds/1.0.0"


def memory(**options):
    """A source whose frames tell which they are, with pairs two frames apart."""
    return FramePairSource(MemorySource("memory", LENGTHS, **options), frame_gap=2)


def keys(rows):
    return [(row["source"], row["episode_id"], tuple(row["steps"])) for row in rows]


def first_of(rows):
    """For a loader whose batches are single rows."""
    return rows[0]


@pytest.mark.parametrize("streaming", [True, False])
def test_pairs_are_those_of_the_reader(streaming, tmp_path):
    source = memory()
    made = iterable_pair_dataset(source) if streaming else pair_dataset(source, cache_dir=tmp_path)
    expected = [pair for episode in source.source for pair in episode_frame_pairs(episode, "front", FrameGap(2))]
    rows = list(made)
    assert len(rows) == len(expected) == 22
    for row, pair in zip(rows, expected):
        assert (row["episode_id"], row["source"], row["camera"]) == (pair.episode_id, pair.source, pair.camera)
        assert tuple(row["steps"]) == pair.steps and row["seconds"] == pytest.approx(0.4)
        assert np.array_equal(np.stack([row["first_frame"], row["second_frame"]]), pair.frames)
        assert row["instruction"].startswith("do ")
    assert made.features["first_frame"] == Image(mode="RGB")
    assert made.features["steps"] == List(Value("int64"), length=2)


def test_image_files_of_a_source_are_kept_as_they_are():
    """And frames that are resized are those that the trainers see."""
    source = open_source(shared_path(BRIDGE), cameras=["image_0"])
    episode = next(iter(source))
    row = next(iter(iterable_pair_dataset(source).decode(False)))
    assert row["first_frame"]["bytes"] == episode.frames["image_0"].encoded[0]
    row = next(iter(iterable_pair_dataset(source, image_size=(40, 32))))
    assert np.array_equal(row["second_frame"], resize_frame(episode.frame("image_0", 3), (40, 32)))
    assert row["second_frame"].size == (32, 40)


def test_steps_and_episodes_of_the_bridge_shard(tmp_path):
    path = shared_path(BRIDGE)
    episodes = list(open_source(path))
    steps, whole = step_dataset(path, cache_dir=tmp_path), episode_dataset(path, cache_dir=tmp_path)
    assert len(steps) == 250 and len(whole) == 25
    row = steps[13]
    assert (row["episode_id"], row["step_index"], row["timestamp"]) == (episodes[1].episode_id, 3, 0.6)
    assert np.array_equal(np.float32(row["action"]), episodes[1].action[3])
    assert np.array_equal(np.float32(row["proprio"]), episodes[1].proprio[3])
    assert (row["embodiment"], row["unnorm_key"]) == ("widowx", "bridge_dataset")
    assert row["instruction"] == episodes[1].instruction
    assert np.array_equal(row["image"], episodes[1].frame("image_0", 3))
    assert np.array_equal(np.float32(whole[4]["action"]), episodes[4].action)
    assert whole[4]["cameras"] == ["image_0"] and whole[4]["num_steps"] == 10 and "images" not in whole.features


def test_episodes_with_their_images(tmp_path):
    frames = moving_frames(5)
    (tmp_path / "clip.mp4").write_bytes(encode_video(frames))
    (row,) = iterable_episode_dataset(tmp_path, images=True)
    expected = next(iter(open_source(tmp_path))).read_frames("video", range(5))
    assert all(np.array_equal(image, frame) for image, frame in zip(row["images"], expected, strict=True))
    (row,) = iterable_episode_dataset(tmp_path, images=True, image_format="jpeg", image_size=32)
    assert row["images"][0].format == "JPEG" and row["images"][0].size == (32, 32)


def test_workers_and_nodes_are_disjoint_and_together_complete():
    expected = set(keys(iterable_pair_dataset(memory())))
    made = iterable_pair_dataset(memory(), min_pieces=4)
    assert made.num_shards >= 4
    loaded = keys(DataLoader(made, batch_size=1, num_workers=2, collate_fn=first_of))
    assert len(loaded) == len(expected) and set(loaded) == expected
    parts = [keys(split_dataset_by_node(iterable_pair_dataset(memory(), min_pieces=4), rank, 2)) for rank in (0, 1)]
    assert all(parts) and not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == sorted(expected)


@pytest.mark.parametrize("taken", [0, 1, 5, 8, 21])
def test_a_state_resumes_exactly(taken):
    expected = keys(iterable_pair_dataset(memory(), min_pieces=4))
    made = iterable_pair_dataset(memory(), min_pieces=4)
    rows = iter(made)
    before = keys(next(rows) for _ in range(taken))
    state = made.state_dict()
    again = pickle.loads(pickle.dumps(iterable_pair_dataset(memory(), min_pieces=4)))
    again.load_state_dict(state)
    assert before + keys(again) == expected


def test_it_goes_on_with_the_library():
    """Columns map, filter and batch as those of any other data set."""
    made = iterable_step_dataset(MemorySource("memory", LENGTHS, action_dim=3))
    late = made.filter(lambda row: row["step_index"] > 5).select_columns(["action", "step_index"]).with_format("torch")
    (batch,) = DataLoader(late, batch_size=8)
    assert batch["action"].shape == (4, 3) and batch["action"].dtype == torch.float32
    assert batch["step_index"].tolist() == [6, 7, 8, 6]


def test_steps_without_what_is_required_are_left_out(caplog):
    source = MemorySource("memory", LENGTHS, blank=[(1, 1)])
    with caplog.at_level("INFO", "lapa.data.hugging_face_rows"):
        assert list(iterable_step_dataset(source)) == []
    assert caplog.messages[-1] == "read so far: steps 0, episodes 6, skipped_episodes/no_action 6, unreadable 0"
    # The episode of nine steps has no images.
    rows = list(iterable_step_dataset(source, require=["instruction"]))
    assert len(rows) == sum(map(sum, LENGTHS)) - 9 and rows[0]["action"] is None
    with pytest.raises(ValueError, match="`require` must hold some of action, instruction, got 'image'"):
        iterable_step_dataset(source, require=["image"])


def test_filters_leave_pairs_out():
    kept = iterable_pair_dataset(FramePairSource(memory().source, frame_gap=2, filters=[StaticPairs(0.9)]))
    assert list(kept) == []


def test_what_cannot_be_read(tmp_path):
    damaged = MemorySource("damaged", [[4, 0, 4], [5]], broken={(1, 0): [3]})
    with pytest.raises(ReadError, match="record 1: checksum"):
        list(iterable_pair_dataset(damaged))
    with pytest.raises(ReadError, match="record 1: checksum"):
        pair_dataset(damaged, cache_dir=tmp_path)
    gapped = FramePairSource(damaged, frame_gap=2)
    assert keys(iterable_pair_dataset(gapped, on_error="skip")) == [
        ("damaged", f"0/{number}", (step, step + 2)) for number in (0, 2) for step in (0, 1)
    ]
    with pytest.raises(ReadError, match="2 of 4 episodes could not be read"):
        pair_dataset(gapped, on_error="skip", max_skipped=0.4, cache_dir=tmp_path)
    assert len(pair_dataset(gapped, on_error="skip", max_skipped=0.5, cache_dir=tmp_path)) == 4


def test_one_error_that_stands_for_many_episodes(tmp_path, caplog):
    """As where a file is missing: what did not come is what counts, not how often it was said."""

    class Lost(MemorySource):
        def read(self, shard, episodes=None, on_error=raise_error):
            if shard == 0:
                yield from super().read(shard, episodes, on_error)
            else:
                on_error(ReadError("the file is missing"))

    source = FramePairSource(Lost("lost", [[3, 3], [3] * 5, [3]]), frame_gap=2)
    with pytest.raises(ReadError, match=r"6 of 8 episodes could not be read, .* `max_skipped`"):
        pair_dataset(source, on_error="skip", max_skipped=0.5, cache_dir=tmp_path)
    assert len(pair_dataset(source, on_error="skip", max_skipped=0.75, cache_dir=tmp_path)) == 2
    with pytest.raises(ReadError, match="the file is missing"):
        list(iterable_pair_dataset(source))
    with caplog.at_level("INFO", "lapa.data.hugging_face_rows"):
        assert len(list(iterable_pair_dataset(source, on_error="skip", max_skipped=0.1))) == 2
    assert caplog.messages[-1].endswith("unreadable 6")


def test_the_cache_is_found_again_and_by_all_that_rows_depend_on(tmp_path):
    source = open_source(shared_path(BRIDGE), cameras=["image_0"])
    first = pair_dataset(source, cache_dir=tmp_path)
    program = (
        "import sys\nfrom lapa.data.hugging_face import pair_dataset\nfrom lapa.data.open_source import open_source\n"
        "print(pair_dataset(open_source(sys.argv[1], cameras=['image_0']), cache_dir=sys.argv[2]).cache_files[0]['filename'])"
    )
    command = [sys.executable, "-c", program, shared_path(BRIDGE), tmp_path]
    output = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    assert output.strip() == first.cache_files[0]["filename"]
    files = {
        pair_dataset(given, cache_dir=tmp_path, **options).cache_files[0]["filename"]
        for given, options in (
            (source, {}),
            (source, {"image_size": 32}),
            (FramePairSource(source, frame_gap=2), {}),
            (FramePairSource(source, filters=[StaticPairs()]), {}),
            (open_source(shared_path(BRIDGE), cameras=["image_1"]), {}),
        )
    }
    assert len(files) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, "`sources` must hold at least one source"),
        ({"sources": [memory(), memory()]}, "`sources` must have different names, got 'memory' twice"),
        ({"image_format": "gif"}, "`image_format` must be one of png, jpeg, got 'gif'"),
        ({"on_error": "ignore"}, "`on_error` must be one of raise, skip, got 'ignore'"),
        ({"min_pieces": 0}, "`min_pieces` must be at least 1, got 0"),
        ({"max_skipped": 2}, r"`max_skipped` must lie in \[0, 1\]"),
        ({"image_size": 0}, "`image_size` must be one length"),
        ({"sources": "/nowhere/at/all"}, "does not exist"),
    ],
)
def test_wrong_arguments(options, message):
    options = {"sources": memory(), **options}
    with pytest.raises(ValueError, match=message):
        iterable_pair_dataset(options.pop("sources"), **options)
