"""What the trainers of stages 2 and 3 share: batches, losses of the segments, evaluation without full logits."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerState

from lapa.data.collators import DESCRIBING_KEYS, LapaTrainingCollator
from lapa.data.labelled_steps import LabelledStepDataset, labelled_parts
from lapa.modeling_lapa.modeling_lapa import LapaForTokenPrediction
from lapa.processing.processing_lapa import LapaProcessor
from lapa.training.arguments import LapaPolicyTrainingArguments
from lapa.training.closed_loop import ClosedLoopCallback
from lapa.training.metrics_trainer import MetricsTrainer
from lapa.training.safe_checkpoints import SafeCheckpoints

# Outputs of the models that are logged, in this order.
LOGGED_OUTPUTS = ("latent_loss", "action_loss", "text_loss", "latent_accuracy", "action_accuracy")


class ActionCollator(LapaTrainingCollator):
    """
    `LapaTrainingCollator` that lets through what examples say of themselves.

    `action` ([action_horizon,] action_dim) becomes (batch, [action_horizon,] action_dim) float32, NaN for what another
    example has and this one lacks; `unnorm_key` and `example_id` become lists of strings, empty where there is none. Each
    goes along where any example that is kept has it.
    """

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """As in `LapaTrainingCollator`."""
        kept = [example for example in examples if self._fits(example)]
        batch: dict[str, Any] = super().__call__(kept)
        for name in DESCRIBING_KEYS:
            if any(name in example for example in kept):
                values = [example.get(name) for example in kept]
                batch[name] = _stack_actions(values) if name == "action" else [str(value or "") for value in values]
        return batch


def _stack_actions(actions: Sequence[Any]) -> torch.Tensor:
    known = [torch.as_tensor(action).float() for action in actions if action is not None]
    widest = max(known, key=lambda row: row.shape[-1])
    rows = [torch.full_like(widest, math.nan) for _ in actions]
    for row, action in zip(rows, actions):
        if action is not None:
            row[..., : np.shape(action)[-1]] = torch.as_tensor(action)
    return torch.stack(rows)


class _StartEpoch(TrainerCallback):
    """Tells the data sets which epoch begins, in a resumed run too."""

    def __init__(self, datasets: Sequence[LabelledStepDataset]) -> None:
        self.datasets = datasets

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # A resumed run begins in the middle of one.
        for dataset in self.datasets:
            dataset.start_epoch(math.floor((state.epoch or 0) + 1e-6))


class LapaPolicyTrainer(SafeCheckpoints, MetricsTrainer):
    r"""
    Trainer of a policy on `LabelledStepDataset` examples; the stages are its subclasses.

    The loss is a mean over rows, so accumulating gradients over equal micro-batches equals one large batch. The vision
    tokenizer is frozen. Logs carry the losses and accuracies of the segments, averaged since the last log.

    Args:
        model: The policy.
        args: Training arguments.
        train_dataset, eval_dataset: `LabelledStepDataset`, or anything that gives what its items hold.
        processor: Encodes the examples; saved beside the model.
        callbacks: Further callbacks, such as `ClosedLoopCallback`.
        kwargs: Further arguments of [`~transformers.Trainer`].
    """

    args: LapaPolicyTrainingArguments
    # What the saved processor asks for.
    target = "latent"

    def __init__(
        self,
        model: nn.Module,
        args: LapaPolicyTrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processor: LapaProcessor | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("data_collator") is None:
            if processor is None:
                raise ValueError("`processor` must be given unless there is a `data_collator`, got None.")
            kwargs["data_collator"] = ActionCollator(
                # The published batches put bos on the pads.
                pad_token_id=processor.tokenizer.bos_token_id,
                max_length=args.max_length,
                pad_to_max_length=args.pad_to_max_length,
            )
        # Trainer would write its training-time setting into the config that is saved.
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            callbacks=list(callbacks or ()),
            **kwargs,
        )
        if use_cache is None:
            del self.model.config.use_cache
        else:
            self.model.config.use_cache = use_cache
        if parts := labelled_parts(train_dataset):
            self.add_callback(_StartEpoch(parts))
        self.processor = processor
        for callback in callbacks or ():
            if isinstance(callback, ClosedLoopCallback):
                callback.trainer = self
        if processor is not None:
            self.policy.config.prompt_tails = processor.prompt_tails
        if self.policy.model.vision_tokenizer is not None:
            self.policy.model.vision_tokenizer.requires_grad_(False).eval()

    @property
    def policy(self) -> LapaForTokenPrediction:
        """The model without what wraps it for distributed training or LoRA."""
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model if isinstance(model, LapaForTokenPrediction) else model.get_base_model()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Loss of a batch."""
        if self.policy.model.vision_tokenizer is not None:
            self.policy.model.vision_tokenizer.eval()  # `model.train()` has just switched it over
        outputs = model(**self._for_model(inputs), use_cache=False)
        if model.training:
            self.refuse_bad_loss(outputs.loss, inputs)
            self._means.add({name: outputs.get(name) for name in LOGGED_OUTPUTS})
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _for_model(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model takes of a batch, images as their codes."""
        kept = {name: value for name, value in inputs.items() if name not in DESCRIBING_KEYS}
        if "pixel_values" in kept:
            # Here and not in the model's forward, where mixed precision would round the image and the tokenizer's sums:
            # the codes must be those that the finished policy sees.
            pixel_values = kept.pop("pixel_values")
            with torch.autocast(pixel_values.device.type, enabled=False):
                kept["vision_codes"] = self.policy.model.encode_images(pixel_values)
        return kept

    def evaluation_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Loss of an evaluation batch; logits are computed only where there is a loss."""
        # Through the wrapped model: a sharded one gathers its weights in its own forward only.
        outputs = model(**self._for_model(inputs), use_cache=False, target_segment=self.target)
        self._eval_means.add({name: outputs.get(name) for name in LOGGED_OUTPUTS}, weight=len(inputs["labels"]))
        self.evaluate_batch(outputs.segment_logits, inputs)
        return outputs.loss

    def evaluate_batch(self, logits: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Hook of a stage: further numbers from an evaluation batch.

        Args:
            logits: (num_targets, segment_size) float32 of the labels in the stage's segment, row by row.
            inputs: The batch.
        """

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.processor is not None:
            self.processor.target = self.target
        super()._save(output_dir, state_dict)


__all__ = ["LOGGED_OUTPUTS", "ActionCollator", "LapaPolicyTrainer"]
