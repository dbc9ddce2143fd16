"""Stage 3: finetuning the latent-pretrained policy on real actions, whole or through LoRA."""

import copy
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from lapa.data.labelled_steps import LabelledStepDataset
from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction
from lapa.processing.processing_lapa import LapaProcessor
from lapa.training.arguments import LapaActionFinetuningArguments
from lapa.training.metrics import action_error, mean_action_error, per_dimension, token_accuracy
from lapa.training.policy_trainer import LapaPolicyTrainer

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def add_lora(model: LapaForActionPrediction, peft_config: "LoraConfig") -> "PeftModel":
    """
    Wraps a policy for LoRA with its new rows trained whole.

    The adapters go where `peft_config.target_modules` says (all linear layers of the trunk when None); the action rows
    of the embedding and of the head, which start from noise, are trained directly. All else stays as it is. The config
    itself is not changed.

    Args:
        model: An action policy.
        peft_config: peft's `LoraConfig`.

    Raises:
        ValueError: `trainable_token_indices` or `modules_to_save` of one's own for the embedding or the head.
    """
    from peft import get_peft_model

    peft_config = copy.deepcopy(peft_config)
    taken = {"embed_tokens", "lm_head"} & set(peft_config.modules_to_save or ())
    if peft_config.trainable_token_indices is not None or taken:
        raise ValueError(
            "`peft_config` must leave `trainable_token_indices` and `modules_to_save` of embed_tokens and lm_head "
            "alone: the action rows are trained in any case, the others stay."
        )
    rows = list(range(*model.config.segment("action")))
    peft_config.trainable_token_indices = {"embed_tokens": rows, "lm_head": rows}
    if peft_config.target_modules is None:
        peft_config.target_modules = "all-linear"
    if model.model.vision_tokenizer is not None and peft_config.exclude_modules is None:
        peft_config.exclude_modules = r".*vision_tokenizer.*"
    wrapped = get_peft_model(model, peft_config)
    # The adapter holds the rows it trains. Left to itself peft sees a table that grew and saves all of it as well.
    wrapped.save_pretrained = functools.partial(wrapped.save_pretrained, save_embedding_layers=False)  # type: ignore[method-assign]
    return wrapped


class LapaActionFinetuningTrainer(LapaPolicyTrainer):
    r"""
    Trainer of [`LapaForActionPrediction`].

    ```python
    >>> processor.fit_actions(actions, unnorm_key="my_robot")
    >>> dataset = LabelledStepDataset(processor, instructions, images=images, actions=actions)
    >>> policy = LapaForActionPrediction.from_pretrained("policy")
    >>> trainer = LapaActionFinetuningTrainer(policy, LapaActionFinetuningArguments("robot"), dataset, processor=processor)
    >>> trainer.train()
    >>> trainer.save_model()
    ```

    Evaluation gives, with the true tokens before each one (teacher forcing), token accuracy and the mean absolute error
    in physical units, both per dimension; beside it the error of always predicting the mean action of the training
    data. Errors need `action` in the examples.

    Args:
        model: The policy. Its config learns the number of bins of each dimension.
        args: Training arguments.
        train_dataset, eval_dataset: `LabelledStepDataset` with actions.
        processor: Has the bins of `unnorm_key`. It is saved beside the model, asking for actions.
        unnorm_key: Which bins; None is allowed where the processor has exactly one set.
        peft_config: peft's `LoraConfig` for LoRA, see `add_lora`; None trains all weights.
        callbacks: Further callbacks.
        kwargs: Further arguments of [`~transformers.Trainer`].
    """

    args: LapaActionFinetuningArguments
    target = "action"

    def __init__(
        self,
        model: Any,
        args: LapaActionFinetuningArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processor: LapaProcessor | None = None,
        unnorm_key: str | None = None,
        peft_config: "LoraConfig | None" = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        self.unnorm_key = unnorm_key
        if processor is not None:
            num_bins = processor.action_tokenizer(unnorm_key).num_bins
            # With several sets of bins in use the processor says per request which bins there are.
            one_set = len(processor.action_statistics) == 1
            model.config.action_num_bins = list(num_bins) if one_set else None
        if peft_config is not None:
            model = add_lora(model, peft_config)
        super().__init__(model, args, train_dataset, eval_dataset, processor, callbacks, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in [`~transformers.Trainer`], without the tables while they hold retired latent rows.

        Those rows get no gradient; decay alone would wear away the latent head that the checkpoint still carries.
        """
        names: list[str] = super().get_decay_parameter_names(model)
        if self.policy.config.keep_latent_head:
            return names
        tables = [f"{table}.weight" for table in ("embed_tokens", "lm_head")]
        return [name for name in names if not name.endswith(tuple(tables))]

    def evaluate_batch(self, hidden_states: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        """Keeps the most likely bins of the batch, the true ones and the true actions."""
        config = self.policy.config
        start, end = config.segment("action")
        targets = inputs["labels"][:, 1:]
        rows, columns = torch.where((targets >= start) & (targets < end))
        if len(rows) != len(targets) * config.action_dim:
            raise ValueError(
                f"evaluation needs {config.action_dim} action tokens (`action_dim`) in every example, got {len(rows)} "
                f"in {len(targets)} examples."
            )
        logits = self.policy._segment_logits(hidden_states[rows, columns], start, end).float()
        logits = logits.view(len(targets), config.action_dim, -1)
        if self.processor is not None:
            num_bins = torch.tensor(self.processor.action_tokenizer(self.unnorm_key).num_bins, device=logits.device)
            missing = torch.arange(end - start, device=logits.device) >= num_bins[:, None]
            logits = logits.masked_fill(missing, float("-inf"))
        parts = [logits.argmax(-1), (targets[rows, columns] - start).view(len(targets), -1)]
        parts = [part.float() for part in parts] + ([inputs["action"].float()] if "action" in inputs else [])
        self._eval_rows.append(self.accelerator.gather_for_metrics(torch.cat(parts, dim=1).contiguous()).cpu())

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `LapaPolicyTrainer`."""
        self._eval_rows: list[torch.Tensor] = []
        return super().evaluation_loop(*args, **kwargs)

    def evaluation_metrics(self) -> dict[str, float]:
        """Token accuracy, error in physical units and that of the mean action, each per dimension."""
        rows, dim = torch.cat(self._eval_rows).numpy(), self.policy.config.action_dim
        predicted, target, actions = rows[:, :dim].astype(int), rows[:, dim : 2 * dim].astype(int), rows[:, 2 * dim :]
        metrics = per_dimension("token_accuracy", token_accuracy(predicted, target))
        if self.processor is None or not actions.shape[1]:
            return metrics
        decoded = self.processor.decode_actions(predicted, self.unnorm_key)
        metrics |= per_dimension("action_error", action_error(decoded, actions))
        baseline = self._train_actions()
        if baseline is not None:
            metrics |= per_dimension("mean_action_error", mean_action_error(baseline, actions))
        return metrics

    def _train_actions(self) -> ArrayLike | None:
        actions = self.train_dataset.actions if isinstance(self.train_dataset, LabelledStepDataset) else None
        return None if actions is None else np.asarray(actions)

    def save_merged(self, output_dir: str | None = None) -> None:
        """Saves model and processor as a plain checkpoint; a LoRA run is merged first and cannot train on after it."""
        if self.args.merge_adapter and not isinstance(
            self.accelerator.unwrap_model(self.model), LapaForActionPrediction
        ):
            merged = self.accelerator.unwrap_model(self.model).merge_and_unload()
            self.model = self.model_wrapped = merged
        self.save_model(output_dir)


__all__ = ["LapaActionFinetuningTrainer", "add_lora"]
