"""What the training scripts hold in memory: steps of a source, published JSONL rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.data.action_stream import ActionStepPart
from lapa.data.episode_source import SkippedEpisodes, read_or_skip
from lapa.data.jsonl import read_rows
from lapa.data.read_counts import UNREADABLE, ReadCounts
from lapa.data.schema import Episode, ReadError


def hold_out(items: Sequence[Any], count: int, what: str) -> tuple[list[Any], list[Any]]:
    """Splits the last `count` off; refuses to leave nothing to train on."""
    if not 0 <= count < len(items):
        raise ValueError(f"`eval_episodes` must lie in [0, {len(items) - 1}] for {len(items)} {what}, got {count}.")
    return list(items[: len(items) - count]), list(items[len(items) - count :])


@dataclass
class StepColumns:
    """
    Columns of steps, as `LabelledStepDataset` takes them.

    Args:
        instructions (`list[str]`): One per step.
        episode_ids (`list[str]`): Which episode each step belongs to.
        images (`Sequence`, *optional*): One per step, decoded when read.
        vision_codes (`NDArray`, *optional*): (num_steps, num_image_tokens) int64.
        latent_action_codes (`NDArray`, *optional*): (num_steps, num_latent_tokens) int64.
        actions (`NDArray`, *optional*): (num_steps, action_dim) float32, physical units.
        raw_instruction (`bool`): Whether instructions are whole prompts.
        num_without_instruction (`int`): Steps left out because they say nothing of what to do.
        example_ids (`list[str]`, *optional*): Which step each is, for reports.
    """

    instructions: list[str]
    episode_ids: list[str]
    images: Any = None
    vision_codes: NDArray[np.int64] | None = None
    latent_action_codes: NDArray[np.int64] | None = None
    actions: NDArray[np.float32] | None = None
    raw_instruction: bool = False
    num_without_instruction: int = field(default=0)
    example_ids: list[str] | None = None

    def split(self, eval_episodes: int) -> tuple["StepColumns", "StepColumns | None"]:
        """Holds the steps of the last `eval_episodes` episodes out; None where that is 0."""
        if eval_episodes == 0:
            return self, None
        names = list(dict.fromkeys(self.episode_ids))
        held = set(hold_out(names, eval_episodes, "episodes")[1])
        chosen = np.array([name in held for name in self.episode_ids])
        return self._take(np.flatnonzero(~chosen)), self._take(np.flatnonzero(chosen))

    def _take(self, rows: NDArray[np.int64]) -> "StepColumns":
        def column(values: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if values is None else values[rows]

        return StepColumns(
            [self.instructions[row] for row in rows],
            [self.episode_ids[row] for row in rows],
            None if self.images is None else LazyRows(self.images, rows),
            column(self.vision_codes),
            column(self.latent_action_codes),
            column(self.actions),
            self.raw_instruction,
            example_ids=None if self.example_ids is None else [self.example_ids[row] for row in rows],
        )


class LazyRows(Sequence[Any]):
    """Some rows of a sequence, read when they are asked for."""

    def __init__(self, rows: Any, index: NDArray[np.int64]) -> None:
        self.rows = rows
        self.positions = index

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: Any) -> Any:
        return self.rows[int(self.positions[item])]


class EpisodeFrames(Sequence[NDArray[np.uint8]]):
    """Frames of some steps of episodes, one after the other, decoded when they are asked for."""

    def __init__(self, episodes: Sequence[tuple[Episode, NDArray[np.int64]]], camera: str) -> None:
        self.camera = camera
        self.positions = [(episode, step) for episode, steps in episodes for step in steps.tolist()]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: Any) -> Any:
        episode, step = self.positions[item]
        return episode.frame(self.camera, step)


def action_steps(part: ActionStepPart, counts: ReadCounts, skipped: SkippedEpisodes | None) -> StepColumns:
    """
    All steps of a source, for data that fit memory; frames stay encoded until they are asked for.

    Args:
        part: The source, one step per action (no chunks).
        counts: What was kept and left out is added to it.
        skipped: Counts episodes that cannot be read; None raises at the first.
    """
    kept: list[tuple[Episode, NDArray[np.int64]]] = []
    for shard, count in enumerate(part.group_counts):
        num_read = counts.groups
        for _, episode in read_or_skip(part.source, shard, skipped):
            try:
                steps = part.items(episode, counts)[:, 0]
            except ReadError as error:
                if skipped is None:
                    raise
                skipped(error)
                counts.skipped_groups[UNREADABLE] += 1
                continue
            if skipped is not None:
                skipped.seen()
            counts.items += len(steps)
            kept += [(episode, steps)] if len(steps) else []
        if num_read + count > counts.groups:
            counts.skipped_groups[UNREADABLE] += num_read + count - counts.groups
            counts.groups = num_read + count
    actions = [episode.action[steps] for episode, steps in kept if episode.action is not None]
    return StepColumns(
        [episode.instruction or "" for episode, steps in kept for _ in steps],
        [episode.episode_id for episode, steps in kept for _ in steps],
        images=EpisodeFrames(kept, part.camera),
        actions=np.concatenate(actions).astype(np.float32) if actions else None,
        example_ids=[
            f"{episode.source} {episode.episode_id} step {step}" for episode, steps in kept for step in steps.tolist()
        ],
    )


def jsonl_steps(path: str | Path, target: str) -> StepColumns:
    """
    Rows of a published data file: image codes, whole prompts, and codes (`delta`) or physical actions (`raw_actions`).

    Args:
        path: A `.jsonl` or `.jsonl.gz` file.
        target: `"latent"` or `"action"`.

    Raises:
        ValueError: A row that is no such thing, named by line.
    """
    rows = list(read_rows(path, target))
    if not rows:
        raise ValueError(f"{path} has no rows.")
    for number, row in enumerate(rows, start=1):
        if row.vision_codes is None:
            raise ValueError(
                f"{path}, row {number}: `vision` is missing, only rows with image codes can be trained on."
            )
    latent = target == "latent"
    columns = [[row.vision_codes for row in rows], [row.latent_action_codes if latent else row.action for row in rows]]
    try:
        vision, values = (np.array(column) for column in columns)
    except ValueError as error:
        raise ValueError(f"{path}: rows have different numbers of image codes or targets.") from error
    return StepColumns(
        [row.prompt for row in rows],
        [str(number) for number in range(len(rows))],
        vision_codes=vision,
        latent_action_codes=values if latent else None,
        actions=None if latent else values,
        raw_instruction=True,
        example_ids=[f"{path}, row {number}" for number in range(1, len(rows) + 1)],
    )


__all__ = [
    "EpisodeFrames",
    "StepColumns",
    "action_steps",
    "hold_out",
    "jsonl_steps",
]
