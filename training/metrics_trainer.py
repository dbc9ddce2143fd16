"""What the trainers of all stages share: means of named numbers between logs and over an evaluation."""

import math
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from lapa.training.metrics import RunningMeans
from lapa.training.stream_training import StreamTrainer


class MetricsTrainer(StreamTrainer):
    """
    Trainer that logs more than the loss, and keeps no outputs in evaluation.

    A subclass adds scalars to `_means` in training and to `_eval_means` in evaluation, and overrides the hooks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._means = RunningMeans()

    def training_metrics(self) -> dict[str, float]:
        """Hook: further numbers for a training log."""
        return {}

    def evaluation_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Hook: loss of an evaluation batch that lies on the model's device."""
        loss: Any = self.compute_loss(model, inputs)
        return loss

    def evaluation_metrics(self) -> dict[str, float]:
        """Hook: further metrics at the end of an evaluation."""
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in [`~transformers.Trainer`], with the means and metrics since the last training log."""
        if "loss" in logs:
            logs |= self._means.pop(self.accelerator.gather) | self.training_metrics()
            self._refuse_nan(logs)
        super().log(logs, start_time)

    def _refuse_nan(self, logs: dict[str, float]) -> None:
        # `Trainer` shows a loss that is not a number as 0 and goes on; every weight is lost by then.
        bad = [name for name, value in logs.items() if isinstance(value, float) and math.isnan(value)]
        if bad:
            raise ValueError(
                f"training diverged: {', '.join(bad)} is not a number at step {self.state.global_step}. Go on from an "
                f"earlier checkpoint with a lower `learning_rate` (now {self.args.learning_rate:g}) or a lower "
                f"`max_grad_norm` (now {self.args.max_grad_norm:g})."
            )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Loss of an evaluation batch; its outputs are not kept."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.evaluation_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As in [`~transformers.Trainer`], with the means and metrics of the evaluation."""
        self._eval_means = RunningMeans()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._eval_means.pop(self.accelerator.gather) | self.evaluation_metrics()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output


__all__ = ["MetricsTrainer"]
