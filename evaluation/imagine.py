"""Neural rollouts: a latent-pretrained policy acts in the world that the quantizer's decoder draws.

```python
from lapa.evaluation.imagine import imagine, open_imagination

policy, world, _ = open_imagination("pretrained", "quantizer")
rollouts = imagine(policy, world, ["table.png"], ["push the red cube to the left"], steps=10)
rollouts.frames.shape, rollouts.codes.shape    # (1, 11, height, width, 3) uint8 and (1, 10, num_latent_tokens) int64
```

The policy names the codes of what should happen next, the decoder draws the frame that these codes lead to, and that frame is the
next one that both see. It is rounded to 8 bits, as the frames that they were trained on, so that what is shown is what is fed back.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lapa.configuration.configuration_lapa import LapaConfig
from lapa.data.frame_pairs import resize_frame
from lapa.modeling_lapa.modeling_lapa import LapaForLatentAction
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer, LapaQuantizerDecoder
from lapa.processing.image_processing_lapa import decode_image
from lapa.processing.processing_lapa import LapaProcessor
from lapa.training.label_latent_actions import check_has_codes, hash_weights
from lapa.training.lineage import check_quantizer
from lapa.training.pair_conditions import hash_instruction
from lapa.training.script_tools import check_checkpoint

Frame = NDArray[np.uint8]
# What was found out about whose codes the policy speaks.
SAME, UNRECORDED, OTHER = "same", "unrecorded", "other"


class World(Protocol):
    """Draws what follows from a frame and codes."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its frames."""

    def next_frames(self, frames: Frame, codes: NDArray[np.int64], instructions: Sequence[str]) -> Frame:
        """Frames (batch, height, width, 3) uint8 after `frames`, of the same shape, by codes (batch, num_latent_tokens)."""


class LatentPolicy(Protocol):
    """Names the codes of what should happen next."""

    def codes(
        self, images: Sequence[Frame], instructions: Sequence[str]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Codes (batch, num_latent_tokens) and the probability of each before temperature, of the same shape."""


class QuantizerWorld:
    """
    A quantizer as a [`World`].

    Args:
        quantizer: Whole, or its decoder alone.
    """

    def __init__(self, quantizer: LapaQuantizer | LapaQuantizerDecoder) -> None:
        check_has_codes(quantizer.config)
        self.quantizer = quantizer.eval()

    @property
    def size(self) -> tuple[int, int]:
        """See [`World`]."""
        height, width = self.quantizer.config.image_height_width
        return height, width

    def to_pixels(self, frames: Frame) -> torch.Tensor:
        """(..., height, width, 3) uint8 -> (..., 3, height, width) float in [0, 1], where the quantizer is."""
        parameter = next(self.quantizer.parameters())
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).to(parameter.device)
        return pixels.to(parameter.dtype) / 255

    @torch.inference_mode()
    def next_frames(self, frames: Frame, codes: NDArray[np.int64], instructions: Sequence[str]) -> Frame:
        """See [`World`]; drawn values are clipped to [0, 1] and rounded to 8 bits."""
        # Of a whole quantizer `forward` is another function.
        decoder: Any = self.quantizer
        decode = decoder.decode if isinstance(decoder, LapaQuantizer) else decoder
        pixels = self.to_pixels(frames)
        told = torch.from_numpy(np.ascontiguousarray(codes)).to(pixels.device)
        drawn = decode(pixels, told, instruction_ids=self._instruction_ids(instructions, pixels.device))
        levels = (drawn.float().clamp(0, 1) * 255).round().to(torch.uint8)
        return np.asarray(levels.movedim(-3, -1).cpu().numpy())

    def _instruction_ids(self, instructions: Sequence[str], device: torch.device) -> torch.Tensor | None:
        vocab_size = self.quantizer.config.instruction_vocab_size
        if vocab_size is None:
            return None
        words = [hash_instruction(instruction, vocab_size) for instruction in instructions]
        width = max(1, *map(len, words))
        return torch.tensor([row + [0] * (width - len(row)) for row in words], device=device)

    @torch.inference_mode()
    def encode(self, pairs: Frame) -> NDArray[np.int64]:
        """Codes (batch, num_latent_tokens) of true frame pairs (batch, 2, height, width, 3) uint8; of a whole quantizer."""
        return np.asarray(self.quantizer.encode(self.to_pixels(pairs)).latent_action_codes.cpu().numpy())


class PretrainedPolicy:
    """
    A latent-pretrained model with its processor as a [`LatentPolicy`].

    Args:
        model: The model.
        processor: Its processor, which resizes pictures of any size to the policy's.
        generation: Arguments of `generate`, such as `{"do_sample": True, "temperature": 0.5}`; greedy when empty.
    """

    def __init__(self, model: LapaForLatentAction, processor: LapaProcessor, **generation: Any) -> None:
        self.model, self.processor, self.generation = model.eval(), processor, generation

    @torch.inference_mode()
    def codes(
        self, images: Sequence[Frame], instructions: Sequence[str]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See [`LatentPolicy`]."""
        inputs = self.processor(
            images=list(images),
            instruction=list(instructions),
            target="latent",
            padding="longest",
            return_tensors="pt",
        ).to(self.model.device)
        predicted: Any = self.model.predict_latent_action(return_scores=True, **inputs, **self.generation)
        codes = predicted.latent_action_codes
        chosen = predicted.scores.gather(-1, codes.unsqueeze(-1)).squeeze(-1).exp()
        return codes.cpu().numpy(), chosen.float().cpu().numpy()


@dataclass(frozen=True)
class ImaginedRollouts:
    """
    Neural rollouts of equal length.

    Args:
        frames (`NDArray`): (batch, steps + 1, height, width, 3) uint8 of the quantizer's size; the first is what was given.
        codes (`NDArray`): (batch, steps, num_latent_tokens) int64; row k leads from frame k to frame k + 1.
        probabilities (`NDArray`): What the policy gave each of these codes, before temperature; of the codes' shape.
    """

    frames: Frame
    codes: NDArray[np.int64]
    probabilities: NDArray[np.float32]


def imagine(
    policy: LatentPolicy,
    world: World,
    images: Sequence[Any],
    instructions: Sequence[str],
    steps: int,
    seed: int | None = None,
) -> ImaginedRollouts:
    """
    Neural rollouts from one image and instruction each.

    Pictures are resized to the quantizer's size as its training did (PIL's antialiased bilinear, aspect ratio not kept). The
    policy sees the given picture itself first, and then what was drawn; its processor resizes both to its own size.

    Args:
        policy: Names the codes.
        world: Draws the frames.
        images: Start pictures, of any size; see `decode_image`.
        instructions: One per picture.
        steps: Frames to draw.
        seed: Of a sampling policy's draws; they depend on which pictures are imagined together, too.

    Raises:
        ValueError: Fewer than one step, another number of instructions than of images, or what is no image.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    if not images or len(images) != len(instructions):
        raise ValueError(f"`images` ({len(images)}) and `instructions` ({len(instructions)}) must be equally many.")
    if seed is not None:
        torch.manual_seed(seed)
    seen: Sequence[Frame] = [decode_image(image) for image in images]
    frames: list[Frame] = [np.stack([resize_frame(image, world.size) for image in seen])]
    codes, probabilities = [], []
    for _ in range(steps):
        chosen, probability = policy.codes(seen, instructions)
        frames.append(world.next_frames(frames[-1], chosen, instructions))
        seen = list(frames[-1])
        codes.append(chosen)
        probabilities.append(probability)
    return ImaginedRollouts(np.stack(frames, 1), np.stack(codes, 1), np.stack(probabilities, 1))


def play_codes(world: World, first: Frame, codes: NDArray[np.int64], instructions: Sequence[str]) -> Frame:
    """
    What the world model draws when it is told codes instead of asking a policy, each frame fed back.

    Args:
        world: Draws the frames.
        first: (batch, height, width, 3) uint8.
        codes: (batch, steps, num_latent_tokens) int64.
        instructions: One per rollout.

    Returns:
        (batch, steps + 1, height, width, 3) uint8, `first` among them.
    """
    frames = [first]
    for step in range(codes.shape[1]):
        frames.append(world.next_frames(frames[-1], codes[:, step], instructions))
    return np.stack(frames, 1)


def check_pair(config: LapaConfig, quantizer: str | Path, allow_mismatch: bool = False) -> str:
    """
    Refuses a quantizer whose codes are not those that a policy learned.

    Args:
        config: Of the policy.
        quantizer: Folder of the quantizer.
        allow_mismatch: Whether another quantizer is accepted, as long as number and range of the codes fit.

    Returns:
        `same`, `unrecorded` where the policy does not say whose codes it learned, or `other`.

    Raises:
        ValueError: Another quantizer, without `allow_mismatch`; another codebook size or number of tokens.
    """
    sizes = copy.deepcopy(config)
    sizes.quantizer_hash = None
    check_quantizer(sizes, quantizer)
    if config.quantizer_hash is None:
        return UNRECORDED
    if config.quantizer_hash == hash_weights(quantizer):
        return SAME
    if allow_mismatch:
        return OTHER
    try:
        check_quantizer(config, quantizer)
    except ValueError as error:
        raise ValueError(f"{error} `allow_mismatch` draws with it all the same.") from error
    raise AssertionError("two checks of one hash differ")


def open_imagination(
    model: str,
    quantizer: str,
    allow_mismatch: bool = False,
    device: str | None = None,
    whole_quantizer: bool = False,
    **generation: Any,
) -> tuple[PretrainedPolicy, QuantizerWorld, str]:
    """
    Loads a latent-pretrained policy and the quantizer whose codes it speaks.

    Args:
        model: Folder of the policy.
        quantizer: Folder of the quantizer.
        allow_mismatch: See `check_pair`.
        device: Where both run; a GPU if there is one.
        whole_quantizer: Whether true pairs are to be encoded, too; the decoder alone is half as large.
        generation: Of the policy; see `sampling_options`.

    Returns:
        Policy, world, and what `check_pair` found.

    Raises:
        ValueError: Folders of another kind, a policy whose latent head is retired, a pair that does not belong together.
    """
    check_checkpoint(model, "lapa")
    check_checkpoint(quantizer, "lapa_quantizer", "quantizer")
    config = LapaConfig.from_pretrained(model)
    if config.has_action_segment and not config.keep_latent_head:
        origin = f" ({config.latent_policy_name})" if config.latent_policy_name else ""
        raise ValueError(
            f"`model` ({model}) was finetuned on actions and its latent head is retired: name the latent-pretrained model "
            f"that it came from{origin}, or one that was finetuned with `keep_latent_head`."
        )
    pairing = check_pair(config, quantizer, allow_mismatch)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loader = LapaQuantizer if whole_quantizer else LapaQuantizerDecoder
    world = QuantizerWorld(loader.from_pretrained(quantizer).to(device))
    policy = LapaForLatentAction.from_pretrained(model).to(device)
    return PretrainedPolicy(policy, LapaProcessor.from_pretrained(model), **generation), world, pairing


def sampling_options(do_sample: bool, temperature: float | None, top_k: int | None) -> dict[str, Any]:
    """
    Arguments of `generate`, checked.

    Raises:
        ValueError: Options of sampling without `do_sample`, or out of their range.
    """
    for name, value in (("temperature", temperature), ("top_k", top_k)):
        if value is not None and not do_sample:
            raise ValueError(f"`{name}` needs `do_sample`: without it codes are chosen greedily.")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
    return {"do_sample": True, "temperature": temperature or 1.0, "top_k": top_k or 0} if do_sample else {}


__all__ = [
    "OTHER",
    "SAME",
    "UNRECORDED",
    "ImaginedRollouts",
    "LatentPolicy",
    "PretrainedPolicy",
    "QuantizerWorld",
    "World",
    "check_pair",
    "imagine",
    "open_imagination",
    "play_codes",
    "sampling_options",
]
