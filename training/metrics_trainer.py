"""What the trainers of all stages share: means of named numbers between logs, and an end before a step that is no number."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import EvalLoopOutput

from lapa.training.metrics import RunningMeans
from lapa.training.stream_training import StreamTrainer


def global_norm(norm: Any) -> float:
    """The norm of a gradient as a number; of a sharded one over all its processes, which must all call this."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


class MetricsTrainer(StreamTrainer):
    """
    Trainer that logs more than the loss, keeps no outputs in evaluation, and stops at what is not finite.

    A subclass adds scalars to `_means` in training and to `_eval_means` in evaluation, overrides the hooks, and gives the
    loss of each training batch to `refuse_bad_loss`. A loss or a gradient that is not finite ends the run before the
    weights change, and names the examples by the `example_id` (list of strings) of the batch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._means = RunningMeans()
        # Examples whose gradients are being accumulated, and those of the last finished step.
        self._batch_ids: list[str] = []
        self._finished_ids: list[str] = []

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in [`~transformers.Trainer`]."""
        self._batch_ids += inputs.get("example_id") or ["unknown (the examples have no `example_id`)"]
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            self._finished_ids, self._batch_ids = self._batch_ids, []
        return loss

    def refuse_bad_loss(self, loss: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Raises `ValueError` where the loss of a training batch is not finite: `Trainer` would show it as 0 and go on."""
        if not torch.isfinite(loss):
            self._refuse_batch("loss", loss.item(), inputs.get("example_id") or self._batch_ids)

    # Not `_clip_grad_norm`, which a `max_grad_norm` of 0 leaves out.
    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With fp16 such steps are a matter of course: the scaler skips them.
        if norm is not None and not self.args.fp16 and not math.isfinite(value := global_norm(norm)):
            self._refuse_batch("norm of the gradient", value, self._finished_ids)
        return norm

    def _refuse_batch(self, what: str, value: float, ids: Sequence[str]) -> None:
        raise ValueError(
            f"training diverged: the {what} is {value} at step {self.state.global_step + 1}, on {', '.join(ids)}. The "
            "weights have not been changed by it. Look at these examples, or go on from an earlier checkpoint with a "
            f"lower `learning_rate` (now {self.args.learning_rate:g}) or `max_grad_norm` (now {self.args.max_grad_norm:g})."
        )

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
        super().log(logs, start_time)

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


__all__ = ["MetricsTrainer", "global_norm"]
