"""Processor: images, instructions and actions to ids in the one id space, and predicted bins back to actions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from lapa.configuration.configuration_lapa import LapaConfig
from lapa.processing.action_tokenization_lapa import ActionTokenizer
from lapa.processing.image_processing_lapa import LapaImageProcessor, split_batch
from lapa.processing.proprio_lapa import ProprioTokenizer
from lapa.processing.robot_statistics_lapa import RobotStatistics
from lapa.processing.tokenization_lapa import LapaTokenizer

# Prompt of the published models. The doubled `<s>` and the backticks are theirs.
TRAINING_TEXT = (
    "<s> You are a helpful assistant. USER: What action should the robot take to `{instruction}` ASSISTANT:"
)
PROMPT_START, PROMPT_END = "<s> ", " <vision>"
PROMPT = PROMPT_START + TRAINING_TEXT + PROMPT_END
# The robot's state goes where the instruction ends: the beginning of a prompt is what a long one loses.
INSTRUCTION_END = " ASSISTANT:"
STATE_TEXT = " State: {state}."
TARGETS = {"latent": "<delta>", "action": "<action>"}
LAYOUT_FIELDS = ("instruction", "vision", "latent", "action", "bos", "eos")
IGNORED_LABEL = -100
# Texts whose ids are remembered: an episode asks for the same ones at every step.
MAX_REMEMBERED_TEXTS = 4096


def _codes(name: str, values: Any, vocabulary: int) -> list[int]:
    """Checked list of codes in [0, vocabulary)."""
    array = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
    if array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"`{name}` must be integers in [0, {vocabulary - 1}], got {array.dtype} of shape {array.shape}."
        )
    if array.min() < 0 or array.max() >= vocabulary:
        wrong = int(array[(array < 0) | (array >= vocabulary)].flat[0])
        raise ValueError(f"`{name}` must lie in [0, {vocabulary - 1}], got {wrong}.")
    return [int(code) for code in array.reshape(-1)]


def _instructions(instruction: Any) -> list[str]:
    """One or several instructions -> checked list."""
    batch = list(instruction) if isinstance(instruction, (list, tuple)) else [instruction]
    if not batch:
        raise ValueError("`instruction` is empty; accepted: a string or a list of strings.")
    for text in batch:
        if not isinstance(text, str):
            raise ValueError(f"`instruction` must be a string or a list of strings, got {type(text).__name__}.")
        if not text.strip():
            raise ValueError(f"`instruction` must say what to do, got {text!r}.")
    return batch


class LapaProcessor(RobotStatistics, ProcessorMixin):
    r"""
    Everything between a robot and the model's ids: image processor, tokenizer and action bins.

    Ids are one space, `text | vision | latent | action`. An image stands in `input_ids` as vision code 0 repeated
    `num_image_tokens` times and the end-of-vision id; the model fills those positions in from `pixel_values` or
    `vision_codes`.

    Args:
        image_processor (`LapaImageProcessor`): Decodes and resizes images.
        tokenizer (`LapaTokenizer`): Text tokenizer.
        text_vocab_size, vision_vocab_size, latent_vocab_size, action_vocab_size (`int`): Sizes of the segments.
        num_latent_tokens (`int`, defaults to 4): Latent action codes per prediction.
        action_dim (`int`, defaults to 7): Action tokens per step; the most that any of the statistics has.
        action_horizon (`int`, defaults to 1): Steps of one prediction.
        use_proprio (`bool`, defaults to `False`): Whether every prompt tells the robot's state, as text.
        end_of_vision_id (`int`, defaults to 8193): Vision id after an image; the id before it ends one frame of several.
        num_image_tokens (`int`, defaults to 256): Vision codes per image.
        max_text_length (`int`, defaults to 128): Ids of the prompt before the image; longer ones lose their beginning.
        target (`str`, defaults to `"latent"`): What the prompt asks for where a call does not say, `"latent"` or
            `"action"`. A folder's processor asks for what its model was trained to predict.
        action_statistics (`dict`, *optional*): `{unnorm_key: {"edges": [[...], ...]}}`, see `ActionTokenizer`. Keys may
            have different numbers of dimensions.
        proprio_statistics (`dict`, *optional*): `{unnorm_key: {"low": [...], "high": [...]}}`, see `ProprioTokenizer`.
    """

    def __init__(
        self,
        image_processor: LapaImageProcessor,
        tokenizer: LapaTokenizer,
        text_vocab_size: int = 32000,
        vision_vocab_size: int = 8448,
        latent_vocab_size: int = 8,
        num_latent_tokens: int = 4,
        action_vocab_size: int = 256,
        action_dim: int = 7,
        end_of_vision_id: int = 8193,
        num_image_tokens: int = 256,
        max_text_length: int = 128,
        target: str = "latent",
        action_statistics: dict[str, dict[str, Any]] | None = None,
        action_horizon: int = 1,
        use_proprio: bool = False,
        proprio_statistics: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer)  # type: ignore[no-untyped-call]
        if len(tokenizer) > text_vocab_size:
            raise ValueError(
                f"`tokenizer` has {len(tokenizer)} pieces, more than `text_vocab_size` ({text_vocab_size}): its ids "
                "would reach into the vision segment."
            )
        if not 1 <= end_of_vision_id < vision_vocab_size:
            raise ValueError(
                f"`end_of_vision_id` ({end_of_vision_id}) must lie in [1, {vision_vocab_size - 1}], inside "
                f"`vision_vocab_size` ({vision_vocab_size})."
            )
        self._ids_of_texts: dict[str, list[int]] = {}
        self._remembered_tokenizer = 0
        self.text_vocab_size = text_vocab_size
        self.vision_vocab_size = vision_vocab_size
        self.latent_vocab_size = latent_vocab_size
        self.num_latent_tokens = num_latent_tokens
        self.action_vocab_size = action_vocab_size
        if action_horizon < 1:
            raise ValueError(f"`action_horizon` must be at least 1, got {action_horizon}.")
        self.action_dim = action_dim
        self.action_horizon = action_horizon
        self.use_proprio = use_proprio
        self.end_of_vision_id = end_of_vision_id
        self.num_image_tokens = num_image_tokens
        self.max_text_length = max_text_length
        self.target = self._checked_target(target)
        self.action_statistics: dict[str, dict[str, Any]] = {}
        for key, statistics in (action_statistics or {}).items():
            self.set_action_statistics(key, ActionTokenizer.from_dict(statistics))
        self.proprio_statistics: dict[str, dict[str, Any]] = {}
        for key, statistics in (proprio_statistics or {}).items():
            self.set_proprio_statistics(key, ProprioTokenizer.from_dict(statistics))

    @classmethod
    def from_config(
        cls, config: LapaConfig, image_processor: LapaImageProcessor | None, tokenizer: LapaTokenizer, **overrides: Any
    ) -> "LapaProcessor":
        """
        Builds the processor that fits a model.

        Args:
            config: Configuration of the model.
            image_processor: None makes one of the vision tokenizer's image size.
            tokenizer: Text tokenizer of the model.
            overrides: Further arguments of the processor. Where the model has no vision tokenizer, `num_image_tokens`
                belongs here.
        """
        vision: Any = config.vision_tokenizer_config
        if image_processor is None:
            image_processor = LapaImageProcessor() if vision is None else LapaImageProcessor(size=vision.image_size)
        if vision is not None:
            overrides.setdefault("num_image_tokens", vision.num_image_tokens)
        overrides.setdefault("target", "action" if config.has_action_segment else "latent")
        assert config.end_of_vision_id is not None
        return cls(
            image_processor,
            tokenizer,
            text_vocab_size=config.text_vocab_size,
            vision_vocab_size=config.vision_vocab_size,
            latent_vocab_size=config.latent_vocab_size,
            num_latent_tokens=config.num_latent_tokens,
            action_vocab_size=config.action_vocab_size,
            action_dim=config.action_dim,
            action_horizon=config.action_horizon,
            use_proprio=config.use_proprio,
            end_of_vision_id=config.end_of_vision_id,
            **overrides,
        )

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        # By class, not through the Auto mappings: it must also work where nothing is registered (remote code).
        kwargs.pop("trust_remote_code", None)
        return [
            LapaImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            LapaTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs),
        ]

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
        """Id of action bin 0."""
        return self.latent_offset + self.latent_vocab_size

    @property
    def prompt_tails(self) -> dict[str, list[int]]:
        """Ids after the image in a prompt for each target. `LapaConfig.prompt_tails` holds them for the model."""
        return {target: self._text_ids(f"</vision> {marker}") for target, marker in TARGETS.items()}

    def __call__(
        self,
        images: Any = None,
        instruction: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        target: str | None = None,
        unnorm_key: str | Sequence[str] | None = None,
        padding: str = "max_length",
        vision_codes: Any = None,
        proprio: Any = None,
        **image_kwargs: Any,
    ) -> BatchFeature:
        """
        Prompts for a prediction.

        Args:
            images: One image or a list, see `LapaImageProcessor`. Lists of images and instructions go together.
            instruction: One instruction or a list.
            return_tensors: `"pt"` or `"np"`.
            target: What the prompt asks for: `"latent"` for `predict_latent_action`, `"action"` for
                `predict_action_tokens`; the processor's own when None.
            unnorm_key: Whose bins the action will be decoded with, and whose range tells `proprio`; one for all, or a
                list with one per row.
            padding: `"max_length"` pads the text to `max_text_length` (published), `"longest"` to the longest of the
                batch. Both on the left.
            vision_codes: (batch, num_image_tokens) or (num_image_tokens,) codes of the vision tokenizer, instead of
                `images`.
            proprio: (batch, proprio_dim) or (proprio_dim,) state of the robots in physical units, where the model takes
                it (`use_proprio`). With several embodiments a list of vectors.
            image_kwargs: Per-call arguments of the image processor, such as `do_center_crop`.

        Returns:
            BatchFeature with `input_ids` (batch, sequence) int64, `attention_mask` (batch, sequence) int64 and
            `pixel_values` (batch, 3, height, width) float32 in [-1, 1] or `vision_codes` (batch, num_image_tokens)
            int64. For actions whose bins are known also `action_num_bins` (batch, action_dim) int64, 0 for dimensions
            that an embodiment lacks.

        Raises:
            ValueError: An argument that does not fit, named with what is accepted.
        """
        if padding not in ("max_length", "longest"):
            raise ValueError(f'`padding` must be "max_length" or "longest", got {padding!r}.')
        target = self._checked_target(self.target if target is None else target)
        texts = _instructions(instruction)
        vision = self._vision_inputs(images, vision_codes, image_kwargs)
        (batch,) = {len(values) for values in vision.values()}
        if batch != len(texts):
            raise ValueError(f"`images` ({batch}) and `instruction` ({len(texts)}) must be equally many.")
        keys = self._unnorm_keys(unnorm_key, batch)
        prompts = [self._text(text, state, key) for text, state, key in zip(texts, self._states(proprio, batch), keys)]
        input_ids, attention_mask = self._prompt_ids(prompts, target, padding)
        data = {"input_ids": input_ids, "attention_mask": attention_mask, **vision}
        if unnorm_key is not None or (target == "action" and len(self.action_statistics) == 1):
            num_bins = [self.action_tokenizer(key).num_bins for key in keys]
            if target == "action":
                rows = [[*bins, *[0] * (self.action_dim - len(bins))] for bins in num_bins]
                data["action_num_bins"] = np.asarray(rows, dtype=np.int64)
        return BatchFeature(data, tensor_type=return_tensors)

    def _unnorm_keys(self, unnorm_key: str | Sequence[str] | None, batch: int) -> list[str | None]:
        """One key per row."""
        if unnorm_key is None or isinstance(unnorm_key, str):
            return [unnorm_key] * batch
        if len(unnorm_key) != batch:
            raise ValueError(f"`unnorm_key` ({len(unnorm_key)}) must be one key, or one for each of {batch} rows.")
        return list(unnorm_key)

    def _states(self, proprio: Any, batch: int) -> list[Any]:
        """One state per row, None where the prompt tells none."""
        if proprio is None:
            return [None] * batch
        if isinstance(proprio, torch.Tensor):
            proprio = proprio.detach().cpu().numpy()
        states = [proprio] if np.ndim(proprio[0]) == 0 else list(proprio)
        if len(states) != batch:
            raise ValueError(f"`proprio` ({len(states)}) must have one state for each of {batch} rows.")
        return states

    def _text(self, instruction: str, proprio: Any, unnorm_key: str | None) -> str:
        """Text of a prompt up to the image."""
        text = TRAINING_TEXT.format(instruction=instruction)
        if not self.use_proprio:
            if proprio is not None:
                raise ValueError("`proprio` is given, but this model takes none (`use_proprio` is False).")
            return text
        if proprio is None:
            raise ValueError("`proprio` must be given: this model reads the robot's state (`use_proprio` is True).")
        state = self.proprio_tokenizer(unnorm_key).encode(proprio)
        return text.removesuffix(INSTRUCTION_END) + STATE_TEXT.format(state=state) + INSTRUCTION_END

    def _vision_inputs(self, images: Any, vision_codes: Any, image_kwargs: dict[str, Any]) -> dict[str, NDArray[Any]]:
        if (images is None) == (vision_codes is None):
            given = "neither" if images is None else "both"
            raise ValueError(f"exactly one of `images` and `vision_codes` must be given, got {given}.")
        if vision_codes is None:
            return {"pixel_values": self.image_processor(split_batch(images), **image_kwargs)["pixel_values"]}
        if image_kwargs:
            raise ValueError(f"unknown arguments with `vision_codes`: {sorted(image_kwargs)}.")
        shape = tuple(np.shape(vision_codes))
        if len(shape) not in (1, 2) or shape[-1] != self.num_image_tokens:
            raise ValueError(f"`vision_codes` must have shape (batch, {self.num_image_tokens}), got {shape}.")
        codes = _codes("vision_codes", vision_codes, self.end_of_vision_id - 1)
        return {"vision_codes": np.asarray(codes, dtype=np.int64).reshape(-1, self.num_image_tokens)}

    def _prompt_ids(self, texts: list[str], target: str, padding: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(batch, sequence) ids and mask: left-padded prompt, image placeholders, end of vision, start of the target."""
        prompts = [self._text_ids(PROMPT_START + text + PROMPT_END)[-self.max_text_length :] for text in texts]
        width = self.max_text_length if padding == "max_length" else max(map(len, prompts))
        image = [self.vision_offset] * self.num_image_tokens + [self.vision_offset + self.end_of_vision_id]
        tail = image + self.prompt_tails[target]
        pad = self.tokenizer.pad_token_id
        ids = [[pad] * (width - len(prompt)) + prompt + tail for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * (len(prompt) + len(tail)) for prompt in prompts]
        return np.asarray(ids, dtype=np.int64), np.asarray(mask, dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        # What is remembered is no part of a processor: a copy, or a hash of its pickle, must not depend on it.
        return {**self.__dict__, "_ids_of_texts": {}, "_remembered_tokenizer": 0}

    def _text_ids(self, text: str) -> list[int]:
        if self._remembered_tokenizer != id(self.tokenizer) or len(self._ids_of_texts) >= MAX_REMEMBERED_TEXTS:
            self._ids_of_texts, self._remembered_tokenizer = {}, id(self.tokenizer)
        if text not in self._ids_of_texts:
            self._ids_of_texts[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(self._ids_of_texts[text])

    @staticmethod
    def _checked_target(target: str) -> str:
        if target not in TARGETS:
            raise ValueError(f'`target` must be "latent" or "action", got {target!r}.')
        return target

    def encode_example(
        self,
        instruction: str,
        vision_codes: ArrayLike | torch.Tensor | None = None,
        latent_action_codes: ArrayLike | torch.Tensor | None = None,
        action_tokens: ArrayLike | torch.Tensor | None = None,
        raw_instruction: bool = False,
        layout: Sequence[str] | None = None,
        max_num_frames: int | None = None,
        proprio: ArrayLike | None = None,
        unnorm_key: str | None = None,
        num_valid_steps: int | None = None,
    ) -> dict[str, list[int]]:
        """
        One training example in the published layout: bos, instruction, image, latent codes and/or action bins, eos.

        Args:
            instruction: What to do.
            vision_codes: (num_image_tokens,) or (num_frames, num_image_tokens) or that, flat. None puts placeholders of
                one image, which the model fills in from `pixel_values`.
            latent_action_codes: (num_latent_tokens,) codes of the quantizer.
            action_tokens: (action_dim,) bins, or (action_horizon, action_dim) of them. With an `unnorm_key`, as many
                dimensions as its statistics have.
            raw_instruction: Whether `instruction` is the whole text, prompt included, as in published data files.
            layout: Fields in order, out of `instruction`, `vision`, `latent`, `action`, `bos`, `eos`; a field in
                square brackets carries no loss. None means `[instruction]`, `[vision]`, then `latent` and `action`
                as far as they are given. The outer bos and eos always stand.
            max_num_frames: Most frames to keep, evenly spaced; None keeps all.
            proprio: (proprio_dim,) state of the robot in physical units, where the model takes it (`use_proprio`).
            unnorm_key: Whose action dimensions and proprio range count; None is allowed where there is at most one.
            num_valid_steps: Steps of `action_tokens` that carry a loss; the later ones, beyond the end of an episode,
                do not. All when None.

        Returns:
            `input_ids` in the one id space and `labels`, aligned with them (the model shifts), -100 where no loss is.

        Raises:
            ValueError: Codes outside their vocabulary or of the wrong count, an unknown or missing field.
        """
        if layout is None:
            layout = ["[instruction]", "[vision]"]
            layout += ["latent"] * (latent_action_codes is not None) + ["action"] * (action_tokens is not None)
        text = _instructions(instruction)[0] if isinstance(instruction, str) else _instructions([instruction])[0]
        if raw_instruction and (self.use_proprio or proprio is not None):
            raise ValueError("`raw_instruction` is a whole prompt, into which no `proprio` can be written.")
        text = text if raw_instruction else self._text(text, proprio, unnorm_key)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        input_ids, labels = [bos], [IGNORED_LABEL]
        for entry in layout:
            field = entry[1:-1] if (silent := entry.startswith("[") and entry.endswith("]")) else entry
            if field == "instruction":
                ids = self._text_ids(text)
            elif field == "vision":
                ids = self._vision_ids(vision_codes, max_num_frames, placeholder_allowed=silent)
            elif field == "latent":
                ids = self._latent_ids(latent_action_codes)
            elif field == "action":
                ids = self._action_ids(action_tokens, unnorm_key)
                if num_valid_steps is not None and not silent:
                    input_ids += ids
                    labels += self._labels_of_valid_steps(ids, num_valid_steps)
                    continue
            elif field in ("bos", "eos"):
                ids = [bos if field == "bos" else eos]
            else:
                raise ValueError(f"`layout` has field {entry!r}; accepted: {', '.join(LAYOUT_FIELDS)}, also in [].")
            input_ids += ids
            labels += [IGNORED_LABEL] * len(ids) if silent else ids
        return {"input_ids": [*input_ids, eos], "labels": [*labels, eos]}

    def _vision_ids(self, vision_codes: Any, max_num_frames: int | None, placeholder_allowed: bool) -> list[int]:
        if vision_codes is None:
            if not placeholder_allowed:
                raise ValueError("`vision_codes` must be given where `layout` puts a loss on the image.")
            vision_codes = np.zeros(self.num_image_tokens, dtype=np.int64)
        codes = _codes("vision_codes", vision_codes, self.end_of_vision_id - 1)
        if len(codes) % self.num_image_tokens:
            raise ValueError(
                f"`vision_codes` must hold a multiple of {self.num_image_tokens} (`num_image_tokens`), got {len(codes)}."
            )
        frames = np.asarray(codes).reshape(-1, self.num_image_tokens)
        if max_num_frames is not None and len(frames) > max_num_frames:
            if max_num_frames < 1:
                raise ValueError(f"`max_num_frames` must be at least 1, got {max_num_frames}.")
            frames = frames[np.linspace(0, len(frames) - 1, max_num_frames).astype(int)]
        ends = np.full((len(frames), 1), self.end_of_vision_id - 1)
        ends[-1] = self.end_of_vision_id
        image = (np.concatenate([frames, ends], axis=1) + self.vision_offset).reshape(-1).tolist()
        return [*self._text_ids("<vision>"), *image, *self._text_ids("</vision>")]

    def _latent_ids(self, latent_action_codes: Any) -> list[int]:
        if latent_action_codes is None:
            raise ValueError("`latent_action_codes` must be given for the layout field 'latent', got None.")
        codes = _codes("latent_action_codes", latent_action_codes, self.latent_vocab_size)
        if len(codes) != self.num_latent_tokens:
            raise ValueError(
                f"`latent_action_codes` must hold {self.num_latent_tokens} codes (`num_latent_tokens`), got {len(codes)}."
            )
        return [*self._text_ids("<delta>"), *(self.latent_offset + c for c in codes), *self._text_ids("</delta>")]

    def _action_ids(self, action_tokens: Any, unnorm_key: str | None) -> list[int]:
        if action_tokens is None:
            raise ValueError("`action_tokens` must be given for the layout field 'action', got None.")
        bins = _codes("action_tokens", action_tokens, self.action_vocab_size)
        action_dim = self.action_dim if unnorm_key is None else self.action_tokenizer(unnorm_key).action_dim
        # Published data files may hold several steps although the model decodes one.
        steps = self.action_horizon if self.action_horizon > 1 else len(bins) // action_dim
        if len(bins) != steps * action_dim or not bins:
            raise ValueError(
                f"`action_tokens` must hold {'a multiple of ' if self.action_horizon == 1 else f'{steps} steps of '}"
                f"{action_dim} bins (`action_dim`), got {len(bins)}."
            )
        return [*self._text_ids("<action>"), *(self.action_offset + b for b in bins), *self._text_ids("</action>")]

    def _labels_of_valid_steps(self, ids: list[int], num_valid_steps: int) -> list[int]:
        places = [place for place, token in enumerate(ids) if token >= self.action_offset]
        if not 1 <= num_valid_steps <= self.action_horizon:
            raise ValueError(f"`num_valid_steps` must lie in [1, {self.action_horizon}], got {num_valid_steps}.")
        silent = set(places[len(places) // self.action_horizon * num_valid_steps :])
        return [IGNORED_LABEL if place in silent else token for place, token in enumerate(ids)]


__all__ = ["LapaProcessor"]
