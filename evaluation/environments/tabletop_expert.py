"""A scripted expert: walks behind the block without touching the others, then pushes it to the goal."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lapa.evaluation.environments.tabletop_embodiments import BLOCK_OUTER_RADIUS, BLOCK_RADIUS
from lapa.evaluation.environments.tabletop_tasks import BOARD_HALF_SIZE, WORKSPACE_HALF_SIZE, distance_to_segment

if TYPE_CHECKING:
    from lapa.evaluation.environments.tabletop import TabletopEnvironment
    from lapa.evaluation.environments.tabletop_tasks import TabletopTask

_PUSH_CLEARANCE = 0.105  # metres between the centres of a pushed block and of one it passes
_BEHIND_GAP = 0.012  # metres between the effector and the block where a push begins
_STEERING = 1.6  # how strongly the effector moves sideways to stay behind the block's centre
_NUM_CORNERS = 12  # of the polygon of way points around an obstacle
_NOISE_MEMORY = 0.8  # correlation of the noise of successive steps
_BURST_STEPS = (4, 10)
_STUCK_WINDOW = 8  # steps; moving less than _STUCK_STEPS full steps in this time means being stuck
_STUCK_STEPS = 1.5
_ESCAPE_STEPS = 5


class TabletopExpert:
    """Solves the running episode of an environment from its true state.

    Args:
        env: the environment; `act` looks at its current state.
        noise: standard deviation of the noise added to the action, in normalised units; correlated over steps.
        exploration: probability, per step, that a burst of random motion (some towards a random block) begins;
            1.0 moves at random throughout.
    """

    def __init__(self, env: TabletopEnvironment, noise: float = 0.0, exploration: float = 0.0) -> None:
        if not 0.0 <= noise < math.inf:
            raise ValueError(f"noise is {noise!r}; accepted: 0 or more")
        if not 0.0 <= exploration <= 1.0:
            raise ValueError(f"exploration is {exploration!r}; accepted: 0 to 1")
        self._env = env
        self._noise = noise
        self._exploration = exploration
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Forgets the last episode and seeds noise and exploration."""
        self._rng = np.random.default_rng((seed, 1))  # not the stream that drew the scene
        self._noise_state = 0j
        self._burst_heading, self._burst_left = 0j, 0
        self._begin_episode(None)

    def _begin_episode(self, task: TabletopTask | None) -> None:
        self._task = task
        self._pushing = False
        self._separation: tuple[int, complex] | None = None
        self._trail: list[complex] = []
        self._escape, self._escape_left = 0j, 0

    def act(self) -> np.ndarray:
        """The next action, (2,) float32 in [-1, 1], with noise and exploration."""
        return self.disturb(self.clean_action())

    def clean_action(self) -> np.ndarray:
        """What the expert would do without noise, (2,) float32 in [-1, 1]."""
        env = self._env
        if env.task is not self._task:  # a new episode began
            self._begin_episode(env.task)
        positions, effector = env.positions, env.effector
        if self._escape_left == 0 and self._is_stuck(effector):
            self._begin_escape(positions, effector)
        if self._escape_left:
            self._escape_left -= 1
            return env.delta_to_action(self._escape)
        return env.delta_to_action(self._plan(positions, effector))

    def _is_stuck(self, effector: complex) -> bool:
        self._trail.append(effector)
        if len(self._trail) <= _STUCK_WINDOW:
            return False
        moved = abs(effector - self._trail.pop(0))
        return moved < _STUCK_STEPS * self._env.embodiment.action_scale

    def _begin_escape(self, positions: list[complex], effector: complex) -> None:
        """Backs away from the blocks nearby, in a direction that is never quite the same, and plans afresh."""
        away = sum((effector - p) / max(abs(effector - p), 1e-3) ** 3 for p in positions)
        self._begin_episode(self._task)
        self._escape = _unit(away) * cmath.rect(1.0, self._rng.uniform(-0.8, 0.8))
        self._escape_left = _ESCAPE_STEPS

    def disturb(self, clean: np.ndarray) -> np.ndarray:
        action = complex(float(clean[0]), float(clean[1]))
        if self._exploration:
            if self._burst_left == 0 and self._rng.random() < self._exploration:
                self._begin_burst()
            if self._burst_left:
                self._burst_left -= 1
                action = self._burst_heading
        if self._noise:
            drawn = complex(*self._rng.normal(0.0, self._noise, 2))
            self._noise_state = _NOISE_MEMORY * self._noise_state + math.sqrt(1 - _NOISE_MEMORY**2) * drawn
            action += self._noise_state
        return np.array((action.real, action.imag), np.float32).clip(-1.0, 1.0)

    def _begin_burst(self) -> None:
        env = self._env
        target = complex(*self._rng.uniform(-BOARD_HALF_SIZE, BOARD_HALF_SIZE, 2))
        if self._rng.random() < 0.5:
            target = env.positions[self._rng.integers(len(env.blocks))]
        action = env.delta_to_action(target - env.effector)
        self._burst_heading = complex(float(action[0]), float(action[1]))
        self._burst_left = int(self._rng.integers(*_BURST_STEPS))

    def _plan(self, positions: list[complex], effector: complex) -> complex:
        """Displacement of the effector in metres, of any length (the action shortens it)."""
        env = self._env
        task = env.task
        if task.family == "reach":
            clearance = BLOCK_RADIUS + env.embodiment.effector_radius
            return find_waypoint(effector, positions[0], positions[1:], clearance) - effector
        if task.family == "separate":
            moved, goal = self._separating_push(positions, effector)
            anchor = None
        else:
            moved, goal, anchor = 0, task.goal(positions), task.anchor
        # A block pushed up against its anchor must not walk around it.
        passed = [p for i, p in enumerate(positions) if i != moved and not (i == anchor and task.offset == 0)]
        waypoint = goal
        if task.family != "separate":
            waypoint = find_waypoint(positions[moved], goal, passed, _PUSH_CLEARANCE)
        return self._push(moved, waypoint, positions, effector)

    def _push(self, moved: int, waypoint: complex, positions: list[complex], effector: complex) -> complex:
        block = positions[moved]
        heading = _unit(waypoint - block)
        relative = (effector - block) / heading  # block's frame: pushing along +x, so behind is -x
        radius = self._env.embodiment.effector_radius
        touching = BLOCK_OUTER_RADIUS + radius
        if self._pushing:
            self._pushing = relative.real < -0.3 * touching and abs(relative.imag) < 0.75 * BLOCK_RADIUS
        else:
            aligned = relative.real < 0 and abs(relative.imag) < 0.35 * BLOCK_RADIUS
            self._pushing = aligned and abs(relative) < touching + 2 * _BEHIND_GAP
        if self._pushing:
            direction = complex(1.0, -_STEERING * relative.imag / BLOCK_RADIUS)
            return _unit(direction) * heading  # a metre: full speed
        behind = _inside(block - heading * (touching + _BEHIND_GAP), WORKSPACE_HALF_SIZE)
        return find_waypoint(effector, behind, positions, touching) - effector

    def _separating_push(self, positions: list[complex], effector: complex) -> tuple[int, complex]:
        """Which block of the pair to push, and where to: the cheapest push that is free at both ends."""
        if self._separation is not None:
            moved, goal = self._separation
            if abs(positions[moved] - goal) > 0.02:
                return moved, goal
        touching = BLOCK_OUTER_RADIUS + self._env.embodiment.effector_radius
        best = (math.inf, 0, positions[0] + (positions[0] - positions[1]))
        for moved in (0, 1):
            block, partner = positions[moved], positions[1 - moved]
            others = [p for i, p in enumerate(positions) if i != moved]
            for step in range(24):
                heading = cmath.rect(1.0, 2 * math.pi * step / 24)
                goal, behind = block + 0.16 * heading, block - heading * (touching + _BEHIND_GAP)
                room = min(abs(behind - p) for p in others) - touching
                landing = (
                    min(distance_to_segment(p, block, goal) for p in others if p != partner) if others[1:] else 1.0
                )
                cost = abs(behind - effector) + 0.3 * moved
                cost += 20 * max(0.0, -room) + 10 * max(0.0, _PUSH_CLEARANCE - landing)
                cost += 20 * max(0.0, self._env.task.threshold + 0.01 - abs(goal - partner))
                cost += 20 * abs(_inside(goal, BOARD_HALF_SIZE - 0.04) - goal)
                cost += 20 * abs(_inside(behind, WORKSPACE_HALF_SIZE) - behind)
                best = min(best, (cost, moved, goal), key=lambda candidate: candidate[0])
        self._separation = best[1], best[2]
        return self._separation


def find_waypoint(start: complex, end: complex, obstacles: Sequence[complex], clearance: float) -> complex:
    """Next point on the shortest way around discs: `end` itself when the way is free.

    Args:
        start, end: metres.
        obstacles: centres of the discs.
        clearance: their radius; a disc that holds `start` or `end` is shrunk until it does not.

    Returns:
        A point to head for in a straight line.
    """
    discs = [(o, min(clearance, 0.97 * abs(o - start), 0.97 * abs(o - end))) for o in obstacles]
    if all(distance_to_segment(centre, start, end) >= radius for centre, radius in discs):
        return end
    reach = 1.02 / math.cos(math.pi / _NUM_CORNERS)  # the polygon's edges stay outside its disc
    nodes = [start, end]
    for centre, radius in discs:
        for k in range(_NUM_CORNERS):
            corner = centre + cmath.rect(reach * radius, 2 * math.pi * k / _NUM_CORNERS)
            node = _inside(corner, WORKSPACE_HALF_SIZE)  # a disc near the border can be passed along the border
            if abs(node - centre) > radius:
                nodes.append(node)
    return _first_step(np.array(nodes), np.array([d[0] for d in discs]), np.array([d[1] for d in discs]))


def _first_step(nodes: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> complex:
    """Dijkstra from node 0 to node 1 over the free straight lines; node 1 itself when there is no way."""
    lengths = np.abs(nodes[:, None] - nodes[None, :])
    steps = nodes[None, :] - nodes[:, None]
    for centre, radius in zip(centres, radii):
        towards = centre - nodes
        along = (towards[:, None] * steps.conj()).real / np.maximum(lengths**2, 1e-12)
        nearest = np.abs(nodes[:, None] + along.clip(0.0, 1.0) * steps - centre)
        lengths[nearest < radius - 1e-9] = np.inf
    cost = lengths[1].copy()  # from the end backwards, so that the answer is start's neighbour
    cost[1] = 0.0
    following = np.ones(len(nodes), np.int64)
    done = np.zeros(len(nodes), bool)
    while not done[0]:
        node = int(np.argmin(np.where(done, np.inf, cost)))
        if done[node] or not np.isfinite(cost[node]):
            break
        done[node] = True
        candidate = cost[node] + lengths[node]
        better = candidate < cost
        cost[better] = candidate[better]
        following[better] = node
    return complex(nodes[following[0]])


def _unit(vector: complex) -> complex:
    return vector / max(abs(vector), 1e-9)


def _inside(point: complex, half_size: float) -> complex:
    return complex(min(max(point.real, -half_size), half_size), min(max(point.imag, -half_size), half_size))
