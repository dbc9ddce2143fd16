"""Collators: lists of training examples to padded batches."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lapa.processing.processing_lapa import IGNORED_LABEL

logger = logging.getLogger(__name__)

SEQUENCE_KEYS = ("input_ids", "labels")
# Stacked as they are, with the dtype they get in the batch.
STACKED_KEYS = {"pixel_values": torch.float32, "vision_codes": torch.int64, "action_num_bins": torch.int64}
# What examples say of themselves: not for the model, and left out of a batch here.
DESCRIBING_KEYS = ("action", "unnorm_key", "example_id")
OVERFLOW_RULES = ("error", "drop")


@dataclass
class LapaTrainingCollator:
    r"""
    Pads training examples of `LapaProcessor.encode_example` on the right.

    ```python
    >>> collator = LapaTrainingCollator(pad_token_id=1)
    >>> collator([{"input_ids": [1, 5, 2], "labels": [-100, 5, 2]}, {"input_ids": [1, 2], "labels": [-100, 2]}])
    {'input_ids': tensor([[1, 5, 2], [1, 2, 1]]), 'attention_mask': tensor([[1, 1, 1], [1, 1, 0]]),
     'labels': tensor([[-100, 5, 2], [-100, 2, -100]])}
    ```

    Args:
        pad_token_id (`int`): Id on the pads. The published batches use bos.
        max_length (`int`, *optional*): Most ids per example; longer ones fall under `overflow`.
        pad_to_max_length (`bool`, defaults to `False`): Whether every batch is `max_length` wide (published: 384)
            instead of as wide as its longest example.
        pad_to_multiple_of (`int`, *optional*): Rounds the width of a batch up.
        overflow (`str`, defaults to `"error"`): What an example longer than `max_length` does: `"error"` raises, `"drop"`
            leaves it out, counts it in `num_dropped` and logs it. Examples are never cut.
    """

    pad_token_id: int
    max_length: int | None = None
    pad_to_max_length: bool = False
    pad_to_multiple_of: int | None = None
    overflow: str = "error"
    num_dropped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.overflow not in OVERFLOW_RULES:
            raise ValueError(f"`overflow` must be one of {', '.join(OVERFLOW_RULES)}, got {self.overflow!r}.")
        if self.pad_to_max_length and self.max_length is None:
            raise ValueError("`max_length` must be given with `pad_to_max_length`, got None.")
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            examples: Each with `input_ids` and `labels` (sequence,); all or none with `pixel_values`
                (3, height, width) float32, `vision_codes` (num_image_tokens,), `action_num_bins` (action_dim,).
                `action`, `unnorm_key` and `example_id` are left out of the batch.

        Returns:
            `input_ids`, `attention_mask`, `labels` (batch, width) int64, labels -100 on pads, and the stacked rest.

        Raises:
            ValueError: Examples of unequal or unknown keys, or longer than `max_length`.
        """
        kept = [example for example in examples if self._fits(example)]
        if not kept:
            raise ValueError(f"no example is left of {len(examples)}: `max_length` is {self.max_length}.")
        kept = [{k: v for k, v in example.items() if k not in DESCRIBING_KEYS} for example in kept]
        keys = set(kept[0])
        unknown = keys - set(SEQUENCE_KEYS) - set(STACKED_KEYS)
        if unknown or not keys >= set(SEQUENCE_KEYS) or any(set(example) != keys for example in kept):
            raise ValueError(
                f"examples must all have {', '.join(SEQUENCE_KEYS)} and the same of {', '.join(STACKED_KEYS)}, got "
                f"{sorted({tuple(sorted(example)) for example in kept})}."
            )
        batch = self._padded(kept)
        for key in sorted(keys - set(SEQUENCE_KEYS)):
            stacked = torch.stack([torch.as_tensor(np.asarray(example[key])) for example in kept])
            batch[key] = stacked.to(STACKED_KEYS[key])
        return batch

    def _fits(self, example: dict[str, Any]) -> bool:
        length = len(example["input_ids"])
        if length != len(example["labels"]):
            raise ValueError(f"`labels` ({len(example['labels'])}) and `input_ids` ({length}) must be equally long.")
        if self.max_length is None or length <= self.max_length:
            return True
        if self.overflow == "error":
            raise ValueError(f"an example has {length} ids, more than `max_length` ({self.max_length}).")
        self.num_dropped += 1
        logger.warning(
            "dropped an example of %d ids (max_length %d), %d so far", length, self.max_length, self.num_dropped
        )
        return False

    def _padded(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(example["input_ids"]) for example in examples)
        if self.pad_to_max_length and self.max_length is not None:
            width = self.max_length
        multiple = self.pad_to_multiple_of or 1
        shape = (len(examples), -(-width // multiple) * multiple)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            input_ids[row, :length] = torch.as_tensor(example["input_ids"])
            attention_mask[row, :length] = 1
            labels[row, :length] = torch.as_tensor(example["labels"])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


__all__ = ["DESCRIBING_KEYS", "LapaTrainingCollator"]
