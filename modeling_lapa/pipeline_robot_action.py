"""The `robot-action` pipeline: an image and an instruction to an action, or to latent action codes."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import GenerationConfig
from transformers.image_utils import load_image
from transformers.pipelines.base import Pipeline

# What each model predicts. By name, because a folder with remote code has its own copies of the classes.
TARGET_OF_CLASS = {"LapaForLatentAction": "latent", "LapaForActionPrediction": "action"}
PROCESSOR_PARAMETERS = ("unnorm_key", "target", "padding", "do_center_crop", "center_crop_scale")
INPUT_KEYS = ("image", "instruction")
OPTIONAL_INPUT_KEYS = ("proprio",)
DECODING_PARAMETERS = ("decode", "return_log_probs")
# The number of tokens follows from the model, and the scores are those of one sequence per input.
FIXED_GENERATION_PARAMETERS = {
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences",
    "output_logits", "output_scores", "return_dict_in_generate",
}  # fmt: skip
GENERATION_PARAMETERS = {key for key in vars(GenerationConfig()) if not key.startswith("_")}
NOT_BATCHES = (str, bytes, Mapping, Image.Image, np.ndarray, torch.Tensor)


class RobotAction(TypedDict, total=False):
    """
    What a policy gives.

    Args:
        type: `"action"`, or `"action_tokens"` with `decode=False`, when `action` and `unnorm_key` are absent.
        action: (action_dim,) float32, physical units of the data named by `unnorm_key`; (action_horizon, action_dim)
            from a policy that predicts chunks.
        action_tokens: `action_dim` bin indices; a list of them per step of a chunk.
        scores: Probability of each of the tokens, nested as they are.
        unnorm_key: Whose bins decoded the action.
        log_probs: (action_dim, action_vocab_size) float32, with `return_log_probs=True`; the steps of a chunk stand
            behind each other.
    """

    type: Literal["action", "action_tokens"]
    action: NDArray[np.float32]
    action_tokens: list[int] | list[list[int]]
    scores: list[float] | list[list[float]]
    unnorm_key: str
    log_probs: NDArray[np.float32]


class LatentAction(TypedDict, total=False):
    """
    What a latent model gives: codes of its quantizer, which no robot can execute.

    Args:
        type: `"latent_action"`.
        latent_action_codes: `num_latent_tokens` codes.
        scores: Probability of each of the codes.
        log_probs: (num_latent_tokens, latent_vocab_size) float32, with `return_log_probs=True`.
    """

    type: Literal["latent_action"]
    latent_action_codes: list[int]
    scores: list[float]
    log_probs: NDArray[np.float32]


class RobotActionPipeline(Pipeline):
    r"""
    Predicts what a robot should do from a camera image and an instruction.

    ```python
    >>> from transformers import pipeline
    >>> policy = pipeline("robot-action", model="path/to/policy")
    >>> policy({"image": "camera.jpg", "instruction": "put the carrot on the plate"})
    {'type': 'action', 'action': array([0.01, ...], dtype=float32), 'action_tokens': [131, ...],
     'scores': [0.31, ...], 'unnorm_key': 'bridge'}
    >>> policy("camera.jpg", instruction="put the carrot on the plate")  # the same
    >>> policy([{"image": ..., "instruction": ...}, ...], batch_size=8)  # a list gives a list, a generator an iterator
    ```

    An input of a policy that reads the robot's state (`use_proprio`) also has `"proprio"`, a vector in physical units.
    A policy returns a `RobotAction`, a latent-pretrained model a `LatentAction`; only the former has a key `action`.

    Parameters, of the pipeline or of one call:
        unnorm_key (`str`, *optional*): Whose action statistics decode the bins; needed where there are several.
        decode (`bool`, defaults to `True`): Whether a policy returns actions; False gives its tokens alone.
        return_log_probs (`bool`, defaults to `False`): Whether to add the log-probabilities of the whole segment.
        target (`str`, *optional*): `"latent"` asks a policy that kept its latent head for codes.
        padding (`str`, *optional*): `"longest"` leaves out the published padding to `max_text_length`.
        do_center_crop (`bool`), center_crop_scale (`float`): See the image processor.
        do_sample, temperature, top_k, top_p, ...: Arguments of `generate`; greedy by default.
    """

    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_feature_extractor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        names = [base.__name__ for base in type(self.model).__mro__]
        targets = [TARGET_OF_CLASS[name] for name in names if name in TARGET_OF_CLASS]
        if not targets:
            raise ValueError(
                f"`model` must be one of {', '.join(TARGET_OF_CLASS)}, got {names[0]}. "
                "Of a model wrapped by peft, pass `model.get_base_model()` or the merged model."
            )
        if self.processor is None:
            raise ValueError("`processor` must be given with a model that is already loaded.")
        self.model_target = targets[0]

    def __call__(self, inputs: Any = None, instruction: Any = None, image: Any = None, **kwargs: Any) -> Any:
        """
        Predicts.

        Args:
            inputs: `{"image": ..., "instruction": ...}`, a list of these, an iterable of these (gives an iterator), or
                one image or a list of images that go with `instruction`. An image is a PIL image, an array, a path, a
                URL or a base64 string.
            instruction: One instruction, or one per image, where `inputs` are images.
            image: The same as `inputs`, by name.
            kwargs: Parameters of the class docstring, and `batch_size`, `num_workers`.

        Returns:
            One `RobotAction` or `LatentAction`, a list, or an iterator.

        Raises:
            ValueError: An input that does not fit, named with what is accepted.
        """
        if image is not None:
            if inputs is not None:
                raise ValueError("`inputs` and `image` are both given; accepted: one of them.")
            inputs = image
        if instruction is not None:
            inputs = _join(inputs, instruction)
        elif image is not None:
            raise ValueError("`instruction` must be given with `image`.")
        elif isinstance(inputs, Iterable) and not isinstance(inputs, (*NOT_BATCHES, list)):
            # The base class takes generators, but not other iterables (a `datasets.Dataset`, a tuple).
            inputs = list(inputs) if isinstance(inputs, tuple) else _iterate(inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        fixed = sorted(FIXED_GENERATION_PARAMETERS & parameters.keys())
        if fixed:
            raise ValueError(f"`{fixed[0]}` cannot be set: the model gives a fixed number of tokens for each input.")
        known = (*PROCESSOR_PARAMETERS, *DECODING_PARAMETERS)
        unknown = sorted(parameters.keys() - set(known) - GENERATION_PARAMETERS)
        if unknown:
            raise ValueError(f"`{unknown[0]}` is unknown; accepted: {', '.join(known)} and arguments of `generate`.")
        decoding: dict[str, Any] = {key: parameters.pop(key) for key in DECODING_PARAMETERS if key in parameters}
        preprocess: dict[str, Any] = {key: parameters.pop(key) for key in PROCESSOR_PARAMETERS if key in parameters}
        shared: dict[str, Any] = {key: preprocess[key] for key in ("target", "unnorm_key") if key in preprocess}
        forward = {**parameters, **({"target": shared["target"]} if "target" in shared else {})}
        if "return_log_probs" in decoding:
            forward["return_log_probs"] = decoding.pop("return_log_probs")
        return {**preprocess, **decoding}, forward, {**shared, **decoding}

    def preprocess(
        self,
        inputs: Any,
        unnorm_key: str | None = None,
        target: str | None = None,
        decode: bool = True,
        **processor_kwargs: Any,
    ) -> dict[str, Any]:
        """One `{"image", "instruction"}` to the model's inputs, batch of 1; checks that its output can be decoded."""
        if not isinstance(inputs, Mapping):
            raise ValueError(
                f'an input must be {{"image": ..., "instruction": ...}} (or an image with `instruction=`), got '
                f"{type(inputs).__name__}."
            )
        unknown = [str(key) for key in inputs if key not in (*INPUT_KEYS, *OPTIONAL_INPUT_KEYS)]
        if unknown:
            accepted = ", ".join((*INPUT_KEYS, *OPTIONAL_INPUT_KEYS))
            raise ValueError(f"`{unknown[0]}` is unknown in an input; accepted: {accepted}.")
        missing = [key for key in INPUT_KEYS if inputs.get(key) is None]
        if missing:
            raise ValueError(f"`{missing[0]}` is missing from an input with the keys {list(map(str, inputs))}.")
        target = target or self.model_target
        if target == "action":
            # Also without decoding, as known bins keep the model from choosing a bin that a dimension lacks.
            unnorm_key = self._checked_unnorm_key(unnorm_key) if decode else unnorm_key
        elif unnorm_key is not None:
            raise ValueError(f"`unnorm_key` ({unnorm_key!r}) decodes actions, and this model gives latent codes.")
        images = [_load_image(inputs["image"])]
        features = self.processor(
            images=images,
            instruction=inputs["instruction"],
            target=target,
            unnorm_key=unnorm_key,
            proprio=inputs.get("proprio"),
            return_tensors="pt",
            **processor_kwargs,
        )
        return dict(features)

    def _checked_unnorm_key(self, unnorm_key: str | None) -> str:
        known = sorted(self.processor.action_statistics)
        if not known:
            raise ValueError(
                "this policy has no action statistics, so its tokens cannot become actions. Add them with "
                "`processor.fit_actions(actions, unnorm_key=...)` or `processor.load_action_csv(path, unnorm_key=...)`"
                " and `processor.save_pretrained(folder)`, or ask for the tokens alone with `decode=False`."
            )
        self.processor.action_tokenizer(unnorm_key)  # raises for an unknown key, and for None among several
        return known[0] if unnorm_key is None else unnorm_key

    def _forward(
        self,
        model_inputs: dict[str, Any],
        target: str | None = None,
        return_log_probs: bool = False,
        **generation: Any,
    ) -> dict[str, torch.Tensor]:
        """Tokens (batch, [steps,] num_tokens), probabilities so, and on request log-probabilities of the whole segment."""
        if (target or self.model_target) == "latent":
            prediction = self.model.predict_latent_action(**model_inputs, return_scores=True, **generation)
            tokens = prediction.latent_action_codes
        else:
            if self.model_target == "latent":
                raise ValueError('`target` is "action", but this is a latent model: it has no action head.')
            prediction = self.model.predict_action_tokens(**model_inputs, return_scores=True, **generation)
            tokens = prediction.action_tokens
        chosen = prediction.scores.gather(-1, tokens.flatten(1).unsqueeze(-1)).squeeze(-1)
        outputs = {"tokens": tokens, "probabilities": chosen.exp().view(tokens.shape)}
        return {**outputs, "log_probs": prediction.scores} if return_log_probs else outputs

    def postprocess(
        self,
        model_outputs: dict[str, torch.Tensor],
        unnorm_key: str | None = None,
        target: str | None = None,
        decode: bool = True,
    ) -> RobotAction | LatentAction:
        """Batch of 1 to a typed result."""
        tokens = model_outputs["tokens"][0].tolist()
        scores: dict[str, Any] = {"scores": model_outputs["probabilities"][0].tolist()}
        if "log_probs" in model_outputs:
            scores["log_probs"] = model_outputs["log_probs"][0].float().numpy()
        if (target or self.model_target) == "latent":
            return cast(LatentAction, {"type": "latent_action", "latent_action_codes": tokens, **scores})
        if not decode:
            return cast(RobotAction, {"type": "action_tokens", "action_tokens": tokens, **scores})
        unnorm_key = self._checked_unnorm_key(unnorm_key)
        action = self.processor.decode_actions(np.asarray([tokens]), unnorm_key=unnorm_key)[0]
        result = {"type": "action", "action": action, "action_tokens": tokens, **scores, "unnorm_key": unnorm_key}
        return cast(RobotAction, result)


def _iterate(inputs: Iterable[Any]) -> Iterator[Any]:
    yield from inputs


def _join(images: Any, instruction: Any) -> dict[str, Any] | list[dict[str, Any]]:
    """Images and instructions to inputs of the pipeline; one instruction may serve several images."""
    if images is None or isinstance(images, Mapping):
        raise ValueError("`instruction` goes with an image or a list of images, given first or as `image`.")
    if not isinstance(images, (list, tuple)):
        if not isinstance(instruction, str):
            raise ValueError(f"`instruction` must be a string for one image, got {type(instruction).__name__}.")
        return {"image": images, "instruction": instruction}
    texts = [instruction] * len(images) if isinstance(instruction, str) else list(instruction)
    if len(texts) != len(images):
        raise ValueError(f"`instruction` ({len(texts)}) and the images ({len(images)}) must be equally many.")
    return [{"image": one, "instruction": text} for one, text in zip(images, texts)]


def _load_image(image: Any) -> Any:
    """Fetches a URL and decodes base64; anything else is the image processor's to read."""
    if not isinstance(image, str) or os.path.isfile(image):
        return image
    try:
        return load_image(image)
    # The network, the decoder and PIL have errors of their own, all of which mean the same to the user.
    except Exception as error:
        shown = image if len(image) <= 80 else f"{image[:77]}..."
        raise ValueError(
            f"`image` {shown!r} is no path of a file, no URL that gives an image and no base64 of one "
            f"({type(error).__name__})."
        ) from error


__all__ = ["LatentAction", "RobotAction", "RobotActionPipeline"]
