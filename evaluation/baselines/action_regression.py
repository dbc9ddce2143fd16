"""Training of models that read an action off something: off two frames, or off latent action codes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset
from transformers.trainer_utils import set_seed

from lapa.data.atomic_files import write_atomically
from lapa.evaluation.baselines.card import write_card
from lapa.evaluation.baselines.training import BaselineTrainer, Schedule, train_to_end
from lapa.hub_cards.card import RESULTS_NAME


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors stacked, `example_id` as a list."""
    batch: dict[str, Any] = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        batch[name] = values if name == "example_id" else torch.stack(values)
    return batch


class ActionRegressionTrainer(BaselineTrainer):
    """
    Trainer of models whose output has `actions`; an evaluation says how much of the actions' variance is explained, as `r2`.

    Args:
        args, kwargs: Of [`~transformers.Trainer`].
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=collate, **kwargs)
        self._predicted: list[torch.Tensor] = []
        self._true: list[torch.Tensor] = []

    def evaluation_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Keeps what is predicted, see [`~lapa.training.metrics_trainer.MetricsTrainer`]."""
        loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        predicted, true = self.accelerator.gather_for_metrics((outputs.actions, inputs["actions"]))
        self._predicted.append(predicted.cpu())
        self._true.append(true.cpu())
        return loss

    def evaluation_metrics(self) -> dict[str, float]:
        """`r2`, the mean over the dimensions that vary, and `r2_<dimension>`."""
        rows = torch.cat(self._predicted).numpy(), torch.cat(self._true).numpy()
        scores, mean = r_squared(*rows), mean_r_squared(*rows)
        self._predicted, self._true = [], []
        named = {f"r2_{dimension}": float(score) for dimension, score in enumerate(scores)}
        return named | {"r2": mean}


def r_squared(predicted: ArrayLike, true: ArrayLike) -> NDArray[np.float64]:
    """Share of the variance that is explained, per dimension (action_dim,); NaN for a dimension that does not vary.

    Args:
        predicted, true: (num_examples, action_dim).
    """
    predicted, true = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    spread = ((true - true.mean(0)) ** 2).sum(0)
    error = ((true - predicted) ** 2).sum(0)
    scores: NDArray[np.float64] = np.where(spread > 0, 1 - error / np.where(spread > 0, spread, 1), np.nan)
    return scores


def mean_r_squared(predicted: ArrayLike, true: ArrayLike) -> float:
    """`r_squared`, mean of the dimensions that vary; NaN where none does."""
    scores = r_squared(predicted, true)
    varying = scores[np.isfinite(scores)]
    return float(varying.mean()) if len(varying) else float("nan")


def hold_out(groups: NDArray[Any], share: float, seed: int) -> NDArray[np.bool_]:
    """Which rows are held out: those of a share of the groups, at least one group where the share is above 0."""
    names = np.unique(groups)
    if not share:
        return np.zeros(len(groups), dtype=bool)
    if len(names) < 2:
        raise ValueError(f"`held_out_share` ({share}) needs at least 2 episodes, got {len(names)}.")
    count = min(max(1, round(share * len(names))), len(names) - 1)
    return np.isin(groups, np.random.default_rng(seed).permutation(names)[:count])


@dataclass(frozen=True)
class RegressionSettings:
    """
    How such a model is trained.

    Args:
        schedule (`Schedule`): Steps, batch size, learning rate.
        held_out_share (`float`): Share of the episodes whose loss and R^2 are logged; 0 trains on all.
        keep_best (`bool`): Whether the checkpoint of lowest held-out loss is kept instead of the last.
    """

    schedule: Schedule
    held_out_share: float = 0.1
    keep_best: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"`held_out_share` must lie in [0, 1), got {self.held_out_share}.")


@dataclass(frozen=True)
class ActionRegression:
    """
    What is to be trained.

    Args:
        config: Of the model; the training actions' mean and standard deviation go into it.
        model: Makes the model of such a config.
        dataset: Makes the examples of the rows that a mask (num_rows,) chooses; each has `actions`.
        trainer: Makes the trainer of `model`, `args`, `train_dataset` and `eval_dataset`.
    """

    config: Any
    model: Callable[[Any], Any]
    dataset: Callable[[NDArray[np.bool_]], Dataset[dict[str, Any]]]
    trainer: Callable[..., ActionRegressionTrainer] = ActionRegressionTrainer


def train_action_regression(
    task: ActionRegression,
    actions: ArrayLike,
    settings: RegressionSettings,
    seed: int,
    output: Path,
    episode: ArrayLike | None = None,
) -> list[dict[str, float]]:
    """
    Train a model and leave it in `output`; an interrupted training goes on from its last checkpoint.

    Args:
        task: Model and examples.
        actions: (num_rows, action_dim), physical units.
        settings: Schedule, and what is held out.
        seed: Of the weights, the split and the order.
        output: Folder to write.
        episode: (num_rows,) which episode a row is from, by which data are held out; every row by itself when None.

    Returns:
        The log of the training, rows with `loss`. With data held out, `eval_loss`, `eval_r2` and R^2 per dimension stand in
        `trainer_state.json`, and R^2 of the model that is kept in `lapa_results.json` and on its card.

    Raises:
        ValueError: Rows of unequal number, actions of another size, too little to hold anything out.
    """
    known = np.asarray(actions, dtype=np.float32)
    if known.ndim != 2 or known.shape[1] != task.config.action_dim:
        raise ValueError(f"`actions` must have shape (num_pairs, {task.config.action_dim}), got {known.shape}.")
    groups = np.arange(len(known)) if episode is None else np.asarray(episode)
    if len(groups) != len(known):
        raise ValueError(f"`episode` has {len(groups)} rows for {len(known)} actions.")
    held_out = hold_out(groups, settings.held_out_share, seed)
    std = known[~held_out].std(0)
    config = type(task.config).from_dict(
        task.config.to_dict()
        | {
            "action_mean": known[~held_out].mean(0).tolist(),
            # A dimension that stands still is predicted as its mean.
            "action_std": np.where(std > 1e-6, std, 1.0).tolist(),
        }
    )
    set_seed(seed)
    evaluates = bool(held_out.any())
    trainer = task.trainer(
        model=task.model(config),
        args=settings.schedule.arguments(
            output, seed, evaluates, "eval_loss" if evaluates and settings.keep_best else None
        ),
        train_dataset=task.dataset(~held_out),
        eval_dataset=task.dataset(held_out) if evaluates else None,
    )
    log = train_to_end(trainer)
    if evaluates:
        _write_result(trainer.evaluate(), output, len(np.unique(groups[held_out])))
    write_card(output, config)
    return log


def _write_result(metrics: dict[str, float], output: Path, num_episodes: int) -> None:
    """R^2 of the model that is kept, where its card looks for results; none where no dimension varies."""
    value = metrics["eval_r2"]
    row = {"dataset": "held-out labelled episodes", "metric": "r2", "value": value, "episodes": num_episodes}
    rows = [row] if np.isfinite(value) else []
    write_atomically(output / RESULTS_NAME, json.dumps({"results": rows}, indent=1).encode())


__all__ = [
    "ActionRegression",
    "ActionRegressionTrainer",
    "RegressionSettings",
    "collate",
    "hold_out",
    "mean_r_squared",
    "r_squared",
    "train_action_regression",
]
