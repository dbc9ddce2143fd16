"""What the trainings of the baselines share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from lapa.training.metrics_trainer import MetricsTrainer
from lapa.training.safe_checkpoints import SafeCheckpoints, last_checkpoint


@dataclass(frozen=True)
class Schedule:
    """
    How long and how fast a baseline's model is trained, with Adam.

    Args:
        steps (`int`): Optimizer steps.
        batch_size (`int`): Examples per step.
        learning_rate (`float`): Highest rate; it warms up over the first steps and falls along a cosine to a twentieth.
        weight_decay (`float`): 0 is Adam, more is AdamW.
        max_grad_norm (`float`): Gradients are clipped there.
        num_checkpoints (`int`): Written in the course of the training, so that an interrupted one loses little; every one
            is followed by an evaluation where some data are held out.
        use_cpu (`bool`): Train on the CPU though there is a GPU.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    num_checkpoints: int = 5
    use_cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "num_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}.")

    def arguments(self, output: Path, seed: int, evaluates: bool, best: str | None = None) -> TrainingArguments:
        """
        As the Trainer takes it.

        Args:
            output: Folder of the training.
            seed: Of the order of the data and whatever else is drawn.
            evaluates: Whether held-out data are looked at with every checkpoint.
            best: Metric of the evaluation, the lower the better, that chooses the checkpoint to keep; None keeps the last.
        """
        interval = max(1, -(-self.steps // self.num_checkpoints))
        return TrainingArguments(
            output_dir=str(output),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=256,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.05},
            warmup_steps=min(50, self.steps // 10),
            logging_steps=max(1, self.steps // 50),
            eval_strategy="steps" if evaluates else "no",
            eval_steps=interval if evaluates else None,
            save_steps=interval,
            save_total_limit=1,
            load_best_model_at_end=best is not None,
            metric_for_best_model=best,
            greater_is_better=None if best is None else False,
            remove_unused_columns=False,
            seed=seed,
            use_cpu=self.use_cpu,
            report_to="tensorboard",
            dataloader_pin_memory=torch.cuda.is_available() and not self.use_cpu,
        )


class BaselineTrainer(SafeCheckpoints, MetricsTrainer):
    """Trainer of models whose forward takes a batch as it comes and returns an output with `loss`."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a batch."""
        outputs = model(**{name: value for name, value in inputs.items() if name != "example_id"})
        if model.training:
            self.refuse_bad_loss(outputs.loss, inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def train_to_end(trainer: SafeCheckpoints) -> list[dict[str, float]]:
    """Train, from the last whole checkpoint if there is one, save the model, and return the rows of the log with a `loss`.

    What was evaluated in between stands in `trainer_state.json`.
    """
    output = str(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=last_checkpoint(output))
    trainer.save_model()
    trainer.save_state()
    return [row for row in trainer.state.log_history if "loss" in row]


__all__ = ["BaselineTrainer", "Schedule", "train_to_end"]
