"""Pairs of frames a fixed gap apart: what the quantizer learns from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

Frames = Sequence[NDArray[np.uint8]] | NDArray[np.uint8]


def _checked_frame(frame: Any, size: tuple[int, int] | None, where: str) -> NDArray[np.uint8]:
    """One frame as (height, width, 3) uint8, resized where it has another size."""
    array = np.asarray(frame)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"{where} must be a (height, width, 3) uint8 frame, got {array.dtype} of shape {array.shape}."
        )
    if size is not None and array.shape[:2] != size:
        # PIL's antialiased bilinear resize, without keeping the aspect ratio, is what the published code trains on.
        array = np.asarray(Image.fromarray(array).resize(size[::-1], Image.Resampling.BILINEAR))
    return array


def episode_pairs(num_frames: int, frame_gap: int) -> NDArray[np.int64]:
    """
    Steps (num_pairs, 2) of all pairs of an episode: `(t, t + frame_gap)`, never clamped to the last frame.

    A clip no longer than the gap has none.
    """
    if frame_gap < 1:
        raise ValueError(f"`frame_gap` must be at least 1 frame, got {frame_gap}.")
    first = np.arange(max(num_frames - frame_gap, 0), dtype=np.int64)
    return np.stack([first, first + frame_gap], axis=1)


class FramePairDataset(Dataset[dict[str, torch.Tensor]]):
    r"""
    Every pair of frames that lies `frame_gap` apart inside one episode, in order.

    ```python
    >>> dataset = FramePairDataset([np.zeros((5, 64, 64, 3), np.uint8)], frame_gap=2)
    >>> len(dataset), dataset[0]["frames"].shape
    (3, torch.Size([2, 3, 64, 64]))
    ```

    Args:
        episodes: Sequences of frames (num_frames, height, width, 3) uint8 RGB, arrays or anything that gives a frame
            by index (a camera of an `Episode` decodes it then).
        frame_gap: Frames between the two; one number, or one per episode.
        image_size: Size of the frames that come out, one number or (height, width); None leaves them.

    Raises:
        ValueError: A gap below one, or no pair at all.
    """

    def __init__(
        self,
        episodes: Sequence[Frames],
        frame_gap: int | Sequence[int],
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        self.episodes = episodes
        gaps = [frame_gap] * len(episodes) if isinstance(frame_gap, int) else list(frame_gap)
        if len(gaps) != len(episodes):
            raise ValueError(f"`frame_gap` has {len(gaps)} entries for {len(episodes)} episodes.")
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size = None if size is None else (int(size[0]), int(size[1]))
        pairs = [episode_pairs(len(frames), gap) for frames, gap in zip(episodes, gaps)]
        counts = [len(steps) for steps in pairs]
        self.num_short_episodes = counts.count(0)
        if not sum(counts):
            raise ValueError(
                f"`episodes` hold no pair of frames: {len(episodes)} episodes, none longer than its `frame_gap` "
                f"({min(gaps, default=None)} at least)."
            )
        # (num_pairs, 3): episode, first step, second step.
        self.index = np.concatenate([np.repeat(np.arange(len(pairs)), counts)[:, None], np.concatenate(pairs)], axis=1)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        """`frames` (2, 3, height, width) uint8, first and second frame."""
        episode, *steps = (int(value) for value in self.index[item])
        frames = self.episodes[episode]
        pair = [_checked_frame(frames[step], self.image_size, f"frame {step} of episode {episode}") for step in steps]
        return {"frames": torch.from_numpy(np.stack(pair)).permute(0, 3, 1, 2)}


class FramePairCollator:
    r"""
    Batches pairs for the quantizer.

    ```python
    >>> FramePairCollator()([{"frames": torch.full((2, 3, 1, 1), 255, dtype=torch.uint8)}])
    {'pixel_values': tensor([[[[[1.]], ...]]])}     # (batch, 2, 3, height, width) float32 in [0, 1]
    ```
    """

    def __call__(self, examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """
        Args:
            examples: Each with `frames` (2, 3, height, width) uint8.

        Returns:
            `pixel_values` (batch, 2, 3, height, width) float32 in [0, 1].

        Raises:
            ValueError: Frames of unequal sizes.
        """
        frames = [example["frames"] for example in examples]
        if len({tuple(pair.shape) for pair in frames}) > 1:
            sizes = sorted({tuple(pair.shape[-2:]) for pair in frames})
            raise ValueError(f"frames have different sizes {sizes}: give the data set an `image_size`.")
        return {"pixel_values": torch.stack(frames).contiguous().float() / 255}


__all__ = ["FramePairCollator", "FramePairDataset", "Frames", "episode_pairs"]
