"""Bodies of the tabletop: end effector, camera, colours and action frame of each, and the outlines of the blocks."""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass

Colour = tuple[int, int, int]


def _regular_polygon(num_corners: int, radius: float, first_angle: float) -> tuple[complex, ...]:
    return tuple(cmath.rect(radius, first_angle + 2 * math.pi * k / num_corners) for k in range(num_corners))


def _star(outer: float, inner: float) -> tuple[complex, ...]:
    return tuple(cmath.rect(outer if k % 2 == 0 else inner, math.pi / 2 + math.pi * k / 5) for k in range(10))


# Outlines in metres around the block's centre, drawn and (as their convex hulls) collided with; a disc has a radius only.
DISC_RADIUS = 0.045
BLOCK_OUTLINES: dict[str, tuple[complex, ...]] = {
    "cube": _regular_polygon(4, 0.04 * math.sqrt(2), math.pi / 4),
    "star": _star(0.060, 0.029),
    "triangle": _regular_polygon(3, 0.064, math.pi / 2),
}
BLOCK_RADIUS = 0.045  # metres; what a block is about as large as
BLOCK_OUTER_RADIUS = 0.064  # metres; no block reaches further

BLOCK_COLOURS: dict[str, Colour] = {
    "red": (222, 35, 38),
    "blue": (40, 105, 255),
    "green": (35, 185, 75),
    "yellow": (250, 205, 20),
}


@dataclass(frozen=True)
class TabletopCamera:
    """A similarity from the board to the image, plus the amplitude of a hand-held camera's shake.

    Args:
        width: metres of the board frame that the image spans.
        centre: board point (metres) in the middle of the image.
        rotation: radians by which the picture is turned anticlockwise; small, so that "left" still looks left.
        shake: metres; largest excursion of the smooth random walk of the camera along either axis.
    """

    width: float
    centre: complex = 0j
    rotation: float = 0.0
    shake: float = 0.0


@dataclass(frozen=True)
class TabletopEmbodiment:
    """What a body looks like and how it acts.

    Args:
        effector: "disc", "gripper" or "hand": how the end effector is drawn.
        effector_outline: convex collision outline in metres around the effector's centre, None for a disc.
        effector_radius: metres; the disc's radius, or the radius of the circle around the outline.
        action_scale: metres that a normalised action of length 1 moves the effector in one step.
        action_rotation: radians; the action's frame is turned by this against the board's.
        camera: see `TabletopCamera`.
        board, rim, table: colours of the playing field, its rim, and what lies around.
        effector_colours: main and accent colour of the end effector.
        plank_width: metres; the board is made of planks of this width in varying tones, None for a plain board.
        has_actions: False where recordings carry no actions (video of a person).
    """

    effector: str
    effector_outline: tuple[complex, ...] | None
    effector_radius: float
    action_scale: float
    action_rotation: float
    camera: TabletopCamera
    board: Colour
    rim: Colour
    table: Colour
    effector_colours: tuple[Colour, Colour]
    plank_width: float | None = None
    has_actions: bool = True


_GRIPPER_OUTLINE = (0.034 + 0.02j, -0.034 + 0.02j, -0.034 - 0.02j, 0.034 - 0.02j)

EMBODIMENTS: dict[str, TabletopEmbodiment] = {
    "arm": TabletopEmbodiment(
        effector="disc",
        effector_outline=None,
        effector_radius=0.032,
        action_scale=0.02,
        action_rotation=0.0,
        camera=TabletopCamera(width=0.60),
        board=(226, 224, 218),
        rim=(150, 148, 142),
        table=(112, 112, 116),
        effector_colours=((20, 20, 24), (255, 120, 220)),
    ),
    "gripper": TabletopEmbodiment(
        effector="gripper",
        effector_outline=_GRIPPER_OUTLINE,
        effector_radius=abs(_GRIPPER_OUTLINE[0]),
        action_scale=0.016,
        action_rotation=math.pi / 2,
        camera=TabletopCamera(width=0.69, centre=0.012 - 0.015j, rotation=math.radians(12)),
        board=(52, 58, 72),
        rim=(96, 104, 122),
        table=(24, 26, 32),
        effector_colours=((240, 240, 245), (0, 214, 224)),
    ),
    "human_video": TabletopEmbodiment(
        effector="hand",
        effector_outline=None,
        effector_radius=0.030,
        action_scale=0.024,
        action_rotation=0.0,
        camera=TabletopCamera(width=0.63, centre=-0.005 - 0.005j, rotation=math.radians(-4), shake=0.014),
        board=(126, 88, 58),
        rim=(84, 56, 36),
        table=(168, 176, 168),
        effector_colours=((244, 200, 170), (96, 60, 140)),
        plank_width=0.07,
        has_actions=False,
    ),
}
