"""Training the latent action decoder on labelled steps."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from lapa.evaluation.baselines.action_regression import ActionRegression, RegressionSettings, train_action_regression
from lapa.evaluation.baselines.configuration_latent_decoder import LatentActionDecoderConfig
from lapa.evaluation.baselines.latent_decoder import LatentActionDecoder
from lapa.evaluation.baselines.training import Schedule


@dataclass(frozen=True)
class LatentDecoderSettings(RegressionSettings):
    """How a latent action decoder is trained, see [`RegressionSettings`]; on a few hundred labelled steps that takes seconds."""

    schedule: Schedule = field(
        default_factory=lambda: Schedule(steps=500, batch_size=64, learning_rate=3e-3, weight_decay=0.01)
    )


class CodeActions(Dataset[dict[str, Any]]):
    """
    Latent actions with the actions that they stand for.

    Args:
        codes: (num_steps, num_latent_tokens) integers.
        actions: (num_steps, action_dim) physical units.
    """

    def __init__(self, codes: NDArray[np.integer[Any]], actions: NDArray[np.float32]) -> None:
        self.codes, self.actions = torch.from_numpy(codes.astype(np.int64)), torch.from_numpy(actions)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """`latent_action_codes` (num_latent_tokens,) int64, `actions` (action_dim,), `example_id`."""
        return {
            "latent_action_codes": self.codes[item],
            "actions": self.actions[item],
            "example_id": f"step {item}",
        }


def train_latent_decoder(
    codes: ArrayLike,
    actions: ArrayLike,
    config: LatentActionDecoderConfig,
    settings: LatentDecoderSettings,
    seed: int,
    output: Path,
    episode: ArrayLike | None = None,
) -> list[dict[str, float]]:
    """
    Train a decoder on labelled steps and leave it in `output`; an interrupted training goes on from its last checkpoint.

    Args:
        codes: (num_steps, num_latent_tokens) integers in [0, codebook_size): the quantizer's labels of the labelled frames.
        actions: (num_steps, action_dim), physical units: of each first frame's step. Their statistics go into the config.
        config: Sizes.
        settings: Schedule.
        seed: Of the weights, the split and the order.
        output: Folder to write.
        episode: (num_steps,) which episode a step is from, by which data are held out; every step by itself when None.

    Returns:
        As [`~lapa.evaluation.baselines.action_regression.train_action_regression`].

    Raises:
        ValueError: Rows of unequal number, codes or actions of another size, too little to hold anything out.
    """
    labels, known = np.asarray(codes), np.asarray(actions, dtype=np.float32)
    shape = (len(known), config.num_latent_tokens)
    if labels.shape != shape or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"`codes` must be integers of shape ({shape[0]}, {shape[1]}), got {labels.shape} {labels.dtype}."
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < config.codebook_size:
        raise ValueError(f"`codes` must lie in [0, {config.codebook_size}), got {labels.min()} to {labels.max()}.")
    task = ActionRegression(config, LatentActionDecoder, lambda rows: CodeActions(labels[rows], known[rows]))
    return train_action_regression(task, known, settings, seed, output, episode)


__all__ = ["CodeActions", "LatentDecoderSettings", "train_latent_decoder"]
