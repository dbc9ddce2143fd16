"""From the finished jobs of a study to its numbers: cells, comparisons, trends, and where methods fail."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lapa.evaluation.comparison import read_outcomes
from lapa.evaluation.statistics import (
    hierarchical_bootstrap,
    intervals_overlap,
    paired_difference,
    seeds_estimate,
    subtask_standard_error,
    success_cell,
)
from lapa.evaluation.study import METHODS, Study
from lapa.evaluation.study_plan import Entry, Plan
from lapa.evaluation.study_runner import error_of, result_of

# What a stage reports of itself, by the role of its job: number, and how readers call it.
DIAGNOSIS = {
    "quantizer": {"final_loss": "quantizer loss"},
    "targets": {"motion_r2": "true motion in the codes, R²", "perplexity": "code perplexity",
                "video_r2": "pseudo actions on the video, R²"},
    "inverse_dynamics": {"held_out_r2": "inverse dynamics, R²"},
    "pretrain": {"held_out_accuracy": "stage 2, tokens right", "majority": "stage 2, most frequent token"},
    "chosen": {"held_out_accuracy": "stage 3, tokens right", "majority": "stage 3, most frequent token",
               "decoder_r2": "actions from true codes, R²"},
}  # fmt: skip

Outcomes = dict[str, list[bool]]
Key = tuple[str, str, str]  # method, column, point


def point_name(entry: Entry) -> str:
    """`series=value`, empty in a table."""
    return "" if entry.point is None else f"{entry.point.series}={entry.point.value:g}"


def of_split(outcomes: Outcomes, split: str) -> list[bool]:
    """Outcomes of all families of a split."""
    return [value for cell, values in outcomes.items() if cell.startswith(f"{split}/") for value in values]


class Results:
    """
    What a plan has led to so far.

    Attributes:
        outcomes: Per method, column and point the outcomes of every finished training seed, by cell of the suite.
        missing: Labels of trainings that are not played yet.
        failed: What jobs failed with, by label.
    """

    def __init__(self, plan: Plan, stages: Path) -> None:
        self.plan, self.study, self.stages = plan, plan.study, stages
        self.outcomes: dict[Key, dict[int, Outcomes]] = {}
        self.missing: list[str] = []
        # Several finetunings share a label: one that did not fail must not hide one that did.
        self.failed = {
            job.label: error for job in plan.jobs.values() if (error := error_of(stages, job.key)) is not None
        }
        self.entries: dict[Key, list[Entry]] = {}
        for entry in plan.entries:
            key = (entry.method, entry.column, point_name(entry))
            self.entries.setdefault(key, []).append(entry)
            outcomes = self._outcomes(entry.jobs["play"])
            if outcomes is None:
                self.missing.append(plan.jobs[entry.jobs["play"]].label.removeprefix("play "))
            else:
                self.outcomes.setdefault(key, {})[entry.seed] = outcomes

    def _outcomes(self, key: str) -> Outcomes | None:
        if result_of(self.stages, key) is None:
            return None
        return read_outcomes(self.stages / key / "evaluation")[1]

    def of_split(self, key: Key, split: str) -> list[list[bool]]:
        """Per seed the outcomes of all families of a split."""
        return [of_split(outcomes, split) for outcomes in self.outcomes.get(key, {}).values()]

    def cell(self, key: Key, split: str) -> dict[str, Any] | None:
        """A number of the table, with all intervals; None before anything was played."""
        seeds = self.of_split(key, split)
        if not seeds:
            return None
        families = {
            family: success_cell(
                value for outcomes in self.outcomes[key].values() for value in outcomes[f"{split}/{family}"]
            )
            for family in self.study.settings.families
        }
        rates = [family["success"] for family in families.values()]
        return {
            **success_cell(value for seed in seeds for value in seed),
            "seeds": sorted(self.outcomes[key]),
            "by_seed": [float(np.mean(seed)) for seed in seeds],
            "over_seeds": seeds_estimate(seeds).to_dict(),
            "two_level_bootstrap": hierarchical_bootstrap(seeds).to_dict(),
            "standard_error_over_tasks": subtask_standard_error(rates) if len(rates) > 1 else None,
            "families": families,
        }

    def baseline(self, name: str) -> dict[str, Any]:
        """Cells of a policy that is not learned, one per split; empty before it was played."""
        outcomes = self._outcomes(self.plan.baselines[name])
        if outcomes is None:
            return {}
        return {split: success_cell(of_split(outcomes, split)) for split in self.study.splits}

    def claims(self) -> list[dict[str, Any]]:
        """For every pair of methods that the study names, column by column: the difference and whether intervals part."""
        found = []
        for first, second in self.study.claims:
            for column, point in dict.fromkeys(key[1:] for key in self.outcomes):
                ours, theirs = (first, column, point), (second, column, point)
                for split in self.study.splits:
                    found += self._claim(ours, theirs, split)
        return found

    def _claim(self, ours: Key, theirs: Key, split: str) -> list[dict[str, Any]]:
        shared = sorted(set(self.outcomes.get(ours, {})) & set(self.outcomes.get(theirs, {})))
        if not shared:
            return []
        rows = {key: [of_split(self.outcomes[key][seed], split) for seed in shared] for key in (ours, theirs)}
        difference = paired_difference(rows[ours], rows[theirs])
        pooled = [success_cell(v for seed in rows[key] for v in seed) for key in (ours, theirs)]
        return [
            {
                "first": ours[0],
                "second": theirs[0],
                "column": ours[1],
                "point": ours[2],
                "split": split,
                "difference": difference.to_dict(),
                # One training says nothing about another.
                "holds_over_seeds": difference.low > 0 if len(shared) > 1 else None,
                "rollout_intervals_apart": pooled[0]["success"] > pooled[1]["success"]
                and not intervals_overlap(*pooled),
            }
        ]

    def diagnosis(self) -> list[dict[str, Any]]:
        """Per method, column and point: mean over seeds of what each stage says of itself."""
        rows = []
        for key, entries in self.entries.items():
            numbers: dict[str, list[float]] = {}
            for entry in entries:
                for role, names in DIAGNOSIS.items():
                    done = result_of(self.stages, self._job(entry, role)) if self._job(entry, role) else None
                    for name, label in names.items():
                        if done is not None and name in done["result"]:
                            numbers.setdefault(label, []).append(float(done["result"][name]))
            if numbers:
                means = {label: float(np.mean(values)) for label, values in numbers.items()}
                rows.append({"method": key[0], "column": key[1], "point": key[2], **means})
        return rows

    def _job(self, entry: Entry, role: str) -> str:
        if role != "chosen":
            return entry.jobs.get(role, "")
        choice = result_of(self.stages, entry.jobs["choose"])
        return "" if choice is None else entry.jobs[choice["result"]["policy"]]

    def choices(self) -> list[dict[str, Any]]:
        """Which finetuning and temperature each training is played with."""
        rows = []
        for key, entries in self.entries.items():
            for entry in entries:
                done = result_of(self.stages, entry.jobs["choose"])
                if done is not None:
                    rows.append({"method": key[0], "column": key[1], "point": key[2], "seed": entry.seed}
                                | done["result"])  # fmt: skip
        return rows

    def devices(self) -> list[str]:
        """On which the jobs were done, as far as they recorded it; a GPU's policies are trained in bf16."""
        done = (result_of(self.stages, key) for key in self.plan.jobs)
        return sorted({job["device"] for job in done if job and "device" in job})

    def seconds(self) -> float:
        """Of one core, over all jobs of the plan."""
        done = [result_of(self.stages, key) for key in self.plan.jobs]
        return float(sum(job["seconds"] for job in done if job is not None))


def trends(results: Results) -> list[dict[str, Any]]:
    """Per series, method, column and split: success over the points, and a straight line through log2 of them."""
    found = []
    series = dict.fromkeys(point.series for point in results.study.points)
    for name in series:
        values = [point.value for point in results.study.points if point.series == name]
        for method in results.study.methods:
            for column in (column.name for column in results.study.columns):
                for split in results.study.splits:
                    found += _trend(results, name, values, method, column, split)
    return found


def _trend(
    results: Results, series: str, values: Sequence[float], method: str, column: str, split: str
) -> list[dict[str, Any]]:
    cells = {value: results.cell((method, column, f"{series}={value:g}"), split) for value in values}
    played = {value: cell for value, cell in cells.items() if cell is not None}
    if len(played) < 2:
        return []
    points = [
        {"value": value} | {name: cell[name] for name in ("success", "ci95", "over_seeds", "by_seed")}
        for value, cell in played.items()
    ]
    trend = {"series": series, "method": method, "column": column, "split": split, "points": points}
    return [trend | {"per_doubling": _slope(points)}]


def _slope(points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """
    Change of the success rate per doubling, least squares over all trainings, with Student's interval; `at_1` is where the line
    is at 1.
    """
    from scipy import stats

    x = np.log2([point["value"] for point in points for _ in point["by_seed"]])
    y = np.array([rate for point in points for rate in point["by_seed"]])
    if len(x) < 3:
        return None
    fit = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, len(x) - 2)) * float(fit.stderr)
    slope = float(fit.slope)
    return {"value": slope, "ci95": [slope - half, slope + half], "at_1": float(fit.intercept)}


def study_report(plan: Plan, stages: Path) -> dict[str, Any]:
    """The whole report as JSON keeps it; see docs/evaluation.md for its fields."""
    from lapa.evaluation.evaluation_report import versions

    study: Study = plan.study
    results = Results(plan, stages)
    cells = {
        "/".join(part for part in (*key, split) if part): results.cell(key, split)
        for key in results.outcomes
        for split in study.splits
    }
    return {
        "study": study.name,
        "title": study.title,
        "complete": not results.missing,
        "missing": results.missing,
        "failed": results.failed,
        "seeds": list(study.seeds),
        "rollouts_per_cell_and_seed": study.settings.rollouts_per_family * len(study.settings.families),
        "families": list(study.settings.families),
        "columns": [column.name for column in study.columns],
        "splits": list(study.splits),
        "methods": {name: METHODS[name].label for name in study.methods},
        "cells": cells,
        **{name: results.baseline(name) for name in plan.baselines},
        "claims": results.claims(),
        "trends": trends(results) if study.points else [],
        "diagnosis": results.diagnosis(),
        "choices": results.choices(),
        "published": dict(study.published),
        "settings": study.settings.to_dict(),
        "devices": results.devices(),
        "core_minutes": round(results.seconds() / 60, 1),
        "versions": versions(),
    }


__all__ = ["DIAGNOSIS", "Results", "study_report"]
