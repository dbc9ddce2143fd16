"""The command line of the three stages.

```bash
lapa train-quantizer --config training/recipes/tiny_quantizer.yaml --data bridge_rlds/1.0.0 --output_dir quantizer
lapa label --model quantizer --data bridge_rlds/1.0.0 --output labels
lapa pretrain --config training/recipes/tiny_pretrain.yaml --data labels \
    --vision_tokenizer vision-tokenizer --tokenizer tokenizer.model --output_dir policy
lapa finetune --config training/recipes/tiny_finetune.yaml --model policy --data bridge_rlds/1.0.0 --output_dir robot
lapa finetune --model policy --data bridge_rlds/1.0.0 --output_dir robot --use_peft --lora_r 32
```

A recipe (`--config`, YAML) gives any of a command's arguments; the command line wins over it, and a key that no
argument has is an error. Each command is a function of its arguments that returns the exit code: 2 with one line on
bad input.
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from lapa.training.script_arguments import (
    FinetuneArguments,
    LabelArguments,
    PretrainArguments,
    QuantizerArguments,
    read_config,
)

if TYPE_CHECKING:
    from lapa.configuration.configuration_lapa import LapaConfig
    from lapa.processing.processing_lapa import LapaProcessor
    from lapa.training.sources import StepColumns

logger = logging.getLogger(__name__)


def make_parser(dataclass_types: Sequence[type], prog: str) -> Any:
    """trl's parser of dataclasses (YAML and command line), with errors of one line."""
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> Any:
            raise ValueError(message)

    return Parser(dataclass_types, prog=prog, allow_abbrev=False)


def _run(name: str, dataclass_types: Sequence[type], main: Callable[..., None], argv: Sequence[str] | None) -> int:
    try:
        main(*make_parser(dataclass_types, f"lapa {name}").parse_args_and_config(argv))
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        logger.debug("lapa %s failed", name, exc_info=True)
        print(f"lapa {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def train_quantizer(argv: Sequence[str] | None = None) -> int:
    """`lapa train-quantizer`: stage 1."""
    from lapa.training.arguments import LapaQuantizerTrainingArguments

    return _run("train-quantizer", (QuantizerArguments, LapaQuantizerTrainingArguments), _train_quantizer, argv)


def label(argv: Sequence[str] | None = None) -> int:
    """`lapa label`: latent action codes for every step."""
    return _run("label", (LabelArguments,), _label, argv)


def pretrain(argv: Sequence[str] | None = None) -> int:
    """`lapa pretrain`: stage 2."""
    from lapa.training.arguments import LapaLatentPretrainingArguments

    return _run("pretrain", (PretrainArguments, LapaLatentPretrainingArguments), _pretrain, argv)


def finetune(argv: Sequence[str] | None = None) -> int:
    """`lapa finetune`: stage 3."""
    from trl import ModelConfig

    from lapa.training.arguments import LapaActionFinetuningArguments

    return _run("finetune", (FinetuneArguments, LapaActionFinetuningArguments, ModelConfig), _finetune, argv)


def _check_checkpoint(folder: str, model_type: str, argument: str = "model") -> None:
    """Refuses, by name, a folder that holds another kind of model."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"`{argument}` ({folder}) is no model folder: it has no config.json.")
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if found != model_type:
        raise ValueError(
            f"`{argument}` ({folder}) holds a model of type {found!r}, but {model_type!r} is needed here."
        )


def _check_output(training_args: Any) -> None:
    if training_args.output_dir is None:
        raise ValueError("`output_dir` must be given.")
    path = Path(training_args.output_dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"`output_dir` is a file: {path}.")


def _train(trainer: Any, training_args: Any) -> None:
    """Trains, from the checkpoint `resume_from_checkpoint` names (`last`: the newest, if there is one).

    The output folder gets the metrics of the evaluation and, in `trainer_state.json`, the log of the whole run.
    """
    from transformers.trainer_utils import get_last_checkpoint

    resume = training_args.resume_from_checkpoint
    if resume is not None and resume.lower() in ("last", "true"):
        resume = get_last_checkpoint(training_args.output_dir)
    elif resume is not None and not Path(resume).is_dir():
        raise ValueError(f"`resume_from_checkpoint` must be `last` or a checkpoint folder, got {resume!r}.")
    trainer.train(resume_from_checkpoint=resume)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    trainer.save_state()


def _evaluation(training_args: Any, eval_episodes: int) -> None:
    if training_args.eval_strategy != "no" and eval_episodes == 0:
        raise ValueError(f"`eval_strategy` {str(training_args.eval_strategy)!r} needs `eval_episodes` above 0.")


def _train_quantizer(script_args: QuantizerArguments, training_args: Any) -> None:
    from transformers import set_seed

    from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
    from lapa.data.frame_pairs import FramePairDataset
    from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer
    from lapa.training.quantizer_trainer import LapaQuantizerTrainer
    from lapa.training.sources import SETTINGS_FILE, frame_gap_of, hold_out, load_rlds

    _check_output(training_args)
    _evaluation(training_args, script_args.eval_episodes)
    sizes = read_config(script_args.quantizer_config, LapaQuantizerConfig, "quantizer_config")
    set_seed(training_args.seed)
    if script_args.model is not None:
        if sizes:
            raise ValueError("`quantizer_config` and `model` exclude each other: a trained model has its sizes.")
        _check_checkpoint(script_args.model, "lapa_quantizer")
    source = load_rlds(script_args.data, script_args.split, script_args.camera, script_args.frequency)
    train_episodes, eval_episodes = hold_out(source.episodes, script_args.eval_episodes, "episodes")
    model = (
        LapaQuantizer(LapaQuantizerConfig(**sizes))
        if script_args.model is None
        else LapaQuantizer.from_pretrained(script_args.model)
    )

    def pairs(episodes: list[Any]) -> FramePairDataset:
        gaps = [frame_gap_of(e, script_args.frame_gap, script_args.frame_gap_seconds) for e in episodes]
        return FramePairDataset([e.frames[source.camera] for e in episodes], gaps, model.config.image_height_width)

    trainer = LapaQuantizerTrainer(
        model, training_args, pairs(train_episodes), pairs(eval_episodes) if eval_episodes else None
    )
    _train(trainer, training_args)
    trainer.save_model()
    if trainer.is_world_process_zero():
        from lapa.training.label_latent_actions import write_atomically

        names = ("frame_gap", "frame_gap_seconds", "frequency", "camera")
        settings = {name: getattr(script_args, name) for name in names} | {"camera": source.camera}
        write_atomically(Path(training_args.output_dir) / SETTINGS_FILE, json.dumps(settings, indent=2).encode())
        print(f"{training_args.output_dir}: quantizer after {trainer.state.global_step} steps")


def _label(script_args: LabelArguments) -> None:
    import torch

    from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizerEncoder
    from lapa.training.label_latent_actions import (
        LabelManifest,
        episode_rows,
        hash_weights,
        label_episodes,
        write_labels,
    )
    from lapa.training.sources import SETTINGS_FILE, frame_gap_of, load_rlds

    _check_checkpoint(script_args.model, "lapa_quantizer")
    settings_path = Path(script_args.model) / SETTINGS_FILE
    settings = json.loads(settings_path.read_text(encoding="utf-8")) if settings_path.is_file() else {}
    gap, seconds = script_args.frame_gap, script_args.frame_gap_seconds
    if gap is None and seconds is None:
        gap, seconds = settings.get("frame_gap"), settings.get("frame_gap_seconds")
    frequency = settings.get("frequency") if script_args.frequency is None else script_args.frequency
    source = load_rlds(script_args.data, script_args.split, script_args.camera or settings.get("camera"), frequency)
    gaps = {episode.episode_id: frame_gap_of(episode, gap, seconds) for episode in source.episodes}
    device = script_args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    quantizer = LapaQuantizerEncoder.from_pretrained(script_args.model).to(device).eval()
    manifest = LabelManifest(
        quantizer_hash=hash_weights(script_args.model),
        codebook_size=quantizer.config.codebook_size,
        num_latent_tokens=quantizer.config.num_latent_tokens,
        frame_gap=gap if seconds is not None or gap is not None else next(iter(gaps.values())),
        frame_gap_seconds=seconds,
        camera=source.camera,
        source=f"{source.name}/{script_args.split}",
        episodes_per_shard=script_args.episodes_per_shard,
    )

    def label_shard(episodes: list[Any]) -> list[Any]:
        codes = label_episodes(
            quantizer,
            [episode.frames[source.camera] for episode in episodes],
            [gaps[episode.episode_id] for episode in episodes],
            script_args.batch_size,
        )
        return [episode_rows(episode, source.camera, rows) for episode, rows in zip(episodes, codes)]

    num_rows = write_labels(script_args.output, manifest, source.episodes, label_shard)
    print(f"{script_args.output}: {num_rows} labelled steps of {len(source.episodes)} episodes")


def _dataset(columns: "StepColumns", processor: "LapaProcessor", policy: Any, cache: bool, **kwargs: Any) -> Any:
    """Training examples; with `cache` the images go through the frozen vision tokenizer once, before training."""
    from lapa.data.labelled_steps import LabelledStepDataset
    from lapa.training.label_latent_actions import encode_images

    images, vision_codes = columns.images, columns.vision_codes
    tokenizer = policy.model.vision_tokenizer
    if images is not None and tokenizer is None:
        raise ValueError("the policy has no vision tokenizer, so it cannot train on images: give rows of image codes.")
    if images is not None and cache:
        images, vision_codes = None, encode_images(tokenizer, processor.image_processor, images)
    return LabelledStepDataset(
        processor,
        columns.instructions,
        images=images,
        vision_codes=vision_codes,
        latent_action_codes=columns.latent_action_codes,
        actions=columns.actions,
        raw_instruction=columns.raw_instruction,
        cache=images is None,
        **kwargs,
    )


def _load_options(dtype: str | None, attn_implementation: str | None) -> dict[str, Any]:
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    return {name: value for name, value in options.items() if value is not None}


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
    _check_checkpoint(script_args.vision_tokenizer, "lapa_vision_tokenizer", "vision_tokenizer")
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


def _pretrain(script_args: PretrainArguments, training_args: Any) -> None:
    from transformers import set_seed

    from lapa.configuration.configuration_lapa import LapaConfig
    from lapa.modeling_lapa.modeling_lapa import LapaForLatentAction
    from lapa.processing.processing_lapa import LapaProcessor
    from lapa.training.latent_pretraining_trainer import LapaLatentPretrainingTrainer

    _check_output(training_args)
    _evaluation(training_args, script_args.eval_episodes)
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
        _check_checkpoint(script_args.model, "lapa")
        options = _load_options(script_args.dtype, script_args.attn_implementation)
        policy = LapaForLatentAction.from_pretrained(script_args.model, **options)
        processor = LapaProcessor.from_pretrained(script_args.model)
    _check_labels(policy.config, manifest)
    cache = script_args.cache_vision_codes
    trainer = LapaLatentPretrainingTrainer(
        policy,
        training_args,
        _dataset(train_columns, processor, policy, cache),
        None if eval_columns is None else _dataset(eval_columns, processor, policy, cache),
        processor,
    )
    _train(trainer, training_args)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"{training_args.output_dir}: policy after {trainer.state.global_step} steps")


def _action_columns(script_args: FinetuneArguments) -> tuple["StepColumns", str]:
    """Steps to finetune on, and the name of the data set."""
    from lapa.training.sources import action_steps, jsonl_steps, load_rlds

    path = Path(script_args.data)
    if path.suffix == ".jsonl":
        return jsonl_steps(path, "action"), path.stem
    source = load_rlds(script_args.data, script_args.split, script_args.camera)
    return action_steps(source), source.name


def _prepare_actions(
    script_args: FinetuneArguments, config: "LapaConfig", processor: "LapaProcessor", columns: "StepColumns", key: str
) -> None:
    """Bins of the actions: read from a csv, fitted, or those that the processor has. They replace no others."""
    assert columns.actions is not None
    processor.action_dim, processor.action_vocab_size = config.action_dim, config.action_vocab_size
    if script_args.action_bins is not None:
        processor.load_action_csv(script_args.action_bins, key)
    elif key not in processor.action_statistics:
        gripper: Any = script_args.gripper_dimension
        if gripper != "last":
            gripper = None if gripper == "none" else int(gripper)
        processor.fit_actions(columns.actions, key, script_args.num_bins, gripper)


def _action_sizes(script_args: FinetuneArguments, action_dim: int) -> dict[str, int]:
    """What a latent-pretrained policy becomes for these actions; a policy that has action rows must fit already."""
    from lapa.configuration.configuration_lapa import LapaConfig

    source = LapaConfig.from_pretrained(script_args.model)
    sizes = {"action_dim": action_dim}
    if script_args.num_bins is not None:
        sizes["action_vocab_size"] = script_args.num_bins
    if not source.has_action_segment:
        return sizes
    if source.action_dim != action_dim or sizes.get("action_vocab_size", 0) > source.action_vocab_size:
        raise ValueError(
            f"`model` ({script_args.model}) has actions of {source.action_dim} dimensions and {source.action_vocab_size} "
            f"bins, the data have {action_dim} dimensions (`num_bins` {script_args.num_bins}): start from a "
            "latent-pretrained model."
        )
    return {}


def _finetune(script_args: FinetuneArguments, training_args: Any, model_args: Any) -> None:
    from transformers import set_seed
    from trl import get_peft_config

    from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction
    from lapa.processing.image_augmentation_lapa import LapaImageAugmentation
    from lapa.processing.processing_lapa import LapaProcessor
    from lapa.training.action_finetuning_trainer import LapaActionFinetuningTrainer

    _check_output(training_args)
    _evaluation(training_args, script_args.eval_episodes)
    if model_args.model_name_or_path is not None:
        raise ValueError("`model_name_or_path` is called `model` here.")
    if model_args.load_in_8bit or model_args.load_in_4bit:
        raise ValueError("`load_in_8bit` and `load_in_4bit` are not supported in finetuning yet.")
    _check_checkpoint(script_args.model, "lapa")
    set_seed(training_args.seed)
    columns, name = _action_columns(script_args)
    train_columns, eval_columns = columns.split(script_args.eval_episodes)
    assert columns.actions is not None
    sizes = _action_sizes(script_args, columns.actions.shape[1])
    key = script_args.unnorm_key or name
    processor = LapaProcessor.from_pretrained(script_args.model)
    if script_args.keep_latent_head is not None:
        sizes["keep_latent_head"] = script_args.keep_latent_head
    policy = LapaForActionPrediction.from_pretrained(
        script_args.model, **sizes, **_load_options(model_args.dtype, model_args.attn_implementation)
    )
    _prepare_actions(script_args, policy.config, processor, train_columns, key)
    cache, augmentation = script_args.cache_vision_codes, None
    if script_args.augmentation:
        if train_columns.images is None:
            raise ValueError("`augmentation` needs images, and `data` holds image codes.")
        augmentation = LapaImageAugmentation()
        # Before the evaluation's images are encoded, which are to be seen as the finished policy sees them.
        processor.image_processor.do_center_crop = True
    train_options = {"augmentation": augmentation, "seed": training_args.seed, "unnorm_key": key}
    trainer = LapaActionFinetuningTrainer(
        policy,
        training_args,
        _dataset(train_columns, processor, policy, cache and augmentation is None, **train_options),
        None if eval_columns is None else _dataset(eval_columns, processor, policy, cache, unnorm_key=key),
        processor,
        unnorm_key=key,
        peft_config=get_peft_config(model_args),
    )
    _train(trainer, training_args)
    trainer.save_merged()
    if trainer.is_world_process_zero():
        print(f"{training_args.output_dir}: policy after {trainer.state.global_step} steps, `unnorm_key` {key!r}")


__all__ = ["finetune", "label", "make_parser", "pretrain", "train_quantizer"]
