"""Any environment of Gymnasium through the adapter."""

import json
from pathlib import Path

import numpy as np
import pytest

from lapa.cli import main
from lapa.evaluation.environments.base import EnvironmentMisused
from lapa.evaluation.environments.gymnasium_adapter import GymnasiumEvaluation
from lapa.evaluation.suites import load_suite

TASK = "gymnasium_reach:tests/Reach-v0"
OPTIONS = {"instruction": "go to the middle", "image": "pixels.top", "proprio": "agent_pos"}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_an_episode_is_what_the_environment_says():
    with GymnasiumEvaluation(**OPTIONS) as environment:
        first = environment.start(TASK, 3)
        assert first["instruction"] == "go to the middle"
        assert (first["image"].shape, first["image"].dtype) == ((32, 32, 3), np.uint8)
        assert (first["proprio"].shape, first["proprio"].dtype) == ((2,), np.float32)
        assert environment.action_dim == 2
        place, steps = first["proprio"], 0
        while True:
            # Clipped to [0, 4].
            result = environment.step((16 - place).astype(np.float32))
            place, steps = result.observation["proprio"], steps + 1
            if result.done:
                break
        assert result.success and steps == int(np.ceil((16 - first["proprio"].min()) / 4))
        again = environment.start(TASK, 3)
        assert np.array_equal(again["image"], first["image"])
        assert any(not np.array_equal(environment.start(TASK, seed)["image"], first["image"]) for seed in (4, 5))


def test_actions_in_the_unit_range_are_mapped_onto_the_bounds():
    with GymnasiumEvaluation(**OPTIONS, action_scaling="unit") as environment:
        start = environment.start(TASK, 0)["proprio"]
        moved = environment.step(np.array([-1, 0.5], np.float32)).observation["proprio"]
        assert (moved - start).tolist() == [0, 3]
        assert (environment.step(np.array([9, -9], np.float32)).observation["proprio"] - moved).tolist() == [4, 0]


def test_episodes_are_cut_off_by_the_environment_or_before():
    for limit, expected in ((None, 20), (5, 5)):
        with GymnasiumEvaluation(**OPTIONS, max_steps=limit) as environment:
            environment.start(TASK, 0)
            steps = 1
            while not (result := environment.step(np.zeros(2, np.float32))).done:
                steps += 1
            assert (steps, result.success) == (expected, False)


def test_sentences_pictures_and_success_from_elsewhere():
    options = {"instruction_key": "sentence", "image": "render", "success": "terminated", "kwargs": {"sentence": "go"}}
    with GymnasiumEvaluation(**options) as environment:
        observation = environment.start(TASK, 0)
        assert (
            observation["instruction"] == "go" and observation["image"].max() == 255 and "proprio" not in observation
        )
        assert not environment.step(np.zeros(2, np.float32)).success
    with GymnasiumEvaluation(**{**OPTIONS, "instruction": {TASK: "by its id"}}) as environment:
        assert environment.start(TASK, 0)["instruction"] == "by its id"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "pixels.side"}, r"observation.pixels has no 'side'; it has top"),
        ({"image": "agent_pos"}, r"must be \(height, width, 3\) uint8, it is \(2,\) float64"),
        ({"proprio": "state"}, "observation has no 'state'; it has pixels, agent_pos"),
        ({"success": "solved"}, "info has no 'solved'; it has is_success"),
        ({"instruction": {"other": "go"}}, "no sentence for 'gymnasium_reach:tests/Reach-v0'"),
        ({"kwargs": {"discrete": True}}, "must have bounded continuous actions"),
        ({"kwargs": {"no_such": 1}}, "cannot be made"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with (
        GymnasiumEvaluation(**{**OPTIONS, **options}) as environment,
        pytest.raises(EnvironmentMisused, match=message),
    ):
        environment.start(TASK, 0)
        environment.step(np.zeros(2, np.float32))


def test_bad_options_and_tasks_are_named():
    with pytest.raises(ValueError, match="one of `instruction` and `instruction_key`"):
        GymnasiumEvaluation()
    with pytest.raises(ValueError, match="`action_scaling` must be one of none, unit"):
        GymnasiumEvaluation("go", action_scaling="half")
    with pytest.raises(ValueError, match="`max_steps`"):
        GymnasiumEvaluation("go", max_steps=0)
    with pytest.raises(EnvironmentMisused, match="'no/Such-v0' cannot be made"):
        GymnasiumEvaluation("go").start("no/Such-v0", 0)


def test_a_suite_of_it_is_evaluated(tmp_path):
    suite = tmp_path / "reach.yaml"
    suite.write_text(
        f"environment: gymnasium\nrollouts: 3\nfirst_seed: 1\noptions: {json.dumps(OPTIONS)}\n"
        f"cells:\n  all: {{tasks: ['{TASK}']}}\n"
    )
    assert load_suite(str(suite)).action_dim() == 2
    output = tmp_path / "out"
    command = ["evaluate", "--suite", str(suite), "--policy", "do_nothing", "--output", str(output)]
    assert main(command) == 0
    cell = json.loads((output / "report.json").read_text())["cells"][f"all/{TASK}"]
    assert (cell["successes"], cell["rollouts"], cell["crashed"]) == (0, 3, 0)
