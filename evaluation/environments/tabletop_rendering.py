"""Draws the tabletop from above: supersampled PIL polygons on a cached background."""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from lapa.evaluation.environments.tabletop_embodiments import (
    BLOCK_COLOURS,
    BLOCK_OUTLINES,
    DISC_RADIUS,
    Colour,
    TabletopEmbodiment,
)
from lapa.evaluation.environments.tabletop_tasks import BOARD_HALF_SIZE, TabletopBlock

MIN_IMAGE_SIZE = 16
_RIM_WIDTH = 0.02  # metres
_PLANK_TONES = (0, -14, 9, -6, 13, -10, 4)  # added to the board's colour, plank by plank
_SHAKE_FREQUENCIES = (0.31, 0.73, 1.37)  # Hz; incommensurable, so that the path does not close
_SHAKE_WEIGHTS = (0.5, 0.3, 0.2)


class TabletopRenderer:
    """Renders states of one embodiment at one size.

    Args:
        embodiment: camera, colours and end effector.
        image_size: height and width in pixels.
    """

    def __init__(self, embodiment: TabletopEmbodiment, image_size: int) -> None:
        self._embodiment = embodiment
        # Coordinates of polygons are whole pixels of the supersampled canvas, so small pictures need more of them.
        self._supersampling = 4 if image_size <= 48 else 3 if image_size <= 96 else 2
        canvas = image_size * self._supersampling
        camera = embodiment.camera
        self._pixels_per_metre = canvas / camera.width
        self._turn = cmath.rect(self._pixels_per_metre, camera.rotation)
        self._centre = camera.centre
        self._canvas = canvas
        self._margin = math.ceil(camera.shake * self._pixels_per_metre) + 1
        self._origin = complex(canvas / 2, canvas / 2)
        self._background = self._draw_background()

    def render(
        self,
        blocks: Sequence[TabletopBlock],
        positions: Sequence[complex],
        angles: Sequence[float],
        effector: complex,
        camera_offset: complex = 0j,
    ) -> np.ndarray:
        """Draws one state.

        Args:
            blocks, positions, angles: the blocks, their centres (metres) and angles (radians).
            effector: centre of the end effector, metres.
            camera_offset: by how far the camera is off its place, metres, within the embodiment's shake.

        Returns:
            (image_size, image_size, 3) uint8, RGB.
        """
        shift_x = round(camera_offset.real * self._pixels_per_metre)
        shift_y = round(camera_offset.imag * self._pixels_per_metre)
        left, top = self._margin + shift_x, self._margin - shift_y
        image = self._background.crop((left, top, left + self._canvas, top + self._canvas))
        self._origin = complex(self._canvas / 2 - shift_x, self._canvas / 2 + shift_y)
        draw = ImageDraw.Draw(image)
        for block, position, angle in zip(blocks, positions, angles):
            colour = BLOCK_COLOURS[block.colour]
            if block.shape in BLOCK_OUTLINES:
                turn = cmath.rect(1.0, angle)
                self._polygon(draw, [position + turn * corner for corner in BLOCK_OUTLINES[block.shape]], colour)
            else:
                self._disc(draw, position, DISC_RADIUS, colour)
        self._draw_effector(draw, effector)
        return np.array(image.reduce(self._supersampling))

    def background(self) -> np.ndarray:
        """The table without anything on it, (image_size, image_size, 3) uint8, from a camera at its place."""
        box = (self._margin, self._margin, self._margin + self._canvas, self._margin + self._canvas)
        return np.array(self._background.crop(box).reduce(self._supersampling))

    def _draw_background(self) -> Image.Image:
        look = self._embodiment
        side = self._canvas + 2 * self._margin
        image = Image.new("RGB", (side, side), look.table)
        draw = ImageDraw.Draw(image)
        self._origin = complex(side / 2, side / 2)
        self._rectangle(draw, -BOARD_HALF_SIZE - _RIM_WIDTH, BOARD_HALF_SIZE + _RIM_WIDTH, _RIM_WIDTH, look.rim)
        self._rectangle(draw, -BOARD_HALF_SIZE, BOARD_HALF_SIZE, 0.0, look.board)
        if look.plank_width:
            for k in range(math.ceil(2 * BOARD_HALF_SIZE / look.plank_width)):
                start = -BOARD_HALF_SIZE + k * look.plank_width
                tone = _PLANK_TONES[k % len(_PLANK_TONES)]
                colour = (look.board[0] + tone, look.board[1] + tone, look.board[2] + tone)
                self._rectangle(draw, start, min(start + look.plank_width, BOARD_HALF_SIZE), 0.0, colour)
        return image

    def _rectangle(self, draw: ImageDraw.ImageDraw, left: float, right: float, rim: float, colour: Colour) -> None:
        """A rectangle over the board's full height (and its rim)."""
        height = BOARD_HALF_SIZE + rim
        corners = (complex(left, -height), complex(right, -height), complex(right, height), complex(left, height))
        self._polygon(draw, corners, colour)

    def _draw_effector(self, draw: ImageDraw.ImageDraw, effector: complex) -> None:
        look = self._embodiment
        main, accent = look.effector_colours
        if look.effector == "disc":
            self._disc(draw, effector, look.effector_radius, main)
            self._disc(draw, effector, 0.5 * look.effector_radius, accent)
        elif look.effector == "gripper":
            assert look.effector_outline is not None
            self._polygon(draw, [effector + corner for corner in look.effector_outline], main)
            for side in (-1, 1):  # the two fingers, seen from above
                pad = (0.012 + 0.02j, 0.034 + 0.02j, 0.034 - 0.02j, 0.012 - 0.02j)
                self._polygon(draw, [effector + complex(side * p.real, p.imag) for p in pad], accent)
        else:
            self._draw_hand(draw, effector, main, accent)

    def _draw_hand(self, draw: ImageDraw.ImageDraw, effector: complex, skin: Colour, sleeve: Colour) -> None:
        """A fist with short fingers at the end of an arm that comes in over the lower border of the image."""
        radius = self._embodiment.effector_radius
        shoulder = complex(0.4 * effector.real + 0.08, -0.75)
        forward = (effector - shoulder) / abs(effector - shoulder)
        wrist = effector - forward * 0.055
        self._bar(draw, effector, wrist, 0.038, skin)
        self._bar(draw, wrist, shoulder, 0.046, sleeve)
        self._disc(draw, effector, radius, skin)
        for angle in (-0.75, -0.25, 0.25, 0.75):
            tip = effector + forward * cmath.rect(radius + 0.008, angle)
            self._disc(draw, tip, 0.009, skin)

    def _pixel(self, point: complex) -> tuple[float, float]:
        offset = (point - self._centre) * self._turn
        return self._origin.real + offset.real, self._origin.imag - offset.imag

    def _polygon(self, draw: ImageDraw.ImageDraw, corners: Iterable[complex], colour: Colour) -> None:
        draw.polygon([self._pixel(corner) for corner in corners], fill=colour)

    def _disc(self, draw: ImageDraw.ImageDraw, centre: complex, radius: float, colour: Colour) -> None:
        x, y = self._pixel(centre)
        r = radius * self._pixels_per_metre
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def _bar(self, draw: ImageDraw.ImageDraw, start: complex, end: complex, width: float, colour: Colour) -> None:
        half = (end - start) / abs(end - start) * 1j * width / 2
        self._polygon(draw, (start + half, end + half, end - half, start - half), colour)


class CameraShake:
    """A smooth random path of a hand-held camera: sums of slow sines with drawn phases.

    Args:
        rng: draws the phases.
        amplitude: metres; bound of the excursion along either axis.
    """

    def __init__(self, rng: np.random.Generator, amplitude: float) -> None:
        self._phases = rng.uniform(0.0, 2 * math.pi, (2, len(_SHAKE_FREQUENCIES))).tolist()
        self._amplitude = amplitude

    def offset(self, seconds: float) -> complex:
        """Offset of the camera in metres at a time of the episode."""
        if self._amplitude == 0.0:
            return 0j
        x, y = (
            sum(
                weight * math.sin(2 * math.pi * frequency * seconds + phase)
                for weight, frequency, phase in zip(_SHAKE_WEIGHTS, _SHAKE_FREQUENCIES, phases)
            )
            for phases in self._phases
        )
        return self._amplitude * complex(x, y)
