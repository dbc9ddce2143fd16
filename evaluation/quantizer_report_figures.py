"""Pictures of a report on a quantizer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image, ImageDraw

from lapa.data.schema import DELTA_END_EFFECTOR
from lapa.evaluation import report as page
from lapa.evaluation.quantizer_report import Measured
from lapa.evaluation.quantizer_report_measures import other_pair

# Pixels of a picture in a grid, and of the strip above it that names the column.
TILE, STRIP, GAP = 72, 14, 2
MAX_CODES, MAX_TOKENS, MAX_SEQUENCES, FRAMES_PER_SOURCE, NUM_RECONSTRUCTIONS = 16, 4, 12, 3, 8
MAX_POINTS = 1500
# How strongly a code's own change is drawn.
CHANGE_STRENGTH = 4
BLUE, GREY, ORANGE, RED = "#3366aa", "#bbbbbb", "#cc8844", "#b3261e"


def _tile(image: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 at the size of a grid; small pictures are enlarged without smoothing."""
    height, width = image.shape[:2]
    size = (TILE, max(1, round(TILE * height / width)))
    how = Image.Resampling.NEAREST if width < TILE else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize(size, how))


def _labelled_grid(rows: Sequence[Sequence[np.ndarray]], columns: Sequence[str]) -> str:
    """A PNG data URI: rows of (height, width, 3) uint8 pictures, a name over each column."""
    picture = page.grid([[_tile(image) for image in row] for row in rows], GAP)
    strip = Image.new("RGB", (picture.shape[1], STRIP), "white")
    draw = ImageDraw.Draw(strip)
    for index, name in enumerate(columns):
        draw.text((index * (TILE + GAP) + TILE / 2, STRIP / 2), name, fill=(40, 50, 70), anchor="mm")
    return page.png(np.concatenate([np.asarray(strip), picture]))


def spread_rows(measured: Measured, per_source: int) -> np.ndarray:
    """Pairs of each source that lie far apart in it, so of different episodes where there are some; the same each time."""
    rows = []
    for source in range(len(measured.sample.sources)):
        own = np.flatnonzero(measured.sample.source == source)
        if len(own):
            places = (np.arange(per_source) + 0.5) / per_source * len(own)
            rows.append(own[np.unique(places.astype(int))])
    return np.concatenate(rows)


def reconstructions(measured: Measured) -> str:
    """One pair per column: first frame, second frame, its prediction, the prediction from another pair's codes."""
    sample, codes = measured.sample, measured.encoded.codes
    per_source = max(1, NUM_RECONSTRUCTIONS // len(sample.sources))
    rows, other = spread_rows(measured, per_source), other_pair(sample)
    first, second = measured.runner.aligned(sample.frames[rows]).swapaxes(0, 1)
    decoded, shuffled = (page.to_uint8(measured.runner.decode(first, codes[index])) for index in (rows, other[rows]))
    names = [f"episode {episode}" for episode in sample.episode[rows]]
    if len(sample.sources) > 1:
        names = [sample.sources[source].embodiment[:12] for source in sample.source[rows]]
    return _labelled_grid([list(images) for images in (first, second, decoded, shuffled)], names)


def _effects(measured: Measured, sequences: np.ndarray, names: Sequence[str]) -> str:
    """First frames down, what each of `sequences` (num_sequences, tokens) makes of them across, and its own part."""
    grid = []
    for row in spread_rows(measured, FRAMES_PER_SOURCE):
        first = np.asarray(measured.sample.frames[row, 0])
        decoded = measured.runner.decode(np.repeat(first[None], len(sequences), axis=0), sequences)
        grid.append([first, *page.to_uint8(decoded)])
        own = 0.5 + CHANGE_STRENGTH * (decoded - decoded.mean(axis=0))
        grid.append([np.full_like(first, 255), *page.to_uint8(own)])
    return _labelled_grid(grid, ["frame", *names])


def code_effects(measured: Measured) -> list[dict[str, str]]:
    """
    Grids of what codes do: for one token all its codes; for more the most frequent sequences, then each token alone.

    Returns:
        Each with `title` and `image`.
    """
    codes, statistics = measured.encoded.codes, measured.report["codes"]
    frequent = [entry["codes"] for entry in statistics["sequences"]["most_frequent"]]
    tokens, figures = codes.shape[1], []
    if tokens > 1:
        shown = np.array(frequent[:MAX_SEQUENCES])
        names = ["".join(str(c) if c < 10 else f"({c})" for c in row) for row in shown.tolist()]
        figures.append({"title": "The most frequent code sequences.", "image": _effects(measured, shown, names)})
    for token in range(min(tokens, MAX_TOKENS)):
        used, counts = np.unique(codes[:, token], return_counts=True)
        used = np.sort(used[np.argsort(-counts, kind="stable")[:MAX_CODES]])
        sequences = np.repeat([frequent[0]], len(used), axis=0)
        sequences[:, token] = used
        title = "Every code in use." if tokens == 1 else f"Token {token} alone, the others as in {frequent[0]}."
        figures.append({"title": title, "image": _effects(measured, sequences, [str(code) for code in used])})
    return figures


def usage_bars(codes: np.ndarray, codebook_size: int) -> Markup:
    """Share of each code, one line of bars per token, as SVG."""
    plt = page.pyplot()
    tokens = min(codes.shape[1], MAX_TOKENS)
    figure, axes = plt.subplots(tokens, 1, figsize=(4.2, 0.6 + 0.9 * tokens), sharex=True, squeeze=False)
    for token, axis in enumerate(axes[:, 0]):
        share = np.bincount(codes[:, token], minlength=codebook_size) / len(codes)
        axis.bar(np.arange(codebook_size), share, 0.8, color=BLUE)
        axis.axhline(1 / codebook_size, color="black", lw=0.6, ls=":")
        axis.set_ylabel("share" if codes.shape[1] == 1 else f"token {token}")
    if codebook_size <= 16:
        axes[-1, 0].set_xticks(range(codebook_size))
    axes[-1, 0].set_xlabel("code")
    return page.svg(figure)


def error_bars(reconstruction: dict[str, Any]) -> Markup:
    """Mean squared errors with intervals, as SVG."""
    plt = page.pyplot()
    names = {
        "model": "the model",
        "shuffled_codes": "codes of another pair",
        "copy_first_frame": "copying the first frame",
        "mean_frame": "the mean frame",
    }
    figure, axes = plt.subplots(figsize=(4.2, 1.7))
    values = [reconstruction[name] for name in names]
    ends = [reconstruction["intervals"][name] for name in names]
    errors = np.array([[v - low, high - v] if low is not None else [0, 0] for v, (low, high) in zip(values, ends)])
    colours = [BLUE, ORANGE, GREY, GREY]
    axes.barh(range(4), values, 0.7, xerr=errors.T.clip(min=0), color=colours, error_kw={"lw": 1})
    axes.set_yticks(range(4), names.values())
    axes.invert_yaxis()
    axes.set_xlabel("mean squared error, pixels in [0, 1]")
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
    return page.svg(figure)


def shown_dimensions(names: Sequence[str], target: np.ndarray) -> tuple[int, int]:
    """The two most variable dimensions, among those that are comparable: positions of an end effector, no gripper."""
    spread = target.std(axis=0)
    if tuple(names) == DELTA_END_EFFECTOR:
        spread = np.where(np.arange(len(names)) < 3, spread, -1.0)
    spread = np.where([name == "gripper" for name in names], -1.0, spread)
    first, second = sorted(np.argsort(-spread, kind="stable")[:2].tolist())
    return first, second


def code_scatter(codes: np.ndarray, values: np.ndarray, labels: tuple[str, str], invert_y: bool = False) -> Markup:
    """Motions (num_pairs, 2) coloured by code sequence, the most frequent ones with their mean as an arrow, as SVG."""
    plt = page.pyplot()
    rows, sequence, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    sequence = sequence.ravel()
    frequent = np.argsort(-counts, kind="stable")[:MAX_CODES]
    figure, axes = plt.subplots(figsize=(5.2, 4.6))
    size = 4 if len(values) > MAX_POINTS / 2 else 12
    rest = ~np.isin(sequence, frequent)
    axes.scatter(*values[rest][:MAX_POINTS].T, s=size, color="#dddddd", lw=0)
    colours = plt.get_cmap("hsv")
    for index in frequent:
        points = values[sequence == index]
        mean = points.mean(axis=0)
        colour = colours((np.arctan2(mean[1], mean[0]) / (2 * np.pi)) % 1)
        points = points[: max(1, MAX_POINTS // len(frequent))]
        axes.scatter(points[:, 0], points[:, 1], s=size, color=colour, alpha=0.5, lw=0)
        axes.annotate("", xy=mean, xytext=(0, 0), arrowprops={"arrowstyle": "->", "color": "black", "lw": 0.8})
        axes.text(*mean, " ".join(str(code) for code in rows[index]), fontsize=8)
    limits = np.abs(np.quantile(values, (0.005, 0.995), axis=0)).max(axis=0) * 1.05
    if (limits > 0).all():
        axes.set_xlim(-limits[0], limits[0])
        axes.set_ylim(*((limits[1], -limits[1]) if invert_y else (-limits[1], limits[1])))
    axes.axhline(0, color="#cccccc", lw=0.6, zorder=0)
    axes.axvline(0, color="#cccccc", lw=0.6, zorder=0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return page.svg(figure)


def probe_bars(probes: dict[str, Any]) -> Markup:
    """R² per dimension of the linear and the MLP probe on codes, and of the linear one on embeddings, as SVG."""
    plt = page.pyplot()
    names = probes["names"]
    kinds = {
        "linear, codes": (probes["linear"], BLUE),
        "MLP, codes": (probes["mlp"], "#88aadd"),
        "linear, embeddings": (probes["embeddings"]["linear"], ORANGE),
        "MLP, embeddings": (probes["embeddings"]["mlp"], "#e8c8a0"),
    }
    figure, axes = plt.subplots(figsize=(1.5 + 0.75 * len(names), 2.4))
    width = 0.8 / len(kinds)
    for index, (label, (cell, colour)) in enumerate(kinds.items()):
        heights = [np.nan if value is None else value for value in cell["r2_per_dimension"]]
        axes.bar(np.arange(len(names)) + (index - 1.5) * width, heights, width * 0.9, label=label, color=colour)
    axes.axhline(0, color="black", lw=0.6)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("R²")
    axes.set_ylim(bottom=min(0.0, max(-0.2, axes.get_ylim()[0])))
    axes.legend(frameon=False, ncols=2, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.3))
    return page.svg(figure)
