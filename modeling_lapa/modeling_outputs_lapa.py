"""Outputs of the LAPA policy."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class LapaCausalLMOutput(CausalLMOutputWithPast):
    r"""
    Output of [`LapaForLatentAction`] and [`LapaForActionPrediction`].

    Args:
        loss (`torch.FloatTensor`, scalar, with `labels`): What is trained on, see the model.
        logits (`torch.FloatTensor` of shape `(batch, length, vocab_size)`): Scores over all segments; None in
            training with `labels`, where they are computed only at the positions that have a loss.
        latent_loss, action_loss, text_loss (`torch.FloatTensor`, scalar, with `labels`): Cross entropy of each
            segment, normalised inside it: the mean over rows of each row's mean.
        latent_accuracy, action_accuracy (`torch.FloatTensor`, scalar, with `labels`): Share of right tokens.
        segment_logits (`torch.FloatTensor` of shape `(num_targets, segment_size)`, with `target_segment`): fp32 scores of
            the labels in that segment, in the order of rows and positions.
    """

    latent_loss: torch.Tensor | None = None
    action_loss: torch.Tensor | None = None
    text_loss: torch.Tensor | None = None
    latent_accuracy: torch.Tensor | None = None
    action_accuracy: torch.Tensor | None = None
    segment_logits: torch.Tensor | None = None


@dataclass
class LapaPrediction(ModelOutput):
    """
    Decoded tokens with their scores.

    Args:
        latent_action_codes (`torch.LongTensor` of shape `(batch, num_latent_tokens)`): In [0, latent_vocab_size); from
            `predict_latent_action`.
        action_tokens (`torch.LongTensor` of shape `(batch, action_dim)`): Bin indices; from `predict_action_tokens`.
            `(batch, action_horizon, action_dim)` where the model predicts chunks.
        scores (`torch.FloatTensor` of shape `(batch, num_tokens, segment_size)`): Log-probabilities inside the
            segment, before temperature; minus infinity for bins that a dimension lacks.
    """

    latent_action_codes: torch.Tensor | None = None
    action_tokens: torch.Tensor | None = None
    scores: torch.Tensor | None = None


__all__ = ["LapaCausalLMOutput", "LapaPrediction"]
