"""Intervals, paired comparisons and their coverage on simulated rollouts."""

import numpy as np
import pytest

from lapa.evaluation.statistics import (
    compare_credits,
    compare_paired,
    credit_interval,
    hierarchical_bootstrap,
    paired_difference,
    rollouts_needed,
    seeds_estimate,
    subtask_standard_error,
    wilson_interval,
)


def simulated(generator: np.random.Generator, means: list[float], seed_deviation: float, rollouts: int = 100):
    """Outcomes per method and seed; the seed moves a method's rate, the start is harder or easier for all of them."""
    difficulty = generator.normal(0, 0.15, rollouts)
    return [
        [generator.random(rollouts) < mean + generator.normal(0, seed_deviation) + difficulty for _ in range(4)]
        for mean in means
    ]


@pytest.mark.parametrize("seed_deviation", [0.0, 0.05])
def test_intervals_over_seeds_cover_the_truth(seed_deviation):
    generator = np.random.default_rng(0)
    covered, separated = [], []
    for _ in range(400):
        first, second = simulated(generator, [0.5, 0.35], seed_deviation)
        estimate, difference = seeds_estimate(first), paired_difference(first, second)
        covered.append((estimate.low <= 0.5 <= estimate.high, difference.low <= 0.15 <= difference.high))
        separated.append(difference.excludes_zero)
    coverage = np.mean(covered, axis=0)
    assert (coverage >= 0.93).all(), coverage
    assert np.mean(separated) > 0.5


@pytest.mark.parametrize("rate", [0.02, 0.98])
def test_intervals_cover_near_the_ends(rate):
    generator = np.random.default_rng(5)
    covered, covered_difference = [], []
    for _ in range(400):
        outcomes = [generator.random(20) < rate for _ in range(3)]
        estimate = seeds_estimate(outcomes)
        covered.append(estimate.low <= rate <= estimate.high)
        difference = paired_difference(outcomes, [generator.random(20) < rate for _ in range(3)])
        covered_difference.append(difference.low <= 0 <= difference.high)
    assert np.mean(covered) > 0.93
    assert np.mean(covered_difference) > 0.93


def test_no_interval_has_no_width():
    for outcomes in ([np.ones(20)] * 3, [np.zeros(20)] * 3):
        estimate = seeds_estimate(outcomes)
        assert estimate.high - estimate.low > 0.02
    difference = paired_difference([np.ones(20)] * 3, [np.zeros(20)] * 3)
    assert 0.5 < difference.low < 1.0


def test_three_seeds_need_more_than_a_bootstrap():
    generator = np.random.default_rng(1)
    bootstrap, student = [], []
    for _ in range(200):
        rates = 0.5 + generator.normal(0, 0.1, 3)
        outcomes = [generator.random(500) < rate for rate in rates]
        for covered, estimate in (
            (bootstrap, hierarchical_bootstrap(outcomes, 200)),
            (student, seeds_estimate(outcomes)),
        ):
            covered.append(estimate.low <= 0.5 <= estimate.high)
    assert np.mean(bootstrap) < 0.9
    assert np.mean(student) > 0.92


def test_the_bootstrap_is_cautious_where_seeds_are_alike():
    generator = np.random.default_rng(4)
    covered = []
    for _ in range(200):
        outcomes = [generator.random(100) < 0.5 for _ in range(8)]
        estimate = hierarchical_bootstrap(outcomes, 200)
        covered.append(estimate.low <= 0.5 <= estimate.high)
    assert np.mean(covered) > 0.95


def test_one_seed_has_the_interval_of_its_rollouts():
    estimate = seeds_estimate([[True] * 81 + [False] * 182])
    assert (estimate.low, estimate.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert seeds_estimate([[0.5, 1.0, 0.25, 0.0]]).to_dict()["value"] == pytest.approx(0.4375)


def test_partial_credit_and_order_do_not_matter():
    first = [[0.0, 0.5, 1.0, 1.0], [0.5, 0.5, 0.0, 1.0]]
    assert seeds_estimate(first).value == pytest.approx(0.5625)
    shuffled = [row[::-1] for row in first]
    assert seeds_estimate(first) == seeds_estimate(shuffled)


@pytest.mark.parametrize("rollouts", [6, 18, 54])
def test_intervals_of_partial_credits_cover_and_are_no_wider_than_wilsons(rollouts):
    generator = np.random.default_rng(2)
    levels = np.array([0, 0.25, 0.5, 0.75, 1])
    for shares in ([0.9, 0.02, 0.02, 0.01, 0.05], [0.6, 0.07, 0.07, 0.06, 0.2], [0.1, 0.2, 0.2, 0.2, 0.3],
                   [0.05, 0.3, 0.3, 0.3, 0.05], [0.02, 0.02, 0.03, 0.03, 0.9], [0, 0, 1, 0, 0]):  # fmt: skip
        draws = generator.choice(levels, p=shares, size=(400, rollouts))
        estimates = [credit_interval(draw) for draw in draws]
        truth = float(levels @ shares)
        assert np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]) >= 0.92, shares
        assert all(0 <= estimate.low <= estimate.value <= estimate.high <= 1 for estimate in estimates)
        middle = [estimate for estimate in estimates if estimate.value == 0.5]
        low, high = wilson_interval(rollouts // 2, rollouts)
        assert all(estimate.high - estimate.low <= high - low + 1e-12 for estimate in middle)


def test_partial_credits_that_are_successes_have_wilsons_interval():
    for successes in range(8):
        estimate = credit_interval([1] * successes + [0] * (7 - successes))
        assert (estimate.low, estimate.high) == pytest.approx(wilson_interval(successes, 7), abs=1e-12)
    # Half credit for all six spreads (0 + 1/4) / 6, a sixth of what successes would: as sure as 18 successes of 36.
    half = credit_interval([0.5] * 6)
    assert (half.low, half.high) == pytest.approx(wilson_interval(18, 36), abs=1e-12)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 0 to 2"):
        credit_interval([0, 2])


def test_the_higher_credit_wins():
    compared = compare_credits([1, 0.5, 0.25, 0, 1], [0.5, 0.5, 0, 0.25, 0])
    assert (compared.wins, compared.ties, compared.losses) == (3, 1, 1)
    # Two-sided, 3 of 4 heads: (1 + 4 + 4 + 1) / 16.
    assert compared.p_value == pytest.approx(0.625)
    assert compared.difference.value == pytest.approx(0.3)
    ours, theirs = [True, True, False, True], [False, True, False, False]
    assert compare_credits(ours, theirs).p_value == compare_paired(ours, theirs).p_value
    with pytest.raises(ValueError, match="the same seeds and starts"):
        compare_credits([1, 0], [1])


def test_paired_comparison_counts_and_tests():
    first, second = [True] * 10 + [False] * 5 + [True] * 5, [True] * 10 + [False] * 10
    comparison = compare_paired(first, second)
    assert (comparison.wins, comparison.ties, comparison.losses) == (5, 15, 0)
    # Two-sided binomial: 2 * (1 / 2) ** 5.
    assert comparison.p_value == pytest.approx(0.0625)
    assert comparison.to_dict()["win_rate"] == pytest.approx(12.5 / 20)
    assert compare_paired([True, False], [True, False]).p_value == 1.0


def test_newcombe_interval_known_value():
    # Newcombe (1998), table II, row 2: 36 both, 12 and 2 discordant, 0 neither; method 10 gives 0.0569 to 0.3404.
    first = [True] * 36 + [True] * 12 + [False] * 2
    second = [True] * 36 + [False] * 12 + [True] * 2
    difference = compare_paired(first, second).difference
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=2e-4)


def test_newcombe_interval_covers():
    generator = np.random.default_rng(2)
    covered = []
    for _ in range(600):
        difficulty = generator.normal(0, 0.2, 60)
        first, second = (generator.random(60) < rate + difficulty for rate in (0.6, 0.45))
        difference = compare_paired(first, second).difference
        covered.append(difference.low <= 0.15 <= difference.high)
    assert np.mean(covered) > 0.92


def test_rollouts_needed_matches_simulation():
    assert rollouts_needed(0.3, 0.5) == 91
    assert rollouts_needed(0.3, 0.5, correlation=0.5) < 50
    generator = np.random.default_rng(3)
    seen = []
    for _ in range(400):
        first, second = generator.random(91) < 0.5, generator.random(91) < 0.3
        seen.append(compare_paired(first, second).difference.low > 0)
    assert 0.7 < np.mean(seen) < 0.9


def test_published_standard_error_is_over_subtasks():
    # Language Table, in-domain seen: five equal subtasks have no "standard error", whatever the rollouts were.
    assert subtask_standard_error([0.6] * 5) == 0.0
    assert subtask_standard_error([0.5, 0.7]) == pytest.approx(0.1)


def test_bad_arguments_are_named():
    for call, message in (
        (lambda: seeds_estimate([]), "outcomes"),
        (lambda: paired_difference([[1, 0]], [[1]]), "same seeds and starts"),
        (lambda: compare_paired([True], [True, False]), "equally long"),
        (lambda: rollouts_needed(0.5, 0.5), "must differ"),
        (lambda: rollouts_needed(0.5, 1.0), "`second`"),
        (lambda: subtask_standard_error([0.5]), "at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
