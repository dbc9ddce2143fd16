"""Folders of videos, and folders of frames, with or without instructions beside them."""

import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from lapa.data.captions import match_captions, read_captions, read_text
from lapa.data.encoded_frames import decode_image
from lapa.data.episode_source import HUMAN_GAP_SECONDS, EpisodeSource, OnError, SourceShard, raise_error
from lapa.data.file_tree import MAX_DEPTH, FileTree
from lapa.data.schema import Episode, FrameSequence, ReadError
from lapa.data.video import VideoFrames

VIDEO_ENDINGS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# What PIL calls them; files are told by their content, not by their names.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_IMAGE_BYTES = 1 << 28
CAMERA = "video"
CLIPS_PER_SHARD = 64
# Names that a warning lists before it only counts.
MAX_NAMED = 3
# How deep `recognises` looks for a first file.
RECOGNISED_DEPTH = 2


class ClipSource(EpisodeSource):
    r"""
    Clips of one camera, read one by one.

    A format is a subclass that says how one clip is read.

    Args:
        name (`str`): Data set and split.
        groups (`Sequence`): Per shard its name, and what `read_clip` finds its clips by.
        cameras (`Sequence[str]`, *optional*): `("video",)`, the only camera there is.
        frame_gap_seconds (`float`, *optional*): Default time between the frames of a pair; 2.4 s when None.
        embodiment (`str`, *optional*): Who acts.
        unnorm_key (`str`, *optional*): As every source has it; such clips have no actions.

    Raises:
        ValueError: An unknown camera, or a gap that is not positive.
    """

    def __init__(
        self,
        name: str,
        groups: Sequence[tuple[str, Sequence[str]]],
        *,
        cameras: Sequence[str] | None = None,
        frame_gap_seconds: float | None = None,
        embodiment: str | None = "human",
        unnorm_key: str | None = None,
    ) -> None:
        if cameras is not None and tuple(cameras) != (CAMERA,):
            raise ValueError(f"`cameras` {tuple(cameras)} is unknown; {name} has {CAMERA!r}.")
        if frame_gap_seconds is not None and not frame_gap_seconds > 0:
            raise ValueError(f"`frame_gap_seconds` must be positive, got {frame_gap_seconds}.")
        self.name = name
        self.clips = [list(clips) for _, clips in groups]
        self.frame_gap_seconds = HUMAN_GAP_SECONDS if frame_gap_seconds is None else frame_gap_seconds
        self.embodiment, self.unnorm_key = embodiment, unnorm_key
        self._shards = tuple(SourceShard(group, len(clips)) for group, clips in groups)

    @property
    def cameras(self) -> tuple[str, ...]:
        """The one camera."""
        return (CAMERA,)

    @property
    def shards(self) -> tuple[SourceShard, ...]:
        """See `EpisodeSource.shards`."""
        return self._shards

    @abstractmethod
    def read_clip(self, clip: str) -> Episode:
        """Reads one of the clips; raises `ReadError` for one that cannot be read."""

    def read(
        self, shard: int, episodes: Sequence[int] | None = None, on_error: OnError = raise_error
    ) -> Iterator[tuple[int, Episode]]:
        """Reads clips of a shard; see `EpisodeSource.read`."""
        for index in self.wanted(shard, episodes):
            try:
                episode = self.read_clip(self.clips[shard][index])
            except ReadError as error:
                on_error(error)
                continue
            yield index, episode

    def video_episode(
        self,
        frames: VideoFrames,
        episode_id: str,
        instructions: tuple[str, ...],
        metadata: dict[str, object] | None = None,
    ) -> Episode:
        """The episode of a video; its packets are read here, its frames when they are asked for."""
        metadata = dict(metadata or {})
        if frames.index.counted:
            metadata["times"] = "from the average frame rate: the file has none"
        return Episode(
            episode_id=episode_id,
            source=self.name,
            frames={CAMERA: frames},
            num_steps=len(frames),
            instructions=instructions,
            timestamps=frames.timestamps,
            embodiment=self.embodiment,
            metadata=metadata,
        )


class VideoFolderSource(ClipSource):
    r"""
    Videos in a folder and the folders below it, in the order of their paths; or a single video.

    Instructions come from a file beside them (`captions.*` or `metadata.*`, see `read_captions`); a video that it does
    not name may have a text file of its own (`clip.txt` beside `clip.mp4`, an instruction a line). Times are the video's
    own, variable frame rate included.

    Args:
        path (`str`): Local path or fsspec URL.
        captions (`str`, *optional*): File with the instructions.
        recursive (`bool`): Whether to look into the folders below.
        split (`str`, *optional*): A folder directly below `path`, to read only what is in there.
        cameras, frame_gap_seconds, embodiment, unnorm_key: See `ClipSource`.

    Raises:
        ValueError: No such folder, split or captions file, or no video.
    """

    def __init__(
        self,
        path: str,
        *,
        captions: str | None = None,
        recursive: bool = True,
        split: str | None = None,
        cameras: Sequence[str] | None = None,
        frame_gap_seconds: float | None = None,
        embodiment: str | None = "human",
        unnorm_key: str | None = None,
    ) -> None:
        folder, file = _split_file(path)
        self.tree, name = split_tree(folder, split)
        videos: list[str] = []
        texts: set[str] = set()
        for below, _, files in self.tree.walk(depth=MAX_DEPTH if recursive and file is None else 0):
            paths = [f"{below}/{name}" if below else name for name in files]
            videos += [path for path in paths if has_ending(path, VIDEO_ENDINGS) and file in (None, path)]
            texts.update(path for path in paths if has_ending(path, (".txt",)))
        videos.sort()
        if not videos:
            raise ValueError(f"`path` {path!r} holds no video ({', '.join(VIDEO_ENDINGS)}).")
        super().__init__(
            name if file is None else file,
            in_groups(videos),
            cameras=cameras,
            frame_gap_seconds=frame_gap_seconds,
            embodiment=embodiment,
            unnorm_key=unnorm_key,
        )
        self._instructions, self.warnings = clip_instructions(self.tree, captions, videos)
        self._texts = texts.intersection(_text_beside(video) for video in videos)

    @staticmethod
    def recognises(path: str) -> bool:
        """Whether there is a video in the folder or not far below it, or `path` is one."""
        return _finds(path, VIDEO_ENDINGS)

    def read_clip(self, clip: str) -> Episode:
        """Reads the times of a video; see `ClipSource.read_clip`."""
        instructions = self._instructions.get(clip, ())
        if not instructions and _text_beside(clip) in self._texts:
            instructions = read_text(self.tree, _text_beside(clip))
        return self.video_episode(VideoFrames(self.tree.location(clip)), clip, instructions)


class ImageFrames(FrameSequence):
    """
    Frames that are image files.

    Args:
        tree (`FileTree`): Where they lie.
        images (`Sequence[str]`): Paths below it, in order.
    """

    def __init__(self, tree: FileTree, images: Sequence[str]) -> None:
        self.tree, self.images = tree, tuple(images)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, steps: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Decodes images; see `FrameSequence.read`. All of one call must have the same size."""
        frames = {step: self._read(self.images[step]) for step in dict.fromkeys(steps)}
        shapes = {frame.shape: self.images[step] for step, frame in frames.items()}
        if len(shapes) > 1:
            sizes = " and ".join(f"{shape[1]} x {shape[0]} ({image})" for shape, image in shapes.items())
            raise ReadError(f"{self.tree.path} has frames of different sizes in one clip: {sizes}.")
        return [frames[step] for step in steps]

    def _read(self, relative: str) -> NDArray[np.uint8]:
        name = self.tree.location(relative)
        try:
            with self.tree.open(relative) as file:
                # Into memory: from an open file PIL asks for as many bytes as a damaged one announces.
                size = file.seek(0, 2)
                file.seek(0)
                content = file.read(min(size, MAX_IMAGE_BYTES))
        except OSError as error:
            raise ReadError(f"{name} is no readable image: {error.strerror or error}.") from error
        if size > MAX_IMAGE_BYTES:
            raise ReadError(f"{name} has more than the {MAX_IMAGE_BYTES} bytes that an image may have.")
        return decode_image(content, name, IMAGE_FORMATS)


class FrameFolderSource(ClipSource):
    r"""
    Folders of frames, a clip each, as the published quantizer training reads them: `path/CLIP/img_00001.jpg` and so on,
    sorted by the numbers in their names.

    Every folder below `path` that holds images is a clip, named by its path. Instructions come from a file in `path`, as
    for `VideoFolderSource`, or from a text file `path/CLIP.txt` beside the folder.

    Args:
        path (`str`): Local path or fsspec URL.
        captions (`str`, *optional*): File with the instructions.
        frequency (`float`, *optional*): Frames per second. Without it clips have no timestamps, and pairs need a gap in
            frames.
        split (`str`, *optional*): A folder directly below `path`, to read only what is in there.
        cameras, frame_gap_seconds, embodiment, unnorm_key: See `ClipSource`.

    Raises:
        ValueError: No such folder, split or captions file, or no folder of images.
    """

    def __init__(
        self,
        path: str,
        *,
        captions: str | None = None,
        frequency: float | None = None,
        split: str | None = None,
        cameras: Sequence[str] | None = None,
        frame_gap_seconds: float | None = None,
        embodiment: str | None = "human",
        unnorm_key: str | None = None,
    ) -> None:
        if frequency is not None and not 0 < frequency < np.inf:
            raise ValueError(f"`frequency` must be positive, got {frequency}.")
        self.tree, name = split_tree(path, split)
        self.frequency = frequency
        clips, self._texts = _frame_folders(self.tree)
        if not clips:
            raise ValueError(f"`path` {path!r} has no folder of images ({', '.join(IMAGE_ENDINGS)}) below it.")
        super().__init__(
            name,
            in_groups(clips),
            cameras=cameras,
            frame_gap_seconds=frame_gap_seconds,
            embodiment=embodiment,
            unnorm_key=unnorm_key,
        )
        self._instructions, self.warnings = clip_instructions(self.tree, captions, clips)

    @staticmethod
    def recognises(path: str) -> bool:
        """Whether there are images in folders not far below."""
        return _finds(path, IMAGE_ENDINGS, least_depth=1)

    def read_clip(self, clip: str) -> Episode:
        """Lists the images of a folder; see `ClipSource.read_clip`."""
        try:
            files = self.tree.entries(clip)[1]
        except OSError as error:
            raise ReadError(f"{self.tree.location(clip)} cannot be listed: {error.strerror or error}.") from error
        images = sorted((file for file in files if has_ending(file, IMAGE_ENDINGS)), key=by_number)
        if not images:
            raise ReadError(f"{self.tree.location(clip)} has no images.")
        instructions = self._instructions.get(clip, ())
        if not instructions and f"{clip}.txt" in self._texts:
            instructions = read_text(self.tree, f"{clip}.txt")
        return Episode(
            episode_id=clip,
            source=self.name,
            frames={CAMERA: ImageFrames(self.tree, [f"{clip}/{image}" for image in images])},
            num_steps=len(images),
            instructions=instructions,
            timestamps=None if self.frequency is None else np.arange(len(images)) / self.frequency,
            embodiment=self.embodiment,
        )


def in_groups(clips: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    """Shards of `CLIPS_PER_SHARD` clips, in order."""
    starts = range(0, len(clips), CLIPS_PER_SHARD)
    groups = [(start, clips[start : start + CLIPS_PER_SHARD]) for start in starts]
    return [(f"clips-{start:07d}-{start + len(group) - 1:07d}", group) for start, group in groups]


def by_number(name: str) -> list[tuple[int, str]]:
    """Sort key by which `img_2` comes before `img_10`."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), part) if place % 2 else (0, part) for place, part in enumerate(parts)]


def has_ending(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a file name ends so, in capitals or not."""
    return name.lower().endswith(endings)


def split_tree(path: str, split: str | None) -> tuple[FileTree, str]:
    """
    The folder of a data set, or of its split, and the name of the source.

    Raises:
        ValueError: No such folder, or split; the folders there are are listed.
    """
    tree = FileTree(path)
    if split is None:
        return tree, tree.name
    folders = tree.entries()[0]
    if split not in folders:
        raise ValueError(f"`split` {split!r} is no folder of {path}; it has {', '.join(folders[:20]) or 'none'}.")
    return FileTree(tree.location(split)), f"{tree.name}/{split}"


def clip_instructions(
    tree: FileTree, captions: str | None, clips: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Instructions of the clips from the file beside them, and warnings about what there matches nothing."""
    rows, location = read_captions(tree, captions)
    matched, unused = match_captions(rows, clips)
    warnings = []
    if unused:
        warnings.append(f"{len(unused)} of {len(rows)} names in {location} are no clip here: {named(unused)}")
    without = [clip for clip in clips if clip not in matched]
    if location is not None and without:
        warnings.append(f"{len(without)} of {len(clips)} clips have no instruction in {location}: {named(without)}")
    return matched, tuple(warnings)


def named(names: Sequence[str]) -> str:
    """The first of some names, for a message."""
    return ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")


def _frame_folders(tree: FileTree) -> tuple[list[str], set[str]]:
    """Folders that hold images, sorted, and the text files beside them."""
    folders, files = tree.entries()
    inner, images = tree.entries(folders[0]) if folders else ([], [])
    if not inner and _any_ending(images, IMAGE_ENDINGS):
        # The published layout. Looking into each of hundreds of thousands of folders is left to the reading.
        return folders, {file for file in files if has_ending(file, (".txt",))}
    clips: list[str] = []
    texts: set[str] = set()
    for folder, _, files in tree.walk():
        if folder and _any_ending(files, IMAGE_ENDINGS):
            clips.append(folder)
        texts.update(f"{folder}/{file}" if folder else file for file in files if has_ending(file, (".txt",)))
    return sorted(clips), texts


def _any_ending(names: Sequence[str], endings: tuple[str, ...]) -> bool:
    return any(has_ending(name, endings) for name in names)


def _text_beside(clip: str) -> str:
    return str(PurePosixPath(clip).with_suffix(".txt"))


def _split_file(path: str) -> tuple[str, str | None]:
    """Folder and file name of what is named like a video and no folder; else the folder alone."""
    if not has_ending(path, VIDEO_ENDINGS):
        return path, None
    folder, file = os.path.split(path)
    tree = FileTree(folder or ".")
    return (tree.path, file) if tree.is_file(file) else (path, None)


def _finds(path: str, endings: tuple[str, ...], least_depth: int = 0) -> bool:
    """Whether a file of a kind lies in a folder or not far below it; lists folders only until one is found."""
    try:
        folder, file = _split_file(path)
        if file is not None:
            return has_ending(file, endings)
        for below, _, files in FileTree(folder).walk(depth=RECOGNISED_DEPTH):
            depth = len(below.split("/")) if below else 0
            if depth >= least_depth and _any_ending(files, endings):
                return True
    except (ValueError, OSError):
        pass
    return False


__all__ = ["ClipSource", "FrameFolderSource", "ImageFrames", "VideoFolderSource"]
