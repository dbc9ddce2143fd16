"""Which frames a video has and when, from its packets, without decoding them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lapa.data.av1_references import Av1References, UnfollowedError
from lapa.data.schema import ReadError

if TYPE_CHECKING:
    from av.packet import Packet

    from lapa.data.video_stream import OpenVideo

# Times further apart than this have no exact difference in 64 bits.
MAX_TIME = 1 << 62
# Packets among which the first frame to be shown is; H.264 and HEVC delay a frame by 16 at most.
REORDER_PACKETS = 32


@dataclass(frozen=True)
class VideoIndex:
    """
    Packets of a video stream (or of a range of it) in the order of the file, and the frames among them.

    Args:
        pts (`NDArray`): (num_packets,) int64 presentation times in units of the stream.
        keyframes (`NDArray`): (num_keyframes,) int64 positions among the packets, rising.
        frames (`NDArray`): (num_frames,) int64 positions among the packets, in order of presentation. When `counted`:
            numbers among all decoded frames.
        times (`NDArray`): (num_frames,) float64 seconds from the first of `frames`.
        sources (`tuple`, *optional*): Per packet the positions of those that it is decoded from, where that is known: then
            no others need to be decoded. None where it is not, and all from the keyframe on do.
        counted (`bool`): Whether the container has no presentation times to go by. Frames were then counted by decoding
            them all, times come from the average rate, and reading decodes from the start.
        offset (`float`): Seconds from the first frame of the file to the first of `frames`.
    """

    pts: NDArray[np.int64]
    keyframes: NDArray[np.int64]
    frames: NDArray[np.int64]
    times: NDArray[np.float64]
    sources: tuple[tuple[int, ...], ...] | None = None
    counted: bool = False
    offset: float = 0.0

    def keyframe_before(self, position: int) -> int:
        """Index into `keyframes` of the one to decode from: before in the file, and not later in presentation."""
        index = int(np.searchsorted(self.keyframes, position, side="right")) - 1
        # Leading pictures of an open GOP follow a keyframe in the file, precede it in time and need the GOP before it.
        while index > 0 and self.pts[self.keyframes[index]] > self.pts[position]:
            index -= 1
        return index

    def needed(self, positions: Sequence[int]) -> set[int] | None:
        """Positions of all packets that some are decoded from, themselves included; None where that is not known."""
        if self.sources is None:
            return None
        needed: set[int] = set()
        open_ends = list(positions)
        while open_ends:
            position = open_ends.pop()
            if position not in needed:
                needed.add(position)
                open_ends += self.sources[position]
        return needed

    def runs(self, positions: Sequence[int]) -> list[list[int]]:
        """Splits rising positions where it is better to seek to the next keyframe than to decode on."""
        runs: list[list[int]] = []
        for position in positions:
            if runs and self.keyframes[self.keyframe_before(position)] <= runs[-1][-1] + 1:
                runs[-1].append(position)
            else:
                runs.append([position])
        return runs


def make_index(video: "OpenVideo", start: float = 0.0, stop: float | None = None) -> VideoIndex:
    """
    Lists the frames of a video, or of a time range of it, from its packets.

    Args:
        video: Just opened.
        start, stop: Seconds after the first frame of the file; its end when None. Half a frame interval of tolerance.

    Raises:
        ReadError: A packet that is cut off, no keyframe, or times that make no sense.
    """
    packets = video.packets()
    if start == 0 and stop is None:
        return _index(video, packets) or _counted_index(video, start, stop)
    head: list[Packet[Any]] = []
    shown = 0
    # After an edit list's start there may be many packets that only serve to decode the first frame.
    for packet in packets:
        head.append(packet)
        shown += video.is_shown(packet)
        if shown >= REORDER_PACKETS:
            break
    origin = min((packet.pts for packet in head if packet.pts is not None and video.is_shown(packet)), default=None)
    if origin is None:
        return _counted_index(video, start, stop)
    tolerance = (video.frame_interval or Fraction(0)) / 2
    low = origin + ceil((Fraction(start) - tolerance) / video.time_base)
    high = None if stop is None else origin + ceil((Fraction(stop) - tolerance) / video.time_base)
    if low > max(packet.pts for packet in head if packet.pts is not None) and video.seek(low):
        index = _index(video, video.packets(), low, high, origin)
        if index is not None and index.pts[0] <= low:
            return index
        video.rewind()
        head, packets = [], video.packets()
    return _index(video, chain(head, packets), low, high, origin) or _counted_index(video, start, stop)


def _index(
    video: "OpenVideo",
    packets: Iterable["Packet[Any]"],
    low: int | None = None,
    high: int | None = None,
    origin: int | None = None,
) -> VideoIndex | None:
    """
    Index of the frames in [low, high) in units of the stream; None where the times cannot be gone by. `origin` is the time
    of the first frame of the file, that of the index when None.
    """
    times: list[int] = []
    keyframes: list[int] = []
    shown: list[bool] = []
    sources: list[tuple[int, ...]] = []
    references = Av1References(video.extradata) if video.codec == "av1" else None
    for packet in packets:
        if not keyframes and not packet.is_keyframe:
            continue  # nothing to decode it from
        if packet.pts is None:
            return None
        if packet.is_corrupt:
            raise ReadError(f"{video.name}: the frame at {float(packet.pts * video.time_base):.3f} s is cut off.")
        if packet.is_keyframe:
            keyframes.append(len(times))
        if references is not None:
            try:
                sources.append(references.add(len(times), memoryview(packet)))
            except UnfollowedError:
                references = None
        times.append(packet.pts)
        shown.append(video.is_shown(packet))
        # What comes later in the file is decoded later, and nothing is shown before it is decoded.
        if high is not None and packet.dts is not None and packet.dts >= high:
            break
    if not keyframes:
        raise ReadError(f"{video.name} has no keyframe to decode from.")
    if max(times) - min(times) > MAX_TIME:
        raise ReadError(f"{video.name} has times that are {max(times) - min(times)} units apart.")
    pts = np.array(times, np.int64)
    if len(np.unique(pts[shown])) < sum(shown) or not video.trusts_times:
        return None
    kept = np.array(shown) & (pts >= (pts[0] if low is None else max(low, times[0])))
    if high is not None:
        kept &= pts < high
    positions = np.flatnonzero(kept)
    frames = positions[np.argsort(pts[positions])]
    seconds = (pts[frames] - pts[frames[:1]]).astype(np.float64) * float(video.time_base)
    offset = 0.0 if origin is None or not len(frames) else float((int(pts[frames[0]]) - origin) * video.time_base)
    followed = tuple(sources) if references is not None else None
    return VideoIndex(pts, np.array(keyframes, np.int64), frames, seconds, sources=followed, offset=offset)


def _counted_index(video: "OpenVideo", start: float, stop: float | None) -> VideoIndex:
    """Index of a video without usable times: all frames, counted by decoding them."""
    interval = video.frame_interval
    if interval is None:
        raise ReadError(f"{video.name} has neither times nor a frame rate.")
    count = sum(1 for _ in video.decode_all())
    times = np.arange(count) * float(interval)
    kept = times >= start - float(interval) / 2
    if stop is not None:
        kept &= times < stop - float(interval) / 2
    frames = np.flatnonzero(kept)
    nothing = np.zeros(0, np.int64)
    offset = float(times[frames[0]]) if len(frames) else 0.0
    return VideoIndex(nothing, nothing, frames, times[frames] - times[frames[:1]], counted=True, offset=offset)


__all__ = ["REORDER_PACKETS", "VideoIndex", "make_index"]
