"""Named rules that leave pairs of frames out."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Filters look at the frame averaged down to this many pixels a side: codec noise and size then hardly matter.
THUMBNAIL_SIZE = 32
# Levels per channel of the colour histogram, 64 colours in all: few enough that changing light moves little between them.
HISTOGRAM_LEVELS = 4


class FrameSummary:
    """
    What the filters look at, computed once per frame.

    Args:
        frame: (height, width, 3) uint8 RGB.
    """

    def __init__(self, frame: NDArray[np.uint8]) -> None:
        self._frame = frame

    @cached_property
    def thumbnail(self) -> NDArray[np.int16]:
        """(32, 32, 3) int16 in [0, 255]: the frame, averaged."""
        image = Image.fromarray(self._frame).resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
        return np.asarray(image).astype(np.int16)

    @cached_property
    def histogram(self) -> NDArray[np.float64]:
        """(64,) float64, shares of 4 x 4 x 4 colours in the thumbnail; they sum to 1."""
        levels = self.thumbnail * HISTOGRAM_LEVELS // 256
        colours = (levels @ np.array([HISTOGRAM_LEVELS**2, HISTOGRAM_LEVELS, 1])).ravel()
        counts = np.bincount(colours, minlength=HISTOGRAM_LEVELS**3)
        shares: NDArray[np.float64] = counts / colours.size
        return shares

    @cached_property
    def spread(self) -> float:
        """Largest difference between two pixels of the thumbnail in one channel, in [0, 1]."""
        return float(np.ptp(self.thumbnail, axis=(0, 1)).max()) / 255


class PairFilter(ABC):
    """A rule that leaves pairs out. A subclass is a frozen dataclass: two that compare equal do the same."""

    name: ClassVar[str]

    @abstractmethod
    def drops(self, first: FrameSummary, second: FrameSummary) -> bool:
        """Whether the pair is left out."""

    def _check_share(self, argument: str) -> None:
        value = getattr(self, argument)
        if not 0 <= value <= 1:
            raise ValueError(f"`{argument}` of {type(self).__name__} must lie in [0, 1], got {value!r}.")


@dataclass(frozen=True)
class StaticPairs(PairFilter):
    """
    Leaves out pairs in which nothing moves.

    Args:
        min_change: Least mean absolute difference of the two thumbnails, in [0, 1]; the default is one level of 255.
            Pairs of the Bridge shard lie above 0.0078.
    """

    name: ClassVar[str] = "static"
    min_change: float = 1 / 255

    def __post_init__(self) -> None:
        self._check_share("min_change")

    def drops(self, first: FrameSummary, second: FrameSummary) -> bool:
        """Whether the mean absolute difference lies below `min_change`."""
        return float(np.abs(first.thumbnail - second.thumbnail).mean()) / 255 < self.min_change


@dataclass(frozen=True)
class ShotCuts(PairFilter):
    """
    Leaves out pairs between which the scene changes.

    Args:
        max_distance: Largest distance of the two colour histograms, in [0, 1]: half the sum of absolute differences,
            which is the share of pixels that would have to change colour. Moving hands and cameras stay below 0.34
            in real pairs, frames of different scenes lie at 0.57 to 0.68.
    """

    name: ClassVar[str] = "shot_cut"
    max_distance: float = 0.45

    def __post_init__(self) -> None:
        self._check_share("max_distance")

    def drops(self, first: FrameSummary, second: FrameSummary) -> bool:
        """Whether the histograms lie further apart than `max_distance`."""
        return float(np.abs(first.histogram - second.histogram).sum()) / 2 > self.max_distance


@dataclass(frozen=True)
class BlankFrames(PairFilter):
    """
    Leaves out pairs of which a frame shows one colour only: black lead-ins, a camera that was off.

    Args:
        min_spread: Least difference between the lightest and the darkest pixel of a thumbnail, in [0, 1], in whichever
            channel it is largest.
    """

    name: ClassVar[str] = "blank"
    min_spread: float = 8 / 255

    def __post_init__(self) -> None:
        self._check_share("min_spread")

    def drops(self, first: FrameSummary, second: FrameSummary) -> bool:
        """Whether either frame has less spread than `min_spread`."""
        return min(first.spread, second.spread) < self.min_spread


def check_filters(filters: Sequence[PairFilter]) -> tuple[PairFilter, ...]:
    """Filters as a tuple; refuses what is none, and two of one name, whose counts could not be told apart."""
    for item in filters:
        if not isinstance(item, PairFilter):
            raise ValueError(f"`filters` must hold PairFilter objects, got {item!r}.")
    names = [item.name for item in filters]
    if len(set(names)) < len(names):
        raise ValueError(f"`filters` must have different names, got {', '.join(names)}.")
    return tuple(filters)


def dropped_by(filters: Iterable[PairFilter], first: FrameSummary, second: FrameSummary) -> str | None:
    """Name of the first filter that leaves a pair out, None where all keep it."""
    return next((item.name for item in filters if item.drops(first, second)), None)


__all__ = [
    "BlankFrames",
    "FrameSummary",
    "PairFilter",
    "ShotCuts",
    "StaticPairs",
    "check_filters",
    "dropped_by",
]
