"""Many steps of few instructions, encoded without tokenizing each of them."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from lapa.processing.processing_lapa import LapaProcessor


class EncodedStepDataset(Dataset[dict[str, Any]]):
    r"""
    Training examples of stages 2 and 3 from precomputed codes.

    The same examples as [`LabelledStepDataset`] gives, about a hundred times faster: every distinct instruction is
    encoded once by the processor, and the codes of a step are written into a copy.

    Args:
        processor: Encodes the instructions.
        instructions: (num_steps,) sentences.
        vision_codes: (num_steps, num_image_tokens) integers.
        latent_action_codes: (num_steps, num_latent_tokens) integers; exactly one of this and `action_tokens`.
        action_tokens: (num_steps, action_dim) integers, or (num_steps, action_horizon, action_dim).

    Raises:
        ValueError: Columns of unequal length, neither or both targets, codes outside their vocabulary.
    """

    def __init__(
        self,
        processor: LapaProcessor,
        instructions: ArrayLike,
        vision_codes: ArrayLike,
        latent_action_codes: ArrayLike | None = None,
        action_tokens: ArrayLike | None = None,
    ) -> None:
        if (latent_action_codes is None) == (action_tokens is None):
            raise ValueError("Exactly one of `latent_action_codes` and `action_tokens` must be given.")
        target = "latent_action_codes" if action_tokens is None else "action_tokens"
        self.vision_codes = np.asarray(vision_codes)
        targets = np.asarray(latent_action_codes if action_tokens is None else action_tokens)
        self.targets = targets.reshape(len(targets), -1)
        sentences, self.sentence = np.unique(np.asarray(instructions, dtype=object), return_inverse=True)
        latent = target == "latent_action_codes"
        self.target_offset = processor.latent_offset if latent else processor.action_offset
        vocabulary = processor.latent_vocab_size if latent else processor.action_vocab_size
        self.vision_offset = processor.vision_offset
        for name, codes, limit in (
            ("vision_codes", self.vision_codes, processor.end_of_vision_id - 1),
            (target, self.targets, vocabulary),
        ):
            if len(codes) != len(self.sentence):
                raise ValueError(f"`{name}` has {len(codes)} rows for {len(self.sentence)} instructions.")
            if codes.size and not (codes.min() >= 0 and codes.max() < limit):
                raise ValueError(f"`{name}` must lie in [0, {limit - 1}], got {codes.min()} to {codes.max()}.")
        blank = {target: [0] * self.targets.shape[1]}
        self.templates = [self._template(processor, str(sentence), blank) for sentence in sentences]

    def _template(
        self, processor: LapaProcessor, sentence: str, blank: dict[str, Any]
    ) -> dict[str, NDArray[np.int64]]:
        image = [0] * self.vision_codes.shape[1]
        encoded = processor.encode_example(sentence, vision_codes=image, **blank)
        ids = np.asarray(encoded["input_ids"], dtype=np.int64)
        return {
            "input_ids": ids,
            "labels": np.asarray(encoded["labels"], dtype=np.int64),
            "vision": np.flatnonzero(ids == self.vision_offset),
            "target": np.flatnonzero(ids == self.target_offset),
        }

    def __len__(self) -> int:
        return len(self.sentence)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """`input_ids` and `labels` (length,) int64, and `example_id`."""
        template = self.templates[self.sentence[item]]
        ids, labels = template["input_ids"].copy(), template["labels"].copy()
        ids[template["vision"]] = self.vision_offset + self.vision_codes[item]
        ids[template["target"]] = labels[template["target"]] = self.target_offset + self.targets[item]
        return {"input_ids": ids, "labels": labels, "example_id": f"example {item}"}


__all__ = ["EncodedStepDataset"]
