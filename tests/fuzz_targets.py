"""What is fuzzed: small data sets of every format, how each of their files is damaged, and how they are read."""

import gzip
import io
import json
import random
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from label_files import label_rows, label_settings, write_label_folder
from lerobot_files import SMALL, TASKS, TOP, write_lerobot
from mutations import (
    AVI,
    MATROSKA,
    MP4,
    PNG,
    PROTOBUF,
    TFRECORD,
    Format,
    damage_bytes,
    damage_json,
    damage_json_lines,
    damage_parts,
    damage_tar,
)
from PIL import Image
from tfds_files import IMAGE, TEXT, encode_episode, frame_record, toy_episode, write_tfds_folder
from video_files import encode_video, moving_frames

from lapa.data.episode_source import EpisodeSource
from lapa.data.frame_pairs import FrameGap, read_pairs
from lapa.data.inspection import InspectOptions
from lapa.data.inspection_rows import inspect_labels
from lapa.data.jsonl import published_target, read_rows
from lapa.data.label_table import LabelFolder, label_schema
from lapa.data.labelled_stream import decode_stored_image, has_instruction
from lapa.data.open_source import open_source
from lapa.data.schema import Episode, ReadError

Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """
    A kind of input.

    Args:
        files: Content by path; the data set when nothing is damaged.
        damages: What may be done, each to one file.
        read: Reads all of it below a folder and returns what was skipped; raises `ValueError` for what is refused.
    """

    files: dict[str, bytes]
    damages: Sequence[tuple[str, Damage]]
    read: Callable[[Path], list[str]]

    def damaged(self, generator: random.Random) -> tuple[str, bytes]:
        """Path of a file, and its damaged content."""
        path, damage = generator.choice(self.damages)
        return path, damage(self.files[path], generator)


def read_source(root: Path, **options: Any) -> list[str]:
    """Opens what lies in a folder and reads all episodes with some of their frames; returns what was skipped."""
    source = open_source(root, **options)
    skipped: list[ReadError] = []
    for shard in range(len(source.shards)):
        for _, episode in source.read(shard, None, skipped.append):
            try:
                read_episode(episode, source)
            except ReadError as error:
                skipped.append(error)
    return [str(error) for error in skipped]


def read_episode(episode: Episode, source: EpisodeSource) -> None:
    """The pairs of every camera: the first, one in the middle and the last, decoded."""
    for camera in episode.cameras:
        gap = FrameGap(frames=1) if episode.timestamps is None else FrameGap(seconds=0.1)
        steps = gap.pairs(episode).steps
        chosen = steps[[0, len(steps) // 2, -1]] if len(steps) else steps
        for pair in read_pairs(episode, camera, chosen):
            assert not isinstance(pair, str) and pair[0].ndim == 3
        if not len(chosen):
            episode.read_frames(camera, [0, episode.num_steps - 1])
    if episode.action is not None:
        assert episode.action.shape[0] == episode.num_steps


def read_published(root: Path) -> list[str]:
    """Reads the one published file in a folder."""
    (path,) = root.iterdir()
    skipped: list[ReadError] = []
    for _ in read_rows(path, published_target(path), skipped.append):
        pass
    return [str(error) for error in skipped]


def read_labels(root: Path) -> list[str]:
    """Inspects a folder of labels, opens it and reads all its row groups, decoding some of their images."""
    inspect_labels(str(root), InspectOptions(num_pairs=4))
    folder, skipped = LabelFolder(root), list[str]()
    columns = [name for name in label_schema(folder.manifest.settings).names if name != "timestamp"]
    for file in range(len(folder.files)):
        try:
            for table in folder.read_groups(file, range(folder.group_count(file)), columns):
                has_instruction(table["instruction"])
                codes = np.array(table["latent_action_codes"].to_pylist(), np.int64)
                assert codes.shape == (len(table), folder.manifest.num_latent_tokens)
                for image in table["image"][:1].to_pylist():
                    decode_stored_image(image["bytes"], folder.tree.location(folder.files[file]))
        except ReadError as error:
            skipped.append(str(error))
    return skipped


def plain(tokens: Sequence[bytes] = (), others: Sequence[bytes] = ()) -> Damage:
    """Bytes anywhere."""
    return partial(damage_bytes, tokens=tokens, others=others)


def parts(form: Format) -> Damage:
    """Parts of a format."""
    return partial(damage_parts, form=form)


def files_below(folder: Path) -> dict[str, bytes]:
    """Content of all files by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


RLDS_FEATURES = {
    "steps": {
        "action": ("float32", 2),
        "is_first": ("bool",),
        "language_instruction": TEXT,
        "characters": ("int32", 6),
        "observation": {"front": IMAGE, "state": ("float64", 3)},
    },
    "episode_metadata": {"number": ("int64",), "file": TEXT},
}


def _rlds_episode(number: int) -> bytes:
    import numpy as np

    frames = moving_frames(4, 32, 24, seed=number)
    return encode_episode(
        {
            "steps": {
                "action": np.full((4, 2), number, np.float32),
                "is_first": np.eye(1, 4)[0].astype(np.int64),
                "language_instruction": [f"task {number}"] * 4,
                "characters": np.tile(np.frombuffer(b"turn\0\0", np.uint8), (4, 1)).astype(np.int64),
                "observation": {"front": frames, "state": np.ones((4, 3), np.float32)},
            },
            "episode_metadata": {"number": np.array([-number]), "file": [f"episode {number}"]},
        }
    )


def _rlds() -> Target:
    with tempfile.TemporaryDirectory() as folder:
        files = files_below(
            write_tfds_folder(Path(folder) / "toy", RLDS_FEATURES, [[_rlds_episode(n) for n in range(3)]])
        )
    (records,) = (path for path in files if "tfrecord" in path)
    return Target(
        files,
        [(records, plain()), (records, parts(TFRECORD)), (records, _damage_example)],
        partial(read_source, kind="rlds"),
    )


def _damage_example(data: bytes, generator: random.Random) -> bytes:
    """Changes inside the message of one record, with sums that fit."""
    nodes = TFRECORD.parse(data)
    node = generator.choice(nodes)
    assert isinstance(node.content, bytes)
    tokens = (b"steps/action", b"steps/observation/front", b"\x0a", b"\x12", b"\x1a", b"steps/is_first")
    if generator.random() < 0.4:
        node.content = damage_bytes(node.content, generator, tokens, [toy_episode()])
    else:
        node.content = damage_parts(node.content, generator, PROTOBUF)
    return TFRECORD.build(nodes)


def _rlds_json() -> Target:
    target = _rlds()
    names = ("features.json", "dataset_info.json", "dataset_info.json")
    return Target(target.files, [(name, damage_json) for name in names], target.read)


def _latent_row(number: int) -> dict[str, Any]:
    text = f"<s> You are a helpful assistant. USER: What action should the robot take to `push {number}` ASSISTANT:"
    fields = "[instruction],[vision],delta"
    return {"image": "a.jpg", "vision": [number] * 16, "instruction": text, "delta": ["5", "4"], "fields": fields}


def _action_row(number: int) -> dict[str, Any]:
    fields = "[instruction],[vision],action"
    actions = {"raw_actions": [0.25] * 6 + [1.0], "action": [9, 7, 11, 0, 9, 9, -1]}
    return {
        "id": str(number),
        "image": "a.jpg",
        "vision": [number] * 16,
        **actions,
        "fields": fields,
        "instruction": "push",
    }


def _conversation(number: int) -> dict[str, Any]:
    said = [{"from": "human", "value": "<image>\nWhat to do?"}, {"from": "gpt", "raw_actions": ["0.1"] * 7}]
    return {"id": str(number), "image": "a.jpg", "conversations": said}


def _published(name: str, row: Callable[[int], dict[str, Any]]) -> Target:
    rows = [row(number) for number in range(4)]
    if ".jsonl" in name:
        content, damage = b"".join(json.dumps(item).encode() + b"\n" for item in rows), damage_json_lines
    else:
        content, damage = json.dumps(rows).encode(), damage_json
    if not name.endswith(".gz"):
        return Target(
            {name: content}, [(name, damage), (name, damage), (name, plain((b"\n", b"[", b"{", b'"')))], read_published
        )

    def inside(data: bytes, generator: random.Random) -> bytes:
        return gzip.compress(damage(gzip.decompress(data), generator), 1, mtime=0)

    return Target({name: gzip.compress(content, 1, mtime=0)}, [(name, inside), (name, plain())], read_published)


@cache
def _clip(name: str) -> bytes:
    """A small video, by codec and container."""
    codec, container = name.split("-")
    encoder, options = {
        "h264": ("libx264", {"g": "4", "bf": "2"}),
        "hevc": ("libx265", {"g": "4", "x265-params": "log-level=none"}),
        "av1": ("libsvtav1", {"g": "4", "preset": "12"}),
        "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "4"}),
        "vp8": ("libvpx", {"deadline": "realtime", "cpu-used": "8", "g": "4"}),
        "mpeg4": ("mpeg4", {"g": "4"}),
    }[codec]
    # Smaller frames make x265 write where it must not.
    return encode_video(moving_frames(9, 96, 64), encoder, container, options)


def _video(name: str, ending: str, form: Format) -> Target:
    files = {f"clip.{ending}": _clip(name)}
    tokens = (b"moov", b"mdat", b"stsz", b"\x1aE\xdf\xa3", b"\x18S\x80g", b"\x1fC\xb6u", b"\xa3", b"RIFF", b"LISTmovi", b"idx1",
              b"#EXTM3U\nclip.mp4\n", b"ffconcat version 1.0\nfile clip.mp4\n")  # fmt: skip
    damages = [*[(f"clip.{ending}", parts(form))] * 3, (f"clip.{ending}", plain(tokens, _other_clips(name)))]
    return Target(files, damages, partial(read_source, kind="videos"))


def _other_clips(name: str) -> list[bytes]:
    return [_clip(other) for other in ("h264-mp4", "vp9-webm", "mpeg4-avi") if other != name]


LABELS = [
    {"id": "1", "label": "pushing mug", "template": "Pushing [something]", "placeholders": ["mug"]},
    {"id": "2", "label": "lifting a pen", "template": "Lifting [something]", "placeholders": ["a pen"]},
]


def _something_something_labels() -> Target:
    labels = "something-something-v2-train.json"
    files = {f"20bn-something-something-v2/{n}.webm": _clip("vp8-webm") for n in (1, 2)}
    return Target(
        files | {labels: json.dumps(LABELS).encode()},
        [(labels, damage_json)],
        partial(read_source, kind="something_something"),
    )


def _labels(kind: str) -> Target:
    with tempfile.TemporaryDirectory() as folder:
        rows = label_rows()
        write_label_folder(Path(folder) / "set", {0: rows, 1: rows[:4]}, label_settings(2))
        files = files_below(Path(folder) / "set")
    path = "data/labels-00000-of-00002.parquet"
    damages: dict[str, list[tuple[str, Damage]]] = {
        "json": [("labels.json", damage_json)],
        "parquet": [(path, plain((b"PAR1", b"PARE"))), (path, _damage_footer), (path, _damage_table)],
    }
    return Target(files, damages[kind], read_labels)


CAPTIONS = {
    "captions.json": b'{"a": "push it", "b.webm": ["lift it", "raise it"]}',
    "captions.jsonl": b'{"file_name": "a.webm", "text": "push it"}\n{"id": "b", "caption": ["lift it"]}\n',
    "captions.csv": b'video,instruction\na.webm,"push, it"\nb,lift it\n',
    "captions.tsv": b"file\tcaption\na.webm\tpush it\nb.webm\tlift it\n",
    "captions.txt": b"a.webm\tpush it\nb lift it\n",
    "a.txt": b"push it\npush it again\n",
}


def _captions(name: str) -> Target:
    files = {"a.webm": _clip("vp8-webm"), "b.webm": _clip("vp8-webm"), name: CAPTIONS[name]}
    damage = {".json": damage_json, ".jsonl": damage_json_lines}.get(Path(name).suffix)
    damages = [(name, plain((b",", b'"', b"\n", b"\t", b"\r", b"\0", b"\xff\xfe", "\u2028".encode())))]
    return Target(files, [*damages, *([(name, damage)] * 2 if damage else [])], partial(read_source, kind="videos"))


def _lerobot(version: str, kind: str) -> Target:
    with tempfile.TemporaryDirectory() as folder:
        files = files_below(write_lerobot(Path(folder) / "set", version, SMALL, TASKS, stored=(TOP,), codec="h264"))
    damages: list[tuple[str, Damage]] = []
    for path in files:
        if kind == "json" and path.endswith(".json"):
            damages += [(path, damage_json)] * 3
        elif kind == "json" and path.endswith(".jsonl"):
            damages.append((path, damage_json_lines))
        elif kind == "parquet" and path.endswith(".parquet"):
            damages += [(path, plain((b"PAR1", b"PARE"))), (path, _damage_footer), (path, _damage_table)]
    return Target(files, damages, partial(read_source, kind="lerobot"))


def _damage_footer(data: bytes, generator: random.Random) -> bytes:
    """Changes in the metadata at the end of a parquet file, with a length that fits."""
    length = int.from_bytes(data[-8:-4], "little")
    footer = damage_bytes(data[-8 - length : -8], generator)
    return data[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def _damage_table(data: bytes, generator: random.Random) -> bytes:
    """A parquet file that is whole, with other values, columns or types."""
    table = pq.read_table(io.BytesIO(data))
    place = generator.randrange(table.num_columns)
    name, kind = table.column_names[place], table.schema.field(place).type
    values: list[Any] = table[name].to_pylist()
    match generator.randrange(6):
        case 0:
            table = table.remove_column(place)
        case 1:
            table = table.rename_columns([f"{n}x" if n == name else n for n in table.column_names])
        case 2:
            table = pa.concat_tables([table] * generator.choice((2, 50)))
        case 3:
            table = table.slice(generator.randrange(table.num_rows + 1))
        case 4:
            other: Any = generator.choice(
                (pa.string(), pa.float64(), pa.int8(), pa.bool_(), pa.binary(), pa.list_(pa.int64()))
            )
            table = table.set_column(place, name, pa.nulls(table.num_rows, other))
        case _:
            extreme: list[Any] = [None]
            if pa.types.is_integer(kind):
                extreme += [-1, 0, 2**31, 2**53, 2**63 - 1, -(2**63)]
            elif pa.types.is_floating(kind):
                extreme += [float("nan"), float("inf"), -1.0, 1e30, 1e9]
            elif pa.types.is_string(kind):
                extreme += ["", "x" * 5000]
            values[generator.randrange(len(values))] = generator.choice(extreme)
            table = table.set_column(place, name, pa.array(values, kind))
    content = io.BytesIO()
    pq.write_table(table, content)
    return content.getvalue()


def _tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.GNU_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _tar_target(packed: bool) -> Target:
    read = partial(read_source, kind="something_something")
    labels = {"something-something-v2-train.json": json.dumps(LABELS).encode()}
    if not packed:
        members: dict[str, bytes] = {}
        for row in LABELS:
            members |= {f"{row['id']}.webm": _clip("vp8-webm"), f"{row['id']}.json": json.dumps(row).encode()}
        members["x" * 150 + "/3.webm"] = _clip("vp8-webm")
        return Target(
            {"train-000.tar": _tar(members)}, [("train-000.tar", damage_tar), ("train-000.tar", plain())], read
        )
    archive = _tar({f"20bn-something-something-v2/{row['id']}.webm": _clip("vp8-webm") for row in LABELS})
    part = "20bn-something-something-v2-00"

    def inside(data: bytes, generator: random.Random) -> bytes:
        return gzip.compress(damage_tar(gzip.decompress(data), generator), 1, mtime=0)

    return Target(labels | {part: gzip.compress(archive, 1, mtime=0)}, [(part, inside), (part, plain())], read)


def _image(ending: str) -> Target:
    buffer = io.BytesIO()
    Image.fromarray(moving_frames(1, 40, 32)[0]).save(buffer, {"jpg": "JPEG"}.get(ending, ending.upper()))
    files = {f"clip/img_{number}.{ending}": buffer.getvalue() for number in (1, 2, 3)}
    path = f"clip/img_2.{ending}"
    damages = [(path, plain()), *([(path, parts(PNG))] * 2 if ending == "png" else [])]
    return Target(files, damages, partial(read_source, kind="frames", frequency=10.0))


# By name; built when they are asked for, as some are encoded.
TARGETS: dict[str, Callable[[], Target]] = {
    "tfrecord": _rlds,
    "tfds_json": _rlds_json,
    "latent.jsonl": partial(_published, "latent.jsonl", _latent_row),
    "action.jsonl": partial(_published, "action.jsonl", _action_row),
    "action.json": partial(_published, "action.json", _conversation),
    "latent.jsonl.gz": partial(_published, "latent.jsonl.gz", _latent_row),
    "something_something_labels": _something_something_labels,
    "labels.json": partial(_labels, "json"),
    "labels.parquet": partial(_labels, "parquet"),
    **{name: partial(_captions, name) for name in CAPTIONS},
    "lerobot_v2.1_json": partial(_lerobot, "v2.1", "json"),
    "lerobot_v3.0_json": partial(_lerobot, "v3.0", "json"),
    "lerobot_v2.1_parquet": partial(_lerobot, "v2.1", "parquet"),
    "lerobot_v3.0_parquet": partial(_lerobot, "v3.0", "parquet"),
    "tar": partial(_tar_target, False),
    "archive_part": partial(_tar_target, True),
    "h264.mp4": partial(_video, "h264-mp4", "mp4", MP4),
    "hevc.mp4": partial(_video, "hevc-mp4", "mp4", MP4),
    "av1.mp4": partial(_video, "av1-mp4", "mp4", MP4),
    "vp9.webm": partial(_video, "vp9-webm", "webm", MATROSKA),
    "h264.mkv": partial(_video, "h264-matroska", "mkv", MATROSKA),
    "mpeg4.avi": partial(_video, "mpeg4-avi", "avi", AVI),
    "frames.jpg": partial(_image, "jpg"),
    "frames.png": partial(_image, "png"),
}


def undamaged(name: str) -> Iterator[tuple[str, bytes]]:
    """Files of a target as they are."""
    yield from TARGETS[name]().files.items()


__all__ = ["TARGETS", "Target", "frame_record", "read_source", "undamaged"]
