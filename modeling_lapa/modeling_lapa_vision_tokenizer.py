"""The vision tokenizer: a convolutional VQGAN that turns an image into a grid of codes and back."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from lapa.configuration.configuration_lapa_vision_tokenizer import LapaVisionTokenizerConfig

# Flax's default, under which the published weights were trained; torch's is 1e-5.
NORM_EPS = 1e-6
# `commitment_cost` of the published configuration.
COMMITMENT_WEIGHT = 0.25
# Pixels of the images that are encoded at a time on a CPU, 16 small images or one large one: what lies between the layers of
# more leaves its caches, and a batch of 50 takes half as long again per image as one of 16.
ENCODED_PIXELS = 16 * 32 * 32


@dataclass
class LapaVisionTokenizerEncoderOutput(ModelOutput):
    """
    Output of [`LapaVisionTokenizer.encode`].

    Args:
        codes (`torch.Tensor` of shape `(batch, h, w)`, int64): Codebook indices.
        quantized (`torch.Tensor` of shape `(batch, codebook_dim, h, w)`): The codebook entries of `codes`.
        latents (`torch.Tensor` of shape `(batch, codebook_dim, h, w)`): What was quantised.
    """

    codes: torch.Tensor | None = None
    quantized: torch.Tensor | None = None
    latents: torch.Tensor | None = None


@dataclass
class LapaVisionTokenizerOutput(ModelOutput):
    """
    Output of [`LapaVisionTokenizer`].

    Args:
        loss (`torch.Tensor` of shape `()`): Squared error of the reconstruction before clipping, plus the codebook
            loss, plus 0.25 times the commitment loss.
        reconstruction (`torch.Tensor` of shape `(batch, 3, height, width)`): In [-1, 1].
        codes (`torch.Tensor` of shape `(batch, h, w)`, int64): Codebook indices.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    codes: torch.Tensor | None = None


class LapaVisionTokenizerResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the channels change."""

    def __init__(self, config: LapaVisionTokenizerConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.num_norm_groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = nn.GroupNorm(config.num_norm_groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        changes = in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1) if changes else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.shortcut(hidden_states)
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states)))
        return hidden_states + residual


class LapaVisionTokenizerDownsample(nn.Module):
    """Halves the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # Padded at the right and the bottom only, as the published weights expect.
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))


class LapaVisionTokenizerUpsample(nn.Module):
    """Doubles the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class LapaVisionTokenizerLevel(nn.Module):
    """Residual blocks at one resolution, then a change of resolution (none at the last level)."""

    def __init__(
        self,
        config: LapaVisionTokenizerConfig,
        in_channels: int,
        out_channels: int,
        num_resnets: int,
        resample: nn.Module | None = None,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(
            LapaVisionTokenizerResnetBlock(config, in_channels if i == 0 else out_channels, out_channels)
            for i in range(num_resnets)
        )
        self.resample = nn.Identity() if resample is None else resample

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states)
        return self.resample(hidden_states)


class LapaVisionTokenizerEncoder(nn.Module):
    """Image to latents, from the finest level to the coarsest."""

    def __init__(self, config: LapaVisionTokenizerConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.num_channels, config.base_channels, kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList(
            LapaVisionTokenizerLevel(
                config,
                in_channels,
                width,
                config.num_res_blocks,
                LapaVisionTokenizerDownsample(width) if level < len(widths) - 1 else None,
            )
            for level, (in_channels, width) in enumerate(zip([config.base_channels, *widths[:-1]], widths))
        )
        self.mid_block = LapaVisionTokenizerLevel(config, widths[-1], widths[-1], num_resnets=2)
        self.norm_out = nn.GroupNorm(config.num_norm_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(hidden_states)
        for block in self.down_blocks:
            hidden_states = block(hidden_states)
        hidden_states = self.mid_block(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class LapaVisionTokenizerDecoder(nn.Module):
    """Latents to image, from the coarsest level to the finest."""

    def __init__(self, config: LapaVisionTokenizerConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in reversed(config.channel_multipliers)]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], kernel_size=3, padding=1)
        self.mid_block = LapaVisionTokenizerLevel(config, widths[0], widths[0], num_resnets=2)
        self.up_blocks = nn.ModuleList(
            LapaVisionTokenizerLevel(
                config,
                in_channels,
                width,
                config.num_res_blocks + 1,
                LapaVisionTokenizerUpsample(width) if level < len(widths) - 1 else None,
            )
            for level, (in_channels, width) in enumerate(zip([widths[0], *widths[:-1]], widths))
        )
        self.norm_out = nn.GroupNorm(config.num_norm_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.num_channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.mid_block(self.conv_in(hidden_states))
        for block in self.up_blocks:
            hidden_states = block(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class LapaVisionTokenizer(PreTrainedModel):
    """
    Image tokenizer of the policy: `encode` gives a grid of codes, `decode` an image.

    It is frozen when built or loaded, because the policy's vision embeddings stand for these codes. To train one, say
    `tokenizer.requires_grad_(True)` and minimise `tokenizer(pixel_values).loss`.
    """

    config_class = LapaVisionTokenizerConfig
    base_model_prefix = "vision_tokenizer"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules = ["LapaVisionTokenizerLevel"]  # noqa: RUF012
    # It has no attention, so whatever a policy around it asks for suits it.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    # Names inside a policy: there it stays in float32 whatever dtype the policy is loaded in, as in the published
    # code; rounding would change codes. Loaded alone it takes any dtype.
    _keep_in_fp32_modules_strict = ["vision_tokenizer"]  # noqa: RUF012

    def __init__(self, config: LapaVisionTokenizerConfig):
        super().__init__(config)
        self.encoder = LapaVisionTokenizerEncoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_dim, kernel_size=1)
        self.codebook = nn.Embedding(config.codebook_size, config.codebook_dim)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, kernel_size=1)
        self.decoder = LapaVisionTokenizerDecoder(config)
        self.post_init()
        self.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in `PreTrainedModel`; frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        # Loading replaces the frozen parameters by new ones.
        (loaded[0] if isinstance(loaded, tuple) else loaded).requires_grad_(False)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            bound = 1 / module.num_embeddings
            init.uniform_(module.weight, -bound, bound)

    def encode(self, pixel_values: torch.Tensor) -> LapaVisionTokenizerEncoderOutput:
        """
        Codes of images.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`, floating): In [-1, 1], of the
                configured `image_size`.

        Returns:
            [`LapaVisionTokenizerEncoderOutput`]

        Raises:
            ValueError: If `pixel_values` has another shape or is not floating.
        """
        self._check_pixel_values(pixel_values)
        latents = self.quant_conv(self.encoder(pixel_values.to(self.dtype)))
        codes = self._nearest_codes(latents)
        return LapaVisionTokenizerEncoderOutput(codes=codes, quantized=self._lookup(codes), latents=latents)

    @torch.no_grad()
    def image_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Codes of images row by row, as a policy reads them; faster than `encode` for many images on a CPU.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`, floating): See `encode`.

        Returns:
            `torch.Tensor` of shape `(batch, num_image_tokens)`, int64.

        Raises:
            ValueError: See `encode`.
        """
        if pixel_values.device.type != "cpu" or torch.compiler.is_compiling():
            return self.encode(pixel_values).codes.flatten(1)
        size = max(1, ENCODED_PIXELS // max(1, pixel_values.shape[-2:].numel()))
        return torch.cat([self.encode(part).codes.flatten(1) for part in pixel_values.split(size)])

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """
        Images of codes.

        Args:
            codes (`torch.Tensor` of shape `(batch, h, w)`, integer): In [0, codebook_size).

        Returns:
            `torch.Tensor` of shape `(batch, 3, height, width)`: In [-1, 1].

        Raises:
            ValueError: If `codes` has another shape, is not integer, or leaves the codebook.
        """
        self._check_codes(codes)
        return self._reconstruct(self._lookup(codes)).clamp(-1, 1)

    def forward(self, pixel_values: torch.Tensor) -> LapaVisionTokenizerOutput:
        """
        Encodes and decodes images, with the loss that trains a tokenizer.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`, floating): In [-1, 1].

        Returns:
            [`LapaVisionTokenizerOutput`]
        """
        encoded = self.encode(pixel_values)
        latents, quantized = encoded.latents, encoded.quantized
        # Straight through: the encoder gets the decoder's gradient as if nothing had been quantised.
        reconstruction = self._reconstruct(latents + (quantized - latents).detach())
        loss = (
            F.mse_loss(reconstruction, pixel_values.to(reconstruction.dtype))
            + F.mse_loss(quantized, latents.detach())
            + COMMITMENT_WEIGHT * F.mse_loss(latents, quantized.detach())
        )
        return LapaVisionTokenizerOutput(loss=loss, reconstruction=reconstruction.clamp(-1, 1), codes=encoded.codes)

    def _nearest_codes(self, latents: torch.Tensor) -> torch.Tensor:
        # b c h w -> (b h w) c
        flat = latents.movedim(1, -1).flatten(0, -2).float()
        codebook = self.codebook.weight.float()
        distances = flat.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * flat @ codebook.T
        batch, _, height, width = latents.shape
        return distances.argmin(1).view(batch, height, width)

    def _lookup(self, codes: torch.Tensor) -> torch.Tensor:
        return self.codebook(codes).movedim(-1, 1)

    def _reconstruct(self, quantized: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(quantized))

    def _check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` must have shape (batch, {', '.join(map(str, expected))}), "
                f"got {tuple(pixel_values.shape)}."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(f"`pixel_values` must be floating, scaled to [-1, 1], got {pixel_values.dtype}.")

    def _check_codes(self, codes: torch.Tensor) -> None:
        grid = self.config.grid_size
        if codes.ndim != 3 or tuple(codes.shape[1:]) != (grid, grid):
            raise ValueError(f"`codes` must have shape (batch, {grid}, {grid}), got {tuple(codes.shape)}.")
        if codes.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"`codes` must be int64 or int32, got {codes.dtype}.")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codebook_size:
            raise ValueError(
                f"`codes` must lie in [0, {self.config.codebook_size}), the codebook, "
                f"got values in [{int(codes.min())}, {int(codes.max())}]."
            )


__all__ = ["LapaVisionTokenizer", "LapaVisionTokenizerEncoderOutput", "LapaVisionTokenizerOutput"]
