"""Directions: which way each code means, whether it means the same for another body, and the camera's share in it."""

from typing import Any

import numpy as np

from lapa.data.schema import DELTA_END_EFFECTOR
from lapa.evaluation.quantizer_report_measures import Runner
from lapa.evaluation.quantizer_report_motion import PairMotion, synthetic_shift
from lapa.evaluation.quantizer_report_probes import (
    MIN_PAIRS,
    cross_predict,
    fit_linear,
    fold_of,
    one_hot,
    probe,
)
from lapa.evaluation.quantizer_report_sample import PairSample
from lapa.evaluation.quantizer_report_statistics import Cell, bootstrap, group_sums, mean_cell, r2_cell, ratio

# Of the action's names; the first is what a positive number means, in the frame the source's actions have.
# These are the usual ones of a robot's base: x away from it, y to its left, z up, a gripper that opens with 1.
END_EFFECTOR_DIRECTIONS = {
    "x": ("forward (+x)", "back (-x)"),
    "y": ("left (+y)", "right (-y)"),
    "z": ("up (+z)", "down (-z)"),
    "gripper": ("open", "close"),
}
# Motion of less than this share of its standard deviation has no direction.
DEAD_SHARE = 0.5
# The camera moves where its shift varies by more than this share of the picture's side.
MIN_SHIFT_DEVIATION = 0.004
SHIFT_SHARES = (1 / 16, 1 / 8)
MAX_INTERVENTION_FRAMES = 64


def majority_signs(codes: np.ndarray, sign: np.ndarray, group: np.ndarray) -> np.ndarray:
    """
    For each pair the sign that its code stands for in the other folds: that of most pairs of the code.

    With several tokens most sequences are too rare to count, so each code of each token votes, with the weights of a linear
    probe for the sign.

    Args:
        codes: (num_pairs, num_latent_tokens).
        sign: (num_pairs,) -1 or 1.
        group: (num_pairs,).

    Returns:
        (num_pairs,) -1 or 1; what is most frequent at all for a code that the other folds do not have.
    """
    if codes.shape[1] > 1:
        votes = cross_predict(one_hot(codes, int(codes.max()) + 1), sign[:, None], group, fit_linear)
        return np.asarray(np.where(votes[:, 0] >= 0, 1.0, -1.0))
    _, sequence = np.unique(codes, axis=0, return_inverse=True)
    sequence, fold = sequence.ravel(), fold_of(group)
    predicted = np.empty(len(sign))
    for number in np.unique(fold):
        inside = fold == number
        fitted = ~inside if not inside.all() else inside
        votes = np.bincount(sequence[fitted], weights=sign[fitted], minlength=sequence.max() + 1)
        usual = 1.0 if sign[fitted].sum() >= 0 else -1.0
        chosen = votes[sequence[inside]]
        predicted[inside] = np.where(chosen == 0, usual, np.sign(chosen))
    return predicted


def confusion(
    codes: np.ndarray, values: np.ndarray, group: np.ndarray, names: tuple[str, str]
) -> dict[str, Any] | None:
    """
    How often the code tells the sign of a motion.

    Args:
        codes: (num_pairs, num_latent_tokens).
        values: (num_pairs,) signed motion; NaN where unknown. Small ones are left out.
        group: (num_pairs,).
        names: Of a positive and a negative value.

    Returns:
        `names`, `table` (rows: true sign, columns: the code's majority), `accuracy` and `chance` (the more frequent
        sign every time); None where hardly any pair moves, or all move one way.
    """
    known = np.isfinite(values)
    moving = (
        known & (np.abs(np.nan_to_num(values)) > DEAD_SHARE * np.nan_to_num(values[known]).std())
        if known.any()
        else known
    )
    if moving.sum() < MIN_PAIRS or len(np.unique(np.sign(values[moving]))) < 2:
        return None
    sign = np.sign(values[moving])
    guess = majority_signs(codes[moving], sign, group[moving])
    table = [[int(((sign == true) & (guess == said)).sum()) for said in (1, -1)] for true in (1, -1)]
    return {
        "names": list(names),
        "table": table,
        "num_pairs": int(moving.sum()),
        "accuracy": mean_cell((sign == guess).astype(float), group[moving]),
        "chance": float(max((sign > 0).mean(), (sign < 0).mean())),
    }


def label_confusions(sample: PairSample, codes: np.ndarray, target: str) -> list[dict[str, Any]]:
    """Confusions of all dimensions that have a direction; the gripper by the change of its command."""
    rows, found = sample.labelled, []
    end_effector = sample.target_names == DELTA_END_EFFECTOR
    for index, name in enumerate(sample.target_names):
        values = sample.target[:, index]
        if name == "gripper" and target == "action":
            values = sample.gripper_change
        names = (f"+{name}", f"-{name}")
        if end_effector:
            names = END_EFFECTOR_DIRECTIONS.get(name, names)
        table = confusion(codes[rows], values[rows], sample.group[rows], names)
        if table is not None:
            found.append({"dimension": name, **table})
    return found


def motion_confusions(motion: PairMotion, codes: np.ndarray, group: np.ndarray) -> list[dict[str, Any]]:
    """Confusions of what moves inside the picture, which needs no labels."""
    found = []
    for axis, names in enumerate((("right", "left"), ("down", "up"))):
        table = confusion(codes, motion.inner[:, axis], group, names)
        if table is not None:
            found.append({"dimension": f"picture {'xy'[axis]}", **table})
    return found


def leakage(sample: PairSample, codes: np.ndarray, motion: PairMotion, codebook_size: int) -> dict[str, Any]:
    """
    How much the codes tell of the whole picture's shift, and of what moves inside it.

    Returns:
        `inner_motion` and `camera_shift`: linear probes as in `probe`, the latter None where the camera stands still.
        `camera_share`: R² of the shift, over that plus R² of the inner motion; None where the codes tell of neither.
        `compensated`: share of the squared difference that undoing the shift removes.
    """
    features = one_hot(codes, codebook_size)
    removed = bootstrap(
        group_sums(np.stack([motion.energy, motion.raw_energy], axis=1), sample.group),
        lambda total: 1 - ratio(total),
    )
    deviation = motion.shift.std(axis=0)
    result: dict[str, Any] = {
        "shift_deviation": deviation.tolist(),
        "camera_moves": bool(deviation.max() > MIN_SHIFT_DEVIATION),
        "compensated": removed,
        "camera_shift": None,
        "inner_motion": probe(features, motion.inner, sample.group, fit_linear) if motion.inner.any() else None,
        "camera_share": None,
    }
    if result["camera_moves"]:
        result["camera_shift"] = probe(features, motion.shift, sample.group, fit_linear)
        result["camera_share"] = camera_share(features, motion, sample.group)
    return result


def camera_share(features: np.ndarray, motion: PairMotion, group: np.ndarray) -> Cell | None:
    """R² of the shift, over that plus R² of the inner motion, negative ones as 0; None where both are below 0.01."""
    predictions = [cross_predict(features, values, group, fit_linear) for values in (motion.shift, motion.inner)]
    if max(r2_cell(p, v, group)["value"] or 0 for p, v in zip(predictions, (motion.shift, motion.inner))) < 0.01:
        return None
    columns = [np.ones((len(features), 1))]
    for predicted, values in zip(predictions, (motion.shift, motion.inner)):
        centred = values - values.mean(axis=0)
        columns += [
            ((predicted - values) ** 2).sum(axis=1, keepdims=True),
            centred,
            (centred**2).sum(1, keepdims=True),
        ]

    def share(total: np.ndarray) -> np.ndarray:
        count, explained = total[..., 0], []
        for start in (1, 5):
            spread = total[..., start + 3] - (total[..., start + 1 : start + 3] ** 2).sum(axis=-1) / count
            explained.append(np.clip(1 - total[..., start] / np.where(spread <= 0, np.nan, spread), 0, None))
        return np.asarray(explained[0] / (explained[0] + explained[1]))

    return bootstrap(group_sums(np.concatenate(columns, axis=1), group), share)


def shift_intervention(runner: Runner, sample: PairSample, seed: int = 0) -> dict[str, Any]:
    """
    Codes of pairs (frame, the same frame shifted): only the camera moves.

    Every chosen frame is shifted eight ways by two lengths.

    Returns:
        `responds`: share of the tokens whose code differs from that of the unshifted frame beside itself, and
        `direction_told`: how much better than chance the codes tell the shift's direction on frames that were not
        fitted (R² of a linear probe); `num_frames`.
    """
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.permutation(len(sample))[:MAX_INTERVENTION_FRAMES])
    frames = np.asarray(sample.frames[chosen, 0])
    still = runner.encode(np.stack([frames, frames], axis=1))[0]
    codes, shifts, rows = [], [], []
    side = min(frames.shape[1:3])
    for share in SHIFT_SHARES:
        length = max(1, round(share * side))
        for x, y in ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)):
            moved = synthetic_shift(frames, x * length, y * length)
            codes.append(runner.encode(np.stack([frames, moved], axis=1))[0])
            shifts.append(np.repeat([[x * length / side, y * length / side]], len(frames), axis=0))
            rows.append(np.arange(len(frames)))
    shifted, values, frame = np.concatenate(codes), np.concatenate(shifts), np.concatenate(rows)
    changed = (shifted != still[frame]).mean(axis=1)
    told = probe(one_hot(shifted, int(shifted.max()) + 1), values, frame, fit_linear)["r2"]
    return {"responds": mean_cell(changed, frame), "direction_told": told, "num_frames": len(frames)}
