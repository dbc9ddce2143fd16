"""LeRobot data sets: v2.1 and v3.0 give the same episodes, from whatever file system; what is damaged or absent is named."""

import pickle
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_files import (
    CODECS,
    DATA,
    FEATURES,
    FPS,
    LENGTHS,
    NAMES,
    RECORDINGS,
    SMALL,
    TABLE,
    TASKS,
    TOP,
    VERSIONS,
    VIDEO,
    WRIST,
    Files,
    Recording,
    change_feature,
    change_info,
    change_table,
    episode_table,
    joined_videos,
    places,
    write_lerobot,
)
from video_files import encode_video, moving_frames

from lapa.data.lerobot_format import LeRobotSource
from lapa.data.open_source import open_source
from lapa.data.parquet_rows import ParquetRows
from lapa.data.schema import ReadError


@pytest.fixture(scope="module", params=CODECS)
def both(request, tmp_path_factory) -> dict[str, Path]:
    """The same recordings in both versions, videos of one codec."""
    folder = tmp_path_factory.mktemp(request.param)
    return {
        version: write_lerobot(
            folder / version / "arm", version, RECORDINGS, TASKS, codec=request.param, features=FEATURES
        )
        for version in VERSIONS
    }


@pytest.fixture(params=VERSIONS)
def small(request, tmp_path) -> Path:
    """Two short episodes."""
    return write_lerobot(tmp_path / "arm", request.param, SMALL, TASKS, features=FEATURES)


@pytest.fixture
def table(tmp_path) -> Path:
    """Two short episodes in v3.0."""
    return write_lerobot(tmp_path / "arm", "v3.0", SMALL, TASKS, features=FEATURES)


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        np.testing.assert_array_equal(one, other)


def assert_same_episodes(actual, expected, with_frames=True):
    actual, expected = list(actual), list(expected)
    assert [one.episode_id for one in actual] == [one.episode_id for one in expected]
    for one, other in zip(actual, expected):
        for key in ("source", "num_steps", "instructions", "action_names", "embodiment", "metadata", "cameras"):
            assert getattr(one, key) == getattr(other, key), key
        for key in ("action", "proprio", "timestamps"):
            np.testing.assert_array_equal(getattr(one, key), getattr(other, key))
        for camera in one.cameras if with_frames else ():
            assert_same(one.read_frames(camera, range(one.num_steps)), other.read_frames(camera, range(one.num_steps)))


# What is read


def test_versions_give_the_same_episodes(both):
    old, new = (LeRobotSource(str(both[version])) for version in VERSIONS)
    assert old.warnings == new.warnings == ()
    assert old.cameras == new.cameras == (TOP, WRIST)
    assert [shard.name for shard in old.shards] == ["episodes-000000-000004"]
    assert [(shard.name, shard.num_episodes) for shard in new.shards] == [
        ("data/chunk-000/file-000.parquet", 2),
        ("data/chunk-000/file-001.parquet", 2),
        ("data/chunk-000/file-002.parquet", 1),
    ]
    assert_same_episodes(old, new)


def test_episodes_are_what_was_recorded(both):
    source = LeRobotSource(str(both["v3.0"]))
    assert (source.name, source.unnorm_key, source.num_episodes) == ("arm/train", "arm", 5)
    episodes = list(source)
    for index, (episode, recording) in enumerate(zip(episodes, RECORDINGS, strict=True)):
        assert episode.episode_id == f"episode_{index:06d}" and episode.source == "arm/train"
        assert episode.embodiment == "so100" and episode.metadata == {"episode_index": index}
        assert episode.action.dtype == episode.proprio.dtype == np.float32 and episode.action_names == NAMES
        np.testing.assert_array_equal(episode.action, recording.columns["action"])
        np.testing.assert_array_equal(episode.proprio, recording.columns["observation.state"].astype(np.float32))
        # To the bit: the float32 of the file is not.
        np.testing.assert_array_equal(episode.timestamps, np.arange(LENGTHS[index]) / FPS)
        for camera, frames in recording.frames.items():
            read = episode.read_frames(camera, range(LENGTHS[index]))
            for step, one in enumerate(read):
                distances = [np.abs(one.mean(axis=2) - frame.mean(axis=2)).mean() for frame in frames]
                error = distances.pop(step)
                assert error < 6 and error < 0.7 * min(distances), (camera, step)
    assert [episode.instructions for episode in episodes] == [
        ("push the block",),
        ("stop", "push the block"),
        ("push the block",),
        (),
        ("push the block",),
    ]


def test_any_order_and_any_file_system(both):
    for root in both.values():
        source = LeRobotSource(str(root), cameras=[TOP])
        everything = list(source)
        memory = fsspec.filesystem("memory")
        memory.put(f"{root}/", "/sets/arm", recursive=True)
        try:
            remote = LeRobotSource("memory://sets/arm", cameras=[TOP])
            assert_same_episodes(remote, everything)
            last = len(source.shards) - 1
            numbers = [*reversed(range(source.shards[last].num_episodes)), 0]
            for one, kind in ((source, "local"), (pickle.loads(pickle.dumps(source)), "pickled"), (remote, "remote")):
                read = list(one.read(last, numbers))
                assert [number for number, _ in read] == numbers, kind
                first = sum(shard.num_episodes for shard in source.shards[:last])
                expected = [everything[first + number] for number in numbers]
                assert_same_episodes([episode for _, episode in read], expected)
        finally:
            memory.rm("/sets", recursive=True)
        with pytest.raises(ValueError, match="`episodes` has 5"):
            list(source.read(0, [5]))


def test_an_episode_pickles_with_and_without_its_index(small):
    episode = next(iter(LeRobotSource(str(small))))
    frames = episode.read_frames(TOP, [0, 4])
    assert_same(pickle.loads(pickle.dumps(episode)).read_frames(TOP, [0, 4]), frames)


@pytest.mark.parametrize("version, together", [("v2.1", 1), ("v3.0", 1), ("v3.0", 2)])
def test_images_stored_beside_the_steps(tmp_path, version, together):
    root = write_lerobot(tmp_path / "arm", version, RECORDINGS, TASKS, stored=[WRIST], episodes_per_row_group=together)
    source = LeRobotSource(str(root))
    for shard in range(len(source.shards)):
        for _, episode in source.read(shard):
            frames = RECORDINGS[episode.metadata["episode_index"]].frames[WRIST]
            steps = [len(frames) - 1, 0, 2, 0]
            assert_same(episode.read_frames(WRIST, steps), [frames[step] for step in steps])
            other = pickle.loads(pickle.dumps(episode))
            assert len(pickle.dumps(episode.frames[WRIST])) < 2000, "encoded images travel along"
            assert_same(other.read_frames(WRIST, [1]), frames[1:2])
    change_feature(root, WRIST, dtype="image")
    for relative in sorted(str(path.relative_to(root)) for path in root.glob("data/*/*.parquet")):
        count = pq.read_metadata(root / relative).num_rows
        kind = pq.read_schema(root / relative).field(WRIST).type
        change_table(root, relative, **{WRIST: pa.array([{"bytes": None, "path": "0.png"}] * count, kind)})
    with pytest.raises(ReadError, match=rf"no image in row 0 of episode 0, '{WRIST}'"):
        next(iter(source)).frame(WRIST, 0)


def test_only_the_row_group_of_the_episode_is_read(tmp_path):
    """With the row groups of the others overwritten, an episode is still read, numbers and images."""
    root = write_lerobot(tmp_path / "arm", "v3.0", RECORDINGS, TASKS, stored=[TOP, WRIST], episodes_per_file=5)
    source = LeRobotSource(str(root))
    (expected,) = (episode for _, episode in source.read(0, [2]))
    frames = expected.read_frames(TOP, range(3))
    content = bytearray((root / DATA).read_bytes())
    metadata = pq.read_metadata(root / DATA)
    assert metadata.num_row_groups == 5
    for group in (0, 1, 3, 4):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            start = column.dictionary_page_offset or column.data_page_offset
            content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (root / DATA).write_bytes(content)
    ((_, episode),) = source.read(0, [2])
    assert_same_episodes([episode], [expected], with_frames=False)
    assert_same(episode.read_frames(TOP, range(3)), frames)
    errors: list[ReadError] = []
    assert [number for number, _ in source.read(0, on_error=errors.append)] == [2]
    assert [str(error).split(":")[0] for error in errors] == ["episode 0", "episode 1", "episode 3", "episode 4"]
    assert all(str(root / DATA) in str(error) for error in errors)


def test_rows_are_found_without_statistics(table):
    expected = list(LeRobotSource(str(table), cameras=[]))
    content = pq.read_table(table / DATA)
    pq.write_table(content, table / DATA, row_group_size=4, write_statistics=False)
    with ParquetRows(LeRobotSource(str(table)).tree, DATA) as rows:
        assert np.isinf(rows._bounds).all()
    assert_same_episodes(LeRobotSource(str(table), cameras=[]), expected)


# Ranges of videos


def test_the_last_frame_may_be_what_a_range_ends_with(table):
    """Some writers put the time of the last frame in `to_timestamp`."""
    expected = list(LeRobotSource(str(table), cameras=[TOP]))
    first, second = LENGTHS[3] / FPS, (LENGTHS[3] + LENGTHS[4]) / FPS
    change_table(table, TABLE, **places(TOP, to_timestamp=[first - 1 / FPS, second - 1 / FPS]))
    assert_same_episodes(LeRobotSource(str(table), cameras=[TOP]), expected)
    # Without any end, an episode ends where the next one begins.
    change_table(table, TABLE, **places(TOP, to_timestamp=[None, None]))
    assert_same_episodes(LeRobotSource(str(table), cameras=[TOP]), expected)


def test_no_frame_is_taken_from_the_next_episode(table):
    """The first video is a frame short: what comes where its last frame would be is the next episode's."""
    frames = [RECORDINGS[3].frames[TOP][:-1], RECORDINGS[4].frames[TOP]]
    content, ends = joined_videos([encode_video(part, options={"g": "2"}, rate=FPS) for part in frames])
    (table / VIDEO).write_bytes(content)
    change_table(table, TABLE, **places(TOP, from_timestamp=[0.0, ends[0]], to_timestamp=ends))
    source = LeRobotSource(str(table), cameras=[TOP])
    one, other = list(source)
    with pytest.raises(
        ReadError, match=r"file-000.mp4 \(episode 0\) has no frame at 0.133 s, where step 4 is, and at 1 of 5"
    ):
        one.frame(TOP, 0)
    assert len(other.read_frames(TOP, range(LENGTHS[4]))) == LENGTHS[4]


def test_frames_missing_at_the_start_of_a_range_shift_nothing(table):
    """The second episode's first three frames are lost, which its other frames must not make up for."""
    times = [*range(LENGTHS[3]), *range(LENGTHS[3] + 3, LENGTHS[3] + LENGTHS[4])]
    frames = [*RECORDINGS[3].frames[TOP], *RECORDINGS[4].frames[TOP][3:]]
    (table / VIDEO).write_bytes(encode_video(frames, options={"g": "1"}, times=times))
    one, other = list(LeRobotSource(str(table), cameras=[TOP]))
    assert len(one.read_frames(TOP, range(LENGTHS[3]))) == LENGTHS[3]
    with pytest.raises(ReadError, match=r"\(episode 1\) has no frame at 0.167 s, where step 0 is, and at 3 of 12"):
        other.frame(TOP, 11)


def test_frames_follow_the_times_of_the_steps(tmp_path):
    """Steps at every second frame of a video, jittering by a quarter of a frame."""
    frames = moving_frames(20)
    recording = Recording({TOP: frames}, {"action": np.zeros((20, 1), np.float32)}, [0] * 20)
    root = write_lerobot(tmp_path / "arm", "v2.1", [recording], TASKS)
    change_info(root, fps=FPS // 2)
    times = np.arange(0, 20, 2) / FPS + np.array([0, 1, -1, 1, 0, 1, 1, -1, 0, 1]) / (4 * FPS)
    half = Recording({}, {"action": np.zeros((10, 1), np.float32)}, [0] * 10)
    rows = episode_table(half, 0, FPS)
    rows = rows.set_column(rows.column_names.index("timestamp"), "timestamp", pa.array(times, pa.float32()))
    Files(root).add_table("data/chunk-000/episode_000000.parquet", rows)
    (root / "meta" / "episodes.jsonl").write_text('{"episode_index": 0, "tasks": [], "length": 10}\n')
    (episode,) = LeRobotSource(str(root))
    np.testing.assert_allclose(episode.timestamps, times, atol=1e-6)
    assert episode.frames[TOP].frames.tolist() == list(range(0, 20, 2))


@pytest.mark.parametrize("start, stop", [(-1.0, 1.0), (0.4, 0.2), (float("inf"), 1.0), (None, 1.0), (1e30, 2e30)])
def test_ranges_that_cannot_be(table, start, stop):
    change_table(table, TABLE, **places(TOP, from_timestamp=[start, 0.2], to_timestamp=[stop, 1.0]))
    errors: list[ReadError] = []
    assert len(list(LeRobotSource(str(table)).read(0, on_error=errors.append))) == 1
    (error,) = errors
    assert f"episode 0: {table / 'meta'}: camera '{TOP}' is said to record from" in str(error)


def test_a_camera_may_have_missed_an_episode(table):
    change_table(table, TABLE, **places(WRIST, chunk_index=[None, 0], file_index=[None, 0]))
    one, other = LeRobotSource(str(table))
    assert one.cameras == (TOP,) and other.cameras == (TOP, WRIST)


# Versions, splits, features


@pytest.mark.parametrize("version", ["v1.6", "v3.1", "3", None, 2.1, ["v2.1"]])
def test_other_versions_are_refused(small, version):
    change_info(small, codebase_version=version)
    with pytest.raises(ValueError, match=r"info.json has `codebase_version` .*; v2.0, v2.1, v3.0 can be read"):
        LeRobotSource(str(small))


def test_v2_0_is_read_where_it_is_laid_out_as_v2_1(tmp_path):
    root = write_lerobot(tmp_path / "arm", "v2.1", SMALL, TASKS)
    expected = list(LeRobotSource(str(root)))
    assert_same_episodes(LeRobotSource(str(change_info(root, codebase_version="v2.0"))), expected)
    with pytest.raises(ValueError, match="info.json has no `features`; this is not the layout of v2.0"):
        LeRobotSource(str(change_info(root, features=None)))


def test_splits(both):
    root = both["v2.1"]
    content = (root / "meta" / "info.json").read_text()
    try:
        change_info(root, splits={"train": "0:3", "test": " 3 : 9 ", "odd": "10%", "none": "7:8"})
        for split, expected in (("train", [0, 1, 2]), ("test", [3, 4]), (None, [0, 1, 2, 3, 4])):
            source = LeRobotSource(str(root), split=split, cameras=[])
            assert [episode.metadata["episode_index"] for episode in source] == expected
            assert source.name == ("arm" if split is None else f"arm/{split}")
            warning = f"split 'test' announces 6 episodes, {root / 'meta'} lists 2"
            assert source.warnings == ((warning,) if split == "test" else ())
        for split, message in (
            ("val", "`split` 'val' is unknown; .*info.json lists train, test, odd, none .None reads all"),
            ("odd", "split 'odd' of .*info.json must be a range of episodes as '0:50', got '10%'"),
            ("none", "`split` 'none' of .* has no episode"),
        ):
            with pytest.raises(ValueError, match=message):
                LeRobotSource(str(root), split=split)
        change_info(root, splits=None, total_episodes=7)
        source = LeRobotSource(str(root), cameras=[])
        assert source.num_episodes == 5
        assert source.warnings == (f"info.json announces 7 episodes, {root / 'meta'} lists 5",)
        with pytest.raises(ValueError, match="`split` 'test' is unknown; .* lists none"):
            LeRobotSource(str(root), split="test")
    finally:
        (root / "meta" / "info.json").write_text(content)


def test_splits_of_a_file_that_holds_several_episodes(both):
    root = both["v3.0"]
    content = (root / "meta" / "info.json").read_text()
    try:
        change_info(root, splits={"train": "1:4"})
        source = LeRobotSource(str(root))
        assert [shard.num_episodes for shard in source.shards] == [1, 2]
        assert_same_episodes(source, list(LeRobotSource(str(both["v2.1"])))[1:4])
    finally:
        (root / "meta" / "info.json").write_text(content)


@pytest.mark.parametrize(
    "names, expected",
    [
        (list(NAMES), NAMES),
        ({"motors": list(NAMES)}, NAMES),
        ({"gripper": 3, "x": 0, "z": 2, "y": 1}, NAMES),
        ({"left": ["x", "y"], "right": ["x", "y"]}, ("left.x", "left.y", "right.x", "right.y")),
        ([["x", "y"], ["z", "gripper"]], NAMES),
        ([0, 1, 2, 3], ("0", "1", "2", "3")),
        (None, None),
        ([], None),
        ({}, None),
        ([None] * 4, None),
        ([[[[[["x"]]]]]] * 4, None),
    ],
)
def test_names_of_actions(table, names, expected):
    change_feature(table, "action", names=names)
    source = LeRobotSource(str(table), cameras=[])
    assert next(iter(source)).action_names == expected and source.warnings == ()


def test_names_that_do_not_fit_are_left_out(table):
    source = LeRobotSource(str(change_feature(table, "action", names=["x"])), cameras=[])
    assert next(iter(source)).action_names is None
    assert source.warnings == ("`names` of 'action' are left out: 1 for 4 numbers",)


@pytest.mark.parametrize("robot", [None, "unknown", "", 3])
def test_the_robot_may_be_unknown(table, robot):
    change_info(table, robot_type=robot)
    assert next(iter(LeRobotSource(str(table), cameras=[]))).embodiment is None
    assert next(iter(LeRobotSource(str(table), cameras=[], embodiment="so100"))).embodiment == "so100"


@pytest.mark.parametrize(
    "action, expected",
    [
        (np.arange(5, dtype=np.float64), [[0], [1], [2], [3], [4]]),
        (np.array([True, False, True, True, False]), [[1], [0], [1], [1], [0]]),
        (np.array([[0, 255]] * 5, np.uint8), [[0, 255]] * 5),
        (np.array([[[1, 2], [3, 4]]] * 5, np.float32), [[1, 2, 3, 4]] * 5),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_actions_of_other_shapes_and_types(tmp_path, version, action, expected):
    recording = Recording({}, {"actions": action}, [0] * 5)
    root = write_lerobot(tmp_path / "arm", version, [recording], TASKS)
    (episode,) = LeRobotSource(str(root))
    np.testing.assert_array_equal(episode.action, expected)
    assert episode.action.dtype == np.float32 and episode.proprio is None and episode.cameras == ()


def test_features_can_be_chosen(table):
    change_feature(table, "observation.state", names=["a", "b", "c"])
    keys = ["observation.state", "action"]
    source = LeRobotSource(str(table), cameras=[], action_keys=keys, proprio_keys=[])
    for episode, recording in zip(source, SMALL):
        expected = np.concatenate(
            [recording.columns[key] for key in keys], axis=1, dtype=np.float32, casting="same_kind"
        )
        np.testing.assert_array_equal(episode.action, expected)
        assert episode.proprio is None
        assert episode.action_names == tuple(
            f"{key}.{name}" for key, names in zip(keys, ("abc", NAMES)) for name in names
        )
    for option in ("action_keys", "proprio_keys"):
        with pytest.raises(
            ValueError, match=rf"`{option}` has 'torque', which .*arm lacks; it has action, observation.state"
        ):
            LeRobotSource(str(table), **{option: ["torque"]})
    with pytest.raises(ValueError, match="`frame_gap_seconds` must be positive, got 0"):
        LeRobotSource(str(table), frame_gap_seconds=0)
    # A feature that info.json promises and the file lacks.
    change_feature(table, "torque", dtype="float32", shape=[1])
    with pytest.raises(ReadError, match=r"episode 0: .*file-000.parquet has no column 'torque'; it has action, "):
        next(iter(LeRobotSource(str(table), cameras=[], proprio_keys=["torque"])))


def test_unknown_cameras_and_depth_maps(small):
    with pytest.raises(ValueError, match=rf"`cameras` has 'wrist', which .*arm lacks; it has {TOP}, {WRIST}"):
        LeRobotSource(str(small), cameras=["wrist"])
    for told in ({"info": {"is_depth_map": True}}, {"video_info": {"video.is_depth_map": True}}):
        change_feature(small, WRIST, **{"info": None, "video_info": None} | told)
        source = LeRobotSource(str(small))
        assert source.cameras == (TOP,)
        assert source.warnings == (f"1 depth cameras are left out: {WRIST}",)
        with pytest.raises(ValueError, match=rf"`cameras` has '{WRIST}', which is a depth map.*it has {TOP}"):
            LeRobotSource(str(small), cameras=[WRIST])
    change_feature(small, WRIST, info=None, video_info=None)
    change_feature(small, "observation.depth.top", dtype="image", shape=[64, 96, 1])
    source = LeRobotSource(str(small))
    assert source.cameras == (TOP, WRIST) and source.warnings == (
        "1 depth cameras are left out: observation.depth.top",
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_instructions_without_numbered_tasks(tmp_path, version):
    """Where the table of tasks is gone, an episode's own list tells them; where that says nothing either, nothing does."""
    root = write_lerobot(tmp_path / "arm", version, RECORDINGS, TASKS)
    for path in (root / "meta").glob("tasks.*"):
        path.unlink()
    instructions = [episode.instructions for episode in LeRobotSource(str(root), cameras=[])]
    assert instructions[:2] == [("push the block",), ("stop", "push the block")] and instructions[3] == ()
    (root / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "go"}\n\n{"task_index": 1, "task": "go"}\n')
    source = LeRobotSource(str(root), cameras=[])
    errors: list[ReadError] = []
    found = [
        e.instructions for shard in range(len(source.shards)) for _, e in source.read(shard, on_error=errors.append)
    ]
    assert found == [("go",)] * 4
    relative = "episode_000003" if version == "v2.1" else "file-001"
    file = root / "data" / "chunk-000" / f"{relative}.parquet"
    message = f"episode 3: {file}: 'task_index' 2 is no task of {root / 'meta'}."
    assert [str(error) for error in errors] == [message]


def test_is_recognised(small, tmp_path):
    assert LeRobotSource.recognises(str(small))
    for path in (tmp_path, tmp_path / "nowhere", "memory://nowhere"):
        assert not LeRobotSource.recognises(str(path))
    source = open_source(str(small), cameras=[TOP], frame_gap_seconds=1.2, unnorm_key="so100")
    assert isinstance(source, LeRobotSource)
    assert (source.frame_gap_seconds, source.unnorm_key, source.cameras) == (1.2, "so100", (TOP,))
