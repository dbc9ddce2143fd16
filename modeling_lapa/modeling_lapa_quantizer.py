"""The latent action quantizer: a VQ-VAE over frame pairs.

Its encoder is an inverse dynamics model (two frames to latent action codes), its decoder a small world model (a frame
and codes to the next frame).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import ModelOutput

from lapa.configuration.configuration_lapa_quantizer import PUBLISHED_CNN_BOTTLENECKS, LapaQuantizerConfig
from lapa.modeling_lapa.linear_lapa import linear
from lapa.modeling_lapa.vector_quantization_lapa import (
    VECTOR_QUANTIZERS,
    CodebookQuantizer,
    VectorQuantizerOutput,
)

# The published attention multiplies cosine similarities by this instead of 1 / sqrt(head_dim).
COSINE_ATTENTION_SCALE = 8.0


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


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; (batch, heads, length, head_dim) in, (batch, length, heads, head_dim) out."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def feed_forward_width(config: LapaQuantizerConfig) -> int:
    """Inner width of the feed-forward layers, two thirds of four times the hidden size (GEGLU)."""
    return int(4 * (2 / 3) * config.hidden_size)


def _in_dtype_of(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`states` in the dtype of a module's weights; as they are for a layer with packed integer weights."""
    weight = module.weight
    return states.to(weight.dtype) if weight.is_floating_point() else states


class LapaQuantizerPatchEmbedding(nn.Module):
    """Cuts frames into patches, shared by both frames."""

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__()
        self.patch_height, self.patch_width = config.patch_height_width
        patch_dim = config.num_channels * self.patch_height * self.patch_width
        self.norm_in = nn.LayerNorm(patch_dim)
        self.projection = nn.Linear(patch_dim, config.hidden_size)
        self.norm_out = nn.LayerNorm(config.hidden_size)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, grid_h * grid_w, hidden_size)."""
        batch, channels, height, width = frames.shape
        grid = (height // self.patch_height, width // self.patch_width)
        patches = frames.reshape(batch, channels, grid[0], self.patch_height, grid[1], self.patch_width)
        # b c h p1 w p2 -> b (h w) (c p1 p2)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid[0] * grid[1], -1)
        return self.norm_out(linear(self.projection, self.norm_in(_in_dtype_of(self.norm_in, patches))))


class LapaQuantizerPositionBias(nn.Module):
    """Continuous position bias (Swin v2): an MLP from log-scaled 2-D offsets to one attention bias per head."""

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Linear(2, config.hidden_size),
                nn.Linear(config.hidden_size, config.hidden_size),
                nn.Linear(config.hidden_size, config.num_attention_heads),
            ]
        )

    def forward(self, grid: tuple[int, int]) -> torch.Tensor:
        """Bias of shape (1, heads, grid_h * grid_w, grid_h * grid_w) for a patch grid."""
        height, width = grid
        weight = self.layers[0].weight
        # The MLP sees each distinct offset once: (2h - 1)(2w - 1) rows instead of (hw)^2.
        offset_y = torch.arange(1 - height, height, device=weight.device)
        offset_x = torch.arange(1 - width, width, device=weight.device)
        offsets = torch.stack(torch.meshgrid(offset_y, offset_x, indexing="ij"), -1).reshape(-1, 2).float()
        hidden = (offsets.sign() * torch.log(offsets.abs() + 1)).to(weight.dtype)
        for layer in self.layers[:-1]:
            hidden = F.leaky_relu(layer(hidden), 0.1)
        table = self.layers[-1](hidden)
        y = torch.arange(height, device=weight.device).repeat_interleave(width)
        x = torch.arange(width, device=weight.device).repeat(height)
        row = y[:, None] - y[None, :] + height - 1
        column = x[:, None] - x[None, :] + width - 1
        return table[row * (2 * width - 1) + column].permute(2, 0, 1).unsqueeze(0)


class LapaQuantizerPositionConvolution(nn.Module):
    """Depthwise 3x3x3 convolution over (time, height, width), causal in time (PEG)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.convolution = nn.Conv3d(hidden_size, hidden_size, 3, groups=hidden_size)

    def forward(self, hidden_states: torch.Tensor, video_shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Reads `hidden_states` (any leading shape, hidden_size) as (batch, time, height, width); same shape out."""
        volume = hidden_states.reshape(*video_shape, hidden_states.shape[-1]).permute(0, 4, 1, 2, 3)
        volume = self.convolution(F.pad(volume, (1, 1, 1, 1, 2, 0)))
        return volume.permute(0, 2, 3, 4, 1).reshape(hidden_states.shape)


class LapaQuantizerAttention(nn.Module):
    """Cosine-similarity attention with learned per-channel scales."""

    def __init__(self, config: LapaQuantizerConfig, num_null_key_values: int = 0):
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        inner_dim = self.num_heads * self.head_dim
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        # In self attention the published code normalises queries only; this norm exists in its weights all the same.
        self.context_norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.q_proj = nn.Linear(config.hidden_size, inner_dim, bias=False)
        self.kv_proj = nn.Linear(config.hidden_size, 2 * inner_dim, bias=False)
        self.out_proj = nn.Linear(inner_dim, config.hidden_size, bias=False)
        self.q_scale = nn.Parameter(torch.ones(self.head_dim))
        self.k_scale = nn.Parameter(torch.ones(self.head_dim))
        # Keys at even, values at odd positions.
        self.null_key_values = (
            nn.Parameter(torch.empty(self.num_heads, 2 * num_null_key_values, self.head_dim))
            if num_null_key_values
            else None
        )

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (batch, length, hidden_size).
            context: (batch, context_length, hidden_size) for cross attention.
            position_bias: (1, heads, length, length) added to the scores.
        """
        key_value_input = hidden_states if context is None else self.context_norm(context)
        query = self._heads(linear(self.q_proj, self.norm(hidden_states)))
        key, value = (self._heads(states) for states in linear(self.kv_proj, key_value_input).chunk(2, dim=-1))
        if self.null_key_values is not None:
            null = self.null_key_values.expand(len(hidden_states), -1, -1, -1)
            key = torch.cat((null[:, :, 0::2], key), dim=2)
            value = torch.cat((null[:, :, 1::2], value), dim=2)
        query = F.normalize(query, dim=-1) * self.q_scale
        key = F.normalize(key, dim=-1) * self.k_scale
        if position_bias is not None:
            position_bias = position_bias.to(query.dtype)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention(
            self, query, key, value, position_bias, scaling=COSINE_ATTENTION_SCALE, dropout=0.0, is_causal=False
        )
        return linear(self.out_proj, output.flatten(-2))


class LapaQuantizerFeedForward(nn.Module):
    """GEGLU feed-forward: value half first, gate half second, exact gelu."""

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__()
        inner_dim = feed_forward_width(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up_proj = nn.Linear(config.hidden_size, 2 * inner_dim, bias=False)
        self.down_proj = nn.Linear(inner_dim, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        value, gate = linear(self.up_proj, _in_dtype_of(self.up_proj, self.norm(hidden_states))).chunk(2, dim=-1)
        inner = value * F.gelu(gate)
        return linear(self.down_proj, _in_dtype_of(self.down_proj, inner)).to(hidden_states.dtype)


class LapaQuantizerLayer(GradientCheckpointingLayer):
    """Position convolution, self attention, cross attention in a decoder, feed-forward; each with a residual."""

    def __init__(self, config: LapaQuantizerConfig, cross_attention: bool):
        super().__init__()
        self.position_convolution = LapaQuantizerPositionConvolution(config.hidden_size)
        self.self_attention = LapaQuantizerAttention(config)
        self.cross_attention = LapaQuantizerAttention(config, config.num_null_key_values) if cross_attention else None
        self.feed_forward = LapaQuantizerFeedForward(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        video_shape: tuple[int, int, int, int],
        position_bias: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.position_convolution(hidden_states, video_shape)
        hidden_states = hidden_states + self.self_attention(hidden_states, position_bias=position_bias)
        if self.cross_attention is not None:
            hidden_states = hidden_states + self.cross_attention(hidden_states, context=context)
        return hidden_states + self.feed_forward(hidden_states)


class LapaQuantizerTransformer(nn.Module):
    """A stack of layers and a final norm."""

    def __init__(self, config: LapaQuantizerConfig, num_layers: int, cross_attention: bool = False):
        super().__init__()
        self.layers = nn.ModuleList([LapaQuantizerLayer(config, cross_attention) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        video_shape: tuple[int, int, int, int],
        position_bias: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, video_shape, position_bias, context)
        return self.norm(hidden_states)


class LapaQuantizerCnnBottleneck(nn.Module):
    """The published bottleneck: strided convolutions over the patch grid, one latent token per remaining cell."""

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__()
        self.grid = config.grid
        self.projection_in = nn.Linear(config.hidden_size, config.codebook_dim)
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(config.codebook_dim, config.codebook_dim, kernel, stride, padding)
                for kernel, stride, padding in PUBLISHED_CNN_BOTTLENECKS[config.num_latent_tokens]
            ]
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, grid_h * grid_w, hidden_size) -> (batch, num_latent_tokens, codebook_dim)."""
        hidden = self.projection_in(tokens).transpose(1, 2).unflatten(-1, self.grid)
        for index, convolution in enumerate(self.convolutions):
            hidden = convolution(F.relu(hidden) if index else hidden)
        return hidden.flatten(2).transpose(1, 2)


class LapaQuantizerQueryBottleneck(nn.Module):
    """Learned queries that attend to the patch tokens: any number of latent tokens on any grid."""

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.num_latent_tokens, config.hidden_size))
        self.attention = LapaQuantizerAttention(config, config.num_null_key_values)
        self.feed_forward = LapaQuantizerFeedForward(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.projection_in = nn.Linear(config.hidden_size, config.codebook_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, grid_h * grid_w, hidden_size) -> (batch, num_latent_tokens, codebook_dim)."""
        hidden = self.queries.expand(len(tokens), -1, -1)
        hidden = hidden + self.attention(hidden, context=tokens)
        hidden = hidden + self.feed_forward(hidden)
        return self.projection_in(self.norm(hidden))


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
        patches = linear(self.to_pixels, _in_dtype_of(self.to_pixels, tokens)).reshape(
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
