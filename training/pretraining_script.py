"""What `lapa pretrain` does."""

import logging
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
    from lapa.processing.processing_lapa import LapaProcessor
    from lapa.training.sources import StepColumns

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


def _latent_columns(script_args: PretrainArguments) -> tuple["StepColumns", Any]:
    """Steps to pretrain on, and the manifest of their labels (None for a published file, which has none)."""
    from lapa.training.label_latent_actions import LabelManifest, read_labels
    from lapa.training.sources import jsonl_steps, latent_steps

    path = Path(script_args.data)
    if path.suffix == ".jsonl":
        return jsonl_steps(path, "latent"), None
    return latent_steps(read_labels(path)), LabelManifest.load(path)


def _check_labels(config: "LapaConfig", manifest: Any) -> None:
    """Labels must fit the model; the model then records whose codes it predicts."""
    if manifest is None:
        return
    for ours, theirs in (("latent_vocab_size", "codebook_size"), ("num_latent_tokens", "num_latent_tokens")):
        if getattr(config, ours) != getattr(manifest, theirs):
            raise ValueError(
                f"the labels come from a quantizer with `{theirs}` {getattr(manifest, theirs)}, but the policy has "
                f"`{ours}` {getattr(config, ours)}."
            )
    if config.quantizer_hash not in (None, manifest.quantizer_hash):
        logger.warning("The policy was trained on another quantizer's codes; those of the labels take over.")
    config.quantizer_hash = manifest.quantizer_hash


def run_pretrain(script_args: PretrainArguments, training_args: Any) -> None:
    from transformers import set_seed

    from lapa.configuration.configuration_lapa import LapaConfig
    from lapa.modeling_lapa.modeling_lapa import LapaForLatentAction
    from lapa.processing.processing_lapa import LapaProcessor
    from lapa.training.latent_pretraining_trainer import LapaLatentPretrainingTrainer

    check_output(training_args)
    check_evaluation(training_args, script_args.eval_episodes)
    sizes = read_config(script_args.policy_config, LapaConfig, "policy_config")
    set_seed(training_args.seed)
    columns, manifest = _latent_columns(script_args)
    train_columns, eval_columns = columns.split(script_args.eval_episodes)
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
    _check_labels(policy.config, manifest)
    cache = script_args.cache_vision_codes
    trainer = LapaLatentPretrainingTrainer(
        policy,
        training_args,
        step_dataset(train_columns, processor, policy, cache),
        None if eval_columns is None else step_dataset(eval_columns, processor, policy, cache),
        processor,
    )
    run_training(trainer, training_args)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"{training_args.output_dir}: policy after {trainer.state.global_step} steps")


__all__ = ["run_pretrain"]
