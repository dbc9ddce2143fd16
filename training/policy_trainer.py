"""What the trainers of stages 2 and 3 share: batches, losses of the segments, evaluation without full logits."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerState

from lapa.data.collators import LapaTrainingCollator
from lapa.data.labelled_steps import LabelledStepDataset
from lapa.modeling_lapa.modeling_lapa import LapaForTokenPrediction
from lapa.processing.processing_lapa import LapaProcessor
from lapa.training.arguments import LapaPolicyTrainingArguments
from lapa.training.metrics_trainer import MetricsTrainer

# Outputs of the models that are logged, in this order.
LOGGED_OUTPUTS = ("latent_loss", "action_loss", "text_loss", "latent_accuracy", "action_accuracy")


class ActionCollator(LapaTrainingCollator):
    """`LapaTrainingCollator` that lets physical actions through: `action` (action_dim,) -> (batch, action_dim) float32."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """As in `LapaTrainingCollator`; `action` goes along where every example that is kept has one."""
        kept = [example for example in examples if self._fits(example)]
        batch = super().__call__([{k: v for k, v in example.items() if k != "action"} for example in kept])
        if kept and all("action" in example for example in kept):
            batch["action"] = torch.stack([torch.as_tensor(example["action"]).float() for example in kept])
        return batch


class _StartEpoch(TrainerCallback):
    """Tells the data set which epoch begins, in a resumed run too."""

    def __init__(self, dataset: LabelledStepDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # A resumed run begins in the middle of one.
        self.dataset.start_epoch(math.floor((state.epoch or 0) + 1e-6))


class LapaPolicyTrainer(MetricsTrainer):
    r"""
    Trainer of a policy on `LabelledStepDataset` examples; the stages are its subclasses.

    The loss is a mean over rows, so accumulating gradients over equal micro-batches equals one large batch. The vision
    tokenizer is frozen. Logs carry the losses and accuracies of the segments, averaged since the last log.

    Args:
        model: The policy.
        args: Training arguments.
        train_dataset, eval_dataset: `LabelledStepDataset`, or anything that gives what its items hold.
        processor: Encodes the examples; saved beside the model.
        callbacks: Further callbacks.
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
        if isinstance(train_dataset, LabelledStepDataset):
            self.add_callback(_StartEpoch(train_dataset))
        self.processor = processor
        if processor is not None:
            self.policy.config.prompt_tails = processor.prompt_tails
        if self.policy.model.vision_tokenizer is not None:
            self.policy.model.vision_tokenizer.requires_grad_(False).eval()

    @property
    def policy(self) -> LapaForTokenPrediction:
        """The model without what wraps it for distributed training or LoRA."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return model if isinstance(model, LapaForTokenPrediction) else model.get_base_model()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Loss of a batch."""
        if self.policy.model.vision_tokenizer is not None:
            self.policy.model.vision_tokenizer.eval()  # `model.train()` has just switched it over
        inputs = {name: value for name, value in inputs.items() if name != "action"}
        outputs = model(**inputs, use_cache=False)
        if model.training:
            self._means.add({name: outputs.get(name) for name in LOGGED_OUTPUTS})
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def evaluation_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Loss of an evaluation batch; logits are computed only where there is a loss."""
        labels = inputs["labels"]
        trunk = {name: value for name, value in inputs.items() if name not in ("labels", "action")}
        hidden_states = self.policy.model(**trunk, use_cache=False).last_hidden_state
        losses = self.policy._losses(hidden_states, labels)
        self._eval_means.add({name: losses.get(name) for name in LOGGED_OUTPUTS}, weight=len(labels))
        self.evaluate_batch(hidden_states, inputs)
        return losses["loss"]

    def evaluate_batch(self, hidden_states: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        """Hook of a stage: further numbers from an evaluation batch and its hidden states."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.processor is not None:
            self.processor.target = self.target
        super()._save(output_dir, state_dict)


__all__ = ["LOGGED_OUTPUTS", "ActionCollator", "LapaPolicyTrainer"]
