"""Simulators that crash and hang: what it costs, and what it does not."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fragile_environment import Fatal, Forgetful, Fragile

from lapa.evaluation.environment_groups import Failure
from lapa.evaluation.environment_pool import EnvironmentPool
from lapa.evaluation.environments.tabletop_adapter import TabletopEvaluation
from lapa.evaluation.rollout import EpisodeDraws, ExpertController, PolicyController, RandomActions, roll_out

pytest.importorskip("pymunk")

OPTIONS = {"families": ("reach",), "image_size": 32, "num_blocks": 2}
EPISODES = [("reach", seed) for seed in range(8)]


def random_moves():
    return PolicyController(RandomActions(2), draws=EpisodeDraws(5))


def play(make, controller, size=8, num_processes=1, episodes=EPISODES, timeout=60):
    with EnvironmentPool(make, size, num_processes, timeout) as pool:
        return roll_out(pool, controller, episodes, range(len(episodes)), description=None)


@pytest.mark.parametrize("controller", [ExpertController, random_moves])
def test_a_crash_or_hang_costs_its_own_episode_alone(controller):
    undisturbed = play(partial(TabletopEvaluation, **OPTIONS), controller(), num_processes=0)
    assert min(rollout.num_steps for rollout in undisturbed) > 3
    # One process for all: seed 1 raises, seed 3 kills it, seed 6 makes it hang.
    disturbed = play(partial(Fragile, **OPTIONS), controller(), timeout=4)
    for seed, ending in ((1, "crashed"), (3, "crashed"), (6, "hung")):
        assert (disturbed[seed].ending, disturbed[seed].success, disturbed[seed].num_steps) == (ending, False, 2)
    for seed in (0, 2, 4, 5, 7):
        assert disturbed[seed] == undisturbed[seed]
        np.testing.assert_array_equal(disturbed[seed].frames, undisturbed[seed].frames)


def test_draws_of_an_episode_depend_on_it_alone():
    make = partial(TabletopEvaluation, **OPTIONS)
    together = play(make, random_moves(), size=8, num_processes=0)
    assert together == play(make, random_moves(), size=3, num_processes=2)
    assert together[2:3] == play(make, random_moves(), size=1, num_processes=0, episodes=EPISODES[2:3])


def test_a_process_that_is_lost_between_two_steps_costs_nothing():
    make, actions = partial(TabletopEvaluation, **OPTIONS), {0: np.array([1, 0]), 1: np.array([0, 1])}
    with EnvironmentPool(make, 2) as whole, EnvironmentPool(make, 2, num_processes=1) as lost:
        for pool in (whole, lost):
            pool.start({0: ("reach", 3), 1: ("reach", 4)})
            pool.step(actions)
            actions[0][:] = [1, 0]
        os.kill(lost._groups[0]._process.pid, signal.SIGKILL)
        # A caller may reuse its array.
        actions[0][:] = [0, -1]
        expected, found = whole.step(actions), lost.step(actions)
    for slot in (0, 1):
        for name in ("image", "proprio"):
            np.testing.assert_array_equal(found[slot].observation[name], expected[slot].observation[name])


def test_what_cannot_be_brought_back_begins_again():
    rollouts = play(partial(Forgetful, **OPTIONS), random_moves(), size=4, episodes=EPISODES[:4])
    assert [(rollout.ending, rollout.restarts) for rollout in rollouts] == [
        ("not_solved", 1), ("crashed", 0), ("not_solved", 1), ("crashed", 0)
    ]  # fmt: skip
    # Its steps, pictures and draws are those of the second beginning.
    assert rollouts[2].num_steps == 40 and len(rollouts[2].frames) == 41
    assert len({tuple(frame[0, 0]) for frame in rollouts[2].frames}) == 1
    plain = play(
        partial(TabletopEvaluation, **OPTIONS), random_moves(), size=1, num_processes=0, episodes=EPISODES[2:3]
    )
    np.testing.assert_array_equal(
        [frame[1:] for frame in rollouts[2].frames], [frame[1:] for frame in plain[0].frames]
    )


def test_an_environment_that_ends_its_process_when_it_is_restored_is_to_blame_for_that(tmp_path):
    undisturbed = play(partial(TabletopEvaluation, **OPTIONS), ExpertController(), num_processes=0)
    rollouts = play(partial(Fatal, tmp_path, **OPTIONS), ExpertController())
    assert [rollout.ending for rollout in rollouts] == ["solved"] * 3 + ["crashed"] * 2 + ["solved"] * 3
    assert [rollouts[seed] for seed in (0, 1, 2, 5, 6, 7)] == [undisturbed[seed] for seed in (0, 1, 2, 5, 6, 7)]


def test_a_process_that_dies_again_and_again_without_working_is_given_up():
    with EnvironmentPool(partial(TabletopEvaluation, **OPTIONS), 2, num_processes=1) as pool:
        group = pool._groups[0]
        opened = group._open
        group._open = lambda: (opened(), os.kill(group._process.pid, signal.SIGKILL), group._process.join())
        os.kill(group._process.pid, signal.SIGKILL)
        answers = pool.start({0: ("reach", 3), 1: ("reach", 4)})
    assert all(isinstance(answers[slot], Failure) and answers[slot].kind == "crashed" for slot in (0, 1))


HANGING = """
import sys
from functools import partial
from fragile_environment import Fragile
from lapa.evaluation.environment_pool import EnvironmentPool

if __name__ == "__main__":
    with EnvironmentPool(partial(Fragile, families=("reach",), image_size=32), 1, num_processes=1) as pool:
        pool.start({0: ("reach", 6)})
        print(pool._groups[0]._process.pid, flush=True)
        for _ in range(3):
            pool.step({0: [0, 0]})
"""


def test_a_simulator_that_hangs_does_not_outlive_a_killed_player(tmp_path):
    (tmp_path / "player.py").write_text(HANGING)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    player = subprocess.Popen([sys.executable, tmp_path / "player.py"], stdout=subprocess.PIPE, env=environment)
    worker = int(player.stdout.readline())
    time.sleep(0.5)
    assert Path(f"/proc/{worker}").exists()
    player.kill()
    player.wait()
    player.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()
