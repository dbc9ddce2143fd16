"""What a folder of labels records about itself: settings, counts, and the list of its files."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lapa.data.atomic_files import write_atomically
from lapa.data.file_tree import FileTree
from lapa.data.label_checks import check_manifest
from lapa.data.read_counts import PairCounts
from lapa.data.schema import ReadError

VERSION = 1
MANIFEST, CARD, DATA_FOLDER, COUNTS_FOLDER = "labels.json", "README.md", "data", "counts"
FORMATS = ("parquet", "jsonl")
# Rows of a row group, which is what training reads at a time: with images a few megabytes.
ROW_GROUP_ROWS = 256
# Reasons of what could not be read that are kept of a unit; the rest is only counted.
MAX_REASONS = 20
# A listing larger than this is no `labels.json`.
MAX_MANIFEST_BYTES = 1 << 30


def unit_file(index: int, num_units: int, ending: str) -> str:
    """Path of a unit's file below the folder of the labels."""
    return f"{DATA_FOLDER}/labels-{index:05d}-of-{num_units:05d}.{ending}"


@dataclass(frozen=True)
class LabelUnit:
    """
    A piece of work that is committed as one file: some episodes of one shard of one source.

    Args:
        index (`int`): Among all units.
        source (`int`): Which of the sources.
        shard (`int`): Which shard of it.
        start, stop (`int`): Episodes `start` to `stop - 1` of the shard.
    """

    index: int
    source: int
    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class SourceSettings:
    """
    One source of a folder of labels.

    Args:
        name (`str`): Data set and split, as in the column `source`.
        camera (`str`): Whose frames.
        frame_gap (`int`, *optional*), frame_gap_seconds (`float`, *optional*): Between the frames of a pair.
        filters (`list[str]`): Rules that left pairs out.
        num_shards, num_episodes (`int`): Size of the source.
        shards_hash (`str`): SHA-256 over the names and sizes of its shards.
        licence (`str`, *optional*): Where the table of Open X-Embodiment tells it.
        options (`dict`): What it was opened with beside that, see `EpisodeSource.options`.
    """

    name: str
    camera: str
    frame_gap: int | None
    frame_gap_seconds: float | None
    filters: list[str]
    num_shards: int
    num_episodes: int
    shards_hash: str
    licence: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelSettings:
    """
    What the bytes of a folder of labels depend on. A run with other settings must take another folder.

    Args:
        format (`str`): `parquet` or `jsonl`.
        sources (`list[SourceSettings]`): What was labelled.
        quantizer_hash (`str`): SHA-256 of the quantizer's weights.
        codebook_size, num_latent_tokens (`int`): Its sizes.
        frame_size (`list[int]`): Height and width of the frames it saw.
        num_units, episodes_per_unit (`int`): How the work was divided.
        row_group_rows (`int`): Rows of each row group but the last of a file.
        batch_size (`int`): Pairs that were encoded at a time; never across units.
        num_threads (`int`): Of torch.
        device, dtype (`str`): Kind of device (`cpu`, `cuda`) and number format of the quantizer.
        compile (`bool`): Whether the quantizer was compiled.
        image_size (`int`, *optional*): Side of the stored images; as they are recorded when None.
        image_quality (`int`): Of stored JPEG images that were encoded here.
        keep_jpeg (`bool`): Whether frames that are recorded as JPEG are stored as they are.
        action (`bool`): Whether there is a column of actions.
        vision_tokenizer_hash (`str`, *optional*): SHA-256 over the weights of the vision tokenizer; None without codes.
        num_image_tokens (`int`, *optional*): Vision codes per image.
        versions (`dict[str, str]`): Of the packages.
    """

    format: str
    sources: list[SourceSettings]
    quantizer_hash: str
    codebook_size: int
    num_latent_tokens: int
    frame_size: list[int]
    num_units: int
    episodes_per_unit: int
    row_group_rows: int
    batch_size: int
    num_threads: int
    device: str
    dtype: str
    compile: bool
    image_size: int | None
    image_quality: int
    keep_jpeg: bool
    action: bool
    vision_tokenizer_hash: str | None
    num_image_tokens: int | None
    versions: dict[str, str]

    @property
    def digest(self) -> str:
        """Short name of these settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, earlier: "LabelSettings") -> list[str]:
        """What differs, as `name (now, not before)`; of sources and versions the entry is named."""
        ours, theirs = _flat(asdict(self)), _flat(asdict(earlier))
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        return [f"{name} ({ours.get(name)!r}, not {theirs.get(name)!r})" for name in names]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LabelSettings":
        """Inverse of `dataclasses.asdict`."""
        return cls(**{**values, "sources": [SourceSettings(**source) for source in values["sources"]]})


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested mappings and lists of them, by their path."""
    if isinstance(values, Mapping):
        pairs = [(f"{name}.{key}" if name else str(key), value) for key, value in values.items()]
    elif isinstance(values, list) and any(isinstance(value, Mapping) for value in values):
        pairs = [(f"{name}[{number}]", value) for number, value in enumerate(values)]
    else:
        return {name: values}
    return {path: leaf for prefix, value in pairs for path, leaf in _flat(value, prefix).items()}


@dataclass
class LabelCounts:
    """
    What became of the episodes and pairs of a unit, or of many. Adding two gives the joint count.

    Args:
        pairs (`PairCounts`): Episodes and pairs, what was left out and why, and the gaps.
        rows_without_instruction (`int`): Rows that say nothing of what to do.
        code_counts (`list[list[int]]`): (num_latent_tokens, codebook_size) how often each code stands in each place.
        skipped (`Counter[str]`): Messages of what could not be read; `MAX_REASONS` of a unit.
    """

    pairs: PairCounts = field(default_factory=PairCounts)
    rows_without_instruction: int = 0
    code_counts: list[list[int]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """Rows written."""
        return self.pairs.items

    def __add__(self, other: "LabelCounts") -> "LabelCounts":
        codes = [counts for counts in (self.code_counts, other.code_counts) if counts]
        return LabelCounts(
            self.pairs + other.pairs,
            self.rows_without_instruction + other.rows_without_instruction,
            np.sum(codes, axis=0).tolist() if codes else [],
            self.skipped + other.skipped,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return {
            "rows": self.rows,
            "rows_without_instruction": self.rows_without_instruction,
            "pairs": self.pairs.to_dict(),
            "code_counts": self.code_counts,
            "skipped": dict(self.skipped.most_common(MAX_REASONS)),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LabelCounts":
        """Inverse of `to_dict`."""
        return cls(
            PairCounts.from_dict(values["pairs"]),
            int(values["rows_without_instruction"]),
            [[int(count) for count in row] for row in values["code_counts"]],
            Counter(values["skipped"]),
        )


@dataclass
class LabelManifest:
    """
    Content of `labels.json`.

    Args:
        settings (`LabelSettings`): What the labels were made with.
        complete (`bool`): Whether every unit is there.
        command (`str`, *optional*): Which finishes the folder, while it is not complete.
        totals (`LabelCounts`, *optional*): Over all units.
        source_totals (`dict[str, dict]`): Rows, episodes and what was left out, per source.
        units (`list[dict]`): Of each unit `file`, `source`, `shard`, `episodes` (from, to), `rows`,
            `rows_without_instruction`, `device_name`, and where anything was left out `dropped` and `skipped` with the
            reasons.
    """

    settings: LabelSettings
    complete: bool = False
    command: str | None = None
    totals: LabelCounts | None = None
    source_totals: dict[str, dict[str, Any]] = field(default_factory=dict)
    units: list[dict[str, Any]] = field(default_factory=list)

    # What readers and trainers ask for.
    @property
    def quantizer_hash(self) -> str:
        """Of the settings."""
        return self.settings.quantizer_hash

    @property
    def codebook_size(self) -> int:
        """Of the settings."""
        return self.settings.codebook_size

    @property
    def num_latent_tokens(self) -> int:
        """Of the settings."""
        return self.settings.num_latent_tokens

    def to_bytes(self) -> bytes:
        """As JSON; equal manifests are equal bytes."""
        values = {
            "version": VERSION,
            "complete": self.complete,
            "command": self.command,
            "settings": asdict(self.settings),
            "totals": None if self.totals is None else self.totals.to_dict(),
            "sources": self.source_totals,
        }
        head = json.dumps({name: value for name, value in values.items() if value is not None}, indent=2)
        units = ",\n".join(f"    {json.dumps(unit)}" for unit in self.units)
        return (head[: head.rindex("\n}")] + f',\n  "units": [\n{units}\n  ]\n}}\n').encode()

    def save(self, folder: Path) -> None:
        """Writes `labels.json`."""
        write_atomically(folder / MANIFEST, self.to_bytes())

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> "LabelManifest":
        """
        Inverse of `to_bytes`.

        Raises:
            ValueError: Damaged content, or that of another version.
        """
        try:
            values = json.loads(content)
            if values.get("version") != VERSION:
                raise ReadError(f"{name} has version {values.get('version')!r:.50}, this code reads {VERSION}.")
            check_manifest(values, FORMATS, unit_file)
            totals = values.get("totals")
            return cls(
                LabelSettings.from_dict(values["settings"]),
                bool(values["complete"]),
                values.get("command"),
                None if totals is None else LabelCounts.from_dict(totals),
                dict(values["sources"]),
                list(values["units"]),
            )
        except ReadError:
            raise
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} is damaged: {error!r}.") from error
        except (ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{name} is damaged: {error}.") from error

    @classmethod
    def load(cls, folder: str | Path) -> "LabelManifest":
        """
        Reads `labels.json` of a local folder or a URL.

        Raises:
            ValueError: A folder without it, or one that is damaged.
        """
        tree = open_tree(str(folder))
        if not tree.is_file(MANIFEST):
            raise ValueError(f"{folder} holds no labels: it has no {MANIFEST}. `lapa label` writes it.")
        with tree.open(MANIFEST) as file:
            content = file.read(MAX_MANIFEST_BYTES)
        return cls.from_bytes(content, tree.location(MANIFEST))


def open_tree(folder: str) -> FileTree:
    """A folder of labels; a `ValueError` that says so where there is none."""
    try:
        return FileTree(folder)
    except ValueError as error:
        raise ValueError(f"{folder} holds no labels: {error}") from error


__all__ = [
    "CARD",
    "COUNTS_FOLDER",
    "DATA_FOLDER",
    "FORMATS",
    "MANIFEST",
    "MAX_REASONS",
    "ROW_GROUP_ROWS",
    "VERSION",
    "LabelCounts",
    "LabelManifest",
    "LabelSettings",
    "LabelUnit",
    "SourceSettings",
    "open_tree",
    "unit_file",
]
