"""Where a study takes place: what is recorded, what is played, and what a policy there reads and does."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lapa.evaluation import demo_stages as stages
from lapa.evaluation.demo_tokenizer import simulator_words
from lapa.evaluation.environment_pool import EnvironmentPool
from lapa.evaluation.environments.metaworld import CONTROL_FREQUENCY, INSTRUCTIONS, MetaWorldEvaluation
from lapa.evaluation.environments.tabletop import CONTROL_FREQUENCY as TABLETOP_FREQUENCY
from lapa.evaluation.environments.tabletop_embodiments import EMBODIMENTS
from lapa.evaluation.environments.tabletop_tasks import FAMILIES
from lapa.evaluation.record_expert import ExpertEpisode, record_expert
from lapa.evaluation.suites import Cell, Suite

if TYPE_CHECKING:
    from lapa.evaluation.study import StudySettings

# Episodes that a process records side by side: while one starts, which takes long, the others do not wait for it alone.
RECORDED_PER_PROCESS = 4


class World(ABC):
    """
    A simulator, as a study needs it.

    Attributes:
        name: Key of `WORLDS`, and of the action statistics of policies trained there.
        action_dim: Length of an action.
        embodiments: What a column's `video` may name.
        splits: What a study's `splits` may name. Finetunings are chosen on the first.
        families: What a study's `families` may name.
        reads: Settings that a recording and an episode depend on.
        vision_tokenizer: Folder of the image tokenizer that comes with the package; None where a study trains one.
        side_by_side: Episodes played at a time.
    """

    name: ClassVar[str]
    action_dim: ClassVar[int]
    embodiments: ClassVar[tuple[str, ...]]
    splits: ClassVar[tuple[str, ...]]
    families: ClassVar[tuple[str, ...]]
    reads: ClassVar[tuple[str, ...]]
    vision_tokenizer: ClassVar[Path | None] = None
    side_by_side: ClassVar[int]

    @abstractmethod
    def frequency(self, settings: "StudySettings") -> float:
        """Frames per second of a recording."""

    @abstractmethod
    def words(self) -> list[str]:
        """What instructions are made of; single pieces of the text tokenizer."""

    @abstractmethod
    def has_actions(self, embodiment: str) -> bool:
        """Whether a recording of it has actions, for the methods that may see them."""

    @abstractmethod
    def record(
        self,
        settings: "StudySettings",
        episodes: Mapping[str, int],
        first_seed: int,
        embodiment: str,
        with_actions: bool,
        num_processes: int = 1,
    ) -> stages.Recording:
        """
        Episodes of the expert: `episodes[family]` of each family, from consecutive seeds. They do not depend on the number
        of processes, which a fast simulator may ignore.
        """

    @abstractmethod
    def suite(
        self, settings: "StudySettings", name: str, splits: tuple[str, ...], rollouts: int, first_seed: int
    ) -> Suite:
        """What is played: every family in every split."""


class Tabletop(World):
    """The simulator of `lapa demo`."""

    name = "tabletop"
    action_dim = 2
    embodiments = tuple(EMBODIMENTS)
    splits = ("seen", "unseen")
    families = tuple(FAMILIES)
    reads = ("image_size", "num_blocks", "families", "thresholds", "expert_noise")
    vision_tokenizer = stages.VISION_TOKENIZER
    side_by_side = 60

    def frequency(self, settings: "StudySettings") -> float:
        """See `World.frequency`."""
        return float(TABLETOP_FREQUENCY)

    def words(self) -> list[str]:
        """See `World.words`; colours and shapes are words of their own, so that an unseen pair of them can be read."""
        return simulator_words()

    def has_actions(self, embodiment: str) -> bool:
        """See `World.has_actions`."""
        return EMBODIMENTS[embodiment].has_actions

    def record(
        self,
        settings: "StudySettings",
        episodes: Mapping[str, int],
        first_seed: int,
        embodiment: str,
        with_actions: bool,
        num_processes: int = 1,
    ) -> stages.Recording:
        """See `World.record`; a recording of thousands takes half a minute in one process."""
        return stages.record(settings, dict(episodes), first_seed, embodiment, with_actions)

    def suite(
        self, settings: "StudySettings", name: str, splits: tuple[str, ...], rollouts: int, first_seed: int
    ) -> Suite:
        """See `World.suite`."""
        options = {key: _plain(value) for key, value in stages.environment_options(settings).items()}
        cells = tuple(
            Cell(split, family, options | {"split": split}) for split in splits for family in settings.families
        )
        return Suite(name, self.name, cells, rollouts, first_seed)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class MetaWorld(World):
    """MetaWorld: one arm; families are its tasks. Its image tokenizer is trained on recordings of its own."""

    name = "metaworld"
    action_dim = MetaWorldEvaluation.action_dim
    embodiments = ("sawyer",)
    splits = ("seen",)
    families = tuple(INSTRUCTIONS)
    reads = ("image_size", "families", "expert_noise", "action_repeat", "max_steps")
    side_by_side = 30  # 0.1 GB each

    def frequency(self, settings: "StudySettings") -> float:
        """See `World.frequency`."""
        return CONTROL_FREQUENCY / settings.action_repeat

    def words(self) -> list[str]:
        """See `World.words`."""
        return sorted({word for sentence in INSTRUCTIONS.values() for word in sentence.split()})

    def has_actions(self, embodiment: str) -> bool:
        """See `World.has_actions`."""
        return True

    def record(
        self,
        settings: "StudySettings",
        episodes: Mapping[str, int],
        first_seed: int,
        embodiment: str,
        with_actions: bool,
        num_processes: int = 1,
    ) -> stages.Recording:
        """See `World.record`."""
        families = [family for family, count in episodes.items() for _ in range(count)]
        starts = [(family, first_seed + number) for number, family in enumerate(families)]
        make = partial(MetaWorldEvaluation, **self._options(settings))
        size, processes = (1, 0) if num_processes == 1 else (RECORDED_PER_PROCESS * num_processes, num_processes)
        with EnvironmentPool(make, size, processes) as pool:
            return _join(record_expert(pool, starts, settings.expert_noise), with_actions)

    def suite(
        self, settings: "StudySettings", name: str, splits: tuple[str, ...], rollouts: int, first_seed: int
    ) -> Suite:
        """See `World.suite`."""
        cells = tuple(Cell(split, task, self._options(settings)) for split in splits for task in settings.families)
        return Suite(name, self.name, cells, rollouts, first_seed, self.frequency(settings))

    def _options(self, settings: "StudySettings") -> dict[str, Any]:
        return {
            "image_size": settings.image_size,
            "max_steps": settings.max_steps,
            "action_repeat": settings.action_repeat,
        }


def _join(episodes: list[ExpertEpisode], with_actions: bool) -> stages.Recording:
    """Lays episodes end to end; without actions they are dropped, not hidden."""
    actions = [np.concatenate([e.actions, np.zeros_like(e.actions[:1])]) for e in episodes] if with_actions else []
    return stages.Recording(
        frames=np.concatenate([episode.frames for episode in episodes]),
        lengths=np.array([len(episode.frames) for episode in episodes]),
        instructions=np.array([episode.instruction for episode in episodes]),
        effector=np.concatenate([episode.proprio[:, :3] for episode in episodes]),
        actions=np.concatenate(actions) if actions else np.zeros((0, MetaWorld.action_dim), np.float32),
    )


WORLDS: dict[str, World] = {world.name: world for world in (Tabletop(), MetaWorld())}


__all__ = ["WORLDS", "World"]
