"""
Features of the data sets of Open X-Embodiment, as their `features.json` has them (https://www.tensorflow.org/datasets/catalog):
all cameras, instructions and actions, and the numbers that actions are made from. Images are smaller here.
"""

from tfds_files import IMAGE, TEXT

FLOAT, FLAG = ("float32",), ("bool",)


def floats(*shape):
    return ("float32", *shape)


OBSERVED = {"natural_language_instruction": TEXT, "natural_language_embedding": floats(512)}
MOVES = {"world_vector": floats(3), "rotation_delta": floats(3)}
GOOGLE_MOVES = MOVES | {
    "base_displacement_vector": floats(2),
    "base_displacement_vertical_rotation": floats(1),
    "gripper_closedness_action": floats(1),
    "terminate_episode": ("int32", 3),
}


def in_parts(action, **observation):
    """The layout of the first data sets: an action in parts, the instruction among the observations."""
    return {"action": action, "observation": OBSERVED | observation}


def one_vector(size, **observation):
    """The layout of data sets that were converted later: an action of one vector, the instruction beside it."""
    return {
        "action": floats(size),
        "language_instruction": TEXT,
        "language_embedding": floats(512),
        "observation": observation,
    }


STEP_FEATURES = {
    "fractal20220817_data": in_parts(GOOGLE_MOVES, image=IMAGE, workspace_bounds=floats(3, 3)),
    "kuka": in_parts(GOOGLE_MOVES, image=IMAGE, **{"clip_function_input/base_pose_tool_reached": floats(7)}),
    "bridge_dataset": one_vector(7, image_0=IMAGE, image_1=IMAGE, image_2=IMAGE, image_3=IMAGE, state=floats(7)),
    "bridge": in_parts(MOVES | {"open_gripper": FLAG, "terminate_episode": FLOAT}, image=IMAGE, state=floats(7)),
    "taco_play": in_parts(
        {"actions": floats(7), "rel_actions_gripper": floats(7), "rel_actions_world": floats(7)},
        rgb_gripper=IMAGE,
        rgb_static=IMAGE,
        structured_language_instruction=TEXT,
        robot_obs=floats(15),
    ),
    "jaco_play": in_parts(
        {"gripper_closedness_action": floats(1), "terminate_episode": ("int32", 3), "world_vector": floats(3)},
        image=IMAGE,
        image_wrist=IMAGE,
    ),
    "berkeley_cable_routing": in_parts(
        MOVES | {"terminate_episode": FLOAT},
        image=IMAGE,
        top_image=IMAGE,
        wrist225_image=IMAGE,
        wrist45_image=IMAGE,
    ),
    "roboturk": in_parts(MOVES | {"gripper_closedness_action": floats(1)}, front_rgb=IMAGE),
    "viola": in_parts(MOVES | {"gripper_closedness_action": FLOAT}, agentview_rgb=IMAGE, eye_in_hand_rgb=IMAGE),
    "berkeley_autolab_ur5": in_parts(
        MOVES | {"gripper_closedness_action": FLOAT}, image=IMAGE, hand_image=IMAGE, robot_state=floats(15)
    ),
    "toto": in_parts(MOVES | {"open_gripper": FLAG, "terminate_episode": FLOAT}, image=IMAGE, state=floats(7)),
    "language_table": {
        "action": floats(2),
        "observation": {"rgb": IMAGE, "instruction": ("int32", 512), "effector_translation": floats(2)},
    },
    "stanford_hydra_dataset_converted_externally_to_rlds": one_vector(
        7, image=IMAGE, wrist_image=IMAGE, state=floats(27)
    ),
    "austin_buds_dataset_converted_externally_to_rlds": one_vector(
        7, image=IMAGE, wrist_image=IMAGE, state=floats(24)
    ),
    "nyu_franka_play_dataset_converted_externally_to_rlds": one_vector(
        15, image=IMAGE, image_additional_view=IMAGE, state=floats(13)
    ),
    "furniture_bench_dataset_converted_externally_to_rlds": one_vector(
        8, image=IMAGE, wrist_image=IMAGE, state=floats(35)
    ),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": one_vector(8, image=IMAGE, state=floats(21)),
    "austin_sailor_dataset_converted_externally_to_rlds": one_vector(
        7, image=IMAGE, wrist_image=IMAGE, state=floats(8)
    ),
    "austin_sirius_dataset_converted_externally_to_rlds": one_vector(
        7, image=IMAGE, wrist_image=IMAGE, state=floats(8)
    ),
    "dlr_edan_shared_control_converted_externally_to_rlds": one_vector(7, image=IMAGE, state=floats(7)),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": one_vector(
        8, image=IMAGE, wrist_image=IMAGE, state=floats(20)
    ),
    "utaustin_mutex": one_vector(7, image=IMAGE, wrist_image=IMAGE, state=floats(24)),
    "berkeley_fanuc_manipulation": one_vector(6, image=IMAGE, wrist_image=IMAGE, state=floats(13)),
    "cmu_stretch": one_vector(8, image=IMAGE, state=floats(4)),
    "bc_z": in_parts(
        {
            "future/axis_angle_residual": floats(30),
            "future/target_close": ("int64", 10),
            "future/xyz_residual": floats(30),
        },
        image=IMAGE,
        **{"present/axis_angle": floats(3), "present/xyz": floats(3), "present/autonomous": ("int64",)},
    ),
    "fmb": one_vector(
        7, image_side_1=IMAGE, image_side_2=IMAGE, image_wrist_1=IMAGE, image_wrist_2=IMAGE, eef_pose=floats(7)
    ),
    "dobbe": one_vector(7, wrist_image=IMAGE, state=floats(7)),
    "droid": {
        "action": ("float64", 7),
        "action_dict": {
            "cartesian_position": ("float64", 6),
            "cartesian_velocity": ("float64", 6),
            "gripper_position": ("float64", 1),
        },
        "language_instruction": TEXT,
        "language_instruction_2": TEXT,
        "language_instruction_3": TEXT,
        "observation": {
            "exterior_image_1_left": IMAGE,
            "exterior_image_2_left": IMAGE,
            "wrist_image_left": IMAGE,
            "cartesian_position": ("float64", 6),
        },
    },
}
