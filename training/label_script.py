"""What `lapa label` does."""

import json
from pathlib import Path
from typing import Any

from lapa.training.script_arguments import LabelArguments
from lapa.training.script_tools import check_checkpoint


def run_label(script_args: LabelArguments) -> None:
    import torch

    from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizerEncoder
    from lapa.training.label_latent_actions import (
        LabelManifest,
        check_has_codes,
        episode_rows,
        hash_weights,
        label_episodes,
        write_labels,
    )
    from lapa.training.sources import SETTINGS_FILE, frame_gap_of, load_rlds

    check_checkpoint(script_args.model, "lapa_quantizer")
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
    check_has_codes(quantizer.config)
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


__all__ = ["run_label"]
