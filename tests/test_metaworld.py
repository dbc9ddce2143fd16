"""MetaWorld through the adapter; `pip install "lapa[metaworld]"` and OpenGL, or the tests skip."""

from functools import partial

import numpy as np
import pytest

from lapa.evaluation.environment_pool import EnvironmentPool
from lapa.evaluation.environments.metaworld import INSTRUCTIONS, MetaWorldEvaluation
from lapa.evaluation.record_expert import record_expert


@pytest.fixture(scope="module")
def environment():
    pytest.importorskip("metaworld", reason='needs `pip install "lapa[metaworld]"`')
    try:
        environment = MetaWorldEvaluation(image_size=64, max_steps=120)
        environment.start("door-open", 0)
    except ValueError as error:
        pytest.skip(str(error))
    yield environment
    environment.close()


def test_every_task_has_a_sentence(environment):
    assert {f"{task}-v3" for task in INSTRUCTIONS} == set(environment._classes)
    assert len(set(INSTRUCTIONS.values())) == 50


def test_the_expert_opens_a_door_from_a_start_that_the_seed_fixes(environment):
    first = environment.start("door-open", 7)
    assert first["image"].shape == (64, 64, 3)
    assert first["image"].dtype == np.uint8
    result = environment.step(environment.expert_action())
    while not result.done:
        result = environment.step(environment.expert_action())
    assert result.success
    environment.start("drawer-close", 3)
    again = environment.start("door-open", 7)
    assert np.array_equal(first["image"], again["image"])
    assert np.array_equal(first["proprio"], again["proprio"])
    assert not np.array_equal(environment.start("door-open", 8)["image"], again["image"])


def test_the_picture_is_upright(environment):
    image = environment.start("door-open", 7)["image"].astype(float)
    # The table, which is brown, is at the bottom; the wall behind it, which is grey, at the top.
    redness = image[..., 0] - image[..., 2]
    assert redness[40:].mean() > redness[:12].mean() + 20


def test_an_episode_is_cut_off(environment):
    environment.start("reach", 1)
    steps = 1
    while not (result := environment.step(np.zeros(4, np.float32))).done:
        steps += 1
    assert (steps, result.success) == (120, False)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="max_steps"):
        MetaWorldEvaluation(max_steps=501)
    with pytest.raises(ValueError, match="image_size"):
        MetaWorldEvaluation(image_size=4)


def test_a_repeated_action_is_that_many_steps_of_the_simulator(environment):
    repeated = MetaWorldEvaluation(image_size=64, max_steps=118, action_repeat=5)
    action = np.array([0.5, -0.3, 0.2, 0.0], np.float32)
    repeated.start("reach", 1)
    together = repeated.step(action)
    environment.start("reach", 1)
    for _ in range(5):
        apart = environment.step(action)
    assert np.array_equal(together.observation["image"], apart.observation["image"])
    assert np.array_equal(together.observation["proprio"], apart.observation["proprio"])
    # The limit counts the simulator's steps: the last of 24 actions is cut short.
    steps = 1
    while not (result := repeated.step(np.zeros(4, np.float32))).done:
        steps += 1
    assert (steps + 1, repeated._num_steps, result.success) == (24, 118, False)
    repeated.close()


def test_an_action_repeat_that_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"`action_repeat` must lie in \[1, 100\], got 0"):
        MetaWorldEvaluation(max_steps=100, action_repeat=0)


def test_environments_of_one_process_draw_what_each_draws_alone(environment):
    tasks, action = ("reach", "drawer-open", "push"), np.array([0.5, -0.3, 0.2, 0.0], np.float32)
    alone = []
    for task in tasks:
        environment.start(task, 1)
        alone.append(environment.step(action).observation["image"])
    together = [MetaWorldEvaluation(image_size=64) for _ in tasks]
    for one, task in zip(together, tasks):
        one.start(task, 1)
    drawn = [one.step(action).observation["image"] for one in together]
    together[0].close()
    drawn[1:] = [one._observation()["image"] for one in together[1:]]
    for one in together:
        one.close()
    for ours, expected in zip(drawn, alone):
        assert np.array_equal(ours, expected)


def test_a_recording_does_not_depend_on_the_number_of_processes(environment):
    make = partial(MetaWorldEvaluation, image_size=32, max_steps=60, action_repeat=5)
    starts = [("reach", 3), ("drawer-open", 4), ("push", 5)]
    with EnvironmentPool(make, 1) as one:
        alone = record_expert(one, starts, 0.15)
    with EnvironmentPool(make, 4, 2) as several:
        beside = record_expert(several, starts, 0.15)
    for first, second in zip(alone, beside, strict=True):
        for name in ("frames", "proprio", "actions"):
            assert np.array_equal(getattr(first, name), getattr(second, name))
