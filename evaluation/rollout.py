"""Playing policies in closed loop, many environments in lock step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lapa.evaluation.environment_pool import EnvironmentPool, Failure, Start
from lapa.evaluation.environments.base import Bounds, Observation

if TYPE_CHECKING:
    from lapa.serving.policy import ChunkPlayer, Policy

SOLVED, NOT_SOLVED = "solved", "not_solved"


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
        frames: (num_steps + 1, height, width, 3) uint8 where they were asked for, else empty.
    """

    family: str
    seed: int
    instruction: str
    success: bool
    num_steps: int
    ending: str = NOT_SOLVED
    progress: tuple[str, ...] = ()
    frames: list[NDArray[np.uint8]] = field(default_factory=list, repr=False, compare=False)


class Controller(ABC):
    """Chooses actions for the environments that still run."""

    def begin(self) -> None:  # noqa: B027 (most remember nothing)
        """A new episode starts in every environment."""

    @abstractmethod
    def act(
        self, pool: EnvironmentPool, slots: Sequence[int], observations: Sequence[Observation]
    ) -> Mapping[int, NDArray[np.float32] | Failure]:
        """Action (action_dim,) of each slot; a `Failure` where the environment did not answer."""


class PolicyController(Controller):
    """
    A policy that sees images and instructions, and the robot's state where it is to.

    Args:
        policy: Chooses the actions.
        with_proprio: Whether the policy reads `proprio`.
    """

    def __init__(self, policy: "Policy", with_proprio: bool = False) -> None:
        self.policy, self.with_proprio = policy, with_proprio

    def act(
        self, pool: EnvironmentPool, slots: Sequence[int], observations: Sequence[Observation]
    ) -> Mapping[int, NDArray[np.float32] | Failure]:
        """See [`Controller`]."""
        actions = self.policy.act(*_inputs(observations, self.with_proprio))
        return dict(zip(slots, np.asarray(actions, dtype=np.float32)))


class ChunkController(Controller):
    """
    A policy that plays chunks of actions, see [`~lapa.serving.policy.ChunkPlayer`]; every episode starts with a new one.

    Args:
        player: Remembers what is left of each environment's chunk.
        with_proprio: Whether the policy reads `proprio`.
    """

    def __init__(self, player: "ChunkPlayer", with_proprio: bool = False) -> None:
        self.player, self.with_proprio = player, with_proprio

    def begin(self) -> None:
        """See [`Controller`]."""
        self.player.reset()

    def act(
        self, pool: EnvironmentPool, slots: Sequence[int], observations: Sequence[Observation]
    ) -> Mapping[int, NDArray[np.float32] | Failure]:
        """See [`Controller`]."""
        actions = self.player.act(*_inputs(observations, self.with_proprio), robots=slots)
        return dict(zip(slots, np.asarray(actions, dtype=np.float32)))


def _inputs(observations: Sequence[Observation], with_proprio: bool) -> tuple[Any, ...]:
    """Images, instructions and, where they are wanted, states."""
    names = ("image", "instruction", "proprio") if with_proprio else ("image", "instruction")
    return tuple([observation[name] for observation in observations] for name in names)


class ExpertController(Controller):
    """The scripted expert, which sees the simulator's state."""

    def act(
        self, pool: EnvironmentPool, slots: Sequence[int], observations: Sequence[Observation]
    ) -> Mapping[int, NDArray[np.float32] | Failure]:
        """See [`Controller`]."""
        return pool.expert_actions(slots)


class StillController(Controller):
    """Does nothing, in whatever way the environment does that."""

    def act(
        self, pool: EnvironmentPool, slots: Sequence[int], observations: Sequence[Observation]
    ) -> Mapping[int, NDArray[np.float32] | Failure]:
        """See [`Controller`]."""
        return pool.still_actions(slots)


class RandomActions:
    """
    Moves uniformly at random.

    Args:
        action_dim: Length of an action.
        seed: Of the draws.
        bounds: Least and greatest values of an action's numbers, for all or for each.
    """

    def __init__(self, action_dim: int, seed: int = 0, bounds: Bounds = (-1.0, 1.0)) -> None:
        self.action_dim, self.bounds = action_dim, bounds
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Begins the draws anew."""
        self.generator = np.random.default_rng(seed)

    def act(self, images: Sequence[NDArray[np.uint8]], instructions: Sequence[str]) -> NDArray[np.float32]:
        """See [`~lapa.serving.policy.Policy`]."""
        return self.generator.uniform(*self.bounds, (len(images), self.action_dim)).astype(np.float32)


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
        self.success, self.num_steps = [False] * count, [0] * count
        self.failures: dict[int, Failure] = {}
        self.progress: list[dict[str, None]] = [{} for _ in range(count)]
        self.frames: list[list[NDArray[np.uint8]]] = [[] for _ in range(count)]

    def play(self, controller: Controller) -> list[Rollout]:
        """All of them until they end."""
        self._observe(self.pool.start(dict(enumerate(self.episodes))))
        while self.observations:
            slots = list(self.observations)
            actions = controller.act(self.pool, slots, [self.observations[slot] for slot in slots])
            self._fail({slot: action for slot, action in actions.items() if isinstance(action, Failure)})
            self._step({slot: action for slot, action in actions.items() if not isinstance(action, Failure)})
        return [self._rollout(slot) for slot in range(len(self.episodes))]

    def _observe(self, observations: Mapping[int, Observation | Failure]) -> None:
        for slot, observation in observations.items():
            if isinstance(observation, Failure):
                self._fail({slot: observation})
                continue
            self.observations[slot] = observation
            self.instructions[slot] = observation["instruction"]
            self._keep_frame(slot, observation)

    def _keep_frame(self, slot: int, observation: Observation) -> None:
        if slot in self.kept:
            self.frames[slot].append(observation["image"])

    def _fail(self, failures: Mapping[int, Failure]) -> None:
        self.failures |= failures
        for slot in failures:
            self.observations.pop(slot, None)

    def _step(self, actions: Mapping[int, NDArray[np.float32]]) -> None:
        for slot, result in self.pool.step(actions).items():
            if isinstance(result, Failure):
                self._fail({slot: result})
                continue
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
            self.frames[slot],
        )


def outcomes_by_family(rollouts: Sequence[Rollout]) -> dict[str, list[bool]]:
    """Successes of each family, in the order of the rollouts."""
    outcomes: dict[str, list[bool]] = {}
    for rollout in rollouts:
        outcomes.setdefault(rollout.family, []).append(rollout.success)
    return outcomes
