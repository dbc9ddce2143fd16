"""The LAPA policy: a Llama trunk over text, image codes, latent action codes and action bins in one id space."""

import copy
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin, LogitsProcessorList
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from lapa.configuration.configuration_lapa import LapaConfig
from lapa.modeling_lapa.generation_lapa import ActionBinsLogitsProcessor, SegmentLogitsProcessor
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
# Standard deviation of a standard normal truncated at two, by which lecun-normal is corrected (as in JAX).
TRUNCATED_NORMAL_STD = 0.87962566103423978


@dataclass
class LapaCausalLMOutput(CausalLMOutputWithPast):
    """
    Output of [`LapaForLatentAction`] and [`LapaForActionPrediction`].

    Args:
        loss (`torch.FloatTensor`, scalar, with `labels`): What is trained on, see the model.
        logits (`torch.FloatTensor` of shape `(batch, length, vocab_size)`): Scores over all segments; None in
            training with `labels`, where they are computed only at the positions that have a loss.
        latent_loss, action_loss, text_loss (`torch.FloatTensor`, scalar, with `labels`): Cross entropy of each
            segment, normalised inside it: the mean over rows of each row's mean.
        latent_accuracy, action_accuracy (`torch.FloatTensor`, scalar, with `labels`): Share of right tokens.
    """

    latent_loss: torch.Tensor | None = None
    action_loss: torch.Tensor | None = None
    text_loss: torch.Tensor | None = None
    latent_accuracy: torch.Tensor | None = None
    action_accuracy: torch.Tensor | None = None


@dataclass
class LapaPrediction(ModelOutput):
    """
    Decoded tokens with their scores.

    Args:
        latent_action_codes (`torch.LongTensor` of shape `(batch, num_latent_tokens)`): In [0, latent_vocab_size); from
            `predict_latent_action`.
        action_tokens (`torch.LongTensor` of shape `(batch, action_dim)`): Bin indices; from `predict_action_tokens`.
        scores (`torch.FloatTensor` of shape `(batch, num_tokens, segment_size)`): Log-probabilities inside the
            segment, before temperature; minus infinity for bins that a dimension lacks.
    """

    latent_action_codes: torch.Tensor | None = None
    action_tokens: torch.Tensor | None = None
    scores: torch.Tensor | None = None


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
        return self.vision_tokenizer.encode(pixel_values).codes.flatten(1)

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


class LapaForTokenPrediction(LapaPreTrainedModel, GenerationMixin):
    """What the latent model and the action model share: the trunk, one head over all segments, decoding."""

    _keys_to_ignore_on_load_unexpected: list[str] = []  # noqa: RUF012
    # The loss is a mean over rows; the Trainer divides by accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: LapaConfig):
        super().__init__(config)
        self.model = LapaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        vision_codes: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        action_num_bins: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LapaCausalLMOutput:
        """Score the next token at every position; with `labels`, also the loss.

        Args:
            labels: (batch, length) int64 aligned with `input_ids`, -100 where there is no loss.
            logits_to_keep: How many of the last positions get logits; 0 means all.
            action_num_bins: Accepted so that a processor's output can be passed on; used in decoding only.

        The other arguments are those of [`LapaModel`].
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            vision_codes=vision_codes,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        losses = {} if labels is None else self._losses(hidden_states, labels)
        logits = None
        if labels is None or not self.training:
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        return LapaCausalLMOutput(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **losses,
        )

    def _losses(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def _segment_loss(
        self, segment: str, hidden_states: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy and accuracy of the labels in one segment, normalised inside it.

        Args:
            segment: `"latent"`, `"action"` or `"text"`.
            hidden_states: (batch, length, hidden_size).
            labels: (batch, length) aligned with the inputs, -100 where there is no loss.

        Returns:
            The mean over rows of each row's mean (a row without such labels counts as 0), and the share of right ones.
        """
        start, end = self.config.segment(segment)
        targets = labels[:, 1:]
        chosen = (targets >= start) & (targets < end)
        if segment == "text":
            # The published text mask also covers the latent positions, where the text head is asked for id 0 (a
            # misplaced parenthesis there). Kept, because the released weights were trained so.
            latent_start, latent_end = self.config.segment("latent")
            latent = (targets >= latent_start) & (targets < latent_end)
            targets, chosen = targets.masked_fill(latent, 0), chosen | latent
        rows, columns = torch.where(chosen)
        logits = self._segment_logits(hidden_states[rows, columns], start, end).float()
        targets = targets[rows, columns] - start
        if len(targets) == 0:
            return logits.sum() * 0.0, logits.new_zeros(())
        losses = F.cross_entropy(logits, targets, reduction="none")
        counts = torch.bincount(rows, minlength=len(labels))
        return torch.sum(losses / counts[rows]) / len(labels), (logits.argmax(-1) == targets).float().mean()

    def _segment_logits(self, hidden_states: torch.Tensor, start: int, end: int) -> torch.Tensor:
        if type(self.lm_head) is nn.Linear:
            return F.linear(hidden_states, self.lm_head.weight[start:end])
        return self.lm_head(hidden_states)[..., start:end]  # an adapter or a quantised layer: its rows are its own

    def predict_latent_action(self, return_scores: bool = False, **inputs: Any) -> torch.Tensor | LapaPrediction:
        """Decode the latent action codes that follow a prompt ending in `<delta>`.

        Args:
            return_scores: Return a [`LapaPrediction`] with log-probabilities instead of the codes alone.
            inputs: What the processor returns, and any argument of `generate`: greedy unless `do_sample=True`.

        Returns:
            (batch, num_latent_tokens) int64 in [0, latent_vocab_size).
        """
        inputs.pop("action_num_bins", None)
        codes, scores = self._decode_segment("latent", self.config.num_latent_tokens, None, inputs)
        return LapaPrediction(latent_action_codes=codes, scores=scores) if return_scores else codes

    def _decode_segment(
        self, segment: str, num_tokens: int, num_bins: torch.Tensor | None, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Generate exactly `num_tokens` of a segment; tokens relative to it, and log-probabilities inside it."""
        if "input_ids" not in inputs:
            raise ValueError("`input_ids` must be given, as the processor returns them.")
        start, end = self.config.segment(segment)
        prompt_length = inputs["input_ids"].shape[1]
        processors = LogitsProcessorList([SegmentLogitsProcessor(start, end)])
        if num_bins is not None:
            processors.append(ActionBinsLogitsProcessor(num_bins, start, prompt_length))
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1, **inputs}
        if not options["do_sample"]:
            # Silences warnings about sampling settings that a saved generation config may carry.
            options |= {"temperature": None, "top_p": None, "top_k": None}
        output: Any = self.generate(
            **options,
            logits_processor=processors,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = output.sequences[:, prompt_length:] - start
        logits = torch.stack(output.logits, dim=1)[:, :, start:end].float()
        if output.get("beam_indices") is not None:
            # Each step of a returned sequence came from one of the rows that were kept alive.
            steps = torch.arange(num_tokens, device=logits.device)
            logits = logits[output.beam_indices[:, :num_tokens], steps]
        if num_bins is not None:
            limit = num_bins.to(logits.device).repeat_interleave(len(logits) // len(num_bins), dim=0)
            missing = torch.arange(end - start, device=logits.device) >= limit.unsqueeze(-1)
            logits = logits.masked_fill(missing, float("-inf"))
        return tokens, logits.log_softmax(-1)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        vision_codes: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in `GenerationMixin`; the image goes in once, with the prompt, or every time without a cache."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        if is_first_iteration or not use_cache:
            model_inputs |= {"pixel_values": pixel_values, "vision_codes": vision_codes}
        return model_inputs

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refused: rows belong to segments whose sizes the config states."""
        if new_num_tokens in (None, self.config.vocab_size):
            return self.model.embed_tokens
        raise ValueError(
            f"`new_num_tokens` ({new_num_tokens}) cannot change the {self.config.vocab_size} rows of the id space; "
            "`add_action_segment` grows it by the action rows."
        )


class LapaForLatentAction(LapaForTokenPrediction):
    """The latent-pretrained model: image and instruction to latent action codes.

    The loss is `(1 - text_loss_weight) * latent + text_loss_weight * text`, each normalised inside its segment.
    Loaded from an action checkpoint it keeps the action rows and decodes latent codes.
    """

    def _losses(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        latent_loss, latent_accuracy = self._segment_loss("latent", hidden_states, labels)
        text_loss, _ = self._segment_loss("text", hidden_states, labels)
        weight = self.config.text_loss_weight
        return {
            "loss": (1 - weight) * latent_loss + weight * text_loss,
            "latent_loss": latent_loss.detach(),
            "text_loss": text_loss.detach(),
            "latent_accuracy": latent_accuracy,
        }


class LapaForActionPrediction(LapaForTokenPrediction):
    """The policy: image and instruction to one token per action dimension.

    Built from a config, or loaded from a latent-pretrained folder, it gets fresh action rows; the latent rows stay in
    place, out of decoding and loss unless `keep_latent_head=True`. The loss is that of the action tokens (plus that of
    the latent codes when the latent head is kept).
    """

    def __init__(self, config: LapaConfig):
        if not config.has_action_segment:
            config = copy.deepcopy(config)
            config.has_action_segment, config.architectures = True, [type(self).__name__]
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `PreTrainedModel`; a latent-pretrained checkpoint gains action rows, drawn from torch's generator."""
        hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        source, _ = LapaConfig.get_config_dict(
            pretrained_model_name_or_path, **{key: kwargs[key] for key in hub if key in kwargs}
        )
        if source.get("has_action_segment", False):
            rows, asked = source["action_vocab_size"], kwargs.get("action_vocab_size")
            if asked not in (None, rows):
                raise ValueError(f"`action_vocab_size` is {rows} in this action checkpoint and cannot become {asked}.")
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        # The weights are loaded as they are, without action rows, whatever a given config says of them.
        kwargs.pop("has_action_segment", None)
        if getattr(kwargs.get("config"), "has_action_segment", False):
            kwargs["config"] = copy.deepcopy(kwargs["config"])
            kwargs["config"].has_action_segment = False
        loaded = LapaForLatentAction.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Both classes hold the same modules; changing the class keeps quantisation, device map and hooks as they are.
        model.__class__ = cls
        model.add_action_segment()
        logger.warning(
            "%s has no action rows: %d fresh ones were drawn for LapaForActionPrediction. Finetune before use.",
            pretrained_model_name_or_path,
            model.config.action_vocab_size,
        )
        return loaded

    @torch.no_grad()
    def add_action_segment(self) -> None:
        """Append the action rows to the embedding and to the head: old rows bit for bit, new ones lecun-normal."""
        if self.config.has_action_segment:
            raise ValueError("`add_action_segment` was called on a model that already has action rows.")
        num_rows = self.config.action_vocab_size
        hidden_size = self.config.text_config.hidden_size
        # The published start draws the (rows, hidden) embedding with fan-in `rows`, the (hidden, rows) head with
        # fan-in `hidden`.
        for module, fan_in in ((self.model.embed_tokens, num_rows), (self.lm_head, hidden_size)):
            old = module.weight
            if old.is_meta or not old.is_floating_point():
                raise ValueError(
                    f"Action rows cannot be added to weights of dtype {old.dtype} on device {old.device}: load the "
                    "model whole, with its embedding and head unquantised."
                )
            std = math.sqrt(1 / fan_in) / TRUNCATED_NORMAL_STD
            new = torch.empty(num_rows, hidden_size, device=old.device, dtype=torch.float32)
            nn.init.trunc_normal_(new, std=std, a=-2 * std, b=2 * std)
            module.weight = nn.Parameter(torch.cat((old, new.to(old.dtype))), requires_grad=old.requires_grad)
        self.model.embed_tokens.num_embeddings = self.lm_head.out_features = len(self.lm_head.weight)
        self.config.has_action_segment = True
        self.config.architectures = [type(self).__name__]

    def predict_latent_action(self, return_scores: bool = False, **inputs: Any) -> torch.Tensor | LapaPrediction:
        """As in [`LapaForLatentAction`], where the checkpoint's latent head is in use (`keep_latent_head=True`)."""
        if not self.config.keep_latent_head:
            raise ValueError(
                "The latent head of this action model is retired (`keep_latent_head` is False): load the checkpoint "
                "with `keep_latent_head=True`, or with LapaForLatentAction, to decode latent action codes."
            )
        return super().predict_latent_action(return_scores, **inputs)

    def predict_action_tokens(
        self, return_scores: bool = False, action_num_bins: torch.Tensor | None = None, **inputs: Any
    ) -> torch.Tensor | LapaPrediction:
        """Decode the action tokens that follow a prompt ending in `<action>`.

        Args:
            return_scores: Return a [`LapaPrediction`] with log-probabilities instead of the tokens alone.
            action_num_bins: (batch, action_dim) int64, bins that each dimension has; the processor returns it. When
                None, `config.action_num_bins` applies if set.
            inputs: What the processor returns, and any argument of `generate`: greedy unless `do_sample=True`.

        Returns:
            (batch, action_dim) int64 bin indices in [0, action_vocab_size).
        """
        if action_num_bins is None and self.config.action_num_bins is not None:
            action_num_bins = torch.tensor([list(self.config.action_num_bins)])
        self._check_num_bins(action_num_bins)
        tokens, scores = self._decode_segment("action", self.config.action_dim, action_num_bins, inputs)
        return LapaPrediction(action_tokens=tokens, scores=scores) if return_scores else tokens

    def _check_num_bins(self, num_bins: torch.Tensor | None) -> None:
        dim, limit = self.config.action_dim, self.config.action_vocab_size
        if num_bins is None:
            return
        if num_bins.ndim != 2 or num_bins.shape[1] != dim or num_bins.min() < 1 or num_bins.max() > limit:
            raise ValueError(
                f"`action_num_bins` must be (batch, {dim}) integers in [1, {limit}], got shape "
                f"{tuple(num_bins.shape)} with values from {num_bins.min().item()} to {num_bins.max().item()}."
            )

    def _losses(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        loss, accuracy = self._segment_loss("action", hidden_states, labels)
        losses = {"loss": loss, "action_loss": loss.detach(), "action_accuracy": accuracy}
        if self.config.keep_latent_head:
            latent_loss, latent_accuracy = self._segment_loss("latent", hidden_states, labels)
            losses |= {"loss": loss + latent_loss}
            losses |= {"latent_loss": latent_loss.detach(), "latent_accuracy": latent_accuracy}
        return losses


__all__ = [
    "LapaCausalLMOutput",
    "LapaForActionPrediction",
    "LapaForLatentAction",
    "LapaForTokenPrediction",
    "LapaModel",
    "LapaPreTrainedModel",
    "LapaPrediction",
    "LapaRotaryEmbedding",
]
