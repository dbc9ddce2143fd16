"""Restricting generation to one segment of the id space."""

import torch
from transformers import LogitsProcessor


class SegmentLogitsProcessor(LogitsProcessor):
    """Leaves only the ids `start` to `end` (exclusive) of one segment to choose from."""

    def __init__(self, start: int, end: int):
        self.start, self.end = start, end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` (batch, vocab_size) with everything outside the segment at minus infinity."""
        restricted = torch.full_like(scores, float("-inf"))
        restricted[:, self.start : self.end] = scores[:, self.start : self.end]
        return restricted


class ActionBinsLogitsProcessor(LogitsProcessor):
    """Leaves each action dimension only the bins that it has.

    Args:
        num_bins: (rows, action_dim) int64; row r serves the rows of the batch that descend from it (beams, samples).
        offset: Id of bin 0.
        prompt_length: Number of ids before the first action token.
    """

    def __init__(self, num_bins: torch.Tensor, offset: int, prompt_length: int):
        self.num_bins, self.offset, self.prompt_length = num_bins, offset, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` (batch, vocab_size) with the missing bins of the next dimension at minus infinity."""
        dimension = input_ids.shape[1] - self.prompt_length
        limit = self.num_bins.to(scores.device)[:, dimension]
        limit = limit.repeat_interleave(len(scores) // len(limit)).unsqueeze(1)
        bins = torch.arange(scores.shape[1], device=scores.device) - self.offset
        return scores.masked_fill(bins >= limit, float("-inf"))
