"""Configuration of UniPi's video model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

PREDICTION_TYPES = ("v_prediction", "epsilon", "sample")


@strict
class VideoDiffusionConfig(PreTrainedConfig):
    r"""
    Sizes of [`VideoDiffusionModel`], and how it samples.

    Args:
        image_size (`int`, defaults to 64): Height and width of a frame in pixels.
        num_channels (`int`, defaults to 3): Colour channels of a frame.
        num_frames (`int`, defaults to 4): Frames that are generated at once.
        frame_gap (`int`, defaults to 1): Control steps from one frame to the next, the current frame being the first.
        patch_size (`int`, defaults to 1): Pixels along one side of the squares that become one place of the U-Net, their
            values its channels. More is cheaper.
        block_out_channels (`list[int]`, defaults to `[64, 128, 256]`): Channels of each level of the U-Net; between two
            levels the resolution halves.
        cross_attention_levels (`list[int]`, defaults to `[1, 2]`): Levels, counted from 0, whose blocks attend to the
            instruction and to each other's places.
        layers_per_block (`int`, defaults to 1): Residual blocks of a level.
        attention_head_dim (`int`, defaults to 32): Width of a head.
        norm_num_groups (`int`, defaults to 8): Groups of every group normalisation.
        text_vocab_size (`int`, defaults to 32000): Rows of the instruction's embedding.
        text_hidden_size (`int`, defaults to 128): Width of the instruction's encoder.
        text_num_layers (`int`, defaults to 2): Layers of the instruction's encoder.
        text_num_heads (`int`, defaults to 4): Heads of the instruction's encoder.
        max_text_length (`int`, defaults to 64): Tokens that an instruction may have.
        num_train_timesteps (`int`, defaults to 1000): Noise levels.
        prediction_type (`str`, defaults to `"sample"`): What the U-Net predicts: `v_prediction`, `epsilon` or
            `sample`. The loss of the first two is mostly about the noise, in which changes of a few pixels are lost.
        predict_change (`bool`, defaults to `True`): Whether what is generated is how each frame differs from the current
            one, so that what stands still need not be drawn; else the frames themselves.
        sample_scale (`float`, defaults to 4.0): What is generated is multiplied by it before noise is added. Changes are
            zero nearly everywhere, and small beside noise of standard deviation 1.
        num_inference_steps (`int`, defaults to 10): DDIM steps of a sample.
        guidance_scale (`float`, defaults to 1.0): Classifier-free guidance by the instruction; 1 is none. More needs a
            model that was trained with `text_dropout`.
        text_dropout (`float`, defaults to 0.0): Share of the training examples that see no instruction.
        replan_every (`int`, defaults to 2): Control steps a policy plays of a generated plan.
    """

    model_type = "lapa_video_diffusion"

    image_size: int = 64
    num_channels: int = 3
    num_frames: int = 4
    frame_gap: int = 1
    patch_size: int = 1
    block_out_channels: list[int] | tuple[int, ...] = (64, 128, 256)
    cross_attention_levels: list[int] | tuple[int, ...] = (1, 2)
    layers_per_block: int = 1
    attention_head_dim: int = 32
    norm_num_groups: int = 8
    text_vocab_size: int = 32000
    text_hidden_size: int = 128
    text_num_layers: int = 2
    text_num_heads: int = 4
    max_text_length: int = 64
    num_train_timesteps: int = 1000
    prediction_type: str = "sample"
    predict_change: bool = True
    sample_scale: float = 4.0
    num_inference_steps: int = 10
    guidance_scale: float = 1.0
    text_dropout: float = 0.0
    replan_every: int = 2

    @property
    def plan_length(self) -> int:
        """Control steps that a sample reaches ahead."""
        return self.num_frames * self.frame_gap

    @property
    def place_channels(self) -> int:
        """Numbers of one frame at one place of the U-Net."""
        return self.num_channels * self.patch_size**2

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: sizes that cannot work together."""
        for name in ("image_size", "num_channels", "num_frames", "frame_gap", "patch_size", "layers_per_block", "attention_head_dim",
                     "norm_num_groups", "text_vocab_size", "text_hidden_size", "text_num_layers", "text_num_heads",
                     "max_text_length", "num_train_timesteps", "num_inference_steps", "replan_every"):  # fmt: skip
            self._refuse_below(name, 1)
        if not self.block_out_channels or any(size % self.norm_num_groups for size in self.block_out_channels):
            raise ValueError(
                f"`block_out_channels` must be multiples of `norm_num_groups` ({self.norm_num_groups}), got "
                f"{self.block_out_channels}."
            )
        levels = len(self.block_out_channels)
        factor = self.patch_size * 2 ** (levels - 1)
        if self.image_size % factor:
            raise ValueError(
                f"`image_size` ({self.image_size}) is not a multiple of {factor}, `patch_size` ({self.patch_size}) times the "
                f"downsampling of {levels} `block_out_channels`."
            )
        if not self.cross_attention_levels or not set(self.cross_attention_levels) <= set(range(levels)):
            raise ValueError(
                f"`cross_attention_levels` must name levels 0 to {levels - 1}, got {self.cross_attention_levels}."
            )
        for level in self.cross_attention_levels:
            if self.block_out_channels[level] % self.attention_head_dim:
                raise ValueError(
                    f"`block_out_channels` of level {level} ({self.block_out_channels[level]}) is not a multiple of "
                    f"`attention_head_dim` ({self.attention_head_dim})."
                )
        if self.text_hidden_size % self.text_num_heads:
            raise ValueError(
                f"`text_hidden_size` ({self.text_hidden_size}) is not a multiple of `text_num_heads` "
                f"({self.text_num_heads})."
            )
        self._refuse_sampling()

    def _refuse_sampling(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"`prediction_type` must be one of {', '.join(PREDICTION_TYPES)}, got {self.prediction_type!r}."
            )
        if not self.sample_scale > 0:
            raise ValueError(f"`sample_scale` must be positive, got {self.sample_scale}.")
        if self.num_inference_steps > self.num_train_timesteps:
            raise ValueError(
                f"`num_inference_steps` ({self.num_inference_steps}) must be at most `num_train_timesteps` "
                f"({self.num_train_timesteps})."
            )
        if not 0 <= self.text_dropout < 1:
            raise ValueError(f"`text_dropout` must lie in [0, 1), got {self.text_dropout}.")
        if self.guidance_scale < 1 or (self.guidance_scale > 1 and not self.text_dropout):
            raise ValueError(
                f"`guidance_scale` must be at least 1, and 1 without `text_dropout` ({self.text_dropout}), got "
                f"{self.guidance_scale}."
            )
        if self.replan_every > self.plan_length:
            raise ValueError(
                f"`replan_every` must lie in [1, {self.plan_length}] (`num_frames` x `frame_gap`), got "
                f"{self.replan_every}."
            )

    def _refuse_below(self, name: str, least: Any) -> None:
        if getattr(self, name) < least:
            raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")


__all__ = ["VideoDiffusionConfig"]
