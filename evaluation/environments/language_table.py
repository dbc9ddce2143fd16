"""Language Table as an evaluation plays it: the original simulator, which pushes blocks as a sentence says.

It is in no package index. `pip install "lapa[language-table]"` installs what it needs, and

    pip install --no-deps git+https://github.com/google-research/language-table

the simulator itself (or put a checkout of it on PYTHONPATH). PyBullet has wheels for Python up to 3.11.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.evaluation.environments.base import (
    EnvironmentMisused,
    EvaluationEnvironment,
    Observation,
    StepResult,
    check_image_size,
    resize_image,
)
from lapa.evaluation.environments.stand_in_modules import stand_in_modules

# The benchmark's five families: module and class of the reward that defines each.
TASKS = {
    "block_to_block": ("block2block", "BlockToBlockReward"),
    "block_to_absolute_location": ("block2absolutelocation", "BlockToAbsoluteLocationReward"),
    "block_to_block_relative_location": ("block2block_relative_location", "BlockToBlockRelativeLocationReward"),
    "block_to_relative_location": ("block2relativelocation", "BlockToRelativeLocationReward"),
    "separate": ("separate_blocks", "SeparateBlocksReward"),
}
# Kind of blocks and whether they are the training part of its list of boards, as the simulator is asked for them.
SPLITS = {"seen": ("BLOCK_8", True), "unseen": ("N_CHOOSE_K", False)}
# The benchmark's own evaluation plays the RRT oracle's planner on each start and draws another one if it finds no way.
MAX_STARTS = 100
NOT_INSTALLED = (
    'Language Table is not installed: pip install "lapa[language-table]", then '
    "pip install --no-deps git+https://github.com/google-research/language-table"
)


class _SpecifiedPolicy:
    """Stands in for the base class of the oracle, of which it asks for nothing but to take two arguments."""

    def __init__(self, time_step_spec: object, action_spec: object) -> None: ...


def _stand_ins() -> dict[str, dict[str, Any]]:
    """
    What the simulator's modules import and a rollout never calls, by module.

    `tensorflow` writes saved states and pictures of plans, `imageio` too; `six` is not used; `tf_agents` gives the oracle
    its base class and the types of a method that is not called here. The simulator needs a `gym` for its spaces and its
    base class, both of which gymnasium has under the same names.
    """
    import gymnasium

    return {
        "tensorflow": {},
        "imageio": {},
        "six": {},
        "tf_agents": {},
        "tf_agents.policies": {},
        "tf_agents.policies.py_policy": {"PyPolicy": _SpecifiedPolicy},
        "tf_agents.trajectories": {},
        "tf_agents.trajectories.policy_step": {},
        "tf_agents.trajectories.time_step": {},
        "gym": {"Env": gymnasium.Env, "spaces": gymnasium.spaces},
    }


class LanguageTableEvaluation(EvaluationEnvironment):
    """
    Language Table; a task is one of the benchmark's five families (`TASKS`).

    As the benchmark's own evaluation: 10 Hz, at most 200 steps, an episode is solved by the first step that earns the
    reward, and a start for which the simulator's planner finds no way is drawn anew. Episodes of `separate` and of
    `block_to_relative_location` may be solved by their first step, whatever it is: read a table beside `do_nothing`'s.

    Images are rendered as the simulator does (180 x 320; another size there would change the field of view) and resized.
    Actions are displacements of the effector along x (towards the camera) and y (to the right), in metres, each in
    [-0.1, 0.1]; the oracle's are at most 0.035 m long. `proprio` is the effector's x and y in metres.

    Seen and unseen: the published simulated data has the eight blocks of `BLOCK_8` on every board. `seen` is that board.
    `unseen` is the benchmark's own held-out part of `N_CHOOSE_K`: its last tenth, in its shuffled order, of all sets of 4
    to 10 of the 16 blocks (4 colours x 4 shapes). Hence the eight blocks outside of `BLOCK_8` (known colours and shapes
    in a new pairing), other numbers of blocks, and combinations of known blocks that were never together alone; the
    block to be moved is a new one in about half of the starts. The paper's "unseen" are "new objects (color and
    shape) and unseen combinations of seen objects", too, but which ones is not published.

    Args:
        split: `seen` or `unseen`.
        image_size: (height, width) in pixels of the images.
        max_steps: Steps after which an episode is cut off.
        solvable_starts: Whether starts without a plan are drawn anew.

    Raises:
        ImportError: The simulator or what it needs is not installed; the commands are named.
    """

    action_dim = 2
    action_bounds = (-0.1, 0.1)

    def __init__(
        self,
        split: str = "seen",
        image_size: tuple[int, int] = (180, 320),
        max_steps: int = 200,
        solvable_starts: bool = True,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
        if max_steps < 1:
            raise ValueError(f"`max_steps` must be at least 1, got {max_steps}.")
        self.image_size = check_image_size(image_size)
        self._modules = import_simulator()
        self.split, self.max_steps, self.solvable_starts = split, max_steps, solvable_starts
        self._environment: Any = None
        self._oracle: Any = None
        self._draws = np.random.RandomState(0)
        self._num_steps = 0

    def start(self, task: str, seed: int) -> Observation:
        """See `EvaluationEnvironment.start`; the seed draws the board, the sentence and where everything lies."""
        if task not in TASKS:
            raise EnvironmentMisused(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
        # A fresh simulator per episode: a reset leaves the arm's motors with what they were told last.
        self.close()
        module, reward = TASKS[task]
        kind, training = SPLITS[self.split]
        environment = self._modules["language_table"].LanguageTable(
            block_mode=self._modules["blocks"].LanguageTableBlockVariants[kind],
            training=training,
            reward_factory=getattr(self._modules[module], reward),
            seed=seed,
        )
        self._environment, self._num_steps = environment, 0
        self._draws = np.random.RandomState(seed)
        oracle = self._modules["oracle"].ObstacleOrientedPushOracleBoard2dRRT
        self._oracle = oracle(_OracleView(environment), use_ee_planner=True)
        for _ in range(MAX_STARTS):
            with self._global_draws():
                observation = environment.reset()
            if not self.solvable_starts or self._plan():
                return self._observation(observation)
        raise ValueError(f"no start of {task} with seed {seed} has a plan, in {MAX_STARTS} draws")

    def _plan(self) -> bool:
        with self._global_draws():
            return bool(self._oracle.get_plan(self._environment.compute_state()))

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """See `EvaluationEnvironment.step`."""
        observation, reward, done, _ = self._environment.step(np.clip(action, -0.1, 0.1))
        self._num_steps += 1
        return StepResult(
            self._observation(observation), bool(reward > 0), bool(done) or self._num_steps >= self.max_steps, {}
        )

    def expert_action(self) -> NDArray[np.float32]:
        """See `EvaluationEnvironment.expert_action`: the simulator's oracle, which plans around the other blocks."""
        with self._global_draws():
            action = self._oracle._get_action_for_block_target(self._environment.compute_state())
        return np.asarray(action, dtype=np.float32)

    @contextmanager
    def _global_draws(self) -> Iterator[None]:
        """
        Lets numpy's global functions draw from the episode's own state, and leaves theirs untouched.

        The planner and the sentences of `separate` draw from it.
        """
        kept = np.random.get_state()
        np.random.set_state(self._draws.get_state())
        try:
            yield
        finally:
            self._draws.set_state(np.random.get_state())
            np.random.set_state(kept)

    def _observation(self, observation: Mapping[str, Any]) -> Observation:
        return {
            "image": resize_image(observation["rgb"], self.image_size),
            "instruction": self._environment.decode_instruction(observation["instruction"]),
            "proprio": observation["effector_translation"].astype(np.float32),
        }

    def close(self) -> None:
        """See `EvaluationEnvironment.close`."""
        if self._environment is not None:
            self._environment.pybullet_client.disconnect()
            self._environment = self._oracle = None


class _OracleView:
    """
    The simulator as its oracle asks for it.

    Args:
        environment: The simulator.
    """

    def __init__(self, environment: Any) -> None:
        self.pybullet_client = environment.pybullet_client

    def time_step_spec(self) -> None:
        """Asked for by the oracle for its base class, which keeps it and no more."""

    def action_spec(self) -> None:
        """See `time_step_spec`."""

    def get_control_frequency(self) -> float:
        """Steps per second."""
        return 10.0


def import_simulator() -> dict[str, Any]:
    """
    The simulator's modules by their short names.

    Raises:
        ImportError: One is missing; the commands that install it are named.
    """
    package = "language_table.environments"
    names = {"language_table": "language_table", "blocks": "blocks", "oracle": "oracles.push_oracle_rrt_slowdown"}
    names |= {module: f"rewards.{module}" for module, _ in TASKS.values()}
    try:
        with stand_in_modules(_stand_ins()):
            return {short: import_module(f"{package}.{name}") for short, name in names.items()}
    except ImportError as error:
        raise ImportError(f"{NOT_INSTALLED} ({error})") from error


__all__ = ["SPLITS", "TASKS", "LanguageTableEvaluation", "import_simulator"]
