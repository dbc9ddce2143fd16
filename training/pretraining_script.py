"""What `lapa pretrain` does."""

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapa.training.script_arguments import PretrainArguments, read_config
from lapa.training.script_tools import (
    check_checkpoint,
    check_evaluation,
    check_output,
    load_options,
    run_training,
    step_dataset,
)

if TYPE_CHECKING:
    from lapa.configuration.configuration_lapa import LapaConfig
    from lapa.data.label_manifest import LabelManifest
    from lapa.data.label_table import LabelFolder
    from lapa.data.labelled_stream import LabelSource
    from lapa.processing.processing_lapa import LapaProcessor

logger = logging.getLogger(__name__)


def _fresh_policy(script_args: PretrainArguments, sizes: dict[str, Any]) -> tuple[Any, "LapaProcessor"]:
    """A policy with a trunk from noise, around a given vision tokenizer and text tokenizer."""
    from lapa.configuration.configuration_lapa import LapaConfig
    from lapa.modeling_lapa.modeling_lapa import LapaForLatentAction
    from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer
    from lapa.processing.processing_lapa import LapaProcessor
    from lapa.processing.tokenization_lapa import LapaTokenizer

    if script_args.vision_tokenizer is None or script_args.tokenizer is None:
        raise ValueError(
            "`model` must be given, or `vision_tokenizer` and `tokenizer` (and `policy_config`) without it."
        )
    check_checkpoint(script_args.vision_tokenizer, "lapa_vision_tokenizer", "vision_tokenizer")
    if not Path(script_args.tokenizer).is_file():
        raise ValueError(f"`tokenizer` must be a sentencepiece file, got {script_args.tokenizer!r}.")
    vision_tokenizer = LapaVisionTokenizer.from_pretrained(script_args.vision_tokenizer)
    tokenizer = LapaTokenizer(script_args.tokenizer)
    sizes = {**sizes, "text_config": {"vocab_size": len(tokenizer), **(sizes.get("text_config") or {})}}
    # Two more than the codes, for end of frame and end of vision.
    sizes.setdefault("vision_vocab_size", vision_tokenizer.config.codebook_size + 2)
    config = LapaConfig(**sizes, vision_tokenizer_config=vision_tokenizer.config.to_dict())
    policy = LapaForLatentAction(config)
    policy.model.vision_tokenizer.load_state_dict(vision_tokenizer.state_dict())
    return policy, LapaProcessor.from_config(config, None, tokenizer)


def _open_labels(script_args: PretrainArguments) -> "list[tuple[LabelFolder, float]]":
    """Folders of labels and their weights; all of one quantizer."""
    from lapa.data.labelled_stream import open_label_folders

    labels = open_label_folders(script_args.data)
    first = labels[0][0]
    for other, _ in labels[1:]:
        for name in ("quantizer_hash", "codebook_size", "num_latent_tokens"):
            ours, theirs = getattr(first.manifest, name), getattr(other.manifest, name)
            if ours != theirs:
                raise ValueError(
                    f"`data` mixes labels of different quantizers: `{name}` of {first.path} is {ours!r}, of {other.path} "
                    f"{theirs!r}."
                )
    return labels


def _check_labels(script_args: PretrainArguments, config: "LapaConfig", manifest: "LabelManifest") -> None:
    """Labels must fit the model and the quantizer, if one is given; the model then records whose codes it predicts."""
    from lapa.training.lineage import check_quantizer, model_name, record_quantizer

    for ours, theirs in (("latent_vocab_size", "codebook_size"), ("num_latent_tokens", "num_latent_tokens")):
        if getattr(config, ours) != getattr(manifest, theirs):
            raise ValueError(
                f"the labels come from a quantizer with `{theirs}` {getattr(manifest, theirs)}, but the policy has "
                f"`{ours}` {getattr(config, ours)}."
            )
    record_quantizer(config, manifest.quantizer_hash, replace=script_args.replace_quantizer)
    if script_args.quantizer is not None:
        check_checkpoint(script_args.quantizer, "lapa_quantizer", "quantizer")
        check_quantizer(config, script_args.quantizer)
        config.quantizer_name = model_name(script_args.quantizer)


def _vision_of(
    labels: "LabelFolder",
    script_args: PretrainArguments,
    training_args: Any,
    policy: Any,
    processor: "LapaProcessor",
    tokenizer_hash: str | None,
) -> str:
    """Where the steps of a folder take their images from, see `LabelSource.vision`."""
    settings, tokenizer = labels.manifest.settings, policy.model.vision_tokenizer
    if settings.vision_tokenizer_hash is not None and tokenizer_hash in (None, settings.vision_tokenizer_hash):
        return "column"
    if tokenizer is None:
        raise ValueError(
            "the policy has no vision tokenizer, so it cannot train on images: give labels with vision codes "
            "(`lapa label --vision_tokenizer`)."
        )
    if settings.vision_tokenizer_hash is not None:
        logger.warning("%s has the codes of another vision tokenizer: its images are encoded anew", labels.path)
    if not script_args.cache_vision_codes:
        return "images"
    from lapa.training.label_vision import cache_vision_codes, vision_code_folder

    assert tokenizer_hash is not None
    folder = vision_code_folder(Path(training_args.output_dir) / "vision_codes", labels, tokenizer_hash)
    rank, world_size = training_args.process_index, training_args.world_size
    tokenizer.to(training_args.device)
    cache_vision_codes(labels, tokenizer, processor.image_processor, folder, rank, world_size, show_progress=rank == 0)
    return str(folder)


def _label_sources(
    labels: "list[tuple[LabelFolder, float]]",
    script_args: PretrainArguments,
    training_args: Any,
    policy: Any,
    processor: "LapaProcessor",
) -> "tuple[list[LabelSource], list[LabelSource]]":
    """What is trained on and what is held out."""
    from lapa.data.labelled_stream import LabelSource, hold_out_episodes
    from lapa.training.label_vision import hash_vision_tokenizer, load_vision_tokenizer

    tokenizer_hash = None
    if policy.model.vision_tokenizer is not None:
        # Of the weights as they are stored, whatever they were loaded as.
        folder = script_args.model or script_args.vision_tokenizer
        assert folder is not None
        tokenizer_hash = hash_vision_tokenizer(load_vision_tokenizer(folder)[0], processor.image_processor)
    bounds = [hold_out_episodes(folder, script_args.eval_episodes) if script_args.eval_episodes else None
              for folder, _ in labels]  # fmt: skip
    vision = [
        _vision_of(folder, script_args, training_args, policy, processor, tokenizer_hash) for folder, _ in labels
    ]
    train = [LabelSource(*entry, vision=kind, stop=place) for entry, kind, place in zip(labels, vision, bounds)]
    held = [
        LabelSource(folder, 1.0, kind, start=place)
        for (folder, _), kind, place in zip(labels, vision, bounds)
        if place is not None
    ]
    return train, held


def _set_max_steps(training_args: Any, labels: "list[tuple[LabelFolder, float]]", num_held_out: int) -> None:
    """Epochs as steps: a stream has no end."""
    if training_args.max_steps > 0:
        return
    totals = [folder.manifest.totals for folder, _ in labels]
    rows = sum(total.rows - total.rows_without_instruction for total in totals if total is not None) - num_held_out
    batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    steps = training_args.num_train_epochs * max(rows, 1) / (batch * training_args.world_size)
    training_args.max_steps = max(1, math.ceil(steps))


def _label_datasets(
    labels: "list[tuple[LabelFolder, float]]",
    script_args: PretrainArguments,
    training_args: Any,
    policy: Any,
    processor: "LapaProcessor",
) -> tuple[Any, Any]:
    """Training stream and, where episodes are held out, evaluation set."""
    from accelerate.utils import wait_for_everyone

    from lapa.data.labelled_stream import LabelledRows, LabelledStepStream

    train, held = _label_sources(labels, script_args, training_args, policy, processor)
    # Every process reads all vision codes, which each has made its part of.
    wait_for_everyone()
    rows = LabelledRows(held, processor) if held else None
    _set_max_steps(training_args, labels, 0 if rows is None else len(rows))
    stream = LabelledStepStream(
        train,
        processor,
        seed=training_args.seed if training_args.data_seed is None else training_args.data_seed,
        buffer_size=script_args.shuffle_buffer,
        rank=training_args.process_index,
        world_size=training_args.world_size,
    )
    return stream, rows


def run_pretrain(script_args: PretrainArguments, training_args: Any) -> None:
    from transformers import set_seed

    from lapa.configuration.configuration_lapa import LapaConfig
    from lapa.data.jsonl import is_published_file
    from lapa.modeling_lapa.modeling_lapa import LapaForLatentAction
    from lapa.processing.processing_lapa import LapaProcessor
    from lapa.training.latent_pretraining_trainer import LapaLatentPretrainingTrainer
    from lapa.training.sources import jsonl_steps

    check_output(training_args)
    check_evaluation(training_args, script_args.eval_episodes)
    sizes = read_config(script_args.policy_config, LapaConfig, "policy_config")
    set_seed(training_args.seed)
    labels = [] if is_published_file(script_args.data) else _open_labels(script_args)
    manifest = labels[0][0].manifest if labels else None
    columns = None if labels else jsonl_steps(script_args.data, "latent").split(script_args.eval_episodes)
    if script_args.model is None:
        if manifest is not None:
            sizes.setdefault("latent_vocab_size", manifest.codebook_size)
            sizes.setdefault("num_latent_tokens", manifest.num_latent_tokens)
        policy, processor = _fresh_policy(script_args, sizes)
    else:
        if sizes:
            raise ValueError("`policy_config` and `model` exclude each other: a trained model has its sizes.")
        check_checkpoint(script_args.model, "lapa")
        options = load_options(script_args.dtype, script_args.attn_implementation)
        policy = LapaForLatentAction.from_pretrained(script_args.model, **options)
        processor = LapaProcessor.from_pretrained(script_args.model)
    if manifest is not None:
        _check_labels(script_args, policy.config, manifest)
    elif script_args.quantizer is not None:
        raise ValueError(
            "`quantizer` is checked against the labels of `lapa label`, and `data` holds no record of any."
        )
    if columns is None:
        datasets = _label_datasets(labels, script_args, training_args, policy, processor)
    else:
        cache = script_args.cache_vision_codes
        train, held = columns
        datasets = (
            step_dataset(train, processor, policy, cache),
            None if held is None else step_dataset(held, processor, policy, cache),
        )
    trainer = LapaLatentPretrainingTrainer(policy, training_args, *datasets, processor)
    run_training(trainer, training_args)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"{training_args.output_dir}: policy after {trainer.state.global_step} steps")


__all__ = ["run_pretrain"]
