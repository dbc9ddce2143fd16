"""Playing policies in closed loop, many environments in lock step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from lapa.evaluation.environments.tabletop import TabletopEnvironment
from lapa.evaluation.environments.tabletop_expert import TabletopExpert
from lapa.serving.policy import ChunkPlayer, Policy


@dataclass(frozen=True)
class Rollout:
    """One played episode.

    Args:
        family: Kind of task.
        seed: What the environment was reset with; the same seed is the same start for every policy.
        instruction: The sentence.
        success: Whether the task was solved within the family's number of steps.
        num_steps: Steps played.
        frames: (num_steps + 1, height, width, 3) uint8 where they were asked for, else empty.
    """

    family: str
    seed: int
    instruction: str
    success: bool
    num_steps: int
    frames: list[np.ndarray] = field(default_factory=list, repr=False, compare=False)


class Controller(Protocol):
    """Chooses actions for a batch of running environments."""

    def __call__(
        self, environments: Sequence[TabletopEnvironment], observations: Sequence[dict[str, Any]]
    ) -> np.ndarray:
        """Actions (batch, 2) in [-1, 1] for environments that have not finished."""


def policy_controller(policy: Policy) -> Controller:
    """A policy that sees images and instructions only."""

    def act(environments: Sequence[TabletopEnvironment], observations: Sequence[dict[str, Any]]) -> np.ndarray:
        images = [observation["image"] for observation in observations]
        return policy.act(images, [observation["instruction"] for observation in observations])

    return act


class ChunkController:
    """A policy that plays chunks of actions, see [`ChunkPlayer`]; every episode starts with a new one.

    Args:
        player: Remembers what is left of each environment's chunk.
    """

    def __init__(self, player: ChunkPlayer) -> None:
        self.player = player
        # The task object tells the episodes of an environment apart; it is kept, so that its identity stays its own.
        self._tasks: dict[int, Any] = {}

    def __call__(
        self, environments: Sequence[TabletopEnvironment], observations: Sequence[dict[str, Any]]
    ) -> np.ndarray:
        """See [`Controller`]."""
        robots = [id(environment) for environment in environments]
        for robot, environment in zip(robots, environments):
            if self._tasks.get(robot) is not environment.task:
                self._tasks[robot] = environment.task
                self.player.reset([robot])
        images = [observation["image"] for observation in observations]
        return self.player.act(images, [observation["instruction"] for observation in observations], robots=robots)


def do_nothing(environments: Sequence[TabletopEnvironment], observations: Sequence[dict[str, Any]]) -> np.ndarray:
    """Stands still."""
    return np.zeros((len(environments), 2), dtype=np.float32)


class ExpertController:
    """The scripted expert, which sees the simulator's state."""

    def __init__(self) -> None:
        self.experts: dict[int, TabletopExpert] = {}

    def __call__(
        self, environments: Sequence[TabletopEnvironment], observations: Sequence[dict[str, Any]]
    ) -> np.ndarray:
        """See [`Controller`]."""
        for environment in environments:
            self.experts.setdefault(id(environment), TabletopExpert(environment))
        return np.stack([self.experts[id(environment)].act() for environment in environments])


def roll_out(
    make_environment: Callable[[], TabletopEnvironment],
    controller: Controller,
    episodes: Sequence[tuple[str, int]],
    num_environments: int = 64,
    record: Sequence[int] = (),
    description: str = "rollouts",
) -> list[Rollout]:
    """Play one episode per (family, seed).

    Args:
        make_environment: Builds an environment that renders its observations.
        controller: Chooses the actions.
        episodes: Family and seed of every start.
        num_environments: How many are played side by side.
        record: Indices into `episodes` whose frames are kept.
        description: Of the progress bar.

    Returns:
        One rollout per episode, in order.
    """
    environments = [make_environment() for _ in range(min(num_environments, len(episodes)))]
    rollouts: list[Rollout] = []
    with tqdm(total=len(episodes), desc=description, leave=False) as progress:
        for start in range(0, len(episodes), len(environments)):
            chunk = episodes[start : start + len(environments)]
            kept = {index - start for index in record if start <= index < start + len(chunk)}
            for rollout in _play(environments[: len(chunk)], controller, chunk, kept):
                rollouts.append(rollout)
                progress.update()
    return rollouts


def _play(
    environments: Sequence[TabletopEnvironment],
    controller: Controller,
    episodes: Sequence[tuple[str, int]],
    kept: set[int],
) -> Iterator[Rollout]:
    observations = [
        environment.reset(seed=seed, options={"family": family})[0]
        for environment, (family, seed) in zip(environments, episodes)
    ]
    frames: list[list[np.ndarray]] = [[o["image"]] if i in kept else [] for i, o in enumerate(observations)]
    success, num_steps = [False] * len(episodes), [0] * len(episodes)
    running = list(range(len(episodes)))
    while running:
        actions = controller([environments[i] for i in running], [observations[i] for i in running])
        still_running = []
        for i, action in zip(running, np.clip(actions, -1, 1)):
            observations[i], _, terminated, truncated, info = environments[i].step(action)
            num_steps[i] += 1
            if i in kept:
                frames[i].append(observations[i]["image"])
            success[i] = info["success"]
            if not (terminated or truncated):
                still_running.append(i)
        running = still_running
    for i, (family, seed) in enumerate(episodes):
        yield Rollout(family, seed, observations[i]["instruction"], success[i], num_steps[i], frames[i])


def outcomes_by_family(rollouts: Sequence[Rollout]) -> dict[str, list[bool]]:
    """Successes of each family, in the order of the rollouts."""
    outcomes: dict[str, list[bool]] = {}
    for rollout in rollouts:
        outcomes.setdefault(rollout.family, []).append(rollout.success)
    return outcomes
