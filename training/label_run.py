"""The labelling itself: work units, the models, committing, and what is done when everything is there."""

import json
import logging
import platform
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lapa.data.atomic_files import create_atomically, remove_stale, write_atomically
from lapa.data.episode_source import SkippedEpisodes
from lapa.data.label_manifest import (
    CARD,
    COUNTS_FOLDER,
    DATA_FOLDER,
    MANIFEST,
    LabelCounts,
    LabelManifest,
    LabelSettings,
    LabelUnit,
    SourceSettings,
    unit_file,
)
from lapa.data.label_table import present_units, read_unit_record
from lapa.data.mixture import FramePairSource
from lapa.data.read_counts import UNREADABLE
from lapa.data.rlds import RldsSource
from lapa.data.schema import ReadError
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizerEncoder
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer
from lapa.training.label_reader import LabelBatch, LabelBatches, ReaderOptions, ReadFailure, tensor_to_rows
from lapa.training.label_vision import encode_levels
from lapa.training.label_writer import WRITERS, UnitWriter

logger = logging.getLogger(__name__)

PACKAGES = ("lapa", "torch", "transformers", "datasets", "pyarrow", "pillow", "av", "numpy")
# Batches that a reader process keeps ready, and seconds between two looks at the rate.
PREFETCHED_BATCHES, RATE_SECONDS = 2, 1.0


def package_versions() -> dict[str, str]:
    """Of what decodes, computes and writes."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def source_settings(source: FramePairSource) -> SourceSettings:
    """What a folder records of a source."""
    row = source.source.dataset if isinstance(source.source, RldsSource) else None
    return SourceSettings(
        name=source.source.name,
        camera=source.chosen_camera,
        frame_gap=source.gap.frames,
        frame_gap_seconds=source.gap.seconds,
        filters=[repr(item) for item in source.filters],
        num_shards=len(source.source.shards),
        num_episodes=source.source.num_episodes,
        shards_hash=source.source.shards_hash,
        licence=None if row is None else row.licence,
        options=dict(source.source.options),
    )


def plan_units(sources: Sequence[FramePairSource], episodes_per_unit: int) -> list[LabelUnit]:
    """Stretches of at most `episodes_per_unit` episodes of each shard, in order: the same for any number of processes."""
    units: list[LabelUnit] = []
    for number, source in enumerate(sources):
        for shard, entry in enumerate(source.source.shards):
            for start in range(0, entry.num_episodes, episodes_per_unit):
                stop = min(start + episodes_per_unit, entry.num_episodes)
                units.append(LabelUnit(len(units), number, shard, start, stop))
    return units


class PairEncoder:
    """
    Codes of batches of pairs; on a GPU a batch is computed while the one before is written.

    Args:
        quantizer: On its device, in its dtype.
        vision_tokenizer: Likewise, if vision codes are wanted.
        batch_size: Pairs of a whole batch.
        compile: Whether the quantizer is compiled, for batches of that one size.
    """

    def __init__(
        self,
        quantizer: LapaQuantizerEncoder,
        vision_tokenizer: LapaVisionTokenizer | None = None,
        batch_size: int = 64,
        compile: bool = False,
    ) -> None:
        self.quantizer, self.vision_tokenizer = quantizer.eval(), vision_tokenizer
        parameter = next(quantizer.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.padded_size = batch_size if compile else None
        self._encode: Any = torch.compile(quantizer, dynamic=False) if compile else quantizer

    @torch.no_grad()
    def launch(self, batch: LabelBatch) -> "EncodedBatch":
        """Begins to compute the codes of a batch."""
        pairs = batch.pairs
        if self.padded_size is not None and len(pairs) < self.padded_size:
            # One shape, one compilation.
            pairs = torch.cat([pairs, pairs[-1:].expand(self.padded_size - len(pairs), 2)])
        codes = self._encode(self._pixels(batch.frames, pairs)).latent_action_codes[: len(batch.pairs)]
        vision = None
        if self.vision_tokenizer is not None and batch.levels is not None:
            vision = encode_levels(self.vision_tokenizer, batch.levels)
        return EncodedBatch(codes, vision)

    def _pixels(self, frames: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        """(num_frames, height, width, 3) uint8 and (batch, 2) -> (batch, 2, 3, height, width) in [0, 1]."""
        frames, pairs = (tensor.to(self.device, non_blocking=True) for tensor in (frames, pairs))
        # b t h w c -> b t c h w
        return (frames[pairs].permute(0, 1, 4, 2, 3).contiguous().float() / 255).to(self.dtype)


class EncodedBatch:
    """Codes on their way to the host."""

    def __init__(self, codes: torch.Tensor, vision_codes: torch.Tensor | None) -> None:
        self._codes, self._vision = self._to_host(codes), None if vision_codes is None else self._to_host(vision_codes)
        self._event = None
        if codes.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    @staticmethod
    def _to_host(values: torch.Tensor) -> torch.Tensor:
        if not values.is_cuda:
            return values
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)

    def wait(self) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """(num_pairs, num_latent_tokens) and, where there are any, (num_pairs, num_image_tokens)."""
        if self._event is not None:
            self._event.synchronize()
        return self._codes.numpy(), None if self._vision is None else self._vision.numpy()


@dataclass(frozen=True)
class RunOptions:
    """
    What the bytes do not depend on.

    Args:
        share, num_shares (`int`): Which units this process labels: those whose index is `share` modulo `num_shares`.
        num_workers (`int`): Processes that read; 0 reads between batches.
        max_skipped (`float`): Share of the episodes that may be skipped.
        show_progress (`bool`): Whether there is a progress bar.
        command (`str`, *optional*): What finishes the folder.
    """

    share: int = 0
    num_shares: int = 1
    num_workers: int = 2
    max_skipped: float = 0.05
    show_progress: bool = True
    command: str | None = None


class Labeller:
    """
    Labels one process's share of the units of a folder.

    Args:
        folder: Of the labels.
        settings: Of the run.
        sources: What is labelled.
        reader_options: What is read of it.
        options: Of this process.

    Raises:
        ValueError: A folder that holds something else, or labels made with other settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: LabelSettings,
        sources: Sequence[FramePairSource],
        reader_options: ReaderOptions,
        options: RunOptions,
    ) -> None:
        self.folder, self.settings, self.sources = folder, settings, tuple(sources)
        self.reader_options, self.options = reader_options, options
        self.units = plan_units(sources, settings.episodes_per_unit)
        assert len(self.units) == settings.num_units
        self.seen = LabelCounts()
        self.num_rows = 0
        self._writers: dict[int, UnitWriter] = {}
        self._code_counts: dict[int, NDArray[np.int64]] = {}

    def prepare(self) -> None:
        """Takes the folder, or checks that it is of this run, and clears away what dead processes left."""
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"`output` is a file: {folder}.")
        visible = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
        if visible and not (folder / MANIFEST).is_file():
            raise ValueError(f"`output` ({folder}) holds no labels, but {visible[0].name}: name a new folder.")
        manifest = LabelManifest(self.settings, command=self.options.command)
        if not (folder / MANIFEST).is_file():
            create_atomically(folder / MANIFEST, manifest.to_bytes())
        different = self.settings.differences(LabelManifest.load(folder).settings)
        if different:
            raise ValueError(
                f"`output` ({folder}) holds labels made with other settings: {', '.join(different)}. Name a new folder."
            )
        for name in ("", DATA_FOLDER, COUNTS_FOLDER):
            if removed := remove_stale(folder / name):
                logger.info("removed %d unfinished files of processes that have ended", len(removed))

    def pending(self) -> list[LabelUnit]:
        """Units of this share that are not there yet."""
        present = present_units(self.folder, self.settings)
        share, num_shares = self.options.share, self.options.num_shares
        return [unit for unit in self.units[share::num_shares] if unit.index not in present]

    def run(self, encoder: PairEncoder, units: Sequence[LabelUnit]) -> None:
        """
        Labels units. Each appears when it is complete.

        Raises:
            ReadError: What cannot be read, or more of it than `max_skipped` allows.
        """
        total = sum(unit.stop - unit.start for unit in units)
        launched: deque[tuple[LabelBatch, EncodedBatch | None]] = deque()
        try:
            with tqdm(total=total, desc="labelling", unit="episode", disable=not self.options.show_progress) as bar:
                rate = _Rate(bar)
                for batch in self._loader(units, encoder.device):
                    if isinstance(batch, ReadFailure):
                        raise batch.error()
                    launched.append((batch, encoder.launch(batch) if len(batch.pairs) else None))
                    while len(launched) > (encoder.device.type == "cuda"):
                        self._store(*launched.popleft(), rate)
                while launched:
                    self._store(*launched.popleft(), rate)
        finally:
            for writer in self._writers.values():
                writer.discard()
            self._writers = {}

    def _loader(self, units: Sequence[LabelUnit], device: torch.device) -> DataLoader[Any]:
        num_workers = min(self.options.num_workers, len(units))
        more: dict[str, Any] = {"prefetch_factor": PREFETCHED_BATCHES, "in_order": False} if num_workers else {}
        return DataLoader(
            LabelBatches(self.sources, units, self.reader_options),
            batch_size=None,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            **more,
        )

    def _store(self, batch: LabelBatch, encoded: "EncodedBatch | None", rate: "_Rate") -> None:
        """Writes the rows of a batch; the last of a unit commits it."""
        if batch.unit not in self._writers:
            self._writers[batch.unit] = WRITERS[self.settings.format](self.folder, self.settings, batch.unit)
            shape = (self.settings.num_latent_tokens, self.settings.codebook_size)
            self._code_counts[batch.unit] = np.zeros(shape, dtype=np.int64)
        if encoded is not None:
            codes, vision_codes = encoded.wait()
            self._writers[batch.unit].add(tensor_to_rows(batch.rows), codes, vision_codes)
            places = np.broadcast_to(np.arange(codes.shape[1]), codes.shape)
            np.add.at(self._code_counts[batch.unit], (places, codes), 1)
        rate.add(len(batch.pairs), batch.num_episodes)
        if batch.counts is not None:
            self._commit(batch.unit, LabelCounts.from_dict(batch.counts))

    def _commit(self, index: int, counts: LabelCounts) -> None:
        unit, source = self.units[index], self.sources[self.units[index].source].source
        counts.code_counts = self._code_counts.pop(index).tolist()
        self.seen = self.seen + counts
        check_skipped(self.seen, self.options.max_skipped, SkippedEpisodes().min_episodes)
        self._writers[index].commit(
            {
                "unit": index,
                "source": source.name,
                "shard": source.shards[unit.shard].name,
                "episodes": [unit.start, unit.stop],
                "device_name": device_name(self.settings.device),
                **counts.to_dict(),
            }
        )
        del self._writers[index]

    def finalize(self, card: "CardWriter") -> LabelManifest | None:
        """
        Writes totals and card once every unit is there; whoever comes to it last does, and doing it twice changes nothing.

        Returns:
            What the folder holds; None while units are missing.

        Raises:
            ReadError: A damaged unit, or more skipped than `max_skipped` allows.
            ValueError: No rows at all.
        """
        if len(present_units(self.folder, self.settings)) < self.settings.num_units:
            return None
        manifest = LabelManifest(self.settings, complete=True)
        totals = LabelCounts()
        by_source: dict[str, LabelCounts] = {source.name: LabelCounts() for source in self.settings.sources}
        for index in range(self.settings.num_units):
            record = read_unit_record(self.folder, self.settings, index)
            counts = LabelCounts.from_dict(record)
            totals, by_source[record["source"]] = totals + counts, by_source[record["source"]] + counts
            manifest.units.append(_unit_entry(self.settings, record, counts))
        check_skipped(totals, self.options.max_skipped)
        if not totals.rows:
            raise ValueError(
                f"{', '.join(by_source)} gave no pair of frames to label: no episode is longer than the frame gap."
                if not totals.pairs.dropped_items
                else f"{', '.join(by_source)} gave no pair of frames to label: {_reasons(totals)}."
            )
        manifest.totals = totals
        manifest.source_totals = {name: _source_entry(counts) for name, counts in by_source.items()}
        card(self.folder, manifest)
        manifest.save(self.folder)
        return manifest


class _Rate:
    """Moves the bar by episodes, whose number is known, and shows pairs per second, which is what takes the time."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.num_pairs = bar, 0
        self.start = self.shown = time.monotonic()

    def add(self, num_pairs: int, num_episodes: int) -> None:
        """Counts a batch."""
        self.num_pairs += num_pairs
        now = time.monotonic()
        if now - self.shown > RATE_SECONDS:
            self.shown = now
            self.bar.set_postfix_str(f"{self.num_pairs / (now - self.start):.0f} pairs/s", refresh=False)
        self.bar.update(num_episodes)


class CardWriter:
    """
    Writes the dataset card of a folder.

    Args:
        name: Repository or folder that the snippets load.
        license: Of the labels, as the Hub names it.
    """

    def __init__(self, name: str, license: str | None = None) -> None:
        self.name, self.license = name, license

    def __call__(self, folder: Path, manifest: LabelManifest) -> None:
        """Writes `README.md`."""
        from lapa.hub_cards.labels import render_labels_card

        values = json.loads(manifest.to_bytes())
        write_atomically(folder / CARD, str(render_labels_card(values, self.name, self.license)).encode())


def check_skipped(counts: LabelCounts, max_skipped: float, min_episodes: int = 1) -> None:
    """Raises a `ReadError` where a larger share than `max_skipped` of at least `min_episodes` could not be read."""
    skipped, seen = counts.pairs.skipped_groups[UNREADABLE], counts.pairs.groups
    if seen >= min_episodes and skipped > max_skipped * seen:
        example = next(iter(counts.skipped), "no message is kept")
        raise ReadError(
            f"{skipped} of {seen} episodes could not be read, more than the share of {max_skipped:g} that `max_skipped` "
            f"allows; one of them: {example}"
        )


def device_name(device: str) -> str:
    """What computes: codes near a boundary may differ between kinds of processors."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def _unit_entry(settings: LabelSettings, record: dict[str, Any], counts: LabelCounts) -> dict[str, Any]:
    entry = {
        "file": unit_file(record["unit"], settings.num_units, settings.format),
        **{name: record[name] for name in ("source", "shard", "episodes", "device_name")},
        "rows": counts.rows,
        "rows_without_instruction": counts.rows_without_instruction,
    }
    left_out = {"dropped": dict(counts.pairs.dropped_items), "skipped": dict(counts.pairs.skipped_groups)}
    return entry | {name: reasons for name, reasons in left_out.items() if reasons}


def _source_entry(counts: LabelCounts) -> dict[str, Any]:
    return {
        "rows": counts.rows,
        "rows_without_instruction": counts.rows_without_instruction,
        "episodes": counts.pairs.groups,
        "dropped": dict(counts.pairs.dropped_items),
        "skipped": dict(counts.pairs.skipped_groups),
        "mean_gap_seconds": counts.pairs.gaps.mean_seconds,
    }


def _reasons(counts: LabelCounts) -> str:
    metrics = counts.pairs.metrics()
    return ", ".join(f"{name} {value:g}" for name, value in metrics.items() if "/" in name)


__all__ = [
    "CardWriter",
    "Labeller",
    "PairEncoder",
    "RunOptions",
    "package_versions",
    "plan_units",
    "source_settings",
]
