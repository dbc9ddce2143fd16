"""A simulator that crashes, dies and hangs."""

import os
import signal
import time
from typing import ClassVar

from lapa.evaluation.environments.tabletop_adapter import TabletopEvaluation


class Fragile(TabletopEvaluation):
    """Goes wrong in the third step of some starts: raises, kills its process, or never answers."""

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
