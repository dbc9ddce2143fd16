"""Makes of a model folder what the Hub needs: weights, flat remote code, `auto_map`, pipeline, card, finetuning script."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapa.hub_cards.card import RESULTS_NAME, CardOptions, render_card
from lapa.hub_cards.checkpoint import DECODER_FOLDER, LATENT_DECODER, Weights, read_json, read_weights, write_json
from lapa.hub_cards.remote_code import collect_modules, module_path

PROCESSOR_MODULES = ("lapa.processing.processing_lapa", "lapa.modeling_lapa.pipeline_robot_action")
PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.model")
# Beside weights and config of an action decoder, where they are there.
DECODER_EXTRAS = ("README.md", RESULTS_NAME)
FINETUNING_SCRIPT = "lapa.hub_cards.finetune"
CUSTOM_PIPELINES = {
    "robot-action": {
        "impl": "pipeline_robot_action.RobotActionPipeline",
        "pt": ["AutoModelForCausalLM"],
        "type": "multimodal",
    }
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_lapa.LapaProcessor"}
IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": "image_processing_lapa.LapaImageProcessor"}
TOKENIZER_AUTO_MAP = {
    "AutoProcessor": "processing_lapa.LapaProcessor",
    "AutoTokenizer": ["tokenization_lapa.LapaTokenizer", None],
}
# Left in a config by loading; they name folders of the machine that saved it.
MACHINE_KEYS = ("_name_or_path", "name_or_path", "vocab_file", "_commit_hash")


@dataclass(frozen=True)
class ModelKind:
    """Remote code of one model type: modules that are copied, and the class of each architecture."""

    config_class: str
    modules: tuple[str, ...]
    model_module: str
    architectures: tuple[str, ...]
    auto_classes: tuple[str, ...] = ("AutoModel",)


KINDS = {
    "lapa": ModelKind(
        "configuration_lapa.LapaConfig",
        ("lapa.modeling_lapa.modeling_lapa",),
        "modeling_lapa",
        ("LapaForLatentAction", "LapaForActionPrediction"),
        ("AutoModel", "AutoModelForCausalLM"),
    ),
    "lapa_quantizer": ModelKind(
        "configuration_lapa_quantizer.LapaQuantizerConfig",
        ("lapa.modeling_lapa.modeling_lapa_quantizer",),
        "modeling_lapa_quantizer",
        ("LapaQuantizer",),
    ),
    "lapa_vision_tokenizer": ModelKind(
        "configuration_lapa_vision_tokenizer.LapaVisionTokenizerConfig",
        ("lapa.modeling_lapa.modeling_lapa_vision_tokenizer",),
        "modeling_lapa_vision_tokenizer",
        ("LapaVisionTokenizer",),
    ),
}


def export(model_dir: str | Path, output: str | Path, options: CardOptions | None = None) -> Path:
    """
    Writes a folder that loads with `trust_remote_code=True` where `lapa` is not installed.

    Args:
        model_dir (`str` or `Path`): A policy (latent or action), quantizer or vision tokenizer, as `save_pretrained`
            or `lapa convert` write it.
        output (`str` or `Path`): Folder to make; it must not exist, or be empty. Nothing is left behind on failure.
            On the same disk the weights are hard links, which cost no space (writers of safetensors replace files
            rather than change them).
        options (`CardOptions`, *optional*): Licence, data sets and name for the model card.

    Returns:
        `output`. The decoder of a latent-pretrained model that acts by one comes along as it is, in `action_decoder/`.

    Raises:
        ValueError: An output that exists, or a folder that is no whole model, named by what it lacks.
    """
    source, target = Path(model_dir), Path(output)
    kind, config, weights = _read_model(source)
    architecture = config["architectures"][0]
    has_processor = config["model_type"] == "lapa" and (source / PROCESSOR_FILES[0]).is_file()
    options = options or CardOptions()
    name = options.repo_id or target.resolve().name
    decoder = _read_decoder(source / DECODER_FOLDER, architecture)
    card = render_card(source, architecture, config, weights, options, name, has_processor, decoder is not None)
    with _staged(target) as folder:
        for file in weights.files:
            _link_or_copy(source / file, folder / file)
        if decoder is not None:
            (folder / DECODER_FOLDER).mkdir()
            for file in decoder:
                _link_or_copy(source / DECODER_FOLDER / file, folder / DECODER_FOLDER / file)
        write_json(folder / "config.json", _hub_config(config, kind, architecture, has_processor))
        modules = kind.modules
        if config["model_type"] == "lapa":
            _write_generation_config(source, folder, config)
        if has_processor:
            modules += PROCESSOR_MODULES
            _write_processor(source, folder)
            shutil.copyfile(module_path(FINETUNING_SCRIPT), folder / "finetune.py")
        for file, content in collect_modules(modules).items():
            (folder / file).write_text(content, encoding="utf-8")
        card.save(folder / "README.md")
    return target


def push_to_hub(
    model_dir: str | Path,
    repo_id: str,
    options: CardOptions | None = None,
    private: bool | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> list[str]:
    """
    Exports a model folder and uploads the result.

    Args:
        model_dir (`str` or `Path`): See `export`.
        repo_id (`str`): Hub repository, made if need be.
        options (`CardOptions`, *optional*): See `export`.
        private (`bool`, *optional*): Whether a new repository is private.
        token (`str`, *optional*): Hub token; None takes the one of the login.
        dry_run (`bool`, *optional*): Whether to export and upload nothing.

    Returns:
        Names of the files of the repository.

    Raises:
        ValueError: A name that is no repository id, offline mode, or what `export` raises.
    """
    check_upload(repo_id, dry_run)
    source = Path(model_dir).resolve()
    fields = vars(options) if options is not None else {}
    # Beside the model, so that the weights are links.
    parent = source.parent if os.access(source.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as scratch:
        folder = export(
            source, Path(scratch) / repo_id.rpartition("/")[2], CardOptions(**{**fields, "repo_id": repo_id})
        )
        if not dry_run:
            upload(folder, repo_id, private=private, token=token)
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def upload(folder: Path, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Uploads an exported folder to a Hub repository, made if need be, and returns its address."""
    from huggingface_hub import HfApi

    check_upload(repo_id)
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    api.upload_folder(folder_path=str(folder), repo_id=repo, commit_message="Exported with lapa")
    return f"https://huggingface.co/{repo}"


def check_upload(repo_id: str, dry_run: bool = False) -> None:
    """Raises a `ValueError` where an upload to `repo_id` cannot work, before anything is written."""
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` {repo_id!r} is no repository id such as `name/model`.") from error
    if is_offline_mode() and not dry_run:
        raise ValueError("nothing can be uploaded in offline mode: unset HF_HUB_OFFLINE.")


def _read_model(source: Path) -> tuple[ModelKind, dict[str, Any], Weights]:
    if not source.is_dir():
        raise ValueError(f"`model` must be a folder with a saved model, got {source}.")
    config = read_json(source / "config.json")
    kind = KINDS.get(str(config.get("model_type")))
    if kind is None:
        raise ValueError(
            f"{source / 'config.json'} has `model_type` {config.get('model_type')!r}; accepted: {', '.join(KINDS)}."
        )
    found = config.get("architectures") or list(kind.architectures[:1] if len(kind.architectures) == 1 else [])
    if len(found) != 1 or found[0] not in kind.architectures:
        raise ValueError(
            f"{source / 'config.json'} has `architectures` {found}; accepted: one of {', '.join(kind.architectures)}."
        )
    if (source / "adapter_config.json").is_file():
        raise ValueError(f"`model` {source} holds an adapter: merge it into its base model first.")
    return kind, {**config, "architectures": found}, read_weights(source)


def _read_decoder(folder: Path, architecture: str) -> list[str] | None:
    """Files of the action decoder of a model, None where it has none; that one loads where `lapa` is installed."""
    if not folder.is_dir():
        return None
    model_type = read_json(folder / "config.json").get("model_type")
    if architecture != "LapaForLatentAction" or model_type != LATENT_DECODER:
        raise ValueError(
            f"{folder} must be the action decoder (`model_type` {LATENT_DECODER!r}) of a LapaForLatentAction, got {model_type!r} "
            f"beside a {architecture}."
        )
    return [
        "config.json",
        *read_weights(folder).files,
        *(name for name in DECODER_EXTRAS if (folder / name).is_file()),
    ]


def _hub_config(config: dict[str, Any], kind: ModelKind, architecture: str, has_processor: bool) -> dict[str, Any]:
    # A folder that was finetuned from an export carries an old map.
    result = {key: value for key, value in config.items() if key not in (*MACHINE_KEYS, "custom_pipelines")}
    model_class = f"{kind.model_module}.{architecture}"
    result["auto_map"] = {"AutoConfig": kind.config_class, **dict.fromkeys(kind.auto_classes, model_class)}
    if has_processor:
        result["custom_pipelines"] = CUSTOM_PIPELINES
    return result


def _write_generation_config(source: Path, folder: Path, config: dict[str, Any]) -> None:
    path = source / "generation_config.json"
    if path.is_file():
        write_json(folder / path.name, read_json(path))
        return
    text_config = config.get("text_config") or {}
    ids = {key: text_config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / path.name, {key: value for key, value in ids.items() if value is not None})


def _write_processor(source: Path, folder: Path) -> None:
    if absent := [name for name in PROCESSOR_FILES if not (source / name).is_file()]:
        raise ValueError(f"`model` {source} has a processor without {', '.join(absent)}.")
    processor = read_json(source / PROCESSOR_FILES[0])
    image_processor = {**(processor.get("image_processor") or {}), "auto_map": IMAGE_PROCESSOR_AUTO_MAP}
    processor |= {"auto_map": PROCESSOR_AUTO_MAP, "image_processor": image_processor}
    write_json(folder / PROCESSOR_FILES[0], processor)
    tokenizer = {
        key: value for key, value in read_json(source / PROCESSOR_FILES[1]).items() if key not in MACHINE_KEYS
    }
    write_json(folder / PROCESSOR_FILES[1], {**tokenizer, "auto_map": TOKENIZER_AUTO_MAP})
    shutil.copyfile(source / PROCESSOR_FILES[2], folder / PROCESSOR_FILES[2])


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        # A file of the Hub cache is itself a link, whose target is wanted.
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        shutil.copyfile(source, target)


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A folder beside `output` that becomes `output` when the block ends well and vanishes when it does not."""
    output = output.resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`output` {output} exists; give a folder that does not, or an empty one.")
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        staging.chmod(0o755)
        yield staging
        os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


__all__ = ["check_upload", "export", "push_to_hub", "upload"]
