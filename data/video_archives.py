"""Videos by their ids, however a data set of them is packed: files in a folder, tar files, or one archive in parts."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence

from lapa.data.file_tree import FileTree
from lapa.data.folders import VIDEO_ENDINGS, has_ending
from lapa.data.schema import ReadError
from lapa.data.tar_files import TarMember, read_member, stream_members, tar_members


class PackedVideos(ABC):
    """
    Videos by their ids, which are their file names without folder and ending.

    Attributes:
        tree (`FileTree`): The folder that all is in.
        warnings (`tuple[str, ...]`): What cannot be read there.
    """

    tree: FileTree
    warnings: tuple[str, ...] = ()

    @property
    @abstractmethod
    def packs(self) -> dict[str, Collection[str]] | None:
        """Ids by the file that they are read from, where that is several videos; None where it is not known before."""

    @abstractmethod
    def open(self, video: str) -> str | bytes:
        """Where a video lies, or its content; raises `ReadError` where that cannot be read."""

    @abstractmethod
    def name(self, video: str) -> str:
        """What messages call a video: where it lies."""

    def text(self, video: str, ending: str) -> bytes | None:
        """Content of the file with another ending that lies beside a video."""
        return None


class LooseVideos(PackedVideos):
    """Videos that are files of their own; `files` are their names in the folder `tree`."""

    def __init__(self, tree: FileTree, files: Sequence[str]) -> None:
        self.tree = tree
        self._files = {_id(file): file for file in files}

    @property
    def packs(self) -> dict[str, Collection[str]]:
        """All under one name, the empty one."""
        return {"": self._files.keys()}

    def open(self, video: str) -> str:
        """Where a video lies."""
        return self.name(video)

    def name(self, video: str) -> str:
        """Where a video lies."""
        return self.tree.location(self._files[video])


class TarVideos(PackedVideos):
    """
    Videos in uncompressed tar files, in the manner of WebDataset: files with the same name up to the first dot belong
    together.

    Args:
        tree (`FileTree`): Where the tar files lie.
        tars (`Sequence[str]`): Their names. Their headers are read now.
        max_bytes (`int`): Size above which a video is not read.
    """

    def __init__(self, tree: FileTree, tars: Sequence[str], max_bytes: int) -> None:
        self.tree, self.max_bytes = tree, max_bytes
        self._videos: dict[str, tuple[str, TarMember]] = {}
        self._texts: dict[tuple[str, str], tuple[str, TarMember]] = {}
        self._packs: dict[str, list[str]] = {}
        for tar in tars:
            members, fault = tar_members(tree, tar)
            if fault is not None:
                self.warnings = (*self.warnings, f"{fault}; the {len(members)} files before are read.")
            self._packs[tar] = []
            for member in members:
                self._add(tar, member)

    def _add(self, tar: str, member: TarMember) -> None:
        video = _id(member.name)
        if not has_ending(member.name, VIDEO_ENDINGS):
            self._texts[video, member.name.rpartition(".")[2].lower()] = (tar, member)
        elif video in self._videos:
            self.warnings = (*self.warnings, f"{self.tree.location(tar)}: {member.name!r} comes a second time.")
        else:
            self._videos[video] = (tar, member)
            self._packs[tar].append(video)

    @property
    def packs(self) -> dict[str, Collection[str]]:
        """Per tar file."""
        return {**self._packs}

    def open(self, video: str) -> bytes:
        """Content of a video."""
        tar, member = self._videos[video]
        if member.size > self.max_bytes:
            raise ReadError(
                f"{self.tree.location(tar)}: {member.name!r} has {member.size} bytes, more than {self.max_bytes}."
            )
        return read_member(self.tree, tar, member)

    def name(self, video: str) -> str:
        """The tar file, and the name in it."""
        tar, member = self._videos[video]
        return f"{member.name} in {self.tree.location(tar)}"

    def text(self, video: str, ending: str) -> bytes | None:
        """Content of the file beside a video."""
        if (video, ending) not in self._texts:
            return None
        tar, member = self._texts[video, ending]
        return read_member(self.tree, tar, member) if member.size <= self.max_bytes else None


class SplitArchive(PackedVideos):
    """
    Videos in one (compressed) tar file that was split into parts. It is read from its start to its end, in its order.

    Args:
        tree (`FileTree`): Where the parts lie.
        parts (`Sequence[str]`): Their names, in order.
        max_bytes (`int`): Size above which a video is not read.
    """

    def __init__(self, tree: FileTree, parts: Sequence[str], max_bytes: int) -> None:
        self.tree, self.parts, self.max_bytes = tree, tuple(parts), max_bytes

    @property
    def packs(self) -> None:
        """Not known before all of it was read."""
        return None

    def open(self, video: str) -> bytes:
        """Reads up to one video. To read many, use `stream`."""
        for found, content in self.stream():
            if found == video and content is not None:
                return content
        raise ReadError(f"{self.tree.location(self.parts[0])} and its further parts have no video {video!r} to read.")

    def name(self, video: str) -> str:
        """The first part, and the id."""
        return f"video {video} in {self.tree.location(self.parts[0])}"

    def stream(self) -> Iterator[tuple[str, bytes | None]]:
        """Ids and contents, None for a content that is too large; raises `ReadError` where the archive is damaged."""
        for name, content in stream_members(self.tree, self.parts, self.max_bytes):
            if has_ending(name, VIDEO_ENDINGS):
                yield _id(name), content


def _id(file: str) -> str:
    return file.rpartition("/")[2].partition(".")[0]


__all__ = ["LooseVideos", "PackedVideos", "SplitArchive", "TarVideos"]
