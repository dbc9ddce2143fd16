"""Comparing finished evaluations: policies on the same starts, and methods over training seeds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lapa.data.atomic_files import write_atomically
from lapa.evaluation.evaluate import ROLLOUTS_FILE, SETTINGS_FILE, read_entries
from lapa.evaluation.evaluation_report import percent
from lapa.evaluation.statistics import (
    compare_paired,
    hierarchical_bootstrap,
    paired_difference,
    seeds_estimate,
    subtask_standard_error,
    success_cell,
)

Outcomes = dict[str, list[bool]]


def read_outcomes(folder: Path) -> tuple[dict[str, Any], Outcomes, dict[str, list[int]]]:
    """
    Suite, outcomes per cell in the order of the starts, and the seeds of these.

    Raises:
        ValueError: A folder without an evaluation, or with one that has not come to its end.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file() or not (folder / ROLLOUTS_FILE).is_file():
        raise ValueError(f"`compare` ({folder}) holds no evaluation: {SETTINGS_FILE} or {ROLLOUTS_FILE} is missing.")
    settings = json.loads(path.read_text(encoding="utf-8"))
    suite, wanted = settings["suite"], settings["played"]["rollouts"]
    entries = sorted(read_entries(folder / ROLLOUTS_FILE).items(), key=lambda entry: entry[0][1])
    rows: dict[str, list[dict[str, Any]]] = {f"{cell['group']}/{cell['task']}": [] for cell in suite["cells"]}
    for (cell, _), played in entries:
        rows[cell] += played
    short = [cell for cell, played in rows.items() if len(played) != wanted]
    if short:
        raise ValueError(
            f"`compare` ({folder}) is not complete: {short[0]} has {len(rows[short[0]])} of {wanted} rollouts."
        )
    outcomes = {cell: [bool(row["success"]) for row in played] for cell, played in rows.items()}
    return suite, outcomes, {cell: [row["seed"] for row in played] for cell, played in rows.items()}


def group_methods(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Folders by method: `NAME` or `NAME-seed-K` are trainings of NAME, in the order of K."""
    methods: dict[str, list[Path]] = {}
    for folder in sorted(folders, key=lambda path: (len(path.name), path.name)):
        methods.setdefault(folder.name.split("-seed-")[0], []).append(folder)
    # In the order in which they were named.
    order = list(dict.fromkeys(folder.name.split("-seed-")[0] for folder in folders))
    return {name: methods[name] for name in order}


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """
    Success of each method over its trainings, and how the first method compares with each other one.

    Args:
        folders: Of finished evaluations of one suite; `NAME-seed-K` are several trainings of a method.

    Returns:
        `methods` (per cell and in all: the pooled cell, the estimate over seeds, the two-level bootstrap beside it, and the
        published kind of standard error over tasks), and `comparisons` of the first with each other method.

    Raises:
        ValueError: Different suites or starts, or only one method.
    """
    methods = group_methods(folders)
    if len(methods) < 2:
        raise ValueError(f"`compare` needs at least two methods, got {', '.join(methods)}.")
    read = {name: [read_outcomes(folder) for folder in paths] for name, paths in methods.items()}
    runs = {name: [outcomes for _, outcomes, _ in found] for name, found in read.items()}
    suites = [suite for found in read.values() for suite, _, _ in found]
    starts = [seeds for found in read.values() for _, _, seeds in found]
    if any(suite != suites[0] for suite in suites) or any(seeds != starts[0] for seeds in starts):
        raise ValueError("`compare` needs evaluations of the same suite and the same starts.")
    names = list(methods)
    return {
        "suite": suites[0]["name"],
        "methods": {name: _method(runs[name]) for name in names},
        "comparisons": {
            f"{names[0]} against {other}": _comparison(runs[names[0]], runs[other]) for other in names[1:]
        },
    }


def _pooled(run: Outcomes) -> list[bool]:
    return [outcome for values in run.values() for outcome in values]


def _method(runs: Sequence[Outcomes]) -> dict[str, Any]:
    def entry(outcomes: Sequence[Sequence[bool]]) -> dict[str, Any]:
        return {
            "seeds": len(outcomes),
            **success_cell(value for seed in outcomes for value in seed),
            "over_seeds": seeds_estimate(outcomes).to_dict(),
            "two_level_bootstrap": hierarchical_bootstrap(outcomes).to_dict(),
        }

    cells = {cell: entry([run[cell] for run in runs]) for cell in runs[0]}
    pooled = entry([_pooled(run) for run in runs])
    if len(cells) > 1:
        pooled["standard_error_over_tasks"] = subtask_standard_error([cell["success"] for cell in cells.values()])
    return {"cells": cells, "all": pooled}


def _comparison(first: Sequence[Outcomes], second: Sequence[Outcomes]) -> dict[str, Any]:
    def entry(ours: Sequence[Sequence[bool]], theirs: Sequence[Sequence[bool]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if len(ours) == len(theirs):
            result["difference"] = paired_difference(ours, theirs).to_dict()
        if len(ours) == len(theirs) == 1:
            result |= compare_paired(ours[0], theirs[0]).to_dict()
        return result

    cells = {cell: entry([run[cell] for run in first], [run[cell] for run in second]) for cell in first[0]}
    return {"cells": cells, "all": entry([_pooled(run) for run in first], [_pooled(run) for run in second])}


def comparison_markdown(report: Mapping[str, Any]) -> str:
    """The comparison as Markdown tables."""
    lines = [
        f"# {report['suite']}: {', '.join(report['methods'])}",
        "",
        "Success in %. With several trainings the interval is Student's over trainings, else Wilson's over rollouts. "
        "± is the published kind of standard error, over tasks.",
        "",
    ]
    cells = list(next(iter(report["methods"].values()))["cells"])
    lines += [
        "| method | seeds | " + " | ".join([*cells, "all"]) + " | ± over tasks |",
        "|---" * (len(cells) + 4) + "|",
    ]
    for name, method in report["methods"].items():
        entries = [*method["cells"].values(), method["all"]]
        shown = [percent(e["over_seeds"], "value") for e in entries]
        error = method["all"].get("standard_error_over_tasks")
        published = "" if error is None else f"{100 * error:.1f}"
        lines.append(f"| {name} | {method['all']['seeds']} | {' | '.join(shown)} | {published} |")
    lines += ["", "| comparison, all cells | difference, points | win / tie / loss | McNemar p |", "|---|---|---|---|"]
    for name, comparison in report["comparisons"].items():
        entry = comparison["all"]
        difference = entry.get("difference")
        points = "" if difference is None else percent(difference, "value")
        counts = f"{entry['wins']} / {entry['ties']} / {entry['losses']}" if "wins" in entry else ""
        p_value = f"{entry['mcnemar_p']:.2g}" if "mcnemar_p" in entry else ""
        lines.append(f"| {name} | {points} | {counts} | {p_value} |")
    return "\n".join(lines) + "\n"


def write_comparison(folders: Sequence[Path], output: Path) -> int:
    """Writes `comparison.json` and `comparison.md`, and prints the tables."""
    report = compare(folders)
    output.mkdir(parents=True, exist_ok=True)
    text = comparison_markdown(report)
    write_atomically(output / "comparison.json", json.dumps(report, indent=1).encode())
    write_atomically(output / "comparison.md", text.encode())
    print(text)
    return 0


__all__ = ["compare", "comparison_markdown", "group_methods", "read_outcomes", "write_comparison"]
