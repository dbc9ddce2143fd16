"""What a folder of labels must look like before any of it is believed: `labels.json`, and the tables of its files."""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

from lapa.data.parquet_rows import MAX_ROWS
from lapa.data.schema import ReadError

if TYPE_CHECKING:
    import pyarrow as pa

# Numbers larger than these are no sizes of labels, and what is made by them would not fit memory.
MAX_COUNT, MAX_GROUP_ROWS, MAX_GROUPS, MAX_GROUP_BYTES = 1 << 40, 1 << 20, 1 << 20, 1 << 32
# Columns that have a value in every row.
FULL_COLUMNS = (
    "episode_id",
    "step_index",
    "image",
    "next_frame_offset",
    "latent_action_codes",
    "vision_codes",
    "source",
)

Check = tuple[Callable[[Any], bool], str]


def _count(least: int, most: int = MAX_COUNT) -> Check:
    return lambda value: type(value) is int and least <= value <= most, f"a number from {least} to {most}"


def _kind(kind: type, name: str) -> Check:
    return lambda value: type(value) is kind, name


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check[0](value), f"{check[1]}, or null"


def _list_of(check: Check, length: int | None = None) -> Check:
    def fits(value: Any) -> bool:
        return isinstance(value, list) and length in (None, len(value)) and all(map(check[0], value))

    return fits, f"a list of {check[1]}"


TEXT, FLAG = _kind(str, "text"), _kind(bool, "true or false")
SECONDS: Check = (
    lambda value: type(value) in (int, float) and value > 0 and isfinite(value),
    "a number of seconds above 0",
)
SOURCE_CHECKS = {
    "name": TEXT,
    "camera": TEXT,
    "frame_gap": _or_none(_count(1)),
    "frame_gap_seconds": _or_none(SECONDS),
    "filters": _list_of(TEXT),
    "num_shards": _count(0),
    "num_episodes": _count(0),
    "shards_hash": TEXT,
}
SETTINGS_CHECKS = {
    "sources": _list_of(_kind(dict, "objects")),
    "quantizer_hash": TEXT,
    "codebook_size": _count(1),
    "num_latent_tokens": _count(1),
    "frame_size": _list_of(_count(1), 2),
    "num_units": _count(0),
    "episodes_per_unit": _count(1),
    "row_group_rows": _count(1, MAX_GROUP_ROWS),
    "batch_size": _count(1),
    "num_threads": _count(0),
    "device": TEXT,
    "dtype": TEXT,
    "compile": FLAG,
    "image_size": _or_none(_count(1)),
    "image_quality": _count(0),
    "keep_jpeg": FLAG,
    "action": FLAG,
    "vision_tokenizer_hash": _or_none(TEXT),
    "num_image_tokens": _or_none(_count(1)),
    "versions": _kind(dict, "an object"),
}
MANIFEST_CHECKS = {
    "complete": FLAG,
    "settings": _kind(dict, "an object"),
    "sources": _kind(dict, "an object"),
    "units": _list_of(_kind(dict, "objects")),
}


def check_manifest(
    values: Mapping[str, Any], formats: tuple[str, ...], unit_file: Callable[[int, int, str], str]
) -> None:
    """
    Checks what `labels.json` holds, beside its version: types, ranges, and that it lists files of its own folder only.

    Args:
        values: The JSON object.
        formats: Those that there are.
        unit_file: Path of a unit's file by index, number of units and format.

    Raises:
        ValueError: Something that `lapa label` does not write; it is named.
    """
    _check(values, MANIFEST_CHECKS, "")
    _check({"command": values.get("command")}, {"command": _or_none(TEXT)}, "")
    settings = values["settings"]
    _check(settings, SETTINGS_CHECKS, "settings.")
    if settings.get("format") not in formats:
        raise ValueError(f"`settings.format` must be one of {', '.join(formats)}, got {settings.get('format')!r}")
    for number, source in enumerate(settings["sources"]):
        _check(source, SOURCE_CHECKS, f"settings.sources[{number}].")
    num_units, units = settings["num_units"], values["units"]
    if len(units) != num_units and (values["complete"] or units):
        raise ValueError(f"`units` must list all {num_units} files, got {len(units)}")
    rows = _count(0, min(MAX_ROWS, MAX_GROUPS * settings["row_group_rows"]))
    for number, unit in enumerate(units):
        _check(unit, {"rows": rows}, f"units[{number}].")
        expected = unit_file(number, num_units, settings["format"])
        if unit.get("file") != expected:
            raise ValueError(f"`units[{number}].file` must be {expected!r}, got {unit.get('file')!r:.200}")


def _check(values: Mapping[str, Any], checks: Mapping[str, Check], place: str) -> None:
    for name, (fits, meaning) in checks.items():
        if name not in values:
            raise ValueError(f"`{place}{name}` is missing")
        if not fits(values[name]):
            raise ValueError(f"`{place}{name}` must be {meaning}, got {values[name]!r:.200}")


def check_table(table: "pa.Table", schema: "pa.Schema", codebook_size: int, num_codes: int, name: str) -> None:
    """
    Checks rows of labels.

    Args:
        table: Rows, of some columns.
        schema: All columns that files of the folder have.
        codebook_size, num_codes: Of the latent action codes of a row.
        name: Of the file.

    Raises:
        ReadError: A column of another type, a value that is missing, or codes that the quantizer does not have.
    """
    import pyarrow.compute as pc

    for column in table.column_names:
        content, kind = table[column], schema.field(column).type
        if content.type != kind:
            raise ReadError(f"{name} has column {column!r} of type {content.type}, not {kind}.")
        parts = [content]
        if column == "image":
            parts.append(pc.struct_field(content, "bytes"))
        elif column.endswith("_codes"):
            parts.append(pc.list_flatten(content))
        if column in FULL_COLUMNS and any(part.null_count for part in parts):
            raise ReadError(f"{name} has rows without {column!r}.")
    if "latent_action_codes" in table.column_names and len(table):
        lengths = pc.unique(pc.list_value_length(table["latent_action_codes"])).to_pylist()
        if lengths != [num_codes]:
            raise ReadError(f"{name} has rows of {sorted(lengths)} codes, not of {num_codes}.")
        limits = pc.min_max(pc.list_flatten(table["latent_action_codes"])).as_py()
        if limits["min"] < 0 or limits["max"] >= codebook_size:
            raise ReadError(
                f"{name} has codes from {limits['min']} to {limits['max']}; the codebook has {codebook_size}."
            )


__all__ = ["MAX_GROUP_BYTES", "check_manifest", "check_table"]
