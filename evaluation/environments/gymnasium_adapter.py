"""
Any registered Gymnasium environment that gives pictures, as an evaluation plays it (`pip install "lapa[sim]"`).

A task is an environment's id. `module:id` imports the module that registers it first, as Gymnasium does; so the packages of
lerobot (`gym_aloha:gym_aloha/AlohaTransferCube-v0`, `gym_xarm:...`, `gym_pusht:...`) are played without an adapter of their own.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.evaluation.environments.base import EnvironmentMisused, EvaluationEnvironment, Observation, StepResult

RENDER, TERMINATED = "render", "terminated"
SCALINGS = ("none", "unit")


class GymnasiumEvaluation(EvaluationEnvironment):
    """
    An environment of Gymnasium with a bounded, flat action space. Keys may lead into dictionaries: `pixels.top`.

    Args:
        instruction: The sentence, or a mapping from ids to sentences. One of this and `instruction_key` must be given.
        instruction_key: Where the sentence stands in the observation or in `info`.
        image: Where the picture stands in the observation; `render` asks the environment to draw it.
        proprio: Where the robot's state stands in the observation; none is given to the policy when None.
        success: Where `info` says that the task is solved; `terminated` takes an episode's own end for success.
        kwargs: Of the environment, as `obs_type: pixels_agent_pos`.
        max_steps: Steps after which an episode is cut off; the environment's own limit when None.
        action_scaling: `none` plays actions in the environment's units, `unit` maps [-1, 1] onto its bounds. Both are clipped.

    Raises:
        ImportError: Gymnasium is not installed; the extra is named.
        ValueError: Options that do not fit together.
    """

    # Depends on the task; known once an episode was started.
    action_dim = 0

    def __init__(
        self,
        instruction: str | Mapping[str, str] | None = None,
        instruction_key: str | None = None,
        image: str = "pixels",
        proprio: str | None = None,
        success: str = "is_success",
        kwargs: Mapping[str, Any] | None = None,
        max_steps: int | None = None,
        action_scaling: str = "none",
    ) -> None:
        if (instruction is None) == (instruction_key is None):
            raise ValueError("one of `instruction` and `instruction_key` must be given.")
        if action_scaling not in SCALINGS:
            raise ValueError(f"`action_scaling` must be one of {', '.join(SCALINGS)}, got {action_scaling!r}.")
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"`max_steps` must be at least 1, got {max_steps}.")
        try:
            import gymnasium
        except ImportError as error:
            raise ImportError('Gymnasium is not installed: pip install "lapa[sim]"') from error
        self._gymnasium = gymnasium
        self.instruction, self.instruction_key = instruction, instruction_key
        self.image, self.proprio, self.success = image, proprio, success
        self.kwargs, self.max_steps, self.action_scaling = dict(kwargs or {}), max_steps, action_scaling
        self._environment: Any = None
        self._task: str | None = None
        self._low, self._high = np.zeros(0, np.float32), np.zeros(0, np.float32)
        self._num_steps = 0

    def start(self, task: str, seed: int) -> Observation:
        """See `EvaluationEnvironment.start`; a task is an environment's id, the seed goes to its `reset`."""
        if task != self._task:
            self._make(task)
        observation, info = self._environment.reset(seed=seed)
        self._num_steps = 0
        return self._observation(observation, info)

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """See `EvaluationEnvironment.step`."""
        action = np.asarray(action, dtype=np.float32)
        if self.action_scaling == "unit":
            action = self._low + (np.clip(action, -1, 1) + 1) / 2 * (self._high - self._low)
        space = self._environment.action_space
        played = np.clip(action, self._low, self._high).reshape(space.shape).astype(space.dtype)
        observation, _, terminated, truncated, info = self._environment.step(played)
        self._num_steps += 1
        success = (
            bool(terminated) if self.success == TERMINATED else bool(np.all(_look_up(info, self.success, "info")))
        )
        cut_off = bool(truncated) or (self.max_steps is not None and self._num_steps >= self.max_steps)
        return StepResult(self._observation(observation, info), success, success or bool(terminated) or cut_off, {})

    def close(self) -> None:
        """See `EvaluationEnvironment.close`."""
        if self._environment is not None:
            self._environment.close()
            self._environment = self._task = None

    def _make(self, task: str) -> None:
        self.close()
        options = dict(self.kwargs)
        if self.image == RENDER:
            options.setdefault("render_mode", "rgb_array")
        try:
            environment = self._gymnasium.make(task, **options)
        except (self._gymnasium.error.Error, ImportError, TypeError) as error:
            raise EnvironmentMisused(f"`task` {task!r} cannot be made: {error}") from error
        space = environment.action_space
        if not isinstance(space, self._gymnasium.spaces.Box) or not np.isfinite([space.low, space.high]).all():
            environment.close()
            raise EnvironmentMisused(f"`task` {task!r} must have bounded continuous actions, it has {space}.")
        self._environment, self._task = environment, task
        self._low, self._high = space.low.reshape(-1), space.high.reshape(-1)
        self.action_dim = len(self._low)

    def _observation(self, observation: Any, info: Mapping[str, Any]) -> Observation:
        picture = (
            self._environment.render() if self.image == RENDER else _look_up(observation, self.image, "observation")
        )
        image = np.asarray(picture)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise EnvironmentMisused(
                f"`image` ({self.image}) must be (height, width, 3) uint8, it is {image.shape} {image.dtype}."
            )
        seen: Observation = {"image": np.ascontiguousarray(image), "instruction": self._sentence(observation, info)}
        if self.proprio is not None:
            state = np.asarray(_look_up(observation, self.proprio, "observation"), dtype=np.float32)
            seen["proprio"] = state.reshape(-1)
        return seen

    def _sentence(self, observation: Any, info: Mapping[str, Any]) -> str:
        if self.instruction_key is not None:
            both = {**(observation if isinstance(observation, Mapping) else {}), **info}
            return str(_look_up(both, self.instruction_key, "observation or info"))
        if isinstance(self.instruction, str):
            return self.instruction
        assert self.instruction is not None and self._task is not None
        if self._task not in self.instruction:
            raise EnvironmentMisused(f"`instruction` has no sentence for {self._task!r}.")
        return self.instruction[self._task]


def _look_up(values: Any, key: str, where: str) -> Any:
    """A value by a key, or by keys joined by dots."""
    if isinstance(values, Mapping) and key in values:
        return values[key]
    first, dot, rest = key.partition(".")
    if dot and isinstance(values, Mapping) and first in values:
        return _look_up(values[first], rest, f"{where}.{first}")
    there = ", ".join(map(str, values)) if isinstance(values, Mapping) else f"a {type(values).__name__}"
    raise EnvironmentMisused(f"{where} has no {key!r}; it has {there}.")


__all__ = ["GymnasiumEvaluation"]
