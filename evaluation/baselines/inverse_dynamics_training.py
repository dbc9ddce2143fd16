"""Training VPT's inverse dynamics model on labelled frames, and labelling video with it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers.trainer_utils import set_seed

from lapa.data.atomic_files import write_atomically
from lapa.evaluation.baselines.card import write_card
from lapa.evaluation.baselines.configuration_inverse_dynamics import InverseDynamicsConfig
from lapa.evaluation.baselines.inverse_dynamics import InverseDynamicsModel
from lapa.evaluation.baselines.training import BaselineTrainer, Schedule, train_to_end
from lapa.hub_cards.card import RESULTS_NAME


@dataclass(frozen=True)
class InverseDynamicsSettings:
    """
    How an inverse dynamics model is trained. The default rate is the paper's.

    Args:
        schedule (`Schedule`): Steps, batch size, learning rate.
        max_shift (`int`): Both frames of a pair are moved together by up to this many pixels along each axis; what comes in
            repeats the border.
        colour_jitter (`float`): Brightness and contrast of each channel of a pair change by up to this share.
        held_out_share (`float`): Share of the episodes whose loss and R^2 are logged; 0 trains on all.
        keep_best (`bool`): Whether the checkpoint of lowest held-out loss is kept instead of the last.
    """

    schedule: Schedule = field(default_factory=lambda: Schedule(steps=20_000, batch_size=64, learning_rate=1e-4))
    max_shift: int = 4
    colour_jitter: float = 0.1
    held_out_share: float = 0.1
    keep_best: bool = True

    def __post_init__(self) -> None:
        if self.max_shift < 0:
            raise ValueError(f"`max_shift` must be at least 0, got {self.max_shift}.")
        for name in ("colour_jitter", "held_out_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")


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


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors stacked, `example_id` as a list."""
    batch: dict[str, Any] = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        batch[name] = values if name == "example_id" else torch.stack(values)
    return batch


class InverseDynamicsTrainer(BaselineTrainer):
    """
    Trainer of [`InverseDynamicsModel`]; an evaluation says how much of the actions' variance is explained, as `r2`.

    Args:
        settings: Training pairs are augmented by them.
        args, kwargs: Of [`~transformers.Trainer`].
    """

    def __init__(self, *args: Any, settings: InverseDynamicsSettings, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=collate, **kwargs)
        self.settings = settings
        self._predicted: list[torch.Tensor] = []
        self._true: list[torch.Tensor] = []

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loss of a batch, of an augmented one in training."""
        if model.training:
            pixels = augment(inputs["pixel_values"], self.settings.max_shift, self.settings.colour_jitter)
            inputs = inputs | {"pixel_values": pixels}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluation_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Keeps what is predicted, see [`~lapa.training.metrics_trainer.MetricsTrainer`]."""
        loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        predicted, true = self.accelerator.gather_for_metrics((outputs.actions, inputs["actions"]))
        self._predicted.append(predicted.cpu())
        self._true.append(true.cpu())
        return loss

    def evaluation_metrics(self) -> dict[str, float]:
        """`r2`, the mean over dimensions, and `r2_<dimension>`."""
        scores = r_squared(torch.cat(self._predicted).numpy(), torch.cat(self._true).numpy())
        self._predicted, self._true = [], []
        named = {f"r2_{dimension}": float(score) for dimension, score in enumerate(scores)}
        return named | {"r2": float(np.mean(scores))}


def r_squared(predicted: ArrayLike, true: ArrayLike) -> NDArray[np.float64]:
    """Share of the variance that is explained, per dimension (action_dim,); NaN for a dimension that does not vary.

    Args:
        predicted, true: (num_pairs, action_dim).
    """
    predicted, true = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    spread = ((true - true.mean(0)) ** 2).sum(0)
    error = ((true - predicted) ** 2).sum(0)
    scores: NDArray[np.float64] = np.where(spread > 0, 1 - error / np.where(spread > 0, spread, 1), np.nan)
    return scores


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
    if known.ndim != 2 or known.shape[1] != config.action_dim:
        raise ValueError(f"`actions` must have shape (num_pairs, {config.action_dim}), got {known.shape}.")
    groups = np.arange(len(known)) if episode is None else np.asarray(episode)
    if len(groups) != len(known):
        raise ValueError(f"`episode` has {len(groups)} rows for {len(known)} actions.")
    held_out = hold_out(groups, settings.held_out_share, seed)
    std = known[~held_out].std(0)
    config = InverseDynamicsConfig.from_dict(
        config.to_dict()
        | {
            "action_mean": known[~held_out].mean(0).tolist(),
            # A dimension that stands still is predicted as its mean.
            "action_std": np.where(std > 1e-6, std, 1.0).tolist(),
        }
    )
    set_seed(seed)
    evaluates = bool(held_out.any())
    trainer = InverseDynamicsTrainer(
        model=InverseDynamicsModel(config),
        args=settings.schedule.arguments(
            output, seed, evaluates, "eval_loss" if evaluates and settings.keep_best else None
        ),
        train_dataset=FramePairActions(first[~held_out], second[~held_out], known[~held_out]),
        eval_dataset=FramePairActions(first[held_out], second[held_out], known[held_out]) if evaluates else None,
        settings=settings,
    )
    log = train_to_end(trainer)
    if evaluates:
        _write_result(trainer.evaluate(), output, len(np.unique(groups[held_out])))
    write_card(output, config)
    return log


def _write_result(metrics: dict[str, float], output: Path, num_episodes: int) -> None:
    """R^2 of the model that is kept, where its card looks for results."""
    value = metrics["eval_r2"]
    row = {"dataset": "held-out labelled episodes", "metric": "r2", "value": value, "episodes": num_episodes}
    rows = [row] if np.isfinite(value) else []
    write_atomically(output / RESULTS_NAME, json.dumps({"results": rows}, indent=1).encode())


def hold_out(groups: NDArray[Any], share: float, seed: int) -> NDArray[np.bool_]:
    """Which rows are held out: those of a share of the groups, at least one group where the share is above 0."""
    names = np.unique(groups)
    if not share:
        return np.zeros(len(groups), dtype=bool)
    if len(names) < 2:
        raise ValueError(f"`held_out_share` ({share}) needs at least 2 episodes, got {len(names)}.")
    count = min(max(1, round(share * len(names))), len(names) - 1)
    return np.isin(groups, np.random.default_rng(seed).permutation(names)[:count])


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
    "hold_out",
    "label_actions",
    "r_squared",
    "train_inverse_dynamics",
]
