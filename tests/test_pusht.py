"""gym-pusht through the adapter; `pip install "lapa[pusht]"`, or the tests of the simulator skip."""

import importlib.util
import sys
from importlib import resources
from types import SimpleNamespace

import numpy as np
import pytest
from simulator_doubles import module_tree

from lapa.cli import main
from lapa.evaluation.environment_pool import EnvironmentPool
from lapa.evaluation.environments.base import EnvironmentMisused
from lapa.evaluation.environments.pusht import INSTRUCTION, PushTEvaluation
from lapa.evaluation.rollout import RandomActions, StillController, roll_out
from lapa.evaluation.suites import load_suite

needs_simulator = pytest.mark.skipif(
    importlib.util.find_spec("gym_pusht") is None, reason='needs `pip install "lapa[pusht]"`'
)


class Board:
    """gym-pusht's environment: the disc goes where it is told, coverage grows by 0.3 a step."""

    def __init__(self, obs_type, observation_width, observation_height) -> None:
        assert obs_type == "pixels_agent_pos"
        self.shape = (observation_height, observation_width, 3)

    def reset(self, seed):
        self.place, self.coverage = np.array([100.0 + seed, 50.0]), 0.0
        return self._see(), {"is_success": False}

    def step(self, action):
        self.place, self.coverage = action, self.coverage + 0.3
        return self._see(), 0.0, False, False, {"is_success": self.coverage > 0.95, "coverage": self.coverage}

    def _see(self):
        return {"pixels": np.zeros(self.shape, np.uint8), "agent_pos": self.place}

    def close(self): ...


@pytest.fixture
def double(monkeypatch):
    module_tree(monkeypatch, "gym_pusht.envs.pusht", PushTEnv=Board)
    monkeypatch.setitem(sys.modules, "pymunk", SimpleNamespace(version="6.11.1"))


def test_coverage_counts_as_progress_and_doing_nothing_stays(double):
    environment = PushTEvaluation(image_size=(48, 64), max_steps=10)
    observation = environment.start("push_t", 7)
    assert observation["image"].shape == (48, 64, 3)
    assert observation["instruction"] == INSTRUCTION
    assert environment.still_action().tolist() == observation["proprio"].tolist() == [107, 50]
    environment.step(np.array([-9, 600], np.float32))
    assert environment.still_action().tolist() == [0, 512]
    with EnvironmentPool(PushTEvaluation, 1) as pool:
        (rollout,) = roll_out(pool, StillController(), [("push_t", 7)])
    assert (rollout.success, rollout.num_steps) == (True, 4)
    assert rollout.progress == ("covered_25", "covered_50", "covered_75")
    assert pool._groups[0]._environments[0]._environment.place.tolist() == [107, 50]


def test_the_report_shows_partial_results_and_published_rows(double, tmp_path):
    text = (resources.files("lapa.evaluation") / "suites" / "pusht.yaml").read_text()
    suite = tmp_path / "short.yaml"
    # Two steps cover 0.6 of the outline.
    suite.write_text(text.replace("max_steps: 300", "max_steps: 2") + "published: {elsewhere: {A: 1.5, B: 2 / 3}}\n")
    arguments = ["--suite", str(suite), "--policy", "random", "--rollouts", "4", "--output", str(tmp_path / "out")]
    arguments += ["--num-processes", "0"]  # the double is of this process
    assert main(["evaluate", *arguments]) == 0
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| pusht/push_t | 0.0 [0.0, 49.0] | 4 | 0.0 | 0 | 0 |" in page
    assert "| pusht/push_t | covered_50 | 100.0 [51.0, 100.0] | 100.0 |" in page
    assert "covered_75" not in page
    assert "- elsewhere: A 1.5, B 2 / 3\n" in page
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("Partial results") == 1
    assert "A 1.5, B 2 / 3" in html


def test_an_episode_is_cut_off_and_mistakes_are_named(double, monkeypatch):
    environment = PushTEvaluation(max_steps=2)
    environment.start("push_t", 0)
    assert [environment.step(np.zeros(2, np.float32)).done for _ in range(2)] == [False, True]
    with pytest.raises(EnvironmentMisused, match="must be push_t"):
        environment.start("pusht", 0)
    with pytest.raises(ValueError, match="image_size"):
        PushTEvaluation(image_size=(96,))
    monkeypatch.setitem(sys.modules, "pymunk", SimpleNamespace(version="7.3.1"))
    with pytest.raises(ImportError, match=r'pymunk below 7, found 7.3.1: pip install "lapa\[pusht\]"'):
        PushTEvaluation()
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    with pytest.raises(ImportError, match=r'pip install "lapa\[pusht\]"'):
        PushTEvaluation()


def test_random_actions_fill_the_board():
    draws = [np.random.default_rng(0)] * 2000
    rows = [np.zeros((1, 1, 3), np.uint8)] * 2000, [""] * 2000
    suite = load_suite("pusht")
    moves = RandomActions(suite.action_dim(), suite.action_bounds()).act(*rows, draws)
    assert moves.shape == (2000, 2)
    assert 0 <= moves.min() < 5
    assert 507 < moves.max() <= 512
    simpler = load_suite("simpler-widowx")
    moves = RandomActions(simpler.action_dim(), simpler.action_bounds()).act(*rows, draws)
    assert np.abs(moves[:, :3]).max() == pytest.approx(0.05, abs=1e-3)
    assert (moves[:, 6].min(), moves[:, 6].max()) == pytest.approx((0, 1), abs=1e-2)


@needs_simulator
def test_the_real_board_starts_as_the_seed_says_and_moves_as_told():
    environment = PushTEvaluation()
    first = environment.start("push_t", 3)
    assert (first["image"].shape, first["image"].dtype) == ((96, 96, 3), np.uint8)
    for _ in range(20):
        result = environment.step(np.array([60.0, 60.0], np.float32))
    assert result.observation["proprio"] == pytest.approx([60, 60], abs=1)
    assert not result.success
    still = environment.step(environment.still_action()).observation["proprio"]
    assert still == pytest.approx(result.observation["proprio"], abs=0.5)
    assert np.array_equal(environment.start("push_t", 3)["image"], first["image"])
    assert not np.array_equal(environment.start("push_t", 4)["image"], first["image"])
