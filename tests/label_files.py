"""Small folders of labels, written without a quantizer."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from video_files import moving_frames

from lapa.data.label_manifest import LabelManifest, LabelSettings, SourceSettings, unit_file
from lapa.data.label_table import label_schema


def label_settings(num_units: int, row_group_rows: int = 4, **changes: Any) -> LabelSettings:
    """Settings of codes (2,) out of 8."""
    source = SourceSettings(
        name="set/train",
        camera="front",
        frame_gap=2,
        frame_gap_seconds=None,
        filters=[],
        num_shards=1,
        num_episodes=2 * num_units,
        shards_hash="abc",
    )
    sizes = {"codebook_size": 8, "num_latent_tokens": 2, "frame_size": [16, 16], "num_image_tokens": None}
    values: dict[str, Any] = {
        "format": "parquet",
        "sources": [source],
        "quantizer_hash": "abc",
        **sizes,
        "num_units": num_units,
        "episodes_per_unit": 2,
        "row_group_rows": row_group_rows,
        "batch_size": 4,
        "num_threads": 1,
        "device": "cpu",
        "dtype": "float32",
        "compile": False,
        "image_size": None,
        "image_quality": 95,
        "keep_jpeg": True,
        "action": True,
        "vision_tokenizer_hash": None,
        "versions": {"lapa": "1"},
    }
    return LabelSettings(**values | changes)


def label_rows(num_steps: int = 4) -> list[dict[str, Any]]:
    """Rows of episodes `a` and `b`; only those of `a` have an instruction."""
    frames = moving_frames(num_steps)
    return [
        {
            "episode_id": episode,
            "step_index": step,
            "timestamp": step / 5,
            "image": {"bytes": _png(frames[step]), "path": None},
            "next_frame_offset": 2,
            "instruction": "push" if episode == "a" else None,
            "latent_action_codes": [step % 8, 7],
            "action": [1.0, float(step)],
            "embodiment": "widowx",
            "unnorm_key": None,
            "source": "set/train",
        }
        for episode in ("a", "b")
        for step in range(num_steps)
    ]


def write_label_folder(
    folder: Path, units: Mapping[int, Sequence[Mapping[str, Any]]], settings: LabelSettings
) -> LabelManifest:
    """Writes the units that are given by their rows; the folder is complete where these are all."""
    (folder / "data").mkdir(parents=True)
    complete = len(units) == settings.num_units
    manifest = LabelManifest(settings, complete, None if complete else "lapa label --again")
    for index, rows in units.items():
        name = unit_file(index, settings.num_units, "parquet")
        table = pa.Table.from_pylist(list(rows), label_schema(settings))
        pq.write_table(table, folder / name, row_group_size=settings.row_group_rows)
        if complete:
            manifest.units.append({"file": name, "source": 0, "shard": 0, "episodes": [0, 2], "rows": len(rows)})
    manifest.save(folder)
    return manifest


def _png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


__all__ = ["label_rows", "label_settings", "write_label_folder"]
