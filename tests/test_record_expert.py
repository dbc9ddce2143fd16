"""Recording the expert of an environment."""

import os
from functools import partial

import numpy as np
import pytest

pytest.importorskip("gymnasium")
pytest.importorskip("pymunk")

from lapa.evaluation.environment_pool import EnvironmentPool
from lapa.evaluation.environments.tabletop_adapter import TabletopEvaluation
from lapa.evaluation.record_expert import record_expert

MAKE = partial(TabletopEvaluation, families=("reach", "separate"), image_size=32, num_blocks=2)
EPISODES = [("reach", 3), ("separate", 4), ("reach", 5)]


class Breaking(TabletopEvaluation):
    """Crashes in one episode: always, or once where `once` names a file that it leaves."""

    def __init__(self, once=None, **options):
        super().__init__(**options)
        self.once = once

    def start(self, task, seed):
        self.breaks = seed == 4 and not (self.once and self.once.exists())
        return super().start(task, seed)

    def expert_action(self):
        if self.breaks:
            if self.once:
                self.once.touch()
                os._exit(3)
            raise RuntimeError("no more")
        return super().expert_action()


@pytest.fixture
def pool():
    with EnvironmentPool(MAKE, 1) as pool:
        yield pool


def test_an_episode_is_what_the_expert_did(pool):
    (episode,) = record_expert(pool, [("reach", 3)])
    assert episode.success
    steps = len(episode.actions)
    assert episode.frames.shape == (steps + 1, 32, 32, 3)
    assert episode.proprio.shape[0] == steps + 1
    environment = MAKE()
    assert episode.instruction == environment.start("reach", 3)["instruction"]
    # Played again, the actions lead to the same pictures.
    for action, frame in zip(episode.actions, episode.frames[1:], strict=True):
        result = environment.step(action)
        assert np.array_equal(result.observation["image"], frame)
    assert result.success


def test_noise_disturbs_within_the_bounds_and_is_the_seeds(pool):
    clean, noisy, again = (record_expert(pool, [("reach", 3)], noise)[0] for noise in (0.0, 0.5, 0.5))
    assert np.array_equal(noisy.actions, again.actions)
    assert np.abs(noisy.actions).max() <= 1.0
    assert np.abs(noisy.actions[0] - clean.actions[0]).max() > 0.05
    with pytest.raises(ValueError, match="`noise` must be at least 0, got -1"):
        record_expert(pool, [("reach", 3)], -1)


@pytest.mark.parametrize(("size", "processes"), [(2, 0), (3, 2)])
def test_an_episode_does_not_depend_on_what_is_recorded_beside_it(pool, size, processes):
    one_at_a_time = record_expert(pool, EPISODES, 0.2)
    with EnvironmentPool(MAKE, size, processes) as several:
        beside = record_expert(several, EPISODES, 0.2)
    for first, second in zip(one_at_a_time, beside, strict=True):
        assert first.instruction == second.instruction
        for name in ("frames", "proprio", "actions"):
            assert np.array_equal(getattr(first, name), getattr(second, name))


def test_an_episode_whose_process_died_is_recorded_again(pool, tmp_path):
    make = partial(Breaking, once=tmp_path / "died", families=("reach", "separate"), image_size=32, num_blocks=2)
    with EnvironmentPool(make, 3, 1) as dying:
        recorded = record_expert(dying, EPISODES, 0.2)
    assert (tmp_path / "died").exists()
    for ours, expected in zip(recorded, record_expert(pool, EPISODES, 0.2), strict=True):
        assert np.array_equal(ours.frames, expected.frames)
        assert np.array_equal(ours.actions, expected.actions)


def test_a_crash_names_the_episode():
    make = partial(Breaking, families=("reach", "separate"), image_size=32, num_blocks=2)
    message = r"recording 'separate' from seed 4: the environment crashed: RuntimeError\('no more'\)"
    with EnvironmentPool(make, 3) as pool, pytest.raises(RuntimeError, match=message):
        record_expert(pool, EPISODES)
