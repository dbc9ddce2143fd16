"""Finding the base model of a folder that holds an adapter alone."""

import json
import os
from dataclasses import dataclass
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from lapa.configuration.configuration_lapa import LapaConfig

ADAPTER_NAME = "default"
ADAPTER_CONFIG_NAME = "adapter_config.json"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


@dataclass(frozen=True)
class AdapterSource:
    """
    An adapter and what it belongs to.

    Args:
        folder: Folder or repository of the adapter.
        base: Folder or repository of the base model.
        config: Config of the model with the adapter, which says more than the base's: action rows, bins, embodiments.
        by_auto_class: Whether an Auto class passed the base model, whose class may be another one.
    """

    folder: str
    base: str
    config: LapaConfig
    by_auto_class: bool


def find_adapter(name: Any, arguments: dict[str, Any]) -> AdapterSource | None:
    """
    The adapter that `from_pretrained(name, **arguments)` means; None where it means a whole model.

    Raises:
        ValueError: An adapter without the config of its model, or whose base model is not where it says.
    """
    if name is None:
        return None
    passed = (arguments.get("adapter_kwargs") or {}).get("_adapter_model_path")
    folder = str(name if passed is None else passed)
    by_auto_class = passed is not None and str(passed) != str(name)
    if not by_auto_class and find_file(folder, (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), arguments) is not None:
        return None
    found = find_file(folder, (ADAPTER_CONFIG_NAME,), arguments)
    if found is None:
        return None
    with open(found, encoding="utf-8") as file:
        base = json.load(file).get("base_model_name_or_path")
    hub = {key: arguments[key] for key in HUB_ARGUMENTS if key in arguments}
    values, _ = LapaConfig.get_config_dict(folder, **hub)
    if values.get("model_type") != LapaConfig.model_type:
        raise ValueError(f"the adapter in {folder} lies without the config.json of its model, so it cannot be loaded.")
    if not base or (os.path.isabs(base) and not os.path.isdir(base)):
        raise ValueError(
            f"the adapter in {folder} belongs to the base model {base!r}, which is not there: put it back, or correct "
            f"`base_model_name_or_path` in {ADAPTER_CONFIG_NAME}."
        )
    given = arguments.get("config")
    config = LapaConfig.from_dict(values) if given is None or by_auto_class else given
    return AdapterSource(folder, base, config, by_auto_class)


def load_adapter(model: Any, folder: str, arguments: dict[str, Any]) -> None:
    """
    Puts the adapter of a folder or repository into a model, in evaluation mode.

    `PreTrainedModel.load_adapter` would leave DoRA's magnitudes as they were drawn, with a warning.

    Args:
        model: The base model.
        folder: Where the adapter lies.
        arguments: Those of `from_pretrained`; what concerns the Hub is used.

    Raises:
        ImportError: No peft.
        ValueError: Weights that do not fit the model.
    """
    # In a `try`, so that the remote code of a whole model does not ask for peft.
    try:
        from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
        from peft.utils import load_peft_weights
    except ImportError as error:
        raise ImportError(f"{folder} holds an adapter, which needs peft: pip install peft.") from error
    hub = {key: arguments[key] for key in HUB_ARGUMENTS if arguments.get(key) is not None}
    settings = PeftConfig.from_pretrained(folder, **hub)
    settings.inference_mode = True
    inject_adapter_in_model(settings, model, ADAPTER_NAME)
    weights = load_peft_weights(folder, device="cpu", **hub)
    weights = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
    outcome: Any = set_peft_model_state_dict(model, weights, ADAPTER_NAME)
    missing = [key for key in outcome.missing_keys if "lora_" in key or "trainable_tokens_delta" in key]
    if outcome.unexpected_keys or missing:
        raise ValueError(
            f"the adapter in {folder} does not fit its base model: {(outcome.unexpected_keys or missing)[0]} is "
            f"{'not in the model' if outcome.unexpected_keys else 'missing'}."
        )
    model._hf_peft_config_loaded = True
    model.eval()


def find_file(folder: str, files: tuple[str, ...], arguments: dict[str, Any]) -> str | None:
    """
    Where the first of some files is, that a model may have or not.

    Args:
        folder: Folder, or name of a Hub repository.
        files: Paths in it.
        arguments: Of `from_pretrained`; what tells where on the Hub is read.

    Returns:
        Its path on this disk; None where there is none, or no such repository, which loading says in its own words.
    """
    hub = {key: arguments[key] for key in HUB_ARGUMENTS if key in arguments}
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")}
    for file in files:
        try:
            path: str | None = cached_file(folder, file, **hub, **quiet)
        except (OSError, ValueError):
            return None
        if path is not None:
            return path
    return None


__all__ = ["HUB_ARGUMENTS", "AdapterSource", "find_adapter", "find_file", "load_adapter"]
