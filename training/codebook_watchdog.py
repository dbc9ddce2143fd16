"""Stops a training whose latent actions say nothing, and says what to try."""

from collections.abc import Mapping
from typing import Any

import torch

from lapa.training.metrics import num_codes_used, perplexity

# Uses per code, on average, below which a window is too short to tell a rare code from a dead one.
MIN_USES_PER_CODE = 16
# Nats per dimension below which a continuous embedding tells nothing of its pair.
MIN_KL = 1e-3
# Of their own size: embeddings spread less than this are the same for every pair.
SAME_EMBEDDING = 0.01


class CodebookCollapse(ValueError):
    """A training that was stopped because its latent actions hardly differ."""


class CodebookWatchdog:
    """
    Watches the use of the codes over windows of batches.

    Args:
        config: Of the quantizer.
        args: Training arguments; `min_perplexity`, `min_codes_used` and `min_perplexity_from` are the levels.
    """

    def __init__(self, config: Any, args: Any) -> None:
        self.config, self.args = config, args
        least = args.min_perplexity
        self.min_perplexity: float = config.codebook_size / 4 if least is None else least
        self.min_codes_used: float = args.min_codes_used * config.codebook_size

    def check(self, step: int, logs: Mapping[str, float], counts: torch.Tensor) -> None:
        """
        Looks at what was counted since the last window, if that is enough to tell; called with every training log.

        Args:
            step: Optimizer steps so far.
            logs: Numbers of the log: `embedding_std`, `embedding_rms`, `kl`.
            counts: (codebook_size,) int64 uses since the last window, over all processes; set to 0 where the window ends.

        Raises:
            CodebookCollapse: Use below the levels after the warm-up.
        """
        if not self.config.has_codes:
            self._check_kl(step, logs)
            return
        if int(counts.sum()) < MIN_USES_PER_CODE * self.config.codebook_size:
            return
        found, used = perplexity(counts), num_codes_used(counts)
        counts.zero_()
        if step < self.args.min_perplexity_from:
            return
        if found >= self.min_perplexity and used >= self.min_codes_used:
            return
        raise CodebookCollapse(
            f"the codebook collapsed: perplexity {found:.2f} at step {step}, {used} of {self.config.codebook_size} codes "
            f"in use (stops below `min_perplexity` {self.min_perplexity:g} or {self.min_codes_used:g} codes, "
            f"`min_codes_used`). {self._what_happened(logs)} {self._advice(logs)}"
        )

    def _check_kl(self, step: int, logs: Mapping[str, float]) -> None:
        # The levels are of codes; with both at 0 the watchdog is off.
        off = not self.min_perplexity and not self.min_codes_used
        kl = logs.get("kl")
        if off or kl is None or step < self.args.min_perplexity_from or kl >= MIN_KL:
            return
        raise CodebookCollapse(
            f"the continuous bottleneck collapsed: {kl:.1e} nats per dimension at step {step} (stops below {MIN_KL:g}), so "
            f"embeddings tell nothing of their pair. Try a lower `kl_weight` (now {self.config.kl_weight:g})."
        )

    def _same_embedding(self, logs: Mapping[str, float]) -> bool:
        # Equal: two zeros, where the bottleneck died.
        return logs.get("embedding_std", 1.0) <= SAME_EMBEDDING * logs.get("embedding_rms", 1.0)

    def _what_happened(self, logs: Mapping[str, float]) -> str:
        if self._same_embedding(logs):
            return "The encoder gives every pair the same embedding."
        return "Embeddings differ between pairs, but fall to few codes."

    def _advice(self, logs: Mapping[str, float]) -> str:
        config, args, switches = self.config, self.args, []
        if config.bottleneck == "cnn" and config.bottleneck_activation == "relu":
            switches.append('`bottleneck_activation: leaky_relu` in `quantizer_config`')  # fmt: skip
        if config.quantizer != "fsq" and args.codebook_update != "reseed":
            switches.append(f'`codebook_update: reseed` (now "{args.codebook_update}")')
        if config.quantizer != "fsq" and not args.codebook_init_from_data:
            switches.append("`codebook_init_from_data: true`")
        if not args.warmup_steps:
            switches.append("`warmup_steps` (now 0)")
        if config.quantizer in ("nsvq", "vq") and not config.entropy_weight:
            switches.append("`entropy_weight: 0.001` in `quantizer_config`")
        switches.append(f"a lower `learning_rate` (now {args.learning_rate:g})")
        if config.quantizer != "fsq":
            switches.append("`quantizer: fsq`, which has no codebook to collapse")
        return f"Try, in this order: {'; '.join(switches[:4])}."


__all__ = ["CodebookCollapse", "CodebookWatchdog"]
