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
    from lapa.training.action_data import ActionData
    from lapa.training.sources import StepColumns


def _action_sizes(script_args: FinetuneArguments, source: "LapaConfig", action_dim: int) -> dict[str, Any]:
    """What the policy becomes for these actions; one that has action rows must have room for them already."""
    given = {name: getattr(script_args, name) for name in ("action_horizon", "use_proprio", "keep_latent_head")}
    sizes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not source.has_action_segment:
        bins = {} if script_args.num_bins is None else {"action_vocab_size": script_args.num_bins}
        return {**sizes, "action_dim": action_dim, **bins}
    if source.action_dim < action_dim or (script_args.num_bins or 0) > source.action_vocab_size:
        raise ValueError(
            f"`model` ({script_args.model}) has actions of {source.action_dim} dimensions and {source.action_vocab_size} "
            f"bins, the data have {action_dim} dimensions (`num_bins` {script_args.num_bins}): start from a "
            "latent-pretrained model."
        )
    return sizes


def _file_datasets(
    script_args: FinetuneArguments, columns: "StepColumns", processor: "LapaProcessor", policy: Any, key: str
) -> tuple[Any, Any]:
    """Data sets of a published file, or of a source that fits memory."""
    train, held = columns.split(script_args.eval_episodes)
    if script_args.action_bins is not None:
        processor.load_action_csv(script_args.action_bins, key)
    elif key not in processor.action_statistics:
        from lapa.training.action_data import gripper_dimension

        assert train.actions is not None
        processor.fit_actions(train.actions, key, script_args.num_bins, gripper_dimension(script_args))
    return _in_memory(train, processor, policy, key), _in_memory(held, processor, policy, key)


def _in_memory(columns: "StepColumns | None", processor: "LapaProcessor", policy: Any, key: str) -> Any:
    return None if columns is None else step_dataset(columns, processor, policy, True, unnorm_key=key)


def _source_datasets(
    script_args: FinetuneArguments, training_args: Any, data: "ActionData", processor: "LapaProcessor", policy: Any
) -> tuple[Any, Any]:
    """Data sets of a source or a mixture: in memory with their image codes where they are small, else a stream."""
    from lapa.data.action_stream import ActionStepEncoder, ActionWindow
    from lapa.processing.image_augmentation_lapa import LapaImageAugmentation

    data.set_statistics(processor)
    window = ActionWindow(processor.action_horizon, script_args.past_end)
    if data.fits_memory(window, processor.use_proprio):
        (key,) = data.statistics
        train, held = data.columns(training_args.output_dir, training_args.process_index == 0)
        return _in_memory(train, processor, policy, key), _in_memory(held, processor, policy, key)
    if policy.model.vision_tokenizer is None:
        raise ValueError("the policy has no vision tokenizer, so it cannot train on images: give rows of image codes.")
    encoder = ActionStepEncoder(processor, LapaImageAugmentation() if script_args.augmentation else None)
    stream, sample = data.stream(encoder, window, processor.use_proprio, training_args)
    stream.mean_actions = {key: entry.action.mean for key, entry in data.statistics.items()}
    return stream, sample


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

    from lapa.configuration.configuration_lapa import LapaConfig
    from lapa.data.jsonl import holds_published_rows
    from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction
    from lapa.processing.processing_lapa import LapaProcessor
    from lapa.training.action_data import open_action_data
    from lapa.training.action_finetuning_trainer import LapaActionFinetuningTrainer
    from lapa.training.lineage import record_latent_policy
    from lapa.training.sources import jsonl_steps

    check_output(training_args)
    check_evaluation(training_args, script_args.eval_episodes)
    if model_args.model_name_or_path is not None:
        raise ValueError("`model_name_or_path` is called `model` here.")
    quantization = _quantization(model_args)
    check_checkpoint(script_args.model, "lapa")
    set_seed(training_args.seed)
    source_config = LapaConfig.from_pretrained(script_args.model)
    wants_proprio = source_config.use_proprio if script_args.use_proprio is None else script_args.use_proprio
    columns = data = None
    if script_args.kind is None and holds_published_rows(script_args.data):
        if script_args.augmentation:
            raise ValueError("`augmentation` needs images, and `data` holds image codes.")
        columns = jsonl_steps(script_args.data, "action")
        assert columns.actions is not None
        action_dim, keys = (
            columns.actions.shape[1],
            [script_args.unnorm_key or Path(script_args.data).name.split(".")[0]],
        )
    else:
        data = open_action_data(script_args, training_args, wants_proprio)
        action_dim, keys = data.action_dim, list(data.statistics)
    sizes = _action_sizes(script_args, source_config, action_dim)
    processor = LapaProcessor.from_pretrained(script_args.model)
    policy = LapaForActionPrediction.from_pretrained(
        script_args.model, **sizes, **quantization, **load_options(model_args.dtype, model_args.attn_implementation)
    )
    record_latent_policy(policy.config, script_args.model)
    for name in ("action_dim", "action_vocab_size", "action_horizon", "use_proprio"):
        setattr(processor, name, getattr(policy.config, name))
    if script_args.augmentation:
        # Before the evaluation's images are encoded, which are to be seen as the finished policy sees them.
        processor.image_processor.do_center_crop = True
    if columns is not None:
        train, evaluation = _file_datasets(script_args, columns, processor, policy, keys[0])
    else:
        train, evaluation = _source_datasets(script_args, training_args, data, processor, policy)
    trainer = LapaActionFinetuningTrainer(
        policy,
        training_args,
        train,
        evaluation,
        processor,
        unnorm_key=keys[0] if len(keys) == 1 else None,
        peft_config=get_peft_config(model_args),
    )
    run_training(trainer, training_args)
    trainer.save_merged()
    if trainer.is_world_process_zero():
        named = ", ".join(map(repr, keys))
        print(f"{training_args.output_dir}: policy after {trainer.state.global_step} steps, `unnorm_key` {named}")


__all__ = ["run_finetune"]
