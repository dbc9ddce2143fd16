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


def run_train_quantizer(script_args: QuantizerArguments, training_args: Any) -> None:
    from transformers import set_seed

    from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
    from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer
    from lapa.training.quantizer_trainer import LapaQuantizerTrainer
    from lapa.training.sources import SETTINGS_FILE
    from lapa.training.stream_training import write_json

    check_output(training_args)
    check_evaluation(training_args, script_args.eval_episodes)
    sizes = read_config(script_args.quantizer_config, LapaQuantizerConfig, "quantizer_config")
    set_seed(training_args.seed)
    if script_args.model is not None:
        if sizes:
            raise ValueError("`quantizer_config` and `model` exclude each other: a trained model has its sizes.")
        check_checkpoint(script_args.model, "lapa_quantizer")
        config = LapaQuantizerConfig.from_pretrained(script_args.model)
    else:
        config = LapaQuantizerConfig(**sizes)
    stream, eval_stream = _streams(script_args, training_args, config.image_height_width)
    evaluation = _evaluation_examples(eval_stream, script_args.eval_pairs)
    model = LapaQuantizer(config) if script_args.model is None else LapaQuantizer.from_pretrained(script_args.model)
    trainer = LapaQuantizerTrainer(model, training_args, stream, evaluation)
    run_training(trainer, training_args)
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_json(Path(training_args.output_dir) / SETTINGS_FILE, _settings(script_args, stream), indent=2)
        print(f"{training_args.output_dir}: quantizer after {trainer.state.global_step} steps")


def _settings(script_args: QuantizerArguments, stream: "FramePairStream") -> dict[str, Any]:
    """What `lapa label` takes up where it is told nothing else, and all that the pairs depended on."""
    names = ("frame_gap", "frame_gap_seconds", "frequency", "camera", "filters")
    settings = {name: getattr(script_args, name) for name in names}
    description = stream.description()
    if len(stream.parts) == 1 and settings["camera"] is None:
        settings["camera"] = description["sources"][0]["camera"]
    return settings | {"data": script_args.data, "mixture": description}


__all__ = ["run_train_quantizer"]
