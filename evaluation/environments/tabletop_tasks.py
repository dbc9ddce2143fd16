"""Task families of the tabletop: objects, instructions, goals, held-out combinations and start states.

Positions are complex numbers `x + y*1j` in metres in the board frame (origin at the board's centre, x to the right, y up):
vector arithmetic without the overhead of two-element arrays.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

BOARD_HALF_SIZE = 0.25  # metres; blocks are kept inside by a rim
WORKSPACE_HALF_SIZE = 0.29  # metres; the effector may pass over the rim, so a block at the rim can be pushed back

COLOURS = ("red", "blue", "green", "yellow")
SHAPES = ("cube", "disc", "star", "triangle")
# One per colour and per shape, so that every colour and every shape is seen, only never together.
HELD_OUT_OBJECTS = frozenset({("red", "star"), ("blue", "triangle"), ("green", "cube"), ("yellow", "disc")})
SPLITS = ("seen", "unseen")

_START_MARGIN = 0.07  # metres a start state is away from being solved
_GOAL_HALF_SIZE = 0.20  # metres; where a block's centre can be pushed without leaning on the rim
_START_HALF_SIZE = 0.18
_BLOCK_SPACING = 0.14  # metres between the centres of blocks at the start
_TOUCHING = 0.10  # metres between the centres of the pair that is to be separated
_EFFECTOR_SPACING = 0.11
_ROOM_BESIDE = 0.10  # metres between the way of a pushed block and the centres of others
_ROOM_BEHIND = 0.11  # metres from a block's centre to where the effector starts to push
_MAX_ATTEMPTS = 2000

_AXES = {"left": -1 + 0j, "right": 1 + 0j, "top": 1j, "bottom": -1j}
_DIAGONALS = {
    f"{vertical} {horizontal}": (_AXES[vertical] + _AXES[horizontal]) / math.sqrt(2)
    for vertical in ("top", "bottom")
    for horizontal in ("left", "right")
}
PLACES: dict[str, complex] = {
    "center of the board": 0j,
    **{f"center of the {side} side": 0.15 * axis for side, axis in _AXES.items()},
    **{f"{corner} corner": 0.15 * math.sqrt(2) * axis for corner, axis in _DIAGONALS.items()},
}
RELATIONS: dict[str, complex] = {
    "to the left of": -0.13 + 0j,
    "to the right of": 0.13 + 0j,
    "above": 0.13j,
    "below": -0.13j,
    **{f"to the {corner} of": 0.13 * axis for corner, axis in _DIAGONALS.items()},
}
DIRECTIONS: dict[str, complex] = {
    "left": -0.12 + 0j,
    "right": 0.12 + 0j,
    "up": 0.12j,
    "down": -0.12j,
    "up and to the left": 0.12 * _DIAGONALS["top left"],
    "up and to the right": 0.12 * _DIAGONALS["top right"],
    "down and to the left": 0.12 * _DIAGONALS["bottom left"],
    "down and to the right": 0.12 * _DIAGONALS["bottom right"],
}


@dataclass(frozen=True)
class TabletopFamily:
    """A kind of task: how many blocks its sentence names, what else it names, and when it counts as solved.

    Args:
        num_named_blocks: blocks that the instruction names, 1 or 2.
        threshold: metres; solved below this distance to the goal (for `separate`: above this distance of the pair).
        templates: sentences with `{block}`, and where the family has them `{other}` and `{argument}`.
        arguments: phrase -> offset of the goal in metres; a single empty phrase where the family has none.
        start_margin: metres that a start state is away from being solved.
        max_steps: control steps after which an episode is cut off; about twice what the slowest body needs.
    """

    num_named_blocks: int
    threshold: float
    templates: tuple[str, ...]
    arguments: Mapping[str, complex] = field(default_factory=lambda: {"": 0j})
    start_margin: float = _START_MARGIN
    max_steps: int = 80


FAMILIES: dict[str, TabletopFamily] = {
    "reach": TabletopFamily(
        1,
        0.10,  # the widest effector touches the widest block at 0.103
        (
            "reach the {block}",
            "move to the {block}",
            "go to the {block}",
            "touch the {block}",
            "reach for the {block}",
        ),
        start_margin=0.10,
        max_steps=40,
    ),
    "block_to_block": TabletopFamily(
        2,
        0.125,
        (
            "push the {block} to the {other}",
            "move the {block} next to the {other}",
            "slide the {block} towards the {other}",
            "bring the {block} to the {other}",
            "put the {block} together with the {other}",
        ),
    ),
    "block_to_absolute": TabletopFamily(
        1,
        0.075,
        (
            "push the {block} to the {argument}",
            "move the {block} to the {argument}",
            "slide the {block} over to the {argument}",
            "bring the {block} to the {argument}",
            "place the {block} at the {argument}",
        ),
        PLACES,
    ),
    "block_to_relative": TabletopFamily(
        2,
        0.06,
        (
            "push the {block} {argument} the {other}",
            "move the {block} {argument} the {other}",
            "slide the {block} so that it is {argument} the {other}",
            "place the {block} {argument} the {other}",
            "put the {block} {argument} the {other}",
        ),
        RELATIONS,
    ),
    "relative_move": TabletopFamily(
        1,
        0.05,
        (
            "push the {block} slightly {argument}",
            "move the {block} a bit {argument}",
            "nudge the {block} {argument}",
            "slide the {block} a little {argument}",
            "slightly push the {block} {argument}",
        ),
        DIRECTIONS,
        start_margin=0.03,  # the distance is always the same; leaves room for a larger threshold
    ),
    "separate": TabletopFamily(
        2,
        0.17,
        (
            "separate the {block} from the {other}",
            "push the {block} away from the {other}",
            "move the {block} apart from the {other}",
            "split the {block} and the {other}",
            "get the {block} and the {other} apart",
        ),
        start_margin=0.03,
    ),
}


@dataclass(frozen=True)
class TabletopBlock:
    """A block, named by its colour and shape."""

    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def held_out(self) -> bool:
        return (self.colour, self.shape) in HELD_OUT_OBJECTS


@dataclass(frozen=True)
class TabletopTask:
    """One task in one scene; block 0 is the one to move (or reach), block 1 the other one that is named.

    Args:
        family: key of `FAMILIES`.
        argument: phrase of the family's arguments.
        anchor: index of the block that the goal moves with, None for a goal fixed on the board.
        offset: goal relative to the anchor, or on the board, metres.
        threshold: metres, see `TabletopFamily`.
        instruction: the sentence.
        held_out: "object" or "combination" in the unseen split, else None.
    """

    family: str
    argument: str
    anchor: int | None
    offset: complex
    threshold: float
    instruction: str
    held_out: str | None

    def goal(self, positions: Sequence[complex]) -> complex:
        """Where the moved thing (the effector for `reach`, else block 0) should be; its partner for `separate`."""
        return self.offset if self.anchor is None else positions[self.anchor] + self.offset

    def distance(self, positions: Sequence[complex], effector: complex) -> float:
        """Metres that are left until the task is solved, 0 when it is."""
        return max(self.miss(positions, effector), 0.0)

    def miss(self, positions: Sequence[complex], effector: complex) -> float:
        """Metres on the wrong side of the threshold; at most 0 when the task is solved."""
        moved = effector if self.family == "reach" else positions[0]
        distance = abs(moved - self.goal(positions))
        return self.threshold - distance if self.family == "separate" else distance - self.threshold

    def is_solved(self, positions: Sequence[complex], effector: complex) -> bool:
        """Whether the state counts as success."""
        return self.distance(positions, effector) == 0.0


@dataclass(frozen=True)
class TabletopScene:
    """A start state with its task: blocks, their positions (metres) and angles (radians), effector, task."""

    blocks: tuple[TabletopBlock, ...]
    positions: tuple[complex, ...]
    angles: tuple[float, ...]
    effector: complex
    task: TabletopTask


def is_held_out_combination(family: str, block: TabletopBlock, other: TabletopBlock | None, argument: str) -> bool:
    """Whether the seen split leaves out this colour with this argument (or this pair of colours)."""
    colour = COLOURS.index(block.colour)
    arguments = list(FAMILIES[family].arguments)
    if len(arguments) > 1:
        return (arguments.index(argument) + colour) % len(COLOURS) == 0
    if other is not None:
        return (COLOURS.index(other.colour) - colour) % len(COLOURS) == 1
    return False


def format_instruction(template: str, block: TabletopBlock, other: TabletopBlock | None, argument: str) -> str:
    """Fills a family's template."""
    return template.format(block=block.name, other=other.name if other else "", argument=argument)


def sample_scene(
    rng: np.random.Generator,
    family: str,
    split: str,
    num_blocks: int,
    distinct_colours: bool,
    threshold: float | None = None,
) -> TabletopScene:
    """Draws blocks, a task of the family and a start state that does not solve it.

    Args:
        rng: the only source of randomness.
        family: key of `FAMILIES`.
        split: "seen": no held-out object in the scene, no held-out combination in the sentence;
            "unseen": the moved block is a held-out object, or the sentence is a held-out combination of seen objects.
        num_blocks: blocks in the scene, at least 2.
        distinct_colours: whether no two blocks share a colour.
        threshold: metres, replaces the family's.

    Raises:
        ValueError: no start state fits, because the threshold leaves no room on the board.
    """
    spec = FAMILIES[family]
    threshold = spec.threshold if threshold is None else threshold
    for _ in range(_MAX_ATTEMPTS):
        drawn = _sample_words(rng, family, split, num_blocks, distinct_colours)
        if drawn is None:
            continue
        blocks, argument, held_out = drawn
        positions = _sample_positions(rng, num_blocks, touching=family == "separate")
        effector = _uniform(rng, WORKSPACE_HALF_SIZE - 0.05)
        if positions is None or min(abs(effector - position) for position in positions) < _EFFECTOR_SPACING:
            continue
        other = blocks[1] if spec.num_named_blocks == 2 else None
        template = spec.templates[rng.integers(len(spec.templates))]
        anchor, offset = place_goal(family, argument, positions)
        sentence = format_instruction(template, blocks[0], other, argument)
        task = TabletopTask(family, argument, anchor, offset, threshold, sentence, held_out)
        if task.distance(positions, effector) < spec.start_margin or not _is_way_free(task, positions):
            continue
        angles = tuple(float(angle) for angle in rng.uniform(-math.pi, math.pi, num_blocks))
        return TabletopScene(blocks, positions, angles, effector, task)
    raise ValueError(
        f"thresholds[{family!r}] is {threshold} and num_blocks is {num_blocks}: no unsolved start state fits on the "
        f"board; the default threshold is {spec.threshold}"
    )


def _sample_words(
    rng: np.random.Generator, family: str, split: str, num_blocks: int, distinct_colours: bool
) -> tuple[tuple[TabletopBlock, ...], str, str | None] | None:
    """Blocks, argument and what is held out about them; None when the draw does not belong to the split."""
    spec = FAMILIES[family]
    colours = rng.permutation(len(COLOURS))[:num_blocks] if distinct_colours else rng.integers(4, size=num_blocks)
    shapes = rng.integers(len(SHAPES), size=num_blocks)
    blocks = tuple(TabletopBlock(COLOURS[colour], SHAPES[shape]) for colour, shape in zip(colours, shapes))
    phrases = list(spec.arguments)
    argument = phrases[rng.integers(len(phrases))]
    if len(set(blocks)) < num_blocks:
        return None
    other = blocks[1] if spec.num_named_blocks == 2 else None
    new_combination = is_held_out_combination(family, blocks[0], other, argument)
    if split == "seen":
        fits = not new_combination and not any(block.held_out for block in blocks)
        return (blocks, argument, None) if fits else None
    if blocks[0].held_out:
        return blocks, argument, "object"
    if new_combination and not (other is not None and other.held_out):
        return blocks, argument, "combination"
    return None


def _is_way_free(task: TabletopTask, positions: Sequence[complex]) -> bool:
    """Whether block 0 can be pushed straight to a goal on the board, and the place to push it from is free."""
    goal = task.goal(positions)
    if _outside(goal, _GOAL_HALF_SIZE):
        return False
    if task.family in ("reach", "separate"):
        return True
    heading = (goal - positions[0]) / abs(goal - positions[0])
    behind = positions[0] - heading * _ROOM_BEHIND
    passed = [p for i, p in enumerate(positions) if i != 0 and not (i == task.anchor and task.offset == 0)]
    return all(
        distance_to_segment(p, positions[0], goal) >= _ROOM_BESIDE and abs(p - behind) >= _ROOM_BESIDE for p in passed
    )


def distance_to_segment(point: complex, start: complex, end: complex) -> float:
    """Metres from a point to the straight line between two others."""
    step = end - start
    squared = abs(step) ** 2
    if squared < 1e-12:
        return abs(point - start)
    along = ((point - start) * step.conjugate()).real / squared
    return abs(start + min(max(along, 0.0), 1.0) * step - point)


def place_goal(family: str, argument: str, positions: Sequence[complex]) -> tuple[int | None, complex]:
    """Anchor and offset of a task's goal, see `TabletopTask`, from its words and the blocks' places at the start."""
    offset = FAMILIES[family].arguments[argument]
    if family == "reach":
        return 0, offset
    if family == "block_to_absolute":
        return None, offset
    if family == "relative_move":
        return None, positions[0] + offset
    return 1, offset


def _sample_positions(rng: np.random.Generator, num_blocks: int, touching: bool) -> tuple[complex, ...] | None:
    positions = [_uniform(rng, _START_HALF_SIZE)]
    if touching:
        positions.append(positions[0] + cmath.rect(_TOUCHING, rng.uniform(-math.pi, math.pi)))
        if _outside(positions[1], _START_HALF_SIZE):
            return None
    for _ in range(50):
        if len(positions) == num_blocks:
            return tuple(positions)
        candidate = _uniform(rng, _START_HALF_SIZE)
        if min(abs(candidate - position) for position in positions) >= _BLOCK_SPACING:
            positions.append(candidate)
    return None


def _uniform(rng: np.random.Generator, half_size: float) -> complex:
    x, y = rng.uniform(-half_size, half_size, 2)
    return complex(x, y)


def _outside(point: complex, half_size: float) -> bool:
    return max(abs(point.real), abs(point.imag)) > half_size + 1e-9
