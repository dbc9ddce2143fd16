"""Honest statistics of success rates."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

# Two-sided 95%.
NORMAL_QUANTILE = 1.959963984540054


def wilson_interval(successes: int, rollouts: int, quantile: float = NORMAL_QUANTILE) -> tuple[float, float]:
    """Wilson score interval of a success probability.

    Args:
        successes: Number of successes, in [0, rollouts].
        rollouts: Number of independent rollouts, at least 1.
        quantile: Of the standard normal; the default gives 95%.

    Returns:
        Lower and upper end, in [0, 1].
    """
    if rollouts < 1 or not 0 <= successes <= rollouts:
        raise ValueError(f"`successes` ({successes}) must lie in [0, `rollouts`] and `rollouts` ({rollouts}) above 0.")
    share, z2 = successes / rollouts, quantile**2
    centre = (share + z2 / (2 * rollouts)) / (1 + z2 / rollouts)
    half = quantile * math.sqrt(share * (1 - share) / rollouts + z2 / (4 * rollouts**2)) / (1 + z2 / rollouts)
    # At the ends the interval touches 0 and 1 exactly; rounding must not push it over.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == rollouts else centre + half)


def success_cell(outcomes: Iterable[bool]) -> dict[str, Any]:
    """One table cell: `{successes, rollouts, success, ci95: [low, high]}` of a list of outcomes."""
    outcomes = list(outcomes)
    successes = sum(map(bool, outcomes))
    low, high = wilson_interval(successes, len(outcomes))
    return {
        "successes": successes,
        "rollouts": len(outcomes),
        "success": successes / len(outcomes),
        "ci95": [low, high],
    }


def success_table(outcomes: Mapping[str, list[bool]]) -> dict[str, Any]:
    """`{"pooled": cell, "families": {family: cell}}` from outcomes by family."""
    return {
        "pooled": success_cell(outcome for family in outcomes.values() for outcome in family),
        "families": {family: success_cell(values) for family, values in outcomes.items()},
    }


def intervals_overlap(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether the 95% intervals of two cells have a point in common."""
    return first["ci95"][0] <= second["ci95"][1] and second["ci95"][0] <= first["ci95"][1]
