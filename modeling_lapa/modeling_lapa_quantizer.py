"""The latent action quantizer: a VQ-VAE over frame pairs.

Its encoder is an inverse dynamics model (two frames to latent action codes), its decoder a small world model (a frame
and codes to the next frame).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
from lapa.modeling_lapa.linear_lapa import linear
from lapa.modeling_lapa.modeling_lapa_quantizer_layers import (
    LapaQuantizerAttention,
    LapaQuantizerCnnBottleneck,
    LapaQuantizerPatchEmbedding,
    LapaQuantizerPositionBias,
    LapaQuantizerQueryBottleneck,
    LapaQuantizerTransformer,
    feed_forward_width,
    in_dtype_of,
)
from lapa.modeling_lapa.vector_quantization_lapa import (
    VECTOR_QUANTIZERS,
    CodebookQuantizer,
    VectorQuantizerOutput,
)


@dataclass
class LapaQuantizerOutput(ModelOutput):
    """
    Output of [`LapaQuantizer`].

    Args:
        loss (`torch.FloatTensor`, scalar): Mean squared error to the second frame plus the bottleneck's own loss.
        reconstruction (`torch.FloatTensor` of shape `(batch, channels, height, width)`): Predicted second frame, not
            clipped to [0, 1].
        latent_action_codes (`torch.LongTensor` of shape `(batch, num_latent_tokens)`): In [0, codebook_size).
        latent_action_embeddings (`torch.FloatTensor` of shape `(batch, num_latent_tokens, codebook_dim)`): Before
            quantisation.
        perplexity (`torch.FloatTensor`, scalar): exp of the entropy of the codes of this batch.
        reconstruction_loss (`torch.FloatTensor`, scalar): The first term of `loss`.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    latent_action_codes: torch.Tensor | None = None
    latent_action_embeddings: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None


@dataclass
class LapaQuantizerEncoderOutput(ModelOutput):
    """
    Latent actions of a batch of frame pairs.

    Args:
        latent_action_codes (`torch.LongTensor` of shape `(batch, num_latent_tokens)`): In [0, codebook_size).
        latent_action_embeddings (`torch.FloatTensor` of shape `(batch, num_latent_tokens, codebook_dim)`): Before
            quantisation.
    """

    latent_action_codes: torch.Tensor | None = None
    latent_action_embeddings: torch.Tensor | None = None


class LapaQuantizerPreTrainedModel(PreTrainedModel):
    """Initialisation and what the encoder, the decoder and the whole quantizer share."""

    config_class = LapaQuantizerConfig
    config: LapaQuantizerConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LapaQuantizerLayer"]  # noqa: RUF012
    # No flash or flex attention: the spatial layers add a learned bias to the scores.
    _supports_sdpa = True
    # In 8-bit, 4-bit and fp16 models: narrow layers, a small share of the weights, on which the codes hang.
    _keep_in_fp32_modules = ["position_bias", "bottleneck", "vector_quantizer", "latent_projection"]  # noqa: RUF012

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__(config)
        patch_dim = config.num_channels * math.prod(config.patch_height_width)
        # bitsandbytes' 4-bit kernel for CPUs takes widths in multiples of 64 only; the published inner one is 2730.
        odd = {
            "up_proj": feed_forward_width(config),
            "down_proj": feed_forward_width(config),
            "patch_embedding": patch_dim,
            "to_pixels": patch_dim,
        }
        self._keep_in_fp32_modules = [
            *type(self)._keep_in_fp32_modules,
            *(name for name, width in odd.items() if width % 64),
        ]

    def _init_weights(self, module: nn.Module) -> None:
        # The published code keeps torch's own initialisation.
        if self.config.residual_decoding and module is getattr(self, "to_pixels", None):
            # The decoder starts at "nothing changes", the best guess before it knows any code.
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, LapaQuantizerAttention):
            init.ones_(module.q_scale)
            init.ones_(module.k_scale)
            if module.null_key_values is not None:
                init.normal_(module.null_key_values)
        elif isinstance(module, LapaQuantizerQueryBottleneck):
            init.normal_(module.queries)
        elif isinstance(module, CodebookQuantizer):
            init.normal_(module.codebook, std=self.config.codebook_init_std)

    def _add_shared_modules(self) -> None:
        config = self.config
        self.patch_embedding = LapaQuantizerPatchEmbedding(config)
        self.position_bias = LapaQuantizerPositionBias(config)
        self.vector_quantizer = VECTOR_QUANTIZERS[config.quantizer](config)

    def _add_encoder_modules(self) -> None:
        config = self.config
        self.spatial_encoder = LapaQuantizerTransformer(config, config.num_spatial_layers)
        self.temporal_encoder = LapaQuantizerTransformer(config, config.num_temporal_layers)
        bottleneck = LapaQuantizerCnnBottleneck if config.bottleneck == "cnn" else LapaQuantizerQueryBottleneck
        self.bottleneck = bottleneck(config)

    def _add_decoder_modules(self) -> None:
        config = self.config
        patch_dim = config.num_channels * math.prod(config.patch_height_width)
        self.latent_projection = nn.Linear(config.codebook_dim, config.hidden_size)
        self.decoder = LapaQuantizerTransformer(
            config, config.num_spatial_layers, cross_attention=config.action_injection == "cross_attention"
        )
        self.to_pixels = nn.Linear(config.hidden_size, patch_dim)

    def _check_frames(self, frames: torch.Tensor, leading: tuple[str, ...], name: str) -> None:
        size = (self.config.num_channels, *self.config.image_height_width)
        pair = leading == ("batch", "2")
        if (
            not torch.is_tensor(frames)
            or not frames.is_floating_point()
            or frames.ndim != len(leading) + 3
            or tuple(frames.shape[-3:]) != size
            or (pair and frames.shape[1] != 2)
        ):
            got = (
                f"{frames.dtype} of shape {tuple(frames.shape)}" if torch.is_tensor(frames) else type(frames).__name__
            )
            expected = ", ".join((*leading, *map(str, size)))
            raise ValueError(f"`{name}` must be a float tensor of shape ({expected}) in [0, 1], got {got}.")

    def _embed_latent_actions(self, tokens: torch.Tensor, position_bias: torch.Tensor) -> torch.Tensor:
        """Patch tokens (batch, 2, grid_h * grid_w, hidden) -> (batch, num_latent_tokens, codebook_dim)."""
        batch, frames, length, _ = tokens.shape
        video_shape = (batch, frames, *self.config.grid)
        tokens = self.spatial_encoder(tokens.flatten(0, 1), video_shape, position_bias)
        # b t n d -> (b n) t d. The position convolution still reads this as (batch, time, height, width), which mixes
        # positions: the published code does so and its weights were trained so.
        tokens = tokens.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
        tokens = self.temporal_encoder(tokens, video_shape)
        first, last = tokens.unflatten(0, (batch, length)).unbind(2)
        dtype = self.bottleneck.projection_in.weight.dtype
        return self.bottleneck(last.to(dtype)) - self.bottleneck(first.to(dtype))

    def _predict_next_frame(
        self,
        first_frame: torch.Tensor,
        first_tokens: torch.Tensor,
        quantized: torch.Tensor,
        position_bias: torch.Tensor,
    ) -> torch.Tensor:
        """First frame, its patch tokens and quantised tokens (batch, num_latent_tokens, codebook_dim) -> next frame."""
        config = self.config
        if config.interleave_latent_tokens:
            # The published code views token-major vectors as (codebook_dim, tokens) without transposing first.
            quantized = quantized.reshape(len(quantized), config.codebook_dim, -1).transpose(1, 2)
        actions = self.latent_projection(quantized).to(first_tokens.dtype)
        if config.action_injection == "additive":
            first_tokens = first_tokens + actions.mean(1, keepdim=True)
        tokens = self.decoder(first_tokens, (len(quantized), 1, *config.grid), position_bias, actions)
        (grid_h, grid_w), (patch_h, patch_w) = config.grid, config.patch_height_width
        patches = linear(self.to_pixels, in_dtype_of(self.to_pixels, tokens)).reshape(
            -1, grid_h, grid_w, config.num_channels, patch_h, patch_w
        )
        # b h w c p1 p2 -> b c (h p1) (w p2)
        frame = patches.permute(0, 3, 1, 4, 2, 5).reshape(first_frame.shape)
        return frame + first_frame if config.residual_decoding else frame


class LapaQuantizerEncoder(LapaQuantizerPreTrainedModel):
    """The quantizer's inverse dynamics half alone: frame pairs to latent actions. Loads from a quantizer's folder."""

    _keys_to_ignore_on_load_unexpected = [r"^latent_projection\.", r"^decoder\.", r"^to_pixels\."]  # noqa: RUF012

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__(config)
        self._add_shared_modules()
        self._add_encoder_modules()
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> LapaQuantizerEncoderOutput:
        """Encode frame pairs.

        Args:
            pixel_values: (batch, 2, channels, height, width) float in [0, 1], first and second frame.
        """
        self._check_frames(pixel_values, ("batch", "2"), "pixel_values")
        tokens = self.patch_embedding(pixel_values.flatten(0, 1)).unflatten(0, (-1, 2))
        embeddings = self._embed_latent_actions(tokens, self.position_bias(self.config.grid))
        codes = self.vector_quantizer(embeddings.flatten(0, 1)).codes
        return LapaQuantizerEncoderOutput(codes.reshape(embeddings.shape[:2]), embeddings)


class LapaQuantizerDecoder(LapaQuantizerPreTrainedModel):
    """The quantizer's world-model half alone: a frame and codes to the next frame. Loads from a quantizer's folder."""

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^spatial_encoder\.",
        r"^temporal_encoder\.",
        r"^bottleneck\.",
        r"^vector_quantizer\.projection_in\.",
    ]

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__(config)
        self._add_shared_modules()
        self._add_decoder_modules()
        self.post_init()

    def forward(self, first_frame: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Predict the next frame.

        Args:
            first_frame: (batch, channels, height, width) float in [0, 1].
            codes: (batch, num_latent_tokens) int64 in [0, codebook_size).

        Returns:
            (batch, channels, height, width) float, not clipped.
        """
        self._check_frames(first_frame, ("batch",), "first_frame")
        self._check_codes(codes, len(first_frame))
        return self._predict_next_frame(
            first_frame,
            self.patch_embedding(first_frame),
            self.vector_quantizer.lookup(codes),
            self.position_bias(self.config.grid),
        )

    def _check_codes(self, codes: torch.Tensor, batch: int) -> None:
        expected = (batch, self.config.num_latent_tokens)
        if not torch.is_tensor(codes) or codes.is_floating_point() or tuple(codes.shape) != expected:
            got = f"{codes.dtype} of shape {tuple(codes.shape)}" if torch.is_tensor(codes) else type(codes).__name__
            raise ValueError(f"`codes` must be an integer tensor of shape {expected}, got {got}.")
        if codes.numel() and not (codes.min() >= 0 and codes.max() < self.config.codebook_size):
            raise ValueError(
                f"`codes` must lie in [0, {self.config.codebook_size - 1}] (`codebook_size` "
                f"{self.config.codebook_size}), got values from {codes.min().item()} to {codes.max().item()}."
            )


class LapaQuantizer(LapaQuantizerPreTrainedModel):
    """The latent action quantizer of stage 1.

    ```python
    >>> from lapa import LapaQuantizer, LapaQuantizerConfig

    >>> config = LapaQuantizerConfig(hidden_size=32, image_size=64, patch_size=8, num_spatial_layers=1)
    >>> quantizer = LapaQuantizer(config)
    >>> codes = quantizer.encode(torch.rand(2, 2, 3, 64, 64)).latent_action_codes
    >>> codes.shape
    torch.Size([2, 4])
    ```
    """

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__(config)
        self._add_shared_modules()
        self._add_encoder_modules()
        self._add_decoder_modules()
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None) -> LapaQuantizerOutput:
        """Encode frame pairs, quantise, and predict the second frame from the first.

        Args:
            pixel_values: (batch, 2, channels, height, width) float in [0, 1].
            noise: (batch * num_latent_tokens, codebook_dim) standard normal for NSVQ. When None it is drawn in
                training, and in evaluation the decoder receives the hard codes.
        """
        self._check_frames(pixel_values, ("batch", "2"), "pixel_values")
        position_bias = self.position_bias(self.config.grid)
        tokens = self.patch_embedding(pixel_values.flatten(0, 1)).unflatten(0, (-1, 2))
        embeddings = self._embed_latent_actions(tokens, position_bias)
        self._check_noise(noise, embeddings)
        bottleneck: VectorQuantizerOutput = self.vector_quantizer(embeddings.flatten(0, 1), noise)
        first_tokens = tokens[:, 0].detach() if self.config.stop_gradient_first_frame else tokens[:, 0]
        quantized = bottleneck.quantized.reshape(embeddings.shape)
        first_frame, second_frame = pixel_values.unbind(1)
        reconstruction = self._predict_next_frame(first_frame, first_tokens, quantized, position_bias)
        reconstruction_loss = F.mse_loss(reconstruction, second_frame)
        return LapaQuantizerOutput(
            loss=reconstruction_loss + bottleneck.loss,
            reconstruction=reconstruction,
            latent_action_codes=bottleneck.codes.reshape(embeddings.shape[:2]),
            latent_action_embeddings=embeddings,
            perplexity=bottleneck.perplexity,
            reconstruction_loss=reconstruction_loss,
        )

    encode = LapaQuantizerEncoder.forward
    decode = LapaQuantizerDecoder.forward
    _check_codes = LapaQuantizerDecoder._check_codes

    def _check_noise(self, noise: torch.Tensor | None, embeddings: torch.Tensor) -> None:
        expected = (embeddings.shape[0] * embeddings.shape[1], embeddings.shape[2])
        if noise is not None and tuple(noise.shape) != expected:
            raise ValueError(
                f"`noise` must have shape (batch * num_latent_tokens, codebook_dim) = {expected}, "
                f"got {tuple(noise.shape)}."
            )


__all__ = [
    "LapaQuantizer",
    "LapaQuantizerDecoder",
    "LapaQuantizerEncoder",
    "LapaQuantizerEncoderOutput",
    "LapaQuantizerOutput",
    "LapaQuantizerPreTrainedModel",
]
