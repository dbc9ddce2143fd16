"""Tells from pictures of the tabletop alone whether a task is solved, so that generated pictures can be judged, too.

The things that a sentence names are found by their known colours, in the picture before and in the picture after; the task's
own rule is then asked. Nothing of the simulator's state is used.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapa.evaluation.environments.tabletop_embodiments import (
    BLOCK_COLOURS,
    BLOCK_RADIUS,
    EMBODIMENTS,
    TabletopEmbodiment,
)
from lapa.evaluation.environments.tabletop_rendering import TabletopRenderer
from lapa.evaluation.environments.tabletop_tasks import FAMILIES, TabletopBlock, TabletopTask, place_goal

# Share of a colour below which a pixel counts as background: what 8 bits and a decoder's blur leave everywhere.
LEAST_SHARE = 0.15
# Distance (levels) between a pixel and the nearest mixture of a colour with the background behind it.
MOST_RESIDUAL = 60.0
# Share of a thing's area that must be found; less is a thing that the picture has lost.
LEAST_AREA = 0.3
MEAN_SHIFT_ROUNDS = 10
EFFECTOR = "effector"


@dataclass(frozen=True)
class NamedTask:
    """
    What a sentence asks for.

    Args:
        family (`str`): Key of `FAMILIES`.
        block (`TabletopBlock`): The one to move or reach.
        other (`TabletopBlock`, *optional*): The second one that is named.
        argument (`str`): Phrase of the family, empty where it has none.
    """

    family: str
    block: TabletopBlock
    other: TabletopBlock | None
    argument: str


@cache
def _patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    """Every template as a pattern, the longest phrase of an alternative first."""
    block = r"(?P<{0}_colour>\w+) (?P<{0}_shape>\w+)"
    found = []
    for name, family in FAMILIES.items():
        phrases = "|".join(sorted(map(re.escape, filter(None, family.arguments)), key=len, reverse=True))
        for template in family.templates:
            pattern = template.format(
                block=block.format("block"), other=block.format("other"), argument=f"(?P<argument>{phrases})"
            )
            found.append((name, re.compile(pattern)))
    return tuple(found)


def read_instruction(instruction: str) -> NamedTask:
    """
    The task that a sentence of the tabletop names.

    Raises:
        ValueError: A sentence that no family of the tabletop has.
    """
    for family, pattern in _patterns():
        if (match := pattern.fullmatch(instruction)) is not None:
            words = match.groupdict()
            other = TabletopBlock(words["other_colour"], words["other_shape"]) if words.get("other_colour") else None
            block = TabletopBlock(words["block_colour"], words["block_shape"])
            return NamedTask(family, block, other, words.get("argument") or "")
    raise ValueError(f"{instruction!r} is no sentence of the tabletop.")


class TabletopLocator:
    """
    Finds the end effector and the blocks in a picture by their colours.

    A pixel is taken for a mixture of the background behind it with the colour that explains it best; the thing is where the
    shares of its colour have their densest spot of its size.

    Args:
        embodiment: Whose pictures; its camera must stand still.
        image_size: Height and width of the pictures.
    """

    def __init__(self, embodiment: TabletopEmbodiment, image_size: int) -> None:
        if embodiment.camera.shake:
            raise ValueError("pictures of a shaking camera cannot be judged: what is where is not known.")
        self.image_size, camera = image_size, embodiment.camera
        self.metres_per_pixel = camera.width / image_size
        self._background = background = TabletopRenderer(embodiment, image_size).background().astype(np.float64)
        main, accent = (np.array(colour, np.float64) for colour in embodiment.effector_colours)
        self._effector = (main - background, accent - background)
        self._blocks = {name: np.array(colour, np.float64) - background for name, colour in BLOCK_COLOURS.items()}
        self._radii = dict.fromkeys(BLOCK_COLOURS, BLOCK_RADIUS) | {EFFECTOR: embodiment.effector_radius}
        rows, columns = np.mgrid[:image_size, :image_size] + 0.5 - image_size / 2
        # Metres on the board of every pixel's centre: the camera's similarity, turned back.
        turned = (columns - 1j * rows) * self.metres_per_pixel
        self._places = turned * np.exp(-1j * camera.rotation) + camera.centre

    def shares(self, image: NDArray[np.uint8]) -> dict[str, NDArray[np.float64]]:
        """Share (height, width) in [0, 1] of each thing in each pixel of an image (height, width, 3) uint8."""
        difference = image.astype(np.float64) - self._background
        alphas, residuals = [], []
        for direction in self._blocks.values():
            alpha = np.clip(_dot(difference, direction) / np.maximum(_dot(direction, direction), 1e-9), 0, 1)
            alphas.append(alpha)
            residuals.append(np.linalg.norm(difference - alpha[..., None] * direction, axis=-1))
        alpha, residual = _two_colours(difference, *self._effector)
        alphas.append(alpha)
        residuals.append(residual)
        best = np.argmin(residuals, axis=0)
        known = np.take_along_axis(np.stack(residuals), best[None], 0)[0] <= MOST_RESIDUAL
        names = (*self._blocks, EFFECTOR)
        return {
            name: np.where((best == number) & known & (alphas[number] >= LEAST_SHARE), alphas[number], 0.0)
            for number, name in enumerate(names)
        }

    def locate(self, image: NDArray[np.uint8], names: Sequence[str]) -> dict[str, complex | None]:
        """
        Where some things are.

        Args:
            image: (image_size, image_size, 3) uint8.
            names: Colours of blocks, and `effector`.

        Returns:
            Centres in metres on the board, as x + y*1j; None for what is not there.
        """
        shares = self.shares(image)
        return {name: self._centre(shares[name], self._radii[name]) for name in names}

    def _centre(self, share: NDArray[np.float64], radius: float) -> complex | None:
        weights, places = share.ravel(), self._places.ravel()
        reach = radius + self.metres_per_pixel
        near = np.abs(places[:, None] - places[None, weights > 0]) <= reach
        if not near.size:
            return None
        density = near @ weights[weights > 0]
        centre = places[int(np.argmax(density))]
        for _ in range(MEAN_SHIFT_ROUNDS):
            inside = weights * (np.abs(places - centre) <= reach)
            centre = complex((inside * places).sum() / inside.sum())
        area = inside.sum() * self.metres_per_pixel**2
        return centre if area >= LEAST_AREA * np.pi * radius**2 else None


def _dot(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((first * second).sum(-1))


def _two_colours(
    difference: NDArray[np.float64], first: NDArray[np.float64], second: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share of a thing of two colours, mixed in whatever way, and what is left: the best point of a triangle."""
    a, b, c = _dot(first, first), _dot(first, second), _dot(second, second)
    p, q = _dot(difference, first), _dot(difference, second)
    determinant = np.maximum(a * c - b * b, 1e-9)
    inner = np.stack([(c * p - b * q) / determinant, (a * q - b * p) / determinant])
    along = np.clip((p - b - q + c) / np.maximum(a - 2 * b + c, 1e-9), 0, 1)
    zero = np.zeros_like(p)
    # The best point inside, if there is one, or on one of the edges.
    candidates = [
        (inner[0], inner[1], (inner >= 0).all(0) & (inner.sum(0) <= 1)),
        (np.clip(p / np.maximum(a, 1e-9), 0, 1), zero, True),
        (zero, np.clip(q / np.maximum(c, 1e-9), 0, 1), True),
        (along, 1 - along, True),
    ]
    share, least = zero, np.full_like(p, np.inf)
    for one, two, allowed in candidates:
        residual = np.linalg.norm(difference - one[..., None] * first - two[..., None] * second, axis=-1)
        better = allowed & (residual < least)
        share, least = np.where(better, one + two, share), np.where(better, residual, least)
    return share, least


class TabletopJudge:
    """
    Judges the last picture of a rollout.

    Args:
        options: Of the environment, as a suite states them: `embodiment`, `thresholds`.
        image_size: Of the pictures that are judged, which may not be the environment's.
    """

    def __init__(self, options: Mapping[str, Any], image_size: tuple[int, int]) -> None:
        if not options.get("distinct_colours", True):
            raise ValueError("blocks of one colour cannot be told apart in a picture.")
        if image_size[0] != image_size[1]:
            raise ValueError(f"pictures must be square to be judged, got {image_size}.")
        embodiment = options.get("embodiment", "arm")
        body = EMBODIMENTS[embodiment] if isinstance(embodiment, str) else embodiment
        self.locator = TabletopLocator(body, image_size[0])
        self.thresholds = dict(options.get("thresholds") or {})

    def miss(self, instruction: str, first: NDArray[np.uint8], last: NDArray[np.uint8]) -> float | None:
        """
        By how much a picture misses what a sentence asks for.

        Args:
            instruction: The sentence.
            first: (image_size, image_size, 3) uint8, how it began: goals of `relative_move` are told from there.
            last: The picture to judge.

        Returns:
            Metres on the wrong side of the task's threshold, at most 0 where it is solved; None where a thing that the
            sentence names cannot be found.

        Raises:
            ValueError: A sentence that no family of the tabletop has.
        """
        named = read_instruction(instruction)
        blocks = [named.block.colour] + ([named.other.colour] if named.other else [])
        wanted = [*blocks, *([EFFECTOR] if named.family == "reach" else [])]
        before, after = self.locator.locate(first, blocks), self.locator.locate(last, wanted)
        starts = [place for name in blocks if (place := before[name]) is not None]
        places = [place for name in blocks if (place := after[name]) is not None]
        effector = after.get(EFFECTOR, 0j)
        if len(starts) < len(blocks) or len(places) < len(blocks) or effector is None:
            return None
        anchor, offset = place_goal(named.family, named.argument, starts)
        threshold = self.thresholds.get(named.family, FAMILIES[named.family].threshold)
        task = TabletopTask(named.family, named.argument, anchor, offset, threshold, instruction, None)
        return task.miss(places, effector)


__all__ = ["EFFECTOR", "NamedTask", "TabletopJudge", "TabletopLocator", "read_instruction"]
