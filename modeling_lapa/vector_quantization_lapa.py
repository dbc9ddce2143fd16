"""Bottlenecks of the latent action quantizer: NSVQ (published), VQ, FSQ, and a continuous one without codes.

None of them changes its codebook in a forward pass: counting usage and replacing unused codes is the trainer's work.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig

# Added to the ratio of norms in NSVQ and to probabilities inside a logarithm (published code).
EPSILON = 1e-12


@dataclass
class VectorQuantizerOutput(ModelOutput):
    """
    What a bottleneck makes of `num_vectors` embeddings.

    Args:
        quantized (`torch.FloatTensor` of shape `(num_vectors, codebook_dim)`): What the decoder receives.
        codes (`torch.LongTensor` of shape `(num_vectors,)`): Index of the chosen code, in [0, codebook_size); None
            where there are no codes.
        loss (`torch.FloatTensor`, scalar): Loss of the bottleneck itself; 0 where it has none.
        perplexity (`torch.FloatTensor`, scalar): exp of the entropy of the codes, in [1, codebook_size]; None without
            codes.
        kl (`torch.FloatTensor`, scalar): Mean divergence per dimension, in nats, of a continuous bottleneck.
    """

    quantized: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None
    kl: torch.Tensor | None = None


def mean_over_processes(mean: torch.Tensor) -> torch.Tensor:
    """
    A batch mean as the mean over the batches of all processes, with the gradient of this process's part.

    Gradients are averaged over processes later, so that the whole is the gradient of the mean over the global batch.
    Without gradients the mean is this batch's own: one process may look at a few pairs while the others do not wait for it.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return mean
    if not torch.is_grad_enabled():
        return mean
    total = mean.detach().clone()
    distributed.all_reduce(total)
    return mean + (total / distributed.get_world_size() - mean.detach())


def code_perplexity(codes: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """Perplexity of integer `codes` of any shape: 1 when one code is used, `codebook_size` when all are used equally."""
    probabilities = torch.bincount(codes.flatten(), minlength=codebook_size).float() / codes.numel()
    return torch.exp(-torch.sum(probabilities * torch.log(probabilities + EPSILON)))


class CodebookQuantizer(nn.Module):
    """Nearest-neighbour quantisation with a learned codebook; subclasses say how gradients pass."""

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.codebook_dim))
        self.entropy_weight, self.entropy_temperature = config.entropy_weight, config.entropy_temperature

    @property
    def codebook_size(self) -> int:
        return self.codebook.shape[0]

    def nearest(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Codes (num_vectors,) int64 of the nearest entries to `embeddings` (num_vectors, codebook_dim)."""
        # In fp32 and in the published form |x|^2 - 2xc + |c|^2: ties and near-ties must fall as they do there.
        x, codebook = embeddings.float(), self.codebook.float()
        distances = (x**2).sum(1, keepdim=True) - 2 * (x @ codebook.t()) + (codebook.t() ** 2).sum(0, keepdim=True)
        return distances.argmin(1)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Quantised vectors (..., codebook_dim) of integer `codes` of any shape."""
        return self.codebook[codes]

    def entropy_loss(self, embeddings: torch.Tensor) -> torch.Tensor:
        """
        Mean entropy of each embedding's soft code minus the entropy of the mean soft code, times its weight.

        The soft code of `embeddings` (num_vectors, codebook_dim) is softmax(-d / (temperature * mean d)) over squared
        distances d to the codes: the mean (held fixed) makes it independent of the scale of the embeddings.
        """
        if not self.entropy_weight:
            return embeddings.new_zeros(())
        distances = torch.cdist(embeddings.float(), self.codebook.float()).square()
        scale = self.entropy_temperature * mean_over_processes(distances.mean().detach())
        soft = torch.softmax(-distances / scale.clamp(min=torch.finfo(torch.float32).tiny), dim=-1)
        confidence = _entropy(soft).mean()
        diversity = _entropy(mean_over_processes(soft.mean(0)))
        return self.entropy_weight * (confidence - diversity)


class NoiseSubstitutionQuantizer(CodebookQuantizer):
    """NSVQ: in training the quantisation error is replaced by noise of the same length, which has a gradient."""

    def forward(self, embeddings: torch.Tensor, noise: torch.Tensor | None = None) -> VectorQuantizerOutput:
        """
        Args:
            embeddings: (num_vectors, codebook_dim) float.
            noise: (num_vectors, codebook_dim) standard normal. Drawn in training when None; in evaluation None means
                the hard code.
        """
        codes = self.nearest(embeddings)
        hard = self.lookup(codes)
        if noise is None and not self.training:
            quantized = hard
        else:
            if noise is None:
                noise = torch.randn_like(embeddings)
            # An embedding can equal its code: two equal frames give the same one every time, and codes are re-seeded
            # from embeddings. The root's gradient is infinite there, and NaN after it; zero is a subgradient.
            squared = (embeddings - hard).square().sum(1, keepdim=True)
            residual_norm = torch.where(squared > 0, squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt(), 0.0)
            noise_norm = noise.square().sum(1, keepdim=True).sqrt()
            quantized = embeddings + (residual_norm / noise_norm + EPSILON) * noise
        perplexity = code_perplexity(codes, self.codebook_size)
        return VectorQuantizerOutput(quantized, codes, self.entropy_loss(embeddings), perplexity)


class StraightThroughQuantizer(CodebookQuantizer):
    """VQ: straight-through gradient, codebook loss and commitment loss (VQ-VAE)."""

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__(config)
        self.commitment_weight = config.commitment_weight

    def forward(self, embeddings: torch.Tensor, noise: torch.Tensor | None = None) -> VectorQuantizerOutput:
        """Quantises `embeddings` (num_vectors, codebook_dim); `noise` does not apply and must be None."""
        _refuse_noise(noise, "vq")
        codes = self.nearest(embeddings)
        hard = self.lookup(codes)
        codebook_loss = (hard - embeddings.detach()).square().mean()
        commitment_loss = (embeddings - hard.detach()).square().mean()
        return VectorQuantizerOutput(
            quantized=embeddings + (hard - embeddings).detach(),
            codes=codes,
            loss=codebook_loss + self.commitment_weight * commitment_loss + self.entropy_loss(embeddings),
            perplexity=code_perplexity(codes, self.codebook_size),
        )


class FiniteScalarQuantizer(nn.Module):
    """FSQ: each of a few dimensions is bounded and rounded to its levels; the code is their mixed-radix number."""

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__()
        assert config.fsq_levels is not None
        self.levels = list(config.fsq_levels)
        self.codebook_size = math.prod(self.levels)
        self.projection_in = nn.Linear(config.codebook_dim, len(self.levels))
        self.projection_out = nn.Linear(len(self.levels), config.codebook_dim)

    def _levels(self, like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.levels, device=like.device, dtype=torch.float32)

    def forward(self, embeddings: torch.Tensor, noise: torch.Tensor | None = None) -> VectorQuantizerOutput:
        """Quantises `embeddings` (num_vectors, codebook_dim); `noise` does not apply and must be None."""
        _refuse_noise(noise, "fsq")
        levels = self._levels(embeddings)
        # Each coordinate lies in [0, levels - 1], so that rounding reaches every level and no other.
        position = (torch.tanh(self.projection_in(embeddings).float()) + 1) / 2 * (levels - 1)
        rounded = position.round()
        codes = (rounded.long() * self._radix(embeddings)).sum(-1)
        straight_through = position + (rounded - position).detach()
        return VectorQuantizerOutput(
            quantized=self._project_out(straight_through, levels),
            codes=codes,
            loss=embeddings.new_zeros(()),
            perplexity=code_perplexity(codes, self.codebook_size),
        )

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Quantised vectors (..., codebook_dim) of integer `codes` of any shape."""
        levels = self._levels(self.projection_out.weight)
        position = codes.unsqueeze(-1) // self._radix(codes) % levels.long()
        return self._project_out(position.float(), levels)

    def _project_out(self, position: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        centred = 2 * position / (levels - 1) - 1
        return self.projection_out(centred.to(self.projection_out.weight.dtype))

    def _radix(self, like: torch.Tensor) -> torch.Tensor:
        radix = [math.prod(self.levels[i + 1 :]) for i in range(len(self.levels))]
        return torch.tensor(radix, device=like.device)


class ContinuousBottleneck(nn.Module):
    """A variational bottleneck: mean and log variance per dimension, a draw in training, the mean otherwise; no codes."""

    # Of the log variance, so that neither its exponential nor its gradient overflows.
    LOG_VARIANCE_RANGE = (-20.0, 10.0)

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__()
        self.kl_weight = config.kl_weight
        self.mean = nn.Linear(config.codebook_dim, config.codebook_dim)
        self.log_variance = nn.Linear(config.codebook_dim, config.codebook_dim)

    def forward(self, embeddings: torch.Tensor, noise: torch.Tensor | None = None) -> VectorQuantizerOutput:
        """
        Args:
            embeddings: (num_vectors, codebook_dim) float.
            noise: (num_vectors, codebook_dim) standard normal. Drawn in training when None; in evaluation None means
                the mean.
        """
        mean = self.mean(embeddings)
        log_variance = self.log_variance(embeddings).clamp(*self.LOG_VARIANCE_RANGE)
        if noise is None and self.training:
            noise = torch.randn_like(mean)
        sampled = mean if noise is None else mean + noise * (log_variance / 2).exp()
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        return VectorQuantizerOutput(quantized=sampled, loss=self.kl_weight * kl, kl=kl)


def _refuse_noise(noise: torch.Tensor | None, quantizer: str) -> None:
    if noise is not None:
        raise ValueError(
            f'`noise` applies to `quantizer="nsvq"` and `"continuous"` only; this model has `quantizer="{quantizer}"`.'
        )


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last dimension."""
    return -(probabilities * torch.log(probabilities + EPSILON)).sum(-1)


VECTOR_QUANTIZERS = {
    "nsvq": NoiseSubstitutionQuantizer,
    "vq": StraightThroughQuantizer,
    "fsq": FiniteScalarQuantizer,
    "continuous": ContinuousBottleneck,
}


@torch.no_grad()
def replace_unused_codes_published(
    codebook: torch.Tensor, usage_counts: torch.Tensor, num_batches: int, threshold: float = 0.1
) -> int:
    """Overwrite rarely used entries by copies of used ones, by the published rule, in place.

    Args:
        codebook: (codebook_size, codebook_dim) float, edited in place.
        usage_counts: (codebook_size,) integer uses since the last call.
        num_batches: What the counts are divided by; the published code passes its batch size.
        threshold: Entries used less often than this share are replaced.

    Returns:
        How many entries were replaced. With no used entry at all, none is: the codebook only gets 1e-12 noise.
    """
    # Division in fp32 as published: 10 / 100 < 0.1 must be decided as it is there.
    share = usage_counts.cpu() / num_batches
    unused, used = torch.where(share < threshold)[0], torch.where(share >= threshold)[0]
    if len(used) == 0:
        codebook += EPSILON * torch.randn(codebook.shape).to(codebook)
        return 0
    donors = codebook[used.to(codebook.device)].clone()
    if len(used) < len(unused):
        donors = donors.repeat(int(len(unused) / (len(used) + EPSILON) + 1), 1)
        donors = donors[torch.randperm(len(donors)).to(donors.device)]
    noise = EPSILON * torch.randn(len(unused), codebook.shape[1])
    codebook[unused.to(codebook.device)] = donors[: len(unused)] + noise.to(codebook)
    return len(unused)
