"""What `lapa train-quantizer` does."""

import json
from pathlib import Path
from typing import Any

from lapa.training.script_arguments import QuantizerArguments, read_config
from lapa.training.script_tools import check_checkpoint, check_evaluation, check_output, run_training


def run_train_quantizer(script_args: QuantizerArguments, training_args: Any) -> None:
    from transformers import set_seed

    from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
    from lapa.data.frame_pairs import FramePairDataset
    from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer
    from lapa.training.quantizer_trainer import LapaQuantizerTrainer
    from lapa.training.sources import SETTINGS_FILE, frame_gap_of, hold_out, load_rlds

    check_output(training_args)
    check_evaluation(training_args, script_args.eval_episodes)
    sizes = read_config(script_args.quantizer_config, LapaQuantizerConfig, "quantizer_config")
    set_seed(training_args.seed)
    if script_args.model is not None:
        if sizes:
            raise ValueError("`quantizer_config` and `model` exclude each other: a trained model has its sizes.")
        check_checkpoint(script_args.model, "lapa_quantizer")
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
    run_training(trainer, training_args)
    trainer.save_model()
    if trainer.is_world_process_zero():
        from lapa.training.label_latent_actions import write_atomically

        names = ("frame_gap", "frame_gap_seconds", "frequency", "camera")
        settings = {name: getattr(script_args, name) for name in names} | {"camera": source.camera}
        write_atomically(Path(training_args.output_dir) / SETTINGS_FILE, json.dumps(settings, indent=2).encode())
        print(f"{training_args.output_dir}: quantizer after {trainer.state.global_step} steps")


__all__ = ["run_train_quantizer"]
