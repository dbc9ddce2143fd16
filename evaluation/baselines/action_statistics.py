"""Actions normalised by the statistics of the training data, which travel in a model's config."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

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


@dataclass
class PredictedActions(ModelOutput):
    """
    Output of a model that reads actions.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Mean squared error of the normalised actions.
        actions (`torch.Tensor` of shape `(batch, action_dim)`): Predicted, in physical units.
    """

    loss: torch.Tensor | None = None
    actions: torch.Tensor | None = None


def predicted_actions(model: Any, normalised: torch.Tensor, actions: torch.Tensor | None) -> PredictedActions:
    """
    What a model gives out.

    Args:
        model: With the buffers of `register_action_statistics`.
        normalised: (batch, action_dim), as the model predicts.
        actions: (batch, action_dim) the true ones, physical units; no loss when None.
    """
    loss = None
    if actions is not None:
        loss = F.mse_loss(normalised, (actions.float() - model.action_mean) / model.action_std)
    return PredictedActions(loss=loss, actions=normalised * model.action_std + model.action_mean)


__all__ = ["PredictedActions", "fill_action_statistics", "predicted_actions", "register_action_statistics"]
