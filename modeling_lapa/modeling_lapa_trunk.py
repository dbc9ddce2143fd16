"""The trunk of the LAPA policy: one embedding over all segments, Llama layers, the frozen vision tokenizer."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from lapa.configuration.configuration_lapa import LapaConfig
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer


class LapaRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's rotary embedding, on request with the published code's rounding."""

    def __init__(self, config: LapaConfig):
        super().__init__(config.text_config)
        self.in_model_dtype = config.rope_in_model_dtype

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables (batch, length, head_dim) in the dtype of `x` for integer `position_ids` (batch, length)."""
        if not self.in_model_dtype or x.dtype == torch.float32:
            return super().forward(x, position_ids)
        # The published tables round the exponents and the angles to the model's dtype. Near position 400 in bfloat16
        # that moves a cosine by up to 0.96; the released weights were trained and run with it.
        head_dim = 2 * self.inv_freq.shape[0]
        exponents = torch.arange(0, head_dim, 2, device=x.device).to(x.dtype) / head_dim
        inverse_frequencies = 1.0 / self.config.rope_parameters["rope_theta"] ** exponents.float()  # type: ignore[index]
        angles = (position_ids[..., None].float() * inverse_frequencies).to(x.dtype).float()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class LapaRMSNorm(LlamaRMSNorm):
    """Llama's norm over an fp32 residual stream, back in the dtype of the weights."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) in, same shape out."""
        hidden_states = hidden_states.float()
        variance = hidden_states.square().mean(-1, keepdim=True)
        normalised = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * normalised.to(self.weight.dtype)


class LapaPreTrainedModel(PreTrainedModel):
    """Initialisation and capabilities shared by all classes of the policy."""

    config_class = LapaConfig
    config: LapaConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": LlamaAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.embedding_initializer_range
        if std is not None and isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)

    @property
    def dtype(self) -> torch.dtype:
        """The trunk's dtype. The vision tokenizer stays in fp32 and, coming first, would otherwise be taken for it."""
        embeddings: Any = self.get_input_embeddings()
        return embeddings.weight.dtype

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in `PreTrainedModel`; the vision tokenizer is frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, LapaVisionTokenizer):
                module.requires_grad_(False)  # loading put new, trainable parameters in place of the frozen ones
        return loaded

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """As in `PreTrainedModel`; the layers read `text_config`, which belongs to no sub-model of its own."""
        text_config = self.config.text_config
        before = text_config._attn_implementation
        requested = attn_implementation
        if isinstance(requested, dict):
            requested = requested.get("text_config", requested.get("", before))
        text_config._attn_implementation = requested
        try:
            super().set_attn_implementation(attn_implementation, *args, **kwargs)
        except Exception:
            text_config._attn_implementation = before
            raise


class LapaModel(LapaPreTrainedModel):
    """The trunk: one embedding over all segments, Llama layers, and the frozen vision tokenizer."""

    def __init__(self, config: LapaConfig):
        super().__init__(config)
        text_config = config.text_config
        text_config._attn_implementation = self.config._attn_implementation
        self.vision_tokenizer = (
            LapaVisionTokenizer(config.vision_tokenizer_config) if config.vision_tokenizer_config is not None else None
        )
        self.embed_tokens = nn.Embedding(config.vocab_size, text_config.hidden_size)
        self.vision_positions = (
            nn.Embedding(self.vision_tokenizer.config.num_image_tokens, text_config.hidden_size)
            if config.vision_position_embeddings
            else None
        )
        self.layers = nn.ModuleList([LlamaDecoderLayer(text_config, i) for i in range(text_config.num_hidden_layers)])
        norm_class = LapaRMSNorm if config.residual_in_fp32 else LlamaRMSNorm
        self.norm = norm_class(text_config.hidden_size, eps=text_config.rms_norm_eps)
        if config.residual_in_fp32:
            for layer in self.layers:
                layer.input_layernorm = LapaRMSNorm(text_config.hidden_size, eps=text_config.rms_norm_eps)
                layer.post_attention_layernorm = LapaRMSNorm(text_config.hidden_size, eps=text_config.rms_norm_eps)
        self.rotary_emb = LapaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Vision codes (batch, num_image_tokens) int64 of `pixel_values` (batch, 3, height, width) in [-1, 1]."""
        if self.vision_tokenizer is None:
            raise ValueError(
                "`pixel_values` need a vision tokenizer, and this model has none (`vision_tokenizer_config` is None): "
                "pass precomputed `vision_codes`."
            )
        return self.vision_tokenizer.image_tokens(pixel_values)

    def fill_vision_codes(self, input_ids: torch.Tensor, vision_codes: torch.Tensor) -> torch.Tensor:
        """Replace the image placeholders (vision code 0) of each row by that row's codes.

        Args:
            input_ids: (batch, length) int64, with as many placeholders per row as `vision_codes` has columns.
            vision_codes: (batch, num_image_tokens) int64 in [0, end_of_vision_id).
        """
        offset = self.config.vision_offset
        placeholders = input_ids == offset
        vision_codes = vision_codes.flatten(1)
        if not torch.compiler.is_compiling():
            self._check_vision_codes(placeholders, vision_codes)
        return input_ids.masked_scatter(placeholders, vision_codes.to(input_ids) + offset)

    def _check_vision_codes(self, placeholders: torch.Tensor, vision_codes: torch.Tensor) -> None:
        expected = (len(placeholders), vision_codes.shape[1])
        counts = placeholders.sum(1)
        if len(vision_codes) != len(placeholders) or bool((counts != vision_codes.shape[1]).any()):
            raise ValueError(
                f"`input_ids` hold {sorted(set(counts.tolist()))} image placeholders (id {self.config.vision_offset}) "
                f"in each of {expected[0]} rows, but the images give {expected[1]} codes for {len(vision_codes)} rows."
            )
        limit = self.config.vision_vocab_size
        if vision_codes.numel() and not (vision_codes.min() >= 0 and vision_codes.max() < limit):
            raise ValueError(
                f"`vision_codes` must lie in [0, {limit - 1}], got values from {vision_codes.min().item()} to "
                f"{vision_codes.max().item()}."
            )

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        vision_codes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the trunk.

        Args:
            input_ids: (batch, length) int64 in the one id space.
            attention_mask: (batch, length), 1 where a token counts; pads may stand on either side.
            position_ids: (batch, length) int64; counted over the attention mask when None.
            inputs_embeds: (batch, length, hidden_size) in place of `input_ids`.
            pixel_values: (batch, 3, height, width) in [-1, 1], one image per row.
            vision_codes: (batch, num_image_tokens) int64, precomputed codes in place of `pixel_values`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        if pixel_values is not None and vision_codes is not None:
            raise ValueError("At most one of `pixel_values` and `vision_codes` may be given.")
        if inputs_embeds is None:
            if pixel_values is not None:
                vision_codes = self.encode_images(pixel_values)
            if vision_codes is not None:
                input_ids = self.fill_vision_codes(input_ids, vision_codes)
            inputs_embeds = self.embed_tokens(input_ids)
            if self.vision_positions is not None:
                inputs_embeds = inputs_embeds + self._embed_vision_positions(input_ids)

        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        if position_ids is None:
            position_ids = self._count_positions(inputs_embeds, attention_mask, past_key_values)
        causal_mask = create_causal_mask(
            config=self.config.text_config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = inputs_embeds.float() if self.config.residual_in_fp32 else inputs_embeds
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _embed_vision_positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embedding of each image token's place in its image, zero elsewhere: (batch, length, hidden_size)."""
        offset, end_of_frame = self.config.vision_offset, self.config.end_of_vision_id - 1
        inside = (input_ids >= offset) & (input_ids < offset + end_of_frame)
        place = (inside.cumsum(1) - 1).clamp(min=0) % self.vision_positions.num_embeddings
        return self.vision_positions(place) * inside.unsqueeze(-1)

    @staticmethod
    def _count_positions(
        inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.Tensor:
        length = inputs_embeds.shape[1]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] >= length:
            # Published rule: a token's position is the number of real tokens before it.
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)


__all__ = ["LapaModel", "LapaPreTrainedModel", "LapaRMSNorm", "LapaRotaryEmbedding"]
