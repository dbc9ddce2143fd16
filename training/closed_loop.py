"""Closed-loop success while a policy is trained: what token accuracy does not tell."""

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lapa.modeling_lapa.modeling_lapa import LapaForTokenPrediction
from lapa.processing.processing_lapa import LapaProcessor

logger = logging.getLogger(__name__)

RolloutFunction = Callable[[LapaForTokenPrediction, LapaProcessor], float | Mapping[str, float]]


class ClosedLoopCallback(TrainerCallback):
    r"""
    Lets the policy act every so many steps and logs how often it succeeds.

    ```python
    >>> def success(model, processor):
    ...     rollouts = roll_out(pool, PolicyController(LapaPolicy(model, processor)), episodes)
    ...     return sum(rollout.success for rollout in rollouts) / len(rollouts)
    >>> trainer = LapaActionFinetuningTrainer(..., callbacks=[ClosedLoopCallback(success, interval=500)])
    ```

    The training does not notice: random number generators and training mode are put back. Of several processes the first
    one plays and the others wait. A model that is sharded over processes cannot act in one of them: play its checkpoints
    instead.

    Args:
        rollout_fn: Gets the model in evaluation mode without gradients, and the processor; returns the success rate, or
            several numbers by name.
        interval: Steps between two evaluations; the last step always has one.
        name: Of the numbers in the log: `closed_loop/success`, or `closed_loop/<key>` for each that is returned.
    """

    def __init__(self, rollout_fn: RolloutFunction, interval: int, name: str = "closed_loop") -> None:
        if interval < 1:
            raise ValueError(f"`interval` must be at least 1, got {interval}.")
        self.rollout_fn, self.interval, self.name = rollout_fn, interval, name
        self.trainer: Any = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Plays at the interval."""
        if state.global_step % self.interval == 0 or state.global_step >= state.max_steps:
            self.play()

    def play(self) -> dict[str, float]:
        """Plays now and logs; the numbers, on the first process."""
        if self.trainer is None:
            raise ValueError("this callback belongs to no trainer yet: pass it to one as `callbacks=[...]`.")
        trainer = self.trainer
        numbers: dict[str, float] = {}
        if trainer.is_world_process_zero():
            with _undisturbed(trainer.policy):
                result = self.rollout_fn(trainer.policy, trainer.processor)
            found = result if isinstance(result, Mapping) else {"success": result}
            numbers = {f"{self.name}/{key}": float(value) for key, value in found.items()}
            logger.info("step %d: %s", trainer.state.global_step, numbers)
        trainer.accelerator.wait_for_everyone()
        trainer.log(dict(numbers))
        return numbers


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random number generators are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        model.eval()
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, training in modes.items():
            module.training = training


__all__ = ["ClosedLoopCallback"]
