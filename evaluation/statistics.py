"""Honest statistics of success rates: intervals per cell, over training seeds, and of paired comparisons."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Two-sided 95%.
NORMAL_QUANTILE = 1.959963984540054
CONFIDENCE = 0.95
# Resamples of a bootstrap: its own error is then small beside the interval.
RESAMPLES = 2000


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError('comparisons need scipy: pip install "lapa[sim]"') from error
    return stats


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


def subtask_standard_error(rates: Sequence[float]) -> float:
    """
    What published tables print behind "±": the standard error of the mean over subtask success rates.

    It measures how different the subtasks are, not how well any rate is known: it is 0 where all subtasks score alike,
    however few rollouts there were. It stands beside our intervals for comparison only.

    Args:
        rates: Success rate of each subtask, at least two.
    """
    if len(rates) < 2:
        raise ValueError(f"`rates` must hold at least 2 subtasks, got {len(rates)}.")
    return float(np.std(rates, ddof=1) / math.sqrt(len(rates)))


@dataclass(frozen=True)
class Estimate:
    """
    A number with its interval.

    Args:
        value (`float`): Point estimate.
        low, high (`float`): Ends of the 95% interval.
    """

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """`{value, ci95: [low, high]}`."""
        return {"value": self.value, "ci95": [self.low, self.high]}

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


def _outcome_matrix(outcomes: Sequence[ArrayLike], name: str) -> list[NDArray[np.float64]]:
    rows = [np.asarray(row, dtype=np.float64) for row in outcomes]
    if not rows or any(row.ndim != 1 or not len(row) for row in rows):
        raise ValueError(f"`{name}` must hold at least one seed with at least one rollout each.")
    return rows


def seeds_estimate(outcomes: Sequence[ArrayLike]) -> Estimate:
    """
    Success rate over training seeds: how would the method do, trained once more and played once more?

    Student's interval over the seeds' rates, with the rollouts' own variance as a floor: three seeds can agree by chance,
    and where all succeed or all fail the floor is not 0.
    It is what a bootstrap that draws whole seeds gives, widened for how few they are. A single seed has the interval of its
    rollouts (`credit_interval`; Wilson's of successes), which says nothing about another training.

    Args:
        outcomes: Per training seed the outcomes (num_rollouts,) in {0, 1}, or partial credit in [0, 1].

    Returns:
        The mean of the seeds' rates with its 95% interval, cut to [0, 1].
    """
    rows = _outcome_matrix(outcomes, "outcomes")
    if len(rows) == 1:
        return credit_interval(rows[0])
    return _student_estimate(rows, 0.0, 1.0)


def credit_interval(credits: ArrayLike) -> Estimate:
    """
    Mean partial credit of one policy over rollouts, with an interval that stays right for few of them.

    Wilson's interval with the spread that was seen: credits between 0 and 1 spread less than successes and failures of the same
    mean, so that a rollout counts for more than one. The spread has half an observation added at either end, and is never
    taken for more than that of successes and failures. Of outcomes that are all 0 or 1 it is the Wilson interval itself.
    Student's interval, its alternative, misses too often where most credits are alike.

    Args:
        credits: (num_rollouts,) in [0, 1].

    Raises:
        ValueError: No rollouts, or credits outside [0, 1].
    """
    (row,) = _outcome_matrix([credits], "credits")
    if row.min() < 0 or row.max() > 1:
        raise ValueError(f"`credits` must lie in [0, 1], got {row.min():g} to {row.max():g}.")
    count = len(row)
    centre = (row.sum() + 0.5) / (count + 1)
    spread = (((row - centre) ** 2).sum() + (centre**2 + (1 - centre) ** 2) / 2) / count
    effective = count / min(1.0, float(spread / (centre * (1 - centre))))
    value, z2 = float(row.mean()), NORMAL_QUANTILE**2 / effective
    middle = (value + z2 / 2) / (1 + z2)
    half = math.sqrt(value * (1 - value) * z2 + z2**2 / 4) / (1 + z2)
    return Estimate(value, 0.0 if value == 0 else middle - half, 1.0 if value == 1 else middle + half)


def paired_difference(first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> Estimate:
    """
    Difference of two methods' success rates, paired by training seed and by start state.

    Args:
        first, second: Per training seed the outcomes (num_rollouts,); the same seeds and the same starts in both.

    Returns:
        Mean of `first - second` with the interval of `seeds_estimate` over the paired differences; over the starts alone
        where there is one seed.

    Raises:
        ValueError: Outcomes that do not pair.
    """
    ours, theirs = _outcome_matrix(first, "first"), _outcome_matrix(second, "second")
    if [len(row) for row in ours] != [len(row) for row in theirs]:
        raise ValueError(
            f"`first` and `second` must have the same seeds and starts, got {[len(row) for row in ours]} and "
            f"{[len(row) for row in theirs]} rollouts."
        )
    return _student_estimate([a - b for a, b in zip(ours, theirs)], -1.0, 1.0)


def _student_estimate(rows: Sequence[NDArray[np.float64]], least: float, most: float) -> Estimate:
    """Mean of the rows' means; interval over rows, or over the entries of a single one."""
    means = np.array([row.mean() for row in rows])
    within = float(np.mean([_variance_of_mean(row, least, most) for row in rows]))
    between = float(means.var(ddof=1)) if len(rows) > 1 else 0.0
    degrees = len(rows) - 1 if len(rows) > 1 else len(rows[0]) - 1
    quantile = float(_scipy_stats().t.ppf((1 + CONFIDENCE) / 2, max(1, degrees)))
    value, half = float(means.mean()), quantile * math.sqrt(max(between, within) / len(rows))
    return Estimate(value, max(least, value - half), min(most, value + half))


def _variance_of_mean(row: NDArray[np.float64], least: float, most: float) -> float:
    """
    Variance of the mean of outcomes in [least, most], never 0: twenty successes of twenty leave room for a failure.

    One half of an observation at either end is added, as in Agresti and Coull's and Jeffreys' intervals.
    """
    count = len(row) + 1
    mean = (row.sum() + (least + most) / 2) / count
    spread = ((row - mean) ** 2).sum() + ((least - mean) ** 2 + (most - mean) ** 2) / 2
    return float(spread / count / count)


def hierarchical_bootstrap(
    outcomes: Sequence[ArrayLike], resamples: int = RESAMPLES, generator: np.random.Generator | None = None
) -> Estimate:
    """
    Percentile interval of the two-level bootstrap: seeds are drawn with replacement, then rollouts of each drawn seed.

    It stands beside `seeds_estimate` because it is what many reports use. With three seeds it covers less than it says where
    seeds differ (its ends cannot pass the extreme seeds), and more than it says where they do not (the rollouts' variance
    counts twice).

    Args:
        outcomes: As in `seeds_estimate`; differences in [-1, 1] are accepted, too.
        resamples: Of the bootstrap.
        generator: Of its draws; seed 0 when None.
    """
    generator = np.random.default_rng(0) if generator is None else generator
    rows = _outcome_matrix(outcomes, "outcomes")
    rates = np.empty((resamples, len(rows)))
    for resample, chosen in enumerate(generator.integers(len(rows), size=(resamples, len(rows)))):
        rates[resample] = [
            rows[seed][generator.integers(len(rows[seed]), size=len(rows[seed]))].mean() for seed in chosen
        ]
    low, high = np.quantile(rates.mean(axis=1), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Estimate(float(np.mean([row.mean() for row in rows])), float(low), float(high))


@dataclass(frozen=True)
class PairedComparison:
    """
    Two policies on the same start states.

    Args:
        wins, ties, losses (`int`): Starts that the first solved and the second did not, that both or neither solved, and
            the reverse.
        p_value (`float`): Exact McNemar test (two-sided binomial over the starts where they differ).
        difference (`Estimate`): Of the success rates, with its interval.
    """

    wins: int
    ties: int
    losses: int
    p_value: float
    difference: Estimate

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form; `win_rate` counts ties as half, as the paper's win / tie / loss does."""
        total = self.wins + self.ties + self.losses
        return {
            "wins": self.wins,
            "ties": self.ties,
            "losses": self.losses,
            "win_rate": (self.wins + self.ties / 2) / total,
            "mcnemar_p": self.p_value,
            "difference": self.difference.to_dict(),
        }


def compare_paired(first: ArrayLike, second: ArrayLike) -> PairedComparison:
    """
    Compares two policies on the same start states, one training each.

    Args:
        first, second: Outcomes (num_starts,) booleans, in the same order of starts.

    Raises:
        ValueError: Different numbers of starts, or none.
    """
    ours, theirs = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if ours.shape != theirs.shape or ours.ndim != 1 or not len(ours):
        raise ValueError(f"`first` and `second` must be equally long lists, got {ours.shape} and {theirs.shape}.")
    wins, losses = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    p_value = float(_scipy_stats().binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return PairedComparison(wins, len(ours) - wins - losses, losses, p_value, _newcombe(ours, theirs))


def compare_credits(first: ArrayLike, second: ArrayLike) -> PairedComparison:
    """
    Compares the partial credits of two policies on the same start states; the higher credit wins.

    Args:
        first, second: Credits (num_starts,) in [0, 1], in the same order of starts.

    Returns:
        Wins, ties and losses as in the paper, the exact sign test over the starts where they differ (McNemar's, of credits that
        are 0 or 1), and the paired difference of the mean credits.

    Raises:
        ValueError: Different numbers of starts, or none.
    """
    difference = paired_difference([first], [second])
    change = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    wins, losses = int((change > 0).sum()), int((change < 0).sum())
    p_value = float(_scipy_stats().binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return PairedComparison(wins, len(change) - wins - losses, losses, p_value, difference)


def _newcombe(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Estimate:
    """Newcombe's hybrid score interval of a paired difference (1998, method 10): made of two Wilson intervals."""
    count = len(first)
    rates, ends = [], []
    for outcomes in (first, second):
        successes = int(outcomes.sum())
        rates.append(successes / count)
        ends.append(wilson_interval(successes, count))
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    # Correlation of the two outcomes, with Newcombe's correction for few starts.
    margins = float(first.sum()) * float((~first).sum()) * float(second.sum()) * float((~second).sum())
    product = float(both * neither - only_first * only_second)
    product = max(product - count / 2, 0.0) if product > 0 else product
    phi = product / math.sqrt(margins) if margins > 0 else 0.0
    (low1, high1), (low2, high2) = ends
    value = rates[0] - rates[1]
    below = _score_distance(rates[0] - low1, high2 - rates[1], phi)
    above = _score_distance(high1 - rates[0], rates[1] - low2, phi)
    return Estimate(value, value - below, value + above)


def _score_distance(first: float, second: float, phi: float) -> float:
    return math.sqrt(max(0.0, first**2 - 2 * phi * first * second + second**2))


def rollouts_needed(first: float, second: float, power: float = 0.8, correlation: float = 0.0) -> int:
    """
    Rollouts per method to see a difference of success rates at the two-sided 5% level.

    Args:
        first, second: The two success probabilities, in (0, 1), not equal.
        power: Chance to see the difference, in (0, 1).
        correlation: Of the two methods' outcomes on the same start; 0 for different starts. Pairing saves rollouts by it.

    Returns:
        The smallest number by the normal approximation.
    """
    for name, value in (("first", first), ("second", second), ("power", power)):
        if not 0 < value < 1:
            raise ValueError(f"`{name}` must lie strictly between 0 and 1, got {value}.")
    if first == second or not -1 < correlation < 1:
        raise ValueError(
            f"`first` and `second` must differ and `correlation` lie between -1 and 1, got {first}, {second} and "
            f"{correlation}."
        )
    deviations = [math.sqrt(rate * (1 - rate)) for rate in (first, second)]
    variance = deviations[0] ** 2 + deviations[1] ** 2 - 2 * correlation * deviations[0] * deviations[1]
    quantiles = NORMAL_QUANTILE + float(_scipy_stats().norm.ppf(power))
    return max(2, math.ceil(variance * (quantiles / (first - second)) ** 2))


__all__ = [
    "Estimate",
    "PairedComparison",
    "compare_credits",
    "compare_paired",
    "credit_interval",
    "hierarchical_bootstrap",
    "intervals_overlap",
    "paired_difference",
    "rollouts_needed",
    "seeds_estimate",
    "subtask_standard_error",
    "success_cell",
    "success_table",
    "wilson_interval",
]
