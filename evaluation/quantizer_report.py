"""Measures how good a latent action quantizer is: numbers, and what the pictures of the report are drawn from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lapa.data.episode_source import OnError, raise_error
from lapa.data.mixture import FramePairSource
from lapa.evaluation.quantizer_report_directions import (
    label_confusions,
    leakage,
    motion_confusions,
    shift_intervention,
)
from lapa.evaluation.quantizer_report_embodiments import consistency
from lapa.evaluation.quantizer_report_measures import (
    Encoded,
    Runner,
    code_statistics,
    encode_sample,
    reconstruction_errors,
    reconstruction_summary,
    scene_statistics,
)
from lapa.evaluation.quantizer_report_motion import PairMotion, measure_motion
from lapa.evaluation.quantizer_report_probes import MIN_PAIRS, action_probes
from lapa.evaluation.quantizer_report_sample import PairSample, sample_pairs
from lapa.evaluation.quantizer_report_verdict import judge
from lapa.training.label_latent_actions import check_has_codes

# A few thousand pairs bring every interval to a few hundredths; more is slower only.
DEFAULT_MAX_PAIRS = 2000


@dataclass
class Measured:
    """
    Everything that was found.

    Args:
        report: What `report.json` holds.
        sample: The pairs.
        encoded: Their codes.
        motion: What moves in them.
        runner: The quantizer.
    """

    report: dict[str, Any]
    sample: PairSample
    encoded: Encoded
    motion: PairMotion
    runner: Runner


def measure_quantizer(
    runner: Runner,
    sources: Sequence[FramePairSource],
    max_pairs: int = DEFAULT_MAX_PAIRS,
    seed: int = 0,
    target: str = "action",
    last_episodes: int | None = None,
    on_error: OnError = raise_error,
) -> Measured:
    """
    Judges a quantizer on pairs of some sources.

    Args:
        runner: The quantizer.
        sources: One, or several to compare embodiments.
        max_pairs, seed, target, last_episodes, on_error: See `sample_pairs`.

    Raises:
        ValueError: Sources that give no pair, an argument out of range, a quantizer without codes.
    """
    config = runner.quantizer.config
    check_has_codes(config)
    sample = sample_pairs(sources, config.image_height_width, max_pairs, seed, target, last_episodes, on_error)
    encoded = encode_sample(runner, sample)
    codes, motion = encoded.codes, measure_motion(sample)
    report: dict[str, Any] = {
        "measured_on": measured_on(sample, max_pairs, seed, target, last_episodes),
        "quantizer": {
            name: getattr(config, name)
            for name in (
                "quantizer",
                "codebook_size",
                "num_latent_tokens",
                "codebook_dim",
                "image_size",
                "align_frames",
            )
        },
        "codes": code_statistics(codes, config.codebook_size),
        "reconstruction": reconstruction_summary(reconstruction_errors(runner, sample, codes), sample.group),
        "probe": probes(sample, encoded, config.codebook_size),
        "confusions": {
            "actions": label_confusions(sample, codes, target),
            "picture": motion_confusions(motion, codes, sample.group),
        },
        "leakage": {
            **scene_statistics(sample, encoded),
            **leakage(sample, codes, motion, config.codebook_size),
            "shifted_stills": shift_intervention(runner, sample),
        },
        "embodiments": consistency(sample, codes, motion, config.codebook_size),
    }
    report["verdict"] = judge(report)
    return Measured(report, sample, encoded, motion, runner)


def measured_on(
    sample: PairSample, max_pairs: int, seed: int, target: str, last_episodes: int | None
) -> dict[str, Any]:
    """Which pairs the numbers are of."""
    labelled = sample.labelled
    return {
        "num_pairs": len(sample),
        "max_pairs": max_pairs,
        "seed": seed,
        "target": target,
        "last_episodes": last_episodes,
        "labelled_pairs": int(labelled.sum()),
        "target_names": list(sample.target_names),
        "intervals_over": sample.grouping,
        "num_groups": len(np.unique(sample.group)),
        "sources": [
            {
                "name": source.name,
                "embodiment": source.embodiment,
                "pairs": int((sample.source == index).sum()),
                "labelled_pairs": int(labelled[sample.source == index].sum()),
                "episodes": source.num_episodes,
                "episodes_available": source.available_episodes,
                "frame_gap": source.frame_gap,
                "skipped_episodes": dict(source.counts.skipped_groups),
                "dropped_pairs": dict(source.counts.dropped_items),
            }
            for index, source in enumerate(sample.sources)
        ],
    }


def probes(sample: PairSample, encoded: Encoded, codebook_size: int) -> dict[str, Any]:
    """`action_probes` on the pairs that have actions; None for each where there are too few."""
    rows = sample.labelled
    if rows.sum() < MIN_PAIRS or len(np.unique(sample.group[rows])) < 2:
        return {"linear": None, "mlp": None, "embeddings": None, "shuffled": None, "names": list(sample.target_names)}
    found = action_probes(
        encoded.codes[rows], encoded.embeddings[rows], sample.target[rows], sample.group[rows], codebook_size
    )
    return {**found, "names": list(sample.target_names)}
