"""What `lapa inspect` adds up over episodes, from headers and numbers; no frame is decoded."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.data.frame_formats import FormatReader, FrameFormat
from lapa.data.frame_pairs import FrameGap, open_pairs
from lapa.data.lerobot_format import StepFrames
from lapa.data.number_summary import NumberSummary
from lapa.data.read_counts import BLANK_CAMERA, GAP_BIN_SECONDS, UNREADABLE, PairCounts
from lapa.data.schema import Episode, ReadError

# Most common instructions, rates, and names of episodes that are listed; the rest is only counted.
MAX_LISTED = 5
# A step that is off the usual interval by more than this share of it makes a clip one of variable frame rate. Stored
# times are rounded to milliseconds, so that much never counts.
VARIABLE_SHARE, ROUNDING_SECONDS = 0.2, 0.0021


class Reasons:
    """Why episodes are skipped: how many by each reason, the first few by name, and the messages where there are any."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Counts one episode, or `count` that are lost for the same reason."""
        self.counts[reason] += count
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_LISTED:
            examples.append(example)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return {
            reason: {"episodes": count, "examples": self.examples[reason]}
            for reason, count in sorted(self.counts.items())
        }


class CameraTotals:
    """Of one camera: episodes in which it recorded, and how its frames are stored."""

    def __init__(self) -> None:
        self.num_episodes = 0
        self.formats: Counter[FrameFormat | None] = Counter()

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        formats = [
            {**entry._asdict(), "episodes": count} for entry, count in self.formats.most_common() if entry is not None
        ]
        return {"episodes": self.num_episodes, "formats": formats}


class EpisodeTotals:
    """
    Sums over the episodes of a source.

    Args:
        cameras: Of the source; all that an episode may have.
        camera: Whose pairs are counted.
        gap: Between the frames of a pair.
    """

    def __init__(self, cameras: Sequence[str], camera: str, gap: FrameGap) -> None:
        self.camera, self.gap = camera, gap
        self.cameras = {name: CameraTotals() for name in cameras}
        self.num_episodes = 0
        self.lengths: list[int] = []
        self.seconds, self.num_without_times, self.num_variable = 0.0, 0, 0
        self.rates: Counter[float] = Counter()
        self.instructions: Counter[str] = Counter()
        self.num_without_instruction, self.num_with_several = 0, 0
        self.numbers: dict[str, NumberSummary] = {}
        self.num_without_numbers: Counter[str] = Counter()
        self.num_other_dim: Counter[str] = Counter()
        self.embodiments: Counter[str | None] = Counter()
        self.skipped, self.other_cameras = Reasons(), Reasons()
        self.pairs = PairCounts()
        self.no_pairs: str | None = None
        self._formats = FormatReader()

    def add(self, episode: Episode) -> NDArray[np.int64]:
        """
        Adds an episode.

        Returns:
            (num_pairs, 2) steps of its pairs.

        Raises:
            ReadError: Its chosen camera or its times cannot be read. Then nothing was added.
        """
        formats = {name: self._format(episode, name) for name in episode.frames}
        steps, counts = self._count_pairs(episode)
        for reason in counts.skipped_groups:
            self.skipped.add(reason, episode.episode_id)
        self.pairs += counts
        for name, entry in formats.items():
            camera = self.cameras.setdefault(name, CameraTotals())
            camera.num_episodes += 1
            camera.formats[entry] += 1
        self.num_episodes += 1
        self.lengths.append(episode.num_steps)
        self.embodiments[episode.embodiment] += 1
        self._add_times(episode.timestamps)
        self.instructions.update(episode.instructions)
        self.num_without_instruction += not episode.instructions
        self.num_with_several += len(episode.instructions) > 1
        self._add_numbers("action", episode.action, episode.action_names)
        self._add_numbers("proprio", episode.proprio, None)
        return steps

    def add_unreadable(self, error: ReadError, count: int = 1) -> None:
        """Counts an episode that a reader skips, or from some frame on, or `count` that are lost for the same reason."""
        self.skipped.add(UNREADABLE, str(error), count)

    def _format(self, episode: Episode, camera: str) -> FrameFormat | None:
        frames = episode.frames[camera]
        try:
            found = self._formats.read(frames)
            if isinstance(frames, StepFrames) and camera == self.camera:
                _ = frames.frames  # whether there is a frame for each step
        except ReadError as error:
            if camera == self.camera:
                raise
            self.other_cameras.add(camera, str(error))
            return None
        return found

    def _count_pairs(self, episode: Episode) -> tuple[NDArray[np.int64], PairCounts]:
        counts = PairCounts()
        if self.gap.seconds is not None and episode.timestamps is None and self.camera in episode.frames:
            self.no_pairs = (
                f"a gap of {self.gap.seconds:g} s needs the time between frames, which is not recorded here: give "
                "--frequency, or --frame-gap in frames"
            )
            return np.zeros((0, 2), dtype=np.int64), counts
        steps = open_pairs(episode, self.camera, self.gap, counts)
        counts.items = len(steps)
        gaps, numbers = np.unique(steps[:, 1] - steps[:, 0], return_counts=True)
        counts.gaps.frames.update(dict(zip(gaps.tolist(), numbers.tolist())))
        if episode.timestamps is not None and len(steps):
            seconds = episode.timestamps[steps[:, 1]] - episode.timestamps[steps[:, 0]]
            bins, numbers = np.unique(np.round(seconds / GAP_BIN_SECONDS).astype(np.int64), return_counts=True)
            counts.gaps.seconds.update(dict(zip(bins.tolist(), numbers.tolist())))
        return steps, counts

    def _add_times(self, times: NDArray[np.float64] | None) -> None:
        if times is None:
            self.num_without_times += 1
            return
        intervals = np.diff(times)
        intervals = intervals[intervals > 0]
        if not len(intervals):
            return
        usual = float(np.median(intervals))
        # The last frame is shown as long as the others.
        self.seconds += float(times[-1] - times[0]) + usual
        variable = bool((np.abs(intervals - usual) > max(VARIABLE_SHARE * usual, ROUNDING_SECONDS)).any())
        self.num_variable += variable
        # Rounded times have a rounded median; their mean is right.
        self.rates[round(1 / usual if variable else len(intervals) / float(times[-1] - times[0]), 2)] += 1

    def _add_numbers(self, kind: str, values: NDArray[np.float32] | None, names: Sequence[str] | None) -> None:
        if values is None:
            self.num_without_numbers[kind] += 1
            return
        summary = self.numbers.setdefault(kind, NumberSummary(names))
        self.num_other_dim[kind] += not summary.add(values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        lengths = np.array(self.lengths or [0])
        blank = {name: self.num_episodes - camera.num_episodes for name, camera in self.cameras.items()}
        return {
            "episodes_read": self.num_episodes,
            "frames": int(lengths.sum()),
            "frames_per_episode": {
                "min": int(lengths.min()),
                "median": float(np.median(lengths)),
                "max": int(lengths.max()),
            },
            "hours": None if not self.rates else self.seconds / 3600,
            "cameras": {
                name: {**camera.to_dict(), BLANK_CAMERA: blank[name]} for name, camera in self.cameras.items()
            },
            "unreadable_in_other_cameras": self.other_cameras.to_dict(),
            "frequency": {
                "hz": [{"hz": rate, "episodes": count} for rate, count in self.rates.most_common(MAX_LISTED)],
                "min": min(self.rates, default=None),
                "max": max(self.rates, default=None),
                "episodes_of_variable_rate": self.num_variable,
                "episodes_without_times": self.num_without_times,
            },
            "instructions": instruction_totals(self.instructions, self.num_without_instruction, self.num_with_several),
            **{kind: self._numbers_dict(kind) for kind in ("action", "proprio")},
            "embodiments": {str(name): count for name, count in self.embodiments.most_common()},
            "pairs": self._pairs_dict(),
        }

    def _numbers_dict(self, kind: str) -> dict[str, Any] | None:
        if kind not in self.numbers:
            return None
        return {
            **number_totals(self.numbers[kind]),
            "episodes_without": self.num_without_numbers[kind],
            "episodes_of_another_dim": self.num_other_dim[kind],
        }

    def _pairs_dict(self) -> dict[str, Any]:
        counts = self.pairs.to_dict()
        return {
            "camera": self.camera,
            "frame_gap": self.gap.frames,
            "frame_gap_seconds": self.gap.seconds,
            "count": None if self.no_pairs and not counts["items"] else counts["items"],
            "unknown_because": self.no_pairs,
            "mean_seconds": self.pairs.gaps.mean_seconds,
            "gap_frames": counts["gap_frames"],
            "gap_hundredths_of_a_second": counts["gap_seconds"],
            "skipped_episodes": self.skipped.to_dict(),
            "dropped": counts["dropped_items"],
        }


def instruction_totals(texts: Mapping[str, int], num_without: int, num_with_several: int) -> dict[str, Any]:
    """What is said of instructions: how many, how many distinct ones, the most common, and how many episodes lack one."""
    counts = Counter(texts)
    return {
        "count": counts.total(),
        "distinct": len(counts),
        "most_common": [{"text": text, "episodes": number} for text, number in counts.most_common(MAX_LISTED)],
        "episodes_without": num_without,
        "episodes_with_several": num_with_several,
    }


def number_totals(summary: NumberSummary) -> dict[str, Any]:
    """What is said of actions or proprioception."""
    return {
        "dim": summary.dim,
        "steps": summary.num_rows,
        "steps_not_finite": summary.num_not_finite,
        "quantiles_of_every": summary.stride,
        "dimensions": summary.to_list(),
    }


__all__ = ["MAX_LISTED", "EpisodeTotals", "Reasons", "instruction_totals", "number_totals"]
