"""A tiny environment of Gymnasium: a dot that is to come to the middle of the picture."""

import gymnasium
import numpy as np


class Reach(gymnasium.Env):
    """Observations as lerobot's packages give them; `sentence` puts one into `info`."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, sentence=None, discrete=False, render_mode=None):
        self.sentence, self.render_mode = sentence, render_mode
        self.action_space = gymnasium.spaces.Discrete(2) if discrete else gymnasium.spaces.Box(0, 4, (2,), np.float32)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "pixels": gymnasium.spaces.Dict({"top": gymnasium.spaces.Box(0, 255, (32, 32, 3), np.uint8)}),
                "agent_pos": gymnasium.spaces.Box(-100, 100, (2,), np.float64),
            }
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.integers(2, 10, 2).astype(np.float64)
        return self._see()

    def step(self, action):
        assert action.dtype == np.float32 and self.action_space.contains(action)
        self.place = self.place + action
        solved = bool((np.abs(self.place - 16) < 1).all())
        observation, info = self._see()
        return observation, float(solved), solved, False, {**info, "is_success": solved}

    def render(self):
        image = np.zeros((32, 32, 3), np.uint8)
        row, column = np.clip(self.place, 0, 31).astype(int)
        image[row, column] = 255
        return image

    def _see(self):
        info = {} if self.sentence is None else {"sentence": self.sentence}
        return {"pixels": {"top": self.render()}, "agent_pos": self.place}, info


gymnasium.register("tests/Reach-v0", Reach, max_episode_steps=20)
