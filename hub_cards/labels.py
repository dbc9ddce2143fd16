"""Renders the dataset card of a folder that `lapa label` wrote."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from lapa.hub_cards.card import PAPER, _environment, _tidy

COLUMNS = {
    "episode_id": ("string", "which recording of `source`"),
    "step_index": ("int64", "step of the recording that the pair begins at, from 0"),
    "timestamp": ("float64", "seconds from the first frame; null where the source does not tell"),
    "image": ("Image", "frame at that step, JPEG"),
    "next_frame_offset": ("int64", "steps from it to the second frame of the pair"),
    "instruction": ("string", "what is done; null where nothing says so"),
    "latent_action_codes": ("list of int64", "codes of what changes between the two frames"),
    "vision_codes": ("list of int64", "codes of `image` by the vision tokenizer"),
    "action": ("list of float32", "action at that step as the source gives it; null where there is none"),
    "embodiment": ("string", "robot or person"),
    "unnorm_key": ("string", "name of the statistics of its actions"),
    "source": ("string", "data set and split"),
}
JSONL_COLUMNS = {
    "vision": ("list of int", "codes of the image by the vision tokenizer"),
    "instruction": ("string", "the whole prompt, as the published code trains on it"),
    "delta": ("list of string", "latent action codes"),
    "fields": ("string", "order of the parts in training"),
}
# What of the settings is told one by one in a place of its own, or is of no use to a reader.
NOT_LISTED = ("sources", "versions", "format", "row_group_rows", "action", "codebook_size", "num_latent_tokens")


def perplexity(counts: Sequence[int]) -> float:
    """exp of the entropy of a distribution given by counts: how many codes are in use, evened out."""
    total = sum(counts)
    shares = [count / total for count in counts if count]
    return math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0


def code_usage(code_counts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Per place of a latent action, and over all of them (`place` "all"): codes used, perplexity, share of the commonest."""
    rows = [*enumerate(code_counts), ("all", [sum(column) for column in zip(*code_counts)])]
    return [
        {
            "place": place,
            "used": sum(count > 0 for count in counts),
            "perplexity": perplexity(counts),
            "largest": max(counts, default=0) / max(sum(counts), 1),
        }
        for place, counts in rows
    ]


def render_labels_card(manifest: Mapping[str, Any], name: str, license: str | None = None) -> DatasetCard:
    """
    Renders the card.

    Args:
        manifest: Content of a complete `labels.json`.
        name: Repository or folder that the snippets load.
        license: Of the labels, as the Hub names it; sources keep their own.
    """
    settings, totals = manifest["settings"], manifest["totals"]
    jsonl = settings["format"] == "jsonl"
    columns = JSONL_COLUMNS if jsonl else COLUMNS
    absent = {"vision_codes": settings["vision_tokenizer_hash"] is None, "action": not settings["action"]}
    data = DatasetCardData(
        license=license,
        task_categories=["robotics"],
        tags=["robotics", "lapa", "latent-action", PAPER],
        pretty_name=name.rpartition("/")[2],
        configs=[{"config_name": "default", "data_files": f"data/*.{settings['format']}"}],
        size_categories=[_size_category(totals["rows"])],
    )
    text = (
        _environment()
        .get_template("labels.md.j2")
        .render(
            title=name.rpartition("/")[2],
            name=name,
            jsonl=jsonl,
            settings=settings,
            listed={key: value for key, value in settings.items() if key not in NOT_LISTED and value is not None},
            totals=totals,
            sources=[{**source, **manifest["sources"][source["name"]]} for source in settings["sources"]],
            usage=code_usage(totals["code_counts"]),
            columns=[(key, *columns[key]) for key in columns if jsonl or not absent.get(key)],
            license=license,
        )
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{_tidy(text)}")


def _size_category(rows: int) -> str:
    """The Hub's name for a number of rows."""
    limits = [(1e3, "1K"), (1e4, "10K"), (1e5, "100K"), (1e6, "1M"), (1e7, "10M"), (1e8, "100M"), (1e9, "1B")]
    if rows < limits[0][0]:
        return "n<1K"
    for (_, low), (high, name) in pairwise(limits):
        if rows < high:
            return f"{low}<n<{name}"
    return "n>1B"


__all__ = ["code_usage", "perplexity", "render_labels_card"]
