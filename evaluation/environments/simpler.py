"""SIMPLER's four WidowX tasks as an evaluation plays them, through ManiSkill3 or the original package.

Written from the sources of mani_skill 3.0.1 and of SimplerEnv (2025) and tested against a double that has their interface;
not run against either simulator.

    pip install mani_skill                                        # backend `maniskill3`
    python -m mani_skill.utils.download_asset bridge_v2_real2sim  # its pictures and meshes

The original (backend `simpler_env`) is installed from github.com/simpler-env/SimplerEnv, with its submodule.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
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

# Names of the tasks in SIMPLER's tables: environment without its version, and steps of an episode (of 0.2 s).
TASKS = {
    "spoon_on_towel": ("PutSpoonOnTableClothInScene", 60),
    "carrot_on_plate": ("PutCarrotOnPlateInScene", 60),
    "stack_cube": ("StackGreenCubeOnYellowCubeBakedTexInScene", 60),
    "put_eggplant_in_basket": ("PutEggplantInBasketScene", 120),
}
# Layouts of the published evaluation: all that a task has (ManiSkill3 has more for the eggplant; the first 24 are played).
NUM_EPISODES = 24
CAMERA = "3rd_view_camera"
BACKENDS = ("maniskill3", "simpler_env")
ACTIONS = ("bridge", "simulator")
# Metres that the object must have moved to count, as in the original.
MOVED = 0.03


class SimplerEvaluation(EvaluationEnvironment):
    """
    SIMPLER's WidowX tasks; a task is one of `TASKS`, a seed modulo 24 is the number of the published layout.

    As in the published evaluation an episode is played to its end (60 steps, 120 for the eggplant), and what counts is
    whether the object lies on its target in the last step. Counted beside it, if at any step: `grasped`, `held` (grasped
    for five steps on end), `moved` (by more than 3 cm, and farther than the other objects) and `placed`.

    Images are the camera's 640 x 480, squeezed to `image_size` with Lanczos' filter, as pictures of the Bridge data are.
    There is no `proprio` and no scripted expert.

    Args:
        backend: `maniskill3` or `simpler_env`.
        actions: Seven numbers, of which the first three move the effector by metres. `bridge`: roll, pitch and yaw in
            radians, and the gripper as in the Bridge data, above 0.5 open, else closed. `simulator`: a rotation vector in
            radians, and the gripper from -1 (closed) to 1 (open), as the simulator takes them.
        image_size: (height, width) in pixels of the images.
        stop_at_success: Ends an episode as soon as the object lies on its target, as later works do. Their rates are at
            least as high as the published evaluation's.
        render_backend: Of ManiSkill3: `gpu`, or `cpu`, which needs Mesa's Vulkan driver (Debian: `mesa-vulkan-drivers`, 25
            or later).

    Raises:
        ImportError: The backend is not installed; the commands are named.
    """

    action_dim = 7
    # Of `bridge`; the simulator itself allows a metre.
    action_bounds = ((-0.05,) * 3 + (-0.25,) * 3 + (0.0,), (0.05,) * 3 + (0.25,) * 3 + (1.0,))

    def __init__(
        self,
        backend: str = "maniskill3",
        actions: str = "bridge",
        image_size: tuple[int, int] = (256, 256),
        stop_at_success: bool = False,
        render_backend: str = "gpu",
    ) -> None:
        for name, value, valid in (("backend", backend, BACKENDS), ("actions", actions, ACTIONS)):
            if value not in valid:
                raise ValueError(f"`{name}` must be one of {', '.join(valid)}, got {value!r}.")
        self.image_size = check_image_size(image_size)
        self.actions, self.stop_at_success = actions, stop_at_success
        self._simulator: _Simulator = _ManiSkill(render_backend) if backend == "maniskill3" else _SimplerEnv()
        self._num_steps = self._max_steps = 0

    def start(self, task: str, seed: int) -> Observation:
        """See `EvaluationEnvironment.start`; the seed modulo 24 is the number of the layout."""
        if task not in TASKS:
            raise EnvironmentMisused(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
        name, self._max_steps = TASKS[task]
        self._num_steps = 0
        return self._observation(self._simulator.start(name, seed % NUM_EPISODES))

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """See `EvaluationEnvironment.step`."""
        action = np.asarray(action, np.float32)
        image, progress = self._simulator.step(from_bridge(action) if self.actions == "bridge" else action)
        self._num_steps += 1
        success = progress["placed"]
        done = self._num_steps >= self._max_steps or (self.stop_at_success and success)
        return StepResult(self._observation(image), success, done, progress)

    def still_action(self) -> NDArray[np.float32]:
        """See `EvaluationEnvironment.still_action`: the gripper stays open, as it is at the start."""
        return np.array([0, 0, 0, 0, 0, 0, 1], np.float32)

    def _observation(self, image: NDArray[np.uint8]) -> Observation:
        instruction = self._simulator.instruction()
        return {"image": resize_image(image, self.image_size, "LANCZOS"), "instruction": instruction}

    def close(self) -> None:
        """See `EvaluationEnvironment.close`."""
        self._simulator.close()


def from_bridge(action: NDArray[np.float32]) -> NDArray[np.float32]:
    """
    An action as the Bridge data has it in the simulator's terms.

    Args:
        action: (7,): displacement in metres; roll, pitch, yaw about fixed axes in radians; gripper, above 0.5 open.

    Returns:
        (7,) float32: displacement, rotation vector in radians, gripper -1 (closed) or 1 (open).
    """
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_euler("xyz", action[3:6]).as_rotvec()
    return np.concatenate([action[:3], turn, [1.0 if action[6] > 0.5 else -1.0]]).astype(np.float32)


class _Simulator(ABC):
    """One of the two packages: an environment per task, kept while that task is played."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._environment: Any = None

    def start(self, name: str, episode: int) -> NDArray[np.uint8]:
        """The picture of a layout."""
        if name != self._name:
            self.close()
            self._environment, self._name = self.make(name), name
        return self.reset(episode)

    @abstractmethod
    def make(self, name: str) -> Any: ...

    @abstractmethod
    def reset(self, episode: int) -> NDArray[np.uint8]: ...

    @abstractmethod
    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.uint8], Mapping[str, bool]]: ...

    @abstractmethod
    def instruction(self) -> str: ...

    def close(self) -> None:
        if self._environment is not None:
            self._environment.close()
            self._environment = self._name = None


class _ManiSkill(_Simulator):
    """ManiSkill3, with one world at a time; everything it gives has a leading dimension of 1."""

    def __init__(self, render_backend: str) -> None:
        super().__init__()
        self._render_backend = render_backend
        try:
            import mani_skill.envs  # noqa: F401 (registers the environments)
        except ImportError as error:
            raise ImportError(
                "ManiSkill3 is not installed: pip install mani_skill; "
                f"python -m mani_skill.utils.download_asset bridge_v2_real2sim ({error})"
            ) from error

    def make(self, name: str) -> Any:
        import gymnasium

        return gymnasium.make(
            f"{name}-v1",
            obs_mode="rgb+segmentation",
            num_envs=1,
            sim_backend="cpu",
            render_backend=self._render_backend,
        )

    def reset(self, episode: int) -> NDArray[np.uint8]:
        observation, _ = self._environment.reset(seed=episode, options={"episode_id": episode})
        return _picture(observation)

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.uint8], Mapping[str, bool]]:
        observation, _, _, _, info = self._environment.step(action)
        progress = {
            "grasped": bool(info["is_src_obj_grasped"][0]),
            "held": bool(info["consecutive_grasp"][0]),
            "moved": self._moved(),
            "placed": bool(info["success"][0]),
        }
        return _picture(observation), progress

    def _moved(self) -> bool:
        # ManiSkill3 reports `moved_correct_obj` without ever computing it.
        world = self._environment.unwrapped
        ways = {
            name: float(np.linalg.norm(_array(world.episode_obj_xyzs_after_settle[name] - thing.pose.p)[0, :2]))
            for name, thing in world.objs.items()
        }
        way = ways.pop(world.source_obj_name)
        return way > MOVED and all(other < way for other in ways.values())

    def instruction(self) -> str:
        return str(self._environment.unwrapped.get_language_instruction()[0])


def _array(tensor: Any) -> NDArray[Any]:
    return np.asarray(tensor.cpu())


def _picture(observation: Mapping[str, Any]) -> NDArray[np.uint8]:
    return _array(observation["sensor_data"][CAMERA]["rgb"])[0]


class _SimplerEnv(_Simulator):
    """The original package, with its prepackaged set-up: camera, overlaid picture, place of the robot."""

    def __init__(self) -> None:
        super().__init__()
        try:
            import mani_skill2_real2sim.envs  # noqa: F401 (registers the environments)
        except ImportError as error:
            raise ImportError(
                "SimplerEnv is not installed: git clone --recurse-submodules https://github.com/simpler-env/SimplerEnv; "
                f"pip install -e SimplerEnv/ManiSkill2_real2sim -e SimplerEnv ({error})"
            ) from error

    def make(self, name: str) -> Any:
        import gymnasium

        return gymnasium.make(f"{name}-v0", obs_mode="rgbd", prepackaged_config=True)

    def reset(self, episode: int) -> NDArray[np.uint8]:
        observation, _ = self._environment.reset(options={"obj_init_options": {"episode_id": episode}})
        return np.asarray(observation["image"][CAMERA]["rgb"])

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.uint8], Mapping[str, bool]]:
        observation, _, _, _, info = self._environment.step(action)
        progress = {
            "grasped": bool(info["is_src_obj_grasped"]),
            "held": bool(info["consecutive_grasp"]),
            "moved": bool(info["moved_correct_obj"]),
            "placed": bool(info["success"]),
        }
        return np.asarray(observation["image"][CAMERA]["rgb"]), progress

    def instruction(self) -> str:
        return str(self._environment.unwrapped.get_language_instruction())


__all__ = ["NUM_EPISODES", "TASKS", "SimplerEvaluation", "from_bridge"]
