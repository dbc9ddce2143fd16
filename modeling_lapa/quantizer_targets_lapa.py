"""What a quantizer may learn from beside pixels: features of a frozen vision model, a few true actions, instructions."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel

from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
from lapa.modeling_lapa.vector_quantization_lapa import mean_over_processes

# Id that pads `instruction_ids`; words have ids from 1 on.
NO_WORD = 0


class LapaQuantizerInstruction(nn.Module):
    """The mean embedding of an instruction's hashed words, as one more token for the decoder."""

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__()
        assert config.instruction_vocab_size is not None
        self.embedding = nn.Embedding(config.instruction_vocab_size, config.hidden_size)

    def forward(self, instruction_ids: torch.Tensor) -> torch.Tensor:
        """(batch, num_words) int64, 0 where there is no word -> (batch, 1, hidden_size); zero without any word."""
        present = (instruction_ids != NO_WORD).unsqueeze(-1)
        total = (self.embedding(instruction_ids) * present).sum(1, keepdim=True)
        return total / present.sum(1, keepdim=True).clamp(min=1)


class LapaQuantizerActionHead(nn.Module):
    """Reads true actions off the embeddings of a pair, for the pairs that have any."""

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__()
        assert config.action_dim is not None
        self.config = config
        self.projection = nn.Linear(config.num_latent_tokens * config.codebook_dim, config.action_dim)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(batch, num_latent_tokens, codebook_dim) -> (batch, action_dim), standardised."""
        return self.projection(embeddings.flatten(1))

    def loss(self, embeddings: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """
        Mean squared error over the pairs that have an action; 0 where none has.

        Args:
            embeddings: (batch, num_latent_tokens, codebook_dim) float.
            actions: (batch, action_dim) float, physical units; NaN in a row is a pair without an action.
        """
        known = ~actions.isnan().any(-1)
        config = self.config
        mean = actions.new_tensor(config.action_mean or [0.0] * actions.shape[-1])
        std = actions.new_tensor(config.action_std or [1.0] * actions.shape[-1])
        target = torch.where(known.unsqueeze(-1), (actions - mean) / std, 0.0)
        error = (self(embeddings).float() - target).square().mean(-1) * known
        # In training over the known pairs of all processes: a process may have none in its batch.
        share = mean_over_processes(known.float().mean())
        return error.mean() / share.clamp(min=1 / (known.numel() * 1e6))


class FrozenFeatures:
    """
    Patch features of a vision model, on the quantizer's grid.

    Not a module: the model is no part of the quantizer's weights, follows no `.to()` and is loaded at first use.

    Args:
        config: `feature_backbone` names the model.
    """

    def __init__(self, config: LapaQuantizerConfig):
        self.config = config
        self.model: Any = None

    def _load(self, device: torch.device) -> Any:
        if self.model is None:
            self.model = AutoModel.from_pretrained(self.config.feature_backbone).eval().requires_grad_(False)
        if self.model.device != device:
            self.model = self.model.to(device)
        return self.model

    def _image_size(self, model: Any) -> tuple[int, int]:
        """Size at which the model makes exactly the features that are wanted."""
        patch = getattr(model.config, "patch_size", None)
        if patch is None:  # a convolutional model; its map is pooled
            size = getattr(model.config, "image_size", None) or self.config.image_height_width
            return (size, size) if isinstance(size, int) else (size[0], size[1])
        patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
        height, width = self.grid
        return height * patch_height, width * patch_width

    @property
    def grid(self) -> tuple[int, int]:
        """Features per column and per row."""
        height, width = self.config.grid
        return height * self.config.features_per_patch, width * self.config.features_per_patch

    @torch.no_grad()
    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """
        Features of `frames` (batch, channels, height, width) in [0, 1].

        Returns:
            (batch, grid_height, grid_width, feature_dim) float32, each feature vector with zero mean and unit variance.

        Raises:
            ValueError: A model whose features do not fit the configuration.
        """
        model = self._load(frames.device)
        config = self.config
        mean = torch.tensor(config.feature_image_mean, device=frames.device).view(1, -1, 1, 1)
        std = torch.tensor(config.feature_image_std, device=frames.device).view(1, -1, 1, 1)
        images = F.interpolate(frames.float(), self._image_size(model), mode="bilinear", antialias=True)
        options = {}
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            options["interpolate_pos_encoding"] = True
        with torch.autocast(frames.device.type, enabled=False):
            states = model(((images - mean) / std).to(model.dtype), **options).last_hidden_state
        features = self._on_grid(states.float())
        if features.shape[-1] != config.feature_dim:
            raise ValueError(
                f"`feature_dim` is {config.feature_dim}, but `feature_backbone` ({config.feature_backbone}) has features "
                f"of width {features.shape[-1]}."
            )
        return F.layer_norm(features, features.shape[-1:])

    def _on_grid(self, states: torch.Tensor) -> torch.Tensor:
        height, width = self.grid
        if states.ndim == 4:  # (batch, channels, height, width), of any size
            return F.adaptive_avg_pool2d(states, (height, width)).permute(0, 2, 3, 1)
        if states.shape[1] < height * width:
            raise ValueError(
                f"`feature_backbone` ({self.config.feature_backbone}) gives {states.shape[1]} tokens for a grid of "
                f"{height}x{width}."
            )
        # Class and register tokens come before the patches.
        return states[:, -height * width :].unflatten(1, (height, width))


def features_per_token(features: torch.Tensor, side: int) -> torch.Tensor:
    """(batch, grid_h * side, grid_w * side, dim) -> (batch, grid_h * grid_w, side * side * dim)."""
    batch, height, width, dim = features.shape
    blocks = features.reshape(batch, height // side, side, width // side, side, dim)
    # b h s1 w s2 d -> b (h w) (s1 s2 d)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(batch, (height // side) * (width // side), -1)


__all__ = [
    "NO_WORD",
    "FrozenFeatures",
    "LapaQuantizerActionHead",
    "LapaQuantizerInstruction",
    "features_per_token",
]
