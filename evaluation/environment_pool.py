"""Many environments played side by side, in this process or in others that may crash or hang without harm."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.evaluation.environment_groups import (
    CRASHED,
    HUNG,
    EnvironmentGroup,
    Failure,
    LocalGroup,
    MakeEnvironment,
    RemoteGroup,
    Restarted,
    Start,
)
from lapa.evaluation.environments.base import Observation, StepResult


class EnvironmentPool:
    """
    Environments by number, each played by itself.

    With processes, the environments are dealt to them in turn, and a process that dies or is silent for longer than
    `timeout` is replaced. Only the environment that was being asked gives a `Failure` then; the others of the process are
    brought to where they were, see [`~lapa.evaluation.environment_groups.RemoteGroup`].

    Args:
        make: Makes an environment; importable by name where there are processes.
        size: Number of environments.
        num_processes: 0 plays them in this process, where an error is a `Failure`, a hang is not noticed, and a native
            crash ends everything.
        timeout: Seconds that one environment may take for a step.
    """

    def __init__(self, make: MakeEnvironment, size: int, num_processes: int = 0, timeout: float = 60.0) -> None:
        if size < 1 or num_processes < 0 or timeout <= 0:
            raise ValueError(
                f"`size` ({size}) must be at least 1, `num_processes` ({num_processes}) at least 0, `timeout` "
                f"({timeout}) above 0."
            )
        self.size = size
        self._groups: list[EnvironmentGroup] = []
        try:
            if num_processes == 0:
                self._groups.append(LocalGroup(make, range(size)))
            for number in range(min(num_processes, size)):
                self._groups.append(RemoteGroup(make, range(number, size, num_processes), timeout))
        except BaseException:
            self.close()
            raise

    def start(self, starts: Mapping[int, Start]) -> dict[int, Observation | Failure | Restarted]:
        """First observations of episodes, by environment."""
        return self._ask("start", starts)

    def step(self, actions: Mapping[int, NDArray[np.float32]]) -> dict[int, StepResult | Failure | Restarted]:
        """Plays one step in each of some environments."""
        return self._ask("step", actions)

    def expert_actions(self, slots: Sequence[int]) -> dict[int, NDArray[np.float32] | Failure | Restarted]:
        """What the scripted experts of some environments do now."""
        return self._ask("expert_action", dict.fromkeys(slots))

    def still_actions(self, slots: Sequence[int]) -> dict[int, NDArray[np.float32] | Failure | Restarted]:
        """What does nothing now in some environments."""
        return self._ask("still_action", dict.fromkeys(slots))

    def _ask(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Any]:
        for group in self._groups:
            group.send(method, {slot: arguments[slot] for slot in group.slots if slot in arguments})
        answers: dict[int, Any] = {}
        for group in self._groups:
            answers |= group.receive()
        # In the order of the question: rows of a batch must not depend on which process answered first.
        return {slot: answers[slot] for slot in arguments}

    def close(self) -> None:
        """Ends everything."""
        for group in self._groups:
            group.close()

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


__all__ = ["CRASHED", "HUNG", "EnvironmentPool", "Failure", "MakeEnvironment", "Restarted", "Start"]
