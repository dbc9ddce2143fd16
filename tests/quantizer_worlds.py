"""A world of a moving blob under a moving camera, and quantizers of it that are exactly good or exactly bad.

Red is the blob, green a mark that is fixed to the ground, blue the ground's texture and brightness. So what each stand-in
knows is read from the pixels it is given, as a trained quantizer would.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
from lapa.data.episode_source import EpisodeSource, OnError, SourceShard, raise_error
from lapa.data.schema import Episode
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizerEncoderOutput

SIZE, BLOB_STEP, CAMERA_STEP = 32, 4, 2
# Rest, and the eight directions (x, y).
MOVES = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)])


class BlobWorld(EpisodeSource):
    """
    Args:
        name: Of the source, and the embodiment.
        num_episodes, num_steps: Of how many episodes, how long.
        camera_moves: Whether the picture shifts.
        labelled: Whether episodes have the blob's motion (pixels, x and y) as their action.
        turn: Eighths of a turn by which the frame of the actions is turned.
        blob_moves: Whether anything but the camera moves.
    """

    cameras = ("image",)
    frame_gap_seconds = 1.0

    def __init__(
        self,
        name: str = "blob",
        num_episodes: int = 30,
        num_steps: int = 16,
        camera_moves: bool = True,
        labelled: bool = True,
        turn: int = 0,
        blob_moves: bool = True,
    ) -> None:
        self.name = self.embodiment = name
        self.num, self.num_steps, self.camera_moves, self.labelled = num_episodes, num_steps, camera_moves, labelled
        self.turn, self.blob_moves = turn, blob_moves

    @property
    def shards(self) -> tuple[SourceShard, ...]:
        return (SourceShard(self.name, self.num),)

    def read(
        self, shard: int, episodes: Sequence[int] | None = None, on_error: OnError = raise_error
    ) -> Iterator[tuple[int, Episode]]:
        for number in self.wanted(shard, episodes):
            yield number, self._episode(number)

    def _episode(self, number: int) -> Episode:
        generator = np.random.default_rng((number, len(self.name)))
        texture = generator.random((SIZE, SIZE)) * 0.1
        ground = 0.1 + 0.5 * generator.random()
        moves = np.stack([self._walk(generator, BLOB_STEP, 10), self._walk(generator, CAMERA_STEP, 4)])
        moves *= np.array([self.blob_moves, self.camera_moves])[:, None, None]
        blob, camera = np.cumsum(moves, axis=1) - moves
        frames = [draw(*blob[t], *camera[t], texture, ground + 0.02 * t) for t in range(self.num_steps)]
        angle = self.turn * np.pi / 4
        action = moves[0] @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        return Episode(
            str(number),
            self.name,
            {"image": np.stack(frames)},
            self.num_steps,
            action=action.astype(np.float32) if self.labelled else None,
            action_names=("right", "down") if self.labelled else None,
            timestamps=np.arange(self.num_steps, dtype=np.float64),
            embodiment=self.embodiment,
        )

    def _walk(self, generator: np.random.Generator, length: int, reach: int) -> np.ndarray:
        """(num_steps, 2) moves that stay within `reach` of the middle."""
        place, moves = np.zeros(2, dtype=int), []
        for _ in range(self.num_steps):
            allowed = [move for move in MOVES * length if np.abs(place + move).max() <= reach]
            moves.append(allowed[generator.integers(len(allowed))])
            place = place + moves[-1]
        return np.array(moves, dtype=float)


def draw(blob_x: float, blob_y: float, camera_x: float, camera_y: float, texture: Any, ground: float) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8."""
    rows, columns = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    red = (np.hypot(columns - blob_x - camera_x, rows - blob_y - camera_y) < 3.2) * 1.0
    green = (np.hypot(columns - camera_x, rows - camera_y) < 1.5) * 0.3
    blue = np.roll(texture + ground, (int(camera_y), int(camera_x)), axis=(0, 1))
    return (np.stack([red, green, blue], axis=-1).clip(0, 1) * 255).astype(np.uint8)


def _place(channel: torch.Tensor) -> torch.Tensor:
    """(batch, height, width) -> (batch, 2) centre (x, y) of what is bright."""
    bright = (channel > 0.1).float()
    axis = torch.arange(SIZE).float()
    weight = bright.sum((1, 2)).clamp(min=1)
    return torch.stack([(bright.sum(1) * axis).sum(1) / weight, (bright.sum(2) * axis).sum(1) / weight], dim=1)


def _direction(motion: torch.Tensor, length: float) -> torch.Tensor:
    """(batch, 2) pixels -> (batch,) index of the nearest move."""
    return torch.cdist(motion, torch.from_numpy(MOVES * length).float()).argmin(1)


@dataclass
class Seen:
    """What can be seen in pairs (batch, 2, 3, height, width)."""

    pixels: torch.Tensor

    @property
    def camera(self) -> torch.Tensor:
        """(batch,) which way the camera moved."""
        return _direction(_place(self.pixels[:, 1, 1]) - _place(self.pixels[:, 0, 1]), CAMERA_STEP)

    @property
    def blob(self) -> torch.Tensor:
        """(batch,) which way the blob moved over the ground."""
        motion = [_place(self.pixels[:, 1, c]) - _place(self.pixels[:, 0, c]) for c in (0, 1)]
        return _direction(motion[0] - motion[1], BLOB_STEP)

    @property
    def ground(self) -> torch.Tensor:
        """(batch,) brightness of the ground of the first frame, in nine steps."""
        return ((self.pixels[:, 0, 2].mean((1, 2)) - 0.1) / 0.9 * 9).long().clamp(0, 8)

    @property
    def start(self) -> torch.Tensor:
        """(batch,) in which of nine fields the blob starts."""
        column, row = (_place(self.pixels[:, 0, 0]) / SIZE * 3).long().clamp(0, 2).unbind(1)
        return 3 * row + column

    @property
    def noise(self) -> torch.Tensor:
        """(batch,) nothing: a number in [0, 9) that the pixels fix and say nothing by."""
        return (self.pixels.flatten(1).double() @ torch.sin(torch.arange(self.pixels[0].numel()).double() * 78.233)
                * 1e4).floor().long() % 9  # fmt: skip


def move_blob(first: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The next frame if the blob moves as the codes (batch,) say."""
    return torch.stack([_rolled(frame, MOVES[int(code)] * BLOB_STEP, [0]) for frame, code in zip(first, codes)])


def move_camera(first: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The next frame if the camera moves as the codes (batch,) say."""
    return torch.stack(
        [_rolled(frame, MOVES[int(code)] * CAMERA_STEP, [0, 1, 2]) for frame, code in zip(first, codes)]
    )


def paint_ground(first: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The next frame if the ground is as bright as the codes (batch,) say."""
    frame = first.clone()
    level = 0.1 + (codes.float() + 0.5) / 9 * 0.9
    frame[:, 2] += (level - frame[:, 2].mean((1, 2)))[:, None, None]
    return frame


def _rolled(frame: torch.Tensor, move: np.ndarray, channels: list[int]) -> torch.Tensor:
    frame = frame.clone()
    frame[channels] = torch.roll(frame[channels], (int(move[1]), int(move[0])), dims=(1, 2))
    return frame


@dataclass
class StandIn:
    """
    A quantizer by its two halves.

    Args:
        code: From what can be seen to codes (batch,).
        guess: From first frames and codes (batch,) to next frames.
        codebook_size: Of its codes.
        num_latent_tokens: The code is the last token; the others are always 0.
    """

    code: Callable[[Seen], torch.Tensor]
    guess: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    codebook_size: int = 9
    num_latent_tokens: int = 1

    @property
    def config(self) -> LapaQuantizerConfig:
        return LapaQuantizerConfig(
            codebook_size=self.codebook_size,
            codebook_dim=self.codebook_size,
            num_latent_tokens=self.num_latent_tokens,
            image_size=SIZE,
            patch_size=8,
            bottleneck="query",
        )

    def encode(self, pixel_values: torch.Tensor) -> LapaQuantizerEncoderOutput:
        codes = torch.zeros(len(pixel_values), self.num_latent_tokens, dtype=torch.int64)
        codes[:, -1] = self.code(Seen(pixel_values))
        return LapaQuantizerEncoderOutput(codes, torch.nn.functional.one_hot(codes, self.codebook_size).float())

    def decode(self, first_frame: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return self.guess(first_frame, codes[:, -1])


def copy_first(first: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Ignores the codes."""
    return first


def partly(share: float, seen: Callable[[Seen], torch.Tensor]) -> Callable[[Seen], torch.Tensor]:
    """Codes that are right for a share of the pairs and noise for the others."""

    def code(what: Seen) -> torch.Tensor:
        lucky = Seen(what.pixels.flip(-1)).noise < 9 * share
        return torch.where(lucky, seen(what), what.noise)

    return code


GOOD = StandIn(lambda seen: seen.blob, move_blob)
# The thresholds were set with these in sight ...
KNOWN_BAD = {
    "collapsed": StandIn(lambda seen: torch.zeros_like(seen.blob), copy_first),
    "copies_the_frame": StandIn(lambda seen: seen.blob, copy_first),
    "camera_only": StandIn(lambda seen: seen.camera, move_camera),
    "under_trained": StandIn(
        partly(0.3, lambda seen: seen.blob), lambda first, codes: 0.9 * first + 0.1 * move_blob(first, codes)
    ),
}
# ... and without these.
HELD_OUT_BAD = {
    "random_codes": StandIn(lambda seen: seen.noise, move_blob),
    "background": StandIn(lambda seen: seen.ground, paint_ground),
    "where_it_starts": StandIn(lambda seen: seen.start, copy_first),
    "permuted_decoder": StandIn(lambda seen: seen.blob, lambda first, codes: move_blob(first, (codes + 4) % 9)),
    "half_collapsed": StandIn(lambda seen: (seen.blob > 0).long(), move_blob, codebook_size=16),
    "spread_over_dead_tokens": StandIn(lambda seen: (seen.blob == 1).long(), move_blob, num_latent_tokens=4),
}
