"""What `lapa train-quantizer` does."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapa.training.script_arguments import QuantizerArguments, read_config
from lapa.training.script_tools import (
    check_checkpoint,
    check_evaluation,
    check_output,
    data_seed,
    log_warnings,
    run_training,
)

if TYPE_CHECKING:
    from lapa.data.mixture import FramePairSource, FramePairStream

logger = logging.getLogger(__name__)


def _held_out(sources: "tuple[FramePairSource, ...]", count: int) -> "tuple[list[FramePairSource], ...]":
    """Sources to train on and sources to evaluate on: the last `count` episodes of each."""
    from lapa.data.episode_range import hold_out_last

    train, evaluation = [], []
    for source in sources:
        rest, held = hold_out_last(source.source, count)
        train.append(replace(source, source=rest))
        if held is not None:
            evaluation.append(replace(source, source=held))
    return train, evaluation


def _streams(
    script_args: QuantizerArguments, training_args: Any, image_size: tuple[int, int]
) -> "tuple[FramePairStream, FramePairStream | None]":
    """Pairs to train on, and those to evaluate on where any are held out."""
    from lapa.data.mixture import FramePairStream

    sources = script_args.open_sources()
    log_warnings(source.source for source in sources)
    train, evaluation = _held_out(sources, script_args.eval_episodes)
    options: dict[str, Any] = {
        "seed": data_seed(training_args),
        "on_error": script_args.on_error,
        "max_skipped": script_args.max_skipped,
    }
    stream = FramePairStream(
        train,
        image_size,
        buffer_size=script_args.buffer_size,
        pairs_per_episode=script_args.pairs_per_episode,
        **options,
    )
    if not evaluation:
        return stream, None
    return stream, FramePairStream(evaluation, image_size, rank=0, world_size=1, **options)


def _evaluation_examples(stream: "FramePairStream | None", count: int) -> Any:
    from lapa.training.stream_training import ExampleList

    if stream is None:
        return None
    examples = stream.sample(count)
    if not examples:
        raise ValueError("`eval_episodes` are held out, but they have no pairs to read.")
    return ExampleList(examples)


# Pairs that are looked at to standardise actions by.
NUM_ACTION_EXAMPLES = 1024


def _make_model(script_args: QuantizerArguments, sizes: dict[str, Any]) -> Any:
    """A fresh quantizer, one to train on, or a second stage on top of a first one."""
    from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
    from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer

    if script_args.model is None:
        if sizes.get("task_centric"):
            raise ValueError("`task_centric` needs a first stage: give its folder as `model`.")
        return LapaQuantizer(LapaQuantizerConfig(**sizes))
    check_checkpoint(script_args.model, "lapa_quantizer")
    if sizes == {"task_centric": True}:
        return LapaQuantizer.from_first_stage(script_args.model)
    if sizes:
        raise ValueError(
            "`quantizer_config` and `model` exclude each other: a trained model has its sizes. Only `task_centric: true`, "
            "alone, goes with a `model`."
        )
    return LapaQuantizer.from_pretrained(script_args.model)


def _standardise_actions(config: Any, stream: "FramePairStream", share: float) -> None:
    """Fills in `action_mean` and `action_std` where a quantizer that reads actions off lacks them."""
    from lapa.training.pair_conditions import action_statistics

    if config.action_dim is None or config.action_std is not None:
        return
    for name, values in action_statistics(stream.sample(NUM_ACTION_EXAMPLES), config.action_dim, share).items():
        setattr(config, name, values)


def run_train_quantizer(script_args: QuantizerArguments, training_args: Any) -> None:
    from transformers import set_seed

    from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
    from lapa.training.pair_conditions import QuantizerCollator
    from lapa.training.quantizer_trainer import LapaQuantizerTrainer
    from lapa.training.trained_settings import training_settings

    check_output(training_args)
    check_evaluation(training_args, script_args.eval_episodes)
    sizes = read_config(script_args.quantizer_config, LapaQuantizerConfig, "quantizer_config")
    set_seed(training_args.seed)
    model = _make_model(script_args, sizes)
    stream, eval_stream = _streams(script_args, training_args, model.config.image_height_width)
    evaluation = _evaluation_examples(eval_stream, script_args.eval_pairs)
    _standardise_actions(model.config, stream, script_args.action_share)
    collator = QuantizerCollator(model.config, script_args.action_share)
    trainer = LapaQuantizerTrainer(model, training_args, stream, evaluation, data_collator=collator)
    trainer.add_callback(_settings_writer(training_settings(script_args, stream)))
    run_training(trainer, training_args)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"{training_args.output_dir}: quantizer after {trainer.state.global_step} steps")


def _settings_writer(settings: dict[str, Any]) -> Any:
    """
    The callback that writes the settings once there is something to train on: one that is stopped leaves them, too, and one
    that finds no pair leaves nothing.
    """
    from transformers import TrainerCallback

    from lapa.training.stream_training import write_json
    from lapa.training.trained_settings import SETTINGS_FILE

    class SettingsWriter(TrainerCallback):
        written = False

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero and not self.written:
                Path(args.output_dir).mkdir(parents=True, exist_ok=True)
                write_json(Path(args.output_dir) / SETTINGS_FILE, settings, indent=2)
            self.written = True

    return SettingsWriter()


__all__ = ["run_train_quantizer"]
