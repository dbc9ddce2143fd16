"""The LAPA policy: a Llama trunk over text, image codes, latent action codes and action bins in one id space."""

import copy
import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessorList
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from lapa.configuration.configuration_lapa import LapaConfig
from lapa.modeling_lapa.adapter_loading_lapa import HUB_ARGUMENTS, AdapterSource, find_adapter, load_adapter
from lapa.modeling_lapa.generation_lapa import (
    ActionBinsLogitsProcessor,
    LapaGenerationMixin,
    SegmentLogitsProcessor,
    bins_of_tokens,
    chunks_of_tokens,
)
from lapa.modeling_lapa.modeling_lapa_trunk import LapaModel, LapaPreTrainedModel, LapaRMSNorm, LapaRotaryEmbedding
from lapa.modeling_lapa.modeling_outputs_lapa import LapaCausalLMOutput, LapaPrediction

logger = logging.getLogger(__name__)

# Standard deviation of a standard normal truncated at two, by which lecun-normal is corrected (as in JAX).
TRUNCATED_NORMAL_STD = 0.87962566103423978


class LapaForTokenPrediction(LapaPreTrainedModel, LapaGenerationMixin):
    """What the latent model and the action model share: the trunk, one head over all segments, decoding."""

    _keys_to_ignore_on_load_unexpected: list[str] = []  # noqa: RUF012
    # The loss is a mean over rows; the Trainer divides by accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: LapaConfig):
        super().__init__(config)
        self.model = LapaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `PreTrainedModel`; a folder with an adapter alone gives its base model with the adapter in it."""
        adapter = find_adapter(pretrained_model_name_or_path, kwargs)
        if adapter is not None:
            return cls._from_adapter(adapter, *args, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _from_adapter(cls, adapter: AdapterSource, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("adapter_kwargs", None)
        config = copy.deepcopy(adapter.config)
        for name in kwargs.keys() & LapaConfig.__dataclass_fields__.keys() - {"dtype"}:
            setattr(config, name, kwargs.pop(name))
        kwargs["config"] = config
        # An Auto class goes by the base model's config, in which there may be no action rows yet.
        of_action = issubclass(cls, LapaForActionPrediction) or (adapter.by_auto_class and config.has_action_segment)
        if of_action:
            loaded, _ = LapaForActionPrediction._load_whole(adapter.base, *args, **kwargs)
        else:
            loaded = cls.from_pretrained(adapter.base, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        load_adapter(model, adapter.folder, kwargs)
        return loaded

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
        target_segment: str | None = None,
        **kwargs: Any,
    ) -> LapaCausalLMOutput:
        """Score the next token at every position; with `labels`, also the loss.

        Args:
            labels: (batch, length) int64 aligned with `input_ids`, -100 where there is no loss.
            logits_to_keep: How many of the last positions get logits; 0 means all.
            action_num_bins: Accepted so that a processor's output can be passed on; used in decoding only.
            target_segment: With `labels`, return `segment_logits` of the labels in this segment instead of `logits`.

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
        if target_segment is not None:
            losses["segment_logits"] = self._target_logits(target_segment, hidden_states, labels)
        elif labels is None or not self.training:
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

    def _target_logits(self, segment: str, hidden_states: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        if labels is None:
            raise ValueError("`target_segment` needs `labels`, got None.")
        start, end = self.config.segment(segment)
        targets = labels[:, 1:]
        chosen = (targets >= start) & (targets < end)
        return self._segment_logits(hidden_states[:, :-1][chosen], start, end).float()

    def _segment_logits(self, hidden_states: torch.Tensor, start: int, end: int) -> torch.Tensor:
        if type(self.lm_head) is nn.Linear:
            return F.linear(hidden_states, self.lm_head.weight[start:end])
        # An adapter, a quantised or a sharded layer: its rows are its own.
        return self.lm_head(hidden_states)[..., start:end]

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
        self._check_target(segment, inputs["input_ids"])
        prompt_length = inputs["input_ids"].shape[1]
        processors = LogitsProcessorList([SegmentLogitsProcessor(start, end)])
        if num_bins is not None:
            processors.append(ActionBinsLogitsProcessor(num_bins, start, prompt_length))
        # After the segment's own: they see its scores alone.
        processors.extend(inputs.pop("logits_processor", ()))
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
            # Of the filler behind a shorter row nothing is masked but all other bins, as in decoding.
            missing = torch.arange(end - start, device=logits.device) >= limit.clamp(min=1).unsqueeze(-1)
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
        adapter = find_adapter(pretrained_model_name_or_path, kwargs)
        if adapter is not None:
            return cls._from_adapter(adapter, *args, **kwargs)
        loaded, grew = cls._load_whole(pretrained_model_name_or_path, *args, **kwargs)
        if grew:
            logger.warning(
                "%s has no action rows: fresh ones were drawn for LapaForActionPrediction. Finetune before use.",
                pretrained_model_name_or_path,
            )
        return loaded

    @classmethod
    def _load_whole(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        """A model without adapters, and whether it got fresh action rows."""
        source, _ = LapaConfig.get_config_dict(
            pretrained_model_name_or_path, **{key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        )
        if source.get("has_action_segment", False):
            rows, asked = source["action_vocab_size"], kwargs.get("action_vocab_size")
            if asked not in (None, rows):
                raise ValueError(f"`action_vocab_size` is {rows} in this action checkpoint and cannot become {asked}.")
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs), False
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
        return loaded, True

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
                None, `config.action_num_bins` applies if set. An embodiment with fewer dimensions than the model has
                0 in the last ones.
            inputs: What the processor returns, and any argument of `generate`: greedy unless `do_sample=True`.

        Returns:
            (batch, action_dim) int64 bin indices in [0, action_vocab_size), with an `action_horizon` above 1
            (batch, action_horizon, action_dim). Dimensions that no row has are left out; -1 where a row lacks one.
        """
        horizon = self.config.action_horizon
        if action_num_bins is None and self.config.action_num_bins is not None:
            action_num_bins = torch.tensor([list(self.config.action_num_bins)])
        self._check_num_bins(action_num_bins)
        if action_num_bins is None:
            tokens, scores = self._decode_segment("action", horizon * self.config.action_dim, None, inputs)
            tokens = tokens.view(len(tokens), horizon, -1)
        else:
            action_num_bins = action_num_bins[:, : int((action_num_bins > 0).sum(1).max())]
            of_tokens = bins_of_tokens(action_num_bins, horizon)
            tokens, scores = self._decode_segment("action", of_tokens.shape[1], of_tokens, inputs)
            repeats = len(tokens) // len(action_num_bins)
            num_bins = action_num_bins.to(tokens.device).repeat_interleave(repeats, dim=0)
            tokens = chunks_of_tokens(tokens, num_bins, horizon)
        tokens = tokens.squeeze(1) if horizon == 1 else tokens
        return LapaPrediction(action_tokens=tokens, scores=scores) if return_scores else tokens

    def _check_num_bins(self, num_bins: torch.Tensor | None) -> None:
        dim, limit = self.config.action_dim, self.config.action_vocab_size
        if num_bins is None:
            return
        # Missing dimensions are the last ones of a row, and no row lacks all.
        if (
            num_bins.ndim != 2
            or num_bins.shape[1] != dim
            or num_bins[:, 0].min() < 1
            or num_bins.min() < 0
            or num_bins.max() > limit
            or ((num_bins[:, :-1] == 0) & (num_bins[:, 1:] > 0)).any()
        ):
            raise ValueError(
                f"`action_num_bins` must be (batch, {dim}) integers in [1, {limit}], 0 at the end of a row for "
                f"dimensions that it lacks, got shape {tuple(num_bins.shape)} with values from "
                f"{num_bins.min().item()} to {num_bins.max().item()}."
            )

    def _losses(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        loss, accuracy = self._segment_loss("action", hidden_states, labels)
        losses = {"loss": loss, "action_loss": loss.detach(), "action_accuracy": accuracy}
        if self.config.keep_latent_head:
            latent_loss, latent_accuracy = self._segment_loss("latent", hidden_states, labels)
            losses |= {"loss": loss + self.config.latent_loss_weight * latent_loss}
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
    "LapaRMSNorm",
    "LapaRotaryEmbedding",
]
