"""Sampling in which every row of a batch draws from a generator of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

OPTIONS = ("do_sample", "temperature", "top_k", "top_p")


class RowSamplingLogitsProcessor(LogitsProcessor):
    """
    Adds Gumbel noise to the scores, whose largest is then a draw from their softmax: for greedy decoding.

    `generate(do_sample=True)` draws for all rows from one generator, so that what a row gets depends on how many there are.

    Args:
        draws: A generator per row.
        segment: First id and the one after the last of those that are drawn among.
        temperature: Divides the scores.
        top_k: Number of likeliest ids that stay; 0 keeps all.
        top_p: Probability of the likeliest ids that stay; 1 keeps all.
    """

    def __init__(
        self,
        draws: Sequence[np.random.Generator],
        segment: tuple[int, int],
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        self.draws, (self.start, self.end) = draws, segment
        self.warpers = LogitsProcessorList()
        if temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(temperature))
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(top_p))

    @classmethod
    def from_generation(
        cls,
        draws: Sequence[np.random.Generator],
        segment: tuple[int, int],
        generation: Mapping[str, Any],
        defaults: GenerationConfig,
    ) -> "RowSamplingLogitsProcessor":
        """
        As `generate` would sample with these arguments.

        Raises:
            ValueError: An argument of `generate` that has no meaning here.
        """
        unknown = sorted(set(generation) - set(OPTIONS))
        if unknown:
            raise ValueError(f"with `draws` a policy samples by {', '.join(OPTIONS)} alone, got {', '.join(unknown)}.")
        values = {name: generation.get(name, getattr(defaults, name, None)) for name in OPTIONS[1:]}
        # What `generate` does where neither says anything.
        values["top_k"] = 50 if values["top_k"] is None else values["top_k"]
        return cls(draws, segment, **{name: value for name, value in values.items() if value is not None})

    @classmethod
    def options(
        cls, model: Any, segment: str, generation: Mapping[str, Any], draws: Sequence[np.random.Generator] | None
    ) -> Mapping[str, Any]:
        """
        Arguments of `generate` that draw from a generator per row; `generation` as it is where nothing is drawn.

        Args:
            model: The policy.
            segment: `latent` or `action`.
            generation: Arguments of `generate`.
            draws: A generator per row; None for torch's own, which serves all rows together.
        """
        if draws is None or not generation.get("do_sample"):
            return generation
        rows = cls.from_generation(draws, model.config.segment(segment), generation, model.generation_config)
        return {"logits_processor": [rows]}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """See `LogitsProcessor`."""
        rows: Any = scores[:, self.start : self.end].float()
        rows = self.warpers(input_ids, rows)
        noise = np.stack([draw.gumbel(size=rows.shape[1]) for draw in self.draws])
        drawn = torch.full_like(scores, float("-inf"))
        drawn[:, self.start : self.end] = (rows + torch.from_numpy(noise).to(rows)).to(scores.dtype)
        return drawn  # type: ignore[return-value]


__all__ = ["RowSamplingLogitsProcessor"]
