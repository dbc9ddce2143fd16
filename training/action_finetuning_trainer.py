"""Stage 3: finetuning the latent-pretrained policy on real actions, whole or through LoRA."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from lapa.data.action_stream import ActionStepStream
from lapa.data.labelled_steps import labelled_parts
from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction
from lapa.processing.processing_lapa import LapaProcessor
from lapa.training.adapters import add_lora, merged, save_model_config
from lapa.training.arguments import LapaActionFinetuningArguments
from lapa.training.metrics import action_error, mean_action_error, per_dimension, token_accuracy
from lapa.training.policy_trainer import LapaPolicyTrainer

if TYPE_CHECKING:
    from peft import LoraConfig


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
        peft_config: peft's `LoraConfig` for LoRA or DoRA, see `add_lora`; None trains all weights. With a model whose
            trunk is quantised (`lapa.training.adapters.quantization_config`) it is QLoRA.
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
        if args.latent_loss_weight is not None:
            model.config.latent_loss_weight = args.latent_loss_weight
        if processor is not None:
            self._check_processor(model.config, processor)
            # With several sets of bins in use the processor says per request which bins there are.
            one_set = len(processor.action_statistics) == 1
            num_bins = processor.action_tokenizer(unnorm_key).num_bins if one_set or unnorm_key is not None else ()
            zeros = [0] * (model.config.action_dim - len(num_bins))
            model.config.action_num_bins = [*num_bins, *zeros] if one_set else None
        if peft_config is not None:
            model = add_lora(model, peft_config, args.activation_checkpointing)
        elif getattr(model, "is_quantized", False):
            raise ValueError(
                "a quantised model is trained through an adapter only: give a `peft_config` (`use_peft`)."
            )
        super().__init__(model, args, train_dataset, eval_dataset, processor, callbacks, **kwargs)

    @staticmethod
    def _check_processor(config: Any, processor: LapaProcessor) -> None:
        for name in ("action_dim", "action_horizon", "use_proprio", "action_vocab_size"):
            if getattr(config, name) != getattr(processor, name):
                raise ValueError(
                    f"`processor` has `{name}` {getattr(processor, name)}, but the model has {getattr(config, name)}: make "
                    "it with `LapaProcessor.from_config`, or load the model with this value."
                )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in [`~transformers.Trainer`], without the tables while they hold retired latent rows.

        Those rows get no gradient; decay alone would wear away the latent head that the checkpoint still carries.
        """
        names: list[str] = super().get_decay_parameter_names(model)
        if self.policy.config.keep_latent_head:
            return names
        tables = [f"{table}.weight" for table in ("embed_tokens", "lm_head")]
        return [name for name in names if not name.endswith(tuple(tables))]

    def evaluate_batch(self, logits: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Keeps the most likely bins of the batch, the true ones and the true actions, and whose they are."""
        config = self.policy.config
        start, end = config.segment("action")
        ids, labels = inputs["input_ids"], inputs["labels"]
        is_action = (ids >= start) & (ids < end)
        keys = self._keys_of(inputs)
        horizon, size = config.action_horizon, config.action_horizon * config.action_dim
        predicted, target = (torch.full((len(ids), size), -1.0, device=ids.device) for _ in range(2))
        positions = torch.split(
            torch.arange(len(logits), device=ids.device), (is_action & (labels >= 0)).sum(1).tolist()
        )
        for row, key in enumerate(keys):
            num_bins = self._num_bins(key)
            true = labels[row, is_action[row]] - start
            if not len(true) and config.keep_latent_head:
                continue  # an example of latent codes
            if len(true) != horizon * len(num_bins):
                raise ValueError(
                    f"evaluation needs {horizon} x {len(num_bins)} action tokens (`action_horizon` x dimensions of "
                    f"{key!r}) in every example, got {len(true)}."
                )
            of_row = logits[positions[row]].view(-1, len(num_bins), end - start)
            limit = torch.tensor(num_bins, device=logits.device)[:, None]
            missing = torch.arange(end - start, device=logits.device) >= limit
            best = of_row.masked_fill(missing, float("-inf")).argmax(-1)
            # Steps stand side by side in `size` columns, each `action_dim` wide.
            target[row].view(horizon, -1)[:, : len(num_bins)] = true.clamp(min=-1).view(horizon, -1).float()
            predicted[row].view(horizon, -1)[: len(best), : len(num_bins)] = best.float()
        index = torch.tensor([[self._eval_keys.index(key)] for key in keys], device=ids.device).float()
        actions = torch.full((len(ids), horizon, config.action_dim), float("nan"), device=ids.device)
        if "action" in inputs:
            known = inputs["action"].float().view(len(ids), horizon, -1)
            actions[..., : known.shape[2]] = known
        parts = [index, predicted, target, actions.flatten(1)]
        self._eval_rows.append(self.accelerator.gather_for_metrics(torch.cat(parts, dim=1).contiguous()).cpu())

    def _keys_of(self, inputs: dict[str, Any]) -> list[str | None]:
        """Whose action each row of a batch is; None where there is no processor to tell."""
        given = inputs.get("unnorm_key")
        if self.processor is None:
            return [None] * len(inputs["labels"])
        return [key or self.unnorm_key for key in given or [None] * len(inputs["labels"])]

    def _num_bins(self, key: str | None) -> list[int]:
        if self.processor is None:
            return [self.policy.config.action_vocab_size] * self.policy.config.action_dim
        return list(self.processor.action_tokenizer(key).num_bins)

    @property
    def _eval_keys(self) -> list[str | None]:
        return [None, *sorted(self.processor.action_statistics)] if self.processor is not None else [None]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `LapaPolicyTrainer`."""
        self._eval_rows: list[torch.Tensor] = []
        return super().evaluation_loop(*args, **kwargs)

    def evaluation_metrics(self) -> dict[str, float]:
        """
        Token accuracy, error in physical units and that of the mean action, each per dimension.

        With chunks also the error of every step of them (`action_error/step_0`, ...); steps beyond the end of an episode
        do not count. With several sets of bins in one evaluation each has its own numbers (`my_robot/action_error`), and
        `token_accuracy` is that of all.
        """
        config = self.policy.config
        rows = torch.cat(self._eval_rows).numpy()
        size = config.action_horizon * config.action_dim
        rows = rows[(rows[:, 1 + size : 1 + 2 * size] >= 0).any(1)]  # those with actions
        table = rows[:, 1:].reshape(len(rows), -1, config.action_horizon, config.action_dim)
        keys = np.unique(rows[:, 0].astype(int))
        metrics: dict[str, float] = {}
        for index in keys:
            of_key = self._metrics_of(self._eval_keys[index], table[rows[:, 0] == index])
            prefix = f"{self._eval_keys[index]}/" if len(keys) > 1 else ""
            metrics |= {prefix + name: value for name, value in of_key.items()}
        if len(keys) > 1:
            predicted, target = rows[:, 1 : 1 + size], rows[:, 1 + size : 1 + 2 * size]
            metrics["token_accuracy"] = float((predicted == target)[target >= 0].mean())
        return metrics

    def _metrics_of(self, key: str | None, table: NDArray[np.float32]) -> dict[str, float]:
        """Metrics of one set of bins from (num_rows, 3, action_horizon, action_dim): predicted, true, physical actions."""
        table = table[..., : len(self._num_bins(key))]
        valid = table[:, 1, :, 0] >= 0
        predicted, target = table[:, 0].astype(int), table[:, 1].astype(int)
        metrics = per_dimension("token_accuracy", token_accuracy(predicted[valid], target[valid]))
        if self.processor is None or np.isnan(table[:, 2][valid]).any():
            return metrics
        decoded = self.processor.decode_actions(np.maximum(predicted, 0), key)
        metrics |= per_dimension("action_error", action_error(decoded[valid], table[:, 2][valid]))
        if valid.shape[1] > 1:
            for step in range(valid.shape[1]):
                chosen = valid[:, step]
                if chosen.any():
                    error = action_error(decoded[chosen, step], table[chosen, 2, step])
                    metrics[f"action_error/step_{step}"] = float(error.mean())
        baseline = self._train_actions(key)
        if baseline is not None:
            metrics |= per_dimension("mean_action_error", mean_action_error(baseline, table[:, 2][valid]))
        return metrics

    def _train_actions(self, key: str | None) -> ArrayLike | None:
        """(num_steps, action_dim) actions of the training data with these bins, as far as they are in memory; their mean of a stream."""
        known = self.processor.action_statistics if self.processor is not None else {}
        if isinstance(self.train_dataset, ActionStepStream):
            mean = self.train_dataset.mean_actions.get(key or self.unnorm_key or "")
            return None if mean is None else mean[None]
        parts = [
            np.asarray(part.actions if part.actions.ndim == 2 else part.actions[:, 0])
            for part in labelled_parts(self.train_dataset)
            if part.actions is not None and (part.unnorm_key == key or len(known) == 1)
        ]
        return np.concatenate(parts) if parts else None

    def save_merged(self, output_dir: str | None = None) -> None:
        """Saves model and processor as a plain checkpoint; a LoRA run is merged first and cannot train on after it."""
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.args.merge_adapter and not isinstance(model, LapaForActionPrediction):
            self.model = self.model_wrapped = merged(model)
        self.save_model(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.args.should_save and not isinstance(model, LapaForActionPrediction):
            save_model_config(model, output_dir or self.args.output_dir)


__all__ = ["LapaActionFinetuningTrainer", "add_lora", "merged"]
