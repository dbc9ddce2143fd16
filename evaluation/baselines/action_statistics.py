"""Mean and standard deviation of the training actions, which travel in a model's config."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

DEFAULTS = {"action_mean": 0.0, "action_std": 1.0}


def register_action_statistics(model: nn.Module, action_dim: int) -> None:
    """Gives a model the buffers; not persistent, so that there is one place where they are kept: the config."""
    for name, default in DEFAULTS.items():
        model.register_buffer(name, torch.full((action_dim,), default), persistent=False)


def fill_action_statistics(model: Any) -> None:
    """Fills the buffers from `model.config`; belongs into `_init_weights`."""
    for name, default in DEFAULTS.items():
        values = getattr(model.config, name) or [default] * model.config.action_dim
        init.copy_(getattr(model, name), torch.tensor(values, dtype=torch.float32))


__all__ = ["fill_action_statistics", "register_action_statistics"]
