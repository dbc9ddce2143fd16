"""Configuration of the vision tokenizer (the VQGAN of the published checkpoints)."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class LapaVisionTokenizerConfig(PreTrainedConfig):
    r"""
    Sizes of [`LapaVisionTokenizer`]. The defaults are the released `vqgan` (146.2M parameters, 16x16 codes per image).

    Args:
        image_size (`int`, defaults to 256): Height and width of the input in pixels.
        num_channels (`int`, defaults to 3): Colour channels.
        base_channels (`int`, defaults to 128): Channels of the first level.
        channel_multipliers (`list[int]`, defaults to `[1, 2, 2, 4, 6]`): Channels of each level, in units of
            `base_channels`. Between two levels the resolution halves.
        num_res_blocks (`int`, defaults to 2): Residual blocks per encoder level; the decoder has one more.
        latent_channels (`int`, defaults to 64): Channels of the encoder's output.
        codebook_size (`int`, defaults to 8192): Number of codes.
        codebook_dim (`int`, defaults to 64): Width of a code.
        num_norm_groups (`int`, defaults to 32): Groups of every group normalisation.
    """

    model_type = "lapa_vision_tokenizer"
    base_config_key = "vision_tokenizer_config"

    image_size: int = 256
    num_channels: int = 3
    base_channels: int = 128
    channel_multipliers: list[int] | tuple[int, ...] = (1, 2, 2, 4, 6)
    num_res_blocks: int = 2
    latent_channels: int = 64
    codebook_size: int = 8192
    codebook_dim: int = 64
    num_norm_groups: int = 32

    @property
    def downsampling_factor(self) -> int:
        """Pixels per code along one side."""
        factor: int = 2 ** (len(self.channel_multipliers) - 1)
        return factor

    @property
    def grid_size(self) -> int:
        """Codes per row and per column."""
        return self.image_size // self.downsampling_factor

    @property
    def num_image_tokens(self) -> int:
        """Codes per image."""
        return self.grid_size**2

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: sizes that cannot work together."""
        for name in ("image_size", "num_channels", "base_channels", "num_res_blocks", "latent_channels",
                     "codebook_size", "codebook_dim", "num_norm_groups"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(f"`channel_multipliers` must be positive numbers, got {self.channel_multipliers}.")
        if self.image_size % self.downsampling_factor:
            raise ValueError(
                f"`image_size` ({self.image_size}) is not a multiple of {self.downsampling_factor}, the downsampling "
                f"of {len(self.channel_multipliers)} `channel_multipliers`."
            )
        for multiplier in self.channel_multipliers:
            if (self.base_channels * multiplier) % self.num_norm_groups:
                raise ValueError(
                    f"`base_channels` x multiplier ({self.base_channels} x {multiplier}) is not a multiple of "
                    f"`num_norm_groups` ({self.num_norm_groups})."
                )


__all__ = ["LapaVisionTokenizerConfig"]
