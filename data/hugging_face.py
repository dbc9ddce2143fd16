"""
Every source as a Hugging Face data set: its frame pairs, its steps, its episodes; streaming or materialised.

The quantizer is trained from a [`FramePairStream`], which shuffles and resumes without reading anything twice. This is for
everything else that works on `datasets`: looking at rows, `map` and `filter`, `push_to_hub`, other people's trainers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lapa.data.episode_source import EpisodeSource, read_or_skip
from lapa.data.frame_pairs import image_height_width
from lapa.data.hugging_face_rows import (
    COUNTS,
    LABELS,
    RowOptions,
    Rows,
    Tally,
    episode_features,
    episode_rows,
    pair_features,
    pair_rows,
    step_features,
    step_rows,
)
from lapa.data.mixture import FramePairSource
from lapa.data.open_source import SourceSpec, is_mixture, open_mixture, open_pair_source
from lapa.data.schema import ReadError

if TYPE_CHECKING:
    import datasets

Sources = EpisodeSource | FramePairSource | SourceSpec | Sequence[EpisodeSource | FramePairSource | SourceSpec]
# Of the rows below; raised when their content changes, so that what was materialised earlier is not taken for it.
ROWS_VERSION = 1


@dataclass(frozen=True)
class Piece:
    """Episodes of one shard of one source, which are read together: what `datasets` divides over nodes and workers."""

    source: int
    shard: int
    episodes: tuple[int, ...]


def iterable_pair_dataset(
    sources: Sources,
    *,
    image_size: int | Sequence[int] | None = None,
    image_format: str = "png",
    min_pieces: int = 1,
    on_error: str = "raise",
    max_skipped: float = 0.05,
) -> "datasets.IterableDataset":
    r"""
    Frame pairs as a streaming data set, in the order of the sources.

    ```python
    >>> pairs = iterable_pair_dataset("bridge_rlds/1.0.0", image_size=256)
    >>> next(iter(pairs))["first_frame"].size
    (256, 256)
    ```

    Columns: `first_frame`, `second_frame` (`Image`, RGB), `episode_id`, `source`, `camera`, `steps` (first, second),
    `seconds` between them (None where the source does not tell), `instruction` (None where there is none).

    What is divided over nodes (`split_dataset_by_node`) and loader workers is the list of pieces: the shards of the
    sources, or parts of them. Resume by `state_dict` is exact; it reads the piece at hand from its start again (decoding
    it), so small pieces resume faster.

    Args:
        sources: A source; what `lapa.data.open_source` opens (a path, URL or mapping), or a mixture file; a
            `FramePairSource` to say camera, gap and filters (weights are not used: every pair comes once); or a list of
            these.
        image_size: Size of the frames, one number or (height, width); None leaves them.
        image_format: How frames are stored that are not image files of the source as they are: `png` (exact) or `jpeg`.
        min_pieces: At least so many pieces, as far as there are episodes. A file that is read over the network is read
            from its start for each of its pieces.
        on_error: `raise` stops at what cannot be read, `skip` counts it and goes on.
        max_skipped: Share of episodes that may be skipped, of 100 or more that one process has read.

    Raises:
        ValueError: An argument out of range, no source, sources of one name, and what opening them refuses.
    """
    options = RowOptions(image_height_width(image_size), image_format)
    return _iterable(pair_rows, pair_features(), sources, options, min_pieces, on_error, max_skipped)


def pair_dataset(
    sources: Sources,
    *,
    image_size: int | Sequence[int] | None = None,
    image_format: str = "png",
    on_error: str = "raise",
    max_skipped: float = 0.05,
    cache_dir: str | Path | None = None,
) -> "datasets.Dataset":
    """
    Frame pairs as a materialised data set: written to Arrow files once, found there again by the same call.

    The cache is found by everything that the sources were opened with and by the options here. A source whose files
    changed under the same names is not noticed: take another `cache_dir`, or remove the old one.

    Args:
        sources, image_size, image_format, on_error: As in `iterable_pair_dataset`.
        max_skipped: Share of all episodes that may be skipped; more leaves no data set.
        cache_dir: Folder of the cache; that of `datasets` when None.

    Raises:
        ValueError, ReadError: As `iterable_pair_dataset`, and at once what cannot be read.
    """
    options = RowOptions(image_height_width(image_size), image_format)
    return _materialised(pair_rows, pair_features(), sources, options, on_error, max_skipped, cache_dir)


def iterable_step_dataset(
    sources: Sources,
    *,
    require: Sequence[str] = LABELS,
    image_size: int | Sequence[int] | None = None,
    image_format: str = "png",
    min_pieces: int = 1,
    on_error: str = "raise",
    max_skipped: float = 0.05,
) -> "datasets.IterableDataset":
    """
    Single steps with their labels as a streaming data set: what a policy is finetuned on.

    Columns: `image` (`Image`, RGB), `episode_id`, `source`, `camera`, `step_index`, `timestamp` (seconds), `instruction`,
    `action` and `proprio` (lists of float32, physical units of the source), `embodiment`, `unnorm_key`; None where the
    source has no such thing. Episodes whose camera recorded nothing have no steps.

    Args:
        require: What episodes must have, of `action` and `instruction`; others are left out, and counted in the log.
        sources, image_size, image_format, min_pieces, on_error, max_skipped: As in `iterable_pair_dataset`.

    Raises:
        ValueError: As `iterable_pair_dataset`.
    """
    options = RowOptions(image_height_width(image_size), image_format, require=tuple(require))
    return _iterable(step_rows, step_features(), sources, options, min_pieces, on_error, max_skipped)


def step_dataset(
    sources: Sources,
    *,
    require: Sequence[str] = LABELS,
    image_size: int | Sequence[int] | None = None,
    image_format: str = "png",
    on_error: str = "raise",
    max_skipped: float = 0.05,
    cache_dir: str | Path | None = None,
) -> "datasets.Dataset":
    """Single steps with their labels as a materialised data set; arguments as in `iterable_step_dataset`, `pair_dataset`."""
    options = RowOptions(image_height_width(image_size), image_format, require=tuple(require))
    return _materialised(step_rows, step_features(), sources, options, on_error, max_skipped, cache_dir)


def iterable_episode_dataset(
    sources: Sources,
    *,
    images: bool = False,
    image_size: int | Sequence[int] | None = None,
    image_format: str = "png",
    min_pieces: int = 1,
    on_error: str = "raise",
    max_skipped: float = 0.05,
) -> "datasets.IterableDataset":
    """
    Episodes as a streaming data set, a row each.

    Columns: `episode_id`, `source`, `num_steps`, `cameras`, `instructions`, `timestamps`, `action` and `proprio` (lists of
    lists of float32), `embodiment`, `unnorm_key`; with `images` also `images` (a list of `Image`) of the chosen `camera`.

    Args:
        images: Whether to decode and give the frames.
        sources, image_size, image_format, min_pieces, on_error, max_skipped: As in `iterable_pair_dataset`.

    Raises:
        ValueError: As `iterable_pair_dataset`.
    """
    options = RowOptions(image_height_width(image_size), image_format, images=images)
    return _iterable(episode_rows, episode_features(images), sources, options, min_pieces, on_error, max_skipped)


def episode_dataset(
    sources: Sources,
    *,
    images: bool = False,
    image_size: int | Sequence[int] | None = None,
    image_format: str = "png",
    on_error: str = "raise",
    max_skipped: float = 0.05,
    cache_dir: str | Path | None = None,
) -> "datasets.Dataset":
    """Episodes as a materialised data set; arguments as in `iterable_episode_dataset` and `pair_dataset`."""
    options = RowOptions(image_height_width(image_size), image_format, images=images)
    return _materialised(episode_rows, episode_features(images), sources, options, on_error, max_skipped, cache_dir)


def open_sources(sources: Sources) -> tuple[FramePairSource, ...]:
    """The sources behind whatever names them; see `iterable_pair_dataset`."""
    if isinstance(sources, (str, Path)) and is_mixture(sources):
        opened = open_mixture(sources)
    else:
        several = isinstance(sources, Sequence) and not isinstance(sources, str)
        entries: Sequence[Any] = sources if several else [sources]  # type: ignore[assignment]
        opened = tuple(_opened(entry) for entry in entries)
    if not opened:
        raise ValueError("`sources` must hold at least one source, got none.")
    names = [entry.name for entry in opened]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"`sources` must have different names, got {twice!r} twice.")
    return opened


def _opened(entry: EpisodeSource | FramePairSource | SourceSpec) -> FramePairSource:
    if isinstance(entry, FramePairSource):
        return entry
    return FramePairSource(entry) if isinstance(entry, EpisodeSource) else open_pair_source(entry)


def _pieces(sources: Sequence[FramePairSource], least: int) -> list[Piece]:
    """All episodes of all sources in order, in pieces of one shard each, as even as may be."""
    if least < 1:
        raise ValueError(f"`min_pieces` must be at least 1, got {least}.")
    shards = [
        (number, shard, entry.num_episodes)
        for number, source in enumerate(sources)
        for shard, entry in enumerate(source.source.shards)
        if entry.num_episodes
    ]
    total = sum(count for *_, count in shards)
    if not total:
        raise ValueError("`sources` have no episode.")
    largest = max(1, total // least) if least > len(shards) else total
    return [
        Piece(number, shard, tuple(part.tolist()))
        for number, shard, count in shards
        for part in np.array_split(np.arange(count), -(-count // largest))
    ]


def _generate(
    pieces: list[Piece],
    sources: tuple[FramePairSource, ...],
    rows: Rows,
    options: RowOptions,
    tally: Tally,
) -> Iterator[dict[str, Any]]:
    """Rows of some pieces; `datasets` calls it with one at a time, or with those of a worker."""
    for piece in pieces:
        source = sources[piece.source]
        skipped = None if tally.on_error == "raise" else tally
        for _, episode in read_or_skip(source.source, piece.shard, skipped, piece.episodes):
            try:
                yield from rows(source, episode, options, tally)
            except ReadError as error:
                tally(error)
            else:
                tally.skipped.seen()
        tally.end_piece()


def _iterable(
    rows: Rows,
    features: "datasets.Features",
    sources: Sources,
    options: RowOptions,
    min_pieces: int,
    on_error: str,
    max_skipped: float,
) -> "datasets.IterableDataset":
    from datasets import IterableDataset

    opened = open_sources(sources)
    tally = Tally(on_error, max_skipped, counts=COUNTS[rows]())
    kwargs = {"sources": opened, "rows": rows, "options": options, "tally": tally}
    return IterableDataset.from_generator(
        _generate, features=features, gen_kwargs={"pieces": _pieces(opened, min_pieces), **kwargs}
    )


def _materialised(
    rows: Rows,
    features: "datasets.Features",
    sources: Sources,
    options: RowOptions,
    on_error: str,
    max_skipped: float,
    cache_dir: str | Path | None,
) -> "datasets.Dataset":
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.fingerprint import Hasher

    opened = open_sources(sources)
    pieces = _pieces(opened, 1)
    # Everything that rows depend on; `tally` would make it differ by what a run may skip.
    fingerprint = Hasher.hash([ROWS_VERSION, rows.__name__, opened, options, on_error, features])
    tally = Tally(on_error, max_skipped, len(pieces), COUNTS[rows]())
    kwargs = {"sources": opened, "rows": rows, "options": options}
    try:
        return Dataset.from_generator(
            _generate,
            features=features,
            cache_dir=None if cache_dir is None else str(cache_dir),
            gen_kwargs={"pieces": pieces, **kwargs, "tally": tally},
            fingerprint=fingerprint,
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            # What could not be read says more than that nothing was generated.
            raise error.__cause__ from None
        raise


__all__ = [
    "episode_dataset",
    "episode_features",
    "iterable_episode_dataset",
    "iterable_pair_dataset",
    "iterable_step_dataset",
    "open_sources",
    "pair_dataset",
    "pair_features",
    "step_dataset",
    "step_features",
]
