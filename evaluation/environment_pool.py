"""Many environments played side by side, in this process or in others that may crash or hang without harm."""

import contextlib
import logging
import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.evaluation.environments.base import (
    EnvironmentMisused,
    EvaluationEnvironment,
    Observation,
    StepResult,
)

logger = logging.getLogger(__name__)

# What became of an episode that its environment did not end itself.
CRASHED, HUNG = "crashed", "hung"
# Seconds that a process may take to make its environments, assets included.
START_TIMEOUT = 600.0

MakeEnvironment = Callable[[], EvaluationEnvironment]
Start = tuple[str, int]


@dataclass(frozen=True)
class Failure:
    """
    An environment that did not answer.

    Args:
        kind (`str`): `crashed` or `hung`.
        reason (`str`): Message of the error, or what is known.
    """

    kind: str
    reason: str


class EnvironmentPool:
    """
    Environments by number, each played by itself.

    With processes, the environments are dealt to them in turn, and a process that dies, raises or is silent for longer
    than `timeout` is ended; every environment in it gives a `Failure` then, and a new process takes its place.

    Args:
        make: Makes an environment; importable by name where there are processes.
        size: Number of environments.
        num_processes: 0 plays them in this process, where an error is a `Failure` and a hang is not noticed.
        timeout: Seconds that a step of all environments of a process may take.
    """

    def __init__(self, make: MakeEnvironment, size: int, num_processes: int = 0, timeout: float = 60.0) -> None:
        if size < 1 or num_processes < 0 or timeout <= 0:
            raise ValueError(
                f"`size` ({size}) must be at least 1, `num_processes` ({num_processes}) at least 0, `timeout` "
                f"({timeout}) above 0."
            )
        self.size = size
        groups = [list(range(number, size, num_processes)) for number in range(min(num_processes, size))]
        self._groups: list[_Group] = (
            [_RemoteGroup(make, slots, timeout) for slots in groups] if groups else [_LocalGroup(make, range(size))]
        )

    def start(self, starts: Mapping[int, Start]) -> dict[int, Observation | Failure]:
        """First observations of episodes, by environment."""
        return self._ask("start", starts)

    def step(self, actions: Mapping[int, NDArray[np.float32]]) -> dict[int, StepResult | Failure]:
        """Plays one step in each of some environments."""
        return self._ask("step", actions)

    def expert_actions(self, slots: Sequence[int]) -> dict[int, NDArray[np.float32] | Failure]:
        """What the scripted experts of some environments do now."""
        return self._ask("expert_action", dict.fromkeys(slots))

    def still_actions(self, slots: Sequence[int]) -> dict[int, NDArray[np.float32] | Failure]:
        """What does nothing now in some environments."""
        return self._ask("still_action", dict.fromkeys(slots))

    def _ask(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Any]:
        for group in self._groups:
            group.send(method, {slot: arguments[slot] for slot in group.slots if slot in arguments})
        answers: dict[int, Any] = {}
        for group in self._groups:
            answers |= group.receive()
        return answers

    def close(self) -> None:
        """Ends everything."""
        for group in self._groups:
            group.close()

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _call(environment: EvaluationEnvironment, method: str, argument: Any) -> Any:
    if method == "start":
        return environment.start(*argument)
    if method == "step":
        return environment.step(argument)
    return environment.expert_action() if method == "expert_action" else environment.still_action()


class _Group(ABC):
    """Environments that are asked together: what is asked of all of them first, then all answers."""

    slots: list[int]

    @abstractmethod
    def send(self, method: str, arguments: Mapping[int, Any]) -> None: ...

    @abstractmethod
    def receive(self) -> dict[int, Any]: ...

    @abstractmethod
    def close(self) -> None: ...


class _LocalGroup(_Group):
    """Environments of this process. One that raises is made anew."""

    def __init__(self, make: MakeEnvironment, slots: Sequence[int]) -> None:
        self.slots, self._make = list(slots), make
        self._environments = {slot: make() for slot in self.slots}
        self._answers: dict[int, Any] = {}

    def send(self, method: str, arguments: Mapping[int, Any]) -> None:
        self._answers = {slot: self._answer(slot, method, argument) for slot, argument in arguments.items()}

    def _answer(self, slot: int, method: str, argument: Any) -> Any:
        try:
            return _call(self._environments[slot], method, argument)
        except EnvironmentMisused:
            raise
        except Exception as error:
            logger.warning("environment %d crashed: %r", slot, error)
            self._environments[slot] = self._make()
            return Failure(CRASHED, repr(error))

    def receive(self) -> dict[int, Any]:
        return self._answers

    def close(self) -> None:
        for environment in self._environments.values():
            environment.close()


def _serve(connection: Connection, make: MakeEnvironment, slots: Sequence[int]) -> None:
    """What a process does: answers until it is told to end."""
    try:
        group = _LocalGroup(make, slots)
        connection.send(None)
        while (message := connection.recv()) is not None:
            try:
                group.send(*message)
                connection.send(group.receive())
            except EnvironmentMisused as error:
                connection.send(error)
        group.close()
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception as error:
        connection.send(EnvironmentMisused(f"the environment cannot be made: {error}"))


def _module_of(make: MakeEnvironment) -> str:
    made: Any = make.func if isinstance(make, partial) else make
    return str(made.__module__)


class _RemoteGroup(_Group):
    """Environments of another process."""

    def __init__(self, make: MakeEnvironment, slots: list[int], timeout: float) -> None:
        self.slots, self._make, self._timeout = slots, make, timeout
        self._asked: list[int] = []
        self._broken: Failure | None = None
        self._open()

    def _open(self) -> None:
        # Not a fork of this process, whose renderers and thread pools would not survive it: one of a process that has
        # imported the environment and done nothing else, so that a replacement is there at once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, _module_of(self._make)])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._make, self.slots), daemon=True)
        self._process.start()
        theirs.close()
        answer = self._read(START_TIMEOUT)
        if isinstance(answer, Failure):
            self.close()
            raise ValueError(f"the environment cannot be made: its process {answer.kind} ({answer.reason}).")

    def _read(self, timeout: float) -> Any:
        try:
            if not self._connection.poll(timeout):
                return Failure(HUNG, f"no answer within {timeout:g} s")
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(1)
            return Failure(CRASHED, f"its process ended with exit code {self._process.exitcode}")
        if isinstance(answer, EnvironmentMisused):
            raise answer
        return answer

    def send(self, method: str, arguments: Mapping[int, Any]) -> None:
        self._asked, self._broken = list(arguments), None
        if not arguments:
            return
        try:
            self._connection.send((method, dict(arguments)))
        except OSError:
            self._broken = Failure(CRASHED, "its process is gone")

    def receive(self) -> dict[int, Any]:
        if not self._asked:
            return {}
        answer = self._broken or self._read(self._timeout)
        if not isinstance(answer, Failure):
            return answer
        logger.warning("environments %s %s: %s", self.slots, answer.kind, answer.reason)
        self.close()
        self._open()
        return dict.fromkeys(self._asked, answer)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._connection.close()
        self._process.join(0.5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


__all__ = ["CRASHED", "HUNG", "EnvironmentPool", "Failure", "MakeEnvironment", "Start"]
