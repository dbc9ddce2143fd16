"""Steps with an action of one or many sources as a stream: what a policy is finetuned on at scale."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.data.action_stats import episode_actions
from lapa.data.episode_source import EpisodeSource, OnError
from lapa.data.read_counts import BLANK_CAMERA, NO_INSTRUCTION, TOO_SHORT, ReadCounts, StepCounts
from lapa.data.schema import Episode
from lapa.data.shuffled_stream import ShuffledStream
from lapa.data.stream_cursor import Reference, StreamOptions, StreamPart
from lapa.processing.image_augmentation_lapa import LapaImageAugmentation
from lapa.processing.processing_lapa import LapaProcessor

# Reasons to leave steps out, beside `NO_INSTRUCTION`: nothing was done, the state is not known, the chunk leaves the episode.
NO_ACTION, NO_PROPRIO, PAST_END = "no_action", "no_proprio", "past_end"
# What becomes of a step whose chunk of actions leaves the episode.
PAST_END_RULES = ("drop", "repeat", "mask")
# Beside the numbers of the draws of a stream's order: these are of an example.
EXAMPLE_DRAWS = 4

Encode = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]
Prepare = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


@dataclass(frozen=True)
class ActionStepSource:
    """
    A source of episodes with what a stream of its steps needs to know.

    Args:
        source (`EpisodeSource`): The episodes.
        weight (`float`): How often it gives the next step, relative to the other sources of a stream.
        camera (`str`, *optional*): Whose frames; the source's first camera when None.
        unnorm_key (`str`, *optional*): Name of the statistics of its actions; the source's own, or its name, when None.

    Raises:
        ValueError: A camera that the source lacks.
    """

    source: EpisodeSource
    weight: float = 1.0
    camera: str | None = None
    unnorm_key: str | None = None

    def __post_init__(self) -> None:
        cameras = self.source.cameras
        if not cameras or (self.camera is not None and self.camera not in cameras):
            raise ValueError(
                f"`camera` {self.camera!r} is unknown; {self.source.name} has {', '.join(cameras) or 'none'}."
            )

    @property
    def name(self) -> str:
        """Of the source, with the camera where one was chosen."""
        return self.source.name if self.camera is None else f"{self.source.name}:{self.camera}"

    @property
    def chosen_camera(self) -> str:
        """`camera`, or the source's first."""
        return self.source.cameras[0] if self.camera is None else self.camera

    @property
    def key(self) -> str:
        """Name of the statistics of its actions."""
        return self.unnorm_key or self.source.unnorm_key or self.source.name


@dataclass(frozen=True)
class ActionWindow:
    """
    Which actions belong to a step.

    Args:
        horizon (`int`): Steps of a chunk: those at `t` to `t + horizon - 1`. At least 1.
        past_end (`str`): What becomes of a step whose chunk leaves the episode: `"drop"` leaves it out and counts it,
            `"repeat"` fills up with the last action, `"mask"` too, but says how many steps are its own
            (`num_valid_steps`), so that the others carry no loss.

    Raises:
        ValueError: An argument out of range.
    """

    horizon: int = 1
    past_end: str = "drop"

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"`action_horizon` must be at least 1, got {self.horizon}.")
        if self.past_end not in PAST_END_RULES:
            raise ValueError(f"`past_end` must be one of {', '.join(PAST_END_RULES)}, got {self.past_end!r}.")

    def num_steps(self, episode_steps: int) -> int:
        """Steps of an episode that have a chunk: all, or those whose chunk stays in it."""
        return max(0, episode_steps - self.horizon + 1) if self.past_end == "drop" else episode_steps

    def of(self, action: NDArray[np.float32], step: int) -> tuple[NDArray[np.float32], int]:
        """Chunk (horizon, action_dim) of a step, and how many of its steps lie in the episode."""
        steps = np.minimum(np.arange(step, step + self.horizon), len(action) - 1)
        return action[steps], min(self.horizon, len(action) - step)


@dataclass(frozen=True, slots=True)
class _Step:
    """A step in the buffer; those of an episode share it, frames not included."""

    episode_id: str
    source: str
    instructions: tuple[str, ...]
    step: int
    frame: NDArray[np.uint8]
    action: NDArray[np.float32]
    num_valid_steps: int
    proprio: NDArray[np.float32] | None


class ActionStepPart(StreamPart[Episode, _Step]):
    """The steps of a source, grouped by episode; a reference is the step."""

    def __init__(
        self,
        source: ActionStepSource,
        window: ActionWindow,
        use_proprio: bool,
        seed: int,
        encode: Encode | None,
        prepare: Prepare | None,
    ) -> None:
        self.source, self.name, self.weight = source.source, source.name, source.weight
        self.camera, self.unnorm_key = source.chosen_camera, source.key
        self.window, self.use_proprio, self.seed = window, use_proprio, seed
        self.any_order = self.source.any_order
        self.encode, self.prepare = encode, prepare
        self.group_counts = tuple(shard.num_episodes for shard in self.source.shards)
        self.shards_hash = self.source.shards_hash

    def description(self) -> dict[str, Any]:
        """As in `StreamPart`; shards go in by their names and numbers of episodes."""
        return {
            "name": self.name,
            "weight": self.weight,
            "camera": self.camera,
            "unnorm_key": self.unnorm_key,
            "action_horizon": self.window.horizon,
            "past_end": self.window.past_end,
            "use_proprio": self.use_proprio,
            "options": dict(self.source.options),
            "shards": [len(self.group_counts), sum(self.group_counts), self.shards_hash],
        }

    def new_counts(self) -> StepCounts:
        """As in `StreamPart`."""
        return StepCounts()

    def open(self, shard: int, groups: Sequence[int], on_error: OnError) -> Iterator[tuple[int, Episode]]:
        """As in `StreamPart`: episodes of a shard."""
        return self.source.read(shard, groups, on_error)

    def items(self, group: Episode, counts: ReadCounts) -> NDArray[np.int64]:
        """As in `StreamPart`: (num_steps, 1) steps. Those that are left out are counted, as is their episode."""
        counts.groups += 1
        reason = self._reason(group)
        if reason is not None:
            counts.skipped_groups[reason] += 1
            counts.dropped_items[reason] += group.num_steps
            return np.zeros((0, 1), dtype=np.int64)
        assert group.action is not None
        episode_actions(group.action, f"episode {group.episode_id!r} of {group.source}")
        num_steps = self.window.num_steps(group.num_steps)
        if num_steps < group.num_steps:
            counts.dropped_items[PAST_END] += group.num_steps - num_steps
        if not num_steps:
            counts.skipped_groups[TOO_SHORT] += 1
        return np.arange(num_steps, dtype=np.int64)[:, None]

    def _reason(self, episode: Episode) -> str | None:
        if self.camera not in episode.frames:
            return BLANK_CAMERA
        if episode.action is None:
            return NO_ACTION
        if not episode.instructions:
            return NO_INSTRUCTION
        return NO_PROPRIO if self.use_proprio and episode.proprio is None else None

    def read(self, group: Episode, items: NDArray[np.int64]) -> list[_Step | str]:
        """As in `StreamPart`: decodes the frames."""
        assert group.action is not None
        steps: list[int] = items[:, 0].tolist()
        read: list[_Step | str] = []
        for step, frame in zip(steps, group.read_frames(self.camera, steps)):
            chunk, num_valid = self.window.of(group.action, step)
            read.append(
                _Step(
                    group.episode_id,
                    group.source,
                    group.instructions,
                    step,
                    frame if self.prepare is None else self.prepare(frame),
                    chunk.astype(np.float32),
                    num_valid,
                    group.proprio[step] if self.use_proprio and group.proprio is not None else None,
                )
            )
        return read

    def example(self, item: _Step, reference: Reference) -> dict[str, Any]:
        """What an `ActionStepStream` yields."""
        generator = np.random.default_rng((self.seed, EXAMPLE_DRAWS, *reference))
        # Drawn before anything else, whatever the encoding draws.
        number = int(generator.integers(len(item.instructions)))
        example: dict[str, Any] = {
            "image": item.frame,
            "instruction": item.instructions[number],
            "action": item.action if self.window.horizon > 1 else item.action[0],
            "unnorm_key": self.unnorm_key,
            "episode_id": item.episode_id,
            "source": item.source,
            "step": item.step,
            "example_id": f"{item.source} {item.episode_id} step {item.step}",
        }
        if self.window.past_end == "mask":
            example["num_valid_steps"] = item.num_valid_steps
        if item.proprio is not None:
            example["proprio"] = item.proprio
        return example if self.encode is None else self.encode(example, generator)


class ActionStepStream(ShuffledStream):
    r"""
    Steps of a mixture of sources, each with the frame, an instruction and the actions from there on.

    ```python
    >>> sources = [ActionStepSource(bridge, weight=3.0), ActionStepSource(fractal)]
    >>> stream = ActionStepStream(sources, ActionStepEncoder(processor), seed=0)
    >>> for batch in StreamLoader(stream, batch_size=32, collate_fn=ActionCollator(...), num_workers=4):
    ...     ...
    ```

    Each example has `image` (height, width, 3) uint8, `instruction`, `action` (action_dim,) float32, with an
    `action_horizon` above 1 (action_horizon, action_dim), `unnorm_key`, `episode_id`, `source`, `step`, `example_id`, and
    where they are asked for `proprio` (proprio_dim,) float32 and `num_valid_steps`; or it is what `encode` makes of
    that. Steps of episodes without actions or without an instruction, of a camera that recorded nothing, and those whose
    chunk leaves the episode are left out and counted. Where an episode has several instructions one is drawn for each
    step and epoch. Order, division and state are those of [`ShuffledStream`]; what an example draws depends on the seed,
    the epoch and which step it is, on nothing else.

    Memory: one frame per step of the buffer, and 64 of the episode at hand per source, in every loader worker.

    Args:
        sources: What is read. Their names differ.
        encode: Makes a training example, as `ActionStepEncoder`; None leaves the columns above.
        prepare: Makes a frame smaller before it goes into the buffer; None keeps it.
        action_horizon, past_end: See `ActionWindow`.
        use_proprio: Whether examples have the state of the robot; steps without are left out and counted then.
        seed: Of all draws, at least 0.
        buffer_size: Steps to draw from, at least 1.
        steps_per_episode: Steps taken of each episode in an epoch, drawn at random; None takes all.
        repeat: Whether sources begin anew for ever (training), or a pass ends, with every step once.
        on_error: `"raise"` stops at what cannot be read, `"skip"` counts it and goes on.
        max_skipped: Share of the episodes of a source that may be skipped, in [0, 1]; more ends the run.
        rank, world_size: Which of how many processes this is; `RANK` and `WORLD_SIZE` of the environment when None.

    Raises:
        ValueError: An argument out of range, no source, an empty source, two sources of one name.
    """

    option_names: Mapping[str, str] = {"items_per_group": "steps_per_episode"}
    # Per `unnorm_key`, where whoever made the stream knows it: an evaluation compares with predicting it every time.
    mean_actions: Mapping[str, NDArray[np.float64]] = {}

    def __init__(
        self,
        sources: Sequence[ActionStepSource],
        encode: Encode | None = None,
        prepare: Prepare | None = None,
        *,
        action_horizon: int = 1,
        past_end: str = "drop",
        use_proprio: bool = False,
        seed: int = 0,
        buffer_size: int = 512,
        steps_per_episode: int | None = None,
        repeat: bool = True,
        on_error: str = "raise",
        max_skipped: float = 0.05,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        window = ActionWindow(action_horizon, past_end)
        parts = [ActionStepPart(source, window, use_proprio, seed, encode, prepare) for source in sources]
        options = StreamOptions(seed, buffer_size, steps_per_episode, repeat, on_error, max_skipped)
        super().__init__(parts, options, rank, world_size)


class ActionStepEncoder:
    """
    Makes training examples of the steps of an `ActionStepStream`, as `LabelledStepDataset` does of columns.

    Args:
        processor: Has the bins of every `unnorm_key`.
        augmentation: Changes each image before the image processor sees it, whose center crop is then left out.
    """

    def __init__(self, processor: LapaProcessor, augmentation: LapaImageAugmentation | None = None) -> None:
        self.processor, self.augmentation = processor, augmentation

    def prepare(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A frame as small as the policy sees it, (size, size, 3) uint8; the augmentation gets the whole one."""
        if self.augmentation is not None:
            return frame
        resized: NDArray[np.uint8] = self.processor.image_processor.resize_image(frame, do_center_crop=False)
        return resized

    def __call__(self, step: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """
        Args:
            step: What the stream yields without an encoder.
            generator: What the augmentation draws from.

        Returns:
            `input_ids` and `labels` (sequence,) int64, `pixel_values` (3, height, width) float32 in [-1, 1], `action`,
            `unnorm_key` and `example_id`.
        """
        key, image, options = step["unnorm_key"], step["image"], {}
        encoded = self.processor.encode_example(
            step["instruction"],
            action_tokens=self.processor.encode_actions(step["action"], key),
            proprio=step.get("proprio"),
            unnorm_key=key,
            num_valid_steps=step.get("num_valid_steps") if self.processor.action_horizon > 1 else None,
        )
        if self.augmentation is not None:
            image, options = self.augmentation(image, generator), {"do_center_crop": False}
        return {
            **{name: np.asarray(ids, dtype=np.int64) for name, ids in encoded.items()},
            "pixel_values": np.asarray(self.processor.image_processor(image, **options)["pixel_values"][0]),
            "action": step["action"],
            "unnorm_key": key,
            "example_id": step["example_id"],
        }


__all__ = [
    "PAST_END_RULES",
    "ActionStepEncoder",
    "ActionStepSource",
    "ActionStepStream",
    "ActionWindow",
]
