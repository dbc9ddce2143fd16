"""Something-Something v2, as it is distributed: WebM files, the parts of its archive or tar files, and label files."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lapa.data.captions import split_text
from lapa.data.episode_source import OnError, raise_error
from lapa.data.file_tree import FileTree
from lapa.data.folders import VIDEO_ENDINGS, ClipSource, by_number, has_ending, in_groups, named
from lapa.data.schema import Episode, ReadError
from lapa.data.video import VideoFrames
from lapa.data.video_archives import LooseVideos, PackedVideos, SplitArchive, TarVideos

SPLITS = ("train", "validation", "test")
# Folder of the videos, and stem of the parts into which the archive of them is split.
VIDEO_FOLDER = "20bn-something-something-v2"
ARCHIVE_PART = re.compile(rf"{VIDEO_FOLDER}-(\d+)")
LABEL_FILES = (
    "something-something-v2-{split}.json",
    "labels/{split}.json",
    "labels/something-something-v2-{split}.json",
    "{split}.json",
)
# The largest video of the data set has 0.5 MB.
MAX_VIDEO_BYTES = 1 << 28


@dataclass(frozen=True)
class Label:
    """What a label file says of a video (`text` is its `label`); that of the test split says nothing."""

    text: str | None = None
    template: str | None = None
    placeholders: tuple[str, ...] = ()

    @property
    def metadata(self) -> dict[str, object]:
        """Template, and what stands in its places."""
        return {} if self.template is None else {"template": self.template, "placeholders": list(self.placeholders)}


class SomethingSomethingSource(ClipSource):
    r"""
    Something-Something v2 (220,847 videos of people's hands, 12 Hz), without unpacking or converting it.

    The videos may be, in `path`:
    - `.webm` files, in `path` itself or in `20bn-something-something-v2/`: shards of 64 by rising id;
    - WebDataset tars, `ID.webm` with an optional `ID.json` or `ID.txt` that has the label: a shard each, their headers
      are read once;
    - the distributed parts `20bn-something-something-v2-00`, `-01` and so on of one compressed archive: one shard, which
      can only be read from its start to its end, in the order of the archive. Good for a single pass; to shuffle or to
      share the work, unpack them.

    The instruction is the label; template and placeholders stand in the metadata.

    Args:
        path (`str`): Local path or fsspec URL of a folder (or of one tar file).
        split (`str`, *optional*): `train`, `validation`, `test`, or None for all videos whatever the labels say.
        labels (`str`, *optional*): The split's label file, or the folder with the label files. Looked for in `path` and
            beside it when None (`something-something-v2-train.json`, `labels/train.json`).
        cameras, frame_gap_seconds, embodiment, unnorm_key: See `ClipSource`.

    Raises:
        ValueError: No such folder, no videos, a missing part, an unknown split, or no label file for it.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str | None = "train",
        labels: str | None = None,
        cameras: Sequence[str] | None = None,
        frame_gap_seconds: float | None = None,
        embodiment: str | None = "human",
        unnorm_key: str | None = None,
    ) -> None:
        if split is not None and split not in SPLITS:
            raise ValueError(f"`split` {split!r} is unknown; there are {', '.join(SPLITS)}, and None for all.")
        self._videos = _find_videos(path)
        files = _label_files(self._videos.tree, labels, split)
        rows = {name: _read_labels(file) for name, file in files.items()}
        self._labels = {video: label for name in rows if split in (None, name) for video, label in rows[name].items()}
        if split is not None and split not in files and not isinstance(self._videos, TarVideos):
            looked = ", ".join(name.format(split=split) for name in LABEL_FILES)
            raise ValueError(
                f"`split` {split!r} needs its label file, which is not in {path} ({looked}); "
                "name it by `labels`, or ask for all videos by `split` None."
            )
        name = self._videos.tree.name + (f"/{split}" if split else "")
        super().__init__(
            name,
            _groups(self._videos, self._labels, split, split in files),
            cameras=cameras,
            frame_gap_seconds=frame_gap_seconds,
            embodiment=embodiment,
            unnorm_key=unnorm_key,
        )
        if not self.clips:
            raise ValueError(f"`path` {path!r} has no video of split {split!r}.")
        self.any_order = not isinstance(self._videos, SplitArchive)
        self.warnings = (*self._videos.warnings, *_mismatches(self._videos, rows, split, files))

    @staticmethod
    def recognises(path: str) -> bool:
        """Whether a folder has the videos, an archive part or a label file under the names they are distributed with."""
        try:
            folders, files = FileTree(path).entries()
        except (ValueError, OSError):
            return False
        labels = {LABEL_FILES[0].format(split=split) for split in SPLITS}
        return VIDEO_FOLDER in folders or any(ARCHIVE_PART.fullmatch(file) or file in labels for file in files)

    def read_clip(self, clip: str) -> Episode:
        """Reads the times of a video; see `ClipSource.read_clip`."""
        label = self._labels.get(clip)
        if label is None:
            label = _own_label(self._videos, clip)
        return self._episode(clip, self._videos.open(clip), label)

    def read(
        self, shard: int, episodes: Sequence[int] | None = None, on_error: OnError = raise_error
    ) -> Iterator[tuple[int, Episode]]:
        """
        Reads videos of a shard; see `EpisodeSource.read`. Out of the parts of an archive they come in its order, whatever
        order is asked for, and one that is asked for and not in it is an error at its end.
        """
        if not isinstance(self._videos, SplitArchive):
            yield from super().read(shard, episodes, on_error)
            return
        indices = {self.clips[shard][index]: index for index in self.wanted(shard, episodes)}
        stream = self._videos.stream()
        while indices:
            try:
                video, content = next(stream)
                if video not in indices:
                    continue
                index = indices.pop(video)
                if content is None:
                    raise ReadError(f"{self._videos.name(video)} has more than {MAX_VIDEO_BYTES} bytes.")
                episode = self._episode(video, content, self._labels.get(video, Label()))
            except ReadError as error:
                on_error(error)
            except StopIteration:
                break
            else:
                yield index, episode
        for video in indices:
            on_error(ReadError(f"{self._videos.name(video)} is listed, but was not found there."))

    def _episode(self, video: str, content: str | bytes, label: Label) -> Episode:
        frames = VideoFrames(content, name=self._videos.name(video))
        return self.video_episode(frames, video, (label.text,) if label.text else (), label.metadata)


def _find_videos(path: str) -> PackedVideos:
    """What a folder (or one tar file) has the videos in."""
    folder, file = os.path.split(path)
    if has_ending(file, (".tar",)):
        return TarVideos(FileTree(folder or "."), [file], MAX_VIDEO_BYTES)
    tree = FileTree(path)
    folders, files = tree.entries()
    if VIDEO_FOLDER in folders:
        tree = FileTree(tree.location(VIDEO_FOLDER))
        files = tree.entries()[1]
    if videos := [file for file in files if has_ending(file, VIDEO_ENDINGS)]:
        return LooseVideos(tree, videos)
    if tars := [file for file in files if has_ending(file, (".tar",))]:
        return TarVideos(tree, tars, MAX_VIDEO_BYTES)
    numbers = {int(match[1]): file for file in files if (match := ARCHIVE_PART.fullmatch(file))}
    if missing := sorted(set(range(max(numbers, default=-1))) - set(numbers)):
        raise ValueError(
            f"`path` {path!r} lacks part {missing[0]:02d} of the archive; it has {named(sorted(numbers.values()))}."
        )
    if not numbers:
        raise ValueError(f"`path` {path!r} has no videos: no .webm files, no .tar files, no {VIDEO_FOLDER}-00.")
    return SplitArchive(tree, [numbers[number] for number in sorted(numbers)], MAX_VIDEO_BYTES)


def _label_files(videos: FileTree, labels: str | None, split: str | None) -> dict[str, str]:
    """Label files by their split: the one or those that are asked for, else what lies with the videos or a level up."""
    if labels is not None and has_ending(labels, (".json",)):
        folder, file = os.path.split(labels)
        if not FileTree(folder or ".").is_file(file):
            raise ValueError(f"`labels` {labels!r} does not exist.")
        return {split or "all": labels}
    places = [FileTree(labels)] if labels is not None else [videos, *_parent(videos)]
    found: dict[str, str] = {}
    for place in places:
        for name in SPLITS:
            for pattern in LABEL_FILES:
                file = pattern.format(split=name)
                if name not in found and place.is_file(file):
                    found[name] = place.location(file)
    if labels is not None and not found:
        raise ValueError(f"`labels` {labels!r} has no label file ({', '.join(LABEL_FILES)}).")
    return found


def _parent(tree: FileTree) -> list[FileTree]:
    """The folder above that of the videos."""
    if tree.name != VIDEO_FOLDER:
        return []
    try:
        return [FileTree(os.path.dirname(tree.path) or ".")]
    except ValueError:  # the top of a URL
        return []


def _read_labels(file: str) -> dict[str, Label]:
    """Rows of a label file by the id of their video."""
    folder, name = os.path.split(file)
    with FileTree(folder or ".").open(name) as content:
        try:
            rows = json.loads(content.read())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is no valid JSON: {error}.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file} must hold a list of rows, got {type(rows).__name__}.")
    return dict(_label(row, f"{file}, row {number}") for number, row in enumerate(rows))


def _label(row: Any, name: str, video: str | None = None) -> tuple[str, Label]:
    """A row as it is distributed: id, label, template and placeholders; of the test split the id alone."""
    if not isinstance(row, dict):
        raise ValueError(f"{name} must be an object, got {type(row).__name__}.")
    number, text, template = row.get("id", video), row.get("label"), row.get("template")
    placeholders = row.get("placeholders") or []
    if not isinstance(number, str | int):
        raise ValueError(f"{name} has no `id`.")
    if not all(value is None or isinstance(value, str) for value in (text, template)):
        raise ValueError(f"{name}: `label` and `template` must be text, got {text!r} and {template!r}.")
    if not isinstance(placeholders, list) or not all(isinstance(value, str) for value in placeholders):
        raise ValueError(f"{name}: `placeholders` must be a list of texts, got {placeholders!r}.")
    return str(number), Label(text, template, tuple(placeholders))


def _own_label(videos: PackedVideos, video: str) -> Label:
    """What the file beside a video in its tar file says."""
    name = f"{videos.tree.path}: the label beside video {video}"
    if (content := videos.text(video, "json")) is not None:
        try:
            return _label(json.loads(content), name, video)[1]
        except (ValueError, RecursionError) as error:
            raise ReadError(f"{name} cannot be read: {error}") from error
    if (content := videos.text(video, "txt")) is not None:
        return Label(next(iter(split_text(content, name)), None))
    return Label()


def _groups(
    videos: PackedVideos, labels: Mapping[str, Label], split: str | None, listed: bool
) -> list[tuple[str, Sequence[str]]]:
    """Shards: names and ids."""
    packs = videos.packs
    if packs is None:
        if not labels:
            raise ValueError(f"{videos.tree.path} has the parts of an archive: what is in it only the labels tell.")
        return [(VIDEO_FOLDER, sorted(labels, key=by_number))]
    if split is not None and not listed:
        chosen = {pack: ids for pack, ids in packs.items() if split in pack}
        if not chosen:
            raise ValueError(
                f"`split` {split!r} needs a label file (`labels`), or tar files with it in their names; "
                f"{videos.tree.path} has {named(sorted(packs))}."
            )
        packs = chosen
    elif split is not None:
        packs = {pack: [video for video in ids if video in labels] for pack, ids in packs.items()}
    if isinstance(videos, LooseVideos):
        return in_groups(sorted(packs[""], key=by_number))
    return [(pack, list(ids)) for pack, ids in packs.items() if ids]


def _mismatches(
    videos: PackedVideos, rows: Mapping[str, Mapping[str, Label]], split: str | None, files: Mapping[str, str]
) -> Iterator[str]:
    """Warnings: what is listed and not here, what is here and not listed, and what reading in order means."""
    packs = videos.packs
    if packs is None:
        yield (
            f"{videos.tree.path} is an archive in parts: it is read from its start to its end by one worker. "
            f"To train on it, or to share the work, unpack it: cat {VIDEO_FOLDER}-?? | tar xz"
        )
        return
    present = {video for ids in packs.values() for video in ids}
    for name in rows:
        absent = [video for video in rows[name] if video not in present] if split in (None, name) else []
        if absent:
            total = len(rows[name])
            yield f"{len(absent)} of {total} videos that {files[name]} lists are not here: {named(absent)}"
    known = {video for labels in rows.values() for video in labels}
    unlisted = sorted((video for video in present if video not in known), key=by_number)
    if rows and unlisted:
        yield f"{len(unlisted)} of {len(present)} videos are in no label file: {named(unlisted)}"


__all__ = ["Label", "SomethingSomethingSource"]
