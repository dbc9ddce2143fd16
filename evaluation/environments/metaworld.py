"""MetaWorld as an evaluation plays it (`pip install "lapa[metaworld]"`): 50 manipulation tasks of a Sawyer arm."""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.evaluation.environments.base import EnvironmentMisused, EvaluationEnvironment, Observation, StepResult

# MetaWorld names its tasks; the sentences are ours.
INSTRUCTIONS = {
    "assembly": "put the ring onto the peg",
    "basketball": "drop the basketball into the hoop",
    "bin-picking": "move the object from one bin to the other",
    "box-close": "put the lid onto the box",
    "button-press": "press the button",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "press the button behind the wall from above",
    "button-press-wall": "reach around the wall and press the button",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "close the faucet",
    "faucet-open": "open the faucet",
    "hammer": "hammer the nail into the board",
    "hand-insert": "put the object into the hole",
    "handle-press": "press the handle down",
    "handle-press-side": "press the handle at the side down",
    "handle-pull": "pull the handle up",
    "handle-pull-side": "pull the handle at the side up",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "insert the peg into the hole at the side",
    "peg-unplug-side": "unplug the peg from the side",
    "pick-out-of-hole": "take the object out of the hole",
    "pick-place": "pick up the object and bring it to the goal",
    "pick-place-wall": "pick up the object and bring it to the goal behind the wall",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-back": "slide the plate back out of the cabinet",
    "plate-slide-back-side": "slide the plate sideways out of the cabinet",
    "plate-slide-side": "slide the plate sideways into the cabinet",
    "push": "push the object to the goal",
    "push-back": "push the object back to the goal",
    "push-wall": "push the object around the wall to the goal",
    "reach": "reach the goal",
    "reach-wall": "reach the goal behind the wall",
    "shelf-place": "put the object onto the shelf",
    "soccer": "push the ball into the goal",
    "stick-pull": "pull the thermos with the stick",
    "stick-push": "push the thermos with the stick",
    "sweep": "sweep the object off the table",
    "sweep-into": "sweep the object into the hole",
    "window-close": "close the window",
    "window-open": "open the window",
}
# Scripted policies whose file has another name than the task.
POLICY_NAMES = {"peg-insert-side": "PegInsertionSide"}
CONTROL_FREQUENCY = 80  # of the simulator, actions per second
# The camera that most work on these tasks uses, moved nearer (metres) as it is there, so that the hand fills more of the image.
CAMERA, CAMERA_PLACE = "corner2", (0.75, 0.075, 0.7)
MISSING_GL = (
    "MetaWorld draws with OpenGL, which is not to be had here: install it (Debian: apt-get install libegl1 libgl1 "
    "libopengl0, with MUJOCO_GL=egl; or libosmesa6, with MUJOCO_GL=osmesa)"
)


class MetaWorldEvaluation(EvaluationEnvironment):
    """
    MetaWorld; a task is its name without the version, as `door-open`.

    Actions are those of MetaWorld: displacement of the hand along x, y and z, and effort of the gripper, each in [-1, 1].
    The goal is drawn in the scene for tasks that have none to see.

    Args:
        image_size: Side of the images in pixels.
        max_steps: Steps of the simulator after which an episode is cut off, at most 500.
        action_repeat: Steps of the simulator (80 per second) that an action is held for. Only the last is drawn; an episode
            is over as soon as the task is solved.
        camera: One of MetaWorld's.

    Raises:
        ImportError: MetaWorld is not installed; the extra is named.
        ValueError: OpenGL is missing; the packages are named.
    """

    action_dim = 4
    # Its context is made current for every picture, see `_take_context`.
    mixes_tasks = True

    def __init__(
        self, image_size: int = 128, max_steps: int = 500, camera: str = CAMERA, action_repeat: int = 1
    ) -> None:
        if not 1 <= max_steps <= 500:
            raise ValueError(f"`max_steps` must lie in [1, 500], got {max_steps}.")
        if image_size < 16:
            raise ValueError(f"`image_size` must be at least 16, got {image_size}.")
        if not 1 <= action_repeat <= max_steps:
            raise ValueError(f"`action_repeat` must lie in [1, {max_steps}], got {action_repeat}.")
        # No display: without this MuJoCo asks for a window.
        os.environ.setdefault("MUJOCO_GL", "egl")
        try:
            from metaworld.env_dict import ENV_CLS_MAP
        except ImportError as error:
            if "metaworld" in str(error) or "packaging" in str(error):
                raise ImportError('MetaWorld is not installed: pip install "lapa[metaworld]"') from error
            raise ValueError(f"{MISSING_GL}: {error}") from error
        self._classes: dict[str, Any] = ENV_CLS_MAP
        self.image_size, self.max_steps, self.camera = image_size, max_steps, camera
        self.action_repeat = action_repeat
        self._task: str | None = None
        self._environment: Any = None
        self._expert: Any = None
        self._state: NDArray[np.float64] | None = None
        self._num_steps = 0
        # An error of the first picture means that OpenGL is missing; one of a later picture is a crash.
        self._has_drawn = False

    def start(self, task: str, seed: int) -> Observation:
        """See `EvaluationEnvironment.start`; the seed draws where the objects and the goal are."""
        if task not in INSTRUCTIONS:
            raise EnvironmentMisused(f"`task` must be one of {', '.join(INSTRUCTIONS)}, got {task!r}.")
        # A fresh simulator per episode: MetaWorld's tasks keep what the last one left in their models.
        self.close()
        environment = self._classes[f"{task}-v3"](
            render_mode="rgb_array", camera_name=self.camera, width=self.image_size, height=self.image_size
        )
        self._environment, self._task, self._num_steps = environment, task, 0
        _draw_fast(environment.model)
        if self.camera == CAMERA:
            environment.model.camera(CAMERA).pos[:] = CAMERA_PLACE
        environment._set_task_called = True
        # The scripted policies need to know the goal. MetaWorld computes the bounds of the state once; they must follow.
        environment._partially_observable = False
        del environment.sawyer_observation_space
        environment._freeze_rand_vec = False
        environment.seeded_rand_vec = True
        environment.seed(seed)
        self._state, _ = environment.reset()
        self._expert = _expert(task)
        try:
            return self._observation()
        except Exception as error:
            if self._has_drawn:
                raise
            raise EnvironmentMisused(f"{MISSING_GL}: {error}") from error

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """See `EvaluationEnvironment.step`."""
        for _ in range(self.action_repeat):
            self._state, _, terminated, truncated, info = self._environment.step(np.clip(action, -1, 1))
            self._num_steps += 1
            success = bool(info["success"] > 0)
            done = success or terminated or truncated or self._num_steps >= self.max_steps
            if done:
                break
        return StepResult(self._observation(), success, bool(done), {})

    def expert_action(self) -> NDArray[np.float32]:
        """See `EvaluationEnvironment.expert_action`: MetaWorld's own scripted policy."""
        return np.clip(self._expert.get_action(self._state), -1, 1).astype(np.float32)

    def _take_context(self) -> None:
        """
        Makes this environment's OpenGL context the current one. Gymnasium does so once, when it makes it: of several environments
        in a process all but the last made would be drawn with its meshes.
        """
        viewer = self._environment.mujoco_renderer.viewer
        if viewer is not None:
            viewer.make_context_current()

    def _observation(self) -> Observation:
        self._take_context()
        image = self._environment.render()
        if self.camera == CAMERA:
            # This camera hangs upside down.
            image = image[::-1, ::-1]
        assert self._task is not None and self._state is not None
        self._has_drawn = True
        return {
            "image": np.ascontiguousarray(image),
            "instruction": INSTRUCTIONS[self._task],
            # Place of the hand in metres, and how far the gripper is open, in [0, 1].
            "proprio": self._state[:4].astype(np.float32),
        }

    def close(self) -> None:
        """See `EvaluationEnvironment.close`."""
        if self._environment is not None:
            self._take_context()  # what is freed is the current one's
            self._environment.close()
            self._environment = None


def _draw_fast(model: Any) -> None:
    """Leaves out what costs most to draw on a CPU: shadow maps, multisampling, reflections."""
    model.vis.quality.shadowsize = 0
    model.vis.quality.offsamples = 0
    model.mat_reflectance[:] = 0


def _expert(task: str) -> Any:
    from metaworld import policies

    name = POLICY_NAMES.get(task) or "".join(part.capitalize() for part in task.split("-"))
    return getattr(policies, f"Sawyer{name}V3Policy")()


__all__ = ["INSTRUCTIONS", "MetaWorldEvaluation"]
