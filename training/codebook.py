"""The quantizer's codebook over a training: started from data, counted exactly, dead codes put back to use."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lapa.training.metrics import count_codes

STATE_FILE = "codebook_state.safetensors"
# Counts that end with a log, not with an update of the codebook.
WINDOWS = ("logged_counts", "watched_counts")
# Steps between two replacements of the published rule, by the step below which the interval holds.
PUBLISHED_SCHEDULE = ((100, 10), (1000, 100), (5000, 500))
# Of the spread of the embeddings: two codes drawn from the same embedding must not stay equal for ever.
JITTER = 1e-3
# Of the state's file: 1 (which says nothing of it) has no counts of unfinished windows.
STATE_VERSION = 2


@dataclass
class CodebookState:
    """
    Usage of the codes, over all processes.

    Args:
        usage_counts (`torch.Tensor` of shape `(codebook_size,)`): int64 uses since the last update, every occurrence.
        batch_counts (`torch.Tensor` of shape `(codebook_size,)`): int64 batches since the last update in which the code
            occurred, which is what the published code counts.
        num_replaced (`int`): Codes replaced so far.
        first_embeddings (`torch.Tensor` of shape `(num_embeddings, codebook_dim)`, *optional*): Embeddings of the first
            steps in the order of their samples, while the codebook still waits to be drawn from them.
        logged_counts (`torch.Tensor` of shape `(codebook_size,)`): int64 uses since the last log.
        watched_counts (`torch.Tensor` of shape `(codebook_size,)`): int64 uses in the watchdog's unfinished window.
    """

    usage_counts: torch.Tensor
    batch_counts: torch.Tensor
    num_replaced: int = field(default=0)
    first_embeddings: torch.Tensor | None = None
    logged_counts: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    watched_counts: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        for name in WINDOWS:
            if not len(getattr(self, name)):
                setattr(self, name, torch.zeros_like(self.usage_counts))

    @classmethod
    def new(cls, codebook_size: int) -> "CodebookState":
        """Nothing counted yet."""
        return cls(torch.zeros(codebook_size, dtype=torch.int64), torch.zeros(codebook_size, dtype=torch.int64))

    def count(self, counts: torch.Tensor) -> None:
        """Adds one batch's `counts` (codebook_size,) int64, already summed over processes."""
        counts = counts.cpu()
        self.usage_counts += counts
        self.batch_counts += counts > 0
        self.logged_counts += counts
        self.watched_counts += counts

    def collect(self, embeddings: torch.Tensor) -> None:
        """Adds a step's `embeddings` (num_embeddings, codebook_dim) to the first ones."""
        parts = [] if self.first_embeddings is None else [self.first_embeddings]
        self.first_embeddings = torch.cat([*parts, embeddings.detach().float().cpu()])

    def reset_counts(self) -> None:
        """Starts a new period between updates."""
        self.usage_counts.zero_()
        self.batch_counts.zero_()

    def save(self, folder: str | Path) -> None:
        """Writes `codebook_state.safetensors` into a checkpoint."""
        path = Path(folder) / STATE_FILE
        temporary = path.with_name(path.name + ".tmp")
        tensors = {name: getattr(self, name) for name in ("usage_counts", "batch_counts", *WINDOWS)}
        if self.first_embeddings is not None:
            tensors["first_embeddings"] = self.first_embeddings
        metadata = {"version": STATE_VERSION, "num_replaced": self.num_replaced}
        save_file(tensors, temporary, metadata={"lapa": json.dumps(metadata)})
        temporary.replace(path)

    @classmethod
    def load(cls, folder: str | Path, codebook_size: int) -> "CodebookState":
        """
        Reads what `save` wrote, in this version or an earlier one, whose windows begin anew.

        Raises:
            ValueError: A checkpoint without the file, a damaged file, one of a later version, or another codebook size.
        """
        path = Path(folder) / STATE_FILE
        if not path.is_file():
            raise ValueError(f"{folder} cannot be resumed: it has no {STATE_FILE}.")
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in ("first_embeddings", *WINDOWS) if name in file.keys()]  # noqa: SIM118 (no mapping)
                tensors = {name: file.get_tensor(name) for name in ("usage_counts", "batch_counts", *names)}
                metadata = json.loads(file.metadata()["lapa"])
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
        if (version := metadata.pop("version", 1)) > STATE_VERSION:
            raise ValueError(f"{path} has version {version}; this version of lapa reads up to {STATE_VERSION}.")
        found = len(tensors["usage_counts"])
        if found != codebook_size:
            raise ValueError(f"{path} counts {found} codes, but the model has {codebook_size} (`codebook_size`).")
        return cls(**tensors, **metadata)


def published_update_due(step: int) -> bool:
    """Whether the published loop replaces unused codes in its step number `step`, counted from 0."""
    if step == 0:
        return False
    return any(step < limit and step % interval == 0 for limit, interval in PUBLISHED_SCHEDULE)


@torch.no_grad()
def codebook_from_embeddings(codebook: torch.Tensor, embeddings: torch.Tensor, generator: torch.Generator) -> None:
    """Overwrites `codebook` (codebook_size, dim) by random rows of `embeddings` (num_embeddings, dim), in place."""
    dead = torch.ones(len(codebook), dtype=torch.bool)
    reseed_codes(codebook, dead, embeddings, generator)


@torch.no_grad()
def reseed_codes(
    codebook: torch.Tensor, dead: torch.Tensor, embeddings: torch.Tensor, generator: torch.Generator
) -> None:
    """
    Puts dead codes on random embeddings, in place.

    Random rows lie where the embeddings are dense. Spreading them out (k-means++) puts them on outliers, which a moving
    encoder leaves at once: in the demo's quantizer that ended with one code in use, random rows with all.

    Args:
        codebook: (codebook_size, dim) float, edited in place.
        dead: (codebook_size,) bool.
        embeddings: (num_embeddings, dim) float, of the current encoder.
        generator: CPU generator of the draws.
    """
    dead = dead.cpu()
    embeddings = embeddings.detach().float().cpu()
    # Without repeats as long as there are enough.
    order = torch.randperm(len(embeddings), generator=generator)
    choices = order.repeat(int(dead.sum()) // len(order) + 1)[: int(dead.sum())]
    spread = (embeddings - embeddings.mean(0)).square().mean().sqrt()
    noise = torch.randn(len(choices), embeddings.shape[1], generator=generator) * spread * JITTER
    codebook[dead.to(codebook.device)] = (embeddings[choices] + noise).to(codebook)


def dead_codes(usage_counts: torch.Tensor, threshold: float) -> torch.Tensor:
    """Mask (codebook_size,) of codes used less than `threshold` times an even share. None is dead before any count."""
    total = int(usage_counts.sum())
    if total == 0:
        return torch.zeros(len(usage_counts), dtype=torch.bool)
    return usage_counts.cpu() < threshold * total / len(usage_counts)


@torch.no_grad()
def clear_moments(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, rows: torch.Tensor) -> None:
    """Zeroes an optimizer's running moments of some rows of a parameter: they belong to entries that are gone."""
    for value in optimizer.state.get(parameter, {}).values():
        if torch.is_tensor(value) and value.shape == parameter.shape:
            value[rows.to(value.device)] = 0


class SampleNoise:
    """
    Standard normal noise that belongs to a sample, not to a process.

    The numbers of a step are drawn one after the other in the order of its samples over all processes, so that any
    division of a batch, over processes or into accumulated parts, gives each sample the same noise.

    Args:
        seed: Of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._step: int | None = None
        self._generator = np.random.default_rng()

    def draw(self, step: int, rank: int, world_size: int, rows: int, width: int) -> torch.Tensor:
        """
        Noise of this process's part of the next part of a step.

        Args:
            step: Optimizer steps so far.
            rank, world_size: Of this process; the samples of lower ranks come first.
            rows: Rows that each process needs.
            width: Of a row.

        Returns:
            (rows, width) float32.
        """
        if step != self._step:
            self._step = step
            self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, step])))
        everyone = self._generator.standard_normal((world_size * rows, width), dtype=np.float32)
        return torch.from_numpy(everyone[rank * rows : (rank + 1) * rows])


__all__ = [
    "PUBLISHED_SCHEDULE",
    "STATE_FILE",
    "CodebookState",
    "SampleNoise",
    "clear_moments",
    "codebook_from_embeddings",
    "count_codes",
    "dead_codes",
    "published_update_due",
    "reseed_codes",
]
