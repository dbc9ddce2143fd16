"""Single steps with an instruction and a target (latent action codes, an action, or both): what the policy learns from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from lapa.processing.image_augmentation_lapa import LapaImageAugmentation
from lapa.processing.processing_lapa import LapaProcessor


class LabelledStepDataset(Dataset[dict[str, Any]]):
    r"""
    Training examples of stages 2 and 3, encoded by the processor when they are read.

    ```python
    >>> LabelledStepDataset(processor, ["push the block"], images=[image], latent_action_codes=[[3, 0, 1, 7]])[0]
    {'input_ids': array([...]), 'labels': array([...]), 'pixel_values': array([...])}
    ```

    Args:
        processor: Encodes the examples, and holds the bins of the actions.
        instructions: What to do, one per step.
        images: One image per step, as the image processor accepts them. Exactly one of `images` and `vision_codes`.
        vision_codes: (num_steps, num_image_tokens) integer codes of the vision tokenizer, computed beforehand: the
            frozen tokenizer then does not run in training.
        latent_action_codes: (num_steps, num_latent_tokens) integer codes of the quantizer.
        actions: (num_steps, action_dim) in physical units, tokenized with the bins of `unnorm_key`.
        action_tokens: (num_steps, action_dim) bins, instead of `actions`.
        unnorm_key: Which bins; None is allowed where the processor has exactly one set.
        raw_instruction: Whether instructions are whole prompts, as in published data files.
        augmentation: Changes each image before the image processor sees it, whose center crop is then left out. What an
            image gets depends on `seed`, the epoch (`start_epoch`) and its index only, so that a resumed run sees the same.
        seed: Of the augmentation.
        cache: Whether encoded examples are kept. Worth it for small data sets that are read many times.

    Raises:
        ValueError: Columns of unequal length, neither or both of `images` and `vision_codes`, no target, actions that
            are not finite.
    """

    def __init__(
        self,
        processor: LapaProcessor,
        instructions: Sequence[str],
        images: Sequence[Any] | NDArray[np.uint8] | None = None,
        vision_codes: ArrayLike | None = None,
        latent_action_codes: ArrayLike | None = None,
        actions: ArrayLike | None = None,
        action_tokens: ArrayLike | None = None,
        unnorm_key: str | None = None,
        raw_instruction: bool = False,
        augmentation: LapaImageAugmentation | None = None,
        seed: int = 0,
        cache: bool = False,
    ) -> None:
        if (images is None) == (vision_codes is None):
            given = "neither" if images is None else "both"
            raise ValueError(f"exactly one of `images` and `vision_codes` must be given, got {given}.")
        if latent_action_codes is None and actions is None and action_tokens is None:
            raise ValueError("one of `latent_action_codes`, `actions` and `action_tokens` must be given.")
        if augmentation is not None and (images is None or cache):
            raise ValueError("`augmentation` needs `images`, and `cache=False`.")
        self.processor = processor
        self.instructions = list(instructions)
        self.images = images
        self.vision_codes = None if vision_codes is None else np.asarray(vision_codes)
        self.latent_action_codes = None if latent_action_codes is None else np.asarray(latent_action_codes)
        self.actions = None if actions is None else np.asarray(actions, dtype=np.float32)
        if action_tokens is None and self.actions is not None:
            action_tokens = processor.encode_actions(self.actions, unnorm_key)
        self.action_tokens = None if action_tokens is None else np.asarray(action_tokens)
        self.unnorm_key = unnorm_key
        self.raw_instruction = raw_instruction
        self.augmentation = augmentation
        self.seed, self.epoch = seed, 0
        self._cache: dict[int, dict[str, Any]] | None = {} if cache else None
        for name in ("images", "vision_codes", "latent_action_codes", "actions", "action_tokens"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.instructions):
                raise ValueError(f"`{name}` has {len(column)} rows for {len(self.instructions)} instructions.")

    def __len__(self) -> int:
        return len(self.instructions)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """
        Returns:
            `input_ids` and `labels` (sequence,) int64; `pixel_values` (3, height, width) float32 in [-1, 1] where there
            are images (vision codes stand in the ids); `action` (action_dim,) float32 where physical actions are known.
        """
        if self._cache is not None and item in self._cache:
            return self._cache[item]
        encoded = self.processor.encode_example(
            self.instructions[item],
            vision_codes=None if self.vision_codes is None else self.vision_codes[item],
            latent_action_codes=None if self.latent_action_codes is None else self.latent_action_codes[item],
            action_tokens=None if self.action_tokens is None else self.action_tokens[item],
            raw_instruction=self.raw_instruction,
        )
        example: dict[str, Any] = {name: np.asarray(ids, dtype=np.int64) for name, ids in encoded.items()}
        if self.images is not None:
            example["pixel_values"] = self._pixel_values(item)
        if self.actions is not None:
            example["action"] = self.actions[item]
        if self._cache is not None:
            self._cache[item] = example
        return example

    # Not `set_epoch`: accelerate calls that by itself, and after a resume with the wrong epoch.
    def start_epoch(self, epoch: int) -> None:
        """Draws other augmentations from now on; the trainers call it."""
        self.epoch = epoch

    def _pixel_values(self, item: int) -> NDArray[np.float32]:
        assert self.images is not None
        image, options = self.images[item], {}
        if self.augmentation is not None:
            image = self.augmentation(image, np.random.default_rng((self.seed, self.epoch, item)))
            options = {"do_center_crop": False}
        return np.asarray(self.processor.image_processor(image, **options)["pixel_values"][0])


__all__ = ["LabelledStepDataset"]
