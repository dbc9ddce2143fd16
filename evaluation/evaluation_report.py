"""The report of an evaluation: JSON, Markdown and one HTML page."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lapa.data.atomic_files import write_atomically
from lapa.evaluation.evaluate import Evaluation, gif_name
from lapa.evaluation.policies import DO_NOTHING
from lapa.evaluation.suites import Suite

PACKAGES = ("lapa", "torch", "transformers", "numpy", "gymnasium")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def percent(cell: Mapping[str, Any], name: str = "success") -> str:
    """`20.0 [15.9, 24.9]`, in percent: `cell[name]` with its interval."""
    low, high = cell["ci95"]
    return f"{100 * cell[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def print_table(report: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> None:
    """The table on the terminal."""
    header = f"{'cell':32}{'success, % [95% interval]':>28}{'rollouts':>10}{'do nothing, %':>16}"
    print("\n" + header)
    for kind in ("cells", "groups"):
        for name, cell in report[kind].items():
            still = (baseline or {}).get(kind, {}).get(name)
            nothing = "" if still is None else f"{100 * still['success']:.1f}"
            broken = "".join(f"  {cell[how]} {how}" for how in ("crashed", "hung", "restarted") if cell[how])
            label = name if kind == "cells" else f"all of {name}"
            print(f"{label:32}{percent(cell):>28}{cell['rollouts']:>10}{nothing:>16}{broken}")


def markdown(report: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    baseline = report.get(DO_NOTHING) or {}
    lines = [
        f"# {report['suite']}: {report['policy']}",
        "",
        f"{report['rollouts_per_cell']} rollouts per cell; success in %, Wilson 95% intervals; one policy, one training. "
        "A crashed or hung environment counts as not solved.",
        "",
        "| cell | success | rollouts | do nothing | crashed | hung |",
        "|---|---|---|---|---|---|",
    ]
    for kind in ("cells", "groups"):
        for name, cell in report[kind].items():
            still = baseline.get(kind, {}).get(name)
            nothing = "" if still is None else f"{100 * still['success']:.1f}"
            label = name if kind == "cells" else f"**all of {name}**"
            lines.append(
                f"| {label} | {percent(cell)} | {cell['rollouts']} | {nothing} | {cell['crashed']} | {cell['hung']} |"
            )
    restarted = sum(cell["restarted"] for cell in report["cells"].values())
    if restarted:
        lines += [
            "",
            f"{restarted} episodes began again after another one had taken their simulator's process with it.",
        ]
    lines += _partial_results(report)
    if report["published"]:
        lines += [
            "",
            "Published numbers, of other policies in their own environments; not comparable cell by cell:",
            "",
        ]
        lines += [f"- {name}: {_in_words(value)}" for name, value in report["published"].items()]
    return "\n".join(lines) + "\n"


def _partial_results(report: Mapping[str, Any]) -> list[str]:
    """A table of what was reached at any step, beside what doing nothing reaches, in percent; no lines if nothing was."""
    still = (report.get(DO_NOTHING) or {}).get("cells", {})
    rows = [
        f"| {cell} | {name} | {percent(reached)} | {_reached_without(still.get(cell), name)} |"
        for cell, values in report["cells"].items()
        for name, reached in values.get("progress", {}).items()
    ]
    if not rows:
        return []
    header = ["| cell | partial result | reached | do nothing |", "|---|---|---|---|"]
    return ["", "Partial results that were reached at any step of an episode, in %:", "", *header, *rows]


def _reached_without(still: Mapping[str, Any] | None, name: str) -> str:
    """How often doing nothing reaches a partial result; a report leaves out what no episode reached."""
    if still is None:
        return ""
    return f"{100 * still.get('progress', {}).get(name, {'success': 0.0})['success']:.1f}"


def _in_words(published: Any) -> str:
    """A published row: `LAPA 57.3, VPT 51.0`."""
    if isinstance(published, Mapping):
        return ", ".join(f"{name} {value}" for name, value in published.items())
    return str(published)


def write_report(evaluation: Evaluation, baseline: Evaluation | None) -> dict[str, Any]:
    """
    Writes `report.json`, `report.md` and `report.html` into the folder of an evaluation.

    Args:
        evaluation: What was played.
        baseline: The same starts without doing anything.

    Returns:
        What the JSON file holds.
    """
    from lapa.evaluation import report as page

    suite, output = evaluation.suite, evaluation.output
    report = evaluation.report() | {
        "rollouts_per_cell": evaluation.settings.rollouts or suite.rollouts,
        "policy_identity": dict(evaluation.policy.identity),
        "published": dict(suite.published),
        "versions": versions(),
    }
    if baseline is not None:
        report[DO_NOTHING] = {name: baseline.report()[name] for name in ("cells", "groups")}
    write_atomically(output / "report.json", json.dumps(report, indent=1).encode())
    write_atomically(output / "report.md", markdown(report).encode())
    shown = _shown(suite, output, evaluation.log.outcomes(suite))
    published = {name: _in_words(value) for name, value in suite.published.items()}
    html = page.render(
        "evaluation_report.html",
        report=report,
        shown=shown,
        baseline=report.get(DO_NOTHING) or {},
        published=published,
    )
    write_atomically(output / "report.html", html.encode())
    return report


def _shown(suite: Suite, output: Path, outcomes: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Recorded episodes: cell, sentence, how it ended, and the animation."""
    from lapa.evaluation.report import data_uri

    rows = []
    for cell in suite.cells:
        for number, rollout in enumerate(outcomes[cell.name]):
            path = output / "rollouts" / gif_name(cell, number)
            if path.is_file():
                gif = data_uri(path.read_bytes(), "image/gif")
                rows.append({"cell": cell.name, "gif": gif, **rollout})
    return rows


__all__ = ["markdown", "percent", "print_table", "versions", "write_report"]
