"""Which finetuning of a study is played, and playing it."""

import json
from pathlib import Path
from typing import Any

from lapa.evaluation.demo_settings import EVALUATION_SEEDS
from lapa.evaluation.evaluate import Evaluation, EvaluationSettings
from lapa.evaluation.policies import UNIPI, NamedPolicy, open_policy
from lapa.evaluation.study_work import Work
from lapa.evaluation.suites import Suite
from lapa.hub_cards.checkpoint import DECODER_FOLDER

# Start states beyond every other's.
VALIDATION_SEEDS = 500_000_000


def _open(work: Work, role: str, temperature: float) -> NamedPolicy:
    folder = work.inputs[role] / "model"
    if _is_unipi(folder):
        return open_policy(str(folder), work.world.action_dim, device=work.device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    # A decoder of codes has the statistics of its actions in itself.
    key = None if (folder / DECODER_FOLDER).is_dir() else work.world.name
    return open_policy(str(folder), work.world.action_dim, key, work.device, **sampling)


def _is_unipi(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == UNIPI


def _play(work: Work, policy: NamedPolicy, suite: Suite, folder: Path, num_shown: int) -> Evaluation:
    # A simulator that may crash has processes of its own.
    processes = work.machine.simulators if suite.num_processes() else 0
    settings = EvaluationSettings(
        num_environments=work.world.side_by_side, num_processes=processes, num_shown=num_shown
    )
    evaluation = Evaluation(suite, policy, folder, settings)
    evaluation.run()
    return evaluation


def choose(work: Work) -> dict[str, Any]:
    """Which finetuning is played, at which temperature: the one that solves most on starts that no reported number uses."""
    split = work.world.splits[0]
    suite = work.world.suite(
        work.settings, "validation", (split,), work.settings.validation_rollouts, VALIDATION_SEEDS
    )
    roles = [role for role in work.inputs if role.startswith("policy")]
    if roles == ["policy"] and _is_unipi(work.inputs["policy"] / "model"):  # nothing to choose
        return {"policy": "policy", "temperature": 0.0, "successes": {}}
    successes: dict[str, int] = {}
    options: dict[str, tuple[str, float]] = {}
    for role in roles:
        for temperature in work.settings.temperatures:
            name = f"{role}-temperature-{temperature:g}"
            report = _play(work, _open(work, role, temperature), suite, work.folder / name, 0).report()
            successes[name], options[name] = report["groups"][split]["successes"], (role, temperature)
    best = max(successes, key=lambda name: successes[name])  # the first of equals
    return {"policy": options[best][0], "temperature": options[best][1], "successes": successes}


def play(work: Work) -> dict[str, Any]:
    """The reported episodes."""
    rollouts = work.settings.rollouts_per_family
    suite = work.world.suite(work.settings, "study", tuple(work.extra["splits"]), rollouts, EVALUATION_SEEDS)
    name = work.extra.get("policy_name")
    if name is not None:
        policy = open_policy(name, suite.action_dim(), action_bounds=suite.action_bounds())
    else:
        chosen = work.result("choose")
        policy = _open(work, chosen["policy"], chosen["temperature"])
    report = _play(work, policy, suite, work.folder / "evaluation", 1).report()
    return {"cells": report["cells"]}


__all__ = ["choose", "play"]
