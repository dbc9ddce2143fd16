"""The judge of tabletop pictures: sentences, places, and when a task counts as solved."""

import numpy as np
import pytest

from lapa.evaluation.environments.tabletop import TabletopEnvironment, TabletopExpert
from lapa.evaluation.environments.tabletop_tasks import FAMILIES, TabletopBlock, format_instruction
from lapa.evaluation.tabletop_judge import EFFECTOR, TabletopJudge, read_instruction

RED, BLUE = TabletopBlock("red", "cube"), TabletopBlock("blue", "star")


def test_every_sentence_is_read_back():
    for name, family in FAMILIES.items():
        other = BLUE if family.num_named_blocks == 2 else None
        for template in family.templates:
            for argument in family.arguments:
                named = read_instruction(format_instruction(template, RED, other, argument))
                assert (named.family, named.block, named.other, named.argument) == (name, RED, other, argument)
    with pytest.raises(ValueError, match="'fold the towel' is no sentence of the tabletop"):
        read_instruction("fold the towel")


@pytest.mark.parametrize(
    ("embodiment", "size", "most"), [("arm", 32, 0.006), ("arm", 64, 0.003), ("gripper", 64, 0.006)]
)
def test_things_are_found_where_they_are(embodiment, size, most):
    environment = TabletopEnvironment(embodiment=embodiment, image_size=size)
    judge = TabletopJudge({"embodiment": embodiment}, (size, size))
    for seed in range(10):
        observation, _ = environment.reset(seed=seed)
        names = [block.colour for block in environment.blocks]
        found = judge.locator.locate(observation["image"], [*names, EFFECTOR])
        for name, place in zip([*names, EFFECTOR], [*environment.positions, environment.effector]):
            assert abs(found[name] - place) < most, (seed, name)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_miss_is_the_tasks_own(family):
    environment = TabletopEnvironment(image_size=64, num_blocks=2)
    judge = TabletopJudge({}, (64, 64))
    for seed in range(4):
        observation, info = environment.reset(seed=seed, options={"family": family})
        first, expert, done = observation["image"], TabletopExpert(environment), False
        while not done:
            missed = judge.miss(info["instruction"], first, observation["image"])
            assert missed == pytest.approx(
                environment.task.miss(environment.positions, environment.effector), abs=0.012
            )
            observation, _, terminated, truncated, info = environment.step(expert.act())
            done = terminated or truncated
        assert info["success"]
        assert judge.miss(info["instruction"], first, observation["image"]) < 0.012


def test_what_is_not_there_is_not_found():
    environment = TabletopEnvironment(image_size=32, num_blocks=2)
    judge = TabletopJudge({}, (32, 32))
    observation, info = environment.reset(seed=0, options={"family": "reach"})
    empty = judge.locator._background.astype(np.uint8)
    assert judge.locator.locate(empty, [EFFECTOR, "red"]) == {EFFECTOR: None, "red": None}
    assert judge.miss(info["instruction"], observation["image"], empty) is None
    assert judge.miss(info["instruction"], empty, observation["image"]) is None


def test_thresholds_are_those_of_the_environment():
    options = {"image_size": 64, "num_blocks": 2, "thresholds": {"separate": 0.14}}
    observation, info = TabletopEnvironment(**options).reset(seed=1, options={"family": "separate"})
    strict, wide = (TabletopJudge(about, (64, 64)) for about in ({}, options))
    image, sentence = observation["image"], info["instruction"]
    assert strict.miss(sentence, image, image) - wide.miss(sentence, image, image) == pytest.approx(0.03)


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="shaking camera"):
        TabletopJudge({"embodiment": "human_video"}, (32, 32))
    with pytest.raises(ValueError, match="one colour"):
        TabletopJudge({"distinct_colours": False}, (32, 32))
    with pytest.raises(ValueError, match="square"):
        TabletopJudge({}, (32, 64))
