"""Counts of what was read and of what was left out and why. They add up over workers, ranks and runs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

# Width of a bin of the gap histogram in seconds.
GAP_BIN_SECONDS = 0.01

# Reasons to skip an episode: it ends before the gap, the camera recorded nothing, it cannot be read.
TOO_SHORT, BLANK_CAMERA, UNREADABLE = "too_short", "blank_camera", "unreadable"
# Reason to leave steps out: nobody said what to do.
NO_INSTRUCTION = "no_instruction"
# Reason to drop a pair beside the filters' names: no frame lies near enough to where the gap ends.
NO_FRAME_AT_GAP = "no_frame_at_gap"


@dataclass
class ReadCounts:
    """
    What became of groups of items (episodes of pairs, row groups of steps). Adding two counts gives the joint count.

    Args:
        groups (`int`): Groups opened, and those that could not be.
        skipped_groups (`Counter[str]`): Groups that gave nothing to read, by reason.
        items (`int`): Items kept.
        dropped_items (`Counter[str]`): Items left out, by reason.
    """

    # What groups and items are called in a log.
    group_name: ClassVar[str] = "groups"
    item_name: ClassVar[str] = "items"

    groups: int = 0
    skipped_groups: Counter[str] = field(default_factory=Counter)
    items: int = 0
    dropped_items: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Self) -> Self:
        return type(self)(**{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)})

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return {
            "groups": self.groups,
            "skipped_groups": dict(self.skipped_groups),
            "items": self.items,
            "dropped_items": dict(self.dropped_items),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(
            int(values["groups"]),
            Counter(values["skipped_groups"]),
            int(values["items"]),
            Counter(values["dropped_items"]),
        )

    def metrics(self) -> dict[str, float]:
        """Numbers for a log, as `pairs`, `episodes`, `dropped_pairs/static`, `skipped_episodes/too_short`."""
        logs: dict[str, float] = {self.item_name: self.items, self.group_name: self.groups}
        for noun, reasons in ((self.item_name, self.dropped_items), (self.group_name, self.skipped_groups)):
            verb = "dropped" if reasons is self.dropped_items else "skipped"
            logs |= {f"{verb}_{noun}/{reason}": count for reason, count in sorted(reasons.items())}
        return logs


@dataclass
class GapHistogram:
    """
    How far apart the frames of pairs are.

    Args:
        frames (`Counter[int]`): Pairs per gap in frames.
        seconds (`Counter[int]`): Pairs per gap in hundredths of a second, where the time is known.
    """

    frames: Counter[int] = field(default_factory=Counter)
    seconds: Counter[int] = field(default_factory=Counter)

    def add(self, frame_gap: int, seconds: float | None) -> None:
        """Counts one pair."""
        self.frames[frame_gap] += 1
        if seconds is not None:
            self.seconds[round(seconds / GAP_BIN_SECONDS)] += 1

    def __add__(self, other: "GapHistogram") -> "GapHistogram":
        return GapHistogram(self.frames + other.frames, self.seconds + other.seconds)

    @property
    def mean_seconds(self) -> float | None:
        """Mean gap, each to half a hundredth of a second; None where no time is known."""
        total = self.seconds.total()
        return sum(gap * count for gap, count in self.seconds.items()) * GAP_BIN_SECONDS / total if total else None


class StepCounts(ReadCounts):
    """`ReadCounts` of episodes and their steps."""

    group_name: ClassVar[str] = "episodes"
    item_name: ClassVar[str] = "steps"


@dataclass
class PairCounts(ReadCounts):
    """
    `ReadCounts` of episodes and their pairs.

    Args:
        gaps (`GapHistogram`): Of the pairs kept.
    """

    group_name: ClassVar[str] = "episodes"
    item_name: ClassVar[str] = "pairs"

    gaps: GapHistogram = field(default_factory=GapHistogram)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, with `gap_frames` and `gap_seconds` (pairs per gap, in hundredths of a second)."""
        gaps = {"gap_frames": self.gaps.frames, "gap_seconds": self.gaps.seconds}
        return super().to_dict() | {name: {str(k): n for k, n in sorted(gap.items())} for name, gap in gaps.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        counts = super().from_dict(values)
        frames, seconds = (
            Counter({int(gap): int(count) for gap, count in values[name].items()})
            for name in ("gap_frames", "gap_seconds")
        )
        counts.gaps = GapHistogram(frames, seconds)
        return counts

    def metrics(self) -> dict[str, float]:
        """As in `ReadCounts`, with the mean gap in seconds."""
        mean = self.gaps.mean_seconds
        return super().metrics() | ({} if mean is None else {"gap_seconds_mean": mean})


__all__ = [
    "BLANK_CAMERA",
    "GAP_BIN_SECONDS",
    "NO_FRAME_AT_GAP",
    "NO_INSTRUCTION",
    "TOO_SHORT",
    "UNREADABLE",
    "GapHistogram",
    "PairCounts",
    "ReadCounts",
    "StepCounts",
]
