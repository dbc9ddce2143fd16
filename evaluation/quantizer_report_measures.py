"""What a quantizer makes of the pairs of a report: codes, reconstruction errors, answers to made-up pairs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lapa.evaluation.quantizer_report_sample import PairSample
from lapa.evaluation.quantizer_report_statistics import (
    Cell,
    bootstrap,
    group_sums,
    mean_cell,
    mutual_information,
    ratio,
    ratio_gain_cell,
)
from lapa.training.metrics import num_codes_used, num_sequences_used, perplexity

SEQUENCES_SHOWN = 16


@dataclass
class Runner:
    """
    A quantizer and how it is run.

    Args:
        quantizer: A `LapaQuantizer`, or anything with its `config`, `encode` and `decode`.
        device, dtype: Where and in what its inputs are.
        batch_size: Pairs at a time.
    """

    quantizer: Any
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int = 32

    def to_pixels(self, frames: np.ndarray) -> torch.Tensor:
        """(..., height, width, 3) uint8 -> (..., 3, height, width) float in [0, 1]."""
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3)
        return pixels.to(self.device).to(self.dtype) / 255

    @torch.no_grad()
    def aligned(self, frames: np.ndarray) -> np.ndarray:
        """Pairs (batch, 2, height, width, 3) uint8 as the quantizer looks at them, see `align_frames` of its config."""
        if not self.quantizer.config.align_frames:
            return np.asarray(frames)
        pixels = self.quantizer.align(self.to_pixels(frames)).float()
        return (pixels.movedim(-3, -1) * 255).round().to(torch.uint8).cpu().numpy()

    def batches(self, count: int) -> Iterator[slice]:
        """Slices over `count` rows."""
        for start in range(0, count, self.batch_size):
            yield slice(start, min(start + self.batch_size, count))

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes (num_pairs, num_latent_tokens) int64 and embeddings (..., codebook_dim) float32 of uint8 pairs."""
        codes, embeddings = [], []
        for part in self.batches(len(frames)):
            output = self.quantizer.encode(self.to_pixels(frames[part]))
            codes.append(output.latent_action_codes.cpu().numpy())
            embeddings.append(output.latent_action_embeddings.float().cpu().numpy())
        return np.concatenate(codes), np.concatenate(embeddings)

    @torch.no_grad()
    def decode(self, first: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Next frames (batch, 3, height, width) float32, not clipped, of first frames (batch, height, width, 3) uint8."""
        images = [
            self.quantizer.decode(
                self.to_pixels(first[part]), torch.from_numpy(np.ascontiguousarray(codes[part])).to(self.device)
            )
            .float()
            .cpu()
            .numpy()
            for part in self.batches(len(first))
        ]
        return np.concatenate(images)


@dataclass
class Encoded:
    """
    The sample as the quantizer sees it.

    Args:
        codes (`NDArray`): (num_pairs, num_latent_tokens) int64.
        embeddings (`NDArray`): (num_pairs, num_latent_tokens, codebook_dim) float32.
        still_codes (`NDArray`): Codes of each pair's first frame beside itself, so of no motion at all.
    """

    codes: np.ndarray
    embeddings: np.ndarray
    still_codes: np.ndarray


def encode_sample(runner: Runner, sample: PairSample) -> Encoded:
    """Codes of all pairs, and of their first frames paired with themselves."""
    codes, embeddings, still = [], [], []
    for part in runner.batches(len(sample)):
        frames = np.asarray(sample.frames[part])
        batch_codes, batch_embeddings = runner.encode(frames)
        codes.append(batch_codes)
        embeddings.append(batch_embeddings)
        still.append(runner.encode(frames[:, [0, 0]])[0])
    return Encoded(*(np.concatenate(parts) for parts in (codes, embeddings, still)))


def code_statistics(codes: np.ndarray, codebook_size: int) -> dict[str, Any]:
    """
    How codes (num_pairs, num_latent_tokens) are used: all tokens together, each token, and whole sequences.

    `usage` is the share of the codebook that occurs, as `num_used` of `codebook_size`.
    """
    num_pairs, num_tokens = codes.shape
    counts = np.bincount(codes.ravel(), minlength=codebook_size)
    per_token = [np.bincount(column, minlength=codebook_size) for column in codes.T]
    rows, row_counts = np.unique(codes, axis=0, return_counts=True)
    most = np.argsort(-row_counts, kind="stable")[:SEQUENCES_SHOWN]
    possible = codebook_size**num_tokens
    return {
        "num_pairs": num_pairs,
        "codebook_size": codebook_size,
        "num_latent_tokens": num_tokens,
        "num_used": num_codes_used(counts),
        "usage": num_codes_used(counts) / codebook_size,
        "perplexity": perplexity(counts),
        "counts": counts.tolist(),
        "per_token": [
            {"num_used": num_codes_used(c), "usage": num_codes_used(c) / codebook_size, "perplexity": perplexity(c)}
            for c in per_token
        ],
        "sequences": {
            "num_used": num_sequences_used(codes),
            "possible": possible,
            "share": num_sequences_used(codes) / possible,
            # The most distinct sequences that so many pairs could have had.
            "share_of_reachable": num_sequences_used(codes) / min(possible, num_pairs),
            "perplexity": perplexity(row_counts),
            "entropy_bits": float(np.log2(perplexity(row_counts))),
            "most_frequent": [
                {"codes": rows[index].tolist(), "share": float(row_counts[index] / num_pairs)} for index in most
            ],
        },
    }


def other_pair(sample: PairSample, seed: int = 0) -> np.ndarray:
    """(num_pairs,) for each pair a random other one of the same source, of another episode where there is one."""
    generator, chosen = np.random.default_rng(seed), np.arange(len(sample))
    for source in np.unique(sample.source):
        rows = np.flatnonzero(sample.source == source)
        for row in rows:
            pool = rows[sample.group[rows] != sample.group[row]]
            pool = pool if len(pool) else rows[rows != row]
            if len(pool):
                chosen[row] = pool[generator.integers(len(pool))]
    return chosen


def mean_frames(runner: Runner, sample: PairSample) -> np.ndarray:
    """Mean second frame (num_sources, height, width, 3) float64 in [0, 1] of each source's pairs."""
    means = np.zeros((len(sample.sources), *sample.frames.shape[2:]))
    for source in range(len(sample.sources)):
        rows = np.flatnonzero(sample.source == source)
        for part in runner.batches(len(rows)):
            means[source] += runner.aligned(sample.frames[rows[part]])[:, 1].sum(axis=0, dtype=np.float64)
        means[source] /= 255 * max(len(rows), 1)
    return means


def reconstruction_errors(runner: Runner, sample: PairSample, codes: np.ndarray) -> dict[str, np.ndarray]:
    """Mean squared errors (num_pairs,) against the second frame in [0, 1]: of the model and what it must beat."""
    other, means = codes[other_pair(sample)], mean_frames(runner, sample)
    errors: dict[str, list[np.ndarray]] = {
        name: [] for name in ("model", "copy_first_frame", "mean_frame", "shuffled_codes")
    }
    for part in runner.batches(len(sample)):
        first, second = runner.aligned(sample.frames[part]).swapaxes(0, 1)
        second = second / 255.0
        guesses = {
            "model": np.moveaxis(runner.decode(first, codes[part]), 1, -1),
            "copy_first_frame": first / 255.0,
            "mean_frame": means[sample.source[part]],
            "shuffled_codes": np.moveaxis(runner.decode(first, other[part]), 1, -1),
        }
        for name, guess in guesses.items():
            errors[name].append(((guess - second) ** 2).mean(axis=(1, 2, 3)))
    return {name: np.concatenate(parts) for name, parts in errors.items()}


def reconstruction_summary(errors: dict[str, np.ndarray], group: np.ndarray) -> dict[str, Any]:
    """
    Means and intervals of `reconstruction_errors`, and the gains of the model over each of the others.

    `gain_from_codes` is what the true codes save beside those of another pair, as a share of the error of copying, which
    is how much the frames of a pair differ: a decoder that blurs all pictures alike neither gains nor loses by it.
    """
    cells: dict[str, Cell] = {name: mean_cell(values, group) for name, values in errors.items()}
    gains = {
        f"gain_over_{name}": ratio_gain_cell(errors["model"], errors[name], group)
        for name in ("copy_first_frame", "mean_frame", "shuffled_codes")
    }
    columns = np.stack([errors["shuffled_codes"] - errors["model"], errors["copy_first_frame"]], axis=1)
    gains["gain_from_codes"] = bootstrap(group_sums(columns, group), ratio)
    return {
        **{name: cell["value"] for name, cell in cells.items()},
        "intervals": {name: cell["ci95"] for name, cell in cells.items()},
        **gains,
    }


def scene_statistics(sample: PairSample, encoded: Encoded) -> dict[str, Any]:
    """
    How much of the codes is the scene rather than what happens in it.

    `still_agreement` asks for the code of the first frame beside itself, in which nothing happens: the share of pairs and
    tokens that keep their code, beyond chance (Cohen's kappa; 1: the code says nothing of the second frame). A code that
    means "nothing happens" is the same for all still pairs, so it costs nothing beyond chance. `told_by_episode` is the
    share of the codes' entropy that the episode tells.
    """
    real, still = encoded.codes, encoded.still_codes
    size = int(max(real.max(), still.max())) + 1
    agreement = (real == still).mean(axis=1)
    chance = float(
        np.mean(
            [
                (np.bincount(a, minlength=size) / len(a)) @ (np.bincount(b, minlength=size) / len(b))
                for a, b in zip(real.T, still.T)
            ]
        )
    )
    cell = mean_cell(agreement, sample.group)
    kappa = [None if v is None else _kappa(v, chance) for v in (cell["value"], *cell["ci95"])]
    return {
        "still_agreement": {"value": kappa[0], "ci95": kappa[1:]},
        "still_sequences": num_sequences_used(still),
        "told_by_episode": float(np.mean([mutual_information(column, sample.episode) for column in real.T])),
    }


def _kappa(agreement: float, chance: float) -> float:
    return 0.0 if chance >= 1 else (agreement - chance) / (1 - chance)
