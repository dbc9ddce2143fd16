"""2-D tabletop with block pushing after Language Table's five families, plus reaching (Gymnasium API).

```python
from lapa.evaluation.environments.tabletop import TabletopEnvironment, TabletopExpert

env = TabletopEnvironment(families=("reach", "block_to_absolute"), embodiment="arm", image_size=64)
observation, info = env.reset(seed=0)
expert = TabletopExpert(env)
terminated = truncated = False
while not (terminated or truncated):
    observation, reward, terminated, truncated, info = env.step(expert.act())
```
"""

from __future__ import annotations

import cmath
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lapa.evaluation.environments.tabletop_embodiments import EMBODIMENTS, TabletopCamera, TabletopEmbodiment
from lapa.evaluation.environments.tabletop_expert import TabletopExpert
from lapa.evaluation.environments.tabletop_physics import TabletopPhysics
from lapa.evaluation.environments.tabletop_recording import TabletopEpisode, record_episode
from lapa.evaluation.environments.tabletop_rendering import MIN_IMAGE_SIZE, CameraShake, TabletopRenderer
from lapa.evaluation.environments.tabletop_tasks import (
    COLOURS,
    FAMILIES,
    SPLITS,
    WORKSPACE_HALF_SIZE,
    TabletopBlock,
    TabletopScene,
    TabletopTask,
    sample_scene,
)

try:
    import gymnasium
except ImportError as error:
    raise ImportError('the tabletop simulator needs gymnasium: pip install "lapa[sim]"') from error

CONTROL_FREQUENCY = 10.0  # Hz; a frame gap of 0.6 s is 6 steps
MAX_BLOCKS = 6  # more do not fit on the board at the spacing of the start states


class TabletopEnvironment(gymnasium.Env[dict[str, Any], np.ndarray]):
    """Pushes blocks over a board seen from above, as an instruction says.

    An action is a displacement of the end effector within one step of 1 / `CONTROL_FREQUENCY` seconds: `Box(-1, 1, (2,))`
    in the embodiment's own frame, where length 1 is its `action_scale` in metres; longer actions are shortened to length 1.
    Board frame: metres, origin at the board's centre, x to the right, y up. The reward is 1.0 in the step that solves the
    task, which terminates the episode, else 0.0.

    An observation holds `image` (image_size, image_size, 3) uint8, `effector` (2,) float32 metres, and `instruction`.
    `info` of both `reset` and `step` holds: `family`, `instruction`, `held_out` (None, "object" or "combination"),
    `success`, `distance` (metres left until solved), `delta` ((2,) float64: the last commanded displacement in metres in
    the board frame), and `state` with `effector` (2,), `block_names`, and `block_poses` (num_blocks, 3) float64: x, y in
    metres, angle in radians. Block 0 is the one the task moves, block 1 the other one it names, if it names two.

    The same seed gives the same scene and instruction in every embodiment.

    Args:
        families: kinds of tasks, drawn uniformly at reset; see `FAMILIES`.
        embodiment: key of `EMBODIMENTS`, or an embodiment of one's own.
        split: "seen", or "unseen" for held-out objects and held-out combinations.
        image_size: height and width of the image in pixels.
        num_blocks: blocks in a scene, 2 to 6 (at most 4 with distinct colours).
        max_steps: an episode is truncated after this many steps; None for each family's own (40 for `reach`, else 80).
        render_observations: False leaves `image` out of the observations; `render()` still draws.
        distinct_colours: whether no two blocks of a scene share a colour.
        thresholds: family -> metres; replaces the success thresholds in `FAMILIES`.
        render_mode: "rgb_array" or None.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_FREQUENCY}  # noqa: RUF012 (gymnasium's own name)

    def __init__(
        self,
        families: Sequence[str] = tuple(FAMILIES),
        embodiment: str | TabletopEmbodiment = "arm",
        split: str = "seen",
        image_size: int = 64,
        num_blocks: int = 3,
        max_steps: int | None = None,
        render_observations: bool = True,
        distinct_colours: bool = True,
        thresholds: Mapping[str, float] | None = None,
        render_mode: str | None = "rgb_array",
    ) -> None:
        _check_families("families", families)
        if isinstance(embodiment, str):
            _check_option("embodiment", embodiment, EMBODIMENTS)
        _check_option("split", split, SPLITS)
        _check_range("image_size", image_size, MIN_IMAGE_SIZE, 4096)
        _check_range("num_blocks", num_blocks, 2, len(COLOURS) if distinct_colours else MAX_BLOCKS)
        if max_steps is not None:
            _check_range("max_steps", max_steps, 1, None)
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode is {render_mode!r}; accepted: 'rgb_array', None")
        self.families = tuple(families)
        self.thresholds = _checked_thresholds(thresholds)
        self.embodiment_name = embodiment if isinstance(embodiment, str) else "custom"
        self.embodiment = EMBODIMENTS[embodiment] if isinstance(embodiment, str) else embodiment
        self.split = split
        self.image_size = image_size
        self.num_blocks = num_blocks
        self._max_steps = max_steps
        self.render_observations = render_observations
        self.distinct_colours = distinct_colours
        self.render_mode = render_mode
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = self._build_observation_space()
        self._action_turn = cmath.rect(self.embodiment.action_scale, self.embodiment.action_rotation)
        self._renderers: dict[int, TabletopRenderer] = {}
        self._scene: TabletopScene | None = None
        self._physics: TabletopPhysics
        self._shake: CameraShake
        self._delta = 0j
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draws a scene and a task.

        Args:
            seed: fixes everything that is drawn until the next seed.
            options: `{"family": name}` asks for a family instead of drawing one.

        Returns:
            Observation and info, see the class.
        """
        super().reset(seed=seed)
        unknown = sorted(set(options or {}) - {"family"})
        if unknown:
            raise ValueError(f"options has unknown keys {unknown}; accepted: 'family'")
        family = self.families[self.np_random.integers(len(self.families))]
        if options and "family" in options:
            family = options["family"]
            _check_option("options['family']", family, FAMILIES)
        scene = sample_scene(
            self.np_random, family, self.split, self.num_blocks, self.distinct_colours, self.thresholds.get(family)
        )
        self._scene = scene
        self._shake = CameraShake(self.np_random, self.embodiment.camera.shake)
        self._physics = TabletopPhysics(
            self.embodiment, scene.blocks, scene.positions, scene.angles, scene.effector, 1.0 / CONTROL_FREQUENCY
        )
        self._delta = 0j
        self._steps = 0
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Moves the effector for one control step.

        Args:
            action: (2,) in [-1, 1], the embodiment's own frame.

        Returns:
            Observation, reward, terminated (solved), truncated (out of steps), info.
        """
        self._delta = self.action_to_delta(action)
        self._physics.move(self._delta)
        self._steps += 1
        info = self._info()
        solved = info["success"]
        return self._observation(), float(solved), solved, not solved and self._steps >= self.max_steps, info

    def render(self, image_size: int | None = None) -> np.ndarray:
        """Draws the current state.

        Args:
            image_size: pixels, the environment's own when None.

        Returns:
            (image_size, image_size, 3) uint8, RGB.
        """
        size = self.image_size if image_size is None else image_size
        if size not in self._renderers:
            _check_range("image_size", size, MIN_IMAGE_SIZE, 4096)
            self._renderers[size] = TabletopRenderer(self.embodiment, size)
        physics = self._physics_or_raise()
        offset = self._shake.offset(self._steps / CONTROL_FREQUENCY)
        return self._renderers[size].render(self.blocks, physics.positions, physics.angles, physics.effector, offset)

    def close(self) -> None:
        """Lets go of the physics; a later `reset` starts anew."""
        self._scene = None
        if hasattr(self, "_physics"):
            del self._physics

    def action_to_delta(self, action: np.ndarray | Sequence[float]) -> complex:
        """Normalised action in the embodiment's frame to a displacement in the board frame (metres, as x + y*1j)."""
        values = np.asarray(action, np.float64)
        if values.shape != (2,) or not np.isfinite(values).all():
            raise ValueError(f"action is {action!r}; accepted: two finite numbers in [-1, 1]")
        direction = complex(*values.tolist())
        return direction / max(abs(direction), 1.0) * self._action_turn

    def delta_to_action(self, delta: complex) -> np.ndarray:
        """Displacement in the board frame (metres) to the normalised action (2,) float32, at most of length 1."""
        direction = delta / self._action_turn
        direction /= max(abs(direction), 1.0)
        return np.array((direction.real, direction.imag), np.float32)

    @property
    def max_steps(self) -> int:
        """Steps after which the running episode is truncated."""
        return FAMILIES[self.task.family].max_steps if self._max_steps is None else self._max_steps

    @property
    def task(self) -> TabletopTask:
        """The task of the running episode."""
        return self._scene_or_raise().task

    @property
    def blocks(self) -> tuple[TabletopBlock, ...]:
        """The blocks of the running episode."""
        return self._scene_or_raise().blocks

    @property
    def positions(self) -> list[complex]:
        """Centres of the blocks in metres, as x + y*1j."""
        return self._physics_or_raise().positions

    @property
    def effector(self) -> complex:
        """Centre of the end effector in metres, as x + y*1j."""
        return self._physics_or_raise().effector

    def _scene_or_raise(self) -> TabletopScene:
        if self._scene is None:
            raise RuntimeError("no episode is running: call reset() first")
        return self._scene

    def _physics_or_raise(self) -> TabletopPhysics:
        self._scene_or_raise()
        return self._physics

    def _build_observation_space(self) -> gymnasium.spaces.Dict:
        limit = WORKSPACE_HALF_SIZE + 0.05  # contacts may press the effector a little past its limit
        spaces: dict[str, gymnasium.Space[Any]] = {
            "effector": gymnasium.spaces.Box(-limit, limit, (2,), np.float32),
            "instruction": gymnasium.spaces.Text(max_length=128, charset=string.ascii_lowercase + " "),
        }
        if self.render_observations:
            spaces["image"] = gymnasium.spaces.Box(0, 255, (self.image_size, self.image_size, 3), np.uint8)
        return gymnasium.spaces.Dict(spaces)

    def _observation(self) -> dict[str, Any]:
        effector = self.effector
        observation = {
            "effector": np.array((effector.real, effector.imag), np.float32),
            "instruction": self.task.instruction,
        }
        if self.render_observations:
            observation["image"] = self.render()
        return observation

    def _info(self) -> dict[str, Any]:
        positions, effector, task = self.positions, self.effector, self.task
        distance = task.distance(positions, effector)
        poses = [(p.real, p.imag, angle) for p, angle in zip(positions, self._physics.angles)]
        return {
            "family": task.family,
            "instruction": task.instruction,
            "held_out": task.held_out,
            "success": distance == 0.0,
            "distance": distance,
            "delta": np.array((self._delta.real, self._delta.imag)),
            "state": {
                "effector": np.array((effector.real, effector.imag)),
                "block_names": tuple(block.name for block in self.blocks),
                "block_poses": np.array(poses),
            },
        }


def _check_families(argument: str, families: Sequence[str]) -> None:
    unknown = [families] if isinstance(families, str) else [name for name in families if name not in FAMILIES]
    if unknown or not families:
        raise ValueError(f"{argument} is {families!r}; accepted: a non-empty sequence out of {', '.join(FAMILIES)}")


def _check_option(argument: str, value: object, options: Mapping[str, object] | Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{argument} is {value!r}; accepted: {', '.join(options)}")


def _check_range(argument: str, value: int, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        accepted = f"{low} or more" if high is None else f"{low} to {high}"
        raise ValueError(f"{argument} is {value!r}; accepted: an integer, {accepted}")


def _checked_thresholds(thresholds: Mapping[str, float] | None) -> dict[str, float]:
    for family, threshold in (thresholds or {}).items():
        _check_option("thresholds", family, FAMILIES)
        if not 0.0 < threshold < 0.3:
            raise ValueError(f"thresholds[{family!r}] is {threshold!r}; accepted: metres above 0 and below 0.3")
    return dict(thresholds or {})


__all__ = [
    "CONTROL_FREQUENCY",
    "EMBODIMENTS",
    "FAMILIES",
    "TabletopCamera",
    "TabletopEmbodiment",
    "TabletopEnvironment",
    "TabletopEpisode",
    "TabletopExpert",
    "TabletopTask",
    "record_episode",
]
