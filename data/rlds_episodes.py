"""Episodes out of the records of an RLDS data set: what features become which field, and reading them file by file."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.data.encoded_frames import EncodedFrames
from lapa.data.episode_source import OnError
from lapa.data.open_x_actions import ActionTransform
from lapa.data.schema import Episode, ReadError
from lapa.data.tfds_example import FeatureValues, decode_feature, parse_example
from lapa.data.tfds_features import FeatureSpec, numbers, texts
from lapa.data.tfds_folder import METADATA, STEPS, RldsFolder, ShardFile
from lapa.data.tfrecord import Record, RecordIndex, RecordReader


@dataclass(frozen=True)
class Selection:
    """Which features become which field of an episode."""

    cameras: tuple[str, ...]
    instruction_keys: tuple[str, ...]
    action_keys: tuple[str, ...]
    proprio_keys: tuple[str, ...]
    action_names: tuple[str, ...] | None = None
    action_transform: ActionTransform | None = None
    frequency: float | None = None
    embodiment: str | None = None


class ExampleSteps:
    """Two steps of zeros, of the shapes that a folder announces: shows whether a transform fits without reading."""

    def __init__(self, folder: RldsFolder) -> None:
        self.folder = folder

    def __getitem__(self, key: str) -> NDArray[Any]:
        spec = known_feature(self.folder, key)
        return numbers(np.zeros(2 * prod(spec.shape), dtype=np.int64), spec, key)


def known_feature(folder: RldsFolder, key: str) -> FeatureSpec:
    if key not in folder.step_features:
        raise ValueError(f"{folder.path} has no step feature {key!r}; it has {', '.join(folder.step_features)}.")
    return folder.step_features[key]


class _RecordSteps:
    """The step features of one record, each decoded when it is asked for."""

    def __init__(self, content: bytes, folder: RldsFolder) -> None:
        self.features = parse_example(content)
        self.folder = folder

    def values(self, name: str) -> FeatureValues:
        """Stored values of a feature by its full name."""
        if name not in self.features:
            raise ValueError(f"the record has no feature {name!r}, which features.json announces.")
        return decode_feature(self.features[name])

    def __getitem__(self, key: str) -> NDArray[Any]:
        return numbers(self.values(f"{STEPS}/{key}"), known_feature(self.folder, key), key)

    def vectors(self, keys: Sequence[str]) -> NDArray[np.float32] | None:
        """Numeric step features, flattened per step and joined: (num_steps, dim) float32; None for no keys."""
        if not keys:
            return None
        columns = [self[key] for key in keys]
        if len({len(column) for column in columns}) != 1:
            raise ValueError(f"features {', '.join(keys)} have unequal numbers of steps: {[len(c) for c in columns]}.")
        return np.concatenate([column.reshape(len(column), -1) for column in columns], axis=1).astype(np.float32)

    def frames(self, camera: str, name: str) -> EncodedFrames:
        """Frames of a camera, still encoded; `name` is that of the record."""
        path = camera if camera in self.folder.step_features else f"observation/{camera}"
        encoded = self.values(f"{STEPS}/{path}")
        if not isinstance(encoded, list):
            raise ValueError(f"camera {camera!r} holds numbers where encoded images are announced.")
        return EncodedFrames(encoded, f"camera {camera!r} of {name}")

    def instructions(self, keys: Sequence[str]) -> tuple[str, ...]:
        """Distinct non-empty instructions, in order of keys and appearance."""
        found: dict[str, None] = {}
        for key in keys:
            found |= dict.fromkeys(texts(self.values(f"{STEPS}/{key}"), known_feature(self.folder, key), key))
        return tuple(dict.fromkeys(text for text in map(str.strip, found) if text))

    def num_steps(self, keys: Sequence[str]) -> int:
        """Length of the episode, by the first of some features that it has."""
        for key in keys:
            if f"{STEPS}/{key}" in self.features:
                return len(self[key])
        raise ValueError("the record has no step feature of a fixed shape.")

    def metadata(self) -> dict[str, object]:
        """Scalars and texts of the episode as a whole."""
        result: dict[str, object] = {}
        for path, spec in self.folder.episode_features.items():
            if spec.kind == "image" or spec.shape or path not in self.features:
                continue
            values = self.values(path)
            name = path.removeprefix(f"{METADATA}/")
            if spec.kind == "text" and isinstance(values, list):
                result[name] = b"".join(values).decode("utf-8", errors="replace")
            elif spec.kind == "tensor" and len(array := numbers(values, spec, path)):
                result[name] = array[0].item()
        return result


class EpisodeFiles:
    """Episodes of one split, file by file: what `read_rlds` and `RldsSource` share."""

    def __init__(self, folder: RldsFolder, split: str, selection: Selection) -> None:
        self.folder, self.selection = folder, selection
        self.source = f"{folder.name}/{split}"
        self._indices: dict[str, RecordIndex] = {}
        # The smallest features tell the length of an episode with the least effort.
        numeric = [path for path, spec in folder.step_features.items() if spec.is_numeric]
        self._short_keys = tuple(sorted(numeric, key=lambda path: prod(folder.step_features[path].shape)))

    def __getstate__(self) -> dict[str, Any]:
        # Where records lie is found out again where it is needed.
        return {**self.__dict__, "_indices": {}}

    def read(self, file: ShardFile, wanted: Sequence[int] | None, on_error: OnError) -> Iterator[tuple[int, Episode]]:
        """Episodes of a file by their number in it, see `EpisodeSource.read`."""
        name = self.folder.location(file.name)
        ascending = wanted is None or all(first < second for first, second in pairwise(wanted))
        with ExitStack() as stack:
            try:
                stream, size = stack.enter_context(self.folder.open(file, fetched=not ascending))
            except ReadError as error:
                on_error(error)
                return
            reader = RecordReader(stream, name, size, file.num_records)
            if self.folder.is_local:
                if file.name not in self._indices:
                    self._indices[file.name] = reader.make_index()
                records = reader.read(self._indices[file.name], wanted, on_error)
            elif ascending:
                records = reader.stream(wanted, on_error)
            else:
                records = reader.read(reader.make_index(), wanted, on_error)
            for record in records:
                try:
                    episode = self._episode(record, file)
                except ValueError as error:
                    on_error(ReadError(f"{name}, record at byte {record.position}: {error}"))
                    continue
                yield record.number, episode

    def _episode(self, record: Record, file: ShardFile) -> Episode:
        steps, chosen = _RecordSteps(record.content, self.folder), self.selection
        name = f"{self.folder.location(file.name)}, record at byte {record.position}"
        frames = {camera: steps.frames(camera, name) for camera in chosen.cameras}
        num_steps = steps.num_steps(self._short_keys)
        if num_steps < 1:
            raise ValueError("the episode has no steps.")
        action = (
            steps.vectors(chosen.action_keys) if chosen.action_transform is None else chosen.action_transform(steps)
        )
        return Episode(
            episode_id=f"{file.number:05d}-{record.number:05d}",
            source=self.source,
            frames={camera: encoded for camera, encoded in frames.items() if not encoded.is_blank()},
            num_steps=num_steps,
            instructions=steps.instructions(chosen.instruction_keys),
            action=action,
            action_names=None if action is None else chosen.action_names,
            proprio=steps.vectors(chosen.proprio_keys),
            timestamps=None if chosen.frequency is None else np.arange(num_steps) / chosen.frequency,
            embodiment=chosen.embodiment,
            metadata=steps.metadata(),
        )


__all__ = ["EpisodeFiles", "ExampleSteps", "Selection"]
