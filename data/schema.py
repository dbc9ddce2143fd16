"""What every source of robot or human video yields: episodes, and pairs of frames of them."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

# What the seven numbers of an action are once a source has brought them to the common form.
DELTA_END_EFFECTOR = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


class ReadError(ValueError):
    """
    A file that cannot be read, or a part of one; the message names the file and the place in it.

    What raises it has nothing wrong but its data, so a reader that was asked to may count it and go on.
    """


class FrameSequence(Sequence[NDArray[np.uint8]]):
    """
    Frames of one camera, decoded when they are read: each (height, width, 3) uint8 RGB.

    A format says how by `read`; it is given all frames that are wanted at once, so that a video is gone through once.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, steps: Sequence[int]) -> list[NDArray[np.uint8]]:
        """
        Decodes frames.

        Args:
            steps: In [0, len), in any order, repeated or not.

        Returns:
            A frame (height, width, 3) uint8 RGB per step, in the order asked for.

        Raises:
            ReadError: A frame that cannot be decoded; file and position are named.
        """

    @overload
    def __getitem__(self, index: int) -> NDArray[np.uint8]: ...
    @overload
    def __getitem__(self, index: slice) -> "list[NDArray[np.uint8]]": ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.read(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        return self.read([index % len(self)])[0]


@dataclass
class Episode:
    r"""
    One recording. Frames are decoded when they are read.

    Args:
        episode_id (`str`): Unique within `source`.
        source (`str`): Data set and split the episode comes from.
        frames (`Mapping[str, Sequence]`): Per camera a sequence of `num_steps` frames, each (height, width, 3) uint8
            RGB: a `FrameSequence`, or an array of them all. A camera that recorded nothing is not listed.
        num_steps (`int`): Length of the episode.
        instructions (`tuple[str, ...]`): Distinct instructions, none empty, in order of appearance.
        action (`NDArray`, *optional*): (num_steps, action_dim) float32, physical units of the source.
        action_names (`tuple[str, ...]`, *optional*): What each of the `action_dim` numbers is.
        proprio (`NDArray`, *optional*): (num_steps, proprio_dim) float32, physical units of the source.
        timestamps (`NDArray`, *optional*): (num_steps,) float64 seconds from the first frame, not decreasing; None
            where the source does not tell its frequency.
        embodiment (`str`, *optional*): Robot or person that acts.
        metadata (`Mapping[str, object]`): What the source says about the episode as a whole.
    """

    episode_id: str
    source: str
    frames: Mapping[str, Sequence[NDArray[np.uint8]]]
    num_steps: int
    instructions: tuple[str, ...] = ()
    action: NDArray[np.float32] | None = field(default=None, repr=False)
    action_names: tuple[str, ...] | None = None
    proprio: NDArray[np.float32] | None = field(default=None, repr=False)
    timestamps: NDArray[np.float64] | None = field(default=None, repr=False)
    embodiment: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        name = f"episode {self.episode_id!r} of {self.source}"
        if self.num_steps < 1:
            raise ReadError(f"{name} has {self.num_steps} steps, at least 1 is needed.")
        for camera, frames in self.frames.items():
            if len(frames) != self.num_steps:
                raise ReadError(f"{name}: camera {camera!r} has {len(frames)} frames for {self.num_steps} steps.")
        for key in ("action", "proprio", "timestamps"):
            values = getattr(self, key)
            if values is not None and len(values) != self.num_steps:
                raise ReadError(f"{name}: `{key}` has {len(values)} rows for {self.num_steps} steps.")
        names = self.action_names
        if self.action is not None and names is not None and self.action.shape[1:] != (len(names),):
            raise ReadError(f"{name}: `action` of shape {self.action.shape} does not fit its {len(names)} names.")

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
        return self.read_frames(camera, [step])[0]

    def read_frames(self, camera: str, steps: Sequence[int]) -> list[NDArray[np.uint8]]:
        """
        Decodes frames, together where the format gains by it.

        Args:
            camera: One of `cameras`.
            steps: In [0, num_steps), in any order.

        Returns:
            A frame (height, width, 3) uint8 RGB per step.

        Raises:
            ValueError: An unknown camera (the known ones are listed) or a step outside the episode.
            ReadError: A frame that cannot be decoded.
        """
        if camera not in self.frames:
            raise ValueError(f"`camera` {camera!r} is unknown; this episode has {', '.join(self.cameras) or 'none'}.")
        for step in steps:
            if not 0 <= step < self.num_steps:
                raise ValueError(f"`step` must lie in [0, {self.num_steps - 1}], got {step}.")
        frames = self.frames[camera]
        if isinstance(frames, FrameSequence):
            return frames.read(steps)
        return [np.asarray(frames[step]) for step in steps]


@dataclass(frozen=True)
class FramePair:
    """
    Two frames of one camera of one episode.

    Args:
        episode_id, source (`str`): Of the episode.
        camera (`str`): Of the frames.
        steps (`tuple[int, int]`): First and second step, the second later.
        seconds (`float`, *optional*): Time between them, where the source tells.
        frames (`NDArray`): (2, height, width, 3) uint8 RGB.
    """

    episode_id: str
    source: str
    camera: str
    steps: tuple[int, int]
    seconds: float | None
    frames: NDArray[np.uint8] = field(repr=False)


__all__ = ["DELTA_END_EFFECTOR", "Episode", "FramePair", "FrameSequence", "ReadError"]
