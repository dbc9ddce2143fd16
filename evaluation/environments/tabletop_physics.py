"""Quasi-static planar pushing with pymunk: blocks with friction, a rim around the board, a velocity-driven effector."""

from __future__ import annotations

from collections.abc import Sequence

from lapa.evaluation.environments.tabletop_embodiments import BLOCK_OUTLINES, DISC_RADIUS, TabletopEmbodiment
from lapa.evaluation.environments.tabletop_tasks import BOARD_HALF_SIZE, WORKSPACE_HALF_SIZE, TabletopBlock

try:
    import pymunk
except ImportError as error:
    raise ImportError('the tabletop simulator needs pymunk: pip install "lapa[sim]"') from error

_UNITS_PER_METRE = 100.0  # pymunk's tolerances are made for bodies some units wide
_SUBSTEPS = 4
_SETTLING_SUBSTEPS = 12
_DAMPING_PER_SUBSTEP = 0.5  # share of its velocity that a block keeps: friction with the board
_FRICTION = 0.3
_EFFECTOR_MASS, _BLOCK_MASS = 4.0, 1.0
_RIM_RADIUS = 5.0
_RIM, _BLOCK, _EFFECTOR = 1, 2, 4  # collision categories: the effector passes over the rim


class TabletopPhysics:
    """The moving parts of one episode.

    Velocities are zeroed between control steps (friction stops a pushed block at once), so that the positions alone are
    the state and one image shows all of it.

    Args:
        embodiment: its effector.
        blocks: the blocks.
        positions: their centres in metres.
        angles: their angles in radians.
        effector: centre of the effector in metres.
        step_seconds: duration of one control step.
    """

    def __init__(
        self,
        embodiment: TabletopEmbodiment,
        blocks: Sequence[TabletopBlock],
        positions: Sequence[complex],
        angles: Sequence[float],
        effector: complex,
        step_seconds: float,
    ) -> None:
        self._dt = step_seconds / _SUBSTEPS
        self._space = pymunk.Space()
        self._space.damping = _DAMPING_PER_SUBSTEP ** (1.0 / self._dt)
        self._add_rim()
        self._blocks = [self._add_block(*args) for args in zip(blocks, positions, angles)]
        self._effector = self._add_effector(embodiment, effector)
        for _ in range(_SETTLING_SUBSTEPS):  # parts blocks that were drawn overlapping
            self._space.step(self._dt)
        self._stop()

    @property
    def effector(self) -> complex:
        """Centre of the effector, metres."""
        return _to_metres(self._effector.position)

    @property
    def positions(self) -> list[complex]:
        """Centres of the blocks, metres."""
        return [_to_metres(body.position) for body in self._blocks]

    @property
    def angles(self) -> list[float]:
        """Angles of the blocks, radians."""
        return [body.angle for body in self._blocks]

    def move(self, delta: complex) -> None:
        """Drives the effector by `delta` metres over one control step; contacts may hold it back."""
        target = self.effector + delta
        limit = WORKSPACE_HALF_SIZE
        target = complex(min(max(target.real, -limit), limit), min(max(target.imag, -limit), limit))
        # pymunk integrates positions before it solves for velocities: the first substep finds the contacts and moves
        # nothing, the others move.
        velocity = (target - self.effector) * _UNITS_PER_METRE / (self._dt * (_SUBSTEPS - 1))
        body = self._effector
        for _ in range(_SUBSTEPS):
            wanted_x = velocity.real - _DAMPING_PER_SUBSTEP * body.velocity.x
            wanted_y = velocity.imag - _DAMPING_PER_SUBSTEP * body.velocity.y
            body.force = (_EFFECTOR_MASS / self._dt * wanted_x, _EFFECTOR_MASS / self._dt * wanted_y)
            self._space.step(self._dt)
        self._stop()

    def _stop(self) -> None:
        self._effector.velocity = (0.0, 0.0)
        self._effector.force = (0.0, 0.0)
        for body in self._blocks:
            body.velocity = (0.0, 0.0)
            body.angular_velocity = 0.0

    def _add_rim(self) -> None:
        edge = BOARD_HALF_SIZE * _UNITS_PER_METRE + _RIM_RADIUS
        corners = [(-edge, -edge), (edge, -edge), (edge, edge), (-edge, edge)]
        for start, end in zip(corners, corners[1:] + corners[:1]):
            segment = pymunk.Segment(self._space.static_body, start, end, _RIM_RADIUS)
            segment.filter = pymunk.ShapeFilter(categories=_RIM, mask=_BLOCK)
            segment.friction = _FRICTION
            self._space.add(segment)

    def _add_block(self, block: TabletopBlock, position: complex, angle: float) -> pymunk.Body:
        outline = BLOCK_OUTLINES.get(block.shape)
        body = self._add_body(outline, DISC_RADIUS, position, _BLOCK_MASS, _BLOCK, _BLOCK | _RIM | _EFFECTOR)
        body.angle = angle
        self._space.reindex_shapes_for_body(body)
        return body

    def _add_effector(self, embodiment: TabletopEmbodiment, position: complex) -> pymunk.Body:
        body = self._add_body(
            embodiment.effector_outline, embodiment.effector_radius, position, _EFFECTOR_MASS, _EFFECTOR, _BLOCK
        )
        body.moment = float("inf")
        return body

    def _add_body(
        self,
        outline: Sequence[complex] | None,
        radius: float,
        position: complex,
        mass: float,
        category: int,
        mask: int,
    ) -> pymunk.Body:
        scale = _UNITS_PER_METRE
        corners = [(corner.real * scale, corner.imag * scale) for corner in outline or ()]
        moment = (
            pymunk.moment_for_poly(mass, corners) if corners else pymunk.moment_for_circle(mass, 0, radius * scale)
        )
        body = pymunk.Body(mass, moment)
        body.position = (position.real * scale, position.imag * scale)
        shape = pymunk.Poly(body, corners) if corners else pymunk.Circle(body, radius * scale)
        shape.friction = _FRICTION
        shape.filter = pymunk.ShapeFilter(categories=category, mask=mask)
        self._space.add(body, shape)
        return body


def _to_metres(vector: pymunk.Vec2d) -> complex:
    return complex(vector.x, vector.y) / _UNITS_PER_METRE
