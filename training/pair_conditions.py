"""What a quantizer is given beside the frames of a pair: its instruction as hashed words, its true action."""

import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
from lapa.data.frame_pairs import FramePairCollator
from lapa.modeling_lapa.quantizer_targets_lapa import NO_WORD

WORD = re.compile(r"[^\W_]+")
# Standard deviation below which a dimension of the actions counts as constant, and is not divided by it.
CONSTANT = 1e-6


def hash_instruction(instruction: str | None, vocab_size: int) -> list[int]:
    """
    Ids in [1, vocab_size) of an instruction's words, whatever their case and what stands between them.

    Two words may share an id, the more likely the smaller the table; the same word has the same id everywhere.
    """
    words = WORD.findall(instruction.lower()) if instruction else []
    return [1 + zlib.crc32(word.encode()) % (vocab_size - 1) for word in words]


def shows_action(example: dict[str, Any], share: float) -> bool:
    """Whether an example's episode is among the `share` whose actions are shown; the same episodes in every run."""
    name = f"{example.get('source')}/{example.get('episode_id')}"
    return zlib.crc32(name.encode()) < share * 2**32


def action_statistics(
    examples: Sequence[dict[str, Any]], action_dim: int, share: float = 1.0
) -> dict[str, list[float]]:
    """
    `action_mean` and `action_std` of the shown actions of some examples, as `LapaQuantizerConfig` takes them.

    Raises:
        ValueError: No action among them.
    """
    collator = _Actions(action_dim, share)
    rows = np.array([row for row in (collator.row(example) for example in examples) if not np.isnan(row).any()])
    if not len(rows):
        raise ValueError(
            f"`action_dim` is {action_dim}, but none of {len(examples)} pairs looked at has an action "
            f"(`action_share` {share:g})."
        )
    std = rows.std(0)
    return {"action_mean": rows.mean(0).tolist(), "action_std": np.where(std < CONSTANT, 1.0, std).tolist()}


def pair_id(example: dict[str, Any]) -> str:
    """Which pair an example is, for reports."""
    if "example_id" in example:
        return str(example["example_id"])
    if "steps" not in example:
        return f"{example.get('source')} {example.get('episode_id')}"
    first, second = example["steps"]
    return f"{example.get('source')} {example.get('episode_id')} steps {first} and {second}"


class _Actions:
    """Actions of examples, NaN where there is none to be shown."""

    def __init__(self, action_dim: int, share: float) -> None:
        self.action_dim, self.share = action_dim, share

    def row(self, example: dict[str, Any]) -> np.ndarray:
        action = example.get("action")
        if action is None or not shows_action(example, self.share):
            return np.full(self.action_dim, np.nan, np.float32)
        values = np.asarray(action, dtype=np.float32)
        if values.shape != (self.action_dim,):
            raise ValueError(
                f"`action_dim` of the quantizer is {self.action_dim}, but {example.get('source')} has actions of shape "
                f"{values.shape}."
            )
        return values


class QuantizerCollator(FramePairCollator):
    r"""
    Batches pairs with what the quantizer takes beside them.

    ```python
    >>> config = LapaQuantizerConfig(action_dim=1, instruction_vocab_size=100)
    >>> frames = torch.full((2, 3, 1, 1), 255, dtype=torch.uint8)
    >>> QuantizerCollator(config)([{"frames": frames, "instruction": "go left", "action": [0.5]}, {"frames": frames}])
    {'pixel_values': tensor([[[[[1.]], ...]]]),                # (batch, 2, 3, height, width) float32 in [0, 1]
     'actions': tensor([[0.5000], [nan]]),                     # (batch, action_dim) float32, NaN without an action
     'instruction_ids': tensor([[64, 36], [0, 0]]),            # (batch, most words of one) int64, 0 without a word
     'example_id': ['None None', 'None None']}                 # which pairs they are, for reports; not for the model
    ```

    Args:
        config: Of the quantizer: `action_dim` and `instruction_vocab_size` say what is batched.
        action_share: Share of the episodes whose actions are shown.
    """

    def __init__(self, config: LapaQuantizerConfig, action_share: float = 1.0) -> None:
        self.vocab_size = config.instruction_vocab_size
        self.actions = None if config.action_dim is None else _Actions(config.action_dim, action_share)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """
        Args:
            examples: Each with `frames` (2, 3, height, width) uint8; `action` (action_dim,) and `instruction`, None or
                absent where there is none; `source` and `episode_id`, by which actions are shown or not; these and `steps`,
                or `example_id`, say which pair it is.
        """
        batch: dict[str, Any] = super().__call__(examples)
        if self.actions is not None:
            batch["actions"] = torch.from_numpy(np.stack([self.actions.row(example) for example in examples]))
        if self.vocab_size is not None:
            words = [hash_instruction(example.get("instruction"), self.vocab_size) for example in examples]
            ids = torch.full((len(words), max(1, *map(len, words))), NO_WORD, dtype=torch.int64)
            for row, found in enumerate(words):
                ids[row, : len(found)] = torch.tensor(found, dtype=torch.int64)
            batch["instruction_ids"] = ids
        batch["example_id"] = [pair_id(example) for example in examples]
        return batch


__all__ = ["QuantizerCollator", "action_statistics", "hash_instruction", "pair_id", "shows_action"]
