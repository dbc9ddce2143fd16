"""Configuration of the LAPA policy: one id space over text, vision, latent actions and actions."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from lapa.configuration.configuration_lapa_vision_tokenizer import LapaVisionTokenizerConfig

# The Llama of LWM-Chat-1M-Jax 7B, on which the released checkpoints stand.
RELEASED_TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e7},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEGMENTS = ("text", "vision", "latent", "action")
# Segments that a prompt may ask for.
PROMPT_TARGETS = ("latent", "action")
# The code of the published image token stream that ends an image; ids below 8192 are VQGAN codes.
PUBLISHED_END_OF_VISION_ID = 8193


@strict
class LapaConfig(PreTrainedConfig):
    r"""
    Sizes of [`LapaForLatentAction`] and [`LapaForActionPrediction`]. The defaults are the released 7B.

    Token ids are concatenated: `text | vision | latent | action`. A latent model has no action rows yet
    (`has_action_segment=False`); an action model keeps the latent rows in place.

    Args:
        text_config (`dict` or `LlamaConfig`, *optional*): The Llama trunk; its `vocab_size` counts text only. A dict
            that leaves sizes out is merged into the released ones.
        vision_tokenizer_config (`dict` or `LapaVisionTokenizerConfig`, *optional*): The frozen image tokenizer inside
            the model; without it the model takes image codes only.
        vision_vocab_size (`int`, defaults to 8448): Rows of the vision segment.
        latent_vocab_size (`int`, defaults to 8): Rows of the latent segment, the quantizer's codebook size.
        num_latent_tokens (`int`, defaults to 4): Latent action codes per frame pair.
        action_vocab_size (`int`, defaults to 256): Rows of the action segment, the largest number of bins.
        action_dim (`int`, defaults to 7): Action tokens per step; the largest of all embodiments where there are several.
        action_horizon (`int`, defaults to 1): Steps of one prediction, `action_horizon * action_dim` tokens in order of
            time.
        use_proprio (`bool`, defaults to `False`): Whether prompts tell the robot's own state, see `LapaProcessor`.
        has_action_segment (`bool`, defaults to `False`): Whether the weights have action rows.
        keep_latent_head (`bool`, defaults to `False`): Whether an action model still learns and decodes latent codes.
        end_of_vision_id (`int`, *optional*): Vision id after an image; None means 8193 where the segment has it and
            the last id elsewhere. The id before it ends one frame of several.
        rope_in_model_dtype (`bool`, defaults to `False`): Whether rotary tables are computed in the dtype of the
            hidden states, as the published code does. The converter sets it.
        residual_in_fp32 (`bool`, defaults to `False`): Whether the residual stream is fp32 whatever the weights' dtype,
            as in the published code. The converter sets it.
        text_loss_weight (`float`, defaults to 0.01): Share of the text loss in latent pretraining; the latent loss
            has the rest.
        latent_loss_weight (`float`, defaults to 1.0): What the latent loss is multiplied with before it is added to
            the action loss, in an action model that keeps its latent head.
        vision_position_embeddings (`bool`, defaults to `False`): Whether learned embeddings of an image token's place in
            its image are added to image tokens. Small trunks learn faster with them; the published models have none.
        embedding_initializer_range (`float`, *optional*): Standard deviation of fresh embeddings; None means
            `text_config.initializer_range`.
        action_num_bins (`list[int]`, *optional*): Number of bins of each action dimension, so that decoding never
            picks a bin that a dimension lacks; 0 at the end for dimensions that are not used.
        prompt_tails (`dict[str, list[int]]`, *optional*): Text ids that end the prompt for `"latent"` and for `"action"`
            (`LapaProcessor.prompt_tails`), by which decoding refuses a prompt that asks for the other target. None
            leaves prompts unchecked.
        quantizer_hash (`str`, *optional*): SHA-256 of the quantizer weights whose codes the model predicts.
        quantizer_name (`str`, *optional*): Name of that quantizer's folder or repository.
        latent_policy_hash (`str`, *optional*): SHA-256 of the weights of the latent-pretrained model that an action
            model was finetuned from.
        latent_policy_name (`str`, *optional*): Name of that model's folder or repository.
        fresh_segments (`list[str]`, *optional*): Segments that were drawn at random because the converted checkpoint
            lacked them.
    """

    model_type = "lapa"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    sub_configs_defaults = {  # noqa: RUF012
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", init_kwargs=RELEASED_TEXT_CONFIG),
        "vision_tokenizer_config": SubConfigSpec(config_class=LapaVisionTokenizerConfig, optional=True),
    }

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_tokenizer_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_vocab_size: int = 8448
    latent_vocab_size: int = 8
    num_latent_tokens: int = 4
    action_vocab_size: int = 256
    action_dim: int = 7
    action_horizon: int = 1
    use_proprio: bool = False
    has_action_segment: bool = False
    keep_latent_head: bool = False
    end_of_vision_id: int | None = None
    rope_in_model_dtype: bool = False
    residual_in_fp32: bool = False
    text_loss_weight: float = 0.01
    latent_loss_weight: float = 1.0
    vision_position_embeddings: bool = False
    embedding_initializer_range: float | None = None
    action_num_bins: list[int] | tuple[int, ...] | None = None
    prompt_tails: dict[str, list[int]] | None = None
    quantizer_hash: str | None = None
    quantizer_name: str | None = None
    latent_policy_hash: str | None = None
    latent_policy_name: str | None = None
    fresh_segments: list[str] | tuple[str, ...] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # A saved config is complete; a hand-written dict states what differs from the released sizes.
        if isinstance(self.text_config, dict) and not RELEASED_TEXT_CONFIG.keys() <= self.text_config.keys():
            if "rope_theta" in self.text_config:
                raise ValueError(
                    "`text_config` takes the rotary base as `rope_parameters={'rope_type': 'default', 'rope_theta': "
                    f"{self.text_config['rope_theta']}}}`, not as `rope_theta`."
                )
            self.text_config = {**RELEASED_TEXT_CONFIG, **self.text_config}
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        if self.end_of_vision_id is None:
            self.end_of_vision_id = min(PUBLISHED_END_OF_VISION_ID, self.vision_vocab_size - 1)
        if not self.architectures:
            # So that `AutoModel.from_config` knows which of the two headed classes is meant.
            self.architectures = ["LapaForActionPrediction" if self.has_action_segment else "LapaForLatentAction"]

    @property
    def text_vocab_size(self) -> int:
        """Rows of the text segment."""
        return self.text_config.vocab_size  # type: ignore[union-attr, no-any-return]

    @property
    def vision_offset(self) -> int:
        """Id of vision code 0."""
        return self.text_vocab_size

    @property
    def latent_offset(self) -> int:
        """Id of latent action code 0."""
        return self.vision_offset + self.vision_vocab_size

    @property
    def action_offset(self) -> int:
        """Id of action bin 0 (where the rows would start, in a model without them)."""
        return self.latent_offset + self.latent_vocab_size

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and of the head, all segments together."""
        return self.action_offset + (self.action_vocab_size if self.has_action_segment else 0)

    def segment(self, name: str) -> tuple[int, int]:
        """First id and end (exclusive) of a segment: `"text"`, `"vision"`, `"latent"` or `"action"`."""
        bounds = {
            "text": (0, self.vision_offset),
            "vision": (self.vision_offset, self.latent_offset),
            "latent": (self.latent_offset, self.action_offset),
            "action": (self.action_offset, self.vocab_size),
        }
        if name not in bounds:
            raise ValueError(f"`name` must be one of {', '.join(SEGMENTS)}, got {name!r}.")
        return bounds[name]

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: sizes that cannot work together."""
        for name, least in (
            ("vision_vocab_size", 2),
            ("latent_vocab_size", 1),
            ("num_latent_tokens", 1),
            ("action_vocab_size", 1),
            ("action_dim", 1),
            ("action_horizon", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if not 0 <= self.text_loss_weight <= 1:
            raise ValueError(f"`text_loss_weight` must lie in [0, 1], got {self.text_loss_weight}.")
        if not 0 <= self.latent_loss_weight < float("inf"):
            raise ValueError(f"`latent_loss_weight` must be at least 0, got {self.latent_loss_weight}.")
        if self.end_of_vision_id is not None and not 1 <= self.end_of_vision_id < self.vision_vocab_size:
            raise ValueError(
                f"`end_of_vision_id` ({self.end_of_vision_id}) must lie in [1, {self.vision_vocab_size - 1}], "
                f"inside `vision_vocab_size` ({self.vision_vocab_size})."
            )
        self._validate_vision_tokenizer()
        self._validate_prompt_tails()
        self._validate_action_num_bins()

    def _validate_action_num_bins(self) -> None:
        if self.action_num_bins is None:
            return
        used = list(self.action_num_bins)
        while used and used[-1] == 0:
            used.pop()
        if (
            len(self.action_num_bins) != self.action_dim
            or not used
            or not all(1 <= bins <= self.action_vocab_size for bins in used)
        ):
            raise ValueError(
                f"`action_num_bins` must be {self.action_dim} numbers (`action_dim`) in "
                f"[1, {self.action_vocab_size}] (`action_vocab_size`), or 0 at the end, got {self.action_num_bins}."
            )

    def _validate_prompt_tails(self) -> None:
        tails = self.prompt_tails
        if tails is not None and (
            set(tails) != set(PROMPT_TARGETS) or not all(tail and min(tail) >= 0 for tail in tails.values())
        ):
            raise ValueError(
                f"`prompt_tails` must map each of {', '.join(PROMPT_TARGETS)} to a list of one or more text ids, got {tails}."
            )

    def _validate_vision_tokenizer(self) -> None:
        tokenizer = self.vision_tokenizer_config
        if tokenizer is None and self.vision_position_embeddings:
            raise ValueError(
                "`vision_position_embeddings` needs `vision_tokenizer_config`, which says how many tokens an image has."
            )
        codes = (
            tokenizer.get("codebook_size")
            if isinstance(tokenizer, dict)
            else getattr(tokenizer, "codebook_size", None)
        )
        if codes is not None and codes > self.vision_vocab_size - 2:
            raise ValueError(
                f"`vision_vocab_size` ({self.vision_vocab_size}) must hold the vision tokenizer's codes ({codes}) and "
                "two more for end of frame and end of vision."
            )


__all__ = ["LapaConfig"]
