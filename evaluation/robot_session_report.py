"""The report of a real-robot evaluation: names revealed, partial credits with intervals, policies compared in pairs."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from lapa.data.atomic_files import write_atomically
from lapa.evaluation.evaluation_report import percent, versions
from lapa.evaluation.robot_session import NotNow, RobotSession
from lapa.evaluation.robot_session_file import type_title
from lapa.evaluation.statistics import compare_credits, compare_paired, credit_interval, success_cell

Rows = Sequence[Mapping[str, Any]]


def session_report(session: RobotSession) -> dict[str, Any]:
    """
    The tables of a session that is ended.

    Returns:
        `policies`, each with `all`, `types`, `tasks` and `cells` (task, then type), whose entries hold `rollouts`, the mean
        partial `credit` (`{value, ci95}`) and `full` successes (a cell with its Wilson interval); `comparisons` of every two
        policies on the same initial positions, in all and by type and task; `places`, which shows that no policy had a place
        in the order to itself; and `rows`, every run with what it was given.

    Raises:
        NotNow: A session that is not ended: its report would tell the scorer which policy is which.
    """
    if not session.state.ended:
        raise NotNow("the session is not ended: its report would tell which policy is which.")
    rows = _rows(session)
    names = [policy.name for policy in session.session.policies]
    return {
        "session": session.session.name,
        "seed": session.seed,
        "complete": len(rows) == len(session.runs),
        "runs": len(rows),
        "runs_planned": len(session.runs),
        "positions": len(session.session.trials),
        "runs_repeated": session.state.repeats,
        "scores_taken_back": session.state.undone,
        "credits": {task: {f"{c.score:g}": c.text for c in steps} for task, steps in session.session.credits.items()},
        "policies": {
            policy.name: {
                "location": policy.location,
                "options": dict(policy.options),
                "fingerprint": session.fingerprints[policy.name],
                **_tables([row for row in rows if row["policy"] == policy.name]),
            }
            for policy in session.session.policies
        },
        "comparisons": {
            f"{one} against {other}": _comparison(rows, one, other) for one, other in combinations(names, 2)
        },
        "places": _places(rows, names),
        "rows": rows,
        "published": dict(session.session.published or {}),
        "versions": versions(),
    }


def _rows(session: RobotSession) -> list[dict[str, Any]]:
    return [
        {
            "run": run.name,
            "position": run.position + 1,
            "place": run.label,
            "task": run.trial.task,
            "type": run.trial.kind,
            "number": run.trial.number,
            "instruction": run.trial.instruction,
            "policy": run.policy.name,
            "credit": score.score,
            "note": score.note,
            "repeats": session.state.repeats.get(run.name, 0),
            "time": score.time,
        }
        for run, score in zip(session.runs, session.state.scores)
    ]


def _entry(rows: Rows) -> dict[str, Any]:
    credits = [row["credit"] for row in rows]
    return {
        "rollouts": len(rows),
        "credit": credit_interval(credits).to_dict(),
        "full": success_cell(credit == 1 for credit in credits),
    }


def _by(rows: Rows, key: str, make: Callable[[Rows], Any]) -> dict[str, Any]:
    return {value: make([row for row in rows if row[key] == value]) for value in _values(rows, key)}


def _values(rows: Iterable[Mapping[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _tables(rows: Rows) -> dict[str, Any]:
    if not rows:
        return {"all": None, "types": {}, "tasks": {}, "cells": {}}
    return {
        "all": _entry(rows),
        "types": _by(rows, "type", _entry),
        "tasks": _by(rows, "task", _entry),
        "cells": _by(rows, "task", lambda some: _by(some, "type", _entry)),
    }


def _comparison(rows: Rows, one: str, other: str) -> dict[str, Any]:
    """Two policies on the positions that both have played."""
    credits = {(row["position"], row["policy"]): row["credit"] for row in rows}
    firsts = [row for row in rows if row["policy"] == one and (row["position"], other) in credits]

    def entry(some: Rows) -> dict[str, Any]:
        ours = [row["credit"] for row in some]
        theirs = [credits[row["position"], other] for row in some]
        told = compare_credits(ours, theirs).to_dict()
        told["sign_test_p"] = told.pop("mcnemar_p")
        full = compare_paired([credit == 1 for credit in ours], [credit == 1 for credit in theirs])
        return {"positions": len(some), **told, "full": full.to_dict()}

    if not firsts:
        return {"all": None, "types": {}, "tasks": {}}
    return {"all": entry(firsts), "types": _by(firsts, "type", entry), "tasks": _by(firsts, "task", entry)}


def _places(rows: Rows, names: Sequence[str]) -> dict[str, Any]:
    """Of each place in the order: mean credit over all policies, and how often each policy had it."""
    places = {}
    for place in sorted(_values(rows, "place")):
        some = [row for row in rows if row["place"] == place]
        counts = {name: sum(row["policy"] == name for row in some) for name in names}
        places[place] = {"credit": sum(row["credit"] for row in some) / len(some), "runs": counts}
    return places


def estimate_percent(estimate: Mapping[str, Any]) -> str:
    """`20.0 [15.9, 24.9]`, in percent, of `{value, ci95}`."""
    return percent(estimate, "value")


def _headline(report: Mapping[str, Any]) -> str:
    text = (
        f"{report['runs']} of {report['runs_planned']} runs over {report['positions']} initial positions, scored blind; "
        f"every position was played by all policies in a balanced order (seed {report['seed']})."
    )
    repeated = sum(report["runs_repeated"].values())
    text += f" Runs played again: {repeated}. Scores taken back: {report['scores_taken_back']}."
    return text if report["complete"] else f"{text} **The session was ended before all runs were scored.**"


def session_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    played = {name: policy for name, policy in report["policies"].items() if policy["all"]}
    kinds = list(dict.fromkeys(kind for policy in played.values() for kind in policy["types"]))
    lines = [
        f"# {report['session']}",
        "",
        _headline(report),
        "",
        "Mean partial credit in %, 95% intervals; one training each.",
        "",
    ]
    header = ["policy", *(type_title(kind) for kind in kinds), "all", "full success", "rollouts"]
    lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, policy in played.items():
        cells = [
            estimate_percent(policy["types"][kind]["credit"]) if kind in policy["types"] else "" for kind in kinds
        ]
        everything = policy["all"]
        cells += [estimate_percent(everything["credit"]), percent(everything["full"]), str(everything["rollouts"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| policy | task | type | partial credit | full success | rollouts |", "|---|---|---|---|---|---|"]
    for name, policy in played.items():
        for task, cells in policy["cells"].items():
            for kind, cell in cells.items():
                credit, full = estimate_percent(cell["credit"]), percent(cell["full"])
                lines.append(f"| {name} | {task} | {type_title(kind)} | {credit} | {full} | {cell['rollouts']} |")
    compared = {name: entry["all"] for name, entry in report["comparisons"].items() if entry["all"]}
    if compared:
        lines += ["", "On the same initial positions; the higher partial credit wins.", ""]
        lines += ["| comparison | win / tie / loss | difference, points | sign test p |", "|---|---|---|---|"]
    for name, entry in compared.items():
        counts = f"{entry['wins']} / {entry['ties']} / {entry['losses']}"
        lines.append(f"| {name} | {counts} | {estimate_percent(entry['difference'])} | {entry['sign_test_p']:.2g} |")
    if report["published"]:
        lines += ["", "Published numbers, of other policies on another robot; not comparable cell by cell:", ""]
        lines += [f"- {name}: {value}" for name, value in report["published"].items()]
    return "\n".join(lines) + "\n"


def write_session_report(session: RobotSession) -> Path:
    """
    Writes `report.json`, `report.md` and `report.html` into the folder of a session that is ended.

    Returns:
        The page.

    Raises:
        NotNow: A session that is not ended.
    """
    from lapa.evaluation.report import render

    report = session_report(session)
    page = session.output / "report.html"
    write_atomically(session.output / "report.json", json.dumps(report, indent=1).encode())
    write_atomically(session.output / "report.md", session_markdown(report).encode())
    html = render(
        "robot_session_report.html",
        report=report,
        headline=_headline(report).replace("**", ""),
        shown=estimate_percent,
        percent_of=percent,
        title=type_title,
    )
    write_atomically(page, html.encode())
    return page


__all__ = ["session_markdown", "session_report", "write_session_report"]
