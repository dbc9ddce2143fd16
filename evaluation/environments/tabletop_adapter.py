"""The tabletop as an evaluation plays it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.evaluation.environments.base import EnvironmentMisused, EvaluationEnvironment, Observation, StepResult
from lapa.evaluation.environments.tabletop import FAMILIES, TabletopEnvironment, TabletopExpert


class TabletopEvaluation(EvaluationEnvironment):
    """
    The tabletop; a task is a family.

    Args:
        options: Of `TabletopEnvironment` (embodiment, split, image_size, ...).
    """

    action_dim = 2
    is_fragile = False
    mixes_tasks = True

    def __init__(self, **options: Any) -> None:
        self.environment = TabletopEnvironment(**options)
        self._expert: TabletopExpert | None = None

    def start(self, task: str, seed: int) -> Observation:
        """See `EvaluationEnvironment.start`; `proprio` is the effector's place in metres."""
        if task not in FAMILIES:
            raise EnvironmentMisused(f"`task` must be one of {', '.join(FAMILIES)}, got {task!r}.")
        observation, _ = self.environment.reset(seed=seed, options={"family": task})
        self._expert = TabletopExpert(self.environment)
        return _observation(observation)

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """See `EvaluationEnvironment.step`."""
        observation, _, solved, cut_off, info = self.environment.step(np.clip(action, -1, 1))
        return StepResult(_observation(observation), bool(info["success"]), solved or cut_off, {})

    def expert_action(self) -> NDArray[np.float32]:
        """See `EvaluationEnvironment.expert_action`."""
        assert self._expert is not None
        return self._expert.act()

    def close(self) -> None:
        """See `EvaluationEnvironment.close`."""
        self.environment.close()


def _observation(observation: dict[str, Any]) -> Observation:
    return {
        "image": observation["image"],
        "instruction": observation["instruction"],
        "proprio": observation["effector"],
    }


__all__ = ["TabletopEvaluation"]
