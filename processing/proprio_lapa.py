"""Proprioception as text: a robot's own state in two digits per dimension, written into the prompt."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Levels of a dimension: two digits each, so that a state always takes the same number of tokens.
NUM_LEVELS = 100
# Shares of the data at the ends of the range; what lies outside goes to the end levels.
RANGE_QUANTILES = (0.01, 0.99)


@dataclass(frozen=True)
class ProprioTokenizer:
    r"""
    Writes a proprioceptive state as text, one number from 00 to 99 per dimension.

    ```python
    >>> ProprioTokenizer((0.0, -1.0), (1.0, 1.0)).encode([0.5, 1.0])
    '50 99'
    ```

    Args:
        low, high (`tuple[float, ...]`): Range of each dimension in physical units, spread evenly over the levels. A
            dimension whose ends are equal is constant and always 00.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        low, high = (tuple(float(value) for value in values) for values in (self.low, self.high))
        if not low or len(low) != len(high):
            raise ValueError(f"`low` ({len(low)}) and `high` ({len(high)}) must be equally many, and at least one.")
        for dimension, ends in enumerate(zip(low, high)):
            if not all(map(math.isfinite, ends)) or ends[0] > ends[1]:
                raise ValueError(f"the proprio range of dimension {dimension} must be finite and rise, got {ends}.")
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)

    @property
    def proprio_dim(self) -> int:
        """Number of dimensions."""
        return len(self.low)

    @classmethod
    def fit(cls, proprio: ArrayLike) -> "ProprioTokenizer":
        """
        Takes the range from data: the 1% and 99% quantiles of each dimension.

        Args:
            proprio: (num_steps, proprio_dim), physical units.

        Raises:
            ValueError: Another shape, or a value that is not finite (named by its position).
        """
        values = np.asarray(proprio, dtype=np.float64)
        if values.ndim != 2 or values.size == 0:
            raise ValueError(f"`proprio` must be a non-empty (num_steps, proprio_dim), got shape {values.shape}.")
        _check_finite(values)
        low, high = np.quantile(values, RANGE_QUANTILES, axis=0)
        return cls(tuple(low.tolist()), tuple(high.tolist()))

    def levels(self, proprio: ArrayLike) -> NDArray[np.int64]:
        """
        Levels of states.

        Args:
            proprio: (..., proprio_dim), physical units.

        Returns:
            (..., proprio_dim) int64 in [0, 99].

        Raises:
            ValueError: Another last dimension, or a value that is not finite.
        """
        values = np.asarray(proprio, dtype=np.float64)
        if values.ndim < 1 or values.shape[-1] != self.proprio_dim:
            raise ValueError(f"`proprio` must have shape (..., {self.proprio_dim}), got {values.shape}.")
        _check_finite(values)
        low, high = np.asarray(self.low), np.asarray(self.high)
        share = (values - low) / np.where(high > low, high - low, 1.0)
        # Half a level is rounded down or up as numpy does, to even; the ends are clipped.
        levels = np.clip(np.rint(share * (NUM_LEVELS - 1)), 0, NUM_LEVELS - 1).astype(np.int64)
        return np.where(high > low, levels, 0)

    def encode(self, proprio: ArrayLike) -> str:
        """Text of one state (proprio_dim,): two digits per dimension, separated by spaces."""
        levels = self.levels(proprio)
        if levels.ndim != 1:
            raise ValueError(f"`proprio` must be one state of shape ({self.proprio_dim},), got {levels.shape}.")
        return " ".join(f"{level:02d}" for level in levels)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return {"low": list(self.low), "high": list(self.high)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ProprioTokenizer":
        """Inverse of `to_dict`."""
        if not isinstance(values, dict) or set(values) != {"low", "high"}:
            raise ValueError(f"proprio statistics must be {{'low': [...], 'high': [...]}}, got {str(values)[:80]}.")
        return cls(tuple(values["low"]), tuple(values["high"]))


def _check_finite(values: NDArray[np.float64]) -> None:
    if not np.isfinite(values).all():
        position = tuple(int(index) for index in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(f"`proprio` must be finite, but at position {position} it is {values[position]}.")


__all__ = ["ProprioTokenizer"]
