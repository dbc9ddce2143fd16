"""Whether codes mean the same for different bodies: probes from one to another, directions per code."""

from itertools import permutations
from typing import Any

import numpy as np

from lapa.evaluation.quantizer_report_motion import PairMotion
from lapa.evaluation.quantizer_report_probes import MIN_PAIRS, cross_predict, fit_linear, one_hot
from lapa.evaluation.quantizer_report_sample import PairSample
from lapa.evaluation.quantizer_report_statistics import Cell, r2_cell

# A code's direction counts where each body has it so often.
MIN_USES = 5


def embodiment_of(sample: PairSample) -> np.ndarray:
    """(num_pairs,) name of each pair's embodiment."""
    return np.array([source.embodiment for source in sample.sources])[sample.source]


def _means_by_code(sequence: np.ndarray, values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    uses = np.bincount(sequence, minlength=count)
    sums = np.stack([np.bincount(sequence, weights=column, minlength=count) for column in values.T], axis=1)
    return sums / np.maximum(uses, 1)[:, None], uses


def direction_agreement(
    sequence: np.ndarray, values: np.ndarray, group: np.ndarray, first: np.ndarray, second: np.ndarray
) -> dict[str, Any] | None:
    """
    Whether the mean motions of codes point the same way for two bodies.

    Args:
        sequence: (num_pairs,) index of the code sequence.
        values: (num_pairs, dim), standardised within each body.
        group: (num_pairs,).
        first, second: (num_pairs,) bool, whose pairs.

    Returns:
        `cosine`: of the two mean motions of each code, weighted by its uses and their lengths, with an interval over
        resampled groups; `num_codes`; None where the two share no code.
    """
    count = int(sequence.max()) + 1

    def cosine(rows_a: np.ndarray, rows_b: np.ndarray) -> float:
        (mean_a, uses_a), (mean_b, uses_b) = (_means_by_code(sequence[r], values[r], count) for r in (rows_a, rows_b))
        shared = (uses_a >= MIN_USES) & (uses_b >= MIN_USES)
        # By uses and by length: a code that means "nothing moves" has no direction to agree on.
        weight = np.minimum(uses_a, uses_b)[shared]
        lengths = np.linalg.norm(mean_a[shared], axis=1) * np.linalg.norm(mean_b[shared], axis=1)
        total = float(lengths @ weight)
        return float((mean_a * mean_b).sum(axis=1)[shared] @ weight / total) if total > 0 else float("nan")

    rows = [np.flatnonzero(first), np.flatnonzero(second)]
    value = cosine(*rows)
    if np.isnan(value):
        return None
    generator = np.random.default_rng(0)
    members = [[r[group[r] == g] for g in np.unique(group[r])] for r in rows]
    draws = []
    for _ in range(300):
        drawn = [
            np.concatenate([parts[i] for i in generator.integers(len(parts), size=len(parts))]) for parts in members
        ]
        draws.append(cosine(*drawn))
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    uses = [np.bincount(sequence[r], minlength=count) for r in rows]
    num_codes = int(((uses[0] >= MIN_USES) & (uses[1] >= MIN_USES)).sum())
    return {"cosine": {"value": value, "ci95": [float(low), float(high)]}, "num_codes": num_codes}


def _transfer(
    features: np.ndarray, values: np.ndarray, group: np.ndarray, fitted: np.ndarray, tested: np.ndarray
) -> tuple[Cell, Cell]:
    """R² on `tested` of a probe fitted on `fitted`, and of one cross-validated within `tested`."""
    across = fit_linear(features[fitted], values[fitted], group[fitted])(features[tested])
    within = cross_predict(features[tested], values[tested], group[tested], fit_linear)
    cells = [r2_cell(predicted, values[tested], group[tested]) for predicted in (across, within)]
    return {k: cells[0][k] for k in ("value", "ci95")}, {k: cells[1][k] for k in ("value", "ci95")}


def consistency(
    sample: PairSample, codes: np.ndarray, motion: PairMotion, codebook_size: int
) -> list[dict[str, Any]] | None:
    """
    Every ordered pair of embodiments: probe fitted on `fitted_on`, tested on `tested_on`.

    Values are the actions where both are labelled (standardised within each, since units and scales of robots differ),
    and what moves inside the picture otherwise. None with one embodiment only.
    """
    names = embodiment_of(sample)
    if len(np.unique(names)) < 2:
        return None
    features, (_, sequence) = one_hot(codes, codebook_size), np.unique(codes, axis=0, return_inverse=True)
    rows = []
    for fitted_on, tested_on in permutations(dict.fromkeys(names.tolist()), 2):
        both = (names == fitted_on, names == tested_on)
        labelled = all((mask & sample.labelled).sum() >= MIN_PAIRS for mask in both)
        usable = sample.labelled if labelled else np.ones(len(sample), dtype=bool)
        fitted, tested = (mask & usable for mask in both)
        if min(fitted.sum(), tested.sum()) < MIN_PAIRS:
            continue
        values = np.array(sample.target if labelled else motion.inner)
        for mask in (fitted, tested):
            deviation = values[mask].std(axis=0)
            values[mask] = (values[mask] - values[mask].mean(axis=0)) / np.where(deviation > 0, deviation, 1)
        across, within = _transfer(features, values, sample.group, fitted, tested)
        rows.append(
            {
                "fitted_on": fitted_on,
                "tested_on": tested_on,
                "values": "actions" if labelled else "motion in the picture",
                "r2": across,
                "r2_within": within,
                "direction": direction_agreement(sequence.ravel(), values, sample.group, fitted, tested),
            }
        )
    return rows
