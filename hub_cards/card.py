"""Renders the model card of an exported folder from its config and from what was recorded beside the weights."""

import math
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from lapa.configuration.configuration_lapa import LapaConfig
from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
from lapa.configuration.configuration_lapa_vision_tokenizer import LapaVisionTokenizerConfig
from lapa.hub_cards.checkpoint import Weights, read_json

# What evaluation, training and conversion leave beside the weights.
RESULTS_NAME = "lapa_results.json"
TRAINER_STATE_NAME = "trainer_state.json"
CONVERSION_NAME = "conversion.json"
PAPER = "arxiv:2410.11758"

CODE_LICENCE = "The code in this folder (`*.py`): Apache-2.0."
LAPA_LICENCE = (
    "LAPA's released weights: MIT ([LatentActionPretraining/LAPA](https://github.com/LatentActionPretraining/LAPA))."
)
LWM_LICENCE = (
    "LWM-Chat-1M, which LAPA started from, and its VQGAN: Apache-2.0 by its authors' statement "
    "([LargeWorldModel/LWM](https://github.com/LargeWorldModel/LWM))."
)
LLAMA_LICENCE = (
    "Llama 2, which LWM started from: the [Llama 2 Community License](https://ai.meta.com/llama/license/) and its "
    "acceptable use policy. Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, "
    "Inc. All Rights Reserved."
)
NO_LICENCE = "The weights: their author has not stated a licence (`lapa export --license` writes one here)."


@dataclass(frozen=True)
class ReleasedLicence:
    """Licence of weights that were converted from the released files: for the metadata, and spelt out."""

    metadata: dict[str, str]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class CardKind:
    """What the card of one architecture is made of."""

    template: str
    what: str
    config_class: type[PreTrainedConfig]
    released: ReleasedLicence


POLICY_LICENCE = ReleasedLicence(
    {
        "license": "other",
        "license_name": "llama2-and-mit",
        "license_link": "https://ai.meta.com/llama/license/",
    },
    (LLAMA_LICENCE, LWM_LICENCE, LAPA_LICENCE),
)
CARDS = {
    "LapaForActionPrediction": CardKind("policy", "robot policy", LapaConfig, POLICY_LICENCE),
    "LapaForLatentAction": CardKind("latent", "latent action model", LapaConfig, POLICY_LICENCE),
    "LapaQuantizer": CardKind(
        "quantizer",
        "latent action quantizer",
        LapaQuantizerConfig,
        ReleasedLicence({"license": "mit"}, (LAPA_LICENCE,)),
    ),
    "LapaVisionTokenizer": CardKind(
        "vision_tokenizer",
        "vision tokenizer",
        LapaVisionTokenizerConfig,
        ReleasedLicence({"license": "apache-2.0"}, (LWM_LICENCE,)),
    ),
}


@dataclass(frozen=True)
class CardOptions:
    """
    What only the author of the weights can say.

    Args:
        license (`str`, *optional*): Licence given to the weights, as the Hub names it (`"mit"`). Weights that come
            from the released files keep the licences they came with.
        datasets (`tuple[str, ...]`): Data sets of the training.
        base_model (`str`, *optional*): Hub repository of the model it was finetuned from.
        repo_id (`str`, *optional*): Hub repository the card is for; the snippets name it.
    """

    license: str | None = None
    datasets: tuple[str, ...] = ()
    base_model: str | None = None
    repo_id: str | None = None


@dataclass(frozen=True)
class Result:
    """One recorded number; `ci95` is its 95% interval, `episodes` how many it comes from."""

    dataset: str
    metric: str
    value: float
    ci95: tuple[float, float] | None = None
    episodes: int | None = None

    @property
    def value_text(self) -> str:
        """The value as the card shows it."""
        return f"{self.value:.4g}"

    @property
    def interval_text(self) -> str:
        """The interval as the card shows it."""
        return "" if self.ci95 is None else f"{self.ci95[0]:.4g} to {self.ci95[1]:.4g}"

    @property
    def episodes_text(self) -> str:
        """The count as the card shows it."""
        return "" if self.episodes is None else str(self.episodes)


def render_card(
    source: Path,
    architecture: str,
    config: dict[str, Any],
    weights: Weights,
    options: CardOptions,
    name: str,
    has_processor: bool,
    has_decoder: bool = False,
) -> ModelCard:
    """
    Renders the card of a model folder.

    Args:
        source (`Path`): The folder. Besides the processor, `lapa_results.json`, `trainer_state.json` and
            `conversion.json` are read, as far as they are there.
        architecture (`str`): Class of the model.
        config (`dict`): Content of its `config.json`.
        weights (`Weights`): What its weight files hold.
        options (`CardOptions`): What the author says.
        name (`str`): Repository or folder that the snippets load.
        has_processor (`bool`): Whether processor and pipeline are exported too.
        has_decoder (`bool`): Whether a decoder from codes to actions is.

    Raises:
        ValueError: A recorded file that is not what it should be.
    """
    kind = CARDS[architecture]
    model_config = kind.config_class.from_dict(config)
    licence, licences = _licences(source, kind, config, options)
    unnorm_keys = (
        sorted(read_json(source / "processor_config.json").get("action_statistics") or {}) if has_processor else []
    )
    key_argument = f', unnorm_key="{unnorm_keys[0]}"' if unnorm_keys else ""
    title = name.rpartition("/")[2]
    return render_page(
        source,
        CardPage(kind.template, kind.what, model_config, _sizes(model_config, weights), licence, licences),
        options,
        name,
        has_processor=has_processor,
        has_decoder=has_decoder,
        unnorm_keys=unnorm_keys,
        key_argument=key_argument,
        action_shape=_action_shape(model_config),
        decode_argument=(key_argument if len(unnorm_keys) > 1 else "") if unnorm_keys else ", decode=False",
        download=f"hf download {name} --local-dir {title}\n" if options.repo_id else "",
        script=f"{title}/finetune.py",
    )


@dataclass(frozen=True)
class CardPage:
    """
    What the card of any of our models shows.

    Args:
        template (`str`): Name of a template of this package, without `.md.j2`.
        what (`str`): The kind of model in two or three words; a tag.
        config (`PreTrainedConfig`): Of the model.
        sizes (`list[tuple[str, str]]`): Rows of the table of sizes.
        licence (`dict[str, str]`): Metadata.
        licences (`list[str]`): Spelt out.
    """

    template: str
    what: str
    config: PreTrainedConfig
    sizes: list[tuple[str, str]]
    licence: dict[str, str]
    licences: list[str]


def render_page(source: Path, page: CardPage, options: CardOptions, name: str, **values: Any) -> ModelCard:
    """
    Renders a template with what was recorded in a folder.

    Args:
        source, options, name: See `render_card`.
        page (`CardPage`): What the card shows.
        values: Further variables of the template.
    """
    results = read_results(source / RESULTS_NAME)
    title = name.rpartition("/")[2]
    data = ModelCardData(
        pipeline_tag="robotics",
        library_name="transformers",
        tags=["robotics", "lapa", "latent-action", page.what.replace(" ", "-"), PAPER],
        base_model=options.base_model,
        datasets=list(options.datasets) or None,
        model_name=title,
        eval_results=[_eval_result(result) for result in results] or None,
        **page.licence,
    )
    text = (
        _environment()
        .get_template(f"{page.template}.md.j2")
        .render(
            title=title,
            name=name,
            config=page.config,
            sizes=page.sizes,
            training=_training(source, page.config, options),
            results=results,
            licences=page.licences,
            **values,
        )
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_tidy(text)}")


def read_results(path: Path) -> list[Result]:
    """
    Reads recorded results: `{"results": [{"dataset", "metric", "value"[, "ci95"][, "episodes"]}, ...]}`.

    Returns:
        The results; none where there is no file.

    Raises:
        ValueError: Another layout, or a value that is no number.
    """
    if not path.exists():
        return []
    rows = read_json(path).get("results")
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list under `results`.")
    return [_result(row, f"{path}, results[{number}]") for number, row in enumerate(rows)]


def _result(row: Any, where: str) -> Result:
    required, optional = {"dataset", "metric", "value"}, {"ci95", "episodes"}
    if not isinstance(row, dict) or not required <= set(row) or set(row) - required - optional:
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"{where} must have {', '.join(sorted(required))} and may have {', '.join(sorted(optional))}; got {keys}."
        )
    ci95, episodes = row.get("ci95"), row.get("episodes")
    if not _is_number(row["value"]) or not (
        ci95 is None or (isinstance(ci95, list) and len(ci95) == 2 and all(map(_is_number, ci95)))
    ):
        raise ValueError(
            f"{where}: `value` must be a finite number and `ci95` two of them, got {row['value']!r}, {ci95!r}."
        )
    if not (episodes is None or (isinstance(episodes, int) and episodes > 0)):
        raise ValueError(f"{where}: `episodes` must be a positive whole number, got {episodes!r}.")
    return Result(
        str(row["dataset"]), str(row["metric"]), row["value"], None if ci95 is None else (ci95[0], ci95[1]), episodes
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _eval_result(result: Result) -> EvalResult:
    slug = re.sub(r"[^a-z0-9]+", "-", result.dataset.lower()).strip("-") or "data"
    return EvalResult(
        task_type="robotics",
        dataset_type=slug,
        dataset_name=result.dataset,
        metric_type=re.sub(r"[^a-z0-9]+", "_", result.metric.lower()).strip("_") or "metric",
        metric_name=result.metric,
        metric_value=result.value,
    )


def _licences(
    source: Path, kind: CardKind, config: dict[str, Any], options: CardOptions
) -> tuple[dict[str, str], list[str]]:
    """Metadata and lines. Weights that descend from the released ones keep the licences of these."""
    # The converter alone turns this on, and a finetuned policy keeps it.
    released = (source / CONVERSION_NAME).exists() or bool(config.get("rope_in_model_dtype"))
    own = [] if options.license is None else [f"What its author added to the weights: {options.license}."]
    if released:
        return kind.released.metadata, [*own, *kind.released.lines, CODE_LICENCE]
    if options.license is None:
        return {}, [NO_LICENCE, CODE_LICENCE]
    return {"license": options.license}, [f"The weights: {options.license}.", CODE_LICENCE]


def _training(source: Path, config: PreTrainedConfig, options: CardOptions) -> list[str]:
    lines = []
    if (source / CONVERSION_NAME).exists():
        record = read_json(source / CONVERSION_NAME)
        lines.append(
            f"Converted from the published file `{record.get('source')}`; every one of the "
            f"{record.get('verified_tensors')} tensors was compared with the source."
        )
    if options.base_model:
        lines.append(f"Started from [{options.base_model}](https://huggingface.co/{options.base_model}).")
    if options.datasets:
        lines.append(f"Data: {', '.join(options.datasets)}.")
    if (source / TRAINER_STATE_NAME).exists():
        lines.append(_trainer_line(read_json(source / TRAINER_STATE_NAME)))
    return lines + _lineage(config)


def _lineage(config: PreTrainedConfig) -> list[str]:
    """Which quantizer and which latent-pretrained model stand behind a policy."""
    lines = []
    if getattr(config, "quantizer_hash", None):
        name = f"`{config.quantizer_name}`, " if config.quantizer_name else ""
        lines.append(
            f"Latent actions come from the quantizer {name}whose weights have SHA-256 `{config.quantizer_hash}`."
        )
    if getattr(config, "latent_policy_hash", None):
        lines.append(
            f"Finetuned from the latent-pretrained model `{config.latent_policy_name}`, whose weights have SHA-256 "
            f"`{config.latent_policy_hash}`."
        )
    return lines


def _trainer_line(state: dict[str, Any]) -> str:
    losses = [entry["loss"] for entry in state.get("log_history") or () if isinstance(entry, dict) and "loss" in entry]
    last = f", last logged loss {losses[-1]:.4g}" if losses and _is_number(losses[-1]) else ""
    epochs = f" ({state['epoch']:.3g} epochs)" if _is_number(state.get("epoch")) else ""
    return f"{state.get('global_step')} steps{epochs}{last}."


def _sizes(config: Any, weights: Weights) -> list[tuple[str, str]]:
    dtypes = ", ".join(
        f"{name} ({count / weights.num_parameters:.0%})" for name, count in sorted(weights.dtypes.items())
    )
    rows = [("parameters", f"{weights.num_parameters:,} ({dtypes}; {_size(weights.num_bytes)})")]
    if isinstance(config, LapaConfig):
        return rows + _policy_sizes(config)
    if isinstance(config, LapaQuantizerConfig):
        height, width = config.image_height_width
        return [
            *rows,
            (
                "frames",
                f"2 of {height} x {width} pixels, patches of {' x '.join(map(str, config.patch_height_width))}",
            ),
            (
                (
                    "codes",
                    f"{config.num_latent_tokens} out of {config.codebook_size}, {config.codebook_dim}-dimensional",
                )
                if config.has_codes
                else ("embeddings", f"{config.num_latent_tokens}, {config.codebook_dim}-dimensional, no codes")
            ),
            ("layers", f"{config.num_spatial_layers} spatial, {config.num_temporal_layers} temporal"),
            ("width", f"{config.hidden_size}, {config.num_attention_heads} heads of {config.head_dim}"),
            ("quantisation", f"{config.quantizer}, {config.bottleneck} bottleneck"),
        ]
    return [
        *rows,
        ("image", f"{config.image_size} x {config.image_size} pixels"),
        (
            "codes",
            f"{config.grid_size} x {config.grid_size} out of {config.codebook_size}, {config.codebook_dim}-dimensional",
        ),
        ("channels", " ".join(str(config.base_channels * factor) for factor in config.channel_multipliers)),
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


def _policy_sizes(config: LapaConfig) -> list[tuple[str, str]]:
    text, vision = config.text_config, config.vision_tokenizer_config
    assert isinstance(text, PreTrainedConfig)
    rows = [
        (
            "trunk",
            f"Llama, {text.num_hidden_layers} layers, width {text.hidden_size}, {text.num_attention_heads} heads",
        ),
        (
            "ids",
            f"{config.text_vocab_size} text, {config.vision_vocab_size} vision, {config.latent_vocab_size} latent"
            + (f", {config.action_vocab_size} action" if config.has_action_segment else ""),
        ),
        ("latent action", f"{config.num_latent_tokens} codes"),
    ]
    if isinstance(vision, LapaVisionTokenizerConfig):
        image = f"{vision.image_size} x {vision.image_size} pixels, {vision.num_image_tokens} codes"
    else:
        image = "no vision tokenizer inside: takes image codes"
    rows.append(("image", image))
    if config.has_action_segment:
        rows.append(("action", f"{config.action_dim} dimensions, up to {config.action_vocab_size} bins each"))
    return rows


def _action_shape(config: PreTrainedConfig) -> str:
    """Shape of an action as the snippets show it: `7`, of a chunk `2, 7`."""
    if not isinstance(config, LapaConfig):
        return ""
    return f"{config.action_horizon}, {config.action_dim}" if config.action_horizon > 1 else str(config.action_dim)


def _environment() -> Any:
    # Comes with torch; loaded here to keep it out of the import of this module.
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(files("lapa.hub_cards").joinpath("templates"))),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )


def _tidy(text: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


__all__ = ["CardOptions", "CardPage", "Result", "read_results", "render_card", "render_page"]
