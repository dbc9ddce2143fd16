"""What `lapa finetune` does."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapa.training.script_arguments import FinetuneArguments
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


def _quantization(model_args: Any) -> dict[str, Any]:
    """What `from_pretrained` is told of `load_in_4bit` and the like."""
    from lapa.training.adapters import quantization_config

    config = quantization_config(
        load_in_4bit=model_args.load_in_4bit,
        load_in_8bit=model_args.load_in_8bit,
        quant_type=model_args.bnb_4bit_quant_type,
        nested=model_args.use_bnb_nested_quant,
    )
    if config is None:
        return {}
    if not model_args.use_peft:
        raise ValueError("`load_in_4bit` and `load_in_8bit` need `use_peft`: a quantised trunk takes adapters only.")
    return {"quantization_config": config}


def run_finetune(script_args: FinetuneArguments, training_args: Any, model_args: Any) -> None:
    from transformers import set_seed
    from trl import get_peft_config

    from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction
    from lapa.processing.image_augmentation_lapa import LapaImageAugmentation
    from lapa.processing.processing_lapa import LapaProcessor
    from lapa.training.action_finetuning_trainer import LapaActionFinetuningTrainer
    from lapa.training.lineage import record_latent_policy

    check_output(training_args)
    check_evaluation(training_args, script_args.eval_episodes)
    if model_args.model_name_or_path is not None:
        raise ValueError("`model_name_or_path` is called `model` here.")
    quantization = _quantization(model_args)
    check_checkpoint(script_args.model, "lapa")
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
        script_args.model, **sizes, **quantization, **load_options(model_args.dtype, model_args.attn_implementation)
    )
    record_latent_policy(policy.config, script_args.model)
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
        step_dataset(train_columns, processor, policy, cache and augmentation is None, **train_options),
        None if eval_columns is None else step_dataset(eval_columns, processor, policy, cache, unnorm_key=key),
        processor,
        unnorm_key=key,
        peft_config=get_peft_config(model_args),
    )
    run_training(trainer, training_args)
    trainer.save_merged()
    if trainer.is_world_process_zero():
        print(f"{training_args.output_dir}: policy after {trainer.state.global_step} steps, `unnorm_key` {key!r}")


__all__ = ["run_finetune"]
