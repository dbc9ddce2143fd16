"""Statistics of actions that do not fit memory: one pass, mergeable, quantiles exact or within a stated bound."""

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lapa.data.atomic_files import atomic_file
from lapa.data.episode_source import EpisodeSource, SkippedEpisodes, read_or_skip
from lapa.data.schema import ReadError
from lapa.processing.action_tokenization_lapa import ActionTokenizer, edge_probabilities

# Distinct values of a dimension that are kept as they are.
MAX_VALUES = 1 << 20
# Bits of the significand of a float32 that are kept beyond that, the leading one not counted, and those that are cut.
KEPT_BITS = 12
CUT_BITS = 23 - KEPT_BITS
# Bound on the error of a quantile then, relative to it: what is cut from a number is less than its last kept bit.
VALUE_ERROR = 2.0**-KEPT_BITS
# Rows that are collected before they are counted.
PENDING_ROWS = 1 << 18
FORMAT_VERSION = 1


def _to_keys(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Bit patterns of float32 in an order that is that of the numbers."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0 becomes 0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _to_values(keys: NDArray[np.uint32]) -> NDArray[np.float64]:
    bits = np.where(keys >> 31, keys & np.uint32((1 << 31) - 1), ~keys)
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def _cut(keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Keys of the numbers cut to the kept bits, towards zero: what has no more bits stays as it is."""
    mask = np.uint32((1 << CUT_BITS) - 1)
    # The pattern of a negative number is turned over in its key.
    return np.where(keys >> 31, keys & ~mask, keys | mask)


class _Column:
    """
    Values of one dimension and how often each occurs: sorted keys and counts.

    Beyond `max_values` distinct ones all are cut to the kept bits, for good. That depends on the values alone, so that
    the order in which they come and are merged makes no difference.
    """

    def __init__(self, max_values: int) -> None:
        self.max_values = max_values
        self.keys = np.empty(0, dtype=np.uint32)
        self.counts = np.empty(0, dtype=np.int64)
        self.is_exact = True

    def add(self, keys: NDArray[np.uint32], counts: NDArray[np.int64], is_exact: bool = True) -> None:
        self.is_exact &= is_exact
        self._merge(np.concatenate([self.keys, keys]), np.concatenate([self.counts, counts]))
        if self.is_exact and len(self.keys) > self.max_values:
            self.is_exact = False
            self._merge(self.keys, self.counts)

    def _merge(self, keys: NDArray[np.uint32], counts: NDArray[np.int64]) -> None:
        self.keys, place = np.unique(keys if self.is_exact else _cut(keys), return_inverse=True)
        self.counts = np.zeros(len(self.keys), dtype=np.int64)
        np.add.at(self.counts, place, counts)

    def quantiles(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """`np.quantile` of the values, its arithmetic included."""
        ends = np.cumsum(self.counts)
        values = _to_values(self.keys)
        position = probabilities * (ends[-1] - 1)
        before = np.floor(position)
        share = position - before
        low, high = (
            values[np.searchsorted(ends, np.minimum(step, ends[-1] - 1), side="right")]
            for step in (before, before + 1)
        )
        result: NDArray[np.float64] = np.where(
            share < 0.5, low + (high - low) * share, high - (high - low) * (1 - share)
        )
        return result


class ActionStatistics:
    r"""
    Count, range, moments and quantiles of actions, dimension by dimension, in one pass over them.

    ```python
    >>> statistics = ActionStatistics(7)
    >>> for episode in source:
    ...     statistics.update(episode.action)
    >>> statistics.tokenizer(num_bins=256)  # the bins of `ActionTokenizer.fit` of all of them
    ```

    **Exactness.** Quantiles are those of `np.quantile` over all values, to the last bit, while a dimension has no more
    than `max_values` distinct ones (a gripper that is 0 or 1 always). Beyond that the values are cut towards zero to 12
    bits after the leading one: a quantile is then off by less than 2^-12 of itself (of the larger of the two values
    between which it lies, and by less than 2^-138 where these are subnormal), and numbers of so few bits, 0 and 1 and
    small whole numbers, are still exact. Count, minimum and maximum always are; mean and standard deviation are
    computed in float64.

    **Memory.** 12 bytes per distinct value: at most 12 MB per dimension with the default, and 24 MB once they are cut.

    Args:
        action_dim: Dimensions, at least 1.
        max_values: Distinct values of a dimension that are kept as they are, at least 1.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, action_dim: int, max_values: int = MAX_VALUES) -> None:
        if action_dim < 1:
            raise ValueError(f"`action_dim` must be at least 1, got {action_dim}.")
        if max_values < 1:
            raise ValueError(f"`max_values` must be at least 1, got {max_values}.")
        self.max_values = max_values
        self.count = 0
        self.minimum, self.maximum = np.full(action_dim, np.inf), np.full(action_dim, -np.inf)
        self._mean, self._squares = np.zeros(action_dim), np.zeros(action_dim)
        self._columns = [_Column(max_values) for _ in range(action_dim)]
        self._pending: list[NDArray[np.float32]] = []

    @property
    def action_dim(self) -> int:
        """Number of dimensions."""
        return len(self._columns)

    def update(self, actions: ArrayLike) -> None:
        """
        Adds steps.

        Args:
            actions: (num_steps, action_dim) float32, or anything that is the same in float32.

        Raises:
            ValueError: Another shape, or a value that is not finite in float32 (named by its position).
        """
        with np.errstate(over="ignore"):
            values = np.array(actions, dtype=np.float32)
        if values.ndim != 2 or values.shape[1] != self.action_dim:
            raise ValueError(f"`actions` must be (num_steps, {self.action_dim}), got shape {values.shape}.")
        check_finite(values)
        if not len(values):
            return
        self._pending.append(values)
        if sum(map(len, self._pending)) >= PENDING_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        values = np.concatenate(self._pending)
        self._pending = []
        for column, keys in zip(self._columns, _to_keys(values).T):
            column.add(*np.unique(keys, return_counts=True))
        exact = values.astype(np.float64)
        mean = exact.mean(0)
        self._add_moments(len(values), exact.min(0), exact.max(0), mean, ((exact - mean) ** 2).sum(0))

    def _add_moments(
        self,
        count: int,
        minimum: NDArray[np.float64],
        maximum: NDArray[np.float64],
        mean: NDArray[np.float64],
        squares: NDArray[np.float64],
    ) -> None:
        total, difference = self.count + count, mean - self._mean
        self._mean = self._mean + difference * (count / total)
        self._squares = self._squares + squares + difference**2 * (self.count * count / total)
        self.minimum, self.maximum = np.minimum(self.minimum, minimum), np.maximum(self.maximum, maximum)
        self.count = total

    def __add__(self, other: "ActionStatistics") -> "ActionStatistics":
        if (self.action_dim, self.max_values) != (other.action_dim, other.max_values):
            raise ValueError(
                f"statistics with `action_dim` {self.action_dim} and `max_values` {self.max_values} cannot be added to "
                f"those with {other.action_dim} and {other.max_values}."
            )
        result = ActionStatistics(self.action_dim, self.max_values)
        for part in (self, other):
            part._flush()
            if part.count:
                result._add_moments(part.count, part.minimum, part.maximum, part._mean, part._squares)
            for column, theirs in zip(result._columns, part._columns):
                column.add(theirs.keys, theirs.counts, theirs.is_exact)
        return result

    def _complete(self) -> None:
        self._flush()
        if not self.count:
            raise ValueError("statistics of no actions: none were added.")

    @property
    def num_steps(self) -> int:
        """Steps that were added."""
        return self.count + sum(map(len, self._pending))

    @property
    def mean(self) -> NDArray[np.float64]:
        """(action_dim,)."""
        self._complete()
        return self._mean

    @property
    def std(self) -> NDArray[np.float64]:
        """(action_dim,) standard deviation of the steps themselves, as `np.std` has it."""
        self._complete()
        return np.sqrt(self._squares / self.count)

    @property
    def is_exact(self) -> tuple[bool, ...]:
        """Per dimension whether its quantiles are exact; otherwise they are off by less than `VALUE_ERROR`."""
        self._flush()
        return tuple(column.is_exact for column in self._columns)

    def quantile(self, probabilities: ArrayLike) -> NDArray[np.float64]:
        """
        Quantiles, interpolated linearly as by `np.quantile`.

        Args:
            probabilities: (num_probabilities,) in [0, 1].

        Returns:
            (num_probabilities, action_dim) float64.

        Raises:
            ValueError: A probability outside [0, 1], or no actions.
        """
        self._complete()
        wanted = np.asarray(probabilities, dtype=np.float64)
        if wanted.ndim != 1 or not ((wanted >= 0) & (wanted <= 1)).all():
            raise ValueError(f"`probabilities` must be a list of numbers in [0, 1], got {probabilities!r}.")
        result = np.stack([column.quantiles(wanted) for column in self._columns], axis=1)
        # The ends are known exactly.
        result[wanted == 0], result[wanted == 1] = self.minimum, self.maximum
        return result

    def tokenizer(self, num_bins: int, gripper_dimension: str | int | None = "last") -> ActionTokenizer:
        """
        Bins that hold equally many actions, see `ActionTokenizer.fit`; its very bins where the quantiles are exact.

        Raises:
            ValueError: No actions, or a gripper outside [0, 1].
        """
        if not isinstance(num_bins, int) or num_bins < 1:
            raise ValueError(f"`num_bins` must be a whole number of at least 1, got {num_bins!r}.")
        quantiles = self.quantile(edge_probabilities(num_bins))
        return ActionTokenizer.from_quantiles(quantiles, self.minimum, self.maximum, gripper_dimension)

    def to_dict(self, probabilities: Sequence[float] = (0.01, 0.25, 0.5, 0.75, 0.99)) -> dict[str, Any]:
        """JSON-serialisable summary, for people: what cannot be added to (`save` keeps that)."""
        quantiles = {f"{p:g}": row.tolist() for p, row in zip(probabilities, self.quantile(probabilities))}
        values = {"min": self.minimum, "max": self.maximum, "mean": self.mean, "std": self.std}
        return {
            "num_steps": self.count,
            **{name: value.tolist() for name, value in values.items()},
            "quantiles": quantiles,
            "exact_quantiles": list(self.is_exact),
        }

    def save(self, path: str | Path) -> None:
        """Writes everything to an `.npz` file, which appears when it is complete."""
        self._flush()
        arrays = {
            "sizes": np.array([FORMAT_VERSION, self.count, self.max_values]),
            "moments": np.stack([self.minimum, self.maximum, self._mean, self._squares]),
            "exact": np.array(self.is_exact),
        }
        for number, column in enumerate(self._columns):
            arrays |= {f"keys_{number}": column.keys, f"counts_{number}": column.counts}
        with atomic_file(Path(path)) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> "ActionStatistics":
        """
        Reads what `save` wrote.

        Raises:
            ValueError: A file that is no such thing.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            version, count, max_values = (int(value) for value in arrays["sizes"])
            if version != FORMAT_VERSION:
                raise ValueError(f"it has version {version}, this code reads {FORMAT_VERSION}")
            result = cls(len(arrays["exact"]), max_values)
            result.count = count
            result.minimum, result.maximum, result._mean, result._squares = arrays["moments"]
            for number, (column, is_exact) in enumerate(zip(result._columns, arrays["exact"])):
                column.add(arrays[f"keys_{number}"], arrays[f"counts_{number}"], bool(is_exact))
                if int(column.counts.sum()) != count or column.keys.dtype != np.uint32:
                    raise ValueError("its counts do not fit")
        except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no action statistics: {error}.") from error
        return result


def check_finite(actions: NDArray[np.float32]) -> None:
    """Refuses actions (num_steps, action_dim) with a value that is not finite, named by its position."""
    if not np.isfinite(actions).all():
        step, dimension = np.argwhere(~np.isfinite(actions))[0].tolist()
        raise ValueError(
            f"`actions` must be finite in float32, but actions[{step}, {dimension}] is {actions[step, dimension]}."
        )


def episode_actions(action: NDArray[np.float32], episode: str) -> NDArray[np.float32]:
    """
    Actions of an episode as they are counted and trained on.

    Raises:
        ReadError: Not (num_steps, action_dim), or a value that is not finite.
    """
    if action.ndim != 2:
        raise ReadError(f"{episode}: actions must be (num_steps, action_dim), got shape {action.shape}.")
    try:
        check_finite(action)
    except ValueError as error:
        raise ReadError(f"{episode}: {error}") from error
    return action


class SourceStatistics(NamedTuple):
    """Statistics of a source: of its actions, and of the states of the robot where they are wanted."""

    action: ActionStatistics
    proprio: ActionStatistics | None = None

    def __add__(self, other: "SourceStatistics") -> "SourceStatistics":
        proprio = None if self.proprio is None or other.proprio is None else self.proprio + other.proprio
        return SourceStatistics(self.action + other.action, proprio)


def source_statistics(
    source: EpisodeSource,
    skipped: SkippedEpisodes | None = None,
    shards: Iterable[int] | None = None,
    *,
    camera: str | None = None,
    with_instruction: bool = True,
    with_proprio: bool = False,
    max_values: int = MAX_VALUES,
) -> SourceStatistics | None:
    """
    Statistics of the actions of a source, in one pass that decodes no frame.

    Args:
        source: Any.
        skipped: Counts episodes that cannot be read, and those whose actions are no finite numbers; None raises.
        shards: Which of its shards; all when None. Statistics of parts add up to those of the whole.
        camera: Only episodes count in which it recorded something; all when None.
        with_instruction: Whether only episodes with an instruction count, which are what a policy is trained on.
        with_proprio: Whether the state of the robot is counted, too; episodes without then do not count.
        max_values: See `ActionStatistics`.

    Returns:
        The statistics; None where no episode counts.

    Raises:
        ValueError: Episodes of different numbers of dimensions.
        ReadError: What cannot be read, see `skipped`.
    """
    found: SourceStatistics | None = None
    for shard in range(len(source.shards)) if shards is None else shards:
        for _, episode in read_or_skip(source, shard, skipped):
            wanted = [episode.action, episode.proprio] if with_proprio else [episode.action]
            lacks_words = with_instruction and not episode.instructions
            if lacks_words or any(v is None for v in wanted) or (camera is not None and camera not in episode.frames):
                if skipped is not None:
                    skipped.seen()
                continue
            name = f"episode {episode.episode_id!r} of {episode.source}"
            try:
                rows = [episode_actions(values, name) for values in wanted if values is not None]
            except ReadError as error:
                if skipped is None:
                    raise
                skipped(error)
                continue
            if skipped is not None:
                skipped.seen()
            if found is None:
                found = SourceStatistics(*(ActionStatistics(values.shape[1], max_values) for values in rows))
            for values, statistics in zip(rows, found):
                assert statistics is not None
                if values.shape[1] != statistics.action_dim:
                    raise ValueError(
                        f"{name} has {values.shape[1]} numbers per step, those before it have {statistics.action_dim}."
                    )
                statistics.update(values)
    return found


__all__ = [
    "CUT_BITS",
    "KEPT_BITS",
    "MAX_VALUES",
    "VALUE_ERROR",
    "ActionStatistics",
    "SourceStatistics",
    "check_finite",
    "episode_actions",
    "source_statistics",
]
