"""What `--policy` names: a model folder, the environment's expert, doing nothing, random actions, or a server."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapa.evaluation.environments.base import Bounds
from lapa.evaluation.rollout import (
    ChunkController,
    Controller,
    ExpertController,
    PolicyController,
    RandomActions,
    StillController,
)

EXPERT, DO_NOTHING, RANDOM = "expert", "do_nothing", "random"


@dataclass(frozen=True)
class NamedPolicy:
    """
    A policy as an evaluation plays it.

    Args:
        name (`str`): As it was asked for.
        controller (`Controller`): Chooses the actions.
        identity (`Mapping`): What tells it from others, JSON-serialisable: hash of the weights, options.
        randomness (`callable`): Called with a seed before episodes that are played together.
    """

    name: str
    controller: Controller
    identity: Mapping[str, Any]
    randomness: Any

    def reseed(self, seed: int) -> None:
        """Makes the draws of the next episodes depend on `seed` alone."""
        self.randomness(seed)


def open_policy(
    name: str,
    action_dim: int,
    unnorm_key: str | None = None,
    device: str | None = None,
    replan_every: int | None = None,
    action_bounds: Bounds = (-1.0, 1.0),
    **generation: Any,
) -> NamedPolicy:
    """
    Opens a policy.

    Args:
        name: `expert`, `do_nothing`, `random`, a URL (`http://host:port`) of a server that speaks OpenVLA's protocol, or
            a folder or Hub name of a finetuned model.
        action_dim: Length of the environment's actions.
        unnorm_key: Statistics that de-tokenise; may be None where there is one set.
        device: Of a model; a GPU if there is one.
        replan_every: Steps that are played of a predicted chunk; all of them when None. For models that predict chunks.
        action_bounds: Between which `random` draws.
        generation: Of a model, as `do_sample`, `temperature`.

    Raises:
        ValueError: Actions of another length, options that do not apply, and what loading the model refuses.
    """
    if name.startswith(("http://", "https://")):
        from lapa.serving.client import RemotePolicy

        _refuse({"replan_every": replan_every, **generation}, name)
        policy = RemotePolicy(name, unnorm_key)
        return NamedPolicy(name, PolicyController(policy), {"policy": name, "unnorm_key": unnorm_key}, _no_draws)
    if name in (EXPERT, DO_NOTHING, RANDOM):
        _refuse({"unnorm_key": unnorm_key, "replan_every": replan_every, **generation}, name)
        if name == EXPERT:
            return NamedPolicy(name, ExpertController(), {"policy": name}, _no_draws)
        if name == DO_NOTHING:
            return NamedPolicy(name, StillController(), {"policy": name}, _no_draws)
        moves = RandomActions(action_dim, bounds=action_bounds)
        return NamedPolicy(name, PolicyController(moves), {"policy": name}, moves.reseed)
    return _open_model(name, action_dim, unnorm_key, device, replan_every, generation)


def _refuse(options: Mapping[str, Any], name: str) -> None:
    given = {key: value for key, value in options.items() if value not in (None, False)}
    if given:
        raise ValueError(f"`{next(iter(given))}` does not apply to the policy {name!r}.")


def _no_draws(seed: int) -> None:
    """For policies without randomness, or with one that is not ours."""


def _open_model(
    name: str,
    action_dim: int,
    unnorm_key: str | None,
    device: str | None,
    replan_every: int | None,
    generation: Mapping[str, Any],
) -> NamedPolicy:
    import torch

    from lapa.serving.policy import ChunkPlayer, LapaPolicy

    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"`policy` ({name}) is no model folder: it has no config.json.")
    options = {key: value for key, value in generation.items() if value is not None}
    if options.get("temperature") is not None and not options.get("do_sample"):
        raise ValueError("`temperature` needs `do_sample`: without it actions are chosen greedily.")
    if options.get("do_sample"):
        options.setdefault("top_k", 0)
    policy = LapaPolicy.from_pretrained(name, unnorm_key, **options)
    if policy.model.config.action_dim != action_dim:
        raise ValueError(
            f"`policy` ({name}) has actions of {policy.model.config.action_dim} numbers, this suite's environment takes "
            f"{action_dim}."
        )
    policy.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = policy.model.config
    controller: Controller = PolicyController(policy, config.use_proprio)
    if replan_every is not None or config.action_horizon > 1:
        controller = ChunkController(ChunkPlayer(policy, replan_every), config.use_proprio)
    identity = {
        "policy": weights_hash(policy.model),
        "processor": hashlib.sha256(policy.processor.to_json_string().encode()).hexdigest(),
        "device": policy.model.device.type,
        "unnorm_key": unnorm_key,
        "replan_every": replan_every,
        "generation": options,
    }
    return NamedPolicy(name, controller, identity, torch.manual_seed)


def weights_hash(model: Any) -> str:
    """SHA-256 over names and values of a model's parameters: the same weights, wherever they lie."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


__all__ = ["DO_NOTHING", "EXPERT", "RANDOM", "NamedPolicy", "open_policy", "weights_hash"]
