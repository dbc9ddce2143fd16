"""RLDS data sets (TFDS folders of TFRecord files, as Open X-Embodiment is distributed), read without TensorFlow."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lapa.data.episode_source import ROBOT_GAP_SECONDS, EpisodeSource, OnError, SourceShard, raise_error
from lapa.data.open_x import OpenXDataset, open_x_dataset
from lapa.data.open_x_actions import ActionTransform, StepFeatures
from lapa.data.rlds_episodes import EpisodeFiles, ExampleSteps, Selection
from lapa.data.schema import DELTA_END_EFFECTOR, Episode
from lapa.data.tfds_features import FeatureSpec
from lapa.data.tfds_folder import RldsFolder, ShardFile, newest_version

# Where data sets keep the instruction, by their own habits; the first that exists is read.
INSTRUCTION_KEYS = (
    "language_instruction",
    "observation/natural_language_instruction",
    "observation/language_instruction",
)
ACTION, PROPRIO_KEY = "action", "observation/state"
# The action that `open_x` says how to make.
AUTO = "auto"


class RldsSource(EpisodeSource):
    r"""
    One split of an RLDS data set.

    What differs between the data sets of Open X-Embodiment is looked up by the name of the data set in
    `lapa.data.open_x`: cameras and their order, instruction, control frequency, and how to make an action of 7 numbers
    (`DELTA_END_EFFECTOR`: displacement and rotation of the end effector, and a gripper that is 1 open or 0 closed). What
    is passed here wins over the table. A data set that is not in it is read with its actions as they are recorded, and
    `warnings` says so.

    A local file is gone through once by the headers of its records; each episode is then read by itself. A remote file
    is read from its start to the last episode that is wanted, what is not wanted being skipped; where episodes are
    wanted out of order it is copied to a temporary file that is removed afterwards. The checksum of every length and of
    every record read is checked: a damaged record is one error, and the next is still read; a damaged length is one
    error for all that follow in the file, whose number it tells.

    Args:
        path (`str`): Version folder (with `features.json` and `dataset_info.json`), or the folder of a data set, of
            which the newest version is taken. Local, or an fsspec URL (`gs://`, `hf://`, `https://`).
        split (`str`, *optional*): Split, of which every file must be here. When None, what is here of `train` (of the
            first split, if there is no `train`); files that are listed but absent are then warnings.
        cameras (`Sequence[str]`, *optional*): Cameras to read, by their name below `observation` or as `primary`,
            `secondary` and `wrist` of the table; all colour images when None, those of the table first. A camera whose
            frames are all one colour is left out of an episode.
        frame_gap_seconds (`float`, *optional*): Default time between the frames of a pair; 0.6 s when None.
        embodiment (`str`, *optional*): Robot; the table's when None.
        unnorm_key (`str`, *optional*): Name under which the statistics of the actions are kept; that of the data set
            when None.
        frequency (`float`, *optional*): Control steps per second, which RLDS does not record; the table's when None.
            Unknown, episodes have no timestamps.
        instruction_key (`str` or `Sequence[str]`, *optional*): Step features with instructions; the table's, or the
            usual names, when None.
        action_keys (`Sequence[str]`, *optional*): Step features that together are the action as it is recorded. None
            means `action`, or all numbers below `action/`; an empty list reads none.
        action_transform (`str` or callable, *optional*): `auto` for the table's unless `action_keys` are given; None for
            actions as recorded; or a function from step features (indexed by their path, as `action/world_vector`) to
            (num_steps, 7) float32, importable by name so that it pickles.
        proprio_keys (`Sequence[str]`, *optional*): Step features that together are the proprioception; `observation/state`
            if there is one when None.
        dataset (`str`, *optional*): Name in the table, where the folder has another one.

    Raises:
        ValueError: No RLDS folder; a split, camera or feature that is not there (what there is, is listed); a requested
            file that is missing; an argument out of range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str | None = None,
        cameras: Sequence[str] | None = None,
        frame_gap_seconds: float | None = None,
        embodiment: str | None = None,
        unnorm_key: str | None = None,
        frequency: float | None = None,
        instruction_key: str | Sequence[str] | None = None,
        action_keys: Sequence[str] | None = None,
        action_transform: str | ActionTransform | None = AUTO,
        proprio_keys: Sequence[str] | None = None,
        dataset: str | None = None,
    ) -> None:
        folder = RldsFolder(newest_version(str(path)))
        row, notes = _table_row(folder, dataset, frequency)
        files, absent = _split_files(folder, split)
        split = split or _default_split(folder)
        chosen_cameras, more = _cameras(folder, cameras, row)
        notes += more
        instruction_keys, more = _instruction_keys(folder, instruction_key, row)
        notes += more
        action, more = _action(folder, action_keys, action_transform, row)
        notes += more
        selection = Selection(
            cameras=chosen_cameras,
            instruction_keys=instruction_keys,
            proprio_keys=_proprio_keys(folder, proprio_keys),
            frequency=_positive("frequency", frequency if frequency is not None or row is None else row.frequency),
            embodiment=embodiment if embodiment is not None or row is None else row.embodiment,
            **action,
        )
        self.folder, self.dataset = folder, row
        self.name = f"{folder.name}/{split}"
        self.frame_gap_seconds = _positive("frame_gap_seconds", frame_gap_seconds) or ROBOT_GAP_SECONDS
        self.embodiment = selection.embodiment
        self.unnorm_key = folder.name if unnorm_key is None else unnorm_key
        self.warnings = (*notes, *absent)
        self._files, self._episodes = files, EpisodeFiles(folder, split, selection)
        self._shards = tuple(SourceShard(file.name, file.num_records) for file in files)

    @staticmethod
    def recognises(path: str) -> bool:
        """Whether `path` is a version folder of a TFDS data set, or a folder with such folders in it."""
        try:
            RldsFolder(newest_version(path))
        except ValueError:
            return False
        return True

    @property
    def shards(self) -> tuple[SourceShard, ...]:
        """See `EpisodeSource.shards`."""
        return self._shards

    @property
    def cameras(self) -> tuple[str, ...]:
        """See `EpisodeSource.cameras`."""
        return self._episodes.selection.cameras

    @property
    def frequency(self) -> float | None:
        """Control steps per second, where they are known."""
        return self._episodes.selection.frequency

    @property
    def action_names(self) -> tuple[str, ...] | None:
        """What each number of an action is, where that is known."""
        return self._episodes.selection.action_names

    def read(
        self, shard: int, episodes: Sequence[int] | None = None, on_error: OnError = raise_error
    ) -> Iterator[tuple[int, Episode]]:
        """Reads episodes of a file; see `EpisodeSource.read`."""
        file = self._files[shard]
        for index in episodes or ():
            if not 0 <= index < file.num_records:
                raise ValueError(f"`episodes` has {index}; shard {file.name} has {file.num_records} episodes.")
        yield from self._episodes.read(file, episodes, on_error)


def _table_row(
    folder: RldsFolder, dataset: str | None, frequency: float | None
) -> tuple[OpenXDataset | None, list[str]]:
    """Row of the table for a folder, and what there is to say about it."""
    row = open_x_dataset(folder.name if dataset is None else dataset)
    if row is None:
        if dataset is not None:
            raise ValueError(f"`dataset` {dataset!r} is not in the table of lapa.data.open_x.")
        unknown = "" if frequency is not None else ", and without timestamps as its `frequency` is not known"
        return None, [
            f"{folder.name} is not in the table of Open X-Embodiment data sets: it is read with its actions as they are "
            f"recorded{unknown}"
        ]
    if folder.version and folder.version not in row.versions:
        known = " or ".join(row.versions)
        return row, [f"{folder.name} is of version {folder.version}; the table's actions are those of version {known}"]
    return row, []


def _default_split(folder: RldsFolder) -> str:
    if not folder.splits:
        raise ValueError(f"{folder.path} lists no splits.")
    return "train" if "train" in folder.splits else folder.splits[0]


def _split_files(folder: RldsFolder, split: str | None) -> tuple[tuple[ShardFile, ...], list[str]]:
    """Files to read, and what is listed but absent."""
    if split is not None:
        files, name = folder.shards(split), split
    else:
        name = _default_split(folder)
        files, _ = folder.split_files(name)
        if not files:
            # All are missing: said as it would be had they been asked for.
            files = folder.shards(name)
    notes = []
    for other in folder.splits:
        present, absent = folder.split_files(other)
        if absent:
            part = "its only file" if len(absent) == 1 and not present else f"{len(absent)} of its files"
            notes.append(f"split {other!r} lacks {part}: {folder.describe(absent)} listed but absent")
    return files, notes


def _cameras(
    folder: RldsFolder, cameras: Sequence[str] | None, row: OpenXDataset | None
) -> tuple[tuple[str, ...], list[str]]:
    """Cameras to read, in order."""
    roles = {} if row is None else row.cameras
    if cameras is not None:
        chosen = [camera if camera in folder.cameras else roles.get(camera, camera) for camera in cameras]
        _check("cameras", chosen, folder, folder.cameras)
        return tuple(dict.fromkeys(chosen)), []
    absent = [camera for camera in roles.values() if camera not in folder.cameras]
    known = [camera for camera in roles.values() if camera in folder.cameras]
    notes = [f"{folder.name} lacks the camera {camera!r}, which the table names" for camera in absent]
    return tuple(dict.fromkeys([*known, *folder.cameras])), notes


def _instruction_keys(
    folder: RldsFolder, chosen: str | Sequence[str] | None, row: OpenXDataset | None
) -> tuple[tuple[str, ...], list[str]]:
    if chosen is not None:
        keys = (chosen,) if isinstance(chosen, str) else tuple(chosen)
        _check("instruction_key", keys, folder, [key for key, spec in folder.step_features.items() if spec.is_text])
        return keys, []
    usual = tuple(key for key in INSTRUCTION_KEYS if key in folder.step_features)[:1]
    if row is None:
        return usual, []
    known = tuple(key for key in row.instruction_keys if key in folder.step_features)
    if known:
        return known, []
    return usual, [f"{folder.name} lacks the instruction {row.instruction_keys[0]!r}, which the table names"]


def _action(
    folder: RldsFolder,
    keys: Sequence[str] | None,
    transform: str | ActionTransform | None,
    row: OpenXDataset | None,
) -> tuple[dict[str, Any], list[str]]:
    """Fields of a selection that say how the action is made."""
    if isinstance(transform, str) and transform != AUTO:
        raise ValueError(f"`action_transform` must be {AUTO!r}, None or a function, got {transform!r}.")
    notes: list[str] = []
    if callable(transform):
        if keys is not None:
            raise ValueError("`action_keys` and `action_transform` exclude each other; give one.")
        _try_transform(folder, transform)
        return {"action_keys": (), "action_transform": transform, "action_names": DELTA_END_EFFECTOR}, notes
    if transform == AUTO and row is not None and keys is None:
        try:
            _try_transform(folder, row.action_transform)
        except ValueError as error:
            notes.append(f"actions are as recorded, since those of the table do not fit: {error}")
        else:
            transform = row.action_transform
            return {"action_keys": (), "action_transform": transform, "action_names": DELTA_END_EFFECTOR}, notes
    if keys is not None:
        _check("action_keys", keys, folder, _numeric(folder))
        return {"action_keys": tuple(keys)}, notes
    if ACTION in _numeric(folder):
        return {"action_keys": (ACTION,)}, notes
    parts = [key for key in _action_parts(folder) if key in _numeric(folder)]
    names = [name for key in parts for name in _number_names(key, folder.step_features[key])]
    return {"action_keys": tuple(parts), "action_names": tuple(names) or None}, notes


def _action_parts(folder: RldsFolder) -> list[str]:
    return [key for key in folder.step_features if key.startswith(f"{ACTION}/")]


def _number_names(key: str, spec: FeatureSpec) -> list[str]:
    """Names of the numbers of one part of an action."""
    name = key.removeprefix(f"{ACTION}/")
    if not spec.shape:
        return [name]
    return [f"{name}{list(index)}" for index in np.ndindex(*spec.shape)]


def _try_transform(folder: RldsFolder, transform: ActionTransform) -> None:
    """Checks a transform against the features of a folder."""
    shape = np.shape(transform(ExampleSteps(folder)))
    if shape != (2, len(DELTA_END_EFFECTOR)):
        raise ValueError(f"`action_transform` makes {shape} of two steps, (2, {len(DELTA_END_EFFECTOR)}) is needed.")


def _proprio_keys(folder: RldsFolder, keys: Sequence[str] | None) -> tuple[str, ...]:
    if keys is None:
        return (PROPRIO_KEY,) if PROPRIO_KEY in _numeric(folder) else ()
    _check("proprio_keys", keys, folder, _numeric(folder))
    return tuple(keys)


def _numeric(folder: RldsFolder) -> list[str]:
    """Step features that are a fixed number of numbers."""
    return [key for key, spec in folder.step_features.items() if spec.is_numeric]


def _check(name: str, keys: Sequence[str], folder: RldsFolder, options: Sequence[str]) -> None:
    for key in keys:
        if key not in options:
            raise ValueError(
                f"`{name}` has {key!r}, which {folder.path} lacks; it has {', '.join(options) or 'none'}."
            )


def _positive(name: str, value: float | None) -> float | None:
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"`{name}` must be positive, got {value}.")
    return value


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
    Reads the episodes of a split as they are recorded, in the order of the files; the table of `RldsSource` is not used.

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
    files = folder.shards(split)
    parts = _action_parts(folder)
    if action_keys is None and parts:
        raise ValueError(f"the action of {folder.path} has parts; choose by `action_keys` among {', '.join(parts)}.")
    action, _ = _action(folder, action_keys, None, None)
    selection = Selection(
        cameras=_cameras(folder, cameras, None)[0],
        instruction_keys=_instruction_keys(folder, instruction_key, None)[0],
        proprio_keys=_proprio_keys(folder, proprio_keys),
        frequency=_positive("frequency", frequency),
        embodiment=embodiment,
        **action,
    )
    episodes = EpisodeFiles(folder, split, selection)
    return (episode for file in files for _, episode in episodes.read(file, None, raise_error))


__all__ = ["ActionTransform", "RldsFolder", "RldsSource", "StepFeatures", "read_rlds"]
