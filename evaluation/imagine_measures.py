"""Numbers of neural rollouts: picture errors over the horizon, and how well a judged picture tells success."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.evaluation.quantizer_report_statistics import bootstrap, mean_cell, ratio_gain_cell
from lapa.evaluation.statistics import success_cell

# Levels by which a pixel must differ from the first frame to count as changed: what compression and rounding leave is below.
CHANGED_LEVELS = 16
ALL_PIXELS, CHANGED_PIXELS = "all_pixels", "changed_pixels"
# What is compared with the simulator's frames; the last is the baseline.
IMAGINED, TRUE_CODES, ONE_STEP, COPY = "imagined", "true_codes", "one_step", "copy_first_frame"
PREDICTORS = (IMAGINED, TRUE_CODES, ONE_STEP, COPY)
# Balanced accuracy on true pictures below which a judge's word on generated ones means nothing.
JUDGE_THRESHOLD = 0.9
RESAMPLES = 1000


def frame_errors(drawn: NDArray[np.uint8], true: NDArray[np.uint8]) -> dict[str, NDArray[np.float64]]:
    """
    Errors of drawn frames against the true ones of the same rollout.

    Args:
        drawn: (steps, height, width, 3) uint8, frames 1 to `steps`.
        true: (steps + 1, height, width, 3) uint8, with the first frame.

    Returns:
        By kind of pixels (steps,) mean squared errors, pixels in [0, 1]: over all, and over those that differ from the first
        frame in the true frame; NaN there where nothing has changed.
    """
    squared = ((drawn.astype(np.float64) - true[1:]) ** 2).mean(-1) / 255**2
    changed = (np.abs(true[1:].astype(np.int64) - true[0]) > CHANGED_LEVELS).any(-1)
    counts = changed.sum((1, 2))
    inside = (squared * changed).sum((1, 2)) / np.where(counts == 0, np.nan, counts)
    return {ALL_PIXELS: squared.mean((1, 2)), CHANGED_PIXELS: inside}


def horizon_table(errors: Mapping[str, Sequence[NDArray[np.float64]]]) -> list[dict[str, Any]]:
    """
    Mean errors of each step with 95% intervals, over the episodes that reach it.

    Args:
        errors: By predictor, per episode the errors (steps,) of its steps; NaN where one has none. Baseline `copy_first_frame`
            is among them.

    Returns:
        Per step `{step, episodes, <predictor>: {value, ci95}, gain: {<predictor>: {value, ci95}}}`, the gain being
        `1 - error / copying's`. Intervals resample episodes; their ends are None with one episode.
    """
    longest = max(map(len, errors[COPY]), default=0)
    table = []
    for step in range(longest):
        rows = [number for number, row in enumerate(errors[COPY]) if len(row) > step and np.isfinite(row[step])]
        if not rows:
            continue
        values = {name: np.array([each[row][step] for row in rows]) for name, each in errors.items()}
        group = np.arange(len(rows))
        cells: dict[str, Any] = {name: mean_cell(value, group) for name, value in values.items()}
        gain = {name: ratio_gain_cell(values[name], values[COPY], group) for name in values if name != COPY}
        table.append({"step": step + 1, "episodes": len(rows), **cells, "gain": gain})
    return table


def agreement(predicted: Sequence[bool], actual: Sequence[bool], cells: Sequence[str] | None = None) -> dict[str, Any]:
    """
    How well one list of outcomes tells another.

    Args:
        predicted: Judged outcomes.
        actual: Outcomes in the simulator, of the same episodes.
        cells: Cell of each episode; all are of one where None.

    Returns:
        `table` (both solved, only predicted, only actual, neither), `accuracy`, `sensitivity` and `specificity` with Wilson
        intervals (the last two None where there are no such episodes), `balanced_accuracy` with an interval over resampled
        episodes (None where no cell has both outcomes), `majority`: how often the commoner outcome alone is right. Balanced
        accuracy is that within cells, by the weights of Mantel and Haenszel: to know which cell is easy tells nothing of an
        episode.
    """
    ours, theirs = np.asarray(predicted, dtype=bool), np.asarray(actual, dtype=bool)
    columns = np.stack([ours & theirs, theirs, ~ours & ~theirs, ~theirs], axis=1).astype(float)
    names, cell = np.unique(["" for _ in ours] if cells is None else list(cells), return_inverse=True)
    by_cell = columns[:, None, :] * (cell[:, None] == np.arange(len(names)))[:, :, None]
    balanced = None
    if (by_cell.sum(0)[:, [1, 3]] > 0).all(1).any():
        balanced = bootstrap(by_cell.reshape(len(ours), -1), _balanced, RESAMPLES)
    return {
        "table": {
            "both": int((ours & theirs).sum()),
            "only_predicted": int((ours & ~theirs).sum()),
            "only_actual": int((~ours & theirs).sum()),
            "neither": int((~ours & ~theirs).sum()),
        },
        "accuracy": success_cell((ours == theirs).tolist()),
        "sensitivity": success_cell(ours[theirs].tolist()) if theirs.any() else None,
        "specificity": success_cell((~ours[~theirs]).tolist()) if not theirs.all() else None,
        "balanced_accuracy": balanced,
        "majority": float(max(theirs.mean(), 1 - theirs.mean())),
    }


def _balanced(total: NDArray[np.float64]) -> NDArray[np.float64]:
    """From sums (..., 4 x cells) of both, actual, neither, not actual."""
    both, actual, neither, not_actual = np.moveaxis(total.reshape(*total.shape[:-1], -1, 4), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.nan_to_num(actual * not_actual / (actual + not_actual))
        of_cell = np.nan_to_num((both / actual + neither / not_actual) / 2)
        return np.asarray((weight * of_cell).sum(-1) / weight.sum(-1))


def tells_more_than_chance(found: Mapping[str, Any]) -> bool | None:
    """Whether the balanced accuracy of an `agreement` lies above 0.5 with its interval; None where it has none."""
    balanced = found["balanced_accuracy"]
    if balanced is None or balanced["ci95"][0] is None:
        return None
    return bool(balanced["ci95"][0] > 0.5)


def judge_score(
    predicted: Sequence[bool | None], actual: Sequence[bool], cells: Sequence[str] | None = None
) -> dict[str, Any]:
    """
    How well a judge tells success from pictures whose truth is known.

    Args:
        predicted: Its word per picture; None, which counts as not solved, where it finds a thing nowhere.
        actual: The truth.
        cells: See `agreement`.

    Returns:
        As `agreement`, and `lost`, the number of None.
    """
    found = agreement([bool(word) for word in predicted], actual, cells)
    return found | {"lost": sum(word is None for word in predicted)}


def can_judge(score: Mapping[str, Any]) -> bool:
    """Whether a judge is good enough on true pictures, by `JUDGE_THRESHOLD`."""
    balanced = score["balanced_accuracy"]
    return balanced is not None and balanced["value"] >= JUDGE_THRESHOLD


__all__ = [
    "ALL_PIXELS", "CHANGED_LEVELS", "CHANGED_PIXELS", "COPY", "IMAGINED", "JUDGE_THRESHOLD", "ONE_STEP", "PREDICTORS",
    "TRUE_CODES", "agreement", "can_judge", "frame_errors", "horizon_table", "judge_score", "tells_more_than_chance",
]  # fmt: skip
