"""A finetuned LAPA model behind lerobot's policy interface."""

from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from lapa.data.collators import LapaTrainingCollator
from lapa.serving.policy import ChunkPlayer, LapaPolicy
from lerobot_policy_lapa.configuration_lapa_adapter import LapaAdapterConfig


class LapaAdapterPolicy(PreTrainedPolicy):
    """
    A finetuned LAPA model; [`~lapa.serving.policy.LapaPolicy`] does the work.

    Batches hold the image (batch, 3, height, width) float32 in [0, 1] under its camera's key, sentences under `task` and, for a
    model that reads it, `observation.state` (batch, proprio_dim) in physical units.

    Args:
        config: Names the model.
        unused: What lerobot passes to every policy (statistics of a data set); the model has its own.

    Raises:
        ValueError: Features that do not fit the model.
    """

    config_class = LapaAdapterConfig
    name = "lapa"

    def __init__(self, config: LapaAdapterConfig, **unused: Any) -> None:
        super().__init__(config)
        config.validate_features()
        generation: dict[str, Any] = {}
        if config.do_sample:
            generation = {"do_sample": True, "top_k": 0}
            if config.temperature is not None:
                generation["temperature"] = config.temperature
        self._policy = LapaPolicy.from_pretrained(config.model, config.unnorm_key, **generation)
        # Registered, so that `to`, `train` and `state_dict` reach the weights.
        self.model = self._policy.model
        self._processor = self._policy.processor
        shape, action_dim = tuple(config.action_feature.shape), self.model.config.action_dim
        if shape != (action_dim,):
            raise ValueError(
                f"`model` ({config.model}) has actions of {action_dim} numbers, the environment takes {shape}."
            )
        if config.chunk_size != self._policy.action_horizon:
            raise ValueError(
                f"`chunk_size` must be the model's `action_horizon` ({self._policy.action_horizon}), got {config.chunk_size}."
            )
        self._player = ChunkPlayer(self._policy, config.replan_every)

    def get_optim_params(self) -> list[torch.nn.Parameter]:
        """The parameters that are trained."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def reset(self) -> None:
        """Forgets what is left of the chunks, at the start of an episode."""
        self._player.reset()

    def drop_queued_actions(self) -> None:
        """Lets the next action be predicted anew, as for another sentence."""
        self._player.reset()

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **unused: Any) -> Tensor:
        """The next action of every robot, (batch, action_dim) float32 in physical units."""
        self.eval()
        return self._tensor(self._player.act(*self._inputs(batch)))

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **unused: Any) -> Tensor:
        """All steps of a prediction, (batch, action_horizon, action_dim) float32 in physical units."""
        self.eval()
        return self._tensor(self._policy.act_chunk(*self._inputs(batch)))

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """
        Cross entropy of the action bins, as `lapa finetune` computes it.

        Args:
            batch: Also `action` (batch, action_horizon, action_dim) and `action_is_pad` (batch, action_horizon).
            reduction: `mean`; others are refused.
        """
        if reduction != "mean":
            raise ValueError(f"`reduction` must be 'mean', got {reduction!r}.")
        images, sentences, states = self._inputs(batch)
        key = self._statistics_key()
        actions = batch[ACTION].detach().float().cpu().numpy()
        actions = actions[:, None] if actions.ndim == 2 else actions
        padded = batch.get("action_is_pad")
        examples = []
        for row, (image, sentence) in enumerate(zip(images, sentences)):
            valid = actions.shape[1] if padded is None else int((~padded[row].bool()).sum())
            bins = self._processor.encode_actions(actions[row] if self.config.chunk_size > 1 else actions[row, 0], key)
            example: dict[str, Any] = self._processor.encode_example(
                sentence,
                action_tokens=bins,
                proprio=None if states is None else states[row],
                unnorm_key=key,
                num_valid_steps=valid if self.config.chunk_size > 1 else None,
            )
            example["pixel_values"] = self._processor.image_processor(image)["pixel_values"][0]
            examples.append(example)
        inputs = LapaTrainingCollator(pad_token_id=self._processor.tokenizer.bos_token_id)(examples)
        loss = self.model(**{name: value.to(self.model.device) for name, value in inputs.items()}).loss
        return loss, {"loss": float(loss.detach())}

    def _statistics_key(self) -> str:
        keys = list(self._processor.action_statistics)
        if self.config.unnorm_key is None and len(keys) != 1:
            raise ValueError(f"`unnorm_key` must be one of {', '.join(keys)}.")
        return self.config.unnorm_key or keys[0]

    def _inputs(self, batch: dict[str, Any]) -> tuple[list[np.ndarray], list[str], list[np.ndarray] | None]:
        """Images (height, width, 3) uint8, sentences, and states where the model reads them."""
        pixels = batch[self.config.image_key].detach().float().clamp(0, 1)
        images = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        task = batch.get("task")
        if task is None:
            raise ValueError("the batch has no `task`: a LAPA model needs a sentence.")
        sentences = [task] * len(images) if isinstance(task, str) else list(task)
        states = list(batch[OBS_STATE].detach().float().cpu().numpy()) if self.model.config.use_proprio else None
        return list(images), sentences, states

    def _tensor(self, actions: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(actions, dtype=np.float32)).to(self.model.device)
