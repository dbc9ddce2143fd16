"""The report of neural rollouts: JSON, Markdown, one HTML page, and animations side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont

from lapa.data.atomic_files import write_atomically
from lapa.evaluation import imagine_measures as measures
from lapa.evaluation import report as page
from lapa.evaluation.evaluation_report import versions
from lapa.evaluation.imagine_suite import ANY, LAST, OF_TRUE, OF_TRUE_CODES, SECOND, Compared, ImagineSuite

PANEL_HEIGHT, CAPTION_HEIGHT, MARGIN = 160, 16, 6
CAPTIONS = ("imagined", "true codes", "simulator")
LABELS = {
    measures.IMAGINED: "imagined: policy and decoder",
    measures.TRUE_CODES: "decoder alone, on the true codes",
    measures.ONE_STEP: "decoder, one step from the true frame",
    measures.COPY: "copy of the first frame",
}
COLOURS = {
    measures.IMAGINED: "#b3261e", measures.TRUE_CODES: "#3366aa", measures.ONE_STEP: "#5a9", measures.COPY: "#889"
}  # fmt: skip
WAYS = {
    LAST: "last imagined frame",
    ANY: "any imagined frame",
    OF_TRUE_CODES: "last frame drawn from the true codes",
    OF_TRUE: "last true frame (tests the judge)",
    SECOND: "a second play of the same policy",
}
KINDS = {measures.ALL_PIXELS: "all pixels", measures.CHANGED_PIXELS: "pixels that change"}
GIFS = "rollouts"


def number(cell: Mapping[str, Any] | None, scale: float = 1.0, digits: int = 1) -> str:
    """`20.0 [15.9, 24.9]` of a cell with `value` or `success`; an interval that is not known is left out."""
    if cell is None:
        return "-"
    value = cell["value"] if "value" in cell else cell["success"]
    low, high = cell["ci95"]
    if low is None:
        return f"{scale * value:.{digits}f}"
    return f"{scale * value:.{digits}f} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def side_by_side(episode: Compared, seconds: float) -> list[np.ndarray]:
    """
    An animation's frames: imagined on the left, drawn from the true codes, and the simulator's on the right.

    Where the simulator's episode has ended, its last frame stays.

    Args:
        episode: What is shown.
        seconds: Time between two frames.
    """
    scale = max(1, round(PANEL_HEIGHT / episode.true.shape[1]))
    height, width = (scale * side for side in episode.true.shape[1:3])
    font = ImageFont.load_default(size=11)
    frames = []
    for step in range(max(len(episode.imagined), len(episode.true))):
        ended = step >= len(episode.true) - 1
        shown = (episode.imagined, episode.told, episode.true)
        size = (3 * width + 2 * MARGIN, height + 2 * CAPTION_HEIGHT)
        canvas = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(canvas)
        for place, (caption, rows) in enumerate(zip(CAPTIONS, shown)):
            left, frame = place * (width + MARGIN), Image.fromarray(rows[min(step, len(rows) - 1)])
            canvas.paste(frame.resize((width, height), Image.Resampling.NEAREST), (left, CAPTION_HEIGHT))
            draw.text((left + 2, 1), caption, fill="black", font=font)
        ending = f"   simulator: {episode.rollout.ending.replace('_', ' ')}" if ended else ""
        draw.text((2, height + CAPTION_HEIGHT + 1), f"{step * seconds:.1f} s{ending}", fill="black", font=font)
        frames.append(np.asarray(canvas))
    return frames


def strip(episode: Compared, most: int = 11) -> np.ndarray:
    """The same three rollouts as rows of a picture, at most so many frames, evenly spread."""
    steps = max(len(episode.imagined), len(episode.true))
    chosen = sorted({round(place) for place in np.linspace(0, steps - 1, min(most, steps))})
    rows = (episode.imagined, episode.told, episode.true)
    return page.grid([[frames[min(step, len(frames) - 1)] for step in chosen] for frames in rows])


def horizon_plot(table: Sequence[Mapping[str, Any]], label: str, seconds: float) -> Markup:
    """Errors over the horizon with their intervals, as SVG."""
    plt = page.pyplot()
    figure, axes = plt.subplots(figsize=(4.6, 2.8))
    times = [row["step"] * seconds for row in table]
    for name in measures.PREDICTORS:
        cells = [row[name] for row in table]
        axes.plot(times, [cell["value"] for cell in cells], color=COLOURS[name], label=LABELS[name], lw=1.4)
        ends = [[cell["value"] if end is None else end for end in cell["ci95"]] for cell in cells]
        axes.fill_between(times, *zip(*ends), color=COLOURS[name], alpha=0.15, lw=0)
    axes.set_xlabel("seconds ahead")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return page.svg(figure)


def brief(table: Sequence[Mapping[str, Any]], most: int = 8) -> list[Mapping[str, Any]]:
    """At most so many rows of a table, evenly spread, with the first and the last."""
    chosen = sorted({round(place) for place in np.linspace(0, len(table) - 1, min(most, len(table)))})
    return [table[place] for place in chosen]


def episode_rows(run: ImagineSuite) -> list[Compared]:
    """The first episodes of every cell, however they end."""
    shown: list[Compared] = []
    for cell in run.suite.cells:
        shown += [episode for episode in run.episodes if episode.cell == cell.name][: run.settings.num_shown]
    return shown


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"# Neural rollouts: {report['suite']}", "", *[f"- {line}" for line in report["summary"]], ""]
    lines += [
        f"One step is {report['frame_gap']} simulator steps, {report['seconds_per_step']:g} s. Brackets are 95% intervals over "
        "episodes. Later steps have only the episodes that were not solved before.",
        "",
    ]
    for kind, words in KINDS.items():
        lines += [f"## Mean squared error, {words} (x 1000)", ""]
        lines += ["| step | episodes | " + " | ".join(LABELS.values()) + " |", "|---" * (2 + len(LABELS)) + "|"]
        for row in report["all"]["horizon"][kind]:
            cells = [number(row[name], 1000, 2) for name in measures.PREDICTORS]
            lines.append(f"| {row['step']} | {row['episodes']} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## Does the picture tell success? (%)", "", _HEADER, "|---" * 9 + "|"]
    for way, found in report["all"]["prediction"].items():
        lines.append(_agreement_line("all that can be judged", way, found))
    for name, cell in report["cells"].items():
        lines += [
            _agreement_line(name, way, found) for way, found in cell["prediction"].items() if way in (LAST, OF_TRUE)
        ]
    lines += [
        "",
        NOTES,
    ]
    lines += ["", "## The judge on frames whose truth is known (balanced accuracy, %)", ""]
    lines += ["| cell | frames | true frames | drawn one step from a true frame | judged |", "|---" * 5 + "|"]
    for name, cell in report["cells"].items():
        judge = cell["judge"]
        if "not_judged" in judge:
            lines.append(f"| {name} | - | - | - | no: {judge['not_judged']} |")
            continue
        scores = [number(judge[frames]["balanced_accuracy"], 100) for frames in ("true_frames", "drawn_frames")]
        count = judge["true_frames"]["accuracy"]["rollouts"]
        lines.append(f"| {name} | {count} | {scores[0]} | {scores[1]} | {'yes' if judge['can_judge'] else 'no'} |")
    return "\n".join(lines) + "\n"


NOTES = (
    "A second play is the finetuned policy from the same start with other draws: a world model without error would agree like "
    "this. Of all cells together some of the accuracy is knowing which cell is easy; balanced accuracy is that within cells."
)
_HEADER = (
    "| cell | success told by | both solved | only told | only simulator | neither | accuracy | commoner ending alone | "
    "balanced accuracy |"
)


def _agreement_line(name: str, way: str, found: Mapping[str, Any]) -> str:
    table = " | ".join(str(count) for count in found["table"].values())
    return (
        f"| {name} | {WAYS[way]} | {table} | {number(found['accuracy'], 100)} | {100 * found['majority']:.1f} | "
        f"{number(found['balanced_accuracy'], 100)} |"
    )


def write_report(run: ImagineSuite, report: dict[str, Any], output: Path) -> Path:
    """
    Writes `report.json`, `report.md`, `report.html`, `episodes.jsonl` and the animations.

    Args:
        run: What was run.
        report: As of [`ImagineSuite.report`], with what else is to be kept.
        output: Folder, made if need be.

    Returns:
        Path of the page.
    """
    report["versions"] = versions()
    seconds, shown = report["seconds_per_step"], []
    (output / GIFS).mkdir(parents=True, exist_ok=True)
    for place, episode in enumerate(episode_rows(run)):
        name = f"{GIFS}/{place:03d}-{episode.cell.replace('/', '-')}.gif"
        content = page.gif_bytes(side_by_side(episode, seconds), 1, round(1000 * seconds))
        write_atomically(output / name, content)
        shown.append(
            {
                "episode": episode.row(),
                "gif": page.data_uri(content, "image/gif"),
                "strip": page.png(strip(episode), max(1, round(72 / episode.true.shape[1]))),
                "judged": [(WAYS[way], word) for way, word in episode.predicted.items()],
            }
        )
    lines = "".join(json.dumps(episode.row()) + "\n" for episode in run.episodes)
    write_atomically(output / "episodes.jsonl", lines.encode())
    write_atomically(output / "report.json", json.dumps(report, indent=1).encode())
    write_atomically(output / "report.md", markdown(report).encode())
    plots = [
        horizon_plot(report["all"]["horizon"][kind], f"squared error, {words}", seconds)
        for kind, words in KINDS.items()
        if report["all"]["horizon"][kind]
    ]
    tables = [
        (
            "In all cells that can be judged:",
            [(WAYS[way], found) for way, found in report["all"]["prediction"].items()],
        ),
        (
            "By the last imagined frame in each of them:",
            [(name, cell["prediction"][LAST]) for name, cell in report["cells"].items() if LAST in cell["prediction"]],
        ),
    ]
    names = {
        "tables": [table for table in tables if table[1]],
        "labels": LABELS,
        "ways": WAYS,
        "kinds": KINDS,
        "number": number,
        "notes": NOTES,
    }
    rows = {kind: brief(report["all"]["horizon"][kind]) for kind in KINDS}
    html = page.render("imagine_report.html", report=report, plots=plots, shown=shown, rows=rows, last=LAST, **names)
    write_atomically(output / "report.html", html.encode())
    return output / "report.html"


def print_summary(report: Mapping[str, Any]) -> None:
    """The sentences and the prediction of each cell on the terminal."""
    print()
    for line in report["summary"]:
        print(line)
    for name, cell in {**report["cells"], "all": report["all"]}.items():
        found = cell["prediction"].get(LAST)
        told = "not judged" if found is None else f"told right {number(found['accuracy'], 100)}"
        print(f"{name:32}simulator {number(cell['simulator'], 100):>22}%   {told}")


__all__ = ["horizon_plot", "markdown", "number", "print_summary", "side_by_side", "strip", "write_report"]
