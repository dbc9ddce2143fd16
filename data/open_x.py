"""
What differs between the data sets of Open X-Embodiment: one row each.

There is a row for each data set of OpenVLA's mixture "magic soup plus", for the Bridge of Open X-Embodiment, and for the
simulations of Language Table. A row gives `RldsSource` its defaults for a folder of that name.

Sources: feature structure and version from the TFDS catalogue (https://www.tensorflow.org/datasets/catalog) and the
`features.json` of the buckets; camera roles, gripper conventions and mixture weights from OpenVLA
(https://github.com/openvla/openvla, `prismatic/vla/datasets/rlds/oxe`); control frequencies from the overview of Open
X-Embodiment (https://robotics-transformer-x.github.io) as kept in RDT-1B's `dataset_control_freq.json`
(https://github.com/thu-ml/RoboticsDiffusionTransformer).
"""

from dataclasses import dataclass, replace

from lapa.data import open_x_actions as actions
from lapa.data.open_x_actions import ActionTransform

STEP_INSTRUCTION = ("language_instruction",)
OBSERVED_INSTRUCTION = ("observation/natural_language_instruction",)
# Of everything but software in https://github.com/google-deepmind/open_x_embodiment.
COLLECTION_LICENCE = "CC BY 4.0 (Open X-Embodiment)"
OWN_LICENCE = "CC BY 4.0"


@dataclass(frozen=True)
class OpenXDataset:
    r"""
    One data set.

    Args:
        name (`str`): As in its `dataset_info.json`.
        embodiment (`str`): Robot.
        frequency (`float`): Control steps per second, which are the steps that are recorded.
        action_transform (`ActionTransform`): Makes the action of `DELTA_END_EFFECTOR`.
        weight (`float`, *optional*): In OpenVLA's "magic soup plus"; None where it is not part of it.
        homepage (`str`): Of its authors.
        primary, secondary, wrist (`str`, *optional*): Cameras by their role: the main view from outside, another one,
            and one on the arm.
        instruction_keys (`tuple[str, ...]`): Step features with instructions, the others being paraphrases of the first.
        versions (`tuple[str, ...]`): That the row holds for.
        licence (`str`): Of the RLDS data.
        aliases (`tuple[str, ...]`): Other names it is kept under.
    """

    name: str
    embodiment: str
    frequency: float
    action_transform: ActionTransform
    weight: float | None
    homepage: str
    primary: str | None = "image"
    secondary: str | None = None
    wrist: str | None = None
    instruction_keys: tuple[str, ...] = STEP_INSTRUCTION
    versions: tuple[str, ...] = ("0.1.0",)
    licence: str = COLLECTION_LICENCE
    aliases: tuple[str, ...] = ()

    @property
    def cameras(self) -> dict[str, str]:
        """Cameras by their role, the main one first."""
        roles = {"primary": self.primary, "secondary": self.secondary, "wrist": self.wrist}
        return {role: camera for role, camera in roles.items() if camera is not None}


_LANGUAGE_TABLE = OpenXDataset(
    "language_table",
    "xarm",
    10,
    actions.pushes_in_the_plane,
    0.1,
    "https://interactive-language.github.io/",
    primary="rgb",
    instruction_keys=("observation/instruction",),
    versions=("0.0.1", "0.1.0"),
)

OPEN_X_DATASETS: tuple[OpenXDataset, ...] = (
    OpenXDataset(
        "fractal20220817_data",
        "google_robot",
        3,
        actions.moves_and_gripper_changes,
        0.54087122203,
        "https://robotics-transformer1.github.io/",
        instruction_keys=OBSERVED_INSTRUCTION,
    ),
    OpenXDataset(
        "kuka",
        "kuka_iiwa",
        10,
        actions.moves_and_gripper_changes,
        0.8341046294,
        "https://arxiv.org/abs/1806.10293",
        instruction_keys=OBSERVED_INSTRUCTION,
    ),
    OpenXDataset(
        "bridge_dataset",
        "widowx",
        5,
        actions.reached_poses,
        1.0,
        "https://rail-berkeley.github.io/bridgedata/",
        primary="image_0",
        secondary="image_1",
        versions=("1.0.0",),
        licence=OWN_LICENCE,
        aliases=("bridge_orig",),
    ),
    OpenXDataset(
        "bridge",
        "widowx",
        5,
        actions.reached_poses_with_open_flag,
        # The older part of the same recordings; "magic soup plus" takes `bridge_dataset` in its place.
        None,
        "https://rail-berkeley.github.io/bridgedata/",
        instruction_keys=OBSERVED_INSTRUCTION,
        licence=OWN_LICENCE,
        aliases=("bridge_oxe",),
    ),
    OpenXDataset(
        "taco_play",
        "franka",
        15,
        actions.moves_relative_to_the_base,
        2.0,
        "https://www.kaggle.com/datasets/oiermees/taco-robot",
        primary="rgb_static",
        wrist="rgb_gripper",
        instruction_keys=OBSERVED_INSTRUCTION,
    ),
    OpenXDataset(
        "jaco_play",
        "jaco_2",
        10,
        actions.shifts_and_gripper_changes,
        1.0,
        "https://github.com/clvrai/clvr_jaco_play_dataset",
        wrist="image_wrist",
        instruction_keys=OBSERVED_INSTRUCTION,
        licence=OWN_LICENCE,
    ),
    OpenXDataset(
        "berkeley_cable_routing",
        "franka",
        10,
        actions.moves_with_closed_gripper,
        1.0,
        "https://sites.google.com/view/cablerouting/home",
        secondary="top_image",
        wrist="wrist45_image",
        instruction_keys=OBSERVED_INSTRUCTION,
    ),
    OpenXDataset(
        "roboturk",
        "sawyer",
        10,
        actions.moves_and_closedness,
        2.0,
        "https://roboturk.stanford.edu/dataset_real.html",
        primary="front_rgb",
        instruction_keys=OBSERVED_INSTRUCTION,
    ),
    OpenXDataset(
        "viola",
        "franka",
        20,
        actions.moves_and_closedness,
        2.0,
        "https://ut-austin-rpl.github.io/VIOLA/",
        primary="agentview_rgb",
        wrist="eye_in_hand_rgb",
        instruction_keys=OBSERVED_INSTRUCTION,
    ),
    OpenXDataset(
        "berkeley_autolab_ur5",
        "ur5",
        5,
        actions.moves_and_gripper_changes,
        2.0,
        "https://sites.google.com/view/berkeley-ur5/home",
        wrist="hand_image",
        instruction_keys=OBSERVED_INSTRUCTION,
    ),
    OpenXDataset(
        "toto",
        "franka",
        30,
        actions.poses_with_open_flag,
        1.0,
        "https://toto-benchmark.org/",
        instruction_keys=OBSERVED_INSTRUCTION,
    ),
    _LANGUAGE_TABLE,
    OpenXDataset(
        "stanford_hydra_dataset_converted_externally_to_rlds",
        "franka",
        10,
        actions.moves_and_closing,
        2.0,
        "https://sites.google.com/view/hydra-il-2023",
        wrist="wrist_image",
    ),
    OpenXDataset(
        "austin_buds_dataset_converted_externally_to_rlds",
        "franka",
        20,
        actions.moves_and_closing,
        1.0,
        "https://ut-austin-rpl.github.io/rpl-BUDS/",
        wrist="wrist_image",
    ),
    OpenXDataset(
        "nyu_franka_play_dataset_converted_externally_to_rlds",
        "franka",
        3,
        actions.moves_after_joint_velocities,
        3.0,
        "https://play-to-policy.github.io/",
        secondary="image_additional_view",
    ),
    OpenXDataset(
        "furniture_bench_dataset_converted_externally_to_rlds",
        "franka",
        10,
        actions.quaternion_moves_and_closing,
        0.1,
        "https://clvrai.github.io/furniture-bench/",
        wrist="wrist_image",
    ),
    OpenXDataset(
        "ucsd_kitchen_dataset_converted_externally_to_rlds",
        "xarm",
        2,
        actions.millimetre_poses_and_opening,
        2.0,
        "https://www.tensorflow.org/datasets/catalog/ucsd_kitchen_dataset_converted_externally_to_rlds",
    ),
    OpenXDataset(
        "austin_sailor_dataset_converted_externally_to_rlds",
        "franka",
        20,
        actions.moves_and_closing,
        1.0,
        "https://ut-austin-rpl.github.io/sailor/",
        wrist="wrist_image",
    ),
    OpenXDataset(
        "austin_sirius_dataset_converted_externally_to_rlds",
        "franka",
        20,
        actions.moves_and_closing,
        1.0,
        "https://ut-austin-rpl.github.io/sirius/",
        wrist="wrist_image",
    ),
    OpenXDataset(
        "dlr_edan_shared_control_converted_externally_to_rlds",
        "dlr_edan",
        5,
        actions.moves_about_zxy_and_closing,
        1.0,
        "https://ieeexplore.ieee.org/document/9341156",
    ),
    OpenXDataset(
        "iamlab_cmu_pickup_insert_converted_externally_to_rlds",
        "franka",
        20,
        actions.quaternion_poses_and_opening,
        1.0,
        "https://openreview.net/forum?id=WuBv9-IGDUA",
        wrist="wrist_image",
    ),
    OpenXDataset(
        "utaustin_mutex",
        "franka",
        20,
        actions.moves_and_closing,
        1.0,
        "https://ut-austin-rpl.github.io/MUTEX/",
        wrist="wrist_image",
    ),
    OpenXDataset(
        "berkeley_fanuc_manipulation",
        "fanuc_mate_200id",
        10,
        actions.moves_and_gripper_state,
        2.0,
        "https://sites.google.com/berkeley.edu/fanuc-manipulation",
        wrist="wrist_image",
    ),
    OpenXDataset(
        "cmu_stretch",
        "hello_stretch",
        10,
        actions.moves_and_opening,
        1.0,
        "https://robo-affordances.github.io/",
    ),
    OpenXDataset(
        # Versions after 0.1.0 are broken, as OpenVLA's mixture notes.
        "bc_z",
        "google_robot",
        10,
        actions.next_residuals,
        0.2,
        "https://www.kaggle.com/datasets/google/bc-z-robot",
        instruction_keys=OBSERVED_INSTRUCTION,
    ),
    OpenXDataset(
        "fmb",
        "franka",
        10,
        actions.moves_and_opening,
        1.0,
        "https://functional-manipulation-benchmark.github.io/",
        primary="image_side_1",
        secondary="image_side_2",
        wrist="image_wrist_1",
        versions=("0.0.1", "0.1.0"),
        aliases=("fmb_dataset",),
    ),
    OpenXDataset(
        # A camera on a hand-held stick, 1.5 million frames in 13 hours. Other tables say 3.75 Hz, at which its policies act.
        "dobbe",
        "hello_stretch",
        30,
        actions.moves_and_opening,
        0.2,
        "https://dobb-e.com/",
        primary="wrist_image",
        wrist="wrist_image",
        versions=("0.0.1", "0.1.0"),
    ),
    OpenXDataset(
        "droid",
        "franka",
        15,
        actions.velocities_and_closedness,
        0.06,
        "https://droid-dataset.github.io/",
        primary="exterior_image_1_left",
        secondary="exterior_image_2_left",
        wrist="wrist_image_left",
        instruction_keys=("language_instruction", "language_instruction_2", "language_instruction_3"),
        versions=("1.0.0", "1.0.1"),
        licence=OWN_LICENCE,
        aliases=("droid_100",),
    ),
    *(
        replace(_LANGUAGE_TABLE, name=f"language_table_{name}", embodiment="xarm_simulation", weight=None)
        for name in (
            "sim",
            "blocktoblock_sim",
            "blocktoblock_4block_sim",
            "blocktoblock_oracle_sim",
            "blocktoblockrelative_oracle_sim",
            "blocktoabsolute_oracle_sim",
            "blocktorelative_oracle_sim",
            "separate_oracle_sim",
        )
    ),
)

# Mixtures of these: OpenVLA's, of whose data sets each has a `weight` here.
OPEN_X_MIXTURES = ("magic_soup_plus",)

_BY_NAME = {name: row for row in OPEN_X_DATASETS for name in (row.name, *row.aliases)}


def open_x_dataset(name: str) -> OpenXDataset | None:
    """The row of a data set, by its name or another one it is kept under; None for one that is not in the table."""
    return _BY_NAME.get(name)


def open_x_mixture(name: str) -> tuple[OpenXDataset, ...]:
    """
    The data sets of a published mixture, each with its `weight`.

    Raises:
        ValueError: An unknown mixture.
    """
    if name not in OPEN_X_MIXTURES:
        raise ValueError(f"`open_x` must be one of {', '.join(OPEN_X_MIXTURES)}, got {name!r}.")
    return tuple(row for row in OPEN_X_DATASETS if row.weight is not None)


__all__ = ["OPEN_X_DATASETS", "OPEN_X_MIXTURES", "OpenXDataset", "open_x_dataset", "open_x_mixture"]
