"""Push-T as an evaluation plays it (`pip install "lapa[pusht]"`): a disc pushes a T-shaped block onto its outline."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.evaluation.environments.base import (
    EnvironmentMisused,
    EvaluationEnvironment,
    Observation,
    StepResult,
    check_image_size,
)

TASK = "push_t"
# It has no language; the sentence is ours, one for all episodes.
INSTRUCTION = "push the T-shaped block onto its green outline"
# Shares of the outline that count as partial results. The task is solved above 0.95.
COVERAGES = (0.25, 0.5, 0.75)
NOT_INSTALLED = 'gym-pusht is not installed: pip install "lapa[pusht]"'


class PushTEvaluation(EvaluationEnvironment):
    """
    gym-pusht; there is one task, `push_t`.

    Solved when the block covers more than 95% of its outline. How much of it was covered at any step is counted as
    `covered_25`, `covered_50`, `covered_75` beside success: a start may cover some without a push.

    An action is the place (x, y) that the disc goes to, in pixels of a board of 512 x 512, origin at the top left; doing
    nothing is the place where the disc is. `proprio` is that place. There is no scripted expert.

    Args:
        image_size: (height, width) in pixels of the images; the published data has 96 x 96.
        max_steps: Steps (of 0.1 s) after which an episode is cut off.

    Raises:
        ImportError: gym-pusht is not installed, or beside a version of pymunk that it cannot use; the extra is named.
    """

    action_dim = 2
    action_bounds = (0.0, 512.0)

    def __init__(self, image_size: tuple[int, int] = (96, 96), max_steps: int = 300) -> None:
        height, width = check_image_size(image_size)
        if max_steps < 1:
            raise ValueError(f"`max_steps` must be at least 1, got {max_steps}.")
        try:
            import pymunk
            from gym_pusht.envs.pusht import PushTEnv
        except ImportError as error:
            raise ImportError(f"{NOT_INSTALLED} ({error})") from error
        if int(pymunk.version.split(".")[0]) >= 7:
            raise ImportError(f'gym-pusht needs pymunk below 7, found {pymunk.version}: pip install "lapa[pusht]"')
        self.max_steps = max_steps
        self._environment: Any = PushTEnv("pixels_agent_pos", observation_width=width, observation_height=height)
        self._place = np.zeros(2, np.float32)
        self._num_steps = 0

    def start(self, task: str, seed: int) -> Observation:
        """See `EvaluationEnvironment.start`; the seed draws where disc and block lie."""
        if task != TASK:
            raise EnvironmentMisused(f"`task` must be {TASK}, got {task!r}.")
        observation, _ = self._environment.reset(seed=seed)
        self._num_steps = 0
        return self._observation(observation)

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """See `EvaluationEnvironment.step`."""
        action = np.clip(np.asarray(action, np.float64), *self.action_bounds)
        observation, _, _, _, info = self._environment.step(action)
        self._num_steps += 1
        success, covered = bool(info["is_success"]), float(info["coverage"])
        progress = {f"covered_{round(100 * share)}": covered >= share for share in COVERAGES}
        return StepResult(
            self._observation(observation), success, success or self._num_steps >= self.max_steps, progress
        )

    def still_action(self) -> NDArray[np.float32]:
        """See `EvaluationEnvironment.still_action`."""
        return self._place

    def _observation(self, observation: Mapping[str, Any]) -> Observation:
        self._place = observation["agent_pos"].astype(np.float32)
        return {"image": observation["pixels"], "instruction": INSTRUCTION, "proprio": self._place}

    def close(self) -> None:
        """See `EvaluationEnvironment.close`."""
        self._environment.close()


__all__ = ["COVERAGES", "INSTRUCTION", "TASK", "PushTEvaluation"]
