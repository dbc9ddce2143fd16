"""
LeRobot data sets v2.0, v2.1 and v3.0, read from their parquet and video files without the lerobot package.

`lerobot_info.py` and `lerobot_episodes.py` read what is where; the steps of an episode come from parquet, its frames from a video (or a range
of one) by the time of each step, or from images stored beside the steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lapa.data.encoded_frames import EncodedFrames
from lapa.data.episode_source import ROBOT_GAP_SECONDS, EpisodeSource, OnError, SourceShard, raise_error
from lapa.data.file_tree import FileTree
from lapa.data.folders import named
from lapa.data.lerobot_episodes import TASK_COLUMN, read_episodes, read_tasks
from lapa.data.lerobot_info import INFO_FILE, Feature, read_info
from lapa.data.parquet_rows import EPISODE_COLUMN, ParquetRows, step_numbers
from lapa.data.schema import Episode, FrameSequence, ReadError
from lapa.data.video import VideoFrames

if TYPE_CHECKING:
    import pyarrow as pa

# Names that features have by convention; the first that a data set has is read.
ACTION_KEYS, PROPRIO_KEYS = ("action", "actions"), ("observation.state", "state")
TIME_COLUMN = "timestamp"
EPISODES_PER_SHARD = 64
# Times are stored as float32; those within this of whole steps are meant to be whole steps. LeRobot allows as much.
TIME_TOLERANCE = 1e-4
# 30 years into a video is none.
MAX_SECONDS = 1e9


class StepFrames(FrameSequence):
    """
    Frames of a video at the times of an episode's steps: of each step the nearest frame, half a step away at most.

    Args:
        video (`VideoFrames`): The video, or the range of it that is the episode's.
        seconds (`NDArray`): (num_steps,) float64, of each step after the first frame of the file.
        tolerance (`float`): Seconds by which a frame may be off.
    """

    def __init__(self, video: VideoFrames, seconds: NDArray[np.float64], tolerance: float) -> None:
        self.video, self.seconds, self.tolerance = video, seconds, tolerance
        self._frames: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def frames(self) -> NDArray[np.int64]:
        """
        (num_steps,) int64 frame of the video that each step has; found on first need.

        Raises:
            ReadError: A step without a frame, or no such video.
        """
        if self._frames is None:
            times = self.video.index.offset + self.video.timestamps
            later = np.searchsorted(times, self.seconds).clip(0, len(times) - 1)
            before = (later - 1).clip(0)
            nearer_before = self.seconds - times[before] <= times[later] - self.seconds
            frames = np.where(nearer_before, before, later)
            far = np.flatnonzero(np.abs(times[frames] - self.seconds) > self.tolerance)
            if len(far):
                raise ReadError(
                    f"{self.video.name} has no frame at {self.seconds[far[0]]:.3f} s, where step {far[0]} is, and at "
                    f"{len(far)} of {len(self)} steps in all."
                )
            self._frames = frames
        return self._frames

    def read(self, steps: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Decodes frames; see `FrameSequence.read`."""
        return self.video.read(self.frames[list(steps)].tolist())


class StoredImages(FrameSequence):
    """
    Images of one camera and episode that are stored in a parquet file; read on first need, then kept encoded.

    Args:
        tree (`FileTree`), relative (`str`): Where the file lies.
        column (`str`): With the images.
        episode, num_steps (`int`): Which episode, and how many steps it has.
    """

    def __init__(self, tree: FileTree, relative: str, column: str, episode: int, num_steps: int) -> None:
        self.tree, self.relative, self.column = tree, relative, column
        self.episode, self.num_steps = episode, num_steps
        self._images: EncodedFrames | None = None

    def __len__(self) -> int:
        return self.num_steps

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": None}

    def read(self, steps: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Decodes images; see `FrameSequence.read`."""
        if self._images is None:
            with ParquetRows(self.tree, self.relative) as rows:
                images = rows.read_images(self.column, self.episode, self.num_steps)
            self._images = EncodedFrames(images, f"{self.column!r} of episode {self.episode} in {rows.name}")
        return self._images.read(steps)


class LeRobotSource(EpisodeSource):
    r"""
    A LeRobot data set of version v2.0, v2.1 or v3.0.

    ```python
    >>> source = LeRobotSource("hf://datasets/ORG/NAME", cameras=["observation.images.front"])
    >>> episode = next(iter(source))
    >>> episode.action.shape, episode.action_names[:2], episode.instruction
    ((373, 6), ('shoulder_pan.pos', 'shoulder_lift.pos'), 'Pick the orange cube and place it in the box')
    ```

    A shard is a data file (v3.0) or 64 episodes (v2). Cameras are the features with videos or images; depth maps are left
    out. Instructions are the tasks of the steps.

    Args:
        path (`str`): Local path or fsspec URL of the folder with `meta/info.json`; `hf://datasets/ORG/NAME@REVISION` for
            one on the Hub.
        split (`str`, *optional*): One of the `splits` of `info.json`; None for all episodes. Where it lists none, `train`
            is all of them.
        cameras (`Sequence[str]`, *optional*): Features to read images from; all when None.
        action_keys (`Sequence[str]`, *optional*): Features that together are the action; `action` or `actions` when None.
            An empty list reads none.
        proprio_keys (`Sequence[str]`, *optional*): Features that together are the proprioception; `observation.state` or
            `state` when None.
        frame_gap_seconds (`float`, *optional*): Default time between the frames of a pair; 0.6 s when None.
        embodiment (`str`, *optional*): The robot; `robot_type` of `info.json` when None.
        unnorm_key (`str`, *optional*): Name of the statistics of its actions; that of the folder when None.

    Raises:
        ValueError: No such data set or another version, an unknown split, camera or feature, or none of the files of what
            is asked for.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str | None = "train",
        cameras: Sequence[str] | None = None,
        action_keys: Sequence[str] | None = None,
        proprio_keys: Sequence[str] | None = None,
        frame_gap_seconds: float | None = None,
        embodiment: str | None = None,
        unnorm_key: str | None = None,
    ) -> None:
        if frame_gap_seconds is not None and not frame_gap_seconds > 0:
            raise ValueError(f"`frame_gap_seconds` must be positive, got {frame_gap_seconds}.")
        self.tree = FileTree(path)
        self.info = read_info(self.tree)
        self.name = self.tree.name + (f"/{split}" if split else "")
        self.frame_gap_seconds = ROBOT_GAP_SECONDS if frame_gap_seconds is None else frame_gap_seconds
        self.embodiment = embodiment or self.info.robot
        self.unnorm_key = unnorm_key or self.tree.name
        self._warnings: list[str] = []
        self._cameras = self._choose_cameras(cameras)
        self._action = self._choose_features("action_keys", action_keys, ACTION_KEYS)
        self._proprio = self._choose_features("proprio_keys", proprio_keys, PROPRIO_KEYS)
        self._tasks = read_tasks(self.tree)
        # Steps tell their tasks by number, unless the data set lacks the numbers or what they stand for.
        with_tasks = self._tasks is None or TASK_COLUMN not in self.info.features
        self.episodes = read_episodes(self.tree, self.info, self._videos, with_tasks)
        rows = self._rows_of_split(split)
        self._absent = self._absent_data(rows)
        self._cameras = self._present_cameras(rows, requested=cameras is not None)
        self._groups = self._group(rows)
        self._shards = tuple(SourceShard(name, len(group)) for name, group in self._groups)
        self.warnings = tuple(self._warnings)

    @staticmethod
    def recognises(path: str) -> bool:
        """Whether there is `meta/info.json` in the folder."""
        try:
            return FileTree(path).is_file(INFO_FILE)
        except (ValueError, OSError):
            return False

    @property
    def shards(self) -> tuple[SourceShard, ...]:
        """See `EpisodeSource.shards`."""
        return self._shards

    @property
    def cameras(self) -> tuple[str, ...]:
        """Features that images are read from, sorted."""
        return self._cameras

    def read(
        self, shard: int, episodes: Sequence[int] | None = None, on_error: OnError = raise_error
    ) -> Iterator[tuple[int, Episode]]:
        """Reads episodes of a shard; see `EpisodeSource.read`."""
        wanted = self.wanted(shard, episodes)
        _, group = self._groups[shard]
        with ExitStack() as stack:
            file: ParquetRows | None = None
            for number in wanted:
                row = int(group[number])
                try:
                    relative = self._data_file(row)
                    if file is None or file.relative != relative:
                        stack.close()
                        file = None
                        file = stack.enter_context(self._open(relative))
                    episode = self._episode(row, file)
                except ReadError as error:
                    failure = ReadError(f"episode {self.episodes.index[row]}: {error}")
                    failure.__cause__ = error
                    on_error(failure)
                    continue
                yield number, episode

    @property
    def _videos(self) -> list[str]:
        """Cameras whose images are in videos."""
        return [camera for camera in self._cameras if self.info.features[camera].dtype == "video"]

    # What is asked for, and whether it is there

    def _choose_cameras(self, cameras: Sequence[str] | None) -> tuple[str, ...]:
        known = {key: feature for key, feature in self.info.features.items() if feature.is_camera}
        depth = sorted(key for key, feature in known.items() if feature.is_depth)
        colour = sorted(set(known) - set(depth))
        for camera in cameras or ():
            if camera not in colour:
                reason = "is a depth map, which is not read" if camera in depth else f"{self.tree.path} lacks"
                raise ValueError(f"`cameras` has {camera!r}, which {reason}; it has {', '.join(colour) or 'none'}.")
        if depth and cameras is None:
            self._warnings.append(f"{len(depth)} depth cameras are left out: {named(depth)}")
        return tuple(colour if cameras is None else dict.fromkeys(cameras))

    def _choose_features(self, option: str, keys: Sequence[str] | None, usual: Sequence[str]) -> tuple[Feature, ...]:
        known = {key: feature for key, feature in self.info.features.items() if feature.is_numeric}
        for key in keys or ():
            if key not in known:
                raise ValueError(f"`{option}` has {key!r}, which {self.tree.path} lacks; it has {', '.join(known)}.")
        if keys is None:
            keys = [key for key in usual if key in known][:1]
        features = tuple(known[key] for key in keys)
        for feature in features:
            if feature.names is not None and feature.shape and len(feature.names) != feature.size:
                self._warnings.append(
                    f"`names` of {feature.key!r} are left out: {len(feature.names)} for {feature.size} numbers"
                )
        return features

    def _rows_of_split(self, split: str | None) -> NDArray[np.int64]:
        """Rows of `episodes` that belong to the split."""
        index, location = self.episodes.index, self.tree.location("meta")
        if self.info.num_episodes not in (None, len(index)):
            self._warnings.append(
                f"info.json announces {self.info.num_episodes} episodes, {location} lists {len(index)}"
            )
        rows = np.arange(len(index))
        if split is not None and not (split == "train" and not self.info.splits):
            wanted = self.info.split_range(split)
            rows = np.flatnonzero((index >= wanted.start) & (index < wanted.stop))
            if len(rows) < len(wanted):
                self._warnings.append(
                    f"split {split!r} announces {len(wanted)} episodes, {location} lists {len(rows)}"
                )
        if not len(rows):
            raise ValueError(f"`split` {split!r} of {self.tree.path} has no episode.")
        return rows

    def _absent_data(self, rows: NDArray[np.int64]) -> set[str]:
        """Data files of the split that are not there."""
        files = dict.fromkeys(self._data_file(int(row)) for row in rows)
        absent = self._absent_among(files)
        if len(absent) == len(files):
            raise ValueError(
                f"`path` {self.tree.path!r} has none of its {len(files)} data files: {named(list(files))}."
            )
        if absent:
            self._warnings.append(f"{len(absent)} of {len(files)} data files are absent: {named(sorted(absent))}")
        return absent

    def _present_cameras(self, rows: NDArray[np.int64], requested: bool) -> tuple[str, ...]:
        """Cameras without those of which nothing is there; those were not asked for by name."""
        present = list(self._cameras)
        for camera in self._videos:
            places = [self._video_file(int(row), camera) for row in rows]
            files = dict.fromkeys(file for file in places if file is not None)
            absent = self._absent_among(files)
            if len(absent) == len(files):
                message = f"none of the {len(files)} videos of camera {camera!r} is here"
                if not files:
                    message = f"no episode has a video of camera {camera!r}"
                if requested:
                    raise ValueError(f"`cameras` has {camera!r}, but {message}: {self.tree.path}.")
                self._warnings.append(f"{message}; it is left out")
                present.remove(camera)
                continue
            if absent:
                self._warnings.append(
                    f"{len(absent)} of {len(files)} videos of camera {camera!r} are absent: {named(sorted(absent))}"
                )
                self._absent |= absent
        return tuple(present)

    def _absent_among(self, files: dict[str, None]) -> set[str]:
        """Files that are not there; each folder is listed once."""
        absent: set[str] = set()
        folders: dict[str, list[str]] = {}
        for file in files:
            path = PurePosixPath(file)
            folders.setdefault("" if str(path.parent) == "." else str(path.parent), []).append(path.name)
        for folder, names in folders.items():
            try:
                here = set(self.tree.entries(folder)[1])
            except (FileNotFoundError, NotADirectoryError):
                here = set()
            absent.update(f"{folder}/{name}" if folder else name for name in names if name not in here)
        return absent

    def _group(self, rows: NDArray[np.int64]) -> list[tuple[str, NDArray[np.int64]]]:
        """Names and rows of the shards."""
        if self.info.episode_per_file:
            parts = np.split(rows, range(EPISODES_PER_SHARD, len(rows), EPISODES_PER_SHARD))
            index = self.episodes.index
            return [(f"episodes-{index[part[0]]:06d}-{index[part[-1]]:06d}", part) for part in parts]
        files: dict[str, list[int]] = {}
        assert self.episodes.chunk is not None and self.episodes.file is not None
        for row in rows[np.lexsort((rows, self.episodes.file[rows], self.episodes.chunk[rows]))].tolist():
            files.setdefault(self._data_file(row), []).append(row)
        return [(file, np.array(part, np.int64)) for file, part in files.items()]

    # Where an episode lies

    def _data_file(self, row: int) -> str:
        if self.episodes.chunk is None or self.episodes.file is None:
            index = int(self.episodes.index[row])
            return self.info.data_path(episode_chunk=index // self.info.chunk_size, episode_index=index)
        return self.info.data_path(chunk_index=int(self.episodes.chunk[row]), file_index=int(self.episodes.file[row]))

    def _video_file(self, row: int, camera: str) -> str | None:
        """The video of an episode; None where the camera recorded nothing."""
        if self.info.episode_per_file:
            index = int(self.episodes.index[row])
            return self.info.video_path(
                episode_chunk=index // self.info.chunk_size, episode_index=index, video_key=camera
            )
        places = self.episodes.videos[camera]
        if places.chunk[row] < 0 or places.file[row] < 0:
            return None
        return self.info.video_path(
            chunk_index=int(places.chunk[row]), file_index=int(places.file[row]), video_key=camera
        )

    def _open(self, relative: str) -> ParquetRows:
        if relative in self._absent:
            raise ReadError(f"{self.tree.location(relative)} is listed and absent.")
        return ParquetRows(self.tree, relative)

    # What is in an episode

    def _episode(self, row: int, file: ParquetRows) -> Episode:
        index, length = int(self.episodes.index[row]), int(self.episodes.length[row])
        features = [feature.key for feature in (*self._action, *self._proprio)]
        told = [column for column in (TIME_COLUMN, TASK_COLUMN) if column in file.columns]
        # Some column must tell how many rows there are.
        needed = list(dict.fromkeys((*features, *told))) or list(file.columns[:1])
        table = file.read(needed, index)
        if table.num_rows != length or not length:
            raise ReadError(
                f"{file.name} has {table.num_rows} rows of it, {self.tree.location('meta')} lists {length}."
            )
        times = self._times(table, file.name)
        frames = {camera: self._frames(row, camera, file, times) for camera in self._cameras}
        return Episode(
            episode_id=f"episode_{index:06d}",
            source=self.name,
            frames={camera: sequence for camera, sequence in frames.items() if sequence is not None},
            num_steps=length,
            instructions=self._instructions(row, table, file.name),
            action=self._numbers(self._action, table, file.name),
            action_names=_joined_names(self._action),
            proprio=self._numbers(self._proprio, table, file.name),
            timestamps=times - times[0],
            embodiment=self.embodiment,
            metadata={EPISODE_COLUMN: index},
        )

    def _times(self, table: "pa.Table", name: str) -> NDArray[np.float64]:
        """(num_steps,) seconds of the steps after the start of the episode's video."""
        even = np.arange(table.num_rows) / self.info.fps
        if TIME_COLUMN not in table.column_names:
            return even
        times = step_numbers(table[TIME_COLUMN], f"{name}: {TIME_COLUMN!r}", np.float64)[:, 0]
        if not np.isfinite(times).all() or (np.diff(times) < 0).any():
            step = int(np.argmax(~np.isfinite(times) | (np.diff(times, prepend=-np.inf) < 0)))
            raise ReadError(f"{name}: {TIME_COLUMN!r} decreases or is no number at step {step}.")
        return even if np.allclose(times, even, rtol=1e-6, atol=TIME_TOLERANCE) else times

    def _instructions(self, row: int, table: "pa.Table", name: str) -> tuple[str, ...]:
        """Distinct tasks of the steps in order of appearance."""
        if self.episodes.tasks is not None:
            return tuple(dict.fromkeys(self.episodes.tasks[row]))
        if self._tasks is None or TASK_COLUMN not in table.column_names:
            return ()
        numbers = step_numbers(table[TASK_COLUMN], f"{name}: {TASK_COLUMN!r}", np.int64)[:, 0]
        distinct, first = np.unique(numbers, return_index=True)
        texts = []
        for number in distinct[np.argsort(first)].tolist():
            if number not in self._tasks:
                raise ReadError(f"{name}: {TASK_COLUMN!r} {number} is no task of {self.tree.location('meta')}.")
            texts.append(self._tasks[number])
        return tuple(text for text in dict.fromkeys(texts) if text)

    def _numbers(self, features: Sequence[Feature], table: "pa.Table", name: str) -> NDArray[np.float32] | None:
        """Features side by side: (num_steps, size) float32; None for no features."""
        columns = []
        for feature in features:
            values = step_numbers(table[feature.key], f"{name}: {feature.key!r}")
            if feature.shape and values.shape[1] != feature.size:
                raise ReadError(
                    f"{name}: {feature.key!r} has {values.shape[1]} numbers a step, {self.info.location} says {feature.size}."
                )
            columns.append(values)
        return np.concatenate(columns, axis=1) if columns else None

    def _frames(self, row: int, camera: str, file: ParquetRows, times: NDArray[np.float64]) -> FrameSequence | None:
        """Frames of a camera; None where it recorded nothing."""
        index = int(self.episodes.index[row])
        if self.info.features[camera].dtype == "image":
            if camera not in file.columns:
                raise ReadError(f"{file.name} has no column {camera!r}; it has {', '.join(file.columns)}.")
            return StoredImages(self.tree, file.relative, camera, index, len(times))
        relative = self._video_file(row, camera)
        if relative is None:
            return None
        location = self.tree.location(relative)
        if relative in self._absent:
            raise ReadError(f"{location} is listed and absent.")
        start, stop = 0.0, np.inf
        if not self.info.episode_per_file:
            places = self.episodes.videos[camera]
            start, stop = float(places.start[row]), float(places.stop[row])
        if not 0 <= start < min(stop, MAX_SECONDS):
            raise ReadError(
                f"{self.tree.location('meta')}: camera {camera!r} is said to record from {start:g} to {stop:g} s of {location}."
            )
        video = VideoFrames(
            location, start=start, stop=stop if stop < np.inf else None, name=f"{location} (episode {index})"
        )
        return StepFrames(video, start + times, 0.5 / self.info.fps)


def _joined_names(features: Sequence[Feature]) -> tuple[str, ...] | None:
    """Names of features side by side; None where one has none that fit. Those of several begin with their feature's."""
    names: list[str] = []
    for feature in features:
        if feature.names is None or (feature.shape and len(feature.names) != feature.size):
            return None
        names += [f"{feature.key}.{name}" if len(features) > 1 else name for name in feature.names]
    return tuple(names) or None


__all__ = ["LeRobotSource", "StepFrames", "StoredImages"]
