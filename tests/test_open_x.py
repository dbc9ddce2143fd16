"""The table of Open X-Embodiment: against the features of its data sets, and each convention against numbers by hand."""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from open_x_features import STEP_FEATURES
from tfds_files import IMAGE, TEXT, encode_episode, write_tfds_folder

from lapa.data import open_x_actions as actions
from lapa.data.open_x import OPEN_X_DATASETS, open_x_dataset
from lapa.data.rlds import RldsSource
from lapa.data.rotations import from_fixed_axes, from_quaternions, from_rotation_vectors, roll_pitch_yaw
from lapa.data.schema import DELTA_END_EFFECTOR

NUM_STEPS = 4


def values_of(features, rng):
    """Values for features of steps: numbers in [-1, 1], two texts, images of noise."""
    if features == IMAGE:
        return list(rng.integers(0, 256, (NUM_STEPS, 2, 3, 3), dtype=np.uint8))
    if features == TEXT:
        return ["pick up the can", "pick up the can", "", "place it"]
    if isinstance(features, tuple):
        numbers = rng.uniform(-1, 1, (NUM_STEPS, *features[1:]))
        return numbers if features[0].startswith("float") else (numbers > 0).astype(np.int64)
    return {name: values_of(child, rng) for name, child in features.items()}


def character_codes(text):
    return np.pad(np.frombuffer(text.encode(), np.uint8), (0, 512 - len(text.encode()))).astype(np.int64)


def write_data_set(path, name, values=None, **options):
    """A folder of one episode with the features of a data set."""
    features = STEP_FEATURES[name] | {"is_first": ("bool",), "reward": ("float32",)}
    values = values_of(features, np.random.default_rng(0)) if values is None else values
    version = open_x_dataset(name).versions[-1]
    return write_tfds_folder(
        path, {"steps": features}, [[encode_episode({"steps": values})]], name=name, version=version, **options
    )


@pytest.mark.parametrize("name", STEP_FEATURES)
def test_each_row_fits_the_features_of_its_data_set(tmp_path, name):
    row = open_x_dataset(name)
    source = RldsSource(write_data_set(tmp_path / name, name))
    assert source.warnings == () and source.dataset is row
    assert source.cameras[: len(row.cameras)] == tuple(dict.fromkeys(row.cameras.values()))
    episode = next(iter(source))
    assert set(episode.cameras) == set(source.cameras) and episode.embodiment == row.embodiment
    assert episode.action.shape == (NUM_STEPS, 7) and episode.action.dtype == np.float32
    assert episode.action_names == DELTA_END_EFFECTOR and set(episode.action[:, 6].tolist()) <= {0.0, 1.0}
    np.testing.assert_allclose(episode.timestamps, np.arange(NUM_STEPS) / row.frequency)
    if name != "language_table":
        assert episode.instructions == ("pick up the can", "place it")
    by_role = RldsSource(tmp_path / name, cameras=list(row.cameras))
    assert by_role.cameras == source.cameras[: len(by_role.cameras)]
    raw = RldsSource(tmp_path / name, action_transform=None)
    assert next(iter(raw)).action.shape[0] == NUM_STEPS and raw.action_names != DELTA_END_EFFECTOR


def test_table():
    names = [name for row in OPEN_X_DATASETS for name in (row.name, *row.aliases)]
    assert len(set(names)) == len(names)
    mixture = {row.name: row.weight for row in OPEN_X_DATASETS if row.weight is not None}
    # As OpenVLA lists "magic soup plus": 27 data sets, and the sum of their weights.
    assert len(mixture) == 27 and mixture.keys() <= STEP_FEATURES.keys()
    assert sum(mixture.values()) == pytest.approx(31.0349758514)
    assert open_x_dataset("bridge_orig") is open_x_dataset("bridge_dataset")
    assert open_x_dataset("fmb_dataset").weight == 1 and open_x_dataset("droid_100").frequency == 15
    assert open_x_dataset("language_table_sim").action_transform is actions.pushes_in_the_plane
    assert open_x_dataset("my_data") is None
    for row in OPEN_X_DATASETS:
        assert row.frequency > 0 and row.homepage.startswith("https://") and row.primary
        assert pickle.loads(pickle.dumps(row)) == row


def test_documented_table_is_this_one():
    text = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for row in OPEN_X_DATASETS:
        if row.name.startswith("language_table_"):
            continue
        (line,) = (line for line in rows if line.startswith(f"| `{row.name}`"))
        for value in (*row.cameras.values(), row.embodiment, f"| {row.frequency:g} |", row.action_transform.__name__):
            assert value in line, f"{row.name}: {value} is not in {line}"
        assert ("–" if row.weight is None else f"{row.weight:g}") in line


def test_instructions_of_language_table(tmp_path):
    steps = values_of(STEP_FEATURES["language_table"] | {"is_first": ("bool",)}, np.random.default_rng(0))
    texts = ["push the red star", "push the red star", "poussez l'étoile", ""]
    steps["observation"]["instruction"] = np.stack([character_codes(text) for text in texts])
    episode = next(iter(RldsSource(write_data_set(tmp_path / "bytes", "language_table", steps))))
    assert episode.instructions == ("push the red star", "poussez l'étoile")
    np.testing.assert_allclose(episode.action[:, :2], steps["action"], rtol=1e-6)
    assert (episode.action[:, 2:6] == 0).all() and (episode.action[:, 6] == 1).all()
    # Code points above those of a byte, and codes that are no characters.
    codes = np.zeros((4, 512), dtype=np.int64)
    codes[:, :3] = [[0x661F, 65, 66], [0xD800, 65, 0], [-5, 66, 0], [0, 65, 65]]
    steps["observation"]["instruction"] = codes
    episode = next(iter(RldsSource(write_data_set(tmp_path / "points", "language_table", steps))))
    assert episode.instructions == ("星AB", "\N{REPLACEMENT CHARACTER}A", "\N{REPLACEMENT CHARACTER}B")
    assert "".join(episode.instructions).encode()


def test_paraphrases_of_droid(tmp_path):
    steps = values_of(STEP_FEATURES["droid"] | {"is_first": ("bool",)}, np.random.default_rng(0))
    steps["language_instruction"] = ["close it"] * NUM_STEPS
    steps["language_instruction_2"] = ["shut the drawer"] * NUM_STEPS
    steps["language_instruction_3"] = [""] * NUM_STEPS
    folder = write_data_set(tmp_path / "droid", "droid", steps)
    assert next(iter(RldsSource(folder))).instructions == ("close it", "shut the drawer")
    chosen = RldsSource(folder, instruction_key="language_instruction_2")
    assert next(iter(chosen)).instructions == ("shut the drawer",)


def rows(*values):
    return np.asarray(values, dtype=np.float32)


def test_gripper_that_arrives():
    opening = np.array([1.0, 0.7, 0.3, 0.0, 0.02, 0.5, 0.97, 1.0, 0.6, 0.4])
    # What lies in between goes to where it leads; the last two lead nowhere.
    expected = [1, 0, 0, 0, 0, 1, 1, 1, 1, 0]
    assert actions.open_where_arriving(opening).tolist() == [bool(value) for value in expected]
    assert actions.open_where_arriving(np.array([0.3])).tolist() == [False]


def test_gripper_that_changes():
    closing = np.array([0.0, 0.05, 1.0, 0.0, 0.0, -1.0, 0.0, 1.0])
    assert actions.open_after_changes(closing).tolist() == [True, True, False, False, False, True, True, False]
    # It was closed before it is told to open.
    assert actions.open_after_changes(np.array([0.0, -1.0, 0.0])).tolist() == [False, True, True]
    assert actions.open_after_changes(np.zeros(3)).tolist() == [True, True, True]


def test_reached_poses():
    state = rows(
        [0.1, 0.2, 0.3, 0.0, 0.0, 3.1, 1], [0.2, 0.2, 0.1, 0.1, 0.0, -3.1, 1], [0.2, 0.5, 0.1, 0.1, -0.2, -3.0, 0]
    )
    command = rows([0, 0, 0, 0, 0, 0, 1], [9, 9, 9, 9, 9, 9, 0.5], [7, 8, 9, 10, 11, 12, 0])
    # The yaw goes on over pi by 2 pi - 6.2.
    expected = [
        [0.1, 0, -0.2, 0.1, 0, 2 * math.pi - 6.2, 1],
        [0, 0.3, 0, 0, -0.2, 0.1, 0],
        [7, 8, 9, 10, 11, 12, 0],
    ]
    result = actions.reached_poses({"action": command, "observation/state": state})
    np.testing.assert_allclose(result, expected, atol=1e-6)
    in_parts = {
        "observation/state": state,
        "action/world_vector": command[:, :3],
        "action/rotation_delta": command[:, 3:6],
        "action/open_gripper": np.array([True, False, False]),
    }
    np.testing.assert_allclose(actions.reached_poses_with_open_flag(in_parts), expected, atol=1e-6)


PARTS = {
    "action/world_vector": rows([1, 2, 3], [4, 5, 6]),
    "action/rotation_delta": rows([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]),
}
MOTION = [[1, 2, 3, 0.1, 0.2, 0.3], [4, 5, 6, 0.4, 0.5, 0.6]]


@pytest.mark.parametrize(
    "transform, steps, motion, gripper",
    [
        # RT-1: -1 opens, so it was closed before; then 1 closes.
        (
            actions.moves_and_gripper_changes,
            PARTS | {"action/gripper_closedness_action": rows([0], [-1])},
            MOTION,
            [0, 1],
        ),
        (
            actions.moves_and_gripper_changes,
            PARTS | {"action/gripper_closedness_action": np.array([1.0, 0.0])},
            MOTION,
            [0, 0],
        ),
        (
            actions.shifts_and_gripper_changes,
            {"action/world_vector": rows([1, 2, 3], [4, 5, 6]), "action/gripper_closedness_action": rows([0], [1])},
            [[1, 2, 3, 0, 0, 0], [4, 5, 6, 0, 0, 0]],
            [1, 0],
        ),
        # RoboTurk and VIOLA: the same key, but where the gripper goes.
        (
            actions.moves_and_closedness,
            PARTS | {"action/gripper_closedness_action": rows([-1], [1])},
            MOTION,
            [1, 0],
        ),
        (actions.moves_with_closed_gripper, PARTS, MOTION, [0, 0]),
        (
            actions.pushes_in_the_plane,
            {"action": rows([1, 2], [3, 4])},
            [[1, 2, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0]],
            [1, 1],
        ),
        (
            actions.moves_relative_to_the_base,
            {"action/rel_actions_world": rows([1, 2, 3, 4, 5, 6, 1], [6, 5, 4, 3, 2, 1, -1])},
            [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]],
            [1, 0],
        ),
        # The same vector with opposite grippers.
        (
            actions.moves_and_opening,
            {"action": rows([1, 2, 3, 4, 5, 6, 0.9, 8], [6, 5, 4, 3, 2, 1, 0.1, 8])},
            [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]],
            [1, 0],
        ),
        (
            actions.moves_and_closing,
            {"action": rows([1, 2, 3, 4, 5, 6, 1], [6, 5, 4, 3, 2, 1, -1])},
            [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]],
            [0, 1],
        ),
        # Angles about z, x, y: yaw, roll, pitch.
        (
            actions.moves_about_zxy_and_closing,
            {"action": rows([1, 2, 3, 0.3, 0, 0, 0], [1, 2, 3, 0, 0.2, 0, 1])},
            [[1, 2, 3, 0, 0, 0.3], [1, 2, 3, 0.2, 0, 0]],
            [1, 0],
        ),
        # Half turns of 60 degrees about x, and of 90 about z.
        (
            actions.quaternion_moves_and_closing,
            {
                "action": rows(
                    [1, 2, 3, 0.5, 0, 0, math.sqrt(3) / 2, -1], [1, 2, 3, 0, 0, math.sqrt(0.5), math.sqrt(0.5), 1]
                )
            },
            [[1, 2, 3, math.pi / 3, 0, 0], [1, 2, 3, 0, 0, math.pi / 2]],
            [1, 0],
        ),
        (
            actions.moves_after_joint_velocities,
            {"action": rows([0] * 7 + [1, 2, 3, 4, 5, 6, 1, 0], [9] * 7 + [6, 5, 4, 3, 2, 1, -1, 1])},
            [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]],
            [1, 0],
        ),
        (
            actions.moves_and_gripper_state,
            {
                "action": rows([1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]),
                "observation/state": rows([8] * 6 + [1], [8] * 6 + [0]),
            },
            [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]],
            [0, 1],
        ),
        (
            actions.velocities_and_closedness,
            {
                "action_dict/cartesian_velocity": np.array([[1.0, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]),
                "action_dict/gripper_position": np.array([[0.8], [0.1]]),
            },
            [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]],
            [0, 1],
        ),
        # Poses become motion from each to the next: a quarter turn about z, none after the last.
        (
            actions.poses_with_open_flag,
            {
                "action/world_vector": rows([1, 2, 3], [1.5, 2, 2]),
                "action/rotation_delta": rows([0, 0, 3.0], [0, 0, 3.0 + math.pi / 2 - 2 * math.pi]),
                "action/open_gripper": np.array([True, False]),
            },
            [[0.5, 0, -1, 0, 0, math.pi / 2], [0, 0, 0, 0, 0, 0]],
            [1, 0],
        ),
        (
            actions.millimetre_poses_and_opening,
            {"action": rows([400, 100, 200, 180, 0, 0, 1, 0], [500, 100, 150, -150, 0, 0, 0, 1])},
            [[0.1, 0, -0.05, math.pi / 6, 0, 0], [0, 0, 0, 0, 0, 0]],
            [1, 0],
        ),
        (
            actions.quaternion_poses_and_opening,
            {"action": rows([1, 0, 0, 0, 0, 0, 1, 1], [1, 0, 2, 0, -math.sqrt(0.5), 0, -math.sqrt(0.5), 0])},
            [[0, 0, 2, 0, math.pi / 2, 0], [0, 0, 0, 0, 0, 0]],
            [1, 0],
        ),
    ],
)
def test_conventions(transform, steps, motion, gripper):
    result = transform(steps)
    assert result.shape == (2, 7) and result.dtype == np.float32
    np.testing.assert_allclose(result[:, :6], motion, atol=2e-6)
    assert result[:, 6].tolist() == gripper


def test_residuals_of_rotation_vectors():
    """BC-Z adds to the rotation vector of a pose: from half a turn about x that is not a rotation by what is added."""
    steps = {
        "observation/present/axis_angle": rows([math.pi, 0, 0], [0, 0, 0.2]),
        "action/future/axis_angle_residual": np.concatenate(
            [rows([0.1, 0, 0], [0, 0, 0.3]), np.full((2, 27), 9, np.float32)], axis=1
        ),
        "action/future/xyz_residual": np.concatenate([rows([1, 2, 3], [4, 5, 6]), np.full((2, 27), 9)], axis=1),
        "action/future/target_close": np.array([[1] + [0] * 9, [0] + [1] * 9]),
    }
    expected = [[1, 2, 3, 0.1, 0, 0, 0], [4, 5, 6, 0, 0, 0.3, 1]]
    np.testing.assert_allclose(actions.next_residuals(steps), expected, atol=1e-6)
    # (pi, 0.2, 0) is nearly half a turn about an axis that is turned by 0.2 / pi: a turn about z by twice that.
    steps["action/future/axis_angle_residual"][0, :3] = [0, 0.2, 0]
    turned = actions.next_residuals(steps)[0, 3:6]
    np.testing.assert_allclose(turned, [0, 0, 2 * 0.2 / math.pi], atol=0.01)


@pytest.mark.parametrize("row", OPEN_X_DATASETS, ids=lambda row: row.name)
def test_one_step_is_enough(row):
    class Zeros:
        """One step of zeros of the announced shapes."""

        features = STEP_FEATURES[row.name if row.name in STEP_FEATURES else "language_table"]

        def __getitem__(self, key):
            node = self.features
            for part in key.split("/", 1):
                node = node[part]
            return np.zeros((1, *node[1:]), dtype=np.float32)

    assert row.action_transform(Zeros()).shape == (1, 7)


def test_rotations():
    angles = np.random.default_rng(0).uniform([-3.1, -1.5, -3.1], [3.1, 1.5, 3.1], (50, 3))
    np.testing.assert_allclose(roll_pitch_yaw(from_fixed_axes(angles, "xyz")), angles, atol=1e-9)
    # R = Rz(yaw) Ry(pitch) Rx(roll): x goes to y under a yaw of a quarter turn, whatever the roll was.
    turned = from_fixed_axes(np.array([0.4, 0, math.pi / 2]), "xyz") @ [1, 0, 0]
    np.testing.assert_allclose(turned, [0, 1, 0], atol=1e-12)
    # Where pitch is at its limit, roll and yaw turn about one axis; the rotation is still that one.
    locked = from_fixed_axes(np.array([0.3, math.pi / 2, 0.5]), "xyz")
    np.testing.assert_allclose(from_fixed_axes(roll_pitch_yaw(locked), "xyz"), locked, atol=1e-6)
    vectors = np.random.default_rng(1).normal(size=(20, 3))
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    quaternions = np.concatenate([vectors / length * np.sin(length / 2), np.cos(length / 2)], axis=1)
    np.testing.assert_allclose(from_quaternions(3 * quaternions), from_rotation_vectors(vectors), atol=1e-9)
    np.testing.assert_allclose(from_rotation_vectors(np.zeros(3)), np.eye(3))
    np.testing.assert_allclose(from_quaternions(np.zeros(4)), np.eye(3))
