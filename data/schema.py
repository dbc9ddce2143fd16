"""What every source of robot or human video yields: episodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class Episode:
    r"""
    One recording. Frames are decoded when they are read.

    Args:
        episode_id (`str`): Unique within `source`.
        source (`str`): Data set and split the episode comes from.
        frames (`Mapping[str, Sequence]`): Per camera a sequence of `num_steps` frames, each (height, width, 3) uint8
            RGB. A camera that recorded nothing is not listed.
        num_steps (`int`): Length of the episode.
        instructions (`tuple[str, ...]`): Distinct instructions, none empty, in order of appearance.
        action (`NDArray`, *optional*): (num_steps, action_dim) float32, physical units of the source.
        proprio (`NDArray`, *optional*): (num_steps, proprio_dim) float32, physical units of the source.
        timestamps (`NDArray`, *optional*): (num_steps,) float64 seconds from the first frame; None where the source
            does not tell its frequency.
        embodiment (`str`, *optional*): Robot or person that acts.
        metadata (`Mapping[str, object]`): What the source says about the episode as a whole.
    """

    episode_id: str
    source: str
    frames: Mapping[str, Sequence[NDArray[np.uint8]]]
    num_steps: int
    instructions: tuple[str, ...] = ()
    action: NDArray[np.float32] | None = field(default=None, repr=False)
    proprio: NDArray[np.float32] | None = field(default=None, repr=False)
    timestamps: NDArray[np.float64] | None = field(default=None, repr=False)
    embodiment: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        name = f"episode {self.episode_id!r} of {self.source}"
        if self.num_steps < 1:
            raise ValueError(f"{name} has {self.num_steps} steps, at least 1 is needed.")
        for camera, frames in self.frames.items():
            if len(frames) != self.num_steps:
                raise ValueError(f"{name}: camera {camera!r} has {len(frames)} frames for {self.num_steps} steps.")
        for key in ("action", "proprio", "timestamps"):
            values = getattr(self, key)
            if values is not None and len(values) != self.num_steps:
                raise ValueError(f"{name}: `{key}` has {len(values)} rows for {self.num_steps} steps.")

    @property
    def cameras(self) -> tuple[str, ...]:
        """Cameras that recorded."""
        return tuple(self.frames)

    @property
    def instruction(self) -> str | None:
        """The first instruction, if there is any."""
        return self.instructions[0] if self.instructions else None

    def frame(self, camera: str, step: int) -> NDArray[np.uint8]:
        """
        Decodes one frame.

        Returns:
            (height, width, 3) uint8 RGB.

        Raises:
            ValueError: An unknown camera (the known ones are listed) or a step outside the episode.
        """
        if camera not in self.frames:
            raise ValueError(f"`camera` {camera!r} is unknown; this episode has {', '.join(self.cameras) or 'none'}.")
        if not 0 <= step < self.num_steps:
            raise ValueError(f"`step` must lie in [0, {self.num_steps - 1}], got {step}.")
        return self.frames[camera][step]


__all__ = ["Episode"]
