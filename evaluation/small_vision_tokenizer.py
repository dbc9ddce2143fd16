"""Trains a small image tokenizer where none comes with the package."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from lapa.configuration.configuration_lapa_vision_tokenizer import LapaVisionTokenizerConfig
from lapa.evaluation.demo_stages import run_training, schedule
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer
from lapa.training.safe_checkpoints import SafeCheckpoints


class _Images(Dataset[dict[str, torch.Tensor]]):
    """Frames as the vision tokenizer wants them: (3, height, width) float32 in [-1, 1]."""

    def __init__(self, frames: np.ndarray) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.from_numpy(self.frames[item]).permute(2, 0, 1).float() / 127.5 - 1}


class VisionTokenizerTrainer(SafeCheckpoints, Trainer):
    """Trainer of the tokenizer, whose forward returns its loss."""


def train_vision_tokenizer(
    frames: np.ndarray, codebook_size: int, steps: int, seed: int, output: Path, device: str = "cpu"
) -> list[dict[str, float]]:
    """
    Trains and writes a tokenizer that cuts an image into a token per 8x8 pixels.

    Args:
        frames: (num_frames, height, width, 3) uint8; square.
        codebook_size: Number of codes.
        steps: Of the optimizer, on 16 frames each.
        seed: Of initialisation and order.
        output: Folder to write.
        device: To train on.

    Returns:
        The log of the training: a row with `loss` and `step` every so many steps.
    """
    torch.manual_seed(seed)
    config = LapaVisionTokenizerConfig(
        image_size=frames.shape[1],
        base_channels=16,
        channel_multipliers=[1, 2, 2, 4],
        num_res_blocks=1,
        latent_channels=32,
        codebook_size=codebook_size,
        codebook_dim=16,
        num_norm_groups=4,
    )
    model = LapaVisionTokenizer(config).requires_grad_(True)
    start_codebook_from_frames(model, frames)
    arguments = TrainingArguments(**schedule(steps, 2e-3, seed, output, device), per_device_train_batch_size=16)
    return run_training(VisionTokenizerTrainer(model=model, args=arguments, train_dataset=_Images(frames)), output)


@torch.no_grad()
def start_codebook_from_frames(model: LapaVisionTokenizer, frames: np.ndarray) -> None:
    """Put the codebook among the encoder's outputs, so that no code starts out of reach."""
    images = _Images(frames)
    # Frames of one episode look alike: take them from all.
    chosen = np.linspace(0, len(images) - 1, min(32, len(images))).astype(int)
    pixels = torch.stack([images[int(i)]["pixel_values"] for i in chosen])
    latents = model.quant_conv(model.encoder(pixels)).movedim(1, -1).flatten(0, -2)
    model.codebook.weight.copy_(latents[torch.randint(len(latents), (len(model.codebook.weight),))])


__all__ = ["start_codebook_from_frames", "train_vision_tokenizer"]
