"""One interface for whatever chooses actions from images and instructions."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction
from lapa.processing.processing_lapa import LapaProcessor


class Policy(Protocol):
    """Chooses an action for each of a batch of robots."""

    def act(self, images: Sequence[np.ndarray], instructions: Sequence[str]) -> np.ndarray:
        """Actions (batch, action_dim) float32 in physical units.

        Args:
            images: One (height, width, 3) uint8 image per robot.
            instructions: One sentence per robot.
        """


class LapaPolicy:
    """A finetuned model with its processor as a [`Policy`].

    Args:
        model: The finetuned model.
        processor: Holds the action statistics.
        unnorm_key: Which of them to use; may be None when there is one.
        generation: Arguments of `generate`, for example `{"do_sample": True, "temperature": 0.5}`; greedy when empty.
    """

    def __init__(
        self,
        model: LapaForActionPrediction,
        processor: LapaProcessor,
        unnorm_key: str | None = None,
        **generation: Any,
    ) -> None:
        self.model, self.processor = model.eval(), processor
        self.unnorm_key, self.generation = unnorm_key, generation

    @classmethod
    def from_pretrained(cls, folder: str, unnorm_key: str | None = None, **generation: Any) -> "LapaPolicy":
        """Load model and processor of a finetuned folder or Hub repository."""
        model = LapaForActionPrediction.from_pretrained(folder)
        return cls(model, LapaProcessor.from_pretrained(folder), unnorm_key, **generation)

    @torch.inference_mode()
    def act(self, images: Sequence[np.ndarray], instructions: Sequence[str]) -> np.ndarray:
        """See [`Policy`]."""
        inputs = self.processor(
            images=list(images),
            instruction=list(instructions),
            target="action",
            unnorm_key=self.unnorm_key,
            padding="longest",
            return_tensors="pt",
        ).to(self.model.device)
        tokens = self.model.predict_action_tokens(**inputs, **self.generation)
        actions = self.processor.decode_actions(tokens.cpu().numpy(), unnorm_key=self.unnorm_key)
        return np.asarray(actions, dtype=np.float32)
