"""LeRobot data sets that lack files or hold damaged ones: announced when opened, errors that name them when read."""

import random
from pathlib import Path

import pyarrow as pa
import pytest
from lerobot_files import (
    DATA,
    FEATURES,
    RECORDINGS,
    SMALL,
    TABLE,
    TASKS,
    TOP,
    VERSIONS,
    WRIST,
    change_info,
    change_table,
    places,
    write_lerobot,
)

from lapa.data.lerobot_format import LeRobotSource
from lapa.data.lerobot_info import PathTemplate
from lapa.data.parquet_rows import ParquetRows
from lapa.data.schema import ReadError


@pytest.fixture(params=VERSIONS)
def small(request, tmp_path) -> Path:
    """Two short episodes."""
    return write_lerobot(tmp_path / "arm", request.param, SMALL, TASKS, features=FEATURES)


@pytest.fixture
def table(tmp_path) -> Path:
    """Two short episodes in v3.0."""
    return write_lerobot(tmp_path / "arm", "v3.0", SMALL, TASKS, features=FEATURES)


def data_file(root: Path, episode: int) -> Path:
    own = root / "data" / "chunk-000" / f"episode_{episode:06d}.parquet"
    return own if own.exists() else root / DATA


def video_file(root: Path, episode: int, camera: str = TOP) -> Path:
    own = root / "videos" / "chunk-000" / camera / f"episode_{episode:06d}.mp4"
    return own if own.exists() else root / f"videos/{camera}/chunk-000/file-000.mp4"


def test_absent_files_are_announced_and_errors_when_read(tmp_path):
    for version in VERSIONS:
        root = write_lerobot(tmp_path / version / "arm", version, RECORDINGS, TASKS, episodes_per_file=1)
        data, video = (
            ("data/chunk-000/episode_000001.parquet", f"videos/chunk-000/{TOP}/episode_000003.mp4")
            if version == "v2.1"
            else ("data/chunk-000/file-001.parquet", f"videos/{TOP}/chunk-000/file-003.mp4")
        )
        (root / data).unlink()
        (root / video).unlink()
        source = LeRobotSource(str(root))
        assert source.warnings == (
            f"1 of 5 data files are absent: {data}",
            f"1 of 5 videos of camera '{TOP}' are absent: {video}",
        )
        errors: list[ReadError] = []
        found = [e for shard in range(len(source.shards)) for _, e in source.read(shard, on_error=errors.append)]
        assert [episode.metadata["episode_index"] for episode in found] == [0, 2, 4]
        assert [str(error) for error in errors] == [
            f"episode 1: {root / data} is listed and absent.",
            f"episode 3: {root / video} is listed and absent.",
        ]
        with pytest.raises(ReadError, match="episode 1: .* is listed and absent"):
            list(source)


def test_a_camera_without_any_video_is_left_out(small):
    for path in small.glob(f"videos/**/{WRIST}/**/*.mp4"):
        path.unlink()
    source = LeRobotSource(str(small))
    number = 2 if source.info.version == "v2.1" else 1
    assert source.cameras == (TOP,)
    assert source.warnings == (f"none of the {number} videos of camera '{WRIST}' is here; it is left out",)
    assert [episode.cameras for episode in source] == [(TOP,)] * 2
    with pytest.raises(ValueError, match=rf"`cameras` has '{WRIST}', but none of the {number} videos"):
        LeRobotSource(str(small), cameras=[WRIST])
    for path in small.glob("data/*/*.parquet"):
        path.unlink()
    with pytest.raises(ValueError, match=rf"`path` '{small}' has none of its {number} data files: data/chunk-000/"):
        LeRobotSource(str(small))


def test_a_camera_without_a_place_in_any_video_is_left_out(table):
    kind = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    change_table(table, TABLE, **places(WRIST, **dict.fromkeys(kind)))
    source = LeRobotSource(str(table))
    assert source.cameras == (TOP,)
    assert source.warnings == (f"no episode has a video of camera '{WRIST}'; it is left out",)
    assert [episode.cameras for episode in source] == [(TOP,)] * 2


def test_one_file_is_open_at_a_time(tmp_path, monkeypatch):
    root = write_lerobot(tmp_path / "arm", "v2.1", SMALL, TASKS)
    opened: list[ParquetRows] = []
    closed: list[str] = []
    monkeypatch.setattr(
        LeRobotSource, "_open", lambda self, name: opened.append(file := ParquetRows(self.tree, name)) or file
    )
    close = ParquetRows.close
    monkeypatch.setattr(ParquetRows, "close", lambda self: closed.append(self.relative) or close(self))
    for _, episode in LeRobotSource(str(root), cameras=[]).read(0):
        assert [file.relative for file in opened[: episode.metadata["episode_index"]]] == closed
    assert len(closed) == 2


def test_files_cut_short(small):
    for path, camera in ((data_file(small, 0), None), (video_file(small, 0), TOP)):
        content = path.read_bytes()
        for size in (0, 7, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            with pytest.raises(ReadError, match=rf"{path}"):
                episode = next(iter(LeRobotSource(str(small))))
                episode.frame(camera or TOP, 0)
        path.write_bytes(content)
    assert next(iter(LeRobotSource(str(small)))).frame(TOP, 0).shape == (64, 96, 3)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"episode_index": [0] * 4 + [1] * 13}, "has 4 rows of it, .*meta lists 5"),
        ({"timestamp": [0.0, 0.1, 0.2, 0.1, 0.3] + [0.0] * 12}, "'timestamp' decreases or is no number at step 3"),
        ({"timestamp": [0.0, 0.1, float("nan"), 0.3, 0.4] + [0.0] * 12}, "'timestamp' .*at step 2"),
        ({"timestamp": [None] * 17}, "'timestamp' has missing values"),
        ({"action": [[1.0, 2.0, 3.0]] * 17}, "'action' has 3 numbers a step, .*info.json says 4"),
        ({"action": [[1.0] * 4] * 4 + [[1.0] * 3] * 13}, "'action' has lists of 3 to 4 numbers"),
        ({"action": [[1.0] * 4] * 4 + [None] * 13}, "'action' has missing values"),
        ({"action": [[1.0, 2.0, None, 3.0]] * 17}, "'action' has missing values"),
        ({"action": pa.array(["left"] * 17)}, "'action' must hold numbers, not string"),
        ({"action": None}, "has no column 'action'"),
        ({"episode_index": pa.array(["0"] * 17)}, "cannot be read as parquet: .*string"),
    ],
)
def test_rows_that_do_not_fit(table, columns, message):
    change_table(table, DATA, **columns)
    source = LeRobotSource(str(table), cameras=[])
    with pytest.raises(ReadError, match=rf"episode 0: {table / DATA}.*{message}"):
        list(source)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("info.json", "{", "info.json is no valid JSON"),
        ("info.json", "[1]", "info.json must hold a JSON object, got list"),
        ("info.json", "[" * 100_000, "nested too deeply|no valid JSON"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 5}\n{', "episodes.jsonl, line 2 is no valid JSON"),
        ("episodes.jsonl", '{"episode_index": 0}', "line 1 must have `episode_index` and `length`"),
        ("episodes.jsonl", '{"episode_index": -1, "length": 5}', "line 1 must have"),
        ("episodes.jsonl", '{"episode_index": true, "length": 5}', "line 1 must have"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 5}\n' * 2, "lists episode 0 twice"),
        ("episodes.jsonl", " " * (1 << 21), "line 1 is longer than"),
        ("episodes.jsonl", "", "`split` 'train' of .* has no episode"),
        ("tasks.jsonl", '{"task_index": "0", "task": "go"}', "tasks.jsonl, line 1 must have a number `task_index`"),
    ],
)
def test_damaged_meta(tmp_path, name, content, message):
    root = write_lerobot(tmp_path / "arm", "v2.1", SMALL, TASKS)
    (root / "meta" / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        LeRobotSource(str(root))


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"fps": 0}, "`fps` of .*info.json must be a positive number, got 0"),
        ({"fps": True}, "`fps`"),
        ({"fps": "30"}, "`fps`"),
        ({"features": {"action": 3}}, "feature 'action' of .* must be an object with a `dtype`"),
        ({"features": {"action": {"dtype": "float32", "shape": ["4"]}}}, "`shape` of feature 'action'"),
        ({"splits": ["train"]}, "`splits` of .* must be an object of ranges"),
        ({"chunks_size": 0}, "`chunks_size` of .* must be an integer of at least 1, got 0"),
        ({"total_episodes": "5"}, "`total_episodes` of .* must be an integer"),
        ({"data_path": 3}, "`data_path` of .* must be a path with the fields"),
        ({"data_path": "../../etc/{episode_index}{file_index}"}, "`data_path`"),
    ],
)
def test_damaged_info(small, entry, message):
    with pytest.raises(ValueError, match=message):
        LeRobotSource(str(change_info(small, **entry)))


def test_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="is no LeRobot data set: meta/info.json cannot be opened"):
        LeRobotSource(str(tmp_path))
    with pytest.raises(ValueError, match="`path` '.*nowhere' is no folder"):
        LeRobotSource(str(tmp_path / "nowhere"))


def test_v3_without_its_episodes(table):
    (table / TABLE).unlink()
    with pytest.raises(ValueError, match=r"meta/episodes has no parquet file, which a data set of v3.0 needs"):
        LeRobotSource(str(table))


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"episode_index": [1, 1]}, "lists episode 1 twice"),
        ({"length": [-5, 3]}, "column 'length' of .*meta/episodes must hold integers of at least 0"),
        ({"data/file_index": [None, 0]}, "column 'data/file_index'"),
        (places(TOP, file_index=[-1, 0]), f"column 'videos/{TOP}/file_index'"),
        ({"length": None}, r"file-000.parquet has no column 'length'"),
    ],
)
def test_damaged_table_of_episodes(table, columns, message):
    change_table(table, TABLE, **columns)
    with pytest.raises(ValueError, match=message):
        LeRobotSource(str(table))


def test_paths_that_a_stranger_wrote():
    fields = ("episode_chunk", "episode_index", "video_key")
    template = PathTemplate("videos/{video_key}/{episode_chunk:03d}_{episode_index}.mp4", fields, "`video_path`")
    assert template(video_key="top", episode_chunk=7, episode_index=12) == "videos/top/007_12.mp4"
    for key in ("..", "a/../../b", "a::memory://b", "file://a", "a\\b"):
        with pytest.raises(ValueError, match="`video_path` leads to .*not inside the data set"):
            template(video_key=key, episode_chunk=0, episode_index=0)
    with pytest.raises(ValueError, match="not inside"):
        PathTemplate("/etc/passwd", fields, "`video_path`")()
    for text in (
        "{episode_index.__class__}",
        "{episode_index!r}",
        "{episode_index:999999999d}",
        "{episode_index:{episode_chunk}}",
        "{0}",
        "{}",
        "{episode_index",
        "{other}",
    ):
        with pytest.raises(ValueError, match="`video_path` must be a path with the fields episode_chunk"):
            PathTemplate(text, fields, "`video_path`")


def test_mutated_parquet_is_an_error_or_read(tmp_path):
    """Bytes of the data and of the table of episodes, changed at random: never anything but a ValueError."""
    root = write_lerobot(tmp_path / "arm", "v3.0", SMALL, TASKS, stored=[TOP, WRIST])
    draw, read, refused = random.Random(0), 0, 0
    for relative in (DATA, TABLE):
        original = (root / relative).read_bytes()
        for _ in range(60):
            content = bytearray(original)
            for _ in range(draw.choice((1, 2, 8))):
                # Half of them in the footer, where the structure is.
                start = draw.choice((0, max(0, len(content) - 4000)))
                content[draw.randrange(start, len(content))] = draw.randrange(256)
            (root / relative).write_bytes(content)
            try:
                for episode in LeRobotSource(str(root)):
                    episode.read_frames(TOP, [0, episode.num_steps - 1])
                read += 1
            except ValueError:
                refused += 1
        (root / relative).write_bytes(original)
    assert read > 10 and refused > 10
