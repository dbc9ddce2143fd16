"""A world small enough to learn in seconds: a square on a dark ground that an action moves."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lapa.evaluation.baselines.configuration_inverse_dynamics import InverseDynamicsConfig
from lapa.evaluation.baselines.inverse_dynamics_training import InverseDynamicsSettings
from lapa.evaluation.baselines.training import BaselineTrainer, Schedule
from lapa.training.metrics_trainer import MetricsTrainer


def draw(position: np.ndarray, size: int = 16, colour: tuple[int, int, int] = (230, 60, 40)) -> np.ndarray:
    """(size, size, 3) uint8 with a square of 4 x 4 pixels; a place between pixels blends over them."""
    rows, columns = (np.clip(np.arange(size)[:, None] + np.array([1, 0]), 0, size) for _ in range(2))
    cover = [
        np.clip(np.minimum(cells[:, 0], place + 4) - np.maximum(cells[:, 1], place), 0, 1)
        for cells, place in zip((rows, columns), position)
    ]
    area = cover[0][:, None] * cover[1][None, :]
    ground = np.full((size, size, 3), 30.0)
    return (ground + area[..., None] * (np.array(colour) - ground)).round().astype(np.uint8)


def moving_squares(num_pairs: int, seed: int, size: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First frames, second frames, and actions (num_pairs, 2): 10 units move the square by one pixel down or right."""
    generator = np.random.default_rng(seed)
    places = generator.uniform(2, size - 6, (num_pairs, 2))
    moves = generator.uniform(-2, 2, (num_pairs, 2))
    first = np.stack([draw(place, size) for place in places])
    second = np.stack([draw(place + move, size) for place, move in zip(places, moves)])
    return first, second, (10 * moves).astype(np.float32)


INVERSE_DYNAMICS = InverseDynamicsConfig(
    image_size=16,
    action_dim=2,
    embedding_size=8,
    hidden_sizes=[16, 32],
    depths=[1, 1],
    stem_pooling=False,
    mlp_hidden_size=32,
)
SQUARE_SETTINGS = InverseDynamicsSettings(Schedule(300, 32, 5e-3, num_checkpoints=2), max_shift=1)


def assert_resumed_as_uninterrupted(train: Callable[[Path], Mapping[str, torch.Tensor]], place: Path) -> None:
    """Trains whole and cut short; `train` makes 8 steps with 2 checkpoints in a folder and returns the weights."""

    def cut_short(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return MetricsTrainer.training_step(self, *args, **kwargs)

    whole = train(place / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaselineTrainer, "training_step", cut_short, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(place / "cut")
    assert (place / "cut" / "checkpoint-4").is_dir()
    assert not (place / "cut" / "model.safetensors").exists()
    resumed = train(place / "cut")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
