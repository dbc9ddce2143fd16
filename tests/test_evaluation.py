"""Statistics and rollouts."""

from functools import partial

import numpy as np
import pytest

from lapa.evaluation.environment_pool import EnvironmentPool
from lapa.evaluation.environments.tabletop_adapter import TabletopEvaluation
from lapa.evaluation.rollout import ExpertController, PolicyController, StillController, outcomes_by_family, roll_out
from lapa.evaluation.statistics import intervals_overlap, success_cell, success_table, wilson_interval


def test_wilson_interval_known_values():
    # Newcombe (1998), table I: 81 of 263, and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(20, 20) == pytest.approx((0.8389, 1.0), abs=5e-5)


def test_wilson_interval_covers_the_truth():
    generator = np.random.default_rng(0)
    for probability in (0.1, 0.5, 0.85):
        draws = generator.binomial(100, probability, size=2000)
        covered = [low <= probability <= high for low, high in (wilson_interval(int(n), 100) for n in draws)]
        assert 0.92 <= np.mean(covered) <= 0.98


@pytest.mark.parametrize(("successes", "rollouts"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_impossible_counts(successes, rollouts):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, rollouts)


def test_tables_pool_over_families():
    table = success_table({"reach": [True, True], "push": [False, True, False, False]})
    assert table["families"]["reach"]["success"] == 1.0
    assert (table["pooled"]["successes"], table["pooled"]["rollouts"]) == (3, 6)
    assert intervals_overlap(success_cell([True, False]), success_cell([True, True]))
    assert not intervals_overlap(success_cell([True] * 50), success_cell([False] * 50))


make_environment = partial(TabletopEvaluation, families=("reach", "block_to_block"), image_size=32, num_blocks=2)
EPISODES = [("reach", seed) for seed in range(5)] + [("block_to_block", seed) for seed in range(5)]
do_nothing = StillController()


def play(controller, size, num_processes=0, **options):
    with EnvironmentPool(make_environment, size, num_processes) as pool:
        return roll_out(pool, controller, EPISODES, description=None, **options)


def test_expert_solves_what_doing_nothing_does_not():
    solved, nothing = play(ExpertController(), 4, record=[0, 6]), play(do_nothing, 4)
    assert [(r.family, r.seed) for r in solved] == EPISODES
    assert all(rollout.success and rollout.ending == "solved" for rollout in solved)
    assert not any(rollout.success for rollout in nothing)
    assert {rollout.ending for rollout in nothing} == {"not_solved"}
    assert [rollout.instruction for rollout in solved] == [rollout.instruction for rollout in nothing]
    assert [bool(rollout.frames) for rollout in solved] == [i in (0, 6) for i in range(10)]
    assert len(solved[6].frames) == solved[6].num_steps + 1
    assert outcomes_by_family(solved) == {"reach": [True] * 5, "block_to_block": [True] * 5}


class Towards:
    """Moves right in proportion to the red it sees: a policy that depends on its image."""

    def act(self, images, instructions):
        assert all(isinstance(text, str) for text in instructions)
        red = np.array([image[..., 0].mean() / 255 for image in images])
        return np.stack([red, -red], axis=1).astype(np.float32)


def test_policies_see_images_and_instructions_and_batching_does_not_matter():
    alone = play(PolicyController(Towards()), 1)
    assert alone == play(PolicyController(Towards()), 7)
    assert alone == play(PolicyController(Towards()), 5, num_processes=2)


def test_mistakes_of_the_caller_are_no_crashes():
    for processes in (0, 1):
        with EnvironmentPool(make_environment, 1, processes) as pool, pytest.raises(ValueError, match="no_such_task"):
            pool.start({0: ("no_such_task", 0)})
    with pytest.raises(ValueError, match="cannot be made.*image_size"):
        EnvironmentPool(partial(TabletopEvaluation, image_size=1), 1, num_processes=1)
