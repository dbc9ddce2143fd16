"""Records episodes of the tabletop: frames, actions where the embodiment has any, and what was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lapa.evaluation.environments.tabletop_expert import TabletopExpert

if TYPE_CHECKING:
    from lapa.evaluation.environments.tabletop import TabletopEnvironment


@dataclass(frozen=True)
class TabletopEpisode:
    """A recorded episode of `num_steps` steps.

    Args:
        frames: (num_steps + 1, height, width, 3) uint8, RGB; the first is the start state.
        actions: (num_steps, 2) float32 in [-1, 1], as executed; None where the embodiment has no actions.
        expert_actions: (num_steps, 2) float32 in [-1, 1], what the expert would have done in each state without noise
            and exploration; equal to `actions` when there was none; None where the embodiment has no actions.
        effector_positions: (num_steps + 1, 2) float32, metres in the board frame.
        instruction: the sentence.
        family: key of `FAMILIES`.
        embodiment: name of the embodiment.
        success: whether the task was solved.
        seed: what `reset` was called with; replays the scene.
    """

    frames: np.ndarray
    actions: np.ndarray | None
    expert_actions: np.ndarray | None
    effector_positions: np.ndarray
    instruction: str
    family: str
    embodiment: str
    success: bool
    seed: int

    @property
    def num_steps(self) -> int:
        """Number of actions between the frames."""
        return len(self.frames) - 1


def record_episode(
    env: TabletopEnvironment,
    expert: TabletopExpert | None,
    seed: int,
    noise: float = 0.0,
    exploration: float = 0.0,
    family: str | None = None,
) -> TabletopEpisode:
    """Plays the expert for one episode and records it; the same arguments give the same episode.

    Args:
        env: the environment; frames have its `image_size`.
        expert: plays and brings its own noise; None makes one from `noise` and `exploration`.
        seed: of the scene, the camera's shake, and the expert's randomness.
        noise, exploration: see `TabletopExpert`; only without an `expert`.
        family: asks for a family instead of drawing one of the environment's.
    """
    if expert is None:
        expert = TabletopExpert(env, noise, exploration)
    elif noise or exploration:
        raise ValueError(
            f"noise is {noise} and exploration {exploration}, but expert is given; accepted: one of the two"
        )
    _, info = env.reset(seed=seed, options={"family": family} if family else None)
    expert.reset(seed)
    frames, effector, actions, expert_actions = [env.render()], [env.effector], [], []
    done = False
    while not done:
        clean = expert.clean_action()
        actions.append(expert.disturb(clean))
        expert_actions.append(clean)
        observation, _, terminated, truncated, info = env.step(actions[-1])
        frames.append(observation["image"] if env.render_observations else env.render())
        effector.append(env.effector)
        done = terminated or truncated
    has_actions = env.embodiment.has_actions
    return TabletopEpisode(
        frames=np.stack(frames),
        actions=np.stack(actions) if has_actions else None,
        expert_actions=np.stack(expert_actions) if has_actions else None,
        effector_positions=np.array([(p.real, p.imag) for p in effector], np.float32),
        instruction=env.task.instruction,
        family=env.task.family,
        embodiment=env.embodiment_name,
        success=info["success"],
        seed=seed,
    )
