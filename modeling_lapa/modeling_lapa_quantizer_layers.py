"""Layers of the latent action quantizer: patches, position bias and convolution, attention, bottlenecks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lapa.configuration.configuration_lapa_quantizer import PUBLISHED_CNN_BOTTLENECKS, LapaQuantizerConfig
from lapa.modeling_lapa.linear_lapa import is_plain_linear, linear

# The published attention multiplies cosine similarities by this instead of 1 / sqrt(head_dim).
COSINE_ATTENTION_SCALE = 8.0
# Keys up to which attention is written out: kernels work in tiles of 64 and more, which two frames leave empty.
SHORT_LENGTH = 2
# Widths that are multiples of this run at full speed on tensor cores; the published inner width, 2730, does not.
ALIGNED_WIDTH = 64
# Slope of a leaky ReLU below zero; the position bias of the published code has the same.
LEAKY_SLOPE = 0.1


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


def short_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention over very few keys, without matrix products; shapes as in `eager_attention_forward`."""
    # b h i d, b h j d -> b h i j d
    scores = (query.unsqueeze(3) * key.unsqueeze(2)).sum(-1) * scaling
    weights = scores.softmax(-1).to(value.dtype)
    return (weights.unsqueeze(-1) * value.unsqueeze(2)).sum(3).transpose(1, 2), None


def feed_forward_width(config: LapaQuantizerConfig) -> int:
    """Inner width of the feed-forward layers, two thirds of four times the hidden size (GEGLU)."""
    return int(4 * (2 / 3) * config.hidden_size)


def in_dtype_of(module: nn.Module, states: torch.Tensor) -> torch.Tensor:
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
        return self.norm_out(linear(self.projection, self.norm_in(in_dtype_of(self.norm_in, patches))))


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


class CausalDepthwiseConvolution(nn.Conv3d):
    """Depthwise 3x3x3 convolution over (time, height, width) that sees no later frame; zeros around the volume."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, groups=channels)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(batch, time, height, width, channels) in, same shape out."""
        # One 2-D convolution per step back in time: torch's 3-D one is many times slower in the backward pass, and most
        # of its taps fall on padding (of 27 taps one frame meets 9, two frames 18).
        mixed = self._convolve(volume, steps_back=0)
        for steps_back in range(1, min(volume.shape[1], 3)):
            mixed[:, steps_back:] += self._convolve(volume[:, :-steps_back], steps_back)
        return mixed

    def _convolve(self, volume: torch.Tensor, steps_back: int) -> torch.Tensor:
        # b t h w d -> (b t) d h w, whose memory stays channels-last
        frames = volume.flatten(0, 1).permute(0, 3, 1, 2)
        weight, bias = self.weight[:, :, 2 - steps_back], None if steps_back else self.bias
        mixed = F.conv2d(frames, weight, bias, padding=1, groups=self.groups)
        return mixed.permute(0, 2, 3, 1).reshape(volume.shape)


class LapaQuantizerPositionConvolution(nn.Module):
    """Depthwise 3x3x3 convolution over (time, height, width), causal in time (PEG)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.convolution = CausalDepthwiseConvolution(hidden_size)

    def forward(self, hidden_states: torch.Tensor, video_shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Reads `hidden_states` (any leading shape, hidden_size) as (batch, time, height, width); same shape out."""
        volume = hidden_states.reshape(*video_shape, hidden_states.shape[-1])
        return self.convolution(volume).reshape(hidden_states.shape)


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
        if position_bias is None and key.shape[2] <= SHORT_LENGTH:
            attention = short_attention_forward
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
        states = in_dtype_of(self.up_proj, self.norm(hidden_states))
        padding = -self.down_proj.in_features % ALIGNED_WIDTH
        plain = is_plain_linear(self.up_proj) and is_plain_linear(self.down_proj)
        if padding and plain and states.device.type != "cpu":
            return self._padded(states, padding).to(hidden_states.dtype)
        value, gate = linear(self.up_proj, states).chunk(2, dim=-1)
        inner = value * F.gelu(gate)
        return linear(self.down_proj, in_dtype_of(self.down_proj, inner)).to(hidden_states.dtype)

    def _padded(self, states: torch.Tensor, padding: int) -> torch.Tensor:
        """The same with zero columns up to an aligned width, which change nothing: 0 * gelu(0) = 0."""
        up = F.pad(self.up_proj.weight.unflatten(0, (2, -1)), (0, 0, 0, padding)).flatten(0, 1)
        value, gate = F.linear(states, up).chunk(2, dim=-1)
        return F.linear(value * F.gelu(gate), F.pad(self.down_proj.weight, (0, padding)))


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
        self.negative_slope = 0.0 if config.bottleneck_activation == "relu" else LEAKY_SLOPE
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
            hidden = convolution(self._activate(hidden) if index else hidden)
        return hidden.flatten(2).transpose(1, 2)

    def _activate(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(hidden, self.negative_slope) if self.negative_slope else F.relu(hidden)


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


__all__ = [
    "LapaQuantizerAttention",
    "LapaQuantizerCnnBottleneck",
    "LapaQuantizerFeedForward",
    "LapaQuantizerLayer",
    "LapaQuantizerPatchEmbedding",
    "LapaQuantizerPositionBias",
    "LapaQuantizerPositionConvolution",
    "LapaQuantizerQueryBottleneck",
    "LapaQuantizerTransformer",
    "eager_attention_forward",
    "feed_forward_width",
    "in_dtype_of",
]
