"""Recording the expert of an environment."""

import numpy as np
import pytest

pytest.importorskip("gymnasium")
pytest.importorskip("pymunk")

from lapa.evaluation.environments.tabletop_adapter import TabletopEvaluation
from lapa.evaluation.record_expert import record_expert


@pytest.fixture(scope="module")
def environment():
    return TabletopEvaluation(families=("reach",), image_size=32, num_blocks=2)


def test_an_episode_is_what_the_expert_did(environment):
    episode = record_expert(environment, "reach", 3)
    assert episode.success
    steps = len(episode.actions)
    assert episode.frames.shape == (steps + 1, 32, 32, 3)
    assert episode.proprio.shape[0] == steps + 1
    assert episode.instruction == environment.start("reach", 3)["instruction"]
    # Played again, the actions lead to the same pictures.
    for action, frame in zip(episode.actions, episode.frames[1:], strict=True):
        result = environment.step(action)
        assert np.array_equal(result.observation["image"], frame)
    assert result.success


def test_noise_disturbs_within_the_bounds_and_is_the_seeds(environment):
    clean, noisy, again = (record_expert(environment, "reach", 3, noise) for noise in (0.0, 0.5, 0.5))
    assert np.array_equal(noisy.actions, again.actions)
    assert np.abs(noisy.actions).max() <= 1.0
    assert np.abs(noisy.actions[0] - clean.actions[0]).max() > 0.05
    with pytest.raises(ValueError, match="`noise` must be at least 0, got -1"):
        record_expert(environment, "reach", 3, -1)
