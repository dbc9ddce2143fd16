"""Command line of the inspection: `lapa inspect`."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapa.data.atomic_files import write_atomically

if TYPE_CHECKING:
    from lapa.data.inspection import Inspection, InspectOptions, Progress

_DESCRIPTION = """\
Tells what is in a data set, and what a reader of its frame pairs would skip and why.

SOURCE is a data set of any kind that the training commands read (RLDS, LeRobot, Something-Something v2, videos, frame
folders), local or an fsspec URL; a mixture (.yaml, .json); a published data file (.jsonl, .json, .gz); or a folder that
`lapa label` wrote. What cannot be read is counted and shown, and ends nothing."""
_EPILOG = """\
examples:
  lapa inspect bridge_dataset/1.0.0
  lapa inspect videos --frame-gap-seconds 1.2 --filters static,shot_cut --output out/videos
  lapa inspect hf://datasets/lerobot/pusht --max-episodes 20 --json
"""
ALL = "all"


def make_parser(parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser of `lapa inspect`; options of the training commands may be spelled as there, with underscores."""
    parser = parser_class(
        "lapa inspect", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="data set, mixture, published data file or folder of labels")
    parser.add_argument("--kind", help="kind of the data set (or package.module:ClassName); told by its content")
    parser.add_argument("--split", help="split to read; the kind's own default otherwise")
    parser.add_argument("--camera", help="camera to read; the first one by default")

    def add(name: str, **options: Any) -> None:
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", **options)

    add("frame-gap", type=int, help="frames between the two of a pair")
    add("frame-gap-seconds", type=float, help="the gap in seconds instead; the data set's own by default")
    parser.add_argument("--frequency", type=float, help="frames per second, where the data do not tell")
    parser.add_argument("--filters", help="comma-separated rules that leave pairs out: static, shot_cut, blank")
    add("on-error", default="skip", choices=("raise", "skip"), help="`skip` counts what cannot be read (the default)")
    add(
        "max-episodes",
        type=_episodes,
        default=1000,
        metavar="N",
        help="episodes to read, evenly spaced, or `all`; 1000 by default",
    )
    add("num-pairs", type=int, default=64, metavar="N", help="pairs to decode, for filters and contact sheet; 64")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for inspection.json, inspection.html and pairs.png"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _episodes(text: str) -> int | None:
    try:
        return None if text == ALL else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number or `{ALL}`, got {text!r}") from error


def run(args: argparse.Namespace) -> int:
    """Inspects, prints what was found, and writes it on request."""
    from lapa.data.inspection import InspectOptions
    from lapa.data.inspection_report import to_text

    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise ValueError(f"`--output` is a file: {args.output}.")
    options = InspectOptions(args.max_episodes, args.num_pairs, args.on_error)
    names = ("kind", "split", "camera", "frame_gap", "frame_gap_seconds", "frequency", "filters")
    chosen = {name: value for name in names if (value := getattr(args, name)) is not None}
    inspections = inspect_any(args.source, chosen, options)
    content = [inspection.content for inspection in inspections]
    print(json.dumps(content, indent=2, ensure_ascii=False) if args.json else to_text(inspections))
    if args.output is not None:
        files = write(args.output, inspections)
        print(f"{args.output}: {', '.join(files)}", file=sys.stderr)
    return 0


def inspect_any(source: str, chosen: dict[str, Any], options: "InspectOptions") -> "list[Inspection]":
    """
    Inspects whatever a path or URL names.

    Args:
        source: See the command's help.
        chosen: Options of the source and its pairs.
        options: How much is looked at.

    Returns:
        One inspection, or one per source of a mixture.

    Raises:
        ValueError: Nothing that can be inspected; options that it does not take.
    """
    from lapa.data.inspection import inspect_source
    from lapa.data.inspection_rows import inspect_labels, inspect_published, is_label_folder
    from lapa.data.jsonl import holds_published_rows
    from lapa.data.open_source import MixtureEntry, is_mixture, mixture_entries

    entries = [MixtureEntry("", {"path": source, **chosen})]
    if "kind" not in chosen:
        rows: Callable[..., Inspection] | None = None
        if is_label_folder(source):
            rows = inspect_labels
        elif holds_published_rows(source):
            rows = inspect_published
        if rows is not None:
            if chosen:
                raise ValueError(
                    f"`{next(iter(chosen))}` is about data sets of episodes; {source} holds rows of steps."
                )
            with _Progress(source, "row") as step:
                return [rows(source, options, step)]
        if is_mixture(source):
            entries = mixture_entries(source, **chosen)
    found = []
    for entry in entries:
        try:
            with _Progress(str(entry.options.get("path")), "episode") as step:
                inspection = inspect_source(entry.options, options, step)
        except ValueError as error:
            raise ValueError(f"{entry.where}: {error}" if entry.where else str(error)) from error
        inspection.content["warnings"].extend(entry.notes)
        found.append(inspection)
    return found


class _Progress:
    """Counts on standard error while something is read; shows nothing before something was."""

    def __init__(self, what: str, unit: str) -> None:
        self._what, self._unit = what, unit
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        return self._step

    def _step(self, count: int, total: int | None) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                desc=f"reading {self._what}",
                total=total,
                unit=self._unit,
                leave=False,
                file=sys.stderr,
                mininterval=0.5,
            )
        self._bar.update(count)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def write(folder: Path, inspections: "Sequence[Inspection]") -> list[str]:
    """Writes `inspection.json`, `inspection.html` and, where there are pairs, `pairs.png`; each whole or not at all."""
    from lapa.data.contact_sheet import draw_sheet
    from lapa.data.inspection_report import section_of, to_html

    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytes] = {}
    if any(inspection.tiles for inspection in inspections):
        picture = BytesIO()
        draw_sheet([section_of(inspection, len(inspections)) for inspection in inspections]).save(
            picture, format="PNG"
        )
        files["pairs.png"] = picture.getvalue()
    else:
        # One of an earlier run would be taken for that of this one.
        (folder / "pairs.png").unlink(missing_ok=True)
    content = [inspection.content for inspection in inspections]
    files["inspection.json"] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    files["inspection.html"] = to_html(inspections, "pairs.png" if "pairs.png" in files else None).encode(
        "utf-8", "replace"
    )
    for name, data in files.items():
        write_atomically(folder / name, data)
    return sorted(files)


def main(
    arguments: Sequence[str] | None = None,
    parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser,
) -> int:
    """Runs `lapa inspect`."""
    return run(make_parser(parser_class).parse_args(arguments))
