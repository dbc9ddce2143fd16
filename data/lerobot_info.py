"""What `meta/info.json` of a LeRobot data set says: version, features, splits, and where its files lie."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from lapa.data.file_tree import FileTree

INFO_FILE = "meta/info.json"
VERSIONS = ("v2.0", "v2.1", "v3.0")
# Where files lie if `info.json` does not say: what LeRobot itself writes there.
EPISODE_PATHS = (
    "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
)
FILE_PATHS = (
    "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
)
CHUNK_SIZE = 1000
MAX_INFO_BYTES = 1 << 26
MAX_NAME_DEPTH = 4
# Indices are below: float64, in which columns of them are gathered, is exact there.
MAX_INDEX = 1 << 53
# Types of numbers, by numpy's names.
NUMERIC = (
    "bool",
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    "float16",
    "float32",
    "float64",
)


@dataclass(frozen=True)
class Feature:
    """
    A feature of `info.json`.

    Args:
        key (`str`): Its name.
        dtype (`str`): `video`, `image`, or that of its numbers.
        shape (`tuple[int, ...]`): Of one step; empty where it is not told.
        names (`tuple[str, ...]`, *optional*): What each of the flattened numbers is.
        is_depth (`bool`): Whether the images are depth maps.
    """

    key: str
    dtype: str
    shape: tuple[int, ...] = ()
    names: tuple[str, ...] | None = None
    is_depth: bool = False

    @property
    def is_camera(self) -> bool:
        """Whether it holds images."""
        return self.dtype in ("video", "image")

    @property
    def is_numeric(self) -> bool:
        """Whether it holds numbers."""
        return self.dtype in NUMERIC

    @property
    def size(self) -> int:
        """Numbers per step."""
        return math.prod(self.shape)


class PathTemplate:
    """
    A path with places for numbers and names, such as `data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet`.

    Args:
        template (`str`): With `str.format` fields, of which only plain ones are taken: what a stranger wrote is not to be
            evaluated.
        known (`Sequence[str]`): Fields it may have.
        name (`str`): What messages call it.

    Raises:
        ValueError: Another field, or a format that is no width.
    """

    def __init__(self, template: Any, known: Sequence[str], name: str) -> None:
        self.template, self.name = template, name
        accepted = f"{name} must be a path with the fields {', '.join(known)}, got {template!r}."
        if not isinstance(template, str):
            raise ValueError(accepted)
        try:
            self.parts = [
                (text, key, spec or "", conversion) for text, key, spec, conversion in Formatter().parse(template)
            ]
        except ValueError as error:
            raise ValueError(accepted) from error
        for _, key, spec, conversion in self.parts:
            if key is not None and (key not in known or conversion or not re.fullmatch(r"0?[0-9]{0,2}d?", spec)):
                raise ValueError(accepted)

    def __call__(self, **values: int | str) -> str:
        """The path; raises `ValueError` for one that leads out of the folder."""
        path = "".join(text + ("" if key is None else format(values[key], spec)) for text, key, spec, _ in self.parts)
        if path.startswith("/") or "::" in path or "://" in path or "\\" in path or ".." in path.split("/"):
            raise ValueError(f"{self.name} leads to {path!r}, which is not inside the data set.")
        return path


@dataclass(frozen=True)
class Info:
    """
    `meta/info.json`.

    Args:
        location (`str`): Where it lies.
        version (`str`): One of `VERSIONS`.
        fps (`float`): Steps per second.
        features (`Mapping[str, Feature]`): By key, in the order of the file.
        splits (`Mapping[str, str]`): Ranges of episodes, such as `{"train": "0:50"}`; may be empty.
        robot (`str`, *optional*): `robot_type`.
        num_episodes (`int`, *optional*): `total_episodes`.
        chunk_size (`int`): Episodes per folder (v2).
        data_path, video_path (`PathTemplate`): Where files lie.
    """

    location: str
    version: str
    fps: float
    features: Mapping[str, Feature]
    splits: Mapping[str, str]
    robot: str | None
    num_episodes: int | None
    chunk_size: int
    data_path: PathTemplate
    video_path: PathTemplate

    @property
    def episode_per_file(self) -> bool:
        """Whether every episode has files of its own."""
        return self.version != "v3.0"

    def split_range(self, split: str) -> range:
        """
        Episodes of a split.

        Raises:
            ValueError: An unknown split (those there are get listed), or one that is no range.
        """
        if split not in self.splits:
            known = ", ".join(self.splits) or "none"
            raise ValueError(f"`split` {split!r} is unknown; {self.location} lists {known} (None reads all episodes).")
        match = re.fullmatch(r"\s*([0-9]{1,18})\s*:\s*([0-9]{1,18})\s*", str(self.splits[split]))
        if match is None:
            raise ValueError(
                f"split {split!r} of {self.location} must be a range of episodes as '0:50', got {self.splits[split]!r}."
            )
        return range(int(match[1]), int(match[2]))


def read_info(tree: FileTree) -> Info:
    """
    Reads `meta/info.json`.

    Raises:
        ValueError: There is none, it is of another version, or it lacks what cannot be done without.
    """
    location = tree.location(INFO_FILE)
    try:
        with tree.open(INFO_FILE) as file:
            content = file.read(MAX_INFO_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{tree.path} is no LeRobot data set: {INFO_FILE} cannot be opened.") from error
    if len(content) > MAX_INFO_BYTES:
        raise ValueError(f"{location} has more than {MAX_INFO_BYTES} bytes.")
    info = json_object(content, location)
    version = info.get("codebase_version")
    version = f"v{version.removeprefix('v')}" if isinstance(version, str) else version
    if version not in VERSIONS:
        raise ValueError(
            f"{location} has `codebase_version` {version!r}; {', '.join(VERSIONS)} can be read. LeRobot has converters "
            "from older versions."
        )
    fps = info.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < math.inf:
        raise ValueError(f"`fps` of {location} must be a positive number, got {fps!r}.")
    features = info.get("features")
    if not isinstance(features, dict) or not features:
        raise ValueError(f"{location} has no `features`; this is not the layout of {', '.join(VERSIONS)}.")
    splits, robot = info.get("splits") or {}, info.get("robot_type")
    if not isinstance(splits, dict):
        raise ValueError(f"`splits` of {location} must be an object of ranges, got {splits!r}.")
    paths, places = FILE_PATHS, ("chunk_index", "file_index")
    if version != "v3.0":
        paths, places = EPISODE_PATHS, ("episode_chunk", "episode_index")
    return Info(
        location=location,
        version=version,
        fps=float(fps),
        features={key: _feature(key, feature, location) for key, feature in features.items()},
        splits=splits,
        # What LeRobot's first converters wrote where nobody said.
        robot=robot if isinstance(robot, str) and robot.strip() not in ("", "unknown") else None,
        num_episodes=_count(info, "total_episodes", 0, location),
        chunk_size=_count(info, "chunks_size", 1, location) or CHUNK_SIZE,
        data_path=PathTemplate(info.get("data_path") or paths[0], places, f"`data_path` of {location}"),
        video_path=PathTemplate(
            info.get("video_path") or paths[1], (*places, "video_key"), f"`video_path` of {location}"
        ),
    )


def _count(info: Mapping[str, Any], key: str, least: int, location: str) -> int | None:
    value = info.get(key)
    if value is not None and (type(value) is not int or not least <= value < MAX_INDEX):
        raise ValueError(f"`{key}` of {location} must be an integer of at least {least}, got {value!r}.")
    return value


def _feature(key: str, feature: Any, location: str) -> Feature:
    dtype = feature.get("dtype") if isinstance(feature, dict) else None
    if not isinstance(dtype, str):
        raise ValueError(f"feature {key!r} of {location} must be an object with a `dtype`, got {str(feature)[:80]}.")
    shape = feature.get("shape")
    shape = [shape] if type(shape) is int else shape or []
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"`shape` of feature {key!r} of {location} must be a list of lengths, got {shape!r}.")
    # Depth is told in one of three places, by the version; a single channel that is named so is taken for it too.
    told = [feature.get(place) for place in ("info", "video_info")]
    is_depth = any(
        isinstance(place, dict) and bool(place.get("is_depth_map") or place.get("video.is_depth_map"))
        for place in told
    )
    is_depth |= dtype in ("video", "image") and "depth" in key.lower() and 1 in (shape[:1] + shape[-1:])
    return Feature(key, dtype, tuple(shape), _flat_names(feature.get("names")), is_depth)


def _flat_names(names: Any, depth: int = 0) -> tuple[str, ...] | None:
    """
    Names of numbers, given as a list, as an object of lists (`{"motors": [...]}`, one list per part) or as an object of
    places (`{"x": 0, "y": 1}`); None where they are given otherwise or not at all.
    """
    if isinstance(names, (str, int)):
        return (str(names),)
    if isinstance(names, dict):
        if all(type(place) is int for place in names.values()):
            return tuple(sorted(names, key=lambda name: int(names[name]))) or None
        parts = list(names.items())
    elif isinstance(names, list):
        parts = [("", part) for part in names]
    else:
        return None
    flat: list[str] = []
    for prefix, part in parts:
        inner = _flat_names(part, depth + 1) if depth < MAX_NAME_DEPTH else None
        if inner is None:
            return None
        # Both arms of a robot have the same joints.
        flat += [f"{prefix}.{name}" if prefix and len(parts) > 1 else name for name in inner]
    return tuple(flat) or None


def json_object(content: bytes, name: str) -> dict[str, Any]:
    """Parses a JSON object; raises `ValueError` that begins with `name` for anything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{name} is no valid JSON: {reason}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold a JSON object, got {type(value).__name__}.")
    return value


__all__ = ["INFO_FILE", "MAX_INDEX", "VERSIONS", "Feature", "Info", "PathTemplate", "json_object", "read_info"]
