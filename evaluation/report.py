"""Self-contained HTML reports: tables with intervals, curves, image grids and animations."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

GIF_FRAME_MILLISECONDS = 100  # the simulator's 10 Hz


def data_uri(content: bytes, media_type: str) -> str:
    """A `data:` URI, so that a report is one file."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def png(image: np.ndarray, scale: int = 1) -> str:
    """(height, width, 3) uint8 as a PNG data URI, pixels enlarged `scale` times without smoothing."""
    picture = Image.fromarray(image)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return data_uri(buffer.getvalue(), "image/png")


def gif_bytes(frames: Sequence[np.ndarray], scale: int = 1, milliseconds: int = GIF_FRAME_MILLISECONDS) -> bytes:
    """Frames (height, width, 3) uint8 as an endlessly looping GIF; the last one is held for a second."""
    size = (frames[0].shape[1] * scale, frames[0].shape[0] * scale)
    pictures = [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in frames]
    durations = [milliseconds] * (len(pictures) - 1) + [1000]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return buffer.getvalue()


def gif(frames: Sequence[np.ndarray], scale: int = 1) -> str:
    """`gif_bytes` as a data URI."""
    return data_uri(gif_bytes(frames, scale), "image/gif")


def grid(rows: Sequence[Sequence[np.ndarray]], gap: int = 2) -> np.ndarray:
    """Equally sized (height, width, 3) uint8 images on white, `gap` pixels apart."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            top, left = y * (height + gap), x * (width + gap)
            canvas[top : top + height, left : left + width] = image
    return canvas


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """(..., 3, height, width) float in [0, 1], clipped, to (..., height, width, 3) uint8."""
    return (np.moveaxis(np.clip(frames, 0, 1), -3, -1) * 255).round().astype(np.uint8)


def svg(figure: Any) -> Markup:
    """A matplotlib figure as inline SVG; closes it."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])


def pyplot() -> Any:
    """matplotlib.pyplot without a display, in the style of the reports.

    Raises:
        ImportError: Without matplotlib; the extra to install is named.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('reports need matplotlib: pip install "lapa[sim]"') from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"})
    return plt


def success_bars(methods: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> Markup:
    """Grouped bars with 95% intervals: one group per family and one for all, one bar per method, as SVG."""
    plt = pyplot()
    families = [*next(iter(methods.values()))["families"], "all"]
    figure, axes = plt.subplots(figsize=(1.2 + 1.5 * len(families), 2.6))
    width = 0.8 / len(methods)
    for index, (name, table) in enumerate(methods.items()):
        cells = [*table["families"].values(), table["pooled"]]
        heights = np.array([100 * cell["success"] for cell in cells])
        ends = np.array([[100 * end for end in cell["ci95"]] for cell in cells])
        errors = np.stack([heights - ends[:, 0], ends[:, 1] - heights]).clip(min=0)
        x = np.arange(len(families)) + (index - (len(methods) - 1) / 2) * width
        axes.bar(x, heights, width * 0.9, yerr=errors, label=name, color=colours.get(name), error_kw={"lw": 1})
    axes.set_xticks(range(len(families)), [family.replace("_", " ") for family in families])
    axes.set_ylabel("success, %")
    axes.set_ylim(0, 105)
    axes.legend(frameon=False, ncols=len(methods), loc="upper center", bbox_to_anchor=(0.5, 1.2))
    return svg(figure)


def curves(histories: Mapping[str, Sequence[Mapping[str, float]]], key: str, label: str) -> Markup:
    """One line per history of `{"step": ..., key: ...}` rows, as SVG."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(3.4, 2.2))
    for name, history in histories.items():
        rows = [(row["step"], row[key]) for row in history if key in row]
        axes.plot([step for step, _ in rows], [value for _, value in rows], label=name, lw=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    if len(histories) > 1:
        axes.legend(frameon=False)
    return svg(figure)


def displacement_scatter(codes: np.ndarray, displacements: np.ndarray, unit: str, max_points: int = 1500) -> Markup:
    """True displacements (num_pairs, 2) coloured by code (num_pairs,), with each code's mean as an arrow, as SVG."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(3.4, 3.2))
    colour_map = plt.get_cmap("hsv")
    used = np.unique(codes)
    means = np.stack([displacements[codes == code].mean(0) for code in used])
    for code, mean in zip(used, means):
        # Codes that mean similar directions get similar colours.
        colour = colour_map((np.arctan2(mean[1], mean[0]) / (2 * np.pi)) % 1)
        points = displacements[codes == code][: max(1, max_points // len(used))]
        axes.scatter(points[:, 0], points[:, 1], s=3, color=colour, alpha=0.4, lw=0)
        axes.annotate("", xy=mean, xytext=(0, 0), arrowprops={"arrowstyle": "->", "color": "black", "lw": 0.8})
        axes.text(mean[0], mean[1], str(code), fontsize=8)
    axes.set_aspect("equal")
    axes.set_xlabel(f"true motion to the right, {unit}")
    axes.set_ylabel(f"true motion up, {unit}")
    return svg(figure)


def render(template: str, **context: Any) -> str:
    """An HTML page from a template of this package."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lapa.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}%"
    environment.filters["title_case"] = lambda name: name.replace("_", " ")
    return environment.get_template(template).render(**context)
