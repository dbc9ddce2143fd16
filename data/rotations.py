"""
Rotations as (..., 3, 3) matrices, from and to the forms in which robots record them.

Roll, pitch and yaw are angles about the fixed axes x, y and z, in this order: R = Rz(yaw) Ry(pitch) Rx(roll).
"""

import numpy as np
from numpy.typing import NDArray

Rotations = NDArray[np.float64]

# Below this length a rotation vector or a quaternion has no direction.
TINY = 1e-12
# Sine of a pitch from which roll and yaw turn about the same axis.
GIMBAL_LOCK = 1 - 1e-9


def from_fixed_axes(angles: NDArray[np.floating], axes: str) -> Rotations:
    """
    Rotations about fixed axes, one after the other.

    Args:
        angles: (..., 3) radians, in the order of `axes`.
        axes: As `xyz` for roll, pitch and yaw: the axis of each angle, the first turned about first.
    """
    result = np.broadcast_to(np.eye(3), (*np.shape(angles)[:-1], 3, 3))
    for axis, angle in zip(axes, np.moveaxis(np.asarray(angles, dtype=np.float64), -1, 0), strict=True):
        vector = np.zeros((*angle.shape, 3))
        vector[..., "xyz".index(axis)] = angle
        result = from_rotation_vectors(vector) @ result
    return result


def from_rotation_vectors(vectors: NDArray[np.floating]) -> Rotations:
    """(..., 3) axis times angle in radians -> matrices (Rodrigues)."""
    vectors = np.asarray(vectors, dtype=np.float64)
    angles = np.linalg.norm(vectors, axis=-1)[..., None, None]
    axes = vectors / np.maximum(angles[..., 0], TINY)
    cross = np.zeros((*axes.shape, 3))
    for axis, (row, column) in enumerate([(2, 1), (0, 2), (1, 0)]):
        cross[..., row, column], cross[..., column, row] = axes[..., axis], -axes[..., axis]
    result: Rotations = np.eye(3) + np.sin(angles) * cross + (1 - np.cos(angles)) * (cross @ cross)
    return result


def from_quaternions(quaternions: NDArray[np.floating]) -> Rotations:
    """(..., 4) as (x, y, z, w), of any length but zero -> matrices; no rotation where the length is zero."""
    quaternions = np.asarray(quaternions, dtype=np.float64)
    vector, scalar = quaternions[..., :3], quaternions[..., 3]
    length = np.linalg.norm(vector, axis=-1)
    angle = 2 * np.arctan2(length, scalar)
    return from_rotation_vectors(vector / np.maximum(length, TINY)[..., None] * angle[..., None])


def roll_pitch_yaw(rotations: Rotations) -> NDArray[np.float64]:
    """Matrices -> (..., 3) radians, in [-pi, pi], pitch in [-pi / 2, pi / 2]; roll is 0 where pitch is at its limit."""
    sine = np.clip(-rotations[..., 2, 0], -1, 1)
    free = np.abs(sine) < GIMBAL_LOCK
    roll = np.where(free, np.arctan2(rotations[..., 2, 1], rotations[..., 2, 2]), 0)
    yaw = np.where(
        free,
        np.arctan2(rotations[..., 1, 0], rotations[..., 0, 0]),
        np.arctan2(-rotations[..., 0, 1], rotations[..., 1, 1]),
    )
    return np.stack([roll, np.arcsin(sine), yaw], axis=-1)


__all__ = ["Rotations", "from_fixed_axes", "from_quaternions", "from_rotation_vectors", "roll_pitch_yaw"]
