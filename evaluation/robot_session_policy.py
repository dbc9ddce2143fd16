"""
One robot loop for all policies of a session: the robot's side of `lapa robot-session`.

    policy = BlindPolicy("http://127.0.0.1:8080", token)
    while (run := policy.wait()) is not None:          # until the scorer has set the scene
        while policy.is_playing() and not robot.is_done():
            robot.play(policy.act([robot.image()], [run.instruction])[0])
        policy.finished()
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_ANSWER_BYTES = 1 << 20


@dataclass(frozen=True)
class RobotRun:
    """
    A rollout that the robot is to play.

    Args:
        name (`str`): Of the run, such as `012B`.
        attempt (`int`): How often it was begun before.
        policy (`str`): Folder, Hub name or URL.
        options (`Mapping`): Of the policy.
        instruction, task (`str`): The sentence and its task.
    """

    name: str
    attempt: int
    policy: str
    options: Mapping[str, Any]
    instruction: str
    task: str


class SessionClient:
    """
    Asks a session whose turn it is.

    Args:
        url: Of the session, as `lapa robot-session` prints it.
        token: The robot's, printed with it; or the path of the file `robot-token`.
        timeout: Seconds to wait for an answer.
    """

    def __init__(self, url: str, token: str | Path, timeout: float = 10.0) -> None:
        if not url.startswith("http://"):
            raise ValueError(f"`url` must begin with http://, got {url!r}.")
        self.url, self.timeout = url.rstrip("/"), timeout
        self._token = token.read_text(encoding="ascii").strip() if isinstance(token, Path) else token

    def next(self) -> dict[str, Any]:
        """See [`~lapa.evaluation.robot_session.RobotSession.robot_view`]."""
        return self._ask("/next")

    def finished(self, run: str) -> None:
        """The robot has come to an end with a run."""
        self._ask("/finished", {"run": run})

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer: dict[str, Any] = json.loads(response.read(MAX_ANSWER_BYTES))
                return answer
        except urllib.error.HTTPError as error:
            told = error.read(500).decode(errors="replace")
            raise ValueError(f"{self.url}{path} answered {error.code}: {told}") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.url}{path} gave no answer: {error}") from error


class BlindPolicy:
    """
    A [`~lapa.serving.policy.Policy`] that is always the one whose turn it is.

    Args:
        url: Of the session.
        token: The robot's, or the path of the file `robot-token`.
        device: Of models; a GPU if there is one.
        max_loaded: Models kept in memory; all of the session's when None. With fewer than the session has, every run begins
            with loading.
        load: Makes a policy of its location and options; models and servers as `lapa evaluate` names them when None.
    """

    def __init__(
        self,
        url: str,
        token: str | Path,
        device: str | None = None,
        max_loaded: int | None = None,
        load: Callable[[str, Mapping[str, Any]], Any] | None = None,
    ) -> None:
        if max_loaded is not None and max_loaded < 1:
            raise ValueError(f"`max_loaded` must be at least 1, got {max_loaded}.")
        self.client, self.max_loaded = SessionClient(url, token), max_loaded
        self._load = load or (lambda location, options: open_robot_policy(location, options, device))
        self._loaded: dict[str, Any] = {}
        self._run: RobotRun | None = None

    def wait(self, poll_seconds: float = 0.5, timeout: float | None = None) -> RobotRun | None:
        """
        Waits until the scene of the next run is set, and makes its policy ready.

        Args:
            poll_seconds: Between two questions.
            timeout: Seconds to wait at most; without end when None.

        Returns:
            The run; None when all runs are scored.

        Raises:
            TimeoutError: Nothing to play until then.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            answer = self.client.next()
            if answer["status"] == "complete":
                self._run = None
                return None
            if answer["status"] == "run":
                self._run = _robot_run(answer)
                self._begin(self._run)
                return self._run
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"no run within {timeout:g} seconds: the session waits for the {answer['reason']}.")
            time.sleep(poll_seconds)

    def is_playing(self) -> bool:
        """Whether the run that `wait` gave is still to be played: not scored, not begun anew, not paused."""
        answer = self.client.next()
        return self._run is not None and answer["status"] == "run" and _robot_run(answer) == self._run

    def finished(self) -> None:
        """Tells the scorer that the robot has come to an end. Nothing happens where the run was scored meanwhile."""
        if self._run is not None and self.is_playing():
            self.client.finished(self._run.name)

    def act(
        self,
        images: Sequence[NDArray[np.uint8]],
        instructions: Sequence[str],
        proprio: Sequence[NDArray[np.float32]] | None = None,
    ) -> NDArray[np.float32]:
        """See [`~lapa.serving.policy.Policy`]; the policy of the run that `wait` gave.

        Raises:
            ValueError: Before `wait`, or after the session's end.
        """
        if self._run is None:
            raise ValueError("no run to play: call `wait` first.")
        policy = self._loaded[_key(self._run)]
        actions = policy.act(images, instructions) if proprio is None else policy.act(images, instructions, proprio)
        return np.asarray(actions, dtype=np.float32)

    def _begin(self, run: RobotRun) -> None:
        key = _key(run)
        policy = self._loaded.pop(key, None)
        if policy is None:
            while self.max_loaded is not None and len(self._loaded) >= self.max_loaded:
                # The one that was used longest ago.
                self._loaded.pop(next(iter(self._loaded)))
            policy = self._load(run.policy, run.options)
        self._loaded[key] = policy
        # What is left of a chunk of actions belongs to another episode.
        if callable(getattr(policy, "reset", None)):
            policy.reset()


def _robot_run(answer: Mapping[str, Any]) -> RobotRun:
    return RobotRun(
        answer["run"], answer["attempt"], answer["policy"], answer["options"], answer["instruction"], answer["task"]
    )


def _key(run: RobotRun) -> str:
    return json.dumps([run.policy, run.options], sort_keys=True)


def open_robot_policy(location: str, options: Mapping[str, Any], device: str | None = None) -> Any:
    """
    A policy by what a session file says of it.

    Args:
        location: URL of a server that speaks OpenVLA's protocol, or a model folder or Hub name.
        options: `unnorm_key`, `do_sample`, `temperature`, `replan_every`.
        device: Of a model; a GPU if there is one.

    Returns:
        A [`~lapa.serving.policy.Policy`]; a model that predicts chunks is played chunk by chunk.
    """
    if location.startswith(("http://", "https://")):
        from lapa.serving.client import RemotePolicy

        others = set(options) - {"unnorm_key"}
        if others:
            raise ValueError(f"`{min(others)}` does not apply to the policy {location!r}.")
        return RemotePolicy(location, options.get("unnorm_key"))
    import torch

    from lapa.serving.policy import ChunkPlayer, LapaPolicy

    generation = {key: options[key] for key in ("do_sample", "temperature") if key in options}
    if generation.get("do_sample"):
        generation["top_k"] = 0
    policy = LapaPolicy.from_pretrained(location, options.get("unnorm_key"), **generation)
    policy.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.get("replan_every") is not None or policy.action_horizon > 1:
        return ChunkPlayer(policy, options.get("replan_every"))
    return policy


__all__ = ["BlindPolicy", "RobotRun", "SessionClient", "open_robot_policy"]
