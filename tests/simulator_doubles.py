"""Doubles with the interface of simulators that are not installed here; each says what its adapter asks for, no more."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

LANGUAGE_TABLE = {
    "blocks": """
import enum

class LanguageTableBlockVariants(enum.Enum):
    BLOCK_8 = 'BLOCK_8'
    N_CHOOSE_K = 'N_CHOOSE_K'
""",
    "language_table": """
import gym
import numpy as np
from gym import spaces
from language_table.environments.utils import files

class Client:
    open = 0
    def disconnect(self): Client.open -= 1

class LanguageTable(gym.Env):
    def __init__(self, block_mode, training=True, reward_factory=None, control_frequency=10.0, seed=None):
        self.block_mode, self.training, self.reward_factory = block_mode, training, reward_factory
        self.rng, self.pybullet_client, self.resets, self.actions = np.random.RandomState(seed), Client(), 0, []
        self.action_space = spaces.Box(low=-0.1, high=0.1, shape=(2,))
        Client.open += 1
    def reset(self):
        self.resets += 1
        self.place = self.rng.uniform(size=2)
        # As the sentences of `separate` are drawn.
        self.sentence = 'separate %d' % np.random.randint(1000)
        return self._see()
    def step(self, action):
        self.actions.append(action)
        self.place = self.place + action
        return self._see(), 100.0 * (len(self.actions) == 3), len(self.actions) == 3, {}
    def compute_state(self): return {'place': self.place}
    @staticmethod
    def decode_instruction(codes): return bytes(codes[codes != 0].tolist()).decode()
    def _see(self):
        codes = np.zeros(512, np.int32)
        codes[:len(self.sentence)] = list(self.sentence.encode())
        image = np.zeros((180, 320, 3), np.uint8)
        image[:, 160:] = 200
        return {'rgb': image, 'instruction': codes, 'effector_translation': self.place.astype(np.float32)}
""",
    "utils.files": "import six\nimport tensorflow as tf\n",
    "oracles.plot": "import imageio\nimport tensorflow as tf\n",
    "oracles.push_oracle_rrt_slowdown": """
import numpy as np
from language_table.environments.oracles import plot
from tf_agents.policies import py_policy
from tf_agents.trajectories import policy_step
from tf_agents.trajectories import time_step as ts

class ObstacleOrientedPushOracleBoard2dRRT(py_policy.PyPolicy):
    def __init__(self, env, use_ee_planner):
        super().__init__(env.time_step_spec(), env.action_spec())
        assert use_ee_planner and env.get_control_frequency() == 10.0 and env.pybullet_client is not None
    # As the planner does: from numpy's global state. Fails in about half of the draws.
    def get_plan(self, state): return np.random.random() > 0.5
    def _get_action_for_block_target(self, state): return state['place'] * np.random.random()
""",
} | {
    f"rewards.{module}": f"class {name}: pass\n"
    for module, name in (
        ("block2block", "BlockToBlockReward"),
        ("block2absolutelocation", "BlockToAbsoluteLocationReward"),
        ("block2block_relative_location", "BlockToBlockRelativeLocationReward"),
        ("block2relativelocation", "BlockToRelativeLocationReward"),
        ("separate_blocks", "SeparateBlocksReward"),
    )
}


def write_language_table(folder: Path, leave_out: str | None = None) -> None:
    """A package `language_table` whose modules import what the original's do."""
    for name, source in LANGUAGE_TABLE.items():
        path = folder.joinpath("language_table", "environments", *name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in path.relative_to(folder).parents[:-1]:
            (folder / parent / "__init__.py").touch()
        if name != leave_out:
            path.write_text(source)


class Tensor:
    """As much of a torch tensor as is read."""

    def __init__(self, values) -> None:
        self.values = np.asarray(values)

    def cpu(self):
        return self.values

    def __getitem__(self, index):
        return self.values[index]

    def __sub__(self, other):
        return Tensor(self.values - other.values)


class WidowX:
    """SIMPLER's environments, of ManiSkill3 (everything batched) or of the original package."""

    made: list = []  # noqa: RUF012

    def __init__(self, identifier, options) -> None:
        self.identifier, self.options, self.is_batched = identifier, options, identifier.endswith("-v1")
        self.unwrapped, self.actions, self.closed = self, [], False
        self.source_obj_name = "spoon"
        self.made.append(self)

    def reset(self, seed=None, options=None):
        self.episode = options["episode_id"] if self.is_batched else options["obj_init_options"]["episode_id"]
        self.seed, self.actions = seed, []
        self.episode_obj_xyzs_after_settle = {name: Tensor([[0.0, 0, 1]]) for name in ("spoon", "towel")}
        self.objs = {
            name: SimpleNamespace(pose=SimpleNamespace(p=Tensor([[0.0, 0, 1]]))) for name in ("spoon", "towel")
        }
        return self._see(), {}

    def step(self, action):
        self.actions.append(action)
        count = len(self.actions)
        # Grasped in step 2, moved from step 3 on, on the target in step 4 only.
        self.objs["spoon"].pose.p = Tensor([[0.04 if count >= 3 else 0.0, 0, 1.2]])
        info = {"is_src_obj_grasped": count == 2, "consecutive_grasp": False, "success": count == 4}
        info["moved_correct_obj"] = False if self.is_batched else count >= 3
        if self.is_batched:
            info = {name: Tensor([value]) for name, value in info.items()}
        return self._see(), 0.0, count == 4, False, info

    def get_language_instruction(self):
        sentence = "put the spoon on the towel"
        return [sentence] if self.is_batched else sentence

    def close(self):
        self.closed = True

    def _see(self):
        image = np.zeros((480, 640, 3), np.uint8)
        image[:, 320:] = self.episode
        if self.is_batched:
            return {"sensor_data": {"3rd_view_camera": {"rgb": Tensor(image[None])}}}
        return {"image": {"3rd_view_camera": {"rgb": image}}}


class LiberoArm:
    """LIBERO's `OffScreenRenderEnv`."""

    made: list = []  # noqa: RUF012

    def __init__(self, bddl_file_name, camera_heights, camera_widths) -> None:
        self.file, self.size, self.calls, self.closed = bddl_file_name, (camera_heights, camera_widths), [], False
        self.made.append(self)

    def seed(self, seed):
        self.calls.append(("seed", seed))

    def reset(self):
        self.calls.append(("reset",))
        return {}

    def set_init_state(self, state):
        self.calls.append(("state", state.tolist()))
        return self._see()

    def step(self, action):
        self.calls.append(("step", action))
        return self._see(), 0.0, action[0] > 0.5, {}

    def close(self):
        self.closed = True

    def _see(self):
        image = np.zeros((*self.size, 3), np.uint8)
        # Bottom row first: what is seen at the bottom left is at the top left here.
        image[: self.size[0] // 2, : self.size[1] // 2] = 255
        half = np.sqrt(0.5)
        return {
            "agentview_image": image,
            "robot0_eef_pos": np.array([0.1, 0.2, 0.3]),
            "robot0_eef_quat": np.array([half, 0, 0, half]),
            "robot0_gripper_qpos": np.array([0.04, -0.04]),
        }


def module_tree(monkeypatch, name: str, **content) -> ModuleType:
    """Puts a module and its parents into `sys.modules` for a test."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        known = ".".join(parts[:count])
        if known not in sys.modules:
            module = ModuleType(known)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, known, module)
            if count > 1:
                monkeypatch.setattr(sys.modules[".".join(parts[: count - 1])], parts[count - 1], module, raising=False)
    vars(sys.modules[name]).update(content)
    return sys.modules[name]
