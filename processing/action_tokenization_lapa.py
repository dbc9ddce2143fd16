"""Action tokenization: equal-frequency bins per dimension, fitted from data or read from the published csv."""

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# A gripper is open or closed: one bin around each of 0 and 1, as in the published csv.
GRIPPER_EDGES = (-0.5, 0.5, 1.5)


def _as_finite_actions(actions: ArrayLike, action_dim: int | None = None) -> NDArray[np.float64]:
    """(..., action_dim) float64, checked."""
    try:
        values = np.asarray(actions, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`actions` must be numbers of shape (..., action_dim): {error}.") from error
    if values.ndim < 1 or values.size == 0 or (action_dim is not None and values.shape[-1] != action_dim):
        accepted = "action_dim" if action_dim is None else str(action_dim)
        raise ValueError(f"`actions` must be a non-empty (..., {accepted}) array, got shape {values.shape}.")
    if not np.isfinite(values).all():
        position = tuple(int(index) for index in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(
            f"`actions` must be finite, but actions[{', '.join(map(str, position))}] is {values[position]}."
        )
    return values


def edge_probabilities(num_bins: int) -> NDArray[np.float64]:
    """(num_bins + 1,) probabilities whose quantiles are the edges of `pandas.qcut(values, num_bins)`."""
    quantiles = np.linspace(0, 1, num_bins + 1)
    # pandas rounds a quantile up where num_bins does not divide it exactly in binary.
    inexact = num_bins * quantiles != np.arange(num_bins + 1)
    return np.where(inexact, np.nextafter(quantiles, 1), quantiles)


def _distinct_edges(quantiles: NDArray[np.float64]) -> tuple[float, ...]:
    """Edges as of `pandas.qcut(duplicates="drop")`; a constant gets the edge twice, which is one bin."""
    edges = np.unique(quantiles)
    return tuple(edges.tolist()) if len(edges) > 1 else (float(edges[0]), float(edges[0]))


def _gripper_index(gripper_dimension: str | int | None, action_dim: int) -> int | None:
    if gripper_dimension is None:
        return None
    index = action_dim - 1 if gripper_dimension == "last" else gripper_dimension
    if isinstance(index, bool) or not isinstance(index, int) or not -action_dim <= index < action_dim:
        raise ValueError(
            f'`gripper_dimension` must be "last", an index below {action_dim} (the action dimension) or None, '
            f"got {gripper_dimension!r}."
        )
    return index % action_dim


@dataclass(frozen=True)
class ActionTokenizer:
    r"""
    Maps physical actions to bins and back, one set of bins per dimension.

    Bin `i` of a dimension holds `edges[i] <= value < edges[i + 1]`; the last bin includes its upper edge. Values outside
    the edges go to the nearest end bin, so `decode(encode(x))` clips. A dimension whose two only edges are equal is
    constant and has one bin.

    Args:
        edges (`tuple[tuple[float, ...], ...]`): Rising bin edges of each dimension in physical units, one more than
            its bins. A single edge is read as a constant dimension.
    """

    edges: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.edges:
            raise ValueError("`edges` must have at least one dimension, got none.")
        rows = [tuple(float(edge) for edge in row) for row in self.edges]
        rows = [row * 2 if len(row) == 1 else row for row in rows]
        for dimension, row in enumerate(rows):
            constant = len(row) == 2 and row[0] == row[1]
            rising = all(low < high for low, high in pairwise(row))
            if not row or not all(map(math.isfinite, row)) or not (rising or constant):
                raise ValueError(
                    f"`edges` of dimension {dimension} must be finite and rise strictly, got {_short(row)}."
                )
        object.__setattr__(self, "edges", tuple(rows))

    @property
    def action_dim(self) -> int:
        """Number of dimensions."""
        return len(self.edges)

    @property
    def num_bins(self) -> tuple[int, ...]:
        """Number of bins of each dimension."""
        return tuple(len(row) - 1 for row in self.edges)

    @classmethod
    def fit(
        cls, actions: ArrayLike, num_bins: int = 256, gripper_dimension: str | int | None = "last"
    ) -> "ActionTokenizer":
        """
        Fits bins that hold equally many of the given actions.

        Args:
            actions: (num_steps, action_dim), physical units.
            num_bins: Most bins per dimension; ties leave fewer.
            gripper_dimension: `"last"`, an index or None. The gripper must lie in [0, 1] and gets two bins.

        Raises:
            ValueError: Not a non-empty (num_steps, action_dim) array, a value that is not finite (named by its
                position), or a gripper outside [0, 1].
        """
        values = _as_finite_actions(actions)
        if values.ndim != 2:
            raise ValueError(f"`actions` must have shape (num_steps, action_dim), got {values.shape}.")
        if not isinstance(num_bins, int) or num_bins < 1:
            raise ValueError(f"`num_bins` must be a whole number of at least 1, got {num_bins!r}.")
        quantiles = np.quantile(values, edge_probabilities(num_bins), axis=0)
        return cls.from_quantiles(quantiles, values.min(0), values.max(0), gripper_dimension)

    @classmethod
    def from_quantiles(
        cls,
        quantiles: NDArray[np.float64],
        minimum: NDArray[np.float64],
        maximum: NDArray[np.float64],
        gripper_dimension: str | int | None = "last",
    ) -> "ActionTokenizer":
        """
        Bins from quantiles that were computed elsewhere; `fit` of the actions where they are theirs.

        Args:
            quantiles: (num_bins + 1, action_dim) float64, at `edge_probabilities(num_bins)`.
            minimum, maximum: (action_dim,) of the actions.
            gripper_dimension: As in `fit`.

        Raises:
            ValueError: A gripper outside [0, 1].
        """
        action_dim = quantiles.shape[1]
        gripper = _gripper_index(gripper_dimension, action_dim)
        if gripper is not None and not (minimum[gripper] >= 0 and maximum[gripper] <= 1):
            raise ValueError(
                f"`actions` of the gripper (dimension {gripper}) must lie in [0, 1], they span "
                f"[{minimum[gripper]}, {maximum[gripper]}]; rescale them, or pass "
                "`gripper_dimension=None` to bin this dimension like the others."
            )
        return cls(
            tuple(
                GRIPPER_EDGES if dimension == gripper else _distinct_edges(quantiles[:, dimension])
                for dimension in range(action_dim)
            )
        )

    def encode(self, actions: ArrayLike) -> NDArray[np.int64]:
        """
        Bins of actions.

        Args:
            actions: (..., action_dim), physical units.

        Returns:
            (..., action_dim) int64 bin indices; outside the edges, the nearest end bin.

        Raises:
            ValueError: Another last dimension, or a value that is not finite (named by its position).
        """
        values = _as_finite_actions(actions, self.action_dim)
        tokens = np.empty(values.shape, dtype=np.int64)
        for dimension, (row, bins) in enumerate(zip(self.edges, self.num_bins)):
            found = np.searchsorted(np.asarray(row), values[..., dimension], side="right") - 1
            tokens[..., dimension] = np.clip(found, 0, bins - 1)
        return tokens

    def decode(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """
        Midpoints of bins.

        Args:
            tokens: (..., action_dim) integer bin indices.

        Returns:
            (..., action_dim) float32, physical units.

        Raises:
            ValueError: Another last dimension, no integers, or a bin that its dimension lacks.
        """
        bins = np.asarray(tokens)
        if bins.ndim < 1 or bins.shape[-1] != self.action_dim or not np.issubdtype(bins.dtype, np.integer):
            raise ValueError(
                f"`tokens` must be integers of shape (..., {self.action_dim}), got {bins.dtype} of shape {bins.shape}."
            )
        actions = np.empty(bins.shape, dtype=np.float32)
        for dimension, (row, count) in enumerate(zip(self.edges, self.num_bins)):
            column = bins[..., dimension]
            lacking = column[(column < 0) | (column >= count)]
            if lacking.size:
                raise ValueError(
                    f"`tokens` hold bin {int(lacking.flat[0])} for dimension {dimension}, which has {count} bins "
                    f"(0 to {count - 1})."
                )
            edges = np.asarray(row)
            actions[..., dimension] = ((edges[:-1] + edges[1:]) / 2)[column]
        return actions

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return {"edges": [list(row) for row in self.edges]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ActionTokenizer":
        """Inverse of `to_dict`."""
        if not isinstance(values, dict) or set(values) != {"edges"} or not isinstance(values["edges"], (list, tuple)):
            raise ValueError(f"action statistics must be {{'edges': [[...], ...]}}, got {_short(values)}.")
        return cls(tuple(tuple(row) for row in values["edges"]))

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> "ActionTokenizer":
        """
        Reads the published csv: a header, then one row of edges per dimension, shorter rows padded with empty fields.

        Raises:
            ValueError: No rows, or a field that is no number, named by row and column.
        """
        rows: list[tuple[float, ...]] = []
        with open(path, newline="", encoding="utf-8") as file:
            for number, fields in enumerate(csv.reader(file)):
                if number > 0 and fields:
                    rows.append(_csv_row(fields, number + 1, path))
        if not rows:
            raise ValueError(f"{os.fspath(path)} has no row of bin edges after its header.")
        return cls(tuple(rows))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the published csv layout. A constant dimension has its edge twice, so that published readers find a bin."""
        width = max(map(len, self.edges))
        rows: list[Sequence[object]] = [range(width)]
        rows += [[*map(repr, row), *[""] * (width - len(row))] for row in self.edges]
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with partial.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def _csv_row(fields: list[str], line: int, path: str | os.PathLike[str]) -> tuple[float, ...]:
    values = []
    for column, field in enumerate(fields, start=1):
        if field.strip():
            try:
                values.append(float(field))
            except ValueError:
                raise ValueError(f"{os.fspath(path)}, line {line}, column {column}: {field!r} is no number.") from None
    return tuple(values)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


__all__ = ["ActionTokenizer", "edge_probabilities"]
