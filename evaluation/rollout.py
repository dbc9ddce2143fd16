"""Playing policies in closed loop, many environments in lock step."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lapa.evaluation.environment_pool import EnvironmentPool, Failure, Restarted, Start
from lapa.evaluation.environments.base import Bounds, Observation, StepResult

if TYPE_CHECKING:
    from lapa.serving.policy import ChunkPlayer, Policy

SOLVED, NOT_SOLVED = "solved", "not_solved"

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Rollout:
    """One played episode.

    Args:
        family: Kind of task.
        seed: What the environment was started with; the same seed is the same start for every policy.
        instruction: The sentence.
        success: Whether the task was solved within its number of steps.
        num_steps: Steps played.
        ending: `solved`, `not_solved`, `crashed` or `hung`; the last two are what became of the environment.
        progress: Partial results that were reached at any step.
        restarts: How often the episode began again because the process of its environment was lost to another one and
            could not be brought back to where it was.
        frames: (num_steps + 1, height, width, 3) uint8 where they were asked for, else empty.
    """

    family: str
    seed: int
    instruction: str
    success: bool
    num_steps: int
    ending: str = NOT_SOLVED
    progress: tuple[str, ...] = ()
    restarts: int = 0
    frames: list[NDArray[np.uint8]] = field(default_factory=list, repr=False, compare=False)


class EpisodeDraws:
    """
    A generator for each episode, so that what a policy draws in one does not depend on the others: neither on how many are
    played beside it nor on which of them still run.

    Args:
        seed: Of all draws, or one per environment.
    """

    def __init__(self, seed: int | Sequence[int] = 0) -> None:
        self.seed = seed
        self._generators: dict[int, np.random.Generator] = {}

    def reseed(self, seed: int | Sequence[int]) -> None:
        """Makes the draws of episodes that begin from now on depend on another seed, or on one per environment."""
        self.seed = seed

    def begin(self, slot: int, episode: Start) -> None:
        """An episode starts in an environment."""
        task, start = episode
        seed = self.seed if isinstance(self.seed, int) else self.seed[slot]
        self._generators[slot] = np.random.default_rng(derived_seed(seed, task, start))

    def of(self, slots: Sequence[int]) -> list[np.random.Generator]:
        """Generators of the episodes that run in some environments."""
        return [self._generators[slot] for slot in slots]


def derived_seed(*parts: object) -> int:
    """A seed of 64 bits that depends on all parts, the same in every process."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8])


class Controller(ABC):
    """Chooses actions for the environments that still run."""

    def begin(self) -> None:  # noqa: B027 (most remember nothing)
        """A new episode starts in every environment."""

    def begin_episode(self, slot: int, episode: Start) -> None:  # noqa: B027
        """An episode starts in one environment: each one after `begin`, or one that has to begin again."""

    @abstractmethod
    def act(
        self, pool: EnvironmentPool, slots: Sequence[int], observations: Sequence[Observation]
    ) -> Mapping[int, NDArray[np.float32] | Failure | Restarted]:
        """Action (action_dim,) of each slot; a `Failure` or `Restarted` where the environment gave none."""


class PolicyController(Controller):
    """
    A policy that sees images and instructions, and the robot's state where it is to.

    Args:
        policy: Chooses the actions.
        with_proprio: Whether the policy reads `proprio`.
        draws: For a policy that draws from a generator per robot (`draws` of its `act`); None where it draws nothing, or
            from a generator of its own.
    """

    def __init__(self, policy: "Policy", with_proprio: bool = False, draws: EpisodeDraws | None = None) -> None:
        self.policy, self.with_proprio, self.draws = policy, with_proprio, draws

    def begin_episode(self, slot: int, episode: Start) -> None:
        """See [`Controller`]."""
        if self.draws is not None:
            self.draws.begin(slot, episode)

    def act(
        self, pool: EnvironmentPool, slots: Sequence[int], observations: Sequence[Observation]
    ) -> Mapping[int, NDArray[np.float32] | Failure | Restarted]:
        """See [`Controller`]."""
        draws = {} if self.draws is None else {"draws": self.draws.of(slots)}
        actions = self.policy.act(*_inputs(observations, self.with_proprio), **draws)
        return dict(zip(slots, np.asarray(actions, dtype=np.float32)))


class ChunkController(Controller):
    """
    A policy that plays chunks of actions, see [`~lapa.serving.policy.ChunkPlayer`]; every episode starts with a new one.

    Args:
        player: Remembers what is left of each environment's chunk.
        with_proprio: Whether the policy reads `proprio`.
        draws: See [`PolicyController`].
    """

    def __init__(self, player: "ChunkPlayer", with_proprio: bool = False, draws: EpisodeDraws | None = None) -> None:
        self.player, self.with_proprio, self.draws = player, with_proprio, draws

    def begin(self) -> None:
        """See [`Controller`]."""
        self.player.reset()

    def begin_episode(self, slot: int, episode: Start) -> None:
        """See [`Controller`]."""
        self.player.reset([slot])
        if self.draws is not None:
            self.draws.begin(slot, episode)

    def act(
        self, pool: EnvironmentPool, slots: Sequence[int], observations: Sequence[Observation]
    ) -> Mapping[int, NDArray[np.float32] | Failure | Restarted]:
        """See [`Controller`]."""
        draws = {} if self.draws is None else {"draws": self.draws.of(slots)}
        actions = self.player.act(*_inputs(observations, self.with_proprio), robots=slots, **draws)
        return dict(zip(slots, np.asarray(actions, dtype=np.float32)))


def _inputs(observations: Sequence[Observation], with_proprio: bool) -> tuple[Any, ...]:
    """Images, instructions and, where they are wanted, states."""
    names = ("image", "instruction", "proprio") if with_proprio else ("image", "instruction")
    return tuple([observation[name] for observation in observations] for name in names)


class ExpertController(Controller):
    """The scripted expert, which sees the simulator's state."""

    def act(
        self, pool: EnvironmentPool, slots: Sequence[int], observations: Sequence[Observation]
    ) -> Mapping[int, NDArray[np.float32] | Failure | Restarted]:
        """See [`Controller`]."""
        return pool.expert_actions(slots)


class StillController(Controller):
    """Does nothing, in whatever way the environment does that."""

    def act(
        self, pool: EnvironmentPool, slots: Sequence[int], observations: Sequence[Observation]
    ) -> Mapping[int, NDArray[np.float32] | Failure | Restarted]:
        """See [`Controller`]."""
        return pool.still_actions(slots)


class RandomActions:
    """
    Moves uniformly at random.

    Args:
        action_dim: Length of an action.
        bounds: Least and greatest values of an action's numbers, for all or for each.
    """

    def __init__(self, action_dim: int, bounds: Bounds = (-1.0, 1.0)) -> None:
        self.action_dim, self.bounds = action_dim, bounds

    def act(
        self,
        images: Sequence[NDArray[np.uint8]],
        instructions: Sequence[str],
        draws: Sequence[np.random.Generator],
    ) -> NDArray[np.float32]:
        """See [`~lapa.serving.policy.Policy`]; `draws` holds a generator per robot."""
        return np.stack([draw.uniform(*self.bounds, self.action_dim) for draw in draws]).astype(np.float32)


def roll_out(
    pool: EnvironmentPool,
    controller: Controller,
    episodes: Sequence[Start],
    record: Sequence[int] = (),
    description: str | None = "rollouts",
    on_chunk: Callable[[int], Any] | None = None,
) -> list[Rollout]:
    """Play one episode per (family, seed), as many at a time as the pool has environments.

    Args:
        pool: The environments.
        controller: Chooses the actions.
        episodes: Family and seed of every start.
        record: Indices into `episodes` whose frames are kept.
        description: Of the progress bar; None shows none.
        on_chunk: Called with the index of the first episode of each group that is played together, before it starts.

    Returns:
        One rollout per episode, in order.
    """
    rollouts: list[Rollout] = []
    with tqdm(total=len(episodes), desc=description, leave=False, disable=description is None) as progress:
        for start in range(0, len(episodes), pool.size):
            chunk = episodes[start : start + pool.size]
            if on_chunk is not None:
                on_chunk(start)
            controller.begin()
            for slot, episode in enumerate(chunk):
                controller.begin_episode(slot, episode)
            kept = {index - start for index in record if start <= index < start + len(chunk)}
            rollouts += _Chunk(pool, chunk, kept).play(controller)
            progress.update(len(chunk))
    return rollouts


class _Chunk:
    """Episodes that are played side by side, one per environment of the pool."""

    def __init__(self, pool: EnvironmentPool, episodes: Sequence[Start], kept: set[int]) -> None:
        self.pool, self.episodes, self.kept = pool, episodes, kept
        count = len(episodes)
        self.observations: dict[int, Observation] = {}
        self.instructions = [""] * count
        self.success, self.num_steps, self.restarts = [False] * count, [0] * count, [0] * count
        self.failures: dict[int, Failure] = {}
        self.progress: list[dict[str, None]] = [{} for _ in range(count)]
        self.frames: list[list[NDArray[np.uint8]]] = [[] for _ in range(count)]

    def play(self, controller: Controller) -> list[Rollout]:
        """All of them until they end."""
        for slot, answer in self._played(controller, self.pool.start(dict(enumerate(self.episodes)))):
            self._begin(slot, answer)
        while self.observations:
            slots = list(self.observations)
            actions = controller.act(self.pool, slots, [self.observations[slot] for slot in slots])
            for slot, result in self._played(controller, self.pool.step(dict(self._played(controller, actions)))):
                self._advance(slot, result)
        return [self._rollout(slot) for slot in range(len(self.episodes))]

    def _played(
        self, controller: Controller, answers: Mapping[int, Answer | Failure | Restarted]
    ) -> Iterator[tuple[int, Answer]]:
        """Answers of the environments that gave one; the episodes of the others end, or begin again."""
        for slot, answer in answers.items():
            if isinstance(answer, Failure):
                self.failures[slot] = answer
                self.observations.pop(slot, None)
            elif isinstance(answer, Restarted):
                self.restarts[slot] += 1
                controller.begin_episode(slot, self.episodes[slot])
                self._begin(slot, answer.observation)
            else:
                yield slot, answer

    def _begin(self, slot: int, observation: Observation) -> None:
        self.observations[slot] = observation
        self.instructions[slot] = observation["instruction"]
        self.success[slot], self.num_steps[slot] = False, 0
        self.progress[slot], self.frames[slot] = {}, []
        self._keep_frame(slot, observation)

    def _keep_frame(self, slot: int, observation: Observation) -> None:
        if slot in self.kept:
            self.frames[slot].append(observation["image"])

    def _advance(self, slot: int, result: StepResult) -> None:
        self.num_steps[slot] += 1
        self.success[slot] = result.success
        self.progress[slot] |= {name: None for name, reached in result.progress.items() if reached}
        self._keep_frame(slot, result.observation)
        self.observations[slot] = result.observation
        if result.done:
            del self.observations[slot]

    def _rollout(self, slot: int) -> Rollout:
        family, seed = self.episodes[slot]
        failure = self.failures.get(slot)
        success = failure is None and self.success[slot]
        ending = (SOLVED if success else NOT_SOLVED) if failure is None else failure.kind
        return Rollout(
            family,
            seed,
            self.instructions[slot],
            success,
            self.num_steps[slot],
            ending,
            tuple(self.progress[slot]),
            self.restarts[slot],
            self.frames[slot],
        )


def outcomes_by_family(rollouts: Sequence[Rollout]) -> dict[str, list[bool]]:
    """Successes of each family, in the order of the rollouts."""
    outcomes: dict[str, list[bool]] = {}
    for rollout in rollouts:
        outcomes.setdefault(rollout.family, []).append(rollout.success)
    return outcomes
