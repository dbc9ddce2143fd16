"""What an evaluation needs of a simulator: one adapter per environment, whatever its own interface is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class EnvironmentMisused(ValueError):
    """A mistake of the caller's, such as an unknown task; any other error of an environment is a crash of it."""


# `image` (height, width, 3) uint8 RGB, `instruction` text, optionally `proprio` (proprio_dim,) float32.
Observation = dict[str, Any]


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
        is_fragile (`bool`): Whether it may hang or take its process with it, as a simulator with native code may. Unless a
            suite or the user says otherwise, such an environment is played in processes of its own.
    """

    action_dim: int
    is_fragile: bool = True

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

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Frees what it holds."""

    def __enter__(self) -> "EvaluationEnvironment":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


__all__ = ["EnvironmentMisused", "EvaluationEnvironment", "Observation", "StepResult"]
