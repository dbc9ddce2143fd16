"""Intervals by resampling whole episodes, for the numbers of a report on a quantizer."""

from collections.abc import Callable
from typing import Any

import numpy as np

NUM_RESAMPLES = 1000
QUANTILES = (2.5, 97.5)

Cell = dict[str, Any]


def group_sums(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Sums (num_groups, ...) of `values` (num_pairs, ...) over each group, groups in ascending order."""
    _, index = np.unique(group, return_inverse=True)
    sums = np.zeros((index.max() + 1, *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums


def bootstrap(
    sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], num_resamples: int = NUM_RESAMPLES
) -> Cell:
    """
    A statistic of sums over groups, with its 95% percentile interval over resampled groups.

    Args:
        sums: (num_groups, width).
        statistic: From total sums (..., width) to values (...).
        num_resamples: How often groups are drawn anew, with a fixed seed.

    Returns:
        `{"value", "ci95": [low, high]}`. Both ends are None with fewer than two groups, from which nothing can be said.
    """
    value = float(statistic(sums.sum(axis=0)))
    if len(sums) < 2:
        return {"value": value, "ci95": [None, None]}
    generator = np.random.default_rng(0)
    draws = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=num_resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(draws @ sums)
    low, high = np.nanpercentile(values, QUANTILES) if np.isfinite(values).any() else (np.nan, np.nan)
    return {"value": value, "ci95": [float(low), float(high)]}


def mean_cell(values: np.ndarray, group: np.ndarray) -> Cell:
    """Mean over pairs of `values` (num_pairs,), with interval."""
    return bootstrap(group_sums(np.stack([values, np.ones(len(values))], axis=1), group), ratio)


def ratio_gain_cell(better: np.ndarray, worse: np.ndarray, group: np.ndarray) -> Cell:
    """`1 - mean(better) / mean(worse)` of errors (num_pairs,), with interval: 0 is no gain, 1 is no error left."""
    return bootstrap(group_sums(np.stack([better, worse], axis=1), group), lambda total: 1 - ratio(total))


def ratio(total: np.ndarray) -> np.ndarray:
    """First of the sums (..., 2) over the second; NaN where that is 0."""
    return np.asarray(total[..., 0] / np.where(total[..., 1] == 0, np.nan, total[..., 1]))


def r2_cell(predicted: np.ndarray, target: np.ndarray, group: np.ndarray) -> Cell:
    """
    R² of predictions, averaged over the dimensions that vary, with interval.

    Args:
        predicted, target: (num_pairs, dim).
        group: (num_pairs,).

    Returns:
        As `bootstrap`; also `per_dimension` (None for one that does not vary).
    """
    varies = target.std(axis=0) > 1e-9 * np.maximum(np.abs(target).max(axis=0), 1e-12)
    squared, counted = (predicted - target) ** 2, np.ones((len(target), 1))
    # Variance in each resample comes from its own first and second moments; centred first, for precision.
    centred = target - target.mean(axis=0)
    columns = np.concatenate([squared, centred, centred**2, counted], axis=1)
    dim = target.shape[1]

    def each(total: np.ndarray) -> np.ndarray:
        count = total[..., -1:]
        spread = total[..., 2 * dim : 3 * dim] - total[..., dim : 2 * dim] ** 2 / count
        return np.asarray(1 - total[..., :dim] / np.where(spread <= 0, np.nan, spread))

    if not varies.any():
        return {"value": None, "ci95": [None, None], "per_dimension": [None] * dim}
    sums = group_sums(columns, group)

    def mean(total: np.ndarray) -> np.ndarray:
        # A resample can hold no variation in a dimension; where it holds none at all the mean is NaN and left out.
        found = each(total)[..., varies]
        known = np.isfinite(found).sum(axis=-1)
        return np.asarray(np.nansum(found, axis=-1) / np.where(known == 0, np.nan, known))

    cell = bootstrap(sums, mean)
    values = each(sums.sum(axis=0))
    return cell | {"per_dimension": [float(v) if ok else None for v, ok in zip(values, varies)]}


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of non-negative `counts` of any shape."""
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(share * np.log(share)).sum())


def mutual_information(first: np.ndarray, second: np.ndarray, num_shuffles: int = 20) -> float:
    """
    Share of the entropy of `first` that `second` tells, both (num_pairs,) integer labels.

    What shuffled labels tell, which is not 0 on few pairs, is taken off: 0 is independence, 1 is "tells all".
    """
    first, second = (np.unique(labels, return_inverse=True)[1] for labels in (first, second))
    whole = entropy(np.bincount(first))
    if whole == 0:
        return 0.0

    def information(labels: np.ndarray) -> float:
        table = np.bincount(labels * (second.max() + 1) + second)
        return whole + entropy(np.bincount(second)) - entropy(table)

    generator = np.random.default_rng(0)
    chance = float(np.mean([information(generator.permutation(first)) for _ in range(num_shuffles)]))
    return 0.0 if chance >= whole else float(np.clip((information(first) - chance) / (whole - chance), 0, 1))
