"""Records the scripted expert of any environment that has one."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lapa.evaluation.environments.base import EvaluationEnvironment


@dataclass(frozen=True)
class ExpertEpisode:
    """
    An episode of `num_steps` steps.

    Args:
        frames: (num_steps + 1, height, width, 3) uint8, RGB; the first is the start.
        proprio: (num_steps + 1, proprio_dim) float32, as the environment has it; proprio_dim is 0 where it has none.
        actions: (num_steps, action_dim) float32, as executed.
        instruction: The sentence.
        success: Whether the task was solved.
    """

    frames: NDArray[np.uint8]
    proprio: NDArray[np.float32]
    actions: NDArray[np.float32]
    instruction: str
    success: bool


def record_expert(environment: EvaluationEnvironment, task: str, seed: int, noise: float = 0.0) -> ExpertEpisode:
    """
    Plays the expert for one episode; the same arguments give the same episode.

    Args:
        environment: With an `expert_action`.
        task: Of the environment.
        seed: Of the start and of the noise.
        noise: Standard deviation of what is added to every action, as a share of half the range of actions. The expert sees
            where that leads and corrects it, and so does who learns from the recording.

    Raises:
        ValueError: `noise` below 0.
    """
    if noise < 0:
        raise ValueError(f"`noise` must be at least 0, got {noise}.")
    low, high = (np.broadcast_to(np.asarray(bound, np.float32), environment.action_dim)
                 for bound in environment.action_bounds)  # fmt: skip
    generator = np.random.default_rng(seed)
    observation = environment.start(task, seed)
    observations, actions, done, success = [observation], [], False, False
    while not done:
        disturbance = noise * (high - low) / 2 * generator.standard_normal(environment.action_dim)
        action = np.clip(environment.expert_action() + disturbance, low, high).astype(np.float32)
        result = environment.step(action)
        observations.append(result.observation)
        actions.append(action)
        done, success = result.done, result.success
    nothing = np.zeros(0, np.float32)
    return ExpertEpisode(
        frames=np.stack([entry["image"] for entry in observations]),
        proprio=np.stack([np.asarray(entry.get("proprio", nothing), np.float32) for entry in observations]),
        actions=np.stack(actions),
        instruction=str(observation["instruction"]),
        success=success,
    )


__all__ = ["ExpertEpisode", "record_expert"]
