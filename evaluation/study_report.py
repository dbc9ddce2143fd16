"""The report of a study: JSON, Markdown, and one HTML page with plots and animations."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lapa.data.atomic_files import write_atomically
from lapa.evaluation.evaluation_report import percent
from lapa.evaluation.study_plan import Plan
from lapa.evaluation.study_table import study_report

# What every table states beside the methods: what needs no learning.
BASELINES = {"do_nothing": "do nothing", "random": "random actions", "expert": "scripted expert"}
YES_OR_NO = {True: "yes", False: "no", None: "one training"}
COLOURS = {
    "scratch": "#cc8844",
    "unipi": "#9966aa",
    "vpt": "#55a868",
    "lapa": "#3366aa",
    "lapa-decoder": "#88bbee",
    "lapa-additive": "#c44e52",
    "lapa-additive-decoder": "#e79fa2",
    "lapa-additive-vq": "#ccb974",
    "lapa-additive-no-stop-gradient": "#64b5cd",
    "lapa-additive-keep-latent-head": "#8c613c",
    "actionvla": "#777777",
}


def table_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per method (and point), with a cell per column and split, and what was published for it."""
    rows = []
    points = dict.fromkeys(key.split("/")[2] for key in report["cells"] if key.count("/") == 3) or {"": None}
    for method, label in report["methods"].items():
        for point in points:
            cells = []
            for column in report["columns"]:
                for number, split in enumerate(report["splits"]):
                    name = "/".join(part for part in (method, column, point, split) if part)
                    published = report["published"].get(method, {})
                    value = published.get(column) if isinstance(published, Mapping) else None
                    cells.append({"cell": report["cells"].get(name), "published": value[number] if value else None})
            if any(entry["cell"] for entry in cells):
                rows.append({"method": method, "label": label, "point": point, "cells": cells})
    return rows


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown tables."""
    heads = [f"{column}, {split}" for column in report["columns"] for split in report["splits"]]
    single = len(report["seeds"]) == 1
    how = "Wilson's over rollouts (one training)" if single else "Student's over training seeds"
    lines = [
        f"# {report['title']}",
        "",
        f"Success in %; brackets: 95% intervals, {how}. {len(report['seeds'])} training seed(s) "
        f"({', '.join(map(str, report['seeds']))}), {report['rollouts_per_cell_and_seed']} rollouts per cell and seed "
        f"({', '.join(report['families'])}), the same starts for all methods. {report['core_minutes']:.0f} minutes of one core.",
        "",
    ]
    if not report["complete"]:
        lines += [f"**Not complete**: {len(report['missing'])} trainings are not played.", ""]
    if len(report["devices"]) > 1:
        lines += [
            f"Done on {', '.join(report['devices'])}: policies are trained in bf16 on a GPU and in fp32 elsewhere.",
            "",
        ]
    if report["failed"]:
        lines += [*(f"- failed: {label}: {error}" for label, error in report["failed"].items()), ""]
    lines += ["| method | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in table_rows(report):
        cells = [percent(entry["cell"]["over_seeds"], "value") if entry["cell"] else "" for entry in row["cells"]]
        lines.append(f"| {row['label']} {row['point']} | " + " | ".join(cells) + " |")
    for name, label in BASELINES.items():
        if report[name]:
            cells = [
                f"{100 * report[name][split]['success']:.1f}" for _ in report["columns"] for split in report["splits"]
            ]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += _published_lines(report, heads) + _claim_lines(report) + _family_lines(report) + _trend_lines(report)
    return "\n".join([*lines, *_diagnosis_lines(report)]) + "\n"


def _published_lines(report: Mapping[str, Any], heads: list[str]) -> list[str]:
    rows = [row for row in table_rows(report) if any(entry["published"] is not None for entry in row["cells"])]
    if not rows:
        return [""] + [f"Published: {name}: {value}" for name, value in report["published"].items()]
    lines = ["", "Published, of 7B models in Language Table; for orientation, not comparable with ours:", "",
             "| method | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]  # fmt: skip
    for row in rows:
        cells = ["" if entry["published"] is None else f"{entry['published']:.1f}" for entry in row["cells"]]
        lines.append(f"| {row['label']} (published) | " + " | ".join(cells) + " |")
    return lines


def _claim_lines(report: Mapping[str, Any]) -> list[str]:
    if not report["claims"]:
        return []
    paired = "starts" if len(report["seeds"]) == 1 else "seeds"
    lines = [
        "",
        f"| claim | where | difference, points (paired over {paired}) | over seeds | over rollouts |",
        "|---|---|---|---|---|",
    ]
    for claim in report["claims"]:
        where = ", ".join(part for part in (claim["column"], claim["point"], claim["split"]) if part)
        seeds, rollouts = (YES_OR_NO[claim[key]] for key in ("holds_over_seeds", "rollout_intervals_apart"))
        lines.append(f"| {report['methods'][claim['first']]} > {report['methods'][claim['second']]} | {where} | "
                     f"{percent(claim['difference'], 'value')} | {seeds} | {rollouts} |")  # fmt: skip
    lines += ["", "Over seeds: the interval of the paired difference is above 0. Over rollouts: Wilson's intervals of all rollouts "
              "do not touch, which says nothing about another training."]  # fmt: skip
    return lines


def _family_lines(report: Mapping[str, Any]) -> list[str]:
    lines = ["", "By family, all seeds (Wilson over rollouts; ± is the published kind of standard error, over families):", "",
             "| cell | " + " | ".join(report["families"]) + " | ± |", "|---" * (len(report["families"]) + 2) + "|"]  # fmt: skip
    for name, cell in report["cells"].items():
        error = cell["standard_error_over_tasks"]
        values = [percent(family) for family in cell["families"].values()]
        lines.append(f"| {name} | " + " | ".join(values) + f" | {'' if error is None else f'{100 * error:.1f}'} |")
    return lines


def _trend_lines(report: Mapping[str, Any]) -> list[str]:
    if not report["trends"]:
        return []
    lines = ["", "| series | method | where | success, % | points per doubling |", "|---|---|---|---|---|"]
    for trend in report["trends"]:
        points = ", ".join(f"{point['value']:g}: {100 * point['success']:.1f}" for point in trend["points"])
        slope = "" if trend["per_doubling"] is None else percent(trend["per_doubling"], "value")
        lines.append(
            f"| {trend['series']} | {trend['method']} | {trend['column']}, {trend['split']} | {points} | {slope} |"
        )
    return lines


def diagnosis_names(report: Mapping[str, Any]) -> list[str]:
    """What any stage says of itself, in the order of the stages."""
    where = ("method", "column", "point")
    return list(dict.fromkeys(name for row in report["diagnosis"] for name in row if name not in where))


def _diagnosis_lines(report: Mapping[str, Any]) -> list[str]:
    names = diagnosis_names(report)
    if not names:
        return []
    lines = ["", "What each stage says of itself, mean over seeds, on data it was not trained on (stage 2: its own targets):", "",
             "| method | where | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]  # fmt: skip
    for row in report["diagnosis"]:
        values = [f"{row[name]:.3g}" if name in row else "" for name in names]
        lines.append(f"| {row['method']} | {row['column']} {row['point']} | " + " | ".join(values) + " |")
    return lines


def trend_plots(report: Mapping[str, Any]) -> list[Any]:
    """
    One SVG per series: success over its values, a line per method and split, with the intervals of the table, a dot per training,
    and the fitted line, dashed.
    """
    from lapa.evaluation import report as page

    plots = []
    for series in dict.fromkeys(trend["series"] for trend in report["trends"]):
        plt = page.pyplot()
        figure, axes = plt.subplots(figsize=(3.6, 2.6))
        for trend in (trend for trend in report["trends"] if trend["series"] == series):
            values = [point["value"] for point in trend["points"]]
            heights = [100 * point["success"] for point in trend["points"]]
            ends = [[100 * point["over_seeds"]["ci95"][end] for point in trend["points"]] for end in (0, 1)]
            errors = [[max(0, sign * (end - height)) for end, height in zip(side, heights)]
                      for sign, side in zip((-1, 1), ends)]  # fmt: skip
            colour, marker = COLOURS[trend["method"]], "o" if trend["split"] == "seen" else "s"
            axes.errorbar(values, heights, yerr=errors, fmt=f"{marker}-", ms=4, lw=1.2, capsize=2, color=colour,
                          label=f"{report['methods'][trend['method']]}, {trend['split']}")  # fmt: skip
            if len(report["seeds"]) > 1:
                dots = [(point["value"], 100 * rate) for point in trend["points"] for rate in point["by_seed"]]
                axes.plot(*zip(*dots), marker, ms=2.5, color=colour, alpha=0.4)
            if fit := trend["per_doubling"]:
                line = [100 * (fit["at_1"] + fit["value"] * math.log2(value)) for value in values]
                axes.plot(values, line, "--", lw=1, color=colour, alpha=0.7)
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_xlabel(series)
        axes.set_ylabel("success, %")
        axes.set_ylim(bottom=0)
        # Beside lines that may lie anywhere no place within the axes is free.
        axes.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0.0, 1.0))
        plots.append(page.svg(figure))
    return plots


def table_plot(report: Mapping[str, Any]) -> Any:
    """Bars of every method in every column, with the intervals over seeds, as SVG."""
    from lapa.evaluation import report as page

    plt = page.pyplot()
    rows = table_rows(report)
    heads = [f"{column}\n{split}" for column in report["columns"] for split in report["splits"]]
    figure, axes = plt.subplots(figsize=(1.6 + 1.5 * len(heads), 2.8))
    width = 0.8 / max(1, len(rows))
    for index, row in enumerate(rows):
        for place, entry in enumerate(row["cells"]):
            if entry["cell"] is None:
                continue
            estimate = entry["cell"]["over_seeds"]
            value, (low, high) = 100 * estimate["value"], (100 * end for end in estimate["ci95"])
            axes.bar(place + (index - (len(rows) - 1) / 2) * width, value, width * 0.9,
                     yerr=[[max(0, value - low)], [max(0, high - value)]], color=COLOURS[row["method"]],
                     label=row["label"] if place == 0 else None, error_kw={"lw": 1})  # fmt: skip
    axes.set_xticks(range(len(heads)), heads)
    axes.set_ylabel("success, %")
    axes.set_ylim(bottom=0)
    # Below each other where one line would be wider than the figure.
    axes.legend(frameon=False, ncols=min(4, len(rows)), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return page.svg(figure)


def shown_rollouts(plan: Plan, stages: Path) -> list[dict[str, Any]]:
    """The first episode of every cell of the first seed: whose, where, and the animation."""
    from lapa.evaluation.report import data_uri

    shown = []
    for entry in plan.entries:
        if entry.seed != plan.study.seeds[0] or entry.point is not None:
            continue
        for path in sorted((stages / entry.jobs["play"] / "evaluation" / "rollouts").glob("*-000.gif")):
            cell = path.name.removesuffix("-000.gif")
            gif = data_uri(path.read_bytes(), "image/gif")
            shown.append({"method": entry.method, "column": entry.column, "cell": cell, "gif": gif})
    return shown


def write_study_report(plan: Plan, stages: Path, output: Path) -> dict[str, Any]:
    """Writes `report.json`, `report.md` and `report.html`, and returns what the first holds."""
    from lapa.evaluation import report as page

    report = study_report(plan, stages)
    text = markdown(report)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "report.json", json.dumps(report, indent=1).encode())
    write_atomically(output / "report.md", text.encode())
    plots = trend_plots(report) if report["trends"] else [table_plot(report)] if report["cells"] else []
    names = diagnosis_names(report)
    html = page.render(
        "study_report.html", report=report, rows=table_rows(report), plots=plots, diagnosis=names, percent=percent,
        shown=shown_rollouts(plan, stages), baselines=BASELINES, yes_or_no=YES_OR_NO,
    )  # fmt: skip
    write_atomically(output / "report.html", html.encode())
    return report


__all__ = ["markdown", "write_study_report"]
