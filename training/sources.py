"""What the training scripts read: episodes of an RLDS folder, published JSONL rows."""

import logging
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
from lapa.data.rlds import RldsFolder, read_rlds
from lapa.data.schema import Episode, ReadError

logger = logging.getLogger(__name__)

# H of the paper at the 5 Hz of BridgeV2: 0.6 s.
DEFAULT_FRAME_GAP = 3


@dataclass
class EpisodeSource:
    """
    Episodes with one camera that all of them have.

    Args:
        name (`str`): Of the data set.
        camera (`str`): Camera that is read.
        episodes (`list[Episode]`): In the order of the files.
        num_without_camera (`int`): Episodes left out because that camera recorded nothing.
    """

    name: str
    camera: str
    episodes: list[Episode]
    num_without_camera: int = 0


def load_rlds(
    path: str, split: str = "train", camera: str | None = None, frequency: float | None = None
) -> EpisodeSource:
    """
    Episodes of an RLDS folder.

    Args:
        path: Version folder.
        split: Split to read.
        camera: Camera to read; the folder's first one when None. Episodes where it recorded nothing are left out.
        frequency: Control steps per second, which RLDS does not record.

    Raises:
        ValueError: No RLDS folder, an unknown split or camera, no episode left.
    """
    folder = RldsFolder(path)
    if not folder.cameras:
        raise ValueError(f"`data` ({path}) has no camera among its observations.")
    camera = folder.cameras[0] if camera is None else camera
    episodes = list(read_rlds(path, split, cameras=[camera], frequency=frequency))
    kept = [episode for episode in episodes if camera in episode.frames]
    if not kept:
        raise ValueError(
            f"`data` ({path}) has no episode in split {split!r} whose camera {camera!r} recorded anything."
        )
    if len(kept) < len(episodes):
        logger.warning(
            "left out %d of %d episodes: camera %r is blank", len(episodes) - len(kept), len(episodes), camera
        )
    name = str(folder.info.get("name") or Path(path).resolve().parent.name)
    return EpisodeSource(name, camera, kept, len(episodes) - len(kept))


def hold_out(items: Sequence[Any], count: int, what: str) -> tuple[list[Any], list[Any]]:
    """Splits the last `count` off; refuses to leave nothing to train on."""
    if not 0 <= count < len(items):
        raise ValueError(f"`eval_episodes` must lie in [0, {len(items) - 1}] for {len(items)} {what}, got {count}.")
    return list(items[: len(items) - count]), list(items[len(items) - count :])


def frame_gap_of(episode: Episode, frame_gap: int | None, frame_gap_seconds: float | None) -> int:
    """Gap in frames, from whichever of the two is given; both None is `DEFAULT_FRAME_GAP`."""
    if frame_gap_seconds is None:
        return DEFAULT_FRAME_GAP if frame_gap is None else frame_gap
    if frame_gap is not None:
        raise ValueError(
            f"`frame_gap` ({frame_gap}) and `frame_gap_seconds` ({frame_gap_seconds}) exclude each other; give one."
        )
    if episode.timestamps is None:
        raise ValueError(
            "`frame_gap_seconds` needs to know the time between frames, which this source does not record: give its "
            "`frequency`, or a `frame_gap` in frames."
        )
    if episode.num_steps < 2:
        return 1
    return max(1, round(frame_gap_seconds / float(np.median(np.diff(episode.timestamps)))))


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
    """

    instructions: list[str]
    episode_ids: list[str]
    images: Any = None
    vision_codes: NDArray[np.int64] | None = None
    latent_action_codes: NDArray[np.int64] | None = None
    actions: NDArray[np.float32] | None = None
    raw_instruction: bool = False
    num_without_instruction: int = field(default=0)

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
    )


__all__ = [
    "DEFAULT_FRAME_GAP",
    "EpisodeFrames",
    "EpisodeSource",
    "StepColumns",
    "action_steps",
    "frame_gap_of",
    "hold_out",
    "jsonl_steps",
    "load_rlds",
]
