"""What `--policy` names: a model folder (ours, one with an action decoder, or a UniPi policy), the environment's expert, doing nothing, random actions, or a server."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapa.evaluation.environments.base import Bounds
from lapa.evaluation.rollout import (
    ChunkController,
    Controller,
    EpisodeDraws,
    ExpertController,
    PolicyController,
    RandomActions,
    StillController,
)
from lapa.hub_cards.checkpoint import DECODER_FOLDER, LATENT_DECODER

EXPERT, DO_NOTHING, RANDOM = "expert", "do_nothing", "random"
# `model_type` of folders that hold no finetuned model of ours.
UNIPI, INVERSE_DYNAMICS = "lapa_video_diffusion", "lapa_inverse_dynamics"


@dataclass(frozen=True)
class NamedPolicy:
    """
    A policy as an evaluation plays it.

    Args:
        name (`str`): As it was asked for.
        controller (`Controller`): Chooses the actions.
        identity (`Mapping`): What tells it from others, JSON-serialisable: hash of the weights, options.
        randomness (`callable`): Called with a seed before episodes that are played together.
        draws (`EpisodeDraws`, *optional*): What the controller draws from, for a policy whose draws in an episode do not
            depend on the others beside it.
    """

    name: str
    controller: Controller
    identity: Mapping[str, Any]
    randomness: Any
    draws: EpisodeDraws | None = None

    @property
    def mixes(self) -> bool:
        """Whether what it does in an episode does not depend on the episodes beside it, so that any may be played together."""
        return self.draws is not None or self.randomness is _no_draws

    def reseed(self, seed: int) -> None:
        """Makes the draws of the next episodes depend on `seed` alone."""
        self.randomness(seed)
        if self.draws is not None:
            self.draws.reseed(seed)


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
        name: `expert`, `do_nothing`, `random`, a URL (`http://host:port`) of a server that speaks OpenVLA's protocol, a
            folder or Hub name of a finetuned model or of a latent-pretrained one with an action decoder, or a folder of a
            UniPi policy.
        action_dim: Length of the environment's actions.
        unnorm_key: Statistics that de-tokenise; may be None where there is one set.
        device: Of a model; a GPU if there is one.
        replan_every: Steps that are played of a predicted chunk; when None all of them, or what a UniPi policy's config
            says. For models that predict chunks.
        action_bounds: Between which `random` draws.
        generation: Of a model, as `do_sample`, `temperature`.

    Raises:
        ValueError: Actions of another length, options that do not apply, a latent-pretrained model without an action
            decoder, and what loading the model refuses.
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
        draws = EpisodeDraws()
        moves = PolicyController(RandomActions(action_dim, action_bounds), draws=draws)
        return NamedPolicy(name, moves, {"policy": name}, _no_draws, draws)
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

    from lapa.configuration.configuration_lapa import LapaConfig
    from lapa.modeling_lapa.adapter_loading_lapa import find_file
    from lapa.serving.policy import ChunkPlayer, LapaPolicy

    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"`policy` ({name}) is no model folder: it has no config.json.")
    model_type = _model_type(Path(name))
    if model_type == INVERSE_DYNAMICS:
        raise ValueError(f"`policy` ({name}) is an inverse dynamics model: it labels video and does not act.")
    if model_type == UNIPI:
        _refuse({"unnorm_key": unnorm_key, **generation}, name)
        return _open_unipi(name, action_dim, device, replan_every)
    if model_type == LATENT_DECODER:
        raise ValueError(f"`policy` ({name}) is an action decoder alone: it decodes codes and does not see.")
    options = {key: value for key, value in generation.items() if value is not None}
    if options.get("temperature") is not None and not options.get("do_sample"):
        raise ValueError("`temperature` needs `do_sample`: without it actions are chosen greedily.")
    if options.get("do_sample"):
        options.setdefault("top_k", 0)
    if find_file(name, (f"{DECODER_FOLDER}/config.json",), {}) is not None:
        _refuse({"unnorm_key": unnorm_key, "replan_every": replan_every}, name)
        return _open_decoder(name, action_dim, device, options)
    if LapaConfig.from_pretrained(name).architectures == ["LapaForLatentAction"]:
        # Loaded as a policy it would get an action head of random weights.
        raise ValueError(
            f"`policy` ({name}) is a latent-pretrained model without {DECODER_FOLDER}/: finetune it, or train a decoder of its "
            "codes (`lapa train-decoder`)."
        )
    policy = LapaPolicy.from_pretrained(name, unnorm_key, **options)
    _check_action_dim(name, policy.model.config.action_dim, action_dim)
    policy.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = policy.model.config
    draws = EpisodeDraws() if options.get("do_sample") else None
    controller: Controller = PolicyController(policy, config.use_proprio, draws)
    if replan_every is not None or config.action_horizon > 1:
        controller = ChunkController(ChunkPlayer(policy, replan_every), config.use_proprio, draws)
    identity = {
        "policy": weights_hash(policy.model),
        "processor": hashlib.sha256(policy.processor.to_json_string().encode()).hexdigest(),
        "device": policy.model.device.type,
        "unnorm_key": unnorm_key,
        "replan_every": replan_every,
        "generation": options,
    }
    return NamedPolicy(name, controller, identity, torch.manual_seed if draws else _no_draws, draws)


def _model_type(folder: Path) -> str | None:
    """What a folder's `config.json` says it is; None for what is no folder here."""
    if not folder.is_dir():
        return None
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"`policy` ({folder}) has a config.json that is no JSON object: {error}.") from error
    return None if model_type is None else str(model_type)


def _open_unipi(name: str, action_dim: int, device: str | None, replan_every: int | None) -> NamedPolicy:
    import torch

    from lapa.evaluation.baselines.unipi import UniPiPolicy
    from lapa.serving.policy import ChunkPlayer

    policy = UniPiPolicy.from_pretrained(name)
    _check_action_dim(name, policy.action_dim, action_dim)
    policy.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    video = policy.video_model
    replan = video.config.replan_every if replan_every is None else replan_every
    identity = {
        "policy": weights_hash(video),
        "inverse_dynamics": weights_hash(policy.inverse_dynamics),
        # How it samples stands in the configs, and which frames it is for.
        "configs": hashlib.sha256(
            (video.config.to_json_string() + policy.inverse_dynamics.config.to_json_string()).encode()
        ).hexdigest(),
        "device": video.device.type,
        "replan_every": replan,
    }
    return NamedPolicy(name, ChunkController(ChunkPlayer(policy, replan)), identity, policy.reseed)


def _open_decoder(name: str, action_dim: int, device: str | None, options: Mapping[str, Any]) -> NamedPolicy:
    import torch

    from lapa.evaluation.baselines.latent_decoder_policy import LatentDecoderPolicy

    policy = LatentDecoderPolicy.from_pretrained(name, **options)
    _check_action_dim(name, policy.action_dim, action_dim)
    policy.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    draws = EpisodeDraws() if options.get("do_sample") else None
    identity = {
        "policy": weights_hash(policy.model),
        "decoder": weights_hash(policy.decoder),
        # The action statistics stand in the config.
        "configs": hashlib.sha256(
            (policy.processor.to_json_string() + policy.decoder.config.to_json_string()).encode()
        ).hexdigest(),
        "device": policy.model.device.type,
        "generation": options,
    }
    controller = PolicyController(policy, policy.model.config.use_proprio, draws)
    return NamedPolicy(name, controller, identity, torch.manual_seed if draws else _no_draws, draws)


def _check_action_dim(name: str, model: int, environment: int) -> None:
    if model != environment:
        raise ValueError(
            f"`policy` ({name}) has actions of {model} numbers, this suite's environment takes {environment}."
        )


def weights_hash(model: Any) -> str:
    """SHA-256 over names and values of a model's parameters: the same weights, wherever they lie."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


__all__ = ["DO_NOTHING", "EXPERT", "RANDOM", "NamedPolicy", "open_policy", "weights_hash"]
