"""Where environments live: in this process, or in one whose crash or hang costs a single episode."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from lapa.evaluation.environments.base import EnvironmentMisused, EvaluationEnvironment, Observation, StepResult

logger = logging.getLogger(__name__)

# What became of an episode that its environment did not end itself.
CRASHED, HUNG = "crashed", "hung"
# Seconds that a process may take to make its environments, assets included.
START_TIMEOUT = 600.0
# How often the process of a group may be lost during one request without anything being worked on in it.
MAX_IDLE_LOSSES = 3

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


@dataclass(frozen=True)
class Restarted:
    """
    The answer of an environment whose episode begins again: its process was lost to another one, and playing its actions
    again led somewhere else.

    Args:
        observation (`Observation`): The first one.
    """

    observation: Observation


@dataclass
class Episode:
    """
    What was asked of an environment since its episode began, and the last answer to each kind of request: enough to bring
    another environment to the same point, and to see whether it is the same.
    """

    calls: list[tuple[str, Any]] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)

    def add(self, method: str, argument: Any, answer: Any) -> None:
        """Keeps a request and its answer."""
        # A copy: the caller may write the next action into the same array.
        self.calls.append((method, argument.copy() if isinstance(argument, np.ndarray) else argument))
        self.answers[method] = answer


class EnvironmentGroup(ABC):
    """Environments that are asked together: what is asked of all of them first, then all answers."""

    slots: list[int]

    @abstractmethod
    def send(self, method: str, arguments: Mapping[int, Any]) -> None:
        """Asks some environments: `start`, `step`, `expert_action` or `still_action`, with an argument each."""

    @abstractmethod
    def receive(self) -> dict[int, Any]:
        """What they answer; a `Failure` or `Restarted` where they do not."""

    @abstractmethod
    def close(self) -> None:
        """Ends them."""


class LocalGroup(EnvironmentGroup):
    """Environments of this process. One that raises is made anew for its next episode."""

    def __init__(self, make: MakeEnvironment, slots: Sequence[int]) -> None:
        self.slots, self._make = list(slots), make
        self._environments: dict[int, EvaluationEnvironment | None] = {slot: make() for slot in self.slots}
        self._answers: dict[int, Any] = {}

    def send(self, method: str, arguments: Mapping[int, Any]) -> None:
        """See `EnvironmentGroup.send`."""
        self._answers = {slot: self.answer(slot, method, argument) for slot, argument in arguments.items()}

    def answer(self, slot: int, method: str, argument: Any) -> Any:
        """What one environment answers."""
        try:
            environment = self._environments[slot] = self._environments[slot] or self._make()
            if method == "start":
                return environment.start(*argument)
            if method == "step":
                return environment.step(argument)
            return environment.expert_action() if method == "expert_action" else environment.still_action()
        except EnvironmentMisused:
            raise
        except Exception as error:
            logger.warning("environment %d crashed: %r", slot, error)
            broken, self._environments[slot] = self._environments[slot], None
            if broken is not None:
                with contextlib.suppress(Exception):
                    broken.close()
            return Failure(CRASHED, repr(error))

    def receive(self) -> dict[int, Any]:
        """See `EnvironmentGroup.receive`."""
        return self._answers

    def close(self) -> None:
        """See `EnvironmentGroup.close`."""
        for environment in self._environments.values():
            if environment is not None:
                environment.close()


def _serve(connection: Connection, make: MakeEnvironment, slots: Sequence[int]) -> None:
    """What a process does: acknowledges each request and sends the answers one by one, until it is told to end."""
    # Ctrl-C reaches every process of the terminal; the one that plays decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        try:
            group = LocalGroup(make, slots)
        except Exception as error:
            connection.send(EnvironmentMisused(f"the environment cannot be made: {error}"))
            return
        connection.send(None)
        while (request := connection.recv()) is not None:
            connection.send(None)
            method, arguments = request
            try:
                for slot, argument in arguments.items():
                    connection.send(group.answer(slot, method, argument))
            except EnvironmentMisused as error:
                connection.send(error)
        group.close()


def _end_with_parent() -> None:
    """A simulator that hangs would outlive a player that is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _module_of(make: MakeEnvironment) -> str:
    made: Any = make.func if isinstance(make, partial) else make
    return str(made.__module__)


class _ProcessLost(Exception):
    """The process of a group is gone, or did not answer in time."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class RemoteGroup(EnvironmentGroup):
    """
    Environments of another process.

    Their answers arrive one by one, so when the process is lost the first one that is missing is to blame. That episode
    ends; a new process takes the place of the lost one, and the other episodes are brought to where they were: everything
    that was asked of them is asked again. Where that leads elsewhere (a simulator that is not deterministic), the episode
    begins again, and the answer says so.

    Args:
        make: Makes an environment; importable by name.
        slots: Numbers of the environments.
        timeout: Seconds that one answer may take.

    Raises:
        ValueError: The environment cannot be made.
    """

    def __init__(self, make: MakeEnvironment, slots: Sequence[int], timeout: float) -> None:
        self.slots, self._make, self._timeout = list(slots), make, timeout
        self._episodes: dict[int, Episode] = {}
        self._method, self._waiting = "", dict[int, Any]()
        self._is_working = False
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
        try:
            self._read(START_TIMEOUT)
        except BaseException as error:
            self._kill()
            if isinstance(error, _ProcessLost):
                how = f"its process {error.failure.kind} ({error.failure.reason})"
                raise ValueError(f"the environment cannot be made: {how}.") from error
            raise

    def _read(self, timeout: float) -> Any:
        try:
            if not self._connection.poll(timeout):
                raise _ProcessLost(Failure(HUNG, f"no answer within {timeout:g} s"))
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(1)
            reason = f"its process ended with exit code {self._process.exitcode}"
            raise _ProcessLost(Failure(CRASHED, reason)) from error
        if isinstance(answer, EnvironmentMisused):
            raise answer
        return answer

    def send(self, method: str, arguments: Mapping[int, Any]) -> None:
        """See `EnvironmentGroup.send`."""
        self._method, self._waiting = method, dict(arguments)
        if method == "start":
            for slot in arguments:
                self._episodes.pop(slot, None)
        self._post(method, self._waiting)

    def _post(self, method: str, arguments: Mapping[int, Any]) -> None:
        self._is_working = False
        # That the process is gone is noticed where its answer is read.
        with contextlib.suppress(OSError):
            if arguments:
                self._connection.send((method, dict(arguments)))

    def receive(self) -> dict[int, Any]:
        """See `EnvironmentGroup.receive`."""
        answers: dict[int, Any] = {}
        idle_losses = 0
        while self._waiting:
            try:
                self._collect(answers)
            except _ProcessLost as lost:
                idle_losses += not self._is_working
                logger.warning(
                    "the process of environments %s %s: %s", self.slots, lost.failure.kind, lost.failure.reason
                )
                if self._is_working:
                    answers |= self._end([next(iter(self._waiting))], lost.failure)
                elif idle_losses == MAX_IDLE_LOSSES:
                    answers |= self._end(list(self._waiting), lost.failure)
                answers |= self._restore()
                self._post(self._method, self._waiting)
        return answers

    def _collect(self, answers: dict[int, Any]) -> None:
        """Reads what is still to come of a request, in the order in which it was asked."""
        self._read(self._timeout)
        self._is_working = True
        for slot, argument in list(self._waiting.items()):
            answer = answers[slot] = self._read(self._timeout)
            del self._waiting[slot]
            if isinstance(answer, Failure) or (isinstance(answer, StepResult) and answer.done):
                self._episodes.pop(slot, None)
            else:
                self._episodes.setdefault(slot, Episode()).add(self._method, argument, answer)

    def _end(self, slots: Sequence[int], failure: Failure) -> dict[int, Failure]:
        for slot in slots:
            self._waiting.pop(slot, None)
            self._episodes.pop(slot, None)
        return dict.fromkeys(slots, failure)

    def _restore(self) -> dict[int, Failure | Restarted]:
        """Opens a new process and brings the running episodes to where they were; what became of those that are not."""
        others: dict[int, Failure | Restarted] = {}
        while True:
            self._kill()
            self._open()
            for slot in list(self._episodes):
                try:
                    if (restarted := self._replay(slot)) is not None:
                        others[slot] = restarted
                        self._waiting.pop(slot, None)
                except _ProcessLost as lost:
                    logger.warning("environment %d %s when it was restored", slot, lost.failure.kind)
                    others |= self._end([slot], lost.failure)
                    break
            else:
                return others

    def _replay(self, slot: int) -> Restarted | None:
        """Asks again what was asked of an environment. None if the answers are the same; else its episode begins anew."""
        episode, again = self._episodes[slot], Episode()
        for method, argument in episode.calls:
            answer = self._ask_one(slot, method, argument)
            if isinstance(answer, Failure) or (isinstance(answer, StepResult) and answer.done):
                break
            again.add(method, argument, answer)
        if len(again.calls) == len(episode.calls) and _is_same(again.answers, episode.answers):
            return None
        logger.warning(
            "environment %d is not where it was when its actions are played again: its episode begins anew", slot
        )
        method, start = episode.calls[0]
        observation = self._ask_one(slot, method, start)
        if isinstance(observation, Failure):
            raise _ProcessLost(observation)
        self._episodes[slot] = Episode()
        self._episodes[slot].add(method, start, observation)
        return Restarted(observation)

    def _ask_one(self, slot: int, method: str, argument: Any) -> Any:
        self._post(method, {slot: argument})
        self._read(self._timeout)
        return self._read(self._timeout)

    def _kill(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        """See `EnvironmentGroup.close`."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._connection.close()
        self._process.join(0.5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _is_same(first: Any, second: Any) -> bool:
    """Whether two answers are equal bit for bit."""
    if isinstance(first, StepResult) and isinstance(second, StepResult):
        first, second = vars(first), vars(second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_is_same(first[key], second[key]) for key in first)
    ours, theirs = np.asarray(first), np.asarray(second)
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()


__all__ = [
    "CRASHED",
    "HUNG",
    "EnvironmentGroup",
    "Failure",
    "LocalGroup",
    "MakeEnvironment",
    "RemoteGroup",
    "Restarted",
    "Start",
]
