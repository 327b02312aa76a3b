"""Open-X Embodiment, Bridge, DROID and LIBERO: the fields of every dataset brought to one convention.

`STANDARDIZE[name](trajectory)` gives a trajectory whose `action` is (delta xyz, delta roll-pitch-yaw, gripper with
1 = open), whose `language_instruction` stands at the top, and whose observation holds the fields that the layout of the
dataset names (`catalog.py`). Units and frames stay as recorded; so do the joint-space datasets, marked below.

A dataset is a `Recipe`: which columns of which recorded fields make up the action, new observation fields and the
language. Source of the conventions: the standardisation that the published models were trained on
(github.com/openvla/openvla, prismatic/vla/datasets/rlds/oxe), whose outputs tests/test_oxe.py compares with.
"""

from dataclasses import replace
from functools import partial

from .catalog import Registry
from .conversions import (
    binarize_gripper_actions,
    clip_to_unit,
    decompress_floats,
    drop_first_step,
    euler_from_quaternion,
    invert_gripper_actions,
    rel2abs_gripper_actions,
    relabel_bridge_actions,
    text_from_code_points,
    to_float32,
)
from .recipes import Field, Parts, Recipe


def observed(key: str) -> Field:
    """A field of the observation."""
    return Field(("observation", key))


def acted(key: str) -> Field:
    """A field of an action that was recorded as a dict."""
    return Field(("action", key))


# Recorded fields that several datasets share
ACTION, STATE = Field(("action",)), observed("state")
ARM, GRIPPER = ACTION[:6], ACTION[-1:]
GRIPPER_FROM_CLOSING = GRIPPER.then(clip_to_unit, invert_gripper_actions)
POSE_CHANGE = (acted("world_vector"), acted("rotation_delta"))
CLOSEDNESS = acted("gripper_closedness_action")
INSTRUCTION = observed("natural_language_instruction")
NO_ROTATION = (0, 0, 0)
OPEN, CLOSED = 1, 0
EEF_AND_GRIPPER = {"eef_state": STATE[:6], "gripper_state": STATE[-1:]}
TRACKED_EEF_AND_GRIPPER = {
    "EEF_state": observed("cartesian_position")[:6],
    "gripper_state": observed("gripper_position")[-1:],
}

# Forms that several datasets share
AS_RECORDED = Recipe()
WITHOUT_TERMINATION = Recipe(action=(ACTION[:-1],))
CLOSING_ARM = Recipe(action=(ARM, GRIPPER_FROM_CLOSING))
RELATIVE_GRIPPER = Recipe(action=(*POSE_CHANGE, CLOSEDNESS.then(rel2abs_gripper_actions)), language=INSTRUCTION)
CLOSEDNESS_ACTION = Recipe(
    action=(*POSE_CHANGE, CLOSEDNESS.then(clip_to_unit, invert_gripper_actions)), language=INSTRUCTION
)
OPEN_GRIPPER = Recipe(action=(*POSE_CHANGE, acted("open_gripper")), language=INSTRUCTION)
POSITION_ONLY = Recipe(action=(ACTION[:3], *NO_ROTATION, GRIPPER))
# xyz and the angle about the vertical axis are recorded. The published data holds that yaw in the place of roll.
ONE_ANGLE = Recipe(action=(ACTION[:4], 0, 0, GRIPPER))
TELEOPERATED_FRANKA = Recipe(action=(ARM, GRIPPER.then(binarize_gripper_actions)), observation=TRACKED_EEF_AND_GRIPPER)
NAVIGATION = Recipe(
    action=(ACTION, 0, 0, 0, 0, CLOSED),
    observation={"state": (observed("position"), 0, 0, 0, observed("yaw"))},
)
BRIDGE_STATE: dict[str, Parts] = {"EEF_state": STATE[:6], "gripper_state": STATE[-1:]}
BRIDGE = Recipe(
    action=(ARM, GRIPPER.then(binarize_gripper_actions)),
    observation=BRIDGE_STATE,
    before=drop_first_step,
    after=relabel_bridge_actions,
)
LIBERO = replace(CLOSING_ARM, observation={"EEF_state": STATE[:6], "gripper_state": STATE[-2:]})
DROID = Recipe(
    action=(
        Field(("action_dict", "cartesian_velocity"))[:6],
        Field(("action_dict", "gripper_position")).then(invert_gripper_actions),
    ),
    observation={"proprio": (observed("cartesian_position"), observed("gripper_position"))},
)

STANDARDIZE: dict[str, Recipe] = Registry(
    "dataset with a standardisation",
    {
        "bridge_orig": BRIDGE,
        "bridge_dataset": BRIDGE,
        "bridge_oxe": replace(
            OPEN_GRIPPER, observation=BRIDGE_STATE, before=drop_first_step, after=relabel_bridge_actions
        ),
        **dict.fromkeys(["ppgm", "ppgm_static", "ppgm_wrist"], TELEOPERATED_FRANKA),
        "fractal20220817_data": RELATIVE_GRIPPER,
        "kuka": replace(
            RELATIVE_GRIPPER,
            observation={
                key: observed(key).then(partial(decompress_floats, width=width))
                for key, width in {"clip_function_input/base_pose_tool_reached": 7, "gripper_closed": 1}.items()
            },
        ),
        "taco_play": Recipe(
            action=(acted("rel_actions_world")[:6], acted("rel_actions_world")[-1:].then(clip_to_unit)),
            observation={"state_eef": observed("robot_obs")[:6], "state_gripper": observed("robot_obs")[7:8]},
            language=INSTRUCTION,
        ),
        "jaco_play": Recipe(
            action=(acted("world_vector"), *NO_ROTATION, CLOSEDNESS.then(rel2abs_gripper_actions)),
            observation={
                "state_eef": observed("end_effector_cartesian_pos")[:6],
                "state_gripper": observed("end_effector_cartesian_pos")[-1:],
            },
            language=INSTRUCTION,
        ),
        # The cable stays in the gripper.
        "berkeley_cable_routing": Recipe(action=(*POSE_CHANGE, CLOSED), language=INSTRUCTION),
        "roboturk": CLOSEDNESS_ACTION,
        "nyu_door_opening_surprising_effectiveness": RELATIVE_GRIPPER,
        "viola": CLOSEDNESS_ACTION,
        "berkeley_autolab_ur5": replace(
            RELATIVE_GRIPPER,
            observation={"state": observed("robot_state")[6:14]},
            depth={"depth": observed("image_with_depth")},
            renamed=("image_with_depth",),
        ),
        "toto": OPEN_GRIPPER,
        # A plane and a stick: x, y and a gripper that counts as open
        "language_table": Recipe(
            action=(ACTION, 0, *NO_ROTATION, OPEN), language=observed("instruction").then(text_from_code_points)
        ),
        "columbia_cairlab_pusht_real": Recipe(action=(*POSE_CHANGE, CLOSEDNESS), language=INSTRUCTION),
        "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": replace(
            POSITION_ONLY, depth={"depth_image": observed("depth_image")[0]}
        ),
        "nyu_rot_dataset_converted_externally_to_rlds": Recipe(action=(ACTION[:7],), observation=EEF_AND_GRIPPER),
        "stanford_hydra_dataset_converted_externally_to_rlds": Recipe(
            action=(ARM, GRIPPER.then(invert_gripper_actions)),
            observation={"eef_state": (STATE[:3], STATE[7:10]), "gripper_state": STATE[-3:-2]},
        ),
        "austin_buds_dataset_converted_externally_to_rlds": replace(CLOSING_ARM, observation={"state": STATE[:8]}),
        "austin_sailor_dataset_converted_externally_to_rlds": CLOSING_ARM,
        "austin_sirius_dataset_converted_externally_to_rlds": CLOSING_ARM,
        "utaustin_mutex": replace(CLOSING_ARM, observation={"state": STATE[:8]}),
        "nyu_franka_play_dataset_converted_externally_to_rlds": Recipe(
            action=(ACTION[-8:-2], ACTION[-2:-1].then(clip_to_unit)),
            observation={"eef_state": STATE[-6:]},
            depth={key: observed(key)[0].then(to_float32) for key in ("depth", "depth_additional_view")},
        ),
        "maniskill_dataset_converted_externally_to_rlds": Recipe(observation={"gripper_state": STATE[7:8]}),
        "furniture_bench_dataset_converted_externally_to_rlds": Recipe(
            action=(ACTION[:3], ACTION[3:7].then(euler_from_quaternion), GRIPPER_FROM_CLOSING),
            observation={"state": (STATE[:7], STATE[-1:])},
        ),
        "cmu_franka_exploration_dataset_converted_externally_to_rlds": WITHOUT_TERMINATION,
        "ucsd_kitchen_dataset_converted_externally_to_rlds": replace(
            WITHOUT_TERMINATION, observation={"joint_state": STATE[:7]}
        ),
        "ucsd_pick_and_place_dataset_converted_externally_to_rlds": replace(POSITION_ONLY, observation=EEF_AND_GRIPPER),
        # Ten future waypoints are recorded; the first is the action. Its rotation stays an axis-angle vector, which is
        # near roll-pitch-yaw for small steps only.
        "bc_z": Recipe(
            action=(
                acted("future/xyz_residual")[:3],
                acted("future/axis_angle_residual")[:3],
                acted("future/target_close")[:1].then(invert_gripper_actions),
            ),
            language=INSTRUCTION,
        ),
        "utokyo_pr2_opening_fridge_converted_externally_to_rlds": replace(
            WITHOUT_TERMINATION, observation=EEF_AND_GRIPPER
        ),
        "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds": replace(
            WITHOUT_TERMINATION, observation=EEF_AND_GRIPPER
        ),
        "utokyo_xarm_pick_and_place_converted_externally_to_rlds": AS_RECORDED,
        # Two arms; the second (right) one is used.
        "utokyo_xarm_bimanual_converted_externally_to_rlds": Recipe(action=(ACTION[-7:],)),
        "robo_net": replace(ONE_ANGLE, observation={"eef_state": (STATE[:4], 0, 0), "gripper_state": STATE[-1:]}),
        # Joint space
        "berkeley_mvp_converted_externally_to_rlds": AS_RECORDED,
        "berkeley_rpt_converted_externally_to_rlds": AS_RECORDED,
        "kaist_nonprehensile_converted_externally_to_rlds": Recipe(
            action=(ARM, CLOSED), observation={"state": STATE[-7:]}
        ),
        "stanford_mask_vit_converted_externally_to_rlds": replace(
            ONE_ANGLE,
            observation={
                "eef_state": (observed("end_effector_pose")[:4], 0, 0),
                "gripper_state": observed("end_effector_pose")[-1:],
            },
        ),
        "tokyo_u_lsmo_converted_externally_to_rlds": Recipe(observation=EEF_AND_GRIPPER),
        "dlr_sara_pour_converted_externally_to_rlds": AS_RECORDED,
        "dlr_sara_grid_clamp_converted_externally_to_rlds": Recipe(observation={"state": STATE[:6]}),
        "dlr_edan_shared_control_converted_externally_to_rlds": Recipe(
            action=(ARM, GRIPPER.then(invert_gripper_actions))
        ),
        "asu_table_top_converted_externally_to_rlds": Recipe(
            observation={"eef_state": Field(("ground_truth_states", "EE")), "gripper_state": STATE[-1:]}
        ),
        "stanford_robocook_converted_externally_to_rlds": Recipe(observation=EEF_AND_GRIPPER),
        "imperialcollege_sawyer_wrist_cam": WITHOUT_TERMINATION,
        "iamlab_cmu_pickup_insert_converted_externally_to_rlds": Recipe(
            action=(ACTION[:3], ACTION[3:7].then(euler_from_quaternion), ACTION[7:8]),
            observation={"joint_state": STATE[:7], "gripper_state": STATE[7:8]},
        ),
        "uiuc_d3field": Recipe(action=(ACTION, *NO_ROTATION, CLOSED)),
        # No gripper action is recorded: its state stands for it.
        "berkeley_fanuc_manipulation": Recipe(
            action=(ACTION, STATE[6:7].then(invert_gripper_actions)),
            observation={"joint_state": STATE[:6], "gripper_state": STATE[6:7]},
        ),
        "cmu_playing_with_food": Recipe(action=(ACTION[:3], ACTION[3:7].then(euler_from_quaternion), GRIPPER)),
        "cmu_play_fusion": Recipe(action=(ACTION[:3], ACTION[-4:])),
        "cmu_stretch": replace(
            WITHOUT_TERMINATION, observation={"eef_state": (STATE[:3], *NO_ROTATION), "gripper_state": STATE[-1:]}
        ),
        **dict.fromkeys(["berkeley_gnm_recon", "berkeley_gnm_cory_hall", "berkeley_gnm_sac_son"], NAVIGATION),
        "droid": replace(DROID, swapped_views=("exterior_image_1_left", "exterior_image_2_left")),
        "droid_wipe": DROID,
        "fmb_dataset": Recipe(observation={"proprio": (observed("eef_pose"), observed("state_gripper_pose"))}),
        "dobbe": Recipe(observation={"proprio": STATE}),
        # Joint space
        "roboset": Recipe(action=(ACTION[:7], GRIPPER_FROM_CLOSING), observation={"proprio": STATE}),
        "rh20t": Recipe(
            action=(acted("tcp_base"), acted("gripper")),
            observation={"proprio": (observed("tcp_base"), observed("gripper_width"))},
        ),
        **dict.fromkeys(
            [
                "tdroid_carrot_in_bowl",
                "tdroid_pour_corn_in_pot",
                "tdroid_flip_pot_upright",
                "tdroid_move_object_onto_plate",
                "tdroid_knock_object_over",
                "tdroid_cover_object_with_towel",
            ],
            TELEOPERATED_FRANKA,
        ),
        **dict.fromkeys([f"libero_{suite}_no_noops" for suite in ("spatial", "object", "goal", "10")], LIBERO),
    },
)
