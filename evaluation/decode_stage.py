"""What may take stage 3's place: the labelled steps train a decoder of the codes that stage 2 predicts."""

from pathlib import Path

import numpy as np
import torch

from lapa.evaluation.baselines.action_regression import mean_r_squared
from lapa.evaluation.baselines.configuration_latent_decoder import LatentActionDecoderConfig
from lapa.evaluation.baselines.latent_decoder import LatentActionDecoder
from lapa.evaluation.baselines.latent_decoder_training import LatentDecoderSettings, train_latent_decoder
from lapa.evaluation.baselines.training import Schedule
from lapa.evaluation.demo_stages import Recording, recording_codes
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer
from lapa.training.label_latent_actions import hash_weights


def train_decoder(
    labelled: Recording,
    quantizer: Path,
    frame_gap: int,
    steps: int,
    seed: int,
    output: Path,
    name: str,
    device: str = "cpu",
) -> list[dict[str, float]]:
    """
    Trains a decoder on a recording, and all of it: so few episodes that holding some out costs more than it tells.

    Args:
        labelled: With actions.
        quantizer: Folder of the quantizer whose codes the policy predicts.
        frame_gap: Frames that a code spans.
        steps: Of the optimizer.
        seed: Of weights and order.
        output: Folder of the decoder.
        name: What the quantizer is called in records.
        device: `cpu`, or anything else for the GPU that transformers finds.

    Returns:
        The log of the training.
    """
    codes, actions, episode = labelled_codes(labelled, quantizer, frame_gap, device)
    sizes = LapaQuantizer.config_class.from_pretrained(quantizer)
    config = LatentActionDecoderConfig(
        codebook_size=sizes.codebook_size,
        num_latent_tokens=sizes.num_latent_tokens,
        action_dim=actions.shape[1],
        quantizer_hash=hash_weights(quantizer),
        quantizer_name=name,
    )
    settings = LatentDecoderSettings(
        Schedule(steps, 64, 3e-3, weight_decay=0.01, use_cpu=device == "cpu"), held_out_share=0.0, keep_best=False
    )
    return train_latent_decoder(codes, actions, config, settings, seed, output, episode)


def labelled_codes(
    recording: Recording, quantizer: Path, frame_gap: int, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (num_pairs, num_latent_tokens), the action (num_pairs, action_dim) of each first frame's step, and the episode."""
    episode, first = recording.steps(frame_gap)
    codes = recording_codes(recording, quantizer, frame_gap, device)
    return codes, recording.actions[first], episode


def decoder_r2(decoder: Path, recording: Recording, quantizer: Path, frame_gap: int) -> float:
    """Share of the variance of a recording's actions that a decoder reads off the quantizer's codes; see `mean_r_squared`."""
    codes, actions, _ = labelled_codes(recording, quantizer, frame_gap)
    predicted = LatentActionDecoder.from_pretrained(decoder).predict_actions(torch.from_numpy(codes))
    return mean_r_squared(predicted.numpy(), actions)


__all__ = ["decoder_r2", "labelled_codes", "train_decoder"]
