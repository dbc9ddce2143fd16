"""LIBERO through the adapter, against a double of its interface."""

import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from simulator_doubles import LiberoArm, module_tree

from lapa.evaluation.environments.base import EnvironmentMisused
from lapa.evaluation.environments.libero import SUITES, LiberoEvaluation, load_states, rotation_vector
from lapa.evaluation.suites import load_suite

STATES = np.arange(6.0).reshape(3, 2)
STILL = [0, 0, 0, 0, 0, 0, -1]


@pytest.fixture
def double(tmp_path, monkeypatch):
    LiberoArm.made = []
    folder = tmp_path / "states" / "libero_goal"
    folder.mkdir(parents=True)
    torch.save(STATES, folder / "stove.pruned_init")
    task = SimpleNamespace(
        language="turn on the stove",
        problem_folder="libero_goal",
        bddl_file="stove.bddl",
        init_states_file="stove.pruned_init",
    )
    benchmark = SimpleNamespace(get_num_tasks=lambda: 2, get_task=lambda number: task)
    folders = {"bddl_files": str(tmp_path / "bddl"), "init_states": str(tmp_path / "states")}
    module_tree(
        monkeypatch,
        "libero.libero",
        benchmark=SimpleNamespace(get_benchmark_dict=lambda: {"libero_goal": lambda: benchmark}),
        get_libero_path=folders.__getitem__,
    )
    module_tree(monkeypatch, "libero.libero.envs", OffScreenRenderEnv=LiberoArm)
    return tmp_path


def test_a_seed_is_an_initial_state_in_which_things_settle(double):
    environment = LiberoEvaluation("libero_goal", image_size=32, settle_steps=2)
    observation = environment.start("1", 4)
    (arm,) = LiberoArm.made
    assert (arm.file, arm.size) == (str(double / "bddl" / "libero_goal" / "stove.bddl"), (32, 32))
    assert arm.calls == [("seed", 0), ("reset",), ("state", [2.0, 3.0]), ("step", STILL), ("step", STILL)]
    assert observation["instruction"] == "turn on the stove"
    assert observation["proprio"] == pytest.approx([0.1, 0.2, 0.3, np.pi / 2, 0, 0, 0.04, -0.04])
    environment.start("1", 5)
    assert arm.calls[5:7] == [("reset",), ("state", [4.0, 5.0])]
    environment.start("0", 0)
    assert arm.closed


# The double's white quarter, seen at the bottom left of the scene.
@pytest.mark.parametrize(("turn", "corner"), [("upright", (-1, 0)), ("rotated", (-1, -1)), ("as_rendered", (0, 0))])
def test_the_picture_is_turned_as_asked(double, turn, corner):
    image = LiberoEvaluation("libero_goal", image_size=32, image_turn=turn).start("0", 0)["image"]
    white = {(row, column) for row in (0, -1) for column in (0, -1) if image[row, column, 0]}
    assert white == {corner}


def test_success_ends_an_episode_and_so_do_its_steps(double):
    environment = LiberoEvaluation("libero_goal", image_size=32, max_steps=3)
    environment.start("0", 0)
    assert not environment.step(np.zeros(7, np.float32)).done
    result = environment.step(np.full(7, 9, np.float32))
    assert (result.success, result.done) == (True, True)
    assert LiberoArm.made[-1].calls[-1] == ("step", [1.0] * 7)
    environment.start("0", 0)
    results = [environment.step(environment.still_action()) for _ in range(3)]
    assert [(result.success, result.done) for result in results] == [(False, False), (False, False), (False, True)]


def test_states_are_arrays_and_nothing_else(tmp_path):
    torch.save(STATES, tmp_path / "good")
    assert np.array_equal(load_states(tmp_path / "good"), STATES)

    class Harm:
        def __reduce__(self):
            return print, ("ran",)

    torch.save(Harm(), tmp_path / "bad", pickle_module=pickle)
    with pytest.raises(pickle.UnpicklingError, match="print was not an allowed"):
        load_states(tmp_path / "bad")


def test_a_rotation_keeps_its_way_round():
    assert rotation_vector(np.array([0, 0, 0, 1.0])).tolist() == [0, 0, 0]
    assert rotation_vector(np.array([0, 0, np.sqrt(0.5), -np.sqrt(0.5)])) == pytest.approx([0, 0, 1.5 * np.pi])


def test_the_suite_has_every_task_with_its_states_once():
    suite = load_suite("libero")
    assert [cell.group for cell in suite.cells[::10]] == list(SUITES)[:4]
    assert {cell.group: cell.options["suite"] for cell in suite.cells} == {name: name for name in list(SUITES)[:4]}
    assert {seed % 50 for _, seed in suite.episodes(suite.cells[17])} == set(range(50))


def test_mistakes_and_what_is_missing_are_named(double, monkeypatch):
    with pytest.raises(EnvironmentMisused, match="must be a number from 0 to 1 of libero_goal, got 'stove'"):
        LiberoEvaluation("libero_goal").start("stove", 0)
    for options, message in (({"suite": "libero"}, "libero_spatial"), ({"image_turn": "left"}, "upright, rotated"),
                             ({"max_steps": 0}, "max_steps")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            LiberoEvaluation(**options)
    monkeypatch.setitem(sys.modules, "libero.libero", None)
    with pytest.raises(ImportError, match="git clone https://github.com/Lifelong-Robot-Learning/LIBERO"):
        LiberoEvaluation()
