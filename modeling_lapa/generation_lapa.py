"""Checking the prompt, and restricting generation to one segment of the id space."""

from typing import Any

import torch
from transformers import LogitsProcessor
from transformers.generation import GenerationMixin

from lapa.configuration.configuration_lapa import LapaConfig

ID_DTYPES = (torch.int64, torch.int32)


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
        num_bins: (rows, num_tokens) int64, see `bins_of_tokens`; row r serves the rows of the batch that descend from it
            (beams, samples). A row that is complete has 0 and decodes bin 0 until the longest one is.
        offset: Id of bin 0.
        prompt_length: Number of ids before the first action token.
    """

    def __init__(self, num_bins: torch.Tensor, offset: int, prompt_length: int):
        self.num_bins, self.offset, self.prompt_length = num_bins.clamp(min=1), offset, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` (batch, vocab_size) with the missing bins of the next token at minus infinity."""
        token = input_ids.shape[1] - self.prompt_length
        limit = self.num_bins.to(scores.device)[:, token]
        limit = limit.repeat_interleave(len(scores) // len(limit)).unsqueeze(1)
        bins = torch.arange(scores.shape[1], device=scores.device) - self.offset
        return scores.masked_fill(bins >= limit, float("-inf"))


def bins_of_tokens(num_bins: torch.Tensor, action_horizon: int) -> torch.Tensor:
    """Bins of every token of a chunk.

    Args:
        num_bins: (rows, action_dim) int64 bins of each dimension, 0 for the last ones where a row has fewer.
        action_horizon: Steps of a chunk.

    Returns:
        (rows, action_horizon * action_dim) int64: the steps of a row stand directly behind each other, zeros behind them.
    """
    rows = []
    for bins in num_bins.tolist():
        own = [count for count in bins if count > 0] * action_horizon
        rows.append(own + [0] * (action_horizon * len(bins) - len(own)))
    return torch.tensor(rows, dtype=torch.int64)


def chunks_of_tokens(tokens: torch.Tensor, num_bins: torch.Tensor, action_horizon: int) -> torch.Tensor:
    """Tokens of chunks by step and dimension.

    Args:
        tokens: (rows, action_horizon * action_dim) as decoded, the steps of a row directly behind each other.
        num_bins: (rows, action_dim), see `bins_of_tokens`.
        action_horizon: Steps of a chunk.

    Returns:
        (rows, action_horizon, action_dim), -1 for dimensions that a row lacks.
    """
    chunks = tokens.new_full((len(tokens), action_horizon, num_bins.shape[1]), -1)
    for row, dim in enumerate((num_bins > 0).sum(1).tolist()):
        chunks[row, :, :dim] = tokens[row, : action_horizon * dim].view(action_horizon, dim)
    return chunks


class LapaGenerationMixin(GenerationMixin):
    """`generate` that refuses a prompt which the model cannot read, once, before the first token."""

    config: LapaConfig

    def generate(self: Any, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `GenerationMixin`.

        Raises:
            ValueError: `input_ids` (or `inputs`) that are no (batch, length) ids in [0, vocab_size), or `vision_codes`
                that are no (batch, num_image_tokens) integers.
        """
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if input_ids is not None and kwargs.get("inputs_embeds") is None:
            check_input_ids(input_ids)
            # One transfer to the host, whatever the length.
            low, high = torch.stack(torch.aminmax(input_ids)).tolist()
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"`input_ids` must lie in [0, {self.config.vocab_size - 1}], the rows of this model, got "
                    f"{low if low < 0 else high}."
                )
        vision_codes = kwargs.get("vision_codes")
        if vision_codes is not None:
            check_vision_codes(vision_codes)
        return super().generate(inputs, *args, **kwargs)

    def _check_target(self, target: str, input_ids: torch.Tensor) -> None:
        """Refuse (batch, length) prompts that end as those for the other target do, where the config knows how."""
        check_input_ids(input_ids)
        tails = self.config.prompt_tails
        if tails is None:
            return
        (other,) = tails.keys() - {target}
        for row, ids in enumerate(input_ids[:, -max(map(len, tails.values())) :].tolist()):
            if _ends_with(ids, tails[other]) and not _ends_with(ids, tails[target]):
                raise ValueError(
                    f'row {row} of `input_ids` is a prompt for `target="{other}"`, but {target} tokens are to be '
                    f'decoded: call the processor with `target="{target}"`.'
                )


def _ends_with(ids: list[int], tail: list[int]) -> bool:
    return ids[-len(tail) :] == tail


def check_input_ids(input_ids: Any) -> None:
    """Raises a `ValueError` for what is no (batch, length) tensor of integers; looks at no value."""
    if (
        not isinstance(input_ids, torch.Tensor)
        or input_ids.ndim != 2
        or input_ids.dtype not in ID_DTYPES
        or not input_ids.numel()
    ):
        raise ValueError(f"`input_ids` must be a tensor of int64 ids (batch, length), got {_describe(input_ids)}.")


def check_vision_codes(vision_codes: Any) -> None:
    """Raises a `ValueError` for what is no (batch, num_image_tokens) tensor of integers; looks at no value."""
    if (
        not isinstance(vision_codes, torch.Tensor)
        or vision_codes.ndim < 2
        or vision_codes.is_floating_point()
        or vision_codes.is_complex()
    ):
        raise ValueError(
            f"`vision_codes` must be a tensor of integers (batch, num_image_tokens), got {_describe(vision_codes)}."
        )


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
