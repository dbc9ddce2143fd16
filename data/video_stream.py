"""
A video file opened with libav (PyAV): its packets, and decoding from the right keyframe.

What lies between the frames that are wanted is skipped where that cannot change them: by seeking to the last keyframe
before a frame, by leaving out frames that no other (for AV1: that none of the wanted) refers to, and by draining the
decoder instead of feeding it on.
"""

import errno
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from io import BytesIO
from itertools import islice
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self, cast

import numpy as np

from lapa.data.schema import ReadError
from lapa.data.video_container import check_container
from lapa.data.video_index import REORDER_PACKETS, VideoIndex

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# What a file may make us allocate: frames of 4096 x 4096 pixels, of which a decoder keeps up to 17 (0.4 GB at 8 bits),
# and an index of 19 hours at 60 Hz.
MAX_FRAME_PIXELS = 1 << 24
MAX_PACKETS = 1 << 22
# No format that names other files (playlists, concatenation scripts): a video must not make us open anything else.
CONTAINER_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
    "protocol_whitelist": "file",
}
CONTAINERS_READ = "it is not MP4, MOV, Matroska, WebM or AVI"


class _AstrayError(Exception):
    """After a seek the file does not continue as its index says."""


class _DamagedError(ReadError):
    """Frames at these positions are damaged, or decoded from one that is."""

    def __init__(self, message: str, positions: set[int]) -> None:
        super().__init__(message)
        self.positions = positions


class OpenVideo:
    """
    One video stream of a file, open for reading; a context manager.

    Args:
        file (`str` or `bytes`): Local path, fsspec URL, or the content of the file.
        name (`str`): What messages call it.
        stream (`int`, *optional*): Which of its video streams; the main one when None.
        thread_count (`int`): Threads that decode.
        checked (`bool`): Whether the file was opened before, and its headers need no check.

    Raises:
        ReadError: No such file, no video, a video that cannot be decoded here, or one larger than the limits.
    """

    def __init__(self, file: str | bytes, name: str, stream: int | None, thread_count: int, checked: bool) -> None:
        self.file, self.name, self.stream_number, self.thread_count = file, name, stream, thread_count
        self._checked = checked
        self._stack = ExitStack()
        self._connect()
        self._checked = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
        import av.error

        if isinstance(error, (av.error.FFmpegError, OSError)):
            raise ReadError(f"{self.name} cannot be read as video: {_reason(error)}.") from error

    def _connect(self) -> None:
        import av
        import av.error

        self._stack.close()
        self._at_start = True
        try:
            self._container = av.open(
                self._location(),
                "r",
                options={"max_pixels": str(MAX_FRAME_PIXELS)},
                container_options=CONTAINER_OPTIONS,
                metadata_errors="replace",
            )
            self._stack.callback(self._container.close)
            self._stream = self._pick_stream()
        except (av.error.FFmpegError, OSError, ValueError) as error:
            self._stack.close()
            if isinstance(error, ReadError):
                raise
            # What libav says of a format that it is not to open.
            reason = CONTAINERS_READ if getattr(error, "errno", None) == errno.EINVAL else _reason(error)
            raise ReadError(f"{self.name} cannot be read as video: {reason}.") from error
        self.codec: str = self._stream.codec_context.codec.canonical_name
        context = self._stream.codec_context
        context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        context.thread_count = self.thread_count
        if self.thread_count != 1:
            context.thread_type = "AUTO"
        self.extradata: bytes | None = context.extradata
        self._skips_unreferenced = _skips_unreferenced(self.codec, self.extradata)

    def _location(self) -> str | IO[bytes]:
        """What libav is given to open: the name of a local file, which it reads fastest, or a file object."""
        file: IO[bytes]
        if isinstance(self.file, bytes):
            file = BytesIO(self.file)
        elif is_url(self.file):
            from fsspec.core import url_to_fs

            # A file system that is dropped (a zip file's) closes what was opened in it.
            self._system, path = url_to_fs(self.file)
            file = self._stack.enter_context(self._system.open(path, "rb"))
        else:
            if not self._checked:
                with open(self.file, "rb") as content:
                    check_container(content, self.name)
            # With the protocol named, what looks like another one in a file's name stays a name.
            return f"file:{self.file}"
        if not self._checked:
            check_container(file, self.name)
            file.seek(0)
        return file

    def _pick_stream(self) -> "VideoStream":
        streams = self._container.streams.video
        if not streams:
            raise ReadError(f"{self.name} holds no video.")
        number = self.stream_number
        if number is None:
            stream = cast("VideoStream", self._container.streams.best("video") or streams[0])
        elif 0 <= number < len(streams):
            stream = streams[number]
        else:
            raise ReadError(f"{self.name} has {len(streams)} video streams; `stream` {number} is none of them.")
        context = stream.codec_context
        if context is None:  # PyAV's types do not say so
            raise ReadError(f"{self.name} is coded in a way that this PyAV cannot decode.")
        if context.width * context.height > MAX_FRAME_PIXELS:
            raise ReadError(
                f"{self.name} has frames of {context.width} x {context.height} pixels; "
                f"at most {MAX_FRAME_PIXELS} pixels are decoded."
            )
        return stream

    @property
    def time_base(self) -> Fraction:
        """Seconds per unit of presentation times."""
        if not self._stream.time_base:
            raise ReadError(f"{self.name} does not say what its times are in.")
        return self._stream.time_base

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of frames as the file announces them, before they are turned."""
        return self._stream.codec_context.height, self._stream.codec_context.width

    @property
    def frame_interval(self) -> Fraction | None:
        """Average seconds between frames, as the container tells or lets guess."""
        rate = self._stream.average_rate or self._stream.guessed_rate
        return 1 / rate if rate else None

    @property
    def trusts_times(self) -> bool:
        """Whether presentation times are the container's own. AVI has none, and with reordering they are a guess."""
        return "avi" not in self._container.format.name.split(",") or not self._stream.codec_context.has_b_frames

    def seek(self, pts: int) -> bool:
        """Goes to the keyframe at or before a presentation time, as well as the container can; False if it cannot."""
        import av.error

        self._at_start = False
        try:
            self._container.seek(pts, stream=self._stream)
        except av.error.FFmpegError:
            return False
        return True

    def rewind(self) -> None:
        """Opens the file again; the next packet is the first."""
        self._connect()

    def packets(self) -> Iterator["Packet[Any]"]:
        """Packets from here on; raises `ReadError` after `MAX_PACKETS`."""
        self._at_start = False
        for number, packet in enumerate(self._container.demux(self._stream)):
            if number >= MAX_PACKETS:
                raise ReadError(f"{self.name} has more than {MAX_PACKETS} frames, which is the most that are read.")
            if packet.size:  # the last, empty one only asks a decoder for what it still holds
                yield packet

    def is_shown(self, packet: "Packet[Any]") -> bool:
        """Whether a packet becomes a frame. One before an edit list's start, or an alternate reference, does not."""
        if self.codec == "vp8":
            return bool(memoryview(packet)[0] & 0x10) and not packet.is_discard  # show_frame, RFC 6386 section 9.1
        return not packet.is_discard

    def decode_all(self) -> Iterator["VideoFrame"]:
        """All frames, in the order in which the decoder gives them."""
        if not self._at_start:
            self.rewind()
        for packet in self.packets():
            yield from self._decode(packet)
        yield from self._decode(None)

    def decode(self, index: VideoIndex, positions: Sequence[int]) -> Iterator[tuple[int, "VideoFrame"]]:
        """
        Decodes some frames.

        Args:
            index: Of this video.
            positions: Which, as in `index.frames`, rising and distinct.

        Yields:
            Position and frame, in any order; of one position's, the last holds. What does not come is missing.

        Raises:
            ReadError: Damage in a frame that is wanted, or that one is decoded from.
        """
        if index.counted:
            yield from self._decode_counted(positions)
            return
        for run in index.runs(positions):
            missing = set(run)
            keyframe = index.keyframe_before(run[0])
            # Some files flag frames as keyframes from which not everything after them can be decoded.
            for start in (keyframe, *([keyframe - 1] if keyframe else []), None):
                fault: ReadError | None = None
                found = set()
                try:
                    for position, frame in self._decode_run(index, start, sorted(missing)):
                        found.add(position)
                        yield position, frame
                except _DamagedError as error:
                    fault, found = error, found - error.positions
                except ReadError as error:
                    fault = error
                missing -= found
                if not missing:
                    break
            if missing and fault is not None:
                raise ReadError(str(fault)) from fault

    def _decode_counted(self, positions: Sequence[int]) -> Iterator[tuple[int, "VideoFrame"]]:
        """Frames by their number among all."""
        numbers = set(positions)
        for number, frame in enumerate(islice(self.decode_all(), positions[-1] + 1)):
            if frame.is_corrupt:
                raise ReadError(f"{self.name}: frame {number} is damaged.")
            if number in numbers:
                yield number, frame

    def _decode_run(
        self, index: VideoIndex, start: int | None, positions: Sequence[int]
    ) -> Iterator[tuple[int, "VideoFrame"]]:
        """
        Frames decoded from keyframe number `start` on, or all from the first; then raises where one of them was damaged
        that they are decoded from, which comes out after them where it is shown after them.
        """
        wanted = {int(index.pts[position]): position for position in positions}
        frames = self.decode_all() if start is None else self._frames_from(index, start, positions)
        damaged: list[int] = []
        missing = len(wanted)
        left = REORDER_PACKETS
        for frame in frames:
            if frame.is_corrupt and frame.pts is not None:
                damaged += np.flatnonzero(index.pts == frame.pts).tolist()
            elif frame.pts in wanted:
                missing -= 1
                yield wanted[frame.pts], frame
            left -= not missing
            if not left:
                break
        for place in damaged:
            suspect = {p for p in positions if p >= place >= index.keyframes[index.keyframe_before(p)]}
            if suspect:
                time = float(index.pts[place] * self.time_base)
                raise _DamagedError(f"{self.name}: the frame at {time:.3f} s is damaged.", suspect)

    def _frames_from(self, index: VideoIndex, start: int, positions: Sequence[int]) -> Iterator["VideoFrame"]:
        """Frames decoded from keyframe number `start` on, those at `positions` among them."""
        context = self._stream.codec_context
        needed = index.needed(positions)
        for position, packet in self._packets_from(index, int(index.keyframes[start])):
            if needed is not None and position not in needed:
                continue
            if self._skips_unreferenced:
                context.skip_frame = "DEFAULT" if position in positions else "NONREF"
            yield from self._decode(packet)
            if position == positions[-1]:
                break
        # All that is wanted is in: a decoder that waits to put frames in order is drained, not fed on.
        yield from self._decode(None)

    def _decode(self, packet: "Packet[Any] | None") -> list["VideoFrame"]:
        import av.error

        try:
            return self._stream.codec_context.decode(packet)
        except av.error.EOFError:
            return []
        except av.error.FFmpegError as error:
            time = f"{float(packet.pts * self.time_base):.3f} s" if packet and packet.pts is not None else "the end"
            raise ReadError(f"{self.name}: the frame at {time} cannot be decoded: {_reason(error)}.") from error

    def _packets_from(self, index: VideoIndex, start: int) -> Iterator[tuple[int, "Packet[Any]"]]:
        """Packets from the keyframe at position `start` on, each with its position."""
        for packets in self._ways_to(index, start):
            try:
                yield from _aligned(packets, index, start)
                return
            except _AstrayError:
                continue
        raise ReadError(f"{self.name} cannot be read again as it was indexed.")

    def _ways_to(self, index: VideoIndex, start: int) -> Iterator[Iterator["Packet[Any]"]]:
        """Packets from some place before `start`, by ways that are slower and surer in turn."""
        if self._at_start and start == index.keyframes[0]:
            yield self.packets()
        rank = int(np.searchsorted(index.keyframes, start))
        for keyframe in dict.fromkeys((rank, max(rank - 1, 0))):
            if self.seek(int(index.pts[index.keyframes[keyframe]])):
                yield self.packets()
        self.rewind()
        yield self.packets()


def _aligned(packets: Iterator["Packet[Any]"], index: VideoIndex, start: int) -> Iterator[tuple[int, "Packet[Any]"]]:
    """Numbers packets by the index, from its keyframe `start` on; raises `_AstrayError` where they do not follow it."""
    first = int(index.pts[start])
    later = set(index.pts[index.keyframes[index.keyframes > start]].tolist())
    position = None
    for packet in packets:
        if position is None:
            if packet.is_keyframe and packet.pts in later:
                break
            if packet.is_keyframe and packet.pts == first:
                position = start
        if position is not None:
            if position == len(index.pts):
                return
            if packet.pts != index.pts[position]:
                raise _AstrayError
            yield position, packet
            position += 1
    if position is None:
        raise _AstrayError


def _skips_unreferenced(codec: str, extradata: bytes | None) -> bool:
    """
    Whether the decoder leaves out frames no other refers to, on request, with no trace in the others.

    H.264 marks them (nal_ref_idc 0). HEVC marks frames that others of the same temporal layer do not refer to, which is
    the same in a stream of one layer (ISO 14496-15 8.3.3.1.2: numTemporalLayers). A frame of VP9 always leaves state to
    the next; libdav1d takes the request only when it is opened, and `VideoIndex.sources` says more of AV1.
    """
    if codec == "hevc":
        return extradata is not None and len(extradata) > 21 and extradata[0] == 1 and extradata[21] >> 3 & 7 == 1
    return codec == "h264"


def is_url(path: str) -> bool:
    """Whether fsspec is to open it, and not the local file system."""
    return "://" in path or "::" in path


def _reason(error: Exception) -> str:
    """What libav or the system says, without the number and the path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


__all__ = ["MAX_FRAME_PIXELS", "OpenVideo", "is_url"]
