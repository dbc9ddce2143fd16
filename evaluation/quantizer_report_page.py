"""Writes a report on a quantizer: `report.json` and a page that is one file."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from lapa.data.atomic_files import write_atomically
from lapa.evaluation import quantizer_report_figures as figures
from lapa.evaluation import report as page
from lapa.evaluation.quantizer_report import Measured

COLOURED = {"good": "ok", "usable": "fair", "bad": "fail"}


def number(value: float | None, digits: int = 3) -> str:
    """A number for people; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}g}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def with_interval(cell: dict[str, Any] | None, digits: int = 2) -> Markup:
    """Value and interval of a cell as HTML."""
    if cell is None or cell["value"] is None:
        return Markup("–")
    low, high = cell["ci95"]
    text = f"{cell['value']:.{digits}f}"
    if low is None:
        return Markup(text)
    return Markup(f'{text} <span class="ci">[{low:.{digits}f}, {high:.{digits}f}]</span>')


def finite(value: Any) -> Any:
    """The same with NaN and infinity as None: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def probe_rows(probes: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the table of probes."""
    if probes["linear"] is None:
        return []
    return [
        {"name": "linear, from codes", "cell": probes["linear"]},
        {"name": "MLP, from codes", "cell": probes["mlp"]},
        {"name": "linear, from embeddings before quantisation", "cell": probes["embeddings"]["linear"]},
        {"name": "MLP, from embeddings before quantisation", "cell": probes["embeddings"]["mlp"]},
        {"name": "linear, from codes of other pairs (chance)", "cell": probes["shuffled"]},
    ]


def scatters(measured: Measured) -> list[dict[str, Any]]:
    """Scatter of true actions per code for each labelled source, and of the motion in the picture."""
    sample, codes, found = measured.sample, measured.encoded.codes, []
    for index, source in enumerate(sample.sources):
        rows = sample.labelled & (sample.source == index)
        if rows.sum() and sample.target.shape[1] > 1:
            pair = figures.shown_dimensions(sample.target_names, sample.target[rows])
            labels = (sample.target_names[pair[0]], sample.target_names[pair[1]])
            found.append(
                {
                    "title": f"True actions of {source.name}, by code: {labels[0]} and {labels[1]}, the two dimensions "
                    "that vary most.",
                    "image": figures.code_scatter(codes[rows], sample.target[rows][:, pair], labels),
                }
            )
    found.append(
        {
            "title": "Motion of what moves inside the picture, measured without labels, by code.",
            "image": figures.code_scatter(
                codes, 100 * measured.motion.inner, ("to the right, % of the picture", "downwards, %"), invert_y=True
            ),
        }
    )
    return found


def verdict_sentence(verdict: dict[str, Any]) -> str:
    """One line above the table."""
    if not verdict["reasons"]:
        return "All criteria that could be measured are met."
    bad = sum(line["level"] == "bad" for line in verdict["criteria"])
    short = len(verdict["reasons"]) - bad
    return (
        f"Of {len(verdict['criteria'])} criteria measured, {bad} {'is' if bad == 1 else 'are'} not met at all and "
        f"{short} only in part."
    )


def render_report(measured: Measured) -> str:
    """The page."""
    report = measured.report
    codes, probes = measured.encoded.codes, report["probe"]
    return page.render(
        "quantizer_report.html",
        report=report,
        coloured=COLOURED,
        sentence=verdict_sentence(report["verdict"]),
        num=number,
        ci=with_interval,
        reconstructions=figures.reconstructions(measured),
        code_effects=figures.code_effects(measured),
        usage=figures.usage_bars(codes, report["codes"]["codebook_size"]),
        errors=figures.error_bars(report["reconstruction"]),
        probe_rows=probe_rows(probes),
        probe_bars=figures.probe_bars(probes) if probes["linear"] is not None else None,
        scatters=scatters(measured),
    )


def write_report(measured: Measured, output: str | Path) -> Path:
    """
    Writes both files, each whole or not at all.

    Returns:
        Path of the page.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output` is a file: {folder}.")
    measured.report = finite(measured.report)
    # Rendered before anything is written: a page that fails leaves the folder as it was.
    files = {"report.html": render_report(measured), "report.json": json.dumps(measured.report, indent=1)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomically(folder / name, text.encode())
    return folder / "report.html"
