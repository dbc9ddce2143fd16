"""The verdict on a quantizer: one table of thresholds, and which of them are met."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GOOD, USABLE, BAD = "good", "usable", "bad"
LEVELS = (BAD, USABLE, GOOD)

Report = dict[str, Any]


@dataclass(frozen=True)
class Criterion:
    """
    One line of the verdict.

    Args:
        name: Key in the report.
        asks: The question, for people.
        measure: From the report the number that is judged; None where it could not be measured.
        good, usable: What the number must reach for each level. `usable` None: missing it never makes a quantizer bad.
        higher_is_better: Otherwise the number must stay at or below.
        advice: What a failure usually means and what to try.
    """

    name: str
    asks: str
    measure: Callable[[Report], float | None]
    good: float
    usable: float | None
    advice: str
    higher_is_better: bool = True

    def level(self, value: float) -> str:
        """`good`, `usable` or `bad`."""
        sign = 1 if self.higher_is_better else -1
        if sign * value >= sign * self.good:
            return GOOD
        return USABLE if self.usable is None or sign * value >= sign * self.usable else BAD


def _low(cell: dict[str, Any] | None) -> float | None:
    """
    Lower end of the interval: a claim has to hold beyond chance. The value itself where there is no interval, None where
    there is no value: nothing varied that it is a share of.
    """
    if cell is None or cell["value"] is None or not math.isfinite(cell["value"]):
        return None
    low = cell["ci95"][0]
    return float(cell["value"] if low is None or not math.isfinite(low) else low)


def _usage(report: Report) -> float:
    codes = report["codes"]
    drawn = codes["num_pairs"] * codes["num_latent_tokens"]
    # Even a uniform draw leaves some codes of a large codebook out when the pairs are few.
    reachable = 1 - (1 - 1 / codes["codebook_size"]) ** drawn
    return min(1.0, codes["usage"] / reachable)


def _sequence_perplexity(report: Report) -> float:
    codes = report["codes"]
    return min(1.0, float(codes["sequences"]["perplexity"] / min(codes["codebook_size"], codes["num_pairs"])))


def _tells_motion(report: Report) -> float | None:
    """From the actions where there are any, from the picture otherwise."""
    probes = report["probe"]
    if probes["linear"] is not None:
        found = [low for name in ("linear", "mlp") if (low := _low(probes[name]["r2"])) is not None]
        return max(found, default=None)
    inner = report["leakage"]["inner_motion"]
    return None if inner is None else _low(inner["r2"])


def _camera_share(report: Report) -> float | None:
    share = report["leakage"]["camera_share"]
    return None if share is None else share["value"]


def _transfer(report: Report) -> float | None:
    rows = [row["direction"]["cosine"]["value"] for row in report["embodiments"] or () if row["direction"]]
    return min(rows) if rows else None


# How each number is measured: docs/quantizer_report.md. The thresholds were set on trained and spoilt quantizers of the
# tabletop; docs/quantizer_report.md says which, and which kinds of bad were kept out of that.
CRITERIA: tuple[Criterion, ...] = (
    Criterion(
        "usage",
        "Are the codes in use? Share of the codebook that occurs, of what so many pairs can reach.",
        _usage,
        good=0.9,
        usable=0.5,
        advice="codes died: re-seed unused ones during training, or use quantizer: fsq",
    ),
    Criterion(
        "sequence_perplexity",
        "Are they used evenly? Perplexity of whole code sequences, as a share of the codebook size, at most 1.",
        _sequence_perplexity,
        good=0.5,
        usable=0.25,
        advice="few sequences carry all pairs: the codebook is collapsing, or each token always says the same",
    ),
    Criterion(
        "decoder_uses_codes",
        "Does the decoder use the codes? Error that the true codes save beside those of another pair, as a share of how much "
        "the frames differ (lower end of the interval).",
        lambda report: _low(report["reconstruction"]["gain_from_codes"]),
        good=0.1,
        usable=0.02,
        advice="the decoder makes little of the codes, or contradicts them, so the frames did not shape them; on held-out pairs only: too little data",
    ),
    Criterion(
        "beats_copying",
        "Does it predict the second frame better than the first frame does? Error saved beside copying (lower end of the "
        "interval).",
        lambda report: _low(report["reconstruction"]["gain_over_copy_first_frame"]),
        good=0.02,
        # A decoder that blurs loses to copying although its codes may be fine.
        usable=None,
        advice="train longer, or with residual_decoding: true",
    ),
    Criterion(
        "tells_motion",
        "Do the codes tell what happens? R² of the better probe from codes to actions, or to the motion inside the picture "
        "where there are no actions (lower end of the interval).",
        _tells_motion,
        good=0.1,
        usable=0.02,
        advice="the codes describe something other than the motion, or too few pairs were given to tell",
    ),
    Criterion(
        "independent_of_scene",
        "Do the codes depend on what happens rather than on the scene? Agreement, beyond chance, with the codes of the first "
        "frame beside itself, in which nothing happens.",
        lambda report: report["leakage"]["still_agreement"]["value"],
        good=0.3,
        usable=0.6,
        higher_is_better=False,
        advice="the codes name the scene: background, lighting, time within the episode",
    ),
    Criterion(
        "not_the_camera",
        "Do the codes tell what moves rather than how the camera moves? R² of the camera's shift, as a share of that plus R² "
        "of the motion inside the picture.",
        _camera_share,
        good=0.5,
        usable=0.8,
        higher_is_better=False,
        advice="the codes follow the camera: train with align_frames: true if it was not, filter the video, or take sources with a still camera",
    ),
    Criterion(
        "same_for_all_bodies",
        "Do codes mean the same for different bodies? Mean cosine between the motions of a code, for the worst pair of "
        "embodiments.",
        _transfer,
        good=0.5,
        # A quantizer of one body is of use for that body.
        usable=None,
        advice="codes are particular to the embodiment: train on both together",
    ),
)


def judge(report: Report) -> dict[str, Any]:
    """
    The verdict on a report.

    Returns:
        `level` (the worst of all criteria), `score` (mean over the criteria of 1 for good, 0.5 for usable, 0 for bad: it
        orders quantizers of one level), `criteria` (each with `value`, `level` and its thresholds), `reasons` (one per
        criterion that is not good, the worst first) and `not_measured`.
    """
    lines, missing = [], []
    for criterion in CRITERIA:
        value = criterion.measure(report)
        if value is None:
            missing.append(criterion.name)
            continue
        lines.append(
            {
                "name": criterion.name,
                "asks": criterion.asks,
                "value": float(value),
                "level": criterion.level(value),
                "good": criterion.good,
                "usable": criterion.usable,
                "higher_is_better": criterion.higher_is_better,
                "advice": criterion.advice,
            }
        )
    lines_by_level = sorted(
        (line for line in lines if line["level"] != GOOD), key=lambda line: LEVELS.index(line["level"])
    )
    return {
        "level": min((line["level"] for line in lines), key=LEVELS.index),
        "score": sum(LEVELS.index(line["level"]) for line in lines) / (2 * len(lines)),
        "reasons": [_reason(line) for line in lines_by_level],
        "criteria": lines,
        "not_measured": missing,
    }


def _reason(line: dict[str, Any]) -> str:
    needed = line["usable"] if line["level"] == BAD else line["good"]
    side = "at least" if line["higher_is_better"] else "at most"
    level = USABLE if line["level"] == BAD else GOOD
    return f"{line['name']} is {line['value']:.3g}, {side} {needed:g} is needed to be {level}: {line['advice']}."


def reaches(level: str, wanted: str) -> bool:
    """Whether a verdict is at least as good as another."""
    return LEVELS.index(level) >= LEVELS.index(wanted)
