"""Records the scripted expert of any environment that has one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lapa.evaluation.environment_pool import EnvironmentPool, Failure, Restarted, Start
from lapa.evaluation.environments.base import Bounds, Observation


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


@dataclass
class _Track:
    """An episode that is being recorded."""

    generator: np.random.Generator
    observations: list[Observation]
    actions: list[NDArray[np.float32]] = field(default_factory=list)
    success: bool = False
    done: bool = False

    def episode(self) -> ExpertEpisode:
        nothing = np.zeros(0, np.float32)
        return ExpertEpisode(
            frames=np.stack([entry["image"] for entry in self.observations]),
            proprio=np.stack([np.asarray(entry.get("proprio", nothing), np.float32) for entry in self.observations]),
            actions=np.stack(self.actions),
            instruction=str(self.observations[0]["instruction"]),
            success=self.success,
        )


def record_expert(
    pool: EnvironmentPool, episodes: Sequence[Start], noise: float = 0.0, bounds: Bounds = (-1.0, 1.0)
) -> list[ExpertEpisode]:
    """
    Plays the expert; the same episode is the same whatever is played beside it.

    Args:
        pool: Of environments with an `expert_action`; as many episodes are played at a time as it has.
        episodes: Task and seed of each; the seed is of the start and of the noise.
        noise: Standard deviation of what is added to every action, as a share of half the range of actions. The expert sees
            where that leads and corrects it, and so does who learns from the recording.
        bounds: Of the environments' actions.

    Raises:
        ValueError: `noise` below 0.
        RuntimeError: An environment crashed or hung twice in the same episode, which is named.
    """
    if noise < 0:
        raise ValueError(f"`noise` must be at least 0, got {noise}.")
    low, high = (np.asarray(bound, np.float32) for bound in bounds)
    recorded: list[ExpertEpisode] = []
    with tqdm(total=len(episodes), desc="recording", unit="episode") as progress:
        for first in range(0, len(episodes), pool.size):
            chunk = episodes[first : first + pool.size]
            recorded += _record_chunk(pool, chunk, noise, low, high)
            progress.update(len(chunk))
    return recorded


def _record_chunk(
    pool: EnvironmentPool,
    episodes: Sequence[Start],
    noise: float,
    low: NDArray[Any],
    high: NDArray[Any],
    is_second: bool = False,
) -> list[ExpertEpisode]:
    """Episodes side by side, one per environment of the pool."""
    tracks: dict[int, _Track] = {}
    failed: dict[int, Failure] = {}

    def begin(slot: int, observation: Observation) -> None:
        tracks[slot] = _Track(np.random.default_rng(episodes[slot][1]), [observation])

    def played(answers: Mapping[int, Any]) -> dict[int, Any]:
        """Answers of the environments that gave one."""
        for slot, answer in answers.items():
            if isinstance(answer, Failure):
                failed[slot] = answer
                tracks.pop(slot, None)
            if isinstance(answer, Restarted):
                begin(slot, answer.observation)
        return {slot: answer for slot, answer in answers.items() if not isinstance(answer, Failure | Restarted)}

    for slot, observation in played(pool.start(dict(enumerate(episodes)))).items():
        begin(slot, observation)
    while running := [slot for slot, track in tracks.items() if not track.done]:
        actions = {}
        for slot, expert in played(pool.expert_actions(running)).items():
            disturbance = noise * (high - low) / 2 * tracks[slot].generator.standard_normal(len(expert))
            actions[slot] = np.clip(expert + disturbance, low, high).astype(np.float32)
        for slot, result in played(pool.step(actions)).items():
            track = tracks[slot]
            track.observations.append(result.observation)
            track.actions.append(actions[slot])
            track.success, track.done = result.success, result.done
    recorded = {slot: track.episode() for slot, track in tracks.items()}
    for slot, failure in failed.items():
        task, seed = episodes[slot]
        if is_second:
            raise RuntimeError(
                f"recording {task!r} from seed {seed}: the environment {failure.kind}: {failure.reason}"
            )
        # Once more, alone, as a job of a study is: what a simulator does not survive need not be this episode's fault.
        (recorded[slot],) = _record_chunk(pool, [episodes[slot]], noise, low, high, is_second=True)
    return [recorded[slot] for slot in range(len(episodes))]


__all__ = ["ExpertEpisode", "record_expert"]
