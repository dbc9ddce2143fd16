"""What an evaluation needs of a simulator: one adapter per environment, whatever its own interface is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class EnvironmentMisused(ValueError):
    """A mistake of the caller's, such as an unknown task; any other error of an environment is a crash of it."""


# `image` (height, width, 3) uint8 RGB, `instruction` text, optionally `proprio` (proprio_dim,) float32.
Observation = dict[str, Any]
Bounds = tuple[float | tuple[float, ...], float | tuple[float, ...]]


@dataclass(frozen=True)
class StepResult:
    """
    What a step of an environment leads to.

    Args:
        observation (`Observation`): After the step.
        success (`bool`): Whether the task counts as solved.
        done (`bool`): Whether the episode is over, solved or cut off.
        progress (`Mapping[str, bool]`): Partial results that are scored beside success, such as `grasped`.
    """

    observation: Observation
    success: bool
    done: bool
    progress: Mapping[str, bool]


class EvaluationEnvironment(ABC):
    """
    One environment as an evaluation plays it. A subclass imports its simulator when it is made, not before.

    Attributes:
        action_dim (`int`): Length of an action.
        action_bounds (`Bounds`): Least and greatest values of an action's numbers, for all or for each; random actions
            are drawn between them.
        is_fragile (`bool`): Whether it may hang or take its process with it, as a simulator with native code may. Unless a
            suite or the user says otherwise, such an environment is played in processes of its own.
        mixes_tasks (`bool`): Whether environments of one process may play different tasks at a time without a trace in what
            they show. Renderers of one OpenGL context at a time may draw one task with the meshes of another, and say nothing.
    """

    action_dim: int
    action_bounds: Bounds = (-1.0, 1.0)
    is_fragile: bool = True
    mixes_tasks: bool = False

    @abstractmethod
    def start(self, task: str, seed: int) -> Observation:
        """
        Starts an episode. The same task and seed give the same start, whatever was played before.

        Raises:
            EnvironmentMisused: An unknown task; the known ones are listed.
        """

    @abstractmethod
    def step(self, action: NDArray[np.float32]) -> StepResult:
        """
        Plays one step.

        Args:
            action: (action_dim,) float32 in the environment's own units, clipped to its bounds here.
        """

    def expert_action(self) -> NDArray[np.float32]:
        """
        What the environment's scripted expert does now, (action_dim,) float32.

        Raises:
            EnvironmentMisused: There is none.
        """
        raise EnvironmentMisused(f"{type(self).__name__} has no scripted expert.")

    def still_action(self) -> NDArray[np.float32]:
        """What does nothing now, (action_dim,) float32; zeros, unless actions are places to go to."""
        return np.zeros(self.action_dim, dtype=np.float32)

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Frees what it holds."""

    def __enter__(self) -> "EvaluationEnvironment":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_image_size(image_size: Sequence[int]) -> tuple[int, int]:
    """
    Height and width in pixels.

    Raises:
        ValueError: Not two numbers from 16.
    """
    if len(image_size) != 2 or min(image_size) < 16:
        raise ValueError(f"`image_size` must be height and width, each at least 16, got {image_size}.")
    height, width = image_size
    return int(height), int(width)


def resize_image(image: NDArray[np.uint8], image_size: tuple[int, int], filter_name: str = "BILINEAR") -> Any:
    """An (old height, old width, 3) uint8 image in another size (height, width); one that has it is given back as it is."""
    if image.shape[:2] == image_size:
        return image
    return np.asarray(Image.fromarray(image).resize(image_size[::-1], Image.Resampling[filter_name]))


__all__ = [
    "Bounds",
    "EnvironmentMisused",
    "EvaluationEnvironment",
    "Observation",
    "StepResult",
    "check_image_size",
    "resize_image",
]
