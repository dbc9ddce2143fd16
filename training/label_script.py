"""What `lapa label` does."""

import logging
import os
import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapa.training.script_arguments import LabelArguments
from lapa.training.script_tools import check_checkpoint

if TYPE_CHECKING:
    from lapa.data.label_manifest import LabelManifest, LabelSettings
    from lapa.data.mixture import FramePairSource
    from lapa.training.label_run import Labeller, PairEncoder

logger = logging.getLogger(__name__)

# Which part of the work one process does.
OWN_OPTIONS = ("shard_index", "num_shards")


def run_label(script_args: LabelArguments) -> None:
    import torch

    from lapa.hub_cards.export import check_upload
    from lapa.training.label_run import CardWriter

    check_checkpoint(script_args.model, "lapa_quantizer")
    if script_args.push_to_hub is not None:
        check_upload(script_args.push_to_hub)
    torch.set_num_threads(script_args.num_threads)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    is_main = rank == 0
    sources = open_label_sources(script_args)
    if is_main:
        for source in sources:
            for warning in source.source.warnings:
                logger.warning("%s: %s", source.name, warning)
    labeller, encoder = make_labeller(script_args, sources, rank, world_size)
    labeller.prepare()
    units = labeller.pending()
    if units:
        labeller.run(encoder, units)
    _finish(script_args, labeller, CardWriter(_name(script_args), script_args.license), is_main, bool(units))


def open_label_sources(script_args: LabelArguments) -> "tuple[FramePairSource, ...]":
    """
    Sources with what the quantizer was trained with where nothing else is said; what does not fit them is a warning.

    Raises:
        ValueError: What cannot be opened, and two sources of one name.
    """
    from lapa.training.trained_settings import open_as_trained, read_training_settings

    sources, notes = open_as_trained(script_args, read_training_settings(script_args.model))
    for note in notes:
        logger.warning("%s", note)
    names = [source.source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"`data` names {', '.join(twice)} twice: rows could not be told apart.")
    return sources


def make_labeller(
    script_args: LabelArguments, sources: "tuple[FramePairSource, ...]", rank: int = 0, world_size: int = 1
) -> "tuple[Labeller, PairEncoder]":
    """Models on their device, and who labels with them."""
    import torch

    from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizerEncoder
    from lapa.training.label_latent_actions import check_has_codes
    from lapa.training.label_reader import ReaderOptions
    from lapa.training.label_run import Labeller, PairEncoder, RunOptions
    from lapa.training.label_vision import hash_vision_tokenizer, load_vision_tokenizer

    device, dtype = _device(script_args.device), getattr(torch, script_args.dtype)
    quantizer = LapaQuantizerEncoder.from_pretrained(script_args.model, dtype=dtype).to(device)
    check_has_codes(quantizer.config)
    tokenizer, image_processor, vision_hash = None, None, None
    if script_args.vision_tokenizer is not None:
        tokenizer, image_processor = load_vision_tokenizer(script_args.vision_tokenizer)
        vision_hash = hash_vision_tokenizer(tokenizer, image_processor)
        tokenizer = tokenizer.to(device, dtype)
    num_image_tokens = None if tokenizer is None else tokenizer.config.num_image_tokens
    settings = _settings(script_args, sources, quantizer.config, device.type, vision_hash, num_image_tokens)
    reader_options = ReaderOptions(
        frame_size=quantizer.config.image_height_width,
        batch_size=script_args.batch_size,
        images=script_args.format == "parquet",
        image_size=script_args.image_size,
        image_quality=script_args.image_quality,
        keep_jpeg=script_args.keep_jpeg,
        action=settings.action,
        image_processor=image_processor,
        needs_instruction=script_args.format == "jsonl",
        skip=script_args.on_error == "skip",
    )
    options = RunOptions(
        share=script_args.shard_index * world_size + rank,
        num_shares=script_args.num_shards * world_size,
        num_workers=script_args.num_workers,
        max_skipped=script_args.max_skipped,
        show_progress=rank == 0,
        command=_command(script_args),
    )
    labeller = Labeller(Path(script_args.output), settings, sources, reader_options, options)
    return labeller, PairEncoder(quantizer, tokenizer, script_args.batch_size, script_args.compile)


def _device(name: str | None) -> Any:
    """The device that is asked for; under torchrun each process of a machine takes a GPU of its own."""
    import torch

    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % max(torch.cuda.device_count(), 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _settings(
    script_args: LabelArguments,
    sources: "tuple[FramePairSource, ...]",
    config: Any,
    device: str,
    vision_hash: str | None,
    num_image_tokens: int | None,
) -> "LabelSettings":
    from lapa.data.label_manifest import ROW_GROUP_ROWS, LabelSettings
    from lapa.training.label_latent_actions import hash_weights
    from lapa.training.label_run import package_versions, plan_units, source_settings

    return LabelSettings(
        format=script_args.format,
        sources=[source_settings(source) for source in sources],
        quantizer_hash=hash_weights(script_args.model),
        codebook_size=config.codebook_size,
        num_latent_tokens=config.num_latent_tokens,
        frame_size=list(config.image_height_width),
        num_units=len(plan_units(sources, script_args.episodes_per_unit)),
        episodes_per_unit=script_args.episodes_per_unit,
        row_group_rows=ROW_GROUP_ROWS,
        batch_size=script_args.batch_size,
        num_threads=script_args.num_threads,
        device=device,
        dtype=script_args.dtype,
        compile=script_args.compile,
        image_size=script_args.image_size,
        image_quality=script_args.image_quality,
        keep_jpeg=script_args.keep_jpeg,
        action=script_args.action and script_args.format == "parquet",
        vision_tokenizer_hash=vision_hash,
        num_image_tokens=num_image_tokens,
        versions=package_versions(),
    )


def _command(script_args: LabelArguments) -> str:
    """The command of this run for the whole of the work, without what says which part of it one process does."""
    parts = ["lapa", "label"]
    for item in fields(script_args):
        value = getattr(script_args, item.name)
        if value != item.default and item.name not in OWN_OPTIONS:
            parts += [f"--{item.name}", str(value)]
    return shlex.join(parts)


def _name(script_args: LabelArguments) -> str:
    return script_args.push_to_hub or Path(script_args.output).resolve().name


def _finish(script_args: LabelArguments, labeller: "Labeller", card: Any, is_main: bool, worked: bool) -> None:
    """Completes the folder if this process is the last to come to its end, and uploads it."""
    from lapa.data.label_manifest import LabelManifest
    from lapa.data.label_table import present_units

    folder = labeller.folder
    was_complete = LabelManifest.load(folder).complete
    manifest = labeller.finalize(card)
    if manifest is None:
        left = labeller.settings.num_units - len(present_units(folder, labeller.settings))
        print(f"{folder}: this part is done; {left} of {labeller.settings.num_units} units are still missing")
        return
    if worked and was_complete:
        # Another process came to its end at the same time, and has said it.
        return
    if is_main or worked:
        print(_summary(folder, manifest))
    if script_args.push_to_hub is not None and (is_main or worked):
        print(upload_labels(folder, script_args.push_to_hub, script_args.private))


def _summary(folder: Path, manifest: "LabelManifest") -> str:
    totals = manifest.totals
    assert totals is not None
    metrics = totals.pairs.metrics()
    left_out = [f"{name.replace('/', ': ')} {value:g}" for name, value in metrics.items() if "/" in name]
    more = f" ({', '.join(left_out)})" if left_out else ""
    return f"{folder}: {totals.rows} labelled steps of {totals.pairs.groups} episodes{more}"


def upload_labels(folder: Path, repo_id: str, private: bool = False) -> str:
    """
    Uploads a complete folder of labels as a data set repository.

    Args:
        folder: Local.
        repo_id: Made if need be.
        private: Whether a repository that is made is private.

    Returns:
        Address of the repository.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    repo = api.create_repo(repo_id, repo_type="dataset", private=private or None, exist_ok=True).repo_id
    api.upload_folder(
        folder_path=str(folder),
        repo_id=repo,
        repo_type="dataset",
        # What is unfinished begins with a dot.
        ignore_patterns=[".*", "**/.*"],
        commit_message="Labelled with lapa",
    )
    return f"https://huggingface.co/datasets/{repo}"


__all__ = ["make_labeller", "open_label_sources", "run_label", "upload_labels"]
