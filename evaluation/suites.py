"""Suites of evaluation: which environments, tasks and starts make up a table. Each is a YAML file in `suites/`."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from lapa.evaluation.environment_pool import MakeEnvironment, Start
from lapa.evaluation.environments.base import Bounds

# Adapters by the name that suites give them; imported when one is made.
ENVIRONMENTS = {
    "tabletop": ("lapa.evaluation.environments.tabletop_adapter", "TabletopEvaluation"),
    "metaworld": ("lapa.evaluation.environments.metaworld", "MetaWorldEvaluation"),
    "language_table": ("lapa.evaluation.environments.language_table", "LanguageTableEvaluation"),
    "pusht": ("lapa.evaluation.environments.pusht", "PushTEvaluation"),
    "simpler": ("lapa.evaluation.environments.simpler", "SimplerEvaluation"),
    "libero": ("lapa.evaluation.environments.libero", "LiberoEvaluation"),
    "gymnasium": ("lapa.evaluation.environments.gymnasium_adapter", "GymnasiumEvaluation"),
}


@dataclass(frozen=True)
class Cell:
    """
    One number of a table: a task under some conditions.

    Args:
        group (`str`): Conditions, such as `seen`.
        task (`str`): Task of the environment.
        options (`Mapping`): Of the environment.
    """

    group: str
    task: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`group/task`."""
        return f"{self.group}/{self.task}"


@dataclass(frozen=True)
class Suite:
    """
    A table to fill.

    Args:
        name (`str`): Of the file.
        environment (`str`): Key of `ENVIRONMENTS`.
        cells (`tuple[Cell, ...]`): In the order of the table.
        rollouts (`int`): Episodes per cell.
        first_seed (`int`): Starts of a cell are this seed and those that follow, the same for every policy.
        frequency (`float`): Control steps per second, for the speed of animations.
        published (`Mapping`, *optional*): Published numbers that stand beside the table, by column and row.
        processes (`int`, *optional*): Processes that play the environments where the user says nothing. None is one per
            core for environments that may crash or hang, and this process for others.
    """

    name: str
    environment: str
    cells: tuple[Cell, ...]
    rollouts: int
    first_seed: int
    frequency: float = 10.0
    published: Mapping[str, Any] = field(default_factory=dict)
    processes: int | None = None

    def make(self, cell: Cell) -> MakeEnvironment:
        """What makes the environment of a cell; picklable."""
        return partial(_environment_class(self.environment), **cell.options)

    def action_dim(self) -> int:
        """Length of an action."""
        fixed = int(_environment_class(self.environment).action_dim)
        if fixed:
            return fixed
        # It depends on the task.
        with self.make(self.cells[0])() as environment:
            environment.start(self.cells[0].task, self.first_seed)
            return environment.action_dim

    def action_bounds(self) -> Bounds:
        """Least and greatest values of an action's numbers, for all or for each."""
        bounds: Bounds = _environment_class(self.environment).action_bounds
        return bounds

    def episodes(self, cell: Cell, rollouts: int | None = None) -> list[Start]:
        """Starts of a cell. Cells of one task in different groups get different ones."""
        offset = int.from_bytes(hashlib.sha256(cell.name.encode()).digest()[:2]) * 1000
        count = self.rollouts if rollouts is None else rollouts
        return [(cell.task, self.first_seed + offset + index) for index in range(count)]

    def num_processes(self) -> int:
        """Processes of the environments where the user says nothing; results do not depend on it."""
        if self.processes is not None:
            return self.processes
        return (os.cpu_count() or 1) if _environment_class(self.environment).is_fragile else 0

    def mixes_tasks(self) -> bool:
        """Whether its environments may play different tasks side by side."""
        return bool(_environment_class(self.environment).mixes_tasks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form: what a result depends on."""
        values = asdict(self)
        del values["processes"]
        return values


def _environment_class(name: str) -> Any:
    module, class_name = ENVIRONMENTS[name]
    return getattr(import_module(module), class_name)


def suite_names() -> list[str]:
    """Suites that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in files(__package__).joinpath("suites").iterdir())


def load_suite(name: str) -> Suite:
    """
    A suite by its name, or from a YAML file of one's own.

    Raises:
        ValueError: An unknown name, or a file that is no suite; the key is named.
    """
    import yaml

    if name.endswith((".yaml", ".yml")):
        path: Any = Path(name)
        if not path.is_file():
            raise ValueError(f"`suite` names a file that does not exist: {name}.")
    elif name in suite_names():
        path = files(__package__).joinpath("suites", f"{name}.yaml")
    else:
        raise ValueError(f"`suite` must be one of {', '.join(suite_names())}, or a .yaml file, got {name!r}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    return _suite(Path(name).stem, values, str(path))


def _suite(name: str, values: Any, where: str) -> Suite:
    keys = {"environment", "options", "rollouts", "first_seed", "cells", "frequency", "published", "processes"}
    required = {"environment", "rollouts", "first_seed", "cells"}
    if not isinstance(values, Mapping) or not required <= set(values) <= keys:
        raise ValueError(
            f"{where} must be a mapping with {', '.join(sorted(required))} and nothing but {', '.join(sorted(keys))}."
        )
    if values["environment"] not in ENVIRONMENTS:
        raise ValueError(
            f"{where}: `environment` must be one of {', '.join(ENVIRONMENTS)}, got {values['environment']!r}."
        )
    for key, least in (("rollouts", 1), ("first_seed", 0)):
        if type(values[key]) is not int or values[key] < least:
            raise ValueError(f"{where}: `{key}` must be a whole number from {least}, got {values[key]!r}.")
    processes = values.get("processes")
    if processes is not None and (type(processes) is not int or processes < 0):
        raise ValueError(f"{where}: `processes` must be a whole number from 0, got {processes!r}.")
    cells: list[Cell] = []
    groups = values["cells"]
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"{where}: `cells` must be a mapping of groups, got {groups!r}.")
    for group, entry in groups.items():
        tasks = entry.get("tasks") if isinstance(entry, Mapping) else None
        if not isinstance(tasks, Sequence) or isinstance(tasks, str) or not tasks or set(entry) - {"tasks", "options"}:
            raise ValueError(f"{where}: `cells.{group}` must have a list of `tasks` and may have `options`, no more.")
        options = {**(values.get("options") or {}), **(entry.get("options") or {})}
        if len(set(map(str, tasks))) < len(tasks):
            raise ValueError(f"{where}: `cells.{group}.tasks` names a task twice: {', '.join(map(str, tasks))}.")
        cells += [Cell(str(group), str(task), options) for task in tasks]
    return Suite(
        name,
        values["environment"],
        tuple(cells),
        values["rollouts"],
        values["first_seed"],
        float(values.get("frequency", 10.0)),
        values.get("published") or {},
        processes,
    )


__all__ = ["ENVIRONMENTS", "Cell", "Suite", "load_suite", "suite_names"]
