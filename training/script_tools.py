"""What the scripts of the stages share: checks of folders, the training itself, training examples of steps."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lapa.data.episode_source import EpisodeSource
    from lapa.processing.processing_lapa import LapaProcessor
    from lapa.training.sources import StepColumns

logger = logging.getLogger(__name__)


def data_seed(training_args: Any) -> int:
    """Seed of the order of the data."""
    seed: int = training_args.seed if training_args.data_seed is None else training_args.data_seed
    return seed


def log_warnings(sources: "Iterable[EpisodeSource]") -> None:
    """Says what the sources announce and lack."""
    for source in sources:
        for warning in source.warnings:
            logger.warning("%s: %s", source.name, warning)


def check_checkpoint(folder: str, model_type: str, argument: str = "model") -> None:
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


def check_output(training_args: Any) -> None:
    """Refuses a run without an output folder."""
    if training_args.output_dir is None:
        raise ValueError("`output_dir` must be given.")
    path = Path(training_args.output_dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"`output_dir` is a file: {path}.")


def check_evaluation(training_args: Any, eval_episodes: int) -> None:
    """Refuses an evaluation without anything held out."""
    if training_args.eval_strategy != "no" and eval_episodes == 0:
        raise ValueError(f"`eval_strategy` {str(training_args.eval_strategy)!r} needs `eval_episodes` above 0.")


def run_training(trainer: Any, training_args: Any) -> None:
    """Trains, from the checkpoint `resume_from_checkpoint` names (`last`: the newest, if there is one).

    A checkpoint that a killed run did not finish is passed over. The output folder gets the metrics of the evaluation
    and, in `trainer_state.json`, the log of the whole run.
    """
    from lapa.training.safe_checkpoints import last_checkpoint, why_incomplete
    from lapa.training.stream_training import REPORT_FILE

    resume = training_args.resume_from_checkpoint
    if resume is not None and resume.lower() in ("last", "true"):
        resume = last_checkpoint(training_args.output_dir)
    elif resume is not None and not Path(resume).is_dir():
        raise ValueError(f"`resume_from_checkpoint` must be `last` or a checkpoint folder, got {resume!r}.")
    elif resume is not None and (reason := why_incomplete(resume)) is not None:
        raise ValueError(f"{resume} cannot be resumed: {reason}. `last` takes the newest whole checkpoint.")
    trainer.train(resume_from_checkpoint=resume)
    if trainer.data_report is not None and trainer.is_world_process_zero():
        print(f"{Path(training_args.output_dir) / REPORT_FILE}: read {trainer.data_report.summary()}")
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    trainer.save_state()


def load_options(dtype: str | None, attn_implementation: str | None) -> dict[str, Any]:
    """Those of the two that are given, as `from_pretrained` takes them."""
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    return {name: value for name, value in options.items() if value is not None}


def step_dataset(columns: "StepColumns", processor: "LapaProcessor", policy: Any, cache: bool, **kwargs: Any) -> Any:
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
        example_ids=columns.example_ids,
        cache=images is None,
        **kwargs,
    )


__all__ = [
    "check_checkpoint",
    "check_evaluation",
    "check_output",
    "data_seed",
    "load_options",
    "log_warnings",
    "run_training",
    "step_dataset",
]
