"""What the training scripts read: episodes of an RLDS folder, published JSONL rows."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.data.jsonl import read_rows
from lapa.data.rlds import RldsFolder, read_rlds
from lapa.data.schema import Episode

logger = logging.getLogger(__name__)

# H of the paper at the 5 Hz of BridgeV2: 0.6 s.
DEFAULT_FRAME_GAP = 3
# Written beside a trained quantizer: what `lapa label` takes up where it is told nothing else.
SETTINGS_FILE = "training_settings.json"


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
    """Frames of all episodes, one after the other, decoded when they are asked for."""

    def __init__(self, episodes: Sequence[Episode], camera: str) -> None:
        self.frames = [episode.frames[camera] for episode in episodes]
        self.positions = [(e, t) for e, episode in enumerate(episodes) for t in range(episode.num_steps)]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: Any) -> Any:
        episode, step = self.positions[item]
        return self.frames[episode][step]


def action_steps(source: EpisodeSource) -> StepColumns:
    """Every step of the episodes that have an instruction and actions."""
    with_action = [episode for episode in source.episodes if episode.action is not None]
    if not with_action:
        raise ValueError(f"`data` ({source.name}) has no actions to finetune on.")
    kept = [episode for episode in with_action if episode.instruction is not None]
    left_out = sum(e.num_steps for e in with_action) - sum(e.num_steps for e in kept)
    if not kept:
        raise ValueError(f"`data` ({source.name}) has no instructions.")
    if left_out:
        logger.warning("left out %d steps without an instruction", left_out)
    return StepColumns(
        [episode.instruction or "" for episode in kept for _ in range(episode.num_steps)],
        [episode.episode_id for episode in kept for _ in range(episode.num_steps)],
        images=EpisodeFrames(kept, source.camera),
        actions=np.concatenate([episode.action for episode in kept if episode.action is not None]),
        num_without_instruction=left_out,
    )


def jsonl_steps(path: str | Path, target: str) -> StepColumns:
    """
    Rows of a published data file: image codes, whole prompts, and codes (`delta`) or physical actions (`raw_actions`).

    Args:
        path: A file that `lapa.data.jsonl` reads.
        target: `"latent"` or `"action"`.

    Raises:
        ValueError: A row that is no such thing, named by line.
    """
    instructions, vision, targets = [], [], []
    for row in read_rows(path, target):
        if row.vision_codes is None:
            raise ValueError(f"{path} has a row with an image and without `vision`: training needs the image codes.")
        instructions.append(row.instruction)
        vision.append(row.vision_codes)
        targets.append(row.latent_action_codes if target == "latent" else row.action)
    if not instructions:
        raise ValueError(f"{path} has no rows.")
    if len({len(codes) for codes in vision}) > 1 or len({len(values) for values in targets if values is not None}) > 1:
        raise ValueError(f"{path}: rows have different numbers of image codes or targets.")
    return StepColumns(
        instructions,
        [str(number) for number in range(len(instructions))],
        vision_codes=np.stack(vision),
        latent_action_codes=np.stack(targets) if target == "latent" else None,
        actions=np.stack(targets) if target == "action" else None,
        raw_instruction=True,
    )


__all__ = [
    "DEFAULT_FRAME_GAP",
    "SETTINGS_FILE",
    "EpisodeFrames",
    "EpisodeSource",
    "StepColumns",
    "action_steps",
    "frame_gap_of",
    "hold_out",
    "jsonl_steps",
    "load_rlds",
]
