"""UniPi's video model: which frames come next, given the current one and an instruction."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from lapa.evaluation.baselines.configuration_video_diffusion import VideoDiffusionConfig


def import_diffusers() -> Any:
    """The library `diffusers`, imported late.

    Raises:
        ValueError: It is not installed; names the extra.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"UniPi's video model needs diffusers: pip install 'lapa[unipi]' ({error}).") from error
    return diffusers


@dataclass
class VideoDiffusionOutput(ModelOutput):
    """
    Output of [`VideoDiffusionModel`].

    Args:
        loss (`torch.Tensor` of shape `()`): Mean squared error of what the U-Net predicts.
    """

    loss: torch.Tensor | None = None


class InstructionEncoder(nn.Module):
    """A small transformer over token ids: (batch, length) int64 -> (batch, length, text_hidden_size)."""

    def __init__(self, config: VideoDiffusionConfig):
        super().__init__()
        width = config.text_hidden_size
        self.tokens = nn.Embedding(config.text_vocab_size, width)
        self.positions = nn.Embedding(config.max_text_length, width)
        # What stands for the instruction where none is shown.
        self.nothing = nn.Parameter(torch.zeros(width))
        layer = nn.TransformerEncoderLayer(
            width, config.text_num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.text_num_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Embeddings; those of the rows where `hidden` (batch,) bool is set say nothing about the instruction."""
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        embedded = self.tokens(input_ids) + self.positions(positions)
        encoded = self.norm(self.layers(embedded, src_key_padding_mask=attention_mask == 0))
        return torch.where(hidden[:, None, None], self.nothing, encoded)


class VideoDiffusionModel(PreTrainedModel):
    r"""
    A U-Net of `diffusers` that denoises the next frames, stacked on their channels, together.

    The current frame enters as further channels of the input, the instruction by cross attention. Training adds noise by
    DDPM; sampling is DDIM.

    ```python
    >>> model = VideoDiffusionModel(VideoDiffusionConfig(image_size=32, text_vocab_size=100))
    >>> plan = model.generate(torch.rand(1, 3, 32, 32), torch.tensor([[5, 7]]))
    >>> plan.shape  # 4 frames, frame_gap control steps apart
    torch.Size([1, 4, 3, 32, 32])
    ```
    """

    config_class = VideoDiffusionConfig
    base_model_prefix = "video_diffusion"
    main_input_name = "frame"
    input_modalities = "image"

    def __init__(self, config: VideoDiffusionConfig):
        super().__init__(config)
        diffusers = import_diffusers()
        attends = [level in config.cross_attention_levels for level in range(len(config.block_out_channels))]
        self.instruction_encoder = InstructionEncoder(config)
        self.unet = diffusers.UNet2DConditionModel(
            sample_size=config.image_size // config.patch_size,
            in_channels=(config.num_frames + 1) * config.place_channels,
            out_channels=config.num_frames * config.place_channels,
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            down_block_types=tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
            cross_attention_dim=config.text_hidden_size,
            # Named after heads' width, it is their number: diffusers keeps the old name.
            attention_head_dim=tuple(max(1, size // config.attention_head_dim) for size in config.block_out_channels),
            norm_num_groups=config.norm_num_groups,
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Both parts come with the starting values of their own layers."""

    # Made when they are used: `from_pretrained` builds the model where tensors have no values, and theirs are not stored.
    @cached_property
    def noise_scheduler(self) -> Any:
        """Adds noise in training."""
        return import_diffusers().DDPMScheduler(**self._noise_levels())

    @cached_property
    def sampling_scheduler(self) -> Any:
        """Removes it in sampling."""
        limits = {"clip_sample": True, "clip_sample_range": self.config.sample_scale}
        return import_diffusers().DDIMScheduler(**self._noise_levels(), **limits, timestep_spacing="trailing")

    def _noise_levels(self) -> dict[str, Any]:
        return {
            "num_train_timesteps": self.config.num_train_timesteps,
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": self.config.prediction_type,
        }

    def forward(
        self,
        frame: torch.Tensor,
        next_frames: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> VideoDiffusionOutput:
        """
        Loss of denoising, each example at a noise level that is drawn.

        Args:
            frame (`torch.Tensor` of shape `(batch, channels, height, width)`, floating): Current frame, in [0, 1].
            next_frames (`torch.Tensor` of shape `(batch, num_frames, channels, height, width)`, floating): In [0, 1].
            input_ids (`torch.Tensor` of shape `(batch, length)`, int64): Instruction.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 at padding.
            generator (`torch.Generator`, *optional*): Of all draws; torch's own when None.

        Returns:
            [`VideoDiffusionOutput`]

        Raises:
            ValueError: Frames of another shape or not floating, ids that are no batch of instructions.
        """
        config, batch, device = self.config, len(frame), frame.device
        self._check(frame, input_ids)
        expected = (batch, config.num_frames, *frame.shape[1:])
        if tuple(next_frames.shape) != expected:
            raise ValueError(f"`next_frames` must have shape {expected}, got {tuple(next_frames.shape)}.")
        sample = self._to_sample(frame, next_frames)
        draws: dict[str, Any] = {"generator": generator, "device": device}
        noise = torch.randn(sample.shape, **draws)
        steps = torch.randint(config.num_train_timesteps, (batch,), **draws)
        hidden = torch.zeros(batch, dtype=torch.bool, device=device)
        if self.training and config.text_dropout:
            hidden = torch.rand(batch, **draws) < config.text_dropout
        noisy = self.noise_scheduler.add_noise(sample, noise, steps)
        predicted = self._denoise(noisy, steps, frame, self._read(input_ids, attention_mask, hidden))
        if config.prediction_type == "v_prediction":
            target = self.noise_scheduler.get_velocity(sample, noise, steps)
        else:
            target = noise if config.prediction_type == "epsilon" else sample
        return VideoDiffusionOutput(loss=F.mse_loss(predicted, target))

    @torch.no_grad()
    def generate(
        self,
        frame: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """
        Frames that may come next.

        Args:
            frame, input_ids, attention_mask: See `forward`.
            num_inference_steps (`int`, *optional*): DDIM steps; the configured number when None.
            guidance_scale (`float`, *optional*): The configured one when None.
            generator (`torch.Generator`, *optional*): Of the noise that is denoised; torch's own when None.

        Returns:
            `torch.Tensor` of shape `(batch, num_frames, channels, height, width)`: In [0, 1].
        """
        self._check(frame, input_ids)
        config, scheduler, batch = self.config, self.sampling_scheduler, len(frame)
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        if scale != 1 and not config.text_dropout:
            raise ValueError(f"`guidance_scale` is {scale}, but the model was trained without `text_dropout`.")
        scheduler.set_timesteps(config.num_inference_steps if num_inference_steps is None else num_inference_steps)
        hidden = torch.zeros(batch, dtype=torch.bool, device=frame.device)
        seen = self._read(input_ids, attention_mask, hidden)
        blind = None if scale == 1 else self._read(input_ids, attention_mask, ~hidden)
        side = config.image_size // config.patch_size
        shape = (batch, config.num_frames * config.place_channels, side, side)
        sample = torch.randn(shape, generator=generator, device=frame.device)
        for step in scheduler.timesteps:
            predicted = self._denoise(sample, step, frame, seen)
            if blind is not None:
                without = self._denoise(sample, step, frame, blind)
                predicted = without + scale * (predicted - without)
            sample = scheduler.step(predicted, step, sample).prev_sample
        return self._to_frames(frame, sample)

    def _to_sample(self, frame: torch.Tensor, next_frames: torch.Tensor) -> torch.Tensor:
        """What noise is added to, (batch, num_frames * place_channels, rows, columns)."""
        values = next_frames - frame.unsqueeze(1) if self.config.predict_change else 2 * next_frames - 1
        places = F.pixel_unshuffle(values.flatten(1, 2).to(self.dtype), self.config.patch_size)
        return places * self.config.sample_scale

    def _to_frames(self, frame: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Undoes `_to_sample`; clipped to [0, 1]."""
        pixels = F.pixel_shuffle(sample / self.config.sample_scale, self.config.patch_size)
        values = pixels.unflatten(1, (self.config.num_frames, self.config.num_channels))
        frames = values + frame.unsqueeze(1) if self.config.predict_change else (values + 1) / 2
        return frames.clamp(0, 1)

    def _read(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedded instructions with their mask."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.instruction_encoder(input_ids, mask, hidden), mask

    def _denoise(
        self,
        sample: torch.Tensor,
        steps: torch.Tensor,
        frame: torch.Tensor,
        instruction: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Prediction of the U-Net for noisy samples."""
        embedded, mask = instruction
        current = F.pixel_unshuffle(2 * frame.to(sample.dtype) - 1, self.config.patch_size)
        inputs = torch.cat((sample, current), dim=1)
        predicted: torch.Tensor = self.unet(
            inputs, steps, encoder_hidden_states=embedded, encoder_attention_mask=mask.bool()
        ).sample
        return predicted

    def _check(self, frame: torch.Tensor, input_ids: torch.Tensor) -> None:
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if frame.ndim != 4 or tuple(frame.shape[1:]) != expected:
            raise ValueError(
                f"`frame` must have shape (batch, {', '.join(map(str, expected))}), got {tuple(frame.shape)}."
            )
        if not frame.is_floating_point():
            raise ValueError(f"`frame` must be floating, scaled to [0, 1], got {frame.dtype}.")
        if input_ids.ndim != 2 or len(input_ids) != len(frame) or input_ids.shape[1] > config.max_text_length:
            raise ValueError(
                f"`input_ids` must have shape ({len(frame)}, length) with at most {config.max_text_length} tokens "
                f"(`max_text_length`), got {tuple(input_ids.shape)}."
            )


__all__ = ["VideoDiffusionModel", "VideoDiffusionOutput", "import_diffusers"]
