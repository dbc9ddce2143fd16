"""Ranges of many numbers per dimension, in bounded memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Rows that quantiles are taken from; when there are more, every second one is dropped and from then on left out.
MAX_ROWS = 1 << 18
QUANTILES = (0.01, 0.5, 0.99)


class NumberSummary:
    """
    Least, largest and quantiles of each dimension of vectors that come bit by bit.

    Least, largest and the constant dimensions are exact. Quantiles are exact up to `MAX_ROWS` rows, and those of every
    `stride`-th row beyond.

    Args:
        names (`Sequence[str]`, *optional*): Of the dimensions.
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self.names = None if names is None else tuple(names)
        self.num_rows, self.num_not_finite, self.stride = 0, 0, 1
        self._low: NDArray[np.float64] | None = None
        self._high: NDArray[np.float64] | None = None
        self._kept: list[NDArray[np.float32]] = []
        self._num_kept = 0

    @property
    def dim(self) -> int | None:
        """How many numbers a row has; None before the first."""
        return None if self._low is None else len(self._low)

    def add(self, rows: NDArray[np.float32]) -> bool:
        """
        Adds rows.

        Args:
            rows: (num_rows, dim).

        Returns:
            Whether they were added: those of another `dim` than the first are not.
        """
        if not len(rows):
            return True
        if rows.ndim != 2 or self.dim not in (None, rows.shape[1]):
            return False
        finite: NDArray[np.bool_] = np.asarray(np.isfinite(rows).all(axis=1))
        self.num_not_finite += int((~finite).sum())
        low = np.where(finite[:, None], rows, np.inf).min(axis=0)
        high = np.where(finite[:, None], rows, -np.inf).max(axis=0)
        self._low = low if self._low is None else np.minimum(self._low, low)
        self._high = high if self._high is None else np.maximum(self._high, high)
        # Rows are counted through all calls, so that what is kept does not depend on how they come.
        places = np.arange(self.num_rows, self.num_rows + len(rows))
        self.num_rows += len(rows)
        self._keep(rows[(places % self.stride == 0) & finite])
        return True

    def _keep(self, rows: NDArray[np.float32]) -> None:
        self._kept.append(rows.copy())
        self._num_kept += len(rows)
        if self._num_kept > MAX_ROWS:
            kept = np.concatenate(self._kept)[::2]
            self.stride *= 2
            self._kept, self._num_kept = [kept], len(kept)

    def to_list(self) -> list[dict[str, Any]]:
        """Per dimension `name`, `min`, `q01`, `q50`, `q99`, `max` and `constant`; empty without a finite row."""
        if self._low is None or self._high is None or not self._num_kept:
            return []
        quantiles = np.quantile(np.concatenate(self._kept), QUANTILES, axis=0)
        names = self.names or tuple(str(number) for number in range(len(self._low)))
        return [
            {"name": name, "min": low, "q01": first, "q50": middle, "q99": last, "max": high, "constant": low == high}
            for name, low, first, middle, last, high in zip(
                names, self._low.tolist(), *quantiles.tolist(), self._high.tolist()
            )
        ]


__all__ = ["NumberSummary"]
