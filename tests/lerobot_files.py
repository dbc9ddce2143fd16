"""Writes LeRobot data sets of v2.1 and v3.0 from the same recordings, laid out as LeRobot lays them out."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from video_files import encode_video, moving_frames

DATA_PATHS = {
    "v2.1": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "v3.0": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}
VIDEO_PATHS = {
    "v2.1": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    "v3.0": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
# Encoder and options of the videos, by codec.
CODECS = {
    "h264": ("libx264", {"g": "6", "bf": "2", "crf": "10"}),
    "hevc": ("libx265", {"g": "4", "crf": "10", "x265-params": "log-level=none"}),
    "av1": ("libsvtav1", {"g": "2", "crf": "20", "preset": "12"}),
}

FPS = 30
LENGTHS = (17, 9, 23, 5, 12)
TASKS = ("push the block", "stop", "  ")
TOP, WRIST = "observation.images.top", "observation.images.wrist"
NAMES = ("x", "y", "z", "gripper")
FEATURES = {"action": {"names": {"motors": list(NAMES)}}}
VERSIONS = ("v2.1", "v3.0")
# Where v3.0 has its first files.
TABLE = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"
VIDEO = f"videos/{TOP}/chunk-000/file-000.mp4"


@dataclass(frozen=True)
class Recording:
    """
    Args:
        frames: Frames by camera, (height, width, 3) uint8 RGB each.
        columns: Features by name, an array of (num_steps, ...) each; numbers, strings and booleans.
        tasks: Number of the task of each step.
        videos: Encoded already, by camera, rate and codec: an encoder need not give the same bytes twice.
    """

    frames: Mapping[str, Sequence[np.ndarray]]
    columns: Mapping[str, np.ndarray]
    tasks: Sequence[int]
    videos: dict[tuple[str, int, str], bytes] = field(default_factory=dict)


def write_lerobot(
    root: Path,
    version: str,
    recordings: Sequence[Recording],
    tasks: Sequence[str],
    *,
    fps: int = 30,
    codec: str = "h264",
    stored: Sequence[str] = (),
    episodes_per_file: int = 2,
    episodes_per_row_group: int = 1,
    features: Mapping[str, Any] | None = None,
    info: Mapping[str, Any] | None = None,
) -> Path:
    """
    Writes a data set.

    Args:
        root: Folder to make.
        version: v2.1, with files of its own for every episode, or v3.0: there the videos of an episode are copied behind
            those of the one before, packet by packet, as LeRobot does it.
        recordings: Episodes; all with the same columns and cameras.
        tasks: Their texts.
        codec: Of the videos.
        stored: Cameras whose images stand in the parquet files.
        episodes_per_file, episodes_per_row_group: In v3.0.
        features: More about single features, for `info.json`.
        info: More for `info.json`.

    Returns:
        `root`.
    """
    first = recordings[0]
    content: dict[str, Any] = {
        "codebase_version": version,
        "robot_type": "so100",
        "fps": fps,
        "total_episodes": len(recordings),
        "chunks_size": 1000,
        "splits": {"train": f"0:{len(recordings)}"},
        "data_path": DATA_PATHS[version],
        "video_path": VIDEO_PATHS[version],
        "features": {name: _feature(column, (features or {}).get(name)) for name, column in first.columns.items()},
    }
    for camera, frames in first.frames.items():
        dtype = "image" if camera in stored else "video"
        told = {"dtype": dtype, "shape": [*frames[0].shape], "names": ["height", "width", "channels"]}
        content["features"][camera] = told | (features or {}).get(camera, {})
    for name, dtype in (
        ("timestamp", "float32"),
        *((f"{name}_index", "int64") for name in ("frame", "episode", "task")),
    ):
        content["features"][name] = {"dtype": dtype, "shape": [1], "names": None}
    files = Files(root)
    files.add("meta/info.json", json.dumps(content | dict(info or {})).encode())
    write = _write_episodes if version == "v2.1" else _write_files
    write(files, recordings, tasks, fps, codec, stored, episodes_per_file, episodes_per_row_group)
    return root


class Files:
    """Files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, relative: str, content: bytes) -> None:
        """Writes a file and the folders above it."""
        path = self.root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def add_table(self, relative: str, table: pa.Table, rows: Sequence[int] | None = None) -> None:
        """Writes a parquet file, with row groups of so many rows."""
        content = io.BytesIO()
        with pq.ParquetWriter(content, table.schema) as writer:
            for count in [len(table)] if rows is None else rows:
                writer.write_table(table.slice(0, count))
                table = table.slice(count)
        self.add(relative, content.getvalue())


def _feature(column: np.ndarray, more: Mapping[str, Any] | None) -> dict[str, Any]:
    dtype = "string" if column.dtype.kind == "U" else column.dtype.name
    return {"dtype": dtype, "shape": list(column.shape[1:]) or [1], "names": None, **(more or {})}


def episode_table(recording: Recording, index: int, fps: int, stored: Sequence[str] = ()) -> pa.Table:
    """The rows of an episode."""
    count = len(recording.tasks)
    columns = {name: pa.array(column.tolist(), _arrow_type(column)) for name, column in recording.columns.items()}
    for camera in stored:
        images = [{"bytes": png(frame), "path": f"{step}.png"} for step, frame in enumerate(recording.frames[camera])]
        columns[camera] = pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    columns["timestamp"] = pa.array(np.arange(count) / fps, pa.float32())
    columns["frame_index"] = pa.array(range(count), pa.int64())
    columns["episode_index"] = pa.array([index] * count, pa.int64())
    columns["task_index"] = pa.array(recording.tasks, pa.int64())
    return pa.table(columns)


def _arrow_type(column: np.ndarray) -> pa.DataType:
    kind = pa.string() if column.dtype.kind == "U" else pa.from_numpy_dtype(column.dtype)
    for _ in column.shape[1:]:
        kind = pa.list_(kind)
    return kind


def png(frame: np.ndarray) -> bytes:
    """Content of a PNG file."""
    content = io.BytesIO()
    Image.fromarray(frame).save(content, "png")
    return content.getvalue()


def write_meta(files: Files, recordings: Sequence[Recording], tasks: Sequence[str]) -> None:
    """`episodes.jsonl` and `tasks.jsonl`, as v2.1 has them."""
    lines = [{"task_index": index, "task": task} for index, task in enumerate(tasks)]
    files.add("meta/tasks.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    lines = [
        {"episode_index": index, "tasks": episode_tasks(recording, tasks), "length": len(recording.tasks)}
        for index, recording in enumerate(recordings)
    ]
    files.add("meta/episodes.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def episode_tasks(recording: Recording, tasks: Sequence[str]) -> list[str]:
    """Texts of an episode's tasks, as `meta` lists them."""
    return [tasks[number] for number in dict.fromkeys(recording.tasks)]


def episode_video(recording: Recording, camera: str, fps: int, codec: str) -> bytes:
    """The video of one episode."""
    encoder, options = CODECS[codec]
    if (camera, fps, codec) not in recording.videos:
        video = encode_video(recording.frames[camera], encoder, options=options, rate=fps)
        recording.videos[camera, fps, codec] = video
    return recording.videos[camera, fps, codec]


def _write_episodes(
    files: Files,
    recordings: Sequence[Recording],
    tasks: Sequence[str],
    fps: int,
    codec: str,
    stored: Sequence[str],
    *_: int,
) -> None:
    write_meta(files, recordings, tasks)
    for index, recording in enumerate(recordings):
        places = {"episode_chunk": 0, "episode_index": index}
        files.add_table(DATA_PATHS["v2.1"].format(**places), episode_table(recording, index, fps, stored))
        for camera in set(recording.frames) - set(stored):
            video = episode_video(recording, camera, fps, codec)
            files.add(VIDEO_PATHS["v2.1"].format(**places, video_key=camera), video)


def _write_files(
    files: Files,
    recordings: Sequence[Recording],
    tasks: Sequence[str],
    fps: int,
    codec: str,
    stored: Sequence[str],
    episodes_per_file: int,
    episodes_per_row_group: int,
) -> None:
    # pandas writes the texts as an index without a name.
    texts = pa.table({"task_index": pa.array(range(len(tasks))), "__index_level_0__": pa.array(tasks)})
    files.add_table("meta/tasks.parquet", texts)
    entries: list[dict[str, Any]] = []
    num_rows = 0
    for number, start in enumerate(range(0, len(recordings), episodes_per_file)):
        places = {"chunk_index": 0, "file_index": number}
        group = recordings[start : start + episodes_per_file]
        tables = [episode_table(recording, start + index, fps, stored) for index, recording in enumerate(group)]
        lengths = [len(table) for table in tables]
        steps = range(0, len(lengths), episodes_per_row_group)
        rows = [sum(lengths[index : index + episodes_per_row_group]) for index in steps]
        files.add_table(DATA_PATHS["v3.0"].format(**places), pa.concat_tables(tables), rows)
        for recording, table in zip(group, tables):
            entries.append(
                {
                    "episode_index": len(entries),
                    "tasks": episode_tasks(recording, tasks),
                    "length": len(table),
                    "data/chunk_index": 0,
                    "data/file_index": number,
                    "dataset_from_index": num_rows,
                    "dataset_to_index": num_rows + len(table),
                    "stats/action/mean": [0.0],
                }
            )
            num_rows += len(table)
        for camera in set(group[0].frames) - set(stored):
            videos = [episode_video(recording, camera, fps, codec) for recording in group]
            content, ends = joined_videos(videos)
            files.add(VIDEO_PATHS["v3.0"].format(**places, video_key=camera), content)
            for entry, begin, end in zip(entries[start:], [0.0, *ends], ends):
                at = {"chunk_index": 0, "file_index": number, "from_timestamp": begin, "to_timestamp": end}
                entry.update({f"videos/{camera}/{key}": value for key, value in at.items()})
    files.add_table("meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(entries))


def joined_videos(videos: Sequence[bytes]) -> tuple[bytes, list[float]]:
    """Copies the packets of videos into one file, without coding them anew; also gives the seconds at which each ends."""
    content = io.BytesIO()
    ends: list[float] = []
    with av.open(content, "w", format="mp4") as output:
        stream, offset = None, 0
        for video in videos:
            with av.open(io.BytesIO(video)) as container:
                source = container.streams.video[0]
                if stream is None:
                    stream = output.add_stream_from_template(source, opaque=True)
                    stream.time_base = source.time_base
                duration, time_base = source.duration, source.time_base
                for packet in container.demux(source):
                    if packet.dts is not None:
                        packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, stream
                        output.mux(packet)
            offset += duration
            ends.append(float(offset * time_base))
    return content.getvalue(), ends


def make_recording(index: int, length: int) -> Recording:
    """The second episode has two tasks, the fourth one that says nothing."""
    generator = np.random.default_rng(index)
    frames = {camera: moving_frames(length, seed=10 * index + place) for place, camera in enumerate((WRIST, TOP))}
    columns = {
        "action": generator.standard_normal((length, 4)).astype(np.float32),
        "observation.state": generator.standard_normal((length, 3)),
        "next.done": np.arange(length) == length - 1,
    }
    tasks = {1: [1] * 4 + [0] * (length - 4), 3: [2] * length}.get(index, [0] * length)
    return Recording(frames, columns, tasks)


RECORDINGS = [make_recording(index, length) for index, length in enumerate(LENGTHS)]
SMALL = RECORDINGS[3:]


def change_info(root: Path, **entries: Any) -> Path:
    """Sets entries of info.json; None takes one away."""
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in info.items() if value is not None}))
    return root


def change_feature(root: Path, name: str, **entries: Any) -> Path:
    """Sets entries of a feature."""
    features = json.loads((root / "meta" / "info.json").read_text())["features"]
    features[name] = features.get(name, {}) | entries
    return change_info(root, features=features)


def change_table(root: Path, relative: str, **columns: Any) -> Path:
    """Replaces columns of a parquet file; None takes one away."""
    table = pq.read_table(root / relative)
    for name, values in columns.items():
        place = table.column_names.index(name)
        kind = table.schema.field(name).type
        table = table.remove_column(place)
        if values is not None:
            values = values if isinstance(values, pa.Array) else pa.array(values, kind)
            table = table.add_column(place, name, values)
    Files(root).add_table(relative, table)
    return root


def places(camera: str, **columns: list) -> dict[str, list]:
    """Columns of a camera in the table of episodes."""
    return {f"videos/{camera}/{key}": values for key, values in columns.items()}
