"""SIMPLER's WidowX tasks through the adapter, against a double of both packages' interface."""

import sys

import gymnasium
import numpy as np
import pytest
from simulator_doubles import WidowX, module_tree

from lapa.evaluation.environments.base import EnvironmentMisused
from lapa.evaluation.environments.simpler import TASKS, SimplerEvaluation, from_bridge
from lapa.evaluation.suites import load_suite

BACKENDS = {"maniskill3": ("mani_skill.envs", "-v1"), "simpler_env": ("mani_skill2_real2sim.envs", "-v0")}
HALF_TURN = np.array([0.01, 0, -0.02, 0, 0, np.pi / 2, 0.7], np.float32)


@pytest.fixture(params=list(BACKENDS))
def backend(request, monkeypatch):
    WidowX.made = []
    module_tree(monkeypatch, BACKENDS[request.param][0])
    monkeypatch.setattr(gymnasium, "make", lambda identifier, **options: WidowX(identifier, options))
    return request.param


def test_an_episode_is_played_to_its_end_and_its_last_step_counts(backend):
    environment = SimplerEvaluation(backend)
    observation = environment.start("spoon_on_towel", 40_000_005)
    assert observation["instruction"] == "put the spoon on the towel"
    results = [environment.step(HALF_TURN) for _ in range(60)]
    assert [result.done for result in results] == [False] * 59 + [True]
    assert [number for number, result in enumerate(results, 1) if result.success] == [4]
    reached = {name: number for number, result in reversed(list(enumerate(results, 1)))
               for name, value in result.progress.items() if value}  # fmt: skip
    assert reached == {"grasped": 2, "moved": 3, "placed": 4}
    assert set(results[0].progress) == {"grasped", "held", "moved", "placed"}
    early = SimplerEvaluation(backend, stop_at_success=True)
    early.start("spoon_on_towel", 0)
    assert [early.step(HALF_TURN).done for _ in range(4)] == [False, False, False, True]


def test_the_simulator_is_asked_for_as_its_source_wants_it(backend):
    environment = SimplerEvaluation(backend, render_backend="cpu")
    version = BACKENDS[backend][1]
    for task, (name, _) in TASKS.items():
        for seed in (0, 25):
            observation = environment.start(task, seed)
        assert WidowX.made[-1].identifier == name + version
        assert WidowX.made[-1].episode == 1
    assert [world.closed for world in WidowX.made] == [True, True, True, False]
    expected = {
        "maniskill3": {"obs_mode": "rgb+segmentation", "num_envs": 1, "sim_backend": "cpu", "render_backend": "cpu"},
        "simpler_env": {"obs_mode": "rgbd", "prepackaged_config": True},
    }
    assert WidowX.made[0].options == expected[backend]
    assert observation["image"].shape == (256, 256, 3)
    assert (observation["image"][100, 10].tolist(), observation["image"][100, -10].tolist()) == ([0] * 3, [1] * 3)
    environment.close()
    assert WidowX.made[-1].closed


def test_actions_of_the_bridge_data_are_turned_into_the_simulators(backend):
    environment = SimplerEvaluation(backend)
    environment.start("stack_cube", 0)
    environment.step(HALF_TURN)
    environment.step(environment.still_action())
    first, still = WidowX.made[-1].actions
    assert first.dtype == np.float32
    assert first.tolist() == pytest.approx([0.01, 0, -0.02, 0, 0, np.pi / 2, 1])
    assert still.tolist() == [0, 0, 0, 0, 0, 0, 1]
    plain = SimplerEvaluation(backend, actions="simulator")
    plain.start("stack_cube", 0)
    plain.step(np.full(7, 0.25, np.float32))
    assert WidowX.made[-1].actions[0].tolist() == [0.25] * 7


def test_roll_pitch_yaw_about_fixed_axes_becomes_a_rotation_vector():
    # Roll by a quarter, then yaw by a quarter about the fixed axis: a third of a turn about (1, 1, 1).
    turned = from_bridge(np.array([0, 0, 0, np.pi / 2, 0, np.pi / 2, 0.5], np.float32))
    assert turned[3:6] == pytest.approx(np.ones(3) * (2 * np.pi / 3) / np.sqrt(3), abs=1e-6)
    assert turned[6] == -1


def test_24_rollouts_are_the_24_layouts():
    for name in ("simpler-widowx", "simpler-widowx-original"):
        suite = load_suite(name)
        assert [cell.task for cell in suite.cells] == list(TASKS)
        for cell in suite.cells:
            assert {seed % 24 for _, seed in suite.episodes(cell)} == set(range(24))


def test_mistakes_and_what_is_missing_are_named(backend, monkeypatch):
    with pytest.raises(EnvironmentMisused, match=r"`task` must be one of spoon_on_towel"):
        SimplerEvaluation(backend).start("widowx_stack_cube", 0)
    for options, message in (({"backend": "sapien"}, "maniskill3, simpler_env"), ({"actions": "rt1"}, "bridge, sim")):
        with pytest.raises(ValueError, match=message):
            SimplerEvaluation(**{"backend": backend, **options})
    package = BACKENDS[backend][0].split(".")[0]
    for name in (package, BACKENDS[backend][0]):
        monkeypatch.setitem(sys.modules, name, None)
    message = {"maniskill3": "pip install mani_skill;.*bridge_v2_real2sim", "simpler_env": "SimplerEnv"}[backend]
    with pytest.raises(ImportError, match=message):
        SimplerEvaluation(backend)
