"""Language Table through the adapter: against a double always, against the simulator where it is installed."""

import importlib
import importlib.util
import sys

import numpy as np
import pytest
from simulator_doubles import write_language_table

from lapa.evaluation.environments.base import EnvironmentMisused
from lapa.evaluation.environments.language_table import TASKS, LanguageTableEvaluation
from lapa.evaluation.environments.stand_in_modules import stand_in_modules
from lapa.evaluation.suites import load_suite

STAND_INS = ("tensorflow", "tf_agents", "six", "imageio", "gym")
needs_simulator = pytest.mark.skipif(
    importlib.util.find_spec("language_table") is None or importlib.util.find_spec("pybullet") is None,
    reason="Language Table is not installed (github.com/google-research/language-table, lapa[language-table])",
)


def forget():
    for name in [name for name in sys.modules if name.split(".")[0] == "language_table"]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def double(tmp_path, monkeypatch):
    """The package of the double; the module that holds its environment."""
    write_language_table(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    LanguageTableEvaluation().close()
    yield sys.modules["language_table.environments.language_table"]
    forget()


def test_stand_ins_last_as_long_as_the_import_and_spare_what_is_there(monkeypatch):
    with (
        pytest.raises(KeyError),
        stand_in_modules({"no_such": {"a": 1}, "no_such.part": {"b": 2}, "json": {}}) as names,
    ):
        import json

        import no_such
        from no_such.part import b

        assert (names, no_such.a, b, json.loads("3")) == (["no_such", "no_such.part"], 1, 2, 3)
        raise KeyError
    assert not {"no_such", "no_such.part"} & set(sys.modules)
    with pytest.raises(ImportError):
        import no_such


def test_nothing_of_the_stand_ins_is_left_behind(double):
    absent = [name for name in STAND_INS if importlib.util.find_spec(name) is None]
    assert absent
    assert not set(absent) & {name.split(".")[0] for name in sys.modules}


@pytest.mark.parametrize(("split", "kind", "training"), [("seen", "BLOCK_8", True), ("unseen", "N_CHOOSE_K", False)])
def test_a_split_is_a_set_of_boards_and_a_task_a_reward(double, split, kind, training):
    environment = LanguageTableEvaluation(split)
    for task, (_, reward) in TASKS.items():
        environment.start(task, 3)
        made = environment._environment
        assert (made.block_mode.value, made.training, made.reward_factory.__name__) == (kind, training, reward)
        assert double.Client.open == 1
    environment.close()
    assert double.Client.open == 0


def test_a_start_depends_on_the_seed_alone_and_has_a_plan(double):
    environment = LanguageTableEvaluation(image_size=(90, 160))
    np.random.seed(5)
    state = np.random.get_state()[1].tolist()
    starts, resets, experts = [], [], []
    for seed in (1, 2, 3, 4, 1, 2, 3, 4):
        starts.append(environment.start("separate", seed))
        resets.append(environment._environment.resets)
        experts.append(environment.expert_action().tolist())
    for before, after in zip(starts[:4], starts[4:]):
        assert before["instruction"] == after["instruction"]
        assert np.array_equal(before["proprio"], after["proprio"])
    assert experts[:4] == experts[4:]
    assert resets[:4] == resets[4:]
    assert 1 in resets
    assert max(resets) > 1
    assert len({start["instruction"] for start in starts}) == 4
    # The planner's draws are not those of whoever else uses numpy.
    assert np.random.get_state()[1].tolist() == state
    assert starts[0]["image"].shape == (90, 160, 3)
    assert starts[0]["image"][0, 0].tolist() == [0, 0, 0]
    assert starts[0]["image"][0, -1].tolist() == [200, 200, 200]
    LanguageTableEvaluation(solvable_starts=False).start("separate", max(1, 2))


def test_a_reward_solves_and_actions_are_clipped_to_the_table(double):
    environment = LanguageTableEvaluation()
    environment.start("block_to_block", 0)
    results = [environment.step(np.array([1, -0.05], np.float32)) for _ in range(3)]
    assert [(result.success, result.done) for result in results] == [(False, False), (False, False), (True, True)]
    assert environment._environment.actions[0].tolist() == pytest.approx([0.1, -0.05])
    assert environment.still_action().tolist() == [0, 0]
    short = LanguageTableEvaluation(max_steps=2)
    short.start("block_to_block", 0)
    assert [short.step(np.zeros(2, np.float32)).done for _ in range(2)] == [False, True]


def test_mistakes_are_named(double):
    with pytest.raises(EnvironmentMisused, match=r"`task` must be one of block_to_block, .*'reach'"):
        LanguageTableEvaluation().start("reach", 0)
    for options, message in (({"split": "new"}, "seen, unseen"), ({"image_size": (8, 8)}, "image_size"),
                             ({"max_steps": 0}, "max_steps")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            LanguageTableEvaluation(**options)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    write_language_table(tmp_path, leave_out="blocks")
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    with pytest.raises(ImportError, match=r'pip install "lapa\[language-table\]".*google-research/language-table'):
        LanguageTableEvaluation()
    assert "tensorflow" not in sys.modules
    forget()


def test_the_suite_is_the_papers_protocol():
    suite = load_suite("language-table")
    assert [(cell.group, cell.task) for cell in suite.cells] == [(g, t) for g in ("seen", "unseen") for t in TASKS]
    assert {cell.group: cell.options["split"] for cell in suite.cells} == {"seen": "seen", "unseen": "unseen"}
    assert suite.rollouts == 50
    assert suite.action_bounds() == (-0.1, 0.1)
    assert suite.published["in-domain"]["LAPA"] == "62.0 / 49.6"


@needs_simulator
def test_the_oracle_solves_a_start_of_the_real_simulator_that_the_seed_fixes():
    environment = LanguageTableEvaluation()
    first = environment.start("separate", 5)
    assert (first["image"].shape, first["image"].dtype) == ((180, 320, 3), np.uint8)
    result = environment.step(environment.expert_action())
    while not result.done:
        result = environment.step(environment.expert_action())
    assert result.success
    environment.start("block_to_block", 6)
    again = environment.start("separate", 5)
    assert again["instruction"] == first["instruction"]
    assert np.array_equal(again["image"], first["image"])
    assert np.array_equal(again["proprio"], first["proprio"])
    environment.close()


@needs_simulator
def test_unseen_boards_of_the_real_simulator_are_not_the_datas():
    environment = LanguageTableEvaluation("unseen", solvable_starts=False)
    blocks = environment._modules["blocks"]
    boards = {frozenset(board) for board in blocks.TEST_COMBINATIONS}
    assert not boards & {frozenset(board) for board in blocks.TRAIN_COMBINATIONS}
    assert (len(boards), {len(board) for board in boards}) == (5_796, set(range(4, 11)))
    environment.start("block_to_block", 0)
    assert frozenset(environment._environment._blocks_on_table) in boards
    environment.close()
