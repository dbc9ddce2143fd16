"""A simulator that crashes, dies and hangs."""

import os
import signal
import time
from typing import ClassVar

from lapa.evaluation.environments.tabletop_adapter import TabletopEvaluation


class Fragile(TabletopEvaluation):
    """Goes wrong in the third step of some starts: raises, kills its process, or never answers."""

    is_fragile = True
    ways: ClassVar[dict[int, str]] = {1: "raise", 3: "die", 6: "sleep"}

    def start(self, task, seed):
        self.way, self.count = self.ways.get(seed), 0
        return super().start(task, seed)

    def step(self, action):
        self.count += 1
        if self.count == 3 and self.way == "raise":
            raise ValueError("the physics exploded")
        if self.count == 3 and self.way == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.count == 3 and self.way == "sleep":
            time.sleep(60)
        return super().step(action)


class Forgetful(Fragile):
    """Shows in one corner which process draws, so that no other process can bring it back to where it was."""

    def start(self, task, seed):
        return self.marked(super().start(task, seed))

    def step(self, action):
        result = super().step(action)
        self.marked(result.observation)
        return result

    def marked(self, observation):
        if self.way is None:
            observation["image"][0, 0] = list(os.getpid().to_bytes(4))[-3:]
        return observation


class Fatal(Fragile):
    """Start 4 ends every process but the first one that played it."""

    ways: ClassVar[dict[int, str]] = {3: "die"}

    def __init__(self, folder, **options):
        super().__init__(**options)
        self.first = folder / "first"

    def start(self, task, seed):
        if seed == 4:
            if self.first.exists():
                os.kill(os.getpid(), signal.SIGKILL)
            self.first.touch()
        return super().start(task, seed)
