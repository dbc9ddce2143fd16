"""LIBERO as an evaluation plays it: household tasks of a Franka arm, ten per suite.

Written from LIBERO's source and tested against a double that has its interface; not run against the simulator. It is
installed from github.com/Lifelong-Robot-Learning/LIBERO, with robosuite 1.4 and bddl; its first import asks where its data
is (`python -c "import libero.libero"`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.evaluation.environments.base import EnvironmentMisused, EvaluationEnvironment, Observation, StepResult

# Steps that published evaluations allow: somewhat more than the longest demonstration of each suite.
SUITES = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
# How the camera's picture, which the renderer gives bottom row first, is turned.
TURNS = {
    "upright": (slice(None, None, -1), slice(None)),
    "rotated": (slice(None, None, -1), slice(None, None, -1)),
    "as_rendered": (slice(None), slice(None)),
}
NOT_INSTALLED = (
    "LIBERO is not installed: git clone https://github.com/Lifelong-Robot-Learning/LIBERO; pip install -e LIBERO "
    "robosuite==1.4.0 bddl==1.0.1"
)
MUST_BE_SET_UP = 'LIBERO asks where its data is when it is first imported: run `python -c "import libero.libero"` once'


class LiberoEvaluation(EvaluationEnvironment):
    """
    LIBERO; a task is its number in the suite, as `0`, and a seed modulo their number picks one of its initial states.

    Actions are those of the data: displacement of the hand along x, y and z, its rotation, each in [-1, 1] (1 is 5 cm, or
    half a radian), and the gripper from -1 (open) to 1 (closed). `proprio` is (8,): the hand's place in metres, its
    rotation vector, the two fingers' places. There is no scripted expert.

    Args:
        suite: One of `SUITES`.
        image_size: Side of the images in pixels.
        max_steps: Steps after which an episode is cut off; the suite's own of `SUITES` when None.
        settle_steps: Steps at the start in which the objects fall into place and the arm stays.
        image_turn: `upright`; `rotated`, by half a turn of what is rendered, hence mirrored, as in the converted data that
            most policies are trained on; or `as_rendered`, upside down, as in the original data.

    Raises:
        ImportError: LIBERO is not installed; the commands are named.
        ValueError: Its first import has not been made yet.
    """

    action_dim = 7

    def __init__(
        self,
        suite: str = "libero_spatial",
        image_size: int = 256,
        max_steps: int | None = None,
        settle_steps: int = 10,
        image_turn: str = "rotated",
    ) -> None:
        for name, value, valid in (("suite", suite, SUITES), ("image_turn", image_turn, TURNS)):
            if value not in valid:
                raise ValueError(f"`{name}` must be one of {', '.join(valid)}, got {value!r}.")
        self.max_steps = SUITES[suite] if max_steps is None else max_steps
        if self.max_steps < 1 or settle_steps < 0 or image_size < 16:
            raise ValueError(
                f"`max_steps` ({max_steps}) must be at least 1, `settle_steps` ({settle_steps}) at least 0, `image_size` "
                f"({image_size}) at least 16."
            )
        try:
            from libero.libero import benchmark, get_libero_path
            from libero.libero.envs import OffScreenRenderEnv
        except ImportError as error:
            raise ImportError(f"{NOT_INSTALLED} ({error})") from error
        except EOFError as error:
            raise ValueError(MUST_BE_SET_UP) from error
        self._benchmark: Any = benchmark.get_benchmark_dict()[suite]()
        self._make, self._folder_of = OffScreenRenderEnv, get_libero_path
        self.suite, self.image_size, self.settle_steps = suite, image_size, settle_steps
        self._turn = TURNS[image_turn]
        self._task: str | None = None
        self._environment: Any = None
        self._states: Any = None
        self._instruction = ""
        self._num_steps = 0

    def start(self, task: str, seed: int) -> Observation:
        """See `EvaluationEnvironment.start`."""
        if task != self._task:
            self._open(task)
        self._environment.reset()
        observation = self._environment.set_init_state(self._states[seed % len(self._states)])
        for _ in range(self.settle_steps):
            observation = self._environment.step(self.still_action().tolist())[0]
        self._num_steps = 0
        return self._observation(observation)

    def _open(self, task: str) -> None:
        count = self._benchmark.get_num_tasks()
        if task not in {str(number) for number in range(count)}:
            raise EnvironmentMisused(f"`task` must be a number from 0 to {count - 1} of {self.suite}, got {task!r}.")
        self.close()
        known = self._benchmark.get_task(int(task))
        file = Path(self._folder_of("bddl_files")) / known.problem_folder / known.bddl_file
        states = Path(self._folder_of("init_states")) / known.problem_folder / known.init_states_file
        self._states = load_states(states)
        self._environment = self._make(
            bddl_file_name=str(file), camera_heights=self.image_size, camera_widths=self.image_size
        )
        # Where the arm rests depends on it even when the state of the scene is given.
        self._environment.seed(0)
        self._task, self._instruction = task, str(known.language)

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """See `EvaluationEnvironment.step`."""
        observation, _, solved, _ = self._environment.step(np.clip(action, -1, 1).tolist())
        self._num_steps += 1
        solved = bool(solved)
        return StepResult(self._observation(observation), solved, solved or self._num_steps >= self.max_steps, {})

    def still_action(self) -> NDArray[np.float32]:
        """See `EvaluationEnvironment.still_action`: the gripper stays open."""
        return np.array([0, 0, 0, 0, 0, 0, -1], np.float32)

    def _observation(self, observation: Mapping[str, Any]) -> Observation:
        place, turn, fingers = (observation[f"robot0_{name}"] for name in ("eef_pos", "eef_quat", "gripper_qpos"))
        return {
            "image": np.ascontiguousarray(observation["agentview_image"][self._turn]),
            "instruction": self._instruction,
            "proprio": np.concatenate([place, rotation_vector(turn), fingers]).astype(np.float32),
        }

    def close(self) -> None:
        """See `EvaluationEnvironment.close`."""
        if self._environment is not None:
            self._environment.close()
            self._environment = self._task = None


def rotation_vector(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """
    Axis times angle in [0, 2 pi] of a quaternion (x, y, z, w), as the converted data has it.

    The shorter way round is not taken: data and evaluation must agree where w is below 0.
    """
    w = float(np.clip(quaternion[3], -1, 1))
    length = np.sqrt(1 - w * w)
    return np.zeros(3) if length < 1e-8 else np.asarray(quaternion[:3]) * (2 * np.arccos(w) / length)


def load_states(path: Path) -> NDArray[np.float64]:
    """
    Initial states of a task, (number of states, size of a state) float64.

    LIBERO keeps them as pickled arrays; only arrays are loaded.
    """
    import _codecs

    import torch
    from numpy._core import multiarray

    # The name under which numpy before 2 pickled arrays; that of today is allowed beside it.
    rebuild = (multiarray._reconstruct, "numpy.core.multiarray._reconstruct")
    allowed: list[Any] = [
        rebuild,
        multiarray._reconstruct,
        np.ndarray,
        np.dtype,
        type(np.dtype(np.float64)),
        _codecs.encode,
    ]
    with torch.serialization.safe_globals(allowed):
        return np.asarray(torch.load(path, weights_only=True))


__all__ = ["SUITES", "LiberoEvaluation", "load_states", "rotation_vector"]
