"""Plays a policy through a suite: resumable, crash-proof, the same result however often it was interrupted."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lapa.data.atomic_files import write_atomically
from lapa.evaluation.environment_pool import CRASHED, HUNG, EnvironmentPool, Start
from lapa.evaluation.policies import NamedPolicy
from lapa.evaluation.rollout import Rollout, derived_seed, roll_out
from lapa.evaluation.statistics import success_cell
from lapa.evaluation.suites import Cell, Suite

SETTINGS_FILE, ROLLOUTS_FILE = "evaluation.json", "rollouts.jsonl"
FIELDS = ("family", "seed", "instruction", "success", "num_steps", "ending", "progress", "restarts")


@dataclass(frozen=True)
class EvaluationSettings:
    """
    How a suite is played.

    Args:
        rollouts (`int`, *optional*): Episodes per cell; the suite's own number when None.
        num_environments (`int`): Played side by side, and committed together: of one cell, or of several whose environments
            have the same options, where they may be mixed.
        num_processes (`int`, *optional*): Processes of the environments; 0 plays them in this one, where a hang is not
            noticed. What suits the environment when None, see `Suite.num_processes`.
        timeout (`float`): Seconds that a step may take before its environment counts as hung.
        seed (`int`): Of a sampling policy's draws.
        num_shown (`int`): Episodes per cell that are kept as GIF.
    """

    rollouts: int | None = None
    num_environments: int = 50
    num_processes: int | None = None
    timeout: float = 60.0
    seed: int = 0
    num_shown: int = 2

    def __post_init__(self) -> None:
        for name, least in (("rollouts", 1), ("num_environments", 1), ("num_processes", 0), ("num_shown", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")


class RolloutLog:
    """
    Rollouts of a run on disk, a line per group of episodes of a cell that were played together.

    A line is written whole, with its newline last: one that a kill cut short is dropped, and its episodes are played again.

    Args:
        folder: Of the run.
        identity: What its results depend on; a folder with another one is refused.

    Raises:
        ValueError: A folder that holds something else, or a run with other settings.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.path = folder, folder / ROLLOUTS_FILE
        settings, known = folder / SETTINGS_FILE, json.loads(json.dumps(identity))
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"`output` is a file: {folder}.")
        if settings.is_file():
            earlier = json.loads(settings.read_text(encoding="utf-8"))
            if earlier != known:
                different = [name for name in known if known[name] != earlier.get(name)]
                raise ValueError(
                    f"`output` ({folder}) holds an evaluation with another {', '.join(different)}: name a new folder."
                )
        elif folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"`output` ({folder}) is not empty and holds no evaluation: name a new folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(settings, json.dumps(known, indent=1).encode())
        self._lines = self._load()

    def _load(self) -> dict[tuple[str, int], list[dict[str, Any]]]:
        if not self.path.exists():
            return {}
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            write_atomically(self.path, whole)
        return read_entries(self.path)

    def get(self, cell: Cell, start: int) -> list[dict[str, Any]] | None:
        """Rollouts of a cell from number `start` on, if they were played."""
        return self._lines.get((cell.name, start))

    def add(self, cell: Cell, start: int, rollouts: Sequence[Rollout]) -> None:
        """Keeps what was played."""
        rows = [{name: getattr(rollout, name) for name in FIELDS} for rollout in rollouts]
        line = json.dumps({"cell": cell.name, "start": start, "rollouts": rows}) + "\n"
        # First, for the table of a run that is interrupted while it writes.
        self._lines[cell.name, start] = json.loads(line)["rollouts"]
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def outcomes(self, suite: Suite) -> dict[str, list[dict[str, Any]]]:
        """Rollouts of each cell so far, in the order of their starts."""
        return {
            cell.name: [
                row
                for (name, _), rows in sorted(self._lines.items(), key=lambda entry: entry[0][1])
                if name == cell.name
                for row in rows
            ]
            for cell in suite.cells
        }


def read_entries(path: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Rollouts of a log by cell and number of the first; a last line that a kill cut short is left out."""
    content = path.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return {(entry["cell"], entry["start"]): entry["rollouts"] for entry in map(json.loads, lines)}


@dataclass(frozen=True)
class _Part:
    """Episodes of a cell, from number `start` on; a line of the log."""

    cell: Cell
    start: int
    episodes: list[Start]


# Parts that are played side by side.
_Wave = list[_Part]


@dataclass
class Evaluation:
    """
    A policy, a suite and a folder.

    Args:
        suite: What is played.
        policy: Who plays.
        output: Folder of the results.
        settings: How.
    """

    suite: Suite
    policy: NamedPolicy
    output: Path
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        played = {
            "rollouts": self.settings.rollouts or self.suite.rollouts,
            "num_environments": self.settings.num_environments,
            "seed": self.settings.seed,
        }
        self.log = RolloutLog(
            self.output, {"suite": self.suite.to_dict(), "policy": dict(self.policy.identity), "played": played}
        )

    def run(self, show_progress: bool = True) -> None:
        """Plays what is not played yet, and what belongs beside it."""
        asked = self.settings.num_processes
        processes = self.suite.num_processes() if asked is None else asked
        for waves in self._missing():
            sizes = [sum(len(part.episodes) for part in wave) for wave in waves]
            make = self.suite.make(waves[0][0].cell)
            with (
                EnvironmentPool(make, max(sizes), processes, self.settings.timeout) as pool,
                tqdm(total=sum(sizes), disable=not show_progress) as bar,
            ):
                for wave, size in zip(waves, sizes):
                    names = list(dict.fromkeys(part.cell.name for part in wave))
                    several = f" to {names[-1]}" if len(names) > 1 else ""
                    bar.set_description(f"{self.policy.name}: {names[0]}{several}")
                    self._play(pool, wave)
                    bar.update(size)

    def _missing(self) -> Iterator[list[_Wave]]:
        """Waves that are not in the log, those that the same environments can play together."""
        mixes = self.policy.mixes and self.suite.mixes_tasks()
        cells: list[list[Cell]] = []
        for cell in self.suite.cells:
            if mixes and cells and cells[-1][0].options == cell.options:
                cells[-1].append(cell)
            else:
                cells.append([cell])
        for alike in cells:
            missing = [
                wave
                for wave in self._waves(alike)
                if any(self.log.get(part.cell, part.start) is None for part in wave)
            ]
            if missing:
                yield missing

    def _waves(self, cells: Sequence[Cell]) -> list[_Wave]:
        """
        What is played side by side. It does not depend on the log: a run that was interrupted plays a wave anew with the same
        episodes beside each other, as another size of the batch may change the last bits of what a policy computes.
        """
        waves: list[_Wave] = []
        room = 0
        for cell in cells:
            episodes = self.suite.episodes(cell, self.settings.rollouts)
            for start in range(0, len(episodes), self.settings.num_environments):
                part = _Part(cell, start, episodes[start : start + self.settings.num_environments])
                if len(part.episodes) > room:
                    waves.append([])
                    room = self.settings.num_environments
                waves[-1].append(part)
                room -= len(part.episodes)
        return waves

    def _play(self, pool: EnvironmentPool, wave: _Wave) -> None:
        seed, first = self.settings.seed, wave[0]
        # A resumed run must draw what an uninterrupted one draws: the seed belongs to the episodes.
        self.policy.reseed(derived_seed(seed, first.cell.name, first.start) % 2**32)
        if self.policy.draws is not None:
            self.policy.draws.reseed([derived_seed(seed, part.cell.name) for part in wave for _ in part.episodes])
        episodes = [episode for part in wave for episode in part.episodes]
        numbers = [(part, part.start + place) for part in wave for place in range(len(part.episodes))]
        new = [part for part in wave if self.log.get(part.cell, part.start) is None]
        num_shown = self.settings.num_shown
        shown = [slot for slot, (part, number) in enumerate(numbers) if part in new and number < num_shown]
        rollouts = roll_out(pool, self.policy.controller, episodes, shown, description=None)
        for slot in shown:
            if rollouts[slot].frames:
                part, number = numbers[slot]
                self._write_gif(part.cell, number, rollouts[slot])
        for part in wave:
            played, rollouts = rollouts[: len(part.episodes)], rollouts[len(part.episodes) :]
            if part in new:
                self.log.add(part.cell, part.start, played)

    def _write_gif(self, cell: Cell, number: int, rollout: Rollout) -> None:
        from lapa.evaluation.report import gif_bytes

        folder = self.output / "rollouts"
        folder.mkdir(exist_ok=True)
        scale = max(1, round(128 / rollout.frames[0].shape[0]))
        content = gif_bytes(rollout.frames, scale, milliseconds=round(1000 / self.suite.frequency))
        write_atomically(folder / gif_name(cell, number), content)

    def report(self) -> dict[str, Any]:
        """
        The table so far.

        Returns:
            `suite`, `policy`, `complete`, and `cells` and `groups` with `{successes, rollouts, success, ci95}` each; cells
            say how many environments `crashed` or `hung` (both count as not solved), how many episodes had to begin again
            (`restarted`), and how often partial results were reached.
        """
        outcomes = self.log.outcomes(self.suite)
        cells = {name: _cell(rows) for name, rows in outcomes.items() if rows}
        groups: dict[str, Any] = {}
        for group in dict.fromkeys(cell.group for cell in self.suite.cells):
            rows = [row for cell in self.suite.cells if cell.group == group for row in outcomes[cell.name]]
            if rows:
                groups[group] = _cell(rows)
        wanted = (self.settings.rollouts or self.suite.rollouts) * len(self.suite.cells)
        return {
            "suite": self.suite.name,
            "policy": self.policy.name,
            "complete": sum(len(rows) for rows in outcomes.values()) == wanted,
            "seed": self.settings.seed,
            "cells": cells,
            "groups": groups,
        }


def gif_name(cell: Cell, number: int) -> str:
    """File of a recorded episode."""
    return f"{cell.name.replace('/', '-')}-{number:03d}.gif"


def _cell(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    cell = success_cell(row["success"] for row in rows)
    cell |= {kind: sum(row["ending"] == kind for row in rows) for kind in (CRASHED, HUNG)}
    cell["restarted"] = sum(row.get("restarts", 0) > 0 for row in rows)
    reached = dict.fromkeys(name for row in rows for name in row["progress"])
    if reached:
        cell["progress"] = {name: success_cell(name in row["progress"] for row in rows) for name in sorted(reached)}
    return cell


__all__ = ["Evaluation", "EvaluationSettings", "RolloutLog", "gif_name", "read_entries"]
