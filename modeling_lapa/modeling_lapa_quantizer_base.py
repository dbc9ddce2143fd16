"""What the quantizer, its encoder and its decoder share: initialisation, parts, and the steps between them."""

import math

import torch
from torch import nn
from torch.func import functional_call
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
from lapa.modeling_lapa.frame_alignment_lapa import align_frames
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
from lapa.modeling_lapa.quantizer_targets_lapa import LapaQuantizerInstruction
from lapa.modeling_lapa.vector_quantization_lapa import (
    VECTOR_QUANTIZERS,
    CodebookQuantizer,
    VectorQuantizerOutput,
)


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
    _keep_in_fp32_modules = [  # noqa: RUF012
        "position_bias",
        "bottleneck",
        "vector_quantizer",
        "latent_projection",
        "irrelevant_bottleneck",
        "irrelevant_quantizer",
        "irrelevant_projection",
        "action_head",
        "instruction",
        "to_features",
    ]

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
        elif isinstance(module, LapaQuantizerInstruction):
            init.normal_(module.embedding.weight, std=0.02)
        elif isinstance(module, CodebookQuantizer):
            init.normal_(module.codebook, std=self.config.codebook_init_std)

    def _add_shared_modules(self) -> None:
        config = self.config
        self.patch_embedding = LapaQuantizerPatchEmbedding(config)
        self.position_bias = LapaQuantizerPositionBias(config)
        self.vector_quantizer = VECTOR_QUANTIZERS[config.quantizer](config)
        if config.task_centric:
            self.irrelevant_quantizer = VECTOR_QUANTIZERS[config.quantizer](config).requires_grad_(False)

    def _add_encoder_modules(self) -> None:
        config = self.config
        self.spatial_encoder = LapaQuantizerTransformer(config, config.num_spatial_layers)
        self.temporal_encoder = LapaQuantizerTransformer(config, config.num_temporal_layers)
        bottleneck = LapaQuantizerCnnBottleneck if config.bottleneck == "cnn" else LapaQuantizerQueryBottleneck
        self.bottleneck = bottleneck(config)
        if config.task_centric:
            self.irrelevant_bottleneck = bottleneck(config)

    def _add_decoder_modules(self) -> None:
        config = self.config
        patch_dim = config.num_channels * math.prod(config.patch_height_width)
        self.latent_projection = nn.Linear(config.codebook_dim, config.hidden_size)
        self.decoder = LapaQuantizerTransformer(
            config, config.num_spatial_layers, cross_attention=config.action_injection == "cross_attention"
        )
        self.to_pixels = nn.Linear(config.hidden_size, patch_dim)
        if config.task_centric:
            self.irrelevant_projection = nn.Linear(config.codebook_dim, config.hidden_size)
        if config.instruction_vocab_size is not None:
            self.instruction = LapaQuantizerInstruction(config)

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

    def align(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Frame pairs (batch, 2, channels, height, width) as the model looks at them; see `align_frames` of the config."""
        return align_frames(pixel_values) if self.config.align_frames else pixel_values

    def _embed_latent_actions(
        self, tokens: torch.Tensor, position_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Patch tokens (batch, 2, grid_h * grid_w, hidden) -> (batch, num_latent_tokens, codebook_dim).

        The second is the same of the frozen first stage, None unless `task_centric`.
        """
        batch, frames, length, _ = tokens.shape
        video_shape = (batch, frames, *self.config.grid)
        tokens = self.spatial_encoder(tokens.flatten(0, 1), video_shape, position_bias)
        # b t n d -> (b n) t d. The position convolution still reads this as (batch, time, height, width), which mixes
        # positions: the published code does so and its weights were trained so.
        tokens = tokens.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
        tokens = self.temporal_encoder(tokens, video_shape)
        first, last = tokens.unflatten(0, (batch, length)).unbind(2)
        dtype = self.bottleneck.projection_in.weight.dtype
        first, last = first.to(dtype), last.to(dtype)
        irrelevant = None
        if self.config.task_centric:
            irrelevant = self.irrelevant_bottleneck(last) - self.irrelevant_bottleneck(first)
        return self.bottleneck(last) - self.bottleneck(first), irrelevant

    def _quantize_irrelevant(self, embeddings: torch.Tensor, noise: torch.Tensor | None) -> VectorQuantizerOutput:
        # Detached, not only without `requires_grad`, so that nothing can teach the codebook of the first stage.
        frozen = {name: value.detach() for name, value in self.irrelevant_quantizer.named_parameters()}
        return functional_call(self.irrelevant_quantizer, frozen, (embeddings.flatten(0, 1), noise))

    def _project_latent_actions(self, quantized: torch.Tensor, projection: nn.Module) -> torch.Tensor:
        """Quantised tokens (batch, num_latent_tokens, codebook_dim) -> (batch, num_latent_tokens, hidden_size)."""
        if self.config.interleave_latent_tokens:
            # The published code views token-major vectors as (codebook_dim, tokens) without transposing first.
            quantized = quantized.reshape(len(quantized), self.config.codebook_dim, -1).transpose(1, 2)
        return projection(quantized)

    def _decode_tokens(
        self,
        first_tokens: torch.Tensor,
        quantized: torch.Tensor,
        position_bias: torch.Tensor,
        irrelevant: torch.Tensor | None = None,
        instruction_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Patch tokens of the first frame and quantised tokens -> (batch, grid_h * grid_w, hidden_size)."""
        config = self.config
        actions = self._project_latent_actions(quantized, self.latent_projection)
        if irrelevant is not None:
            told = self._project_latent_actions(irrelevant, self.irrelevant_projection)
            actions = torch.cat((actions, told), 1)
        if config.instruction_vocab_size is not None and instruction_ids is not None:
            actions = torch.cat((actions, self.instruction(instruction_ids).to(actions.dtype)), 1)
        actions = actions.to(first_tokens.dtype)
        if config.action_injection == "additive":
            first_tokens = first_tokens + actions.mean(1, keepdim=True)
        return self.decoder(first_tokens, (len(quantized), 1, *config.grid), position_bias, actions)

    def _draw(self, tokens: torch.Tensor, first_frame: torch.Tensor) -> torch.Tensor:
        """Decoded tokens (batch, grid_h * grid_w, hidden_size) -> next frame, of the shape of the first."""
        config = self.config
        (grid_h, grid_w), (patch_h, patch_w) = config.grid, config.patch_height_width
        patches = linear(self.to_pixels, in_dtype_of(self.to_pixels, tokens)).reshape(
            -1, grid_h, grid_w, config.num_channels, patch_h, patch_w
        )
        # b h w c p1 p2 -> b c (h p1) (w p2)
        frame = patches.permute(0, 3, 1, 4, 2, 5).reshape(first_frame.shape)
        return frame + first_frame if config.residual_decoding else frame


__all__ = ["LapaQuantizerPreTrainedModel"]
