"""
Actions of the data sets of Open X-Embodiment brought to one form: seven numbers per step, `DELTA_END_EFFECTOR`.

Every function takes the step features of an episode by their path and gives (num_steps, 7) float32: displacement (x, y, z)
and rotation (roll, pitch, yaw) of the end effector during the step, and the gripper, 1 open or 0 closed. There is one
function per convention, named by it; which data set follows which is the table in `open_x`.

What a displacement or a rotation is measured in stays as it is recorded (metres and radians, velocities, or the units of a
controller): a policy normalises actions by the statistics of each data set. Poses are made into motion, and a gripper is
made binary, because no statistics can do that.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lapa.data.rotations import (
    Rotations,
    from_fixed_axes,
    from_quaternions,
    from_rotation_vectors,
    roll_pitch_yaw,
)

Actions = NDArray[np.float32]


class StepFeatures(Protocol):
    """Numeric step features by their path below `steps`: each (num_steps, ...), decoded when it is asked for."""

    def __getitem__(self, key: str) -> NDArray[Any]: ...


ActionTransform = Callable[[StepFeatures], Actions]

# A gripper that is nearer to open than this, or to closed, has arrived (BridgeData V2: in between it is moving).
ARRIVED = 0.05
# A change of a gripper by less than this is none (RT-1's gripper action is -1, 0 or 1, with noise).
CHANGE = 0.1
MILLIMETRES = 1e-3


def _join(motion: NDArray[Any], is_open: NDArray[Any]) -> Actions:
    """Motion (num_steps, 6) and gripper (num_steps,) -> actions."""
    return np.concatenate([motion, is_open.reshape(-1, 1)], axis=1).astype(np.float32)


def _moved(steps: StepFeatures) -> NDArray[Any]:
    """Motion where displacement and rotation are features of their own."""
    return np.concatenate([steps["action/world_vector"], steps["action/rotation_delta"]], axis=1)


def _flat(values: NDArray[Any]) -> NDArray[Any]:
    """(num_steps,) or (num_steps, 1) -> (num_steps,)."""
    return values.reshape(-1)


def open_where_arriving(opening: NDArray[Any]) -> NDArray[np.bool_]:
    """
    A gripper that takes some steps to open or close, as the state in which it arrives.

    Args:
        opening: (num_steps,), 0 closed to 1 open.

    Returns:
        (num_steps,): a value in between counts as the next one that is at an end; the last ones, which arrive nowhere,
        as the end they are nearer to.
    """
    is_open = opening > 0.5
    arrived = np.flatnonzero((opening < ARRIVED) | (opening > 1 - ARRIVED))
    upcoming = np.searchsorted(arrived, np.arange(len(opening)))
    known = upcoming < len(arrived)
    result = is_open.copy()
    result[known] = is_open[arrived[upcoming[known]]]
    return result


def open_after_changes(closing: NDArray[Any]) -> NDArray[np.bool_]:
    """
    A gripper that is told to change, as the state it is then in.

    Args:
        closing: (num_steps,): above 0 closes it, below 0 opens it, about 0 leaves it.

    Returns:
        (num_steps,): before the first change the opposite of it, as no change is without effect; open where there is
        none.
    """
    changes = np.flatnonzero(np.abs(closing) > CHANGE)
    if not len(changes):
        return np.ones(len(closing), dtype=np.bool_)
    opens = closing[changes] < 0
    latest = np.searchsorted(changes, np.arange(len(closing)), side="right") - 1
    return np.where(latest < 0, not opens[0], opens[np.maximum(latest, 0)])


def _between_euler_poses(poses: NDArray[Any]) -> NDArray[np.float64]:
    """
    (num_steps, 6) poses reached -> (num_steps - 1, 6) motion from each to the next: differences of the coordinates, those
    of angles the short way round.
    """
    motion = np.diff(poses.astype(np.float64), axis=0)
    motion[:, 3:] = (motion[:, 3:] + np.pi) % (2 * np.pi) - np.pi
    return motion


def _between_poses(positions: NDArray[Any], rotations: Rotations) -> NDArray[np.float64]:
    """
    Poses -> (num_steps, 6) motion from each to the next, about the axes of the robot's base. There is none in the last
    step, after which no pose is known.
    """
    displacement = np.diff(positions.astype(np.float64), axis=0, append=positions[-1:])
    following = np.concatenate([rotations[1:], rotations[-1:]])
    return np.concatenate([displacement, roll_pitch_yaw(following @ np.swapaxes(rotations, -1, -2))], axis=1)


def reached_poses(steps: StepFeatures) -> Actions:
    """
    BridgeData V2: motion between the poses reached (`observation/state`), as what is commanded lags behind; in the last
    step, after which none is reached, as commanded. Gripper 0 to 1 (open), taken as the state in which it arrives.
    """
    action = steps["action"]
    motion = np.concatenate([_between_euler_poses(steps["observation/state"][:, :6]), action[-1:, :6]])
    return _join(motion, open_where_arriving(action[:, 6]))


def reached_poses_with_open_flag(steps: StepFeatures) -> Actions:
    """Bridge of Open X-Embodiment: as `reached_poses`, with the command in parts and the gripper as `open_gripper`."""
    motion = np.concatenate([_between_euler_poses(steps["observation/state"][:, :6]), _moved(steps)[-1:]])
    return _join(motion, _flat(steps["action/open_gripper"]))


def moves_and_gripper_changes(steps: StepFeatures) -> Actions:
    """RT-1, Kuka, Berkeley UR5: `gripper_closedness_action` changes the gripper, 1 closes and -1 opens it."""
    return _join(_moved(steps), open_after_changes(_flat(steps["action/gripper_closedness_action"])))


def shifts_and_gripper_changes(steps: StepFeatures) -> Actions:
    """Jaco Play: as `moves_and_gripper_changes`, without rotation."""
    shift = steps["action/world_vector"]
    motion = np.concatenate([shift, np.zeros_like(shift)], axis=1)
    return _join(motion, open_after_changes(_flat(steps["action/gripper_closedness_action"])))


def moves_and_closedness(steps: StepFeatures) -> Actions:
    """RoboTurk, VIOLA: `gripper_closedness_action` is where the gripper goes, 1 closed and 0 or -1 open."""
    return _join(_moved(steps), _flat(steps["action/gripper_closedness_action"]) < 0.5)


def moves_with_closed_gripper(steps: StepFeatures) -> Actions:
    """Berkeley Cable Routing: velocities, and a gripper that holds the cable throughout."""
    motion = _moved(steps)
    return _join(motion, np.zeros(len(motion)))


def pushes_in_the_plane(steps: StepFeatures) -> Actions:
    """Language Table: a stick that moves in x and y; counted as an open gripper."""
    shift = steps["action"]
    motion = np.concatenate([shift, np.zeros((len(shift), 4))], axis=1)
    return _join(motion, np.ones(len(shift)))


def moves_relative_to_the_base(steps: StepFeatures) -> Actions:
    """TACO Play: `rel_actions_world`, in the frame of the base; gripper 1 open, -1 closed, as in CALVIN."""
    action = steps["action/rel_actions_world"]
    return _join(action[:, :6], action[:, 6] > 0.5)


def moves_and_opening(steps: StepFeatures) -> Actions:
    """CMU Stretch, FMB, DobbE: one vector, motion first, then how far the gripper is open, 0 to 1."""
    action = steps["action"]
    return _join(action[:, :6], action[:, 6] > 0.5)


def moves_and_closing(steps: StepFeatures) -> Actions:
    """Hydra, BUDS, SAILOR, SIRIUS, MUTEX: one vector, motion first, then the gripper, 1 closed and 0 or -1 open."""
    action = steps["action"]
    return _join(action[:, :6], action[:, 6] < 0.5)


def moves_about_zxy_and_closing(steps: StepFeatures) -> Actions:
    """DLR EDAN: as `moves_and_closing`, with angles about the fixed axes z, x and y in this order."""
    action = steps["action"]
    rotation = roll_pitch_yaw(from_fixed_axes(action[:, 3:6], "zxy"))
    return _join(np.concatenate([action[:, :3], rotation], axis=1), action[:, 6] < 0.5)


def quaternion_moves_and_closing(steps: StepFeatures) -> Actions:
    """FurnitureBench: displacement, rotation as a quaternion (x, y, z, w), then the gripper, 1 closed and -1 open."""
    action = steps["action"]
    rotation = roll_pitch_yaw(from_quaternions(action[:, 3:7]))
    return _join(np.concatenate([action[:, :3], rotation], axis=1), action[:, 7] < 0.5)


def moves_after_joint_velocities(steps: StepFeatures) -> Actions:
    """NYU Franka Play: seven joint velocities, motion, gripper (1 open, -1 closed), end of the episode."""
    action = steps["action"]
    return _join(action[:, 7:13], action[:, 13] > 0.5)


def moves_and_gripper_state(steps: StepFeatures) -> Actions:
    """Berkeley Fanuc: motion only; the gripper is the seventh number of the state, 1 closed."""
    return _join(steps["action"], steps["observation/state"][:, 6] < 0.5)


def next_residuals(steps: StepFeatures) -> Actions:
    """
    BC-Z: of the ten future steps that are recorded the first. The rotation is a number to add to the rotation vector of
    the present pose, and `target_close` where the gripper goes, 1 closed.
    """
    present = steps["observation/present/axis_angle"]
    target = present + steps["action/future/axis_angle_residual"][:, :3]
    rotation = from_rotation_vectors(target) @ np.swapaxes(from_rotation_vectors(present), -1, -2)
    motion = np.concatenate([steps["action/future/xyz_residual"][:, :3], roll_pitch_yaw(rotation)], axis=1)
    return _join(motion, steps["action/future/target_close"][:, 0] < 0.5)


def velocities_and_closedness(steps: StepFeatures) -> Actions:
    """DROID: `cartesian_velocity` in the frame of the base, and `gripper_position`, 1 closed."""
    return _join(steps["action_dict/cartesian_velocity"], _flat(steps["action_dict/gripper_position"]) < 0.5)


def poses_with_open_flag(steps: StepFeatures) -> Actions:
    """TOTO: `world_vector` and `rotation_delta` are poses in spite of their names; motion is from each to the next."""
    rotations = from_fixed_axes(steps["action/rotation_delta"], "xyz")
    return _join(_between_poses(steps["action/world_vector"], rotations), _flat(steps["action/open_gripper"]))


def millimetre_poses_and_opening(steps: StepFeatures) -> Actions:
    """UCSD Kitchen: poses in millimetres and degrees, the gripper (1 open), end of the episode."""
    action = steps["action"]
    rotations = from_fixed_axes(np.deg2rad(action[:, 3:6]), "xyz")
    return _join(_between_poses(action[:, :3] * MILLIMETRES, rotations), action[:, 6] > 0.5)


def quaternion_poses_and_opening(steps: StepFeatures) -> Actions:
    """CMU Pickup Insert: position, orientation as a quaternion (x, y, z, w), the gripper (1 open)."""
    action = steps["action"]
    return _join(_between_poses(action[:, :3], from_quaternions(action[:, 3:7])), action[:, 7] > 0.5)


__all__ = [
    "ActionTransform",
    "StepFeatures",
    "millimetre_poses_and_opening",
    "moves_about_zxy_and_closing",
    "moves_after_joint_velocities",
    "moves_and_closedness",
    "moves_and_closing",
    "moves_and_gripper_changes",
    "moves_and_gripper_state",
    "moves_and_opening",
    "moves_relative_to_the_base",
    "moves_with_closed_gripper",
    "next_residuals",
    "open_after_changes",
    "open_where_arriving",
    "poses_with_open_flag",
    "pushes_in_the_plane",
    "quaternion_moves_and_closing",
    "quaternion_poses_and_opening",
    "reached_poses",
    "reached_poses_with_open_flag",
    "shifts_and_gripper_changes",
    "velocities_and_closedness",
]
