"""RLDS folders (TFDS, TFRecord), read without TensorFlow. What a folder holds is told by its `features.json`."""

import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lapa.data.schema import Episode
from lapa.data.tfrecord import FeatureValues, decode_feature, parse_example, read_tfrecord

DEFAULT_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
STEPS = "steps"
METADATA = "episode_metadata"
# Where data sets keep the instruction, by their own habits; the first that exists is read.
INSTRUCTION_KEYS = (
    "language_instruction",
    "observation/natural_language_instruction",
    "observation/language_instruction",
)
PROPRIO_KEY = "observation/state"


@dataclass(frozen=True)
class FeatureSpec:
    """One leaf of `features.json`: `kind` is image, text or tensor; `shape` has -1 where it varies."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str = "none"


class EncodedFrames(Sequence[NDArray[np.uint8]]):
    """JPEG or PNG frames, decoded one at a time when read: (height, width, 3) uint8 RGB."""

    def __init__(self, encoded: Sequence[bytes], name: str) -> None:
        self.encoded = encoded
        self.name = name

    def __len__(self) -> int:
        return len(self.encoded)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.uint8]: ...
    @overload
    def __getitem__(self, index: slice) -> "EncodedFrames": ...
    def __getitem__(self, index: int | slice) -> "NDArray[np.uint8] | EncodedFrames":
        if isinstance(index, slice):
            return EncodedFrames(self.encoded[index], self.name)
        try:
            with Image.open(io.BytesIO(self.encoded[index])) as image:
                return np.array(image.convert("RGB"))
        except OSError as error:
            raise ValueError(f"frame {index} of {self.name} is no readable image: {error}.") from error

    def is_blank(self) -> bool:
        """Whether every frame is the same single colour, which is how TFDS fills in a camera that is not there."""
        if any(frame != self.encoded[0] for frame in self.encoded):
            return False
        first = self[0]
        return bool((first == first[0, 0]).all())


def _leaf(node: Mapping[str, Any]) -> FeatureSpec | None:
    """Spec of a node of `features.json`; None where it is no leaf that can be read."""
    if "image" in node:
        image = node["image"]
        return FeatureSpec("image", image.get("dtype", "uint8"), _shape(image), image.get("encodingFormat") or "")
    if "text" in node:
        return FeatureSpec("text", "string", ())
    if "classLabel" in node:
        return FeatureSpec("tensor", "int64", ())
    if "tensor" in node:
        tensor = node["tensor"]
        return FeatureSpec("tensor", tensor["dtype"], _shape(tensor), tensor.get("encoding", "none"))
    return None


def _shape(node: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(size) for size in node.get("shape", {}).get("dimensions", ()))


def _flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, FeatureSpec]:
    """Leaves of a tree of features by their path. Sequences inside a step are left out: no field here needs them."""
    leaves: dict[str, FeatureSpec] = {}
    children = node.get("featuresDict", {}).get("features")
    if children is None:
        spec = _leaf(node)
        return {prefix: spec} if spec is not None else {}
    for name, child in children.items():
        leaves |= _flatten(child, f"{prefix}/{name}" if prefix else name)
    return leaves


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        inner = sorted(str(file.parent) for file in path.parent.glob(f"*/{path.name}"))
        hint = f"; did you mean {', '.join(inner)}?" if inner else ""
        raise ValueError(f"{path.parent} is no RLDS folder: {path.name} is missing{hint}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return content


class RldsFolder:
    r"""
    One version folder of a TFDS data set in RLDS form.

    Args:
        path (`str` or `Path`): Folder with `features.json` and `dataset_info.json`.

    Raises:
        ValueError: Not such a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        features = _read_json(self.path / "features.json").get("featuresDict", {}).get("features", {})
        self.info = _read_json(self.path / "dataset_info.json")
        self.name = str(self.info.get("name", self.path.parent.name))
        file_format = self.info.get("fileFormat", "tfrecord")
        if file_format != "tfrecord":
            raise ValueError(f"{self.path} stores {file_format!r}; only 'tfrecord' can be read.")
        if "sequence" not in features.get(STEPS, {}):
            raise ValueError(f"{self.path / 'features.json'} has no `{STEPS}`: this is no RLDS data set.")
        self.step_features = _flatten(features[STEPS]["sequence"]["feature"])
        self.metadata_features = _flatten(features.get(METADATA, {}))

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that `dataset_info.json` lists, whether or not their files are here."""
        return tuple(split["name"] for split in self.info.get("splits", ()))

    @property
    def cameras(self) -> tuple[str, ...]:
        """Colour images among the observations, by name."""
        paths = [
            path
            for path, spec in self.step_features.items()
            if spec.kind == "image" and spec.dtype == "uint8" and (not spec.shape or spec.shape[-1] == 3)
        ]
        return tuple(sorted(path.removeprefix("observation/") for path in paths))

    def shards(self, split: str) -> list[tuple[Path, int]]:
        """
        Files of a split with their numbers of records.

        Raises:
            ValueError: An unknown split, or a split whose file is not here; the file is named.
        """
        entry = next((entry for entry in self.info.get("splits", ()) if entry["name"] == split), None)
        if entry is None:
            raise ValueError(f"`split` {split!r} is unknown; {self.path} lists {', '.join(self.splits) or 'none'}.")
        lengths = [int(length) for length in entry["shardLengths"]]
        template = entry.get("filepathTemplate") or DEFAULT_TEMPLATE
        shards = []
        for index, length in enumerate(lengths):
            name = template.format(
                DATASET=self.name,
                SPLIT=split,
                FILEFORMAT="tfrecord",
                SHARD_X_OF_Y=f"{index:05d}-of-{len(lengths):05d}",
            )
            if not (self.path / name).is_file():
                raise ValueError(f"`split` {split!r} needs the file {self.path / name}, which is missing.")
            shards.append((self.path / name, length))
        return shards


def _array(values: FeatureValues, spec: FeatureSpec, name: str) -> NDArray[Any]:
    """Stored values of a tensor feature -> (count, *shape)."""
    if any(size < 0 for size in spec.shape):
        raise ValueError(f"feature {name!r} has shape {spec.shape}, which varies; only fixed shapes can be read.")
    dtype = np.dtype("float32" if spec.dtype == "bfloat16" else spec.dtype)
    if isinstance(values, list):
        if spec.encoding not in ("bytes", "zlib"):
            raise ValueError(f"feature {name!r} holds bytes where {spec.dtype} numbers are announced.")
        raw = b"".join(zlib.decompress(value) if spec.encoding == "zlib" else value for value in values)
        flat: NDArray[Any] = np.frombuffer(raw, dtype=dtype)
    else:
        flat = values.astype(dtype)
    size = int(np.prod(spec.shape, dtype=np.int64))
    if size == 0 or flat.size % size:
        raise ValueError(f"feature {name!r} holds {flat.size} numbers, no multiple of its shape {spec.shape}.")
    return flat.reshape(-1, *spec.shape)


@dataclass(frozen=True)
class _Selection:
    """Which features become which field of an episode."""

    cameras: tuple[str, ...]
    action_keys: tuple[str, ...]
    proprio_keys: tuple[str, ...]
    instruction_key: str | None


def _select(
    folder: RldsFolder,
    cameras: Sequence[str] | None,
    action_keys: Sequence[str] | None,
    proprio_keys: Sequence[str] | None,
    instruction_key: str | None,
) -> _Selection:
    """Fills in defaults and checks that every feature asked for exists."""
    known = folder.step_features
    if action_keys is None:
        action_keys = [path for path in known if path == "action"]
        parts = [path for path in known if path.startswith("action/")]
        if parts:
            raise ValueError(
                f"the action of {folder.path} has parts; choose by `action_keys` among {', '.join(parts)}."
            )
    if proprio_keys is None:
        proprio_keys = [PROPRIO_KEY] if PROPRIO_KEY in known else []
    if instruction_key is None:
        instruction_key = next((key for key in INSTRUCTION_KEYS if key in known), None)
    for name, keys, options in (
        ("cameras", cameras or (), folder.cameras),
        ("action_keys", action_keys, tuple(known)),
        ("proprio_keys", proprio_keys, tuple(known)),
        ("instruction_key", [instruction_key] if instruction_key else [], tuple(known)),
    ):
        for key in keys:
            if key not in options:
                raise ValueError(
                    f"`{name}` has {key!r}, which {folder.path} lacks; it has {', '.join(options) or 'none'}."
                )
    chosen = folder.cameras if cameras is None else tuple(cameras)
    return _Selection(chosen, tuple(action_keys), tuple(proprio_keys), instruction_key)


class _Record:
    """One parsed record with the specs to read it by."""

    def __init__(self, content: bytes, folder: RldsFolder) -> None:
        self.features = parse_example(content)
        self.folder = folder

    def _values(self, name: str) -> FeatureValues:
        if name not in self.features:
            raise ValueError(f"the record has no feature {name!r}, which features.json announces.")
        return decode_feature(self.features[name])

    def vectors(self, keys: Sequence[str]) -> NDArray[np.float32] | None:
        """Numeric step features, flattened per step and joined: (num_steps, dim) float32; None for no keys."""
        if not keys:
            return None
        columns = []
        for key in keys:
            array = _array(self._values(f"{STEPS}/{key}"), self.folder.step_features[key], key)
            columns.append(array.reshape(len(array), -1).astype(np.float32))
        if len({len(column) for column in columns}) != 1:
            raise ValueError(f"features {', '.join(keys)} have unequal numbers of steps: {[len(c) for c in columns]}.")
        return np.concatenate(columns, axis=1)

    def frames(self, camera: str, name: str) -> EncodedFrames:
        path = camera if camera in self.folder.step_features else f"observation/{camera}"
        encoded = self._values(f"{STEPS}/{path}")
        if not isinstance(encoded, list):
            raise ValueError(f"camera {camera!r} holds numbers where encoded images are announced.")
        return EncodedFrames(encoded, f"camera {camera!r} of {name}")

    def instructions(self, key: str | None) -> tuple[str, ...]:
        """Distinct non-empty instructions in order of appearance."""
        if key is None:
            return ()
        values = self._values(f"{STEPS}/{key}")
        if not isinstance(values, list):
            raise ValueError(f"feature {key!r} holds numbers where text is announced.")
        texts = dict.fromkeys(value.decode("utf-8", errors="replace").strip() for value in values)
        return tuple(text for text in texts if text)

    def num_steps(self) -> int:
        """Length of the episode, by the first step feature that the record has."""
        for path, spec in self.folder.step_features.items():
            if f"{STEPS}/{path}" in self.features and all(size >= 0 for size in spec.shape):
                values = self._values(f"{STEPS}/{path}")
                if isinstance(values, list):
                    return len(values)
                return len(_array(values, spec, path))
        raise ValueError("the record has no step feature of a fixed shape.")

    def metadata(self) -> dict[str, object]:
        """Scalars and texts of the episode as a whole."""
        result: dict[str, object] = {}
        for path, spec in self.folder.metadata_features.items():
            if spec.kind == "image" or spec.shape or f"{METADATA}/{path}" not in self.features:
                continue
            values = self._values(f"{METADATA}/{path}")
            if isinstance(values, list):
                result[path] = b"".join(values).decode("utf-8", errors="replace")
            else:
                result[path] = _array(values, spec, path)[0].item()
        return result


def _episode(
    record: _Record,
    selection: _Selection,
    episode_id: str,
    source: str,
    frequency: float | None,
    embodiment: str | None,
) -> Episode:
    frames = {camera: record.frames(camera, episode_id) for camera in selection.cameras}
    num_steps = record.num_steps()
    return Episode(
        episode_id=episode_id,
        source=source,
        frames={camera: encoded for camera, encoded in frames.items() if not encoded.is_blank()},
        num_steps=num_steps,
        instructions=record.instructions(selection.instruction_key),
        action=record.vectors(selection.action_keys),
        proprio=record.vectors(selection.proprio_keys),
        timestamps=None if frequency is None else np.arange(num_steps) / frequency,
        embodiment=embodiment,
        metadata=record.metadata(),
    )


def read_rlds(
    path: str | Path,
    split: str = "train",
    *,
    cameras: Sequence[str] | None = None,
    action_keys: Sequence[str] | None = None,
    proprio_keys: Sequence[str] | None = None,
    instruction_key: str | None = None,
    frequency: float | None = None,
    embodiment: str | None = None,
) -> Iterator[Episode]:
    """
    Reads the episodes of a split, in the order of the files.

    Args:
        path: Version folder of a TFDS data set, with `features.json` and `dataset_info.json`.
        split: One of the splits that `dataset_info.json` lists.
        cameras: Images to keep, by name below `observation`; all colour images when None. A camera whose frames are
            all one colour is left out of an episode (the `has_image_*` flags of real data are not reliable).
        action_keys: Step features that together are the action; `action` when None. An empty list reads none.
        proprio_keys: Step features that together are the proprioception; `observation/state`, if there is one, when
            None.
        instruction_key: Step feature with the instruction; the usual names are tried when None.
        frequency: Control steps per second, which RLDS does not record; timestamps are None without it.
        embodiment: Name of the robot, for `Episode.embodiment`.

    Returns:
        Iterator of `Episode`. Arguments and the presence of all files are checked at once, contents as they are read.

    Raises:
        ValueError: No RLDS folder, an unknown split or feature, a missing file, or (while reading) a corrupt record,
            named by file and byte position.
    """
    folder = RldsFolder(path)
    shards = folder.shards(split)
    selection = _select(folder, cameras, action_keys, proprio_keys, instruction_key)
    if frequency is not None and not frequency > 0:
        raise ValueError(f"`frequency` must be positive, got {frequency}.")
    return _read_shards(folder, split, shards, selection, frequency, embodiment)


def _read_shards(
    folder: RldsFolder,
    split: str,
    shards: list[tuple[Path, int]],
    selection: _Selection,
    frequency: float | None,
    embodiment: str | None,
) -> Iterator[Episode]:
    source = f"{folder.name}/{split}"
    for shard, (file, length) in enumerate(shards):
        index = 0
        for position, content in read_tfrecord(file):
            try:
                record = _Record(content, folder)
                yield _episode(record, selection, f"{shard:05d}-{index:05d}", source, frequency, embodiment)
            except ValueError as error:
                raise ValueError(f"{file}, record at byte {position}: {error}") from error
            index += 1
        if index != length:
            raise ValueError(f"{file} has {index} records, dataset_info.json announces {length}.")


__all__ = ["EncodedFrames", "FeatureSpec", "RldsFolder", "read_rlds"]
