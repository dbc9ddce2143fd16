"""Training VPT's inverse dynamics model on labelled frames, and labelling video with it."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lapa.evaluation.baselines.action_regression import (
    ActionRegression,
    ActionRegressionTrainer,
    RegressionSettings,
    train_action_regression,
)
from lapa.evaluation.baselines.configuration_inverse_dynamics import InverseDynamicsConfig
from lapa.evaluation.baselines.inverse_dynamics import InverseDynamicsModel
from lapa.evaluation.baselines.training import Schedule


@dataclass(frozen=True)
class InverseDynamicsSettings(RegressionSettings):
    """
    How an inverse dynamics model is trained. The default rate is the paper's.

    Args:
        schedule, held_out_share, keep_best: See [`RegressionSettings`].
        max_shift (`int`): Both frames of a pair are moved together by up to this many pixels along each axis; what comes in
            repeats the border.
        colour_jitter (`float`): Brightness and contrast of each channel of a pair change by up to this share.
    """

    schedule: Schedule = field(default_factory=lambda: Schedule(steps=20_000, batch_size=64, learning_rate=1e-4))
    max_shift: int = 4
    colour_jitter: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_shift < 0:
            raise ValueError(f"`max_shift` must be at least 0, got {self.max_shift}.")
        if not 0 <= self.colour_jitter < 1:
            raise ValueError(f"`colour_jitter` must lie in [0, 1), got {self.colour_jitter}.")


class FramePairActions(Dataset[dict[str, Any]]):
    """
    Frame pairs with their actions.

    Args:
        first, second: (num_pairs, height, width, channels) uint8.
        actions: (num_pairs, action_dim) physical units; None for pairs that are to be labelled.

    Raises:
        ValueError: Frames that are no uint8 images of one shape, rows of unequal number.
    """

    def __init__(
        self,
        first: NDArray[np.uint8],
        second: NDArray[np.uint8],
        actions: ArrayLike | None = None,
    ) -> None:
        for name, frames in (("first", first), ("second", second)):
            if frames.ndim != 4 or frames.dtype != np.uint8:
                raise ValueError(
                    f"`{name}` must be (num_pairs, height, width, channels) uint8, got {frames.shape} {frames.dtype}."
                )
        if first.shape != second.shape:
            raise ValueError(f"`first` and `second` must have one shape, got {first.shape} and {second.shape}.")
        self.first, self.second = first, second
        self.actions = None if actions is None else np.asarray(actions, dtype=np.float32)
        if self.actions is not None and (self.actions.ndim != 2 or len(self.actions) != len(first)):
            raise ValueError(f"`actions` must have shape ({len(first)}, action_dim), got {self.actions.shape}.")

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """`pixel_values` (2, channels, height, width) float32 in [0, 1], `actions` (action_dim,), `example_id`."""
        frames = torch.from_numpy(np.stack((self.first[item], self.second[item])))
        pixels = frames.permute(0, 3, 1, 2).float() / 255  # t h w c -> t c h w
        example: dict[str, Any] = {"pixel_values": pixels}
        if self.actions is not None:
            example |= {"actions": torch.from_numpy(self.actions[item]), "example_id": f"pair {item}"}
        return example


def augment(pixels: torch.Tensor, max_shift: int, colour_jitter: float) -> torch.Tensor:
    """Shift and colour of (batch, frames, channels, height, width) in [0, 1], the same for all frames of an example."""
    batch, _, channels, height, width = pixels.shape
    if max_shift:
        padded = F.pad(pixels.flatten(0, 1), (max_shift,) * 4, mode="replicate").unflatten(0, pixels.shape[:2])
        shifts = torch.randint(0, 2 * max_shift + 1, (batch, 2)).tolist()
        moved = [frames[..., y : y + height, x : x + width] for frames, (y, x) in zip(padded, shifts)]
        pixels = torch.stack(moved)
    if colour_jitter:
        gain, shift = colour_jitter * (2 * torch.rand(2, batch, 1, channels, 1, 1, device=pixels.device) - 1)
        pixels = ((pixels - 0.5) * (1 + gain) + 0.5 + 0.5 * shift).clamp(0, 1)
    return pixels


class InverseDynamicsTrainer(ActionRegressionTrainer):
    """
    Trainer of [`InverseDynamicsModel`].

    Args:
        settings: Training pairs are augmented by them.
        args, kwargs: Of [`~transformers.Trainer`].
    """

    def __init__(self, *args: Any, settings: InverseDynamicsSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loss of a batch, of an augmented one in training."""
        if model.training:
            pixels = augment(inputs["pixel_values"], self.settings.max_shift, self.settings.colour_jitter)
            inputs = inputs | {"pixel_values": pixels}
        return super().compute_loss(model, inputs, *args, **kwargs)


def train_inverse_dynamics(
    first: NDArray[np.uint8],
    second: NDArray[np.uint8],
    actions: ArrayLike,
    config: InverseDynamicsConfig,
    settings: InverseDynamicsSettings,
    seed: int,
    output: Path,
    episode: ArrayLike | None = None,
) -> list[dict[str, float]]:
    """
    Train a model on labelled frames and leave it in `output`; an interrupted training goes on from its last checkpoint.

    Args:
        first, second: (num_pairs, height, width, channels) uint8, `config.frame_gap` frames apart.
        actions: (num_pairs, action_dim), physical units. Their statistics go into the config.
        config: Sizes.
        settings: Schedule and augmentation.
        seed: Of the weights, the split and the augmentation.
        output: Folder to write.
        episode: (num_pairs,) which episode a pair is from, by which data are held out; every pair by itself when None.

    Returns:
        The log of the training, rows with `loss`. With data held out, `eval_loss`, `eval_r2` and R^2 per dimension stand in
        `trainer_state.json`, and R^2 of the model that is kept in `lapa_results.json` and on its card.

    Raises:
        ValueError: Rows of unequal number, actions of another size, too little to hold anything out.
    """
    known = np.asarray(actions, dtype=np.float32)
    task = ActionRegression(
        config,
        InverseDynamicsModel,
        lambda rows: FramePairActions(first[rows], second[rows], known[rows]),
        partial(InverseDynamicsTrainer, settings=settings),
    )
    return train_action_regression(task, known, settings, seed, output, episode)


def label_actions(
    model: InverseDynamicsModel,
    first: NDArray[np.uint8],
    second: NDArray[np.uint8],
    batch_size: int = 256,
    show_progress: bool = True,
) -> NDArray[np.float32]:
    """
    Pseudo actions of video.

    Args:
        model: Labels; its mode does not matter and is left as it is.
        first, second: (num_pairs, height, width, channels) uint8, `model.config.frame_gap` frames apart.
        batch_size: Pairs at a time; the labels do not depend on it beyond rounding.
        show_progress: Whether a progress bar is shown.

    Returns:
        (num_pairs, action_dim) float32, physical units.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    pairs = FramePairActions(first, second)
    labels = np.empty((len(pairs), model.config.action_dim), dtype=np.float32)
    starts = range(0, len(pairs), batch_size)
    for start in tqdm(starts, desc="inverse dynamics", unit="batch", disable=not show_progress):
        rows = slice(start, start + batch_size)
        frames = torch.from_numpy(np.stack((pairs.first[rows], pairs.second[rows]), axis=1)).to(model.device)
        pixels = frames.permute(0, 1, 4, 2, 3).float() / 255  # b t h w c -> b t c h w
        labels[rows] = model.predict_actions(pixels).cpu().numpy()
    return labels


__all__ = [
    "FramePairActions",
    "InverseDynamicsSettings",
    "InverseDynamicsTrainer",
    "label_actions",
    "train_inverse_dynamics",
]
