"""Inspections as text for a terminal, and as a page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lapa.data.contact_sheet import Section
from lapa.data.inspection import Inspection
from lapa.data.inspection_totals import MAX_LISTED
from lapa.data.read_counts import BLANK_CAMERA, GAP_BIN_SECONDS, NO_FRAME_AT_GAP, TOO_SHORT, UNREADABLE

# Pairs on a contact sheet: of a single source, and of each of many.
MAX_TILES, LEAST_TILES = 24, 6
# What the reasons to skip an episode mean.
REASONS = {
    BLANK_CAMERA: "the camera recorded nothing",
    TOO_SHORT: "no longer than the gap",
    UNREADABLE: "cannot be read",
}
DIMENSION_COLUMNS = ("name", "min", "q01", "q50", "q99", "max")
DIMENSION_HEADER = ("", "min", "1%", "50%", "99%", "max", "")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d1d1f; max-width: 1180px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin: 2em 0 .4em; border-top: 1px solid #ddd; padding-top: 1em }
.path { color: #777 } dl { display: grid; grid-template-columns: 11em 1fr; gap: .25em 1em } dt { color: #777 }
dd { margin: 0; overflow-wrap: anywhere } table { border-collapse: collapse; margin: .3em 0 }
th, td { text-align: right; padding: .1em .8em; font-variant-numeric: tabular-nums } th { color: #777; font-weight: 500 }
th:first-child, td:first-child { text-align: left; padding-left: 0 } .warning { color: #a33c00 }
.bar { background: #3b6fb5; height: .7em; display: inline-block; vertical-align: baseline } img { max-width: 100% }
"""


@dataclass(frozen=True)
class Fact:
    """A label and what there is to say under it, line by line, or as a table with a header."""

    label: str
    lines: tuple[str, ...] = ()
    table: tuple[Sequence[str], ...] = ()
    is_warning: bool = False


def facts_of(content: Mapping[str, Any]) -> Iterator[Fact]:
    """What a report says about one inspection."""
    if "rows" in content:
        yield from _row_facts(content)
    else:
        yield from _episode_facts(content)
    if content["warnings"]:
        yield Fact("warnings", tuple(content["warnings"]), is_warning=True)


def _episode_facts(content: Mapping[str, Any]) -> Iterator[Fact]:
    yield Fact("episodes", (f"{content['episodes']:,} in {_count(content['shards'], 'shard')}",))
    read, looked = content["episodes_read"], content["episodes_looked_at"]
    if looked < content["episodes"]:
        yield Fact(
            "looked at",
            (
                f"{looked:,} of {content['episodes']:,} episodes, evenly spaced (--max-episodes all reads all); "
                "everything below is about these",
            ),
            is_warning=True,
        )
    lengths = content["frames_per_episode"]
    yield Fact("frames", (f"{content['frames']:,}; per episode {_range(lengths)}",))
    yield Fact("time", (_time_line(content),))
    yield Fact("cameras", tuple(_camera_lines(content)))
    yield Fact("frequency", tuple(_frequency_lines(content["frequency"])))
    yield from _instruction_facts(content["instructions"], "episodes")
    yield from _number_facts("action", content["action"], "episodes", read)
    yield from _number_facts("proprio", content["proprio"], "episodes", read)
    yield Fact("embodiment", (content["embodiment"] or "not said",))
    if content["unnorm_key"]:
        yield Fact("unnorm_key", (content["unnorm_key"],))
    yield from _pair_facts(content)


def _row_facts(content: Mapping[str, Any]) -> Iterator[Fact]:
    rows = f"{content['rows']:,}"
    if content.get("files"):
        rows += f" in {_count(content['files'], 'file')}"
    if content["episodes"]:
        rows += f", {_count(content['episodes'], 'episode')}"
    yield Fact("rows", (rows,))
    if content.get("columns"):
        yield Fact("columns", (", ".join(content["columns"]),))
    yield from _instruction_facts(content["instructions"], "rows")
    for name in ("latent_action_codes", "vision_codes"):
        if content[name] is not None:
            yield Fact(name, tuple(_code_lines(content[name], content["rows"])))
    yield from _number_facts("action", content["action"], "rows", content["rows"])
    for name in ("embodiment", "unnorm_key", "source"):
        if content.get(name):
            yield Fact(name, tuple(f"{value} ({count:,} rows)" for value, count in content[name].items()))
    if content.get("made_with"):
        yield Fact("made with", tuple(f"{name}: {_short(value)}" for name, value in content["made_with"].items()))
    yield from _skip_facts(content["unreadable"])


def _time_line(content: Mapping[str, Any]) -> str:
    hours, without = content["hours"], content["frequency"]["episodes_without_times"]
    if hours is None:
        return "unknown: the frames have no times"
    time = _duration(hours)
    time += f", without {_count(without, 'episode')} that have no times" if without else ""
    looked = content["episodes_looked_at"]
    if looked < content["episodes"]:
        time += (
            f" (about {_duration(hours * content['episodes'] / looked)} in all, if the other episodes are like these)"
        )
    return time


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.2f} h"
    return f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.1f} s"


def _camera_lines(content: Mapping[str, Any]) -> Iterator[str]:
    chosen, num_cameras = content["pairs"]["camera"], len(content["cameras"])
    for name, camera in content["cameras"].items():
        stored = [f"{entry['width']} x {entry['height']} {entry['codec']}" for entry in camera["formats"]]
        if len(stored) > 1:
            counts = [entry["episodes"] for entry in camera["formats"]]
            stored = [f"{text} ({_count(count, 'episode')})" for text, count in zip(stored, counts)]
        more = f", ... ({len(stored)} sizes or codecs)" if len(stored) > MAX_LISTED else ""
        line = f"{name}: {', '.join(stored[:MAX_LISTED]) + more or 'size not known without decoding'}"
        # (height, width, pairs) of what was decoded.
        decoded = (
            [f"{size[1]} x {size[0]}" for size in content["pairs"]["looked_at"]["sizes"]] if name == chosen else []
        )
        if set(decoded) - {text.rpartition(" ")[0] for text in stored} and len(stored) <= 1:
            line = f"{line}; decoded frames are {' and '.join(decoded)}"
        if not camera["episodes"]:
            line = f"{name}:"
        if camera[BLANK_CAMERA]:
            line += f" recorded nothing in {camera[BLANK_CAMERA]:,} of {content['episodes_read']:,} episodes"
        yield line + (" (this one is read; --camera names another)" if name == chosen and num_cameras > 1 else "")
    for name, entry in content["unreadable_in_other_cameras"].items():
        yield f"another camera ({name}) cannot be read in {_count(entry['episodes'], 'episode')}: {entry['examples'][0]}"


def _frequency_lines(frequency: Mapping[str, Any]) -> Iterator[str]:
    rates = frequency["hz"]
    if not rates:
        yield "unknown (--frequency says it)"
        return
    if len(rates) == 1:
        yield f"{rates[0]['hz']:g} Hz"
    else:
        listed = ", ".join(f"{entry['hz']:g} Hz ({_count(entry['episodes'], 'episode')})" for entry in rates)
        yield f"{frequency['min']:g} to {frequency['max']:g} Hz; most often {listed}"
    if frequency["episodes_of_variable_rate"]:
        yield f"variable in {_count(frequency['episodes_of_variable_rate'], 'episode')} (the usual interval counts)"
    if frequency["episodes_without_times"]:
        yield f"unknown in {_count(frequency['episodes_without_times'], 'episode')}"


def _distinct(values: Mapping[str, Any], name: str = "distinct") -> str:
    """How many different ones there are, of which no more than so many are told apart."""
    return f"{values[name]:,}" + (" or more" if values.get(f"{name}_or_more") else "")


def _instruction_facts(texts: Mapping[str, Any], unit: str) -> Iterator[Fact]:
    without = texts[f"{unit}_without"]
    missing = f"none in {_count(without, unit[:-1])}" if without else f"at least one in each of the {unit}"
    several = texts.get("episodes_with_several", 0)
    more = f", several in {_count(several, 'episode')}" if several else ""
    lines = [f"{texts['count']:,}, {_distinct(texts)} different; {missing}{more}"]
    if not texts["count"]:
        lines = ["none"]
    lines += [f"{entry[unit]:,} x {_short(entry['text'])}" for entry in texts["most_common"]]
    yield Fact("instructions", tuple(lines))


def _number_facts(kind: str, numbers: Mapping[str, Any] | None, unit: str, read: int) -> Iterator[Fact]:
    if numbers is None:
        if kind == "action":
            yield Fact(kind, ("none",))
        return
    steps = "steps" if unit == "episodes" else "rows"
    line = f"{numbers['dim']} numbers, {numbers['steps']:,} {steps}"
    if numbers["quantiles_of_every"] > 1:
        line += f"; quantiles of about every {numbers['quantiles_of_every']}th"
    constant = [entry["name"] for entry in numbers["dimensions"] if entry["constant"]]
    lines = [line]
    if constant:
        lines.append(f"constant: {', '.join(constant)}")
    for count, what in (
        (numbers[f"{unit}_without"], f"of {read:,} {unit} have none"),
        (numbers[f"{unit}_of_another_dim"], f"{unit} have another number of them and are left out here"),
        (numbers["steps_not_finite"], f"{steps} hold a number that is not finite"),
    ):
        if count:
            lines.append(f"{count:,} {what}")
    rows = [
        (*(_number(entry[column]) for column in DIMENSION_COLUMNS), "constant" if entry["constant"] else "")
        for entry in numbers["dimensions"]
    ]
    yield Fact(kind, tuple(lines), (DIMENSION_HEADER, *rows))


def _code_lines(codes: Mapping[str, Any], rows: int) -> Iterator[str]:
    lengths = ", ".join(codes["codes_per_row"])
    yield f"{lengths} per row, values {codes['min']} to {codes['max']}, {_distinct(codes)} different"
    if codes["rows"] < rows:
        yield f"{rows - codes['rows']:,} rows have none"
    if "most_common" in codes:
        yield f"perplexity {codes['perplexity']:.2f}, {_distinct(codes, 'distinct_sequences')} different sequences"
        yield "shares: " + ", ".join(f"{entry['code']}: {entry['share']:.1%}" for entry in codes["most_common"])


def _pair_facts(content: Mapping[str, Any]) -> Iterator[Fact]:
    pairs = content["pairs"]
    if pairs["count"] is None:
        yield Fact("frame pairs", (f"unknown: {pairs['unknown_because']}",), is_warning=True)
    else:
        line = f"{pairs['count']:,} of camera {pairs['camera']}, {gap_text(content)}"
        looked = content["episodes_looked_at"]
        if looked < content["episodes"]:
            estimate = round(pairs["count"] * content["episodes"] / looked)
            line += f" (about {estimate:,} in all, if the other episodes are like these)"
        yield Fact("frame pairs", (line,))
        if len(pairs["gap_frames"]) > 1 or len(pairs["gap_hundredths_of_a_second"]) > 1:
            yield Fact("gaps", (), tuple(_histogram(pairs)))
    yield from _skip_facts(pairs["skipped_episodes"])
    if pairs["count"] is not None and not pairs["skipped_episodes"] and not pairs["dropped"]:
        yield Fact("skipped", ("no episode",))
    for name, count in pairs["dropped"].items():
        meaning = "no frame lies near enough to where the gap ends" if name == NO_FRAME_AT_GAP else ""
        yield Fact("left out", (f"{_count(count, 'step')}: {name}, {meaning}",))
    looked_at = pairs["looked_at"]
    if looked_at["pairs"]:
        yield Fact("filters", tuple(_filter_lines(looked_at)))


def gap_text(content: Mapping[str, Any]) -> str:
    """The gap of the pairs, in words."""
    pairs = content["pairs"]
    if pairs["frame_gap"] is not None:
        mean = f" ({pairs['mean_seconds']:.2f} s on average)" if pairs["mean_seconds"] is not None else ""
        return f"{_count(pairs['frame_gap'], 'frame')} apart{mean}"
    default = (
        "the default" if content["gap_is_default"] else f"{content['default_frame_gap_seconds']:g} s is the default"
    )
    return f"{pairs['frame_gap_seconds']:g} s apart ({default})"


def _histogram(pairs: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """Gaps in frames, and their times where these differ more; the rarest are put together."""
    by_time = len(pairs["gap_hundredths_of_a_second"]) > 1
    counts = pairs["gap_hundredths_of_a_second"] if by_time else pairs["gap_frames"]
    total = sum(counts.values())
    yield ("seconds" if by_time else "frames", "pairs", "share")
    largest = sorted(counts, key=lambda gap: -counts[gap])[: 4 * MAX_LISTED]
    for gap in sorted(largest, key=int):
        text = f"{int(gap) * GAP_BIN_SECONDS:.2f}" if by_time else gap
        yield (text, f"{counts[gap]:,}", f"{counts[gap] / total:.1%}")
    rest = total - sum(counts[gap] for gap in largest)
    if rest:
        yield ("others", f"{rest:,}", f"{rest / total:.1%}")


def _skip_facts(skipped: Mapping[str, Any]) -> Iterator[Fact]:
    for reason, entry in skipped.items():
        count, examples = entry["episodes"], entry["examples"]
        lines = [f"{count:,}: {reason}, {REASONS.get(reason, reason)}"]
        if reason == UNREADABLE:
            lines += examples
            if count > len(examples):
                lines.append(f"and {count - len(examples):,} more")
        else:
            lines[0] += f" ({', '.join(examples)}{', ...' if count > len(examples) else ''})"
        yield Fact("skipped", tuple(lines), is_warning=reason == UNREADABLE)


def _filter_lines(looked_at: Mapping[str, Any]) -> Iterator[str]:
    pairs, filters = looked_at["pairs"], looked_at["filters"]
    chosen = [name for name, entry in filters.items() if entry["chosen"]]
    seen = f"{_count(pairs, 'pair')} of {_count(looked_at['episodes'], 'episode')}"
    if chosen:
        dropped = looked_at["dropped_by_chosen_filters"]
        yield f"of the {seen} that were decoded, {', '.join(chosen)} left out {dropped:,} ({dropped / pairs:.1%}); each alone:"
    else:
        yield f"none chosen (--filters); of the {seen} that were decoded they would leave out:"
    for name, entry in filters.items():
        yield f"{name}: {entry['drops']:,}{' (chosen)' if entry['chosen'] else ''}, {entry['rule']}"


def section_of(inspection: Inspection, num_sections: int = 1) -> Section:
    """The part of the contact sheet about one of `num_sections` sources: its pairs, evenly thinned."""
    content, tiles = inspection.content, inspection.tiles
    count = min(max(LEAST_TILES, MAX_TILES // num_sections), len(tiles))
    chosen = [tiles[(number * len(tiles) + len(tiles) // 2) // count] for number in range(count)]
    if "pairs" not in content:
        line = f"{content['rows']:,} labelled steps, each with the step that its codes lead to, and the difference"
    elif content["pairs"]["count"] is None:
        line = f"no pairs: {content['pairs']['unknown_because']}"
    else:
        size = f"{tiles[0].size[1]} x {tiles[0].size[0]}, " if tiles else ""
        line = (
            f"camera {content['pairs']['camera']}, {size}{count} of {content['pairs']['count']:,} pairs "
            f"{gap_text(content)}: first, second, difference x 2; in red the filters that would leave a pair out"
        )
    return Section(f"{content['name']}   ({content['kind']})", line, chosen)


def to_text(inspections: Sequence[Inspection]) -> str:
    """The report for a terminal."""
    blocks = []
    for inspection in inspections:
        content = inspection.content
        lines = [f"{content['name']}   ({content['kind']}{_share(content, inspections)}, {content['path']})"]
        for fact in facts_of(content):
            entries = [*fact.lines, *_aligned(fact.table)]
            label = fact.label
            for entry in entries or ["-"]:
                lines.append(f"  {label:<20} {entry}" if len(label) <= 20 else f"  {label}\n  {'':<20} {entry}")
                label = ""
        blocks.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(blocks)


def to_html(inspections: Sequence[Inspection], picture: str | None) -> str:
    """The report as a page; `picture` is the file name of the contact sheet beside it."""
    parts = []
    for inspection in inspections:
        content = inspection.content
        parts.append(f"<h2>{escape(content['name'])}</h2>")
        told = f"{content['kind']}{_share(content, inspections)}, {content['path']}"
        parts.append(f'<p class="path">{escape(told)}</p><dl>')
        for fact in facts_of(content):
            style = ' class="warning"' if fact.is_warning else ""
            body = "<br>".join(escape(line) for line in fact.lines) + _html_table(fact.table)
            parts.append(f"<dt>{escape(fact.label)}</dt><dd{style}>{body}</dd>")
        parts.append("</dl>")
    image = f'<h2>Frame pairs</h2><img src="{escape(picture)}" alt="pairs of frames">' if picture else ""
    title = ", ".join(inspection.name for inspection in inspections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>Data: {escape(title)}</h1>{''.join(parts)}{image}</body></html>\n"
    )


def _share(content: Mapping[str, Any], inspections: Sequence[Inspection]) -> str:
    """Weight of a source in its mixture."""
    if len(inspections) == 1:
        return ""
    total = sum(item.content["weight"] for item in inspections)
    return f", weight {content['weight']:g}: {content['weight'] / total:.1%} of the pairs"


def _html_table(table: Sequence[Sequence[str]]) -> str:
    if not table:
        return ""
    header, *rows = table
    with_bars = header[-1] == "share"
    cells = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"]
    for row in rows:
        bar = (
            f'<td style="text-align:left"><span class="bar" style="width:{float(row[-1][:-1]) * 2:.0f}px"></span></td>'
            if with_bars
            else ""
        )
        cells.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + bar + "</tr>")
    return f"<table>{''.join(cells)}</table>"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table with the first column to the left and the others to the right."""
    if not table:
        return []
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths))
        )
        for row in table
    ]


def _number(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _range(lengths: Mapping[str, float]) -> str:
    if lengths["min"] == lengths["max"]:
        return f"{lengths['min']:,}"
    return f"{lengths['min']:,} to {lengths['max']:,}, median {lengths['median']:,g}"


def _short(value: Any, limit: int = 110) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


__all__ = ["MAX_TILES", "Fact", "facts_of", "gap_text", "section_of", "to_html", "to_text"]
