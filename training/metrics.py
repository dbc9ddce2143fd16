"""Numbers that say how a training goes: codes in use, right tokens, errors in physical units."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray


def count_codes(codes: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """Uses (codebook_size,) int64 of each code in integer `codes` of any shape, every occurrence counted."""
    return torch.bincount(codes.flatten(), minlength=codebook_size)


def code_usage(counts: ArrayLike) -> NDArray[np.float64]:
    """Share of each code (codebook_size,) from its `counts`; all zero where nothing was counted."""
    values = np.asarray(counts, dtype=np.float64)
    return values / max(values.sum(), 1.0)


def perplexity(counts: ArrayLike) -> float:
    """exp of the entropy of usage `counts`: 1 when one code is used, `codebook_size` when all are used equally."""
    share = code_usage(counts)
    share = share[share > 0]
    return float(np.exp(-np.sum(share * np.log(share))))


def num_codes_used(counts: ArrayLike) -> int:
    """How many codes were used at all."""
    return int(np.count_nonzero(np.asarray(counts)))


def num_sequences_used(codes: ArrayLike) -> int:
    """How many distinct rows `codes` (num_pairs, num_latent_tokens) has."""
    rows = np.asarray(codes)
    if rows.ndim != 2:
        raise ValueError(f"`codes` must be (num_pairs, num_latent_tokens), got shape {rows.shape}.")
    return len(np.unique(rows, axis=0))


def token_accuracy(predicted: ArrayLike, target: ArrayLike) -> NDArray[np.float64]:
    """Share of right tokens per column (num_columns,) of two integer arrays (num_rows, num_columns)."""
    predicted, target = np.asarray(predicted), np.asarray(target)
    if predicted.shape != target.shape or predicted.ndim != 2 or not len(predicted):
        raise ValueError(
            f"`predicted` and `target` must be equal, non-empty (num_rows, num_columns), got {predicted.shape} and "
            f"{target.shape}."
        )
    return np.mean(predicted == target, axis=0, dtype=np.float64)


def action_error(predicted: ArrayLike, target: ArrayLike) -> NDArray[np.float64]:
    """Mean absolute error per dimension (action_dim,), in physical units, of actions (num_steps, action_dim)."""
    predicted, target = np.asarray(predicted, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if predicted.shape != target.shape or target.ndim != 2 or not len(target):
        raise ValueError(
            f"`predicted` and `target` must be equal, non-empty (num_steps, action_dim), got {predicted.shape} and "
            f"{target.shape}."
        )
    return np.abs(predicted - target).mean(axis=0)


def mean_action_error(train_actions: ArrayLike, target: ArrayLike) -> NDArray[np.float64]:
    """What `action_error` is when the mean of `train_actions` (num_steps, action_dim) is predicted every time."""
    target = np.asarray(target, dtype=np.float64)
    mean = np.asarray(train_actions, dtype=np.float64).mean(axis=0)
    return action_error(np.broadcast_to(mean, target.shape), target)


class RunningMeans:
    """Means of named scalars, weighted, kept on their device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: Mapping[str, torch.Tensor | None], weight: float = 1.0) -> None:
        """Adds detached scalars; None values are left out."""
        for name, value in values.items():
            if value is not None:
                value = value.detach().float() * weight
                self._sums[name] = self._sums[name] + value if name in self._sums else value
                self._weights[name] = self._weights.get(name, 0.0) + weight

    def pop(self, gather: Any = None) -> dict[str, float]:
        """
        Returns the means and starts anew.

        Args:
            gather (`Callable`, *optional*): Concatenates a tensor over processes, as `Accelerator.gather` does.
        """
        names = sorted(self._sums)
        sums, weights = self._sums, self._weights
        self._sums, self._weights = {}, {}
        if not names:
            return {}
        table = torch.stack([torch.stack((sums[name], sums[name].new_tensor(weights[name]))) for name in names])
        if gather is not None:
            table = gather(table.unsqueeze(0)).sum(0)
        return {name: (total / weight).item() for name, (total, weight) in zip(names, table)}


def per_dimension(name: str, values: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """`{name: mean, name/0: ..., name/1: ...}` for logging."""
    logs = {f"{name}/{index}": float(value) for index, value in enumerate(values)}
    return {name: math.fsum(logs.values()) / len(logs), **logs}


__all__ = [
    "RunningMeans",
    "action_error",
    "code_usage",
    "count_codes",
    "mean_action_error",
    "num_codes_used",
    "num_sequences_used",
    "per_dimension",
    "perplexity",
    "token_accuracy",
]
