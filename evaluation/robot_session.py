"""
A real-robot evaluation while it runs: whose turn it is, what was scored, and a log that survives a kill.

Every initial position is played by all policies before the next one, in an order that is balanced and drawn. The scorer
sees letters that mean another policy at every position; names come out when the session is ended.
"""

import contextlib
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lapa.data.atomic_files import write_atomically
from lapa.evaluation.robot_session_file import PolicyEntry, SessionFile, Trial
from lapa.evaluation.robot_session_order import counterbalanced_orders

SETTINGS_FILE, EVENTS_FILE, TOKEN_FILE, LOCK_FILE = "session.json", "events.jsonl", "robot-token", ".lock"
MAX_NOTE_LENGTH = 2000
# Bytes at either end of a file that tell versions of a model apart without reading all of it.
FINGERPRINT_BYTES = 1 << 20


class NotNow(ValueError):
    """Something that does not fit where the session stands; nothing was changed."""


@dataclass(frozen=True)
class Run:
    """
    One rollout of a session.

    Args:
        name (`str`): `012B`: the second one at position 12. It says nothing about the policy.
        label (`str`): `B`, what the scorer sees.
        position (`int`): Number of the initial position, from 0.
        trial (`Trial`): What is played.
        policy (`PolicyEntry`): Who plays; never shown before the end.
    """

    name: str
    label: str
    position: int
    trial: Trial
    policy: PolicyEntry


@dataclass(frozen=True)
class Score:
    """
    What a rollout was given.

    Args:
        score (`float`): 0, or one of the task's credits.
        note (`str`): Of the scorer.
        time (`str`): UTC, ISO 8601.
    """

    score: float
    note: str
    time: str


@dataclass
class SessionState:
    """
    Where a session stands: what its events lead to.

    Args:
        scores (`list[Score]`): Of the runs, in their order; the next run is the current one.
        started, finished (`bool`): Whether the scene of the current run is set, and whether its robot has come to an end.
        paused, ended (`bool`): Of the session.
        repeats (`dict[str, int]`): How often a run was begun anew.
        undone (`int`): Scores that were taken back.
    """

    scores: list[Score] = field(default_factory=list)
    started: bool = False
    finished: bool = False
    paused: bool = False
    ended: bool = False
    repeats: dict[str, int] = field(default_factory=dict)
    undone: int = 0

    def apply(self, event: Mapping[str, Any]) -> None:
        """Follows one event of the log."""
        kind = event["event"]
        if kind == "score":
            self.scores.append(Score(event["score"], event["note"], event["time"]))
            self.started = self.finished = False
        elif kind == "undo":
            self.scores.pop()
            self.undone += 1
            # What was played is still there to be scored; the robot must not begin again.
            self.started = self.finished = True
        elif kind == "repeat":
            self.repeats[event["run"]] = self.repeats.get(event["run"], 0) + 1
            self.started = self.finished = False
        elif kind == "start":
            self.started = True
        elif kind == "finish":
            self.finished = True
        elif kind in ("pause", "resume"):
            self.paused = kind == "pause"
        elif kind == "end":
            self.ended = True
        else:
            raise ValueError(f"unknown event {kind!r}.")


class RobotSession:
    """
    A session in its folder. Made again after a kill, it stands where it stood.

    Args:
        session: What is played.
        output: Its folder, new or of this session.

    Raises:
        ValueError: A folder of something else or of another session, a policy that changed since the session began, or a
            session that another program has open.
    """

    def __init__(self, session: SessionFile, output: Path) -> None:
        self.session, self.output = session, output
        self._guard = threading.RLock()
        settings = _open_folder(session, output)
        self._lock = _lock_folder(output)
        self.seed: int = settings["seed"]
        self.fingerprints: dict[str, str | None] = settings["fingerprints"]
        self.runs = _runs(session, settings["orders"])
        self.events = _EventLog(output / EVENTS_FILE)
        self.state = SessionState()
        for number, event in enumerate(self.events.load(), 1):
            try:
                self.state.apply(event)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                self._lock.close()
                raise ValueError(f"{self.events.path} is damaged in line {number}: {error!r}") from error
        self.robot_token = _token(output / TOKEN_FILE)
        # Name and attempt of the run that the robot's program asked for last.
        self.taken: tuple[str, int] | None = None

    def close(self) -> None:
        """Lets another program open the session."""
        self._lock.close()

    def __enter__(self) -> "RobotSession":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def current(self) -> Run | None:
        """The run to play or to score; None when all are scored."""
        return self.runs[len(self.state.scores)] if len(self.state.scores) < len(self.runs) else None

    @contextlib.contextmanager
    def steady(self) -> Iterator[SessionState]:
        """The state, with nothing changing it meanwhile."""
        with self._guard:
            yield self.state

    def start(self, run: str) -> None:
        """The scene of a run is set: its robot may begin."""
        with self._guard:
            self._expect(run)
            self._expect_open()
            if self.state.started:
                raise NotNow(f"Run {run} was started already.")
            self._add("start", run=run)

    def finish(self, run: str) -> None:
        """The robot has come to an end with a run."""
        with self._guard:
            self._expect(run, started=True)
            if not self.state.finished:
                self._add("finish", run=run)

    def repeat(self, run: str) -> None:
        """A run does not count and is played again; how often is in the report."""
        with self._guard:
            self._expect(run, started=True)
            self._expect_open()
            self._add("repeat", run=run)

    def score(self, run: str, score: float, note: str = "") -> None:
        """
        Scores a run.

        Args:
            run: Name of the current run.
            score: 0, or one of the task's credits.
            note: Kept as it is, at most 2,000 characters.

        Raises:
            NotNow: Another run's turn, a run that was not started, or a session that is paused or ended.
            ValueError: A score that the task does not have, or a note that is too long.
        """
        with self._guard:
            current = self._expect(run, started=True)
            self._expect_open()
            accepted = [0.0, *(credit.score for credit in self.session.credits[current.trial.task])]
            if score not in accepted:
                raise ValueError(
                    f"`score` must be one of {', '.join(f'{value:g}' for value in accepted)}, got {score!r}."
                )
            if len(note) > MAX_NOTE_LENGTH:
                raise ValueError(f"`note` must have at most {MAX_NOTE_LENGTH} characters, got {len(note)}.")
            self._add("score", run=run, score=float(score), note=note)

    def undo(self) -> None:
        """Takes back the last score; its run is the current one again, to be scored anew."""
        with self._guard:
            self._expect_open()
            if not self.state.scores:
                raise NotNow("There is no score to take back.")
            if self.state.started:
                raise NotNow(
                    "A run is under way: score it, or set it up again, before an earlier score is taken back."
                )
            self._add("undo", run=self.runs[len(self.state.scores) - 1].name)

    def pause(self) -> None:
        """Nothing can be started or scored until `resume`."""
        with self._guard:
            self._expect_open()
            self._add("pause")

    def resume(self) -> None:
        """Goes on after `pause`."""
        with self._guard:
            if not self.state.paused:
                raise NotNow("The session is not paused.")
            self._add("resume")

    def end(self, early: bool = False) -> None:
        """
        Ends the session: nothing can be scored or taken back after this, and names may be seen.

        Args:
            early: Whether runs may be missing.
        """
        with self._guard:
            if self.state.ended:
                return
            missing = len(self.runs) - len(self.state.scores)
            if missing and not early:
                raise NotNow(
                    f"The session cannot be ended yet: {len(self.state.scores)} of {len(self.runs)} runs are scored."
                )
            self._add("end", missing=missing)

    def robot_view(self) -> dict[str, Any]:
        """
        What the robot's program is told: `status` is `run`, `wait` (with the `reason` `scene`, `score` or `paused`) or
        `complete`. A run comes with its name, how often it was begun before (`attempt`), policy, options and instruction.
        """
        with self._guard:
            run = self.current
            if run is None or self.state.ended:
                return {"status": "complete"}
            if self.state.paused:
                return {"status": "wait", "reason": "paused"}
            if not self.state.started:
                return {"status": "wait", "reason": "scene"}
            if self.state.finished:
                return {"status": "wait", "reason": "score"}
            self.taken = run.name, self.state.repeats.get(run.name, 0)
            return {
                "status": "run",
                "run": run.name,
                "attempt": self.taken[1],
                "policy": run.policy.location,
                "options": dict(run.policy.options),
                "instruction": run.trial.instruction,
                "task": run.trial.task,
            }

    def _expect(self, run: str, started: bool = False) -> Run:
        current = self.current
        if self.state.ended:
            raise NotNow("The session is ended.")
        if current is None or current.name != run:
            turn = "all runs are scored" if current is None else f"it is the turn of {current.name}"
            raise NotNow(f"This was about run {run}, but {turn}.")
        if started and not self.state.started:
            raise NotNow(f"Run {run} is not started yet.")
        return current

    def _expect_open(self) -> None:
        if self.state.ended:
            raise NotNow("The session is ended.")
        if self.state.paused:
            raise NotNow("The session is paused.")

    def _add(self, kind: str, **values: Any) -> None:
        event = {"event": kind, **values, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        # On the disk first: what the page shows as scored is never lost.
        self.events.append(event)
        self.state.apply(event)


class _EventLog:
    """Events on disk, a line each; a line that a kill cut short was never confirmed to anybody and is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            write_atomically(self.path, b"")
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            write_atomically(self.path, whole)
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error

    def append(self, event: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write((json.dumps(event) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


def _runs(session: SessionFile, orders: list[list[int]]) -> list[Run]:
    return [
        Run(f"{position + 1:03d}{chr(65 + place)}", chr(65 + place), position, trial, session.policies[policy])
        for position, (trial, order) in enumerate(zip(session.trials, orders))
        for place, policy in enumerate(order)
    ]


def _open_folder(session: SessionFile, output: Path) -> dict[str, Any]:
    """Settings of the folder's session; of a new one in a new folder."""
    settings, known = output / SETTINGS_FILE, json.loads(json.dumps(session.to_dict()))
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output` is a file: {output}.")
    fingerprints = {policy.name: folder_fingerprint(Path(policy.location)) for policy in session.policies}
    if settings.is_file():
        earlier: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
        different = [name for name in known if known[name] != earlier["session"].get(name)]
        if different:
            raise ValueError(
                f"`output` ({output}) holds a session with another {', '.join(different)}: name a new folder."
            )
        for number, (name, print_) in enumerate(fingerprints.items()):
            before = earlier["fingerprints"][name]
            if before is not None and print_ is not None and before != print_:
                raise ValueError(
                    f"the files of policy number {number + 1} of the session changed since it began: its rollouts would "
                    f"mix two models. Restore them, or name a new `output`."
                )
        return earlier
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"`output` ({output}) is not empty and holds no session: name a new folder.")
    output.mkdir(parents=True, exist_ok=True)
    seed = secrets.randbits(32) if session.seed is None else session.seed
    orders = counterbalanced_orders(len(session.policies), len(session.trials), seed)
    made = {"session": known, "seed": seed, "orders": orders, "fingerprints": fingerprints}
    write_atomically(settings, json.dumps(made).encode())
    return made


def _lock_folder(output: Path) -> Any:
    """An open file that keeps other programs out; the system lets go of it when this one dies."""
    file = (output / LOCK_FILE).open("w")
    try:
        import fcntl
    except ImportError:
        # Not on Windows; there nothing warns of a second program.
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(f"`output` ({output}) is open in another `lapa robot-session`.") from error
    return file


def _token(path: Path) -> str:
    """The robot's password, kept so that its program need not learn a new one after a restart."""
    if not path.is_file():
        write_atomically(path, secrets.token_urlsafe(24).encode())
        path.chmod(0o600)
    return path.read_text(encoding="ascii").strip()


def folder_fingerprint(folder: Path) -> str | None:
    """What tells a model folder's versions apart: names, sizes and both ends of its files; None where there is no folder."""
    if not (folder / "config.json").is_file():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()


__all__ = ["NotNow", "RobotSession", "Run", "Score", "SessionState", "folder_fingerprint"]
