"""Single steps with an instruction and a target (latent action codes, an action, or both): what the policy learns from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import ConcatDataset, Dataset

from lapa.processing.image_augmentation_lapa import LapaImageAugmentation
from lapa.processing.processing_lapa import LapaProcessor

COLUMNS = (
    "images", "vision_codes", "latent_action_codes", "actions", "action_tokens", "num_valid_steps", "proprio",
    "example_ids",
)  # fmt: skip


def action_windows(
    actions: ArrayLike, episode_ids: Sequence[Any], action_horizon: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """
    The actions of the next steps, for each step of episodes that stand behind each other.

    Args:
        actions: (num_steps, action_dim), physical units.
        episode_ids: Of which episode each step is.
        action_horizon: Steps of a window.

    Returns:
        (num_steps, action_horizon, action_dim) float32 and (num_steps,) int64, how many of a window's steps lie inside the
        episode. The others repeat its last action.
    """
    values = np.asarray(actions, dtype=np.float32)
    if values.ndim != 2 or len(values) != len(episode_ids):
        raise ValueError(f"`actions` must be ({len(episode_ids)}, action_dim), got {values.shape}.")
    starts = [step for step, name in enumerate(episode_ids) if step == 0 or name != episode_ids[step - 1]]
    lengths = np.diff([*starts, len(values)])
    last = np.repeat(np.asarray(starts, dtype=np.int64) + lengths - 1, lengths)
    steps = np.arange(len(values))[:, None] + np.arange(action_horizon)
    valid = np.minimum(last - np.arange(len(values)) + 1, action_horizon)
    return values[np.minimum(steps, last[:, None])], valid.astype(np.int64)


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
        actions: (num_steps, action_dim) in physical units, tokenized with the bins of `unnorm_key`; for a processor with an
            `action_horizon` above 1 (num_steps, action_horizon, action_dim), see `action_windows`.
        action_tokens: Bins of the same shape, instead of `actions`.
        num_valid_steps: (num_steps,) integers, steps of each chunk that lie inside its episode; the others carry no loss.
        proprio: (num_steps, proprio_dim) state of the robot in physical units, where the processor takes it.
        unnorm_key: Which statistics; None is allowed where the processor has exactly one set. For several embodiments
            concatenate one data set for each (`torch.utils.data.ConcatDataset`).
        example_ids: Names of the steps, for reports; their index by default.
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
        num_valid_steps: ArrayLike | None = None,
        proprio: ArrayLike | None = None,
        unnorm_key: str | None = None,
        example_ids: Sequence[str] | None = None,
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
        self.num_valid_steps = None if num_valid_steps is None else np.asarray(num_valid_steps, dtype=np.int64)
        self.proprio = None if proprio is None else np.asarray(proprio, dtype=np.float32)
        if self.proprio is not None:
            processor.proprio_tokenizer(unnorm_key).levels(self.proprio)  # refuses what no example could be made of
        self.example_ids = example_ids
        self.unnorm_key = unnorm_key
        self.raw_instruction = raw_instruction
        self.augmentation = augmentation
        self.seed, self.epoch = seed, 0
        self._cache: dict[int, dict[str, Any]] | None = {} if cache else None
        for name in COLUMNS:
            column = getattr(self, name)
            if column is not None and len(column) != len(self.instructions):
                raise ValueError(f"`{name}` has {len(column)} rows for {len(self.instructions)} instructions.")

    def __len__(self) -> int:
        return len(self.instructions)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """
        Returns:
            `input_ids` and `labels` (sequence,) int64; `pixel_values` (3, height, width) float32 in [-1, 1] where there
            are images (vision codes stand in the ids); `action` ([action_horizon,] action_dim) float32 where physical
            actions are known; `unnorm_key` where it was given; `example_id`.
        """
        if self._cache is not None and item in self._cache:
            return self._cache[item]
        encoded = self.processor.encode_example(
            self.instructions[item],
            vision_codes=None if self.vision_codes is None else self.vision_codes[item],
            latent_action_codes=None if self.latent_action_codes is None else self.latent_action_codes[item],
            action_tokens=None if self.action_tokens is None else self.action_tokens[item],
            raw_instruction=self.raw_instruction,
            proprio=None if self.proprio is None else self.proprio[item],
            unnorm_key=self.unnorm_key,
            num_valid_steps=None if self.num_valid_steps is None else int(self.num_valid_steps[item]),
        )
        example: dict[str, Any] = {name: np.asarray(ids, dtype=np.int64) for name, ids in encoded.items()}
        if self.images is not None:
            example["pixel_values"] = self._pixel_values(item)
        if self.actions is not None:
            example["action"] = self.actions[item]
        if self.unnorm_key is not None and self.action_tokens is not None:
            example["unnorm_key"] = self.unnorm_key
        example["example_id"] = f"example {item}" if self.example_ids is None else self.example_ids[item]
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


def labelled_parts(dataset: Any) -> list[LabelledStepDataset]:
    """The `LabelledStepDataset`s that a data set is or is concatenated from; none where it is neither."""
    if isinstance(dataset, ConcatDataset):
        return [part for child in dataset.datasets for part in labelled_parts(child)]
    return [dataset] if isinstance(dataset, LabelledStepDataset) else []


__all__ = ["LabelledStepDataset", "action_windows", "labelled_parts"]
