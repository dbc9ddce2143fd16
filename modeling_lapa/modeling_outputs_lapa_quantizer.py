"""What the latent action quantizer and its encoder return."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class LapaQuantizerOutput(ModelOutput):
    """
    Output of [`LapaQuantizer`].

    Args:
        loss (`torch.FloatTensor`, scalar): Weighted sum of the errors below and the bottleneck's own loss.
        reconstruction (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Predicted second frame, not
            clipped to [0, 1]; with `align_frames` as the first frame's camera would have seen it.
        latent_action_codes (`torch.LongTensor` of shape `(batch, num_latent_tokens)`): In [0, codebook_size); None with
            `quantizer="continuous"`.
        latent_action_embeddings (`torch.FloatTensor` of shape `(batch, num_latent_tokens, codebook_dim)`): Before
            quantisation.
        perplexity (`torch.FloatTensor`, scalar): exp of the entropy of the codes of this batch; None without codes.
        reconstruction_loss (`torch.FloatTensor`, scalar): Mean squared error to the second frame, in pixels; with
            `align_frames` to the aligned one.
        feature_loss (`torch.FloatTensor`, scalar): Mean squared error to its features; None without `feature_backbone`.
        action_loss (`torch.FloatTensor`, scalar): Mean squared error of the action head over the pairs that have an
            action, in standardised units; None without `action_dim` or actions.
        kl (`torch.FloatTensor`, scalar): Divergence per dimension, in nats, of a continuous bottleneck.
        irrelevant_codes (`torch.LongTensor` of shape `(batch, num_latent_tokens)`): Codes of the frozen first stage; None
            unless `task_centric`.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    latent_action_codes: torch.Tensor | None = None
    latent_action_embeddings: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    feature_loss: torch.Tensor | None = None
    action_loss: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    irrelevant_codes: torch.Tensor | None = None


@dataclass
class LapaQuantizerEncoderOutput(ModelOutput):
    """
    Latent actions of a batch of frame pairs.

    Args:
        latent_action_codes (`torch.LongTensor` of shape `(batch, num_latent_tokens)`): In [0, codebook_size); None with
            `quantizer="continuous"`.
        latent_action_embeddings (`torch.FloatTensor` of shape `(batch, num_latent_tokens, codebook_dim)`): Before
            quantisation.
        irrelevant_codes (`torch.LongTensor` of shape `(batch, num_latent_tokens)`): Codes of the frozen first stage; None
            unless `task_centric`.
    """

    latent_action_codes: torch.Tensor | None = None
    latent_action_embeddings: torch.Tensor | None = None
    irrelevant_codes: torch.Tensor | None = None


__all__ = ["LapaQuantizerEncoderOutput", "LapaQuantizerOutput"]
