"""The tabletop simulator: determinism, tasks, embodiments, splits, expert, recording."""

import hashlib
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("gymnasium")
pytest.importorskip("pymunk")

from gymnasium.utils.env_checker import check_env

from lapa.evaluation.environments.tabletop import (
    CONTROL_FREQUENCY,
    EMBODIMENTS,
    FAMILIES,
    TabletopEnvironment,
    TabletopExpert,
    record_episode,
)
from lapa.evaluation.environments.tabletop_expert import find_waypoint
from lapa.evaluation.environments.tabletop_tasks import (
    COLOURS,
    HELD_OUT_OBJECTS,
    SHAPES,
    TabletopBlock,
    TabletopTask,
    distance_to_segment,
    format_instruction,
    is_held_out_combination,
    sample_scene,
)


def play_expert(env: TabletopEnvironment, seed: int) -> tuple[bool, int]:
    expert = TabletopExpert(env)
    env.reset(seed=seed)
    for steps in itertools.count(1):
        _, reward, terminated, truncated, info = env.step(expert.act())
        assert info["success"] == terminated == (reward == 1.0)
        if terminated or truncated:
            return terminated, steps
    raise AssertionError


def expert_success(family: str, split: str, num_episodes: int, **settings: object) -> float:
    env = TabletopEnvironment(families=(family,), split=split, render_observations=False, **settings)
    return float(np.mean([play_expert(env, seed)[0] for seed in range(num_episodes)]))


def rollout_digest(embodiment: str) -> str:
    """Hash of all images, states and sentences of a few seeded episodes."""
    digest = hashlib.sha256()
    env = TabletopEnvironment(embodiment=embodiment, image_size=32)
    for seed in (3, 11):
        observation, info = env.reset(seed=seed)
        actions = np.random.default_rng(seed).uniform(-1, 1, (15, 2))
        for action in [None, *actions]:
            if action is not None:
                observation, _, _, _, info = env.step(action)
            digest.update(observation["image"].tobytes() + observation["effector"].tobytes())
            digest.update(info["state"]["block_poses"].tobytes() + observation["instruction"].encode())
    return digest.hexdigest()


def test_package_imports_without_the_simulators_dependencies() -> None:
    code = "import sys, lapa.evaluation; assert not {'gymnasium', 'pymunk'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("missing", ["gymnasium", "pymunk"])
def test_missing_dependency_names_the_extra(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None\nimport lapa.evaluation.environments.tabletop"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert f'needs {missing}: pip install "lapa[sim]"' in result.stderr


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("embodiment", EMBODIMENTS)
@pytest.mark.parametrize("render_observations", [True, False])
def test_gymnasium_accepts_it(embodiment: str, render_observations: bool) -> None:
    check_env(TabletopEnvironment(embodiment=embodiment, render_observations=render_observations))


@pytest.mark.parametrize("embodiment", EMBODIMENTS)
def test_same_seed_same_images_and_states(embodiment: str) -> None:
    assert rollout_digest(embodiment) == rollout_digest(embodiment)


def test_same_seed_in_another_process() -> None:
    code = "import test_tabletop; print(test_tabletop.rollout_digest('human_video'))"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]),
        "PYTHONHASHSEED": "77",
    }
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == rollout_digest("human_video")


def test_seeds_differ() -> None:
    env = TabletopEnvironment()
    starts = {env.reset(seed=seed)[1]["state"]["block_poses"].tobytes() for seed in range(20)}
    assert len(starts) == 20


def test_same_scene_in_every_embodiment() -> None:
    scenes = []
    for name in EMBODIMENTS:
        observation, info = TabletopEnvironment(embodiment=name).reset(seed=5)
        scenes.append((observation["instruction"], info["state"]["block_names"], observation["effector"].tolist()))
    assert scenes[0] == scenes[1] == scenes[2]


@pytest.mark.parametrize("split", ["seen", "unseen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_expert_solves_the_family(family: str, split: str) -> None:
    assert expert_success(family, split, 40) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("embodiment", EMBODIMENTS)
@pytest.mark.parametrize("num_blocks", [2, 3, 4])
@pytest.mark.parametrize("split", ["seen", "unseen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_expert_solves_the_family_at_length(family: str, split: str, num_blocks: int, embodiment: str) -> None:
    assert expert_success(family, split, 200, num_blocks=num_blocks, embodiment=embodiment) >= 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_doing_nothing_solves_nothing(family: str) -> None:
    env = TabletopEnvironment(families=(family,), render_observations=False, max_steps=10)
    for seed in range(40):
        _, info = env.reset(seed=seed)
        assert not info["success"] and info["distance"] > 0.005
        for _ in range(10):
            _, reward, terminated, truncated, info = env.step(np.zeros(2))
            assert reward == 0.0 and not terminated
        assert truncated


@pytest.mark.parametrize("family", FAMILIES)
def test_acting_at_random_rarely_solves_anything(family: str) -> None:
    env = TabletopEnvironment(families=(family,), render_observations=False)
    solved = 0
    for seed in range(30):
        env.reset(seed=seed)
        rng, done = np.random.default_rng(seed), False
        while not done:
            _, reward, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 2))
            solved += int(reward)
            done = terminated or truncated
    assert solved <= 4


@pytest.mark.parametrize(
    ("max_steps", "family", "expected"), [(None, "reach", 40), (None, "separate", 80), (7, "reach", 7)]
)
def test_episodes_are_truncated(max_steps: int | None, family: str, expected: int) -> None:
    env = TabletopEnvironment(families=(family,), render_observations=False, max_steps=max_steps)
    env.reset(seed=0)
    for step in range(1, expected + 1):
        _, _, terminated, truncated, _ = env.step(np.zeros(2))
        assert not terminated and truncated == (step == expected)


def test_resting_scene_stays_put() -> None:
    env = TabletopEnvironment(render_observations=False)
    _, info = env.reset(seed=1, options={"family": "block_to_block"})
    start = info["state"]
    for _ in range(5):
        _, _, _, _, info = env.step(np.zeros(2))
    np.testing.assert_array_equal(info["state"]["block_poses"], start["block_poses"])
    np.testing.assert_array_equal(info["state"]["effector"], start["effector"])


@pytest.mark.parametrize(
    ("embodiment", "expected"), [("arm", (0.02, 0.0)), ("gripper", (0.0, 0.016)), ("human_video", (0.024, 0.0))]
)
def test_action_scale_and_axes(embodiment: str, expected: tuple[float, float]) -> None:
    env = TabletopEnvironment(embodiment=embodiment)
    observation, _ = env.reset(seed=0, options={"family": "reach"})
    after, _, _, _, info = env.step(np.array([1.0, 0.0]))
    np.testing.assert_allclose(info["delta"], expected, atol=1e-12)
    np.testing.assert_allclose(after["effector"] - observation["effector"], expected, atol=1e-6)
    delta = env.action_to_delta((0.3, -0.4))
    np.testing.assert_allclose(env.delta_to_action(delta), (0.3, -0.4), atol=1e-6)
    assert abs(env.action_to_delta((1.0, 1.0))) == pytest.approx(env.embodiment.action_scale)


def test_blocks_stay_on_the_board_and_the_effector_in_its_workspace() -> None:
    env = TabletopEnvironment(families=("block_to_block",), render_observations=False, max_steps=200)
    for seed, action in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1), (0.7, 0.7), (-0.7, 0.7)]):
        _, info = env.reset(seed=seed)
        for _ in range(60):
            _, _, terminated, _, info = env.step(np.array(action))
            assert np.abs(info["state"]["block_poses"][:, :2]).max() < 0.25
            assert np.abs(info["state"]["effector"]).max() < 0.30
            if terminated:
                break


def test_embodiments_look_different() -> None:
    images = [TabletopEnvironment(embodiment=name).reset(seed=2)[0]["image"].astype(float) for name in EMBODIMENTS]
    for first, second in itertools.combinations(images, 2):
        assert np.abs(first - second).mean() > 25


@pytest.mark.parametrize("embodiment", EMBODIMENTS)
@pytest.mark.parametrize("size", [16, 32, 64, 100, 256])
def test_images_of_any_size_show_the_scene(embodiment: str, size: int) -> None:
    env = TabletopEnvironment(embodiment=embodiment, image_size=size, num_blocks=4)
    observation, _ = env.reset(seed=3)
    image = observation["image"]
    assert image.shape == (size, size, 3) and image.dtype == np.uint8 and image.flags.writeable
    np.testing.assert_array_equal(image, env.render())
    assert env.render(48).shape == (48, 48, 3)
    before = np.asarray(image, np.int64)
    action = env.delta_to_action(-0.02 * env.effector / abs(env.effector))  # towards the middle, always possible
    for _ in range(3):
        observation, *_ = env.step(action)
    assert np.abs(observation["image"].astype(np.int64) - before).max() > 60, "the effector's motion must be visible"


@pytest.mark.parametrize("embodiment", ["arm", "gripper"])
def test_blocks_are_drawn_in_their_colours_where_they_are(embodiment: str) -> None:
    env = TabletopEnvironment(embodiment=embodiment, num_blocks=4)
    env.reset(seed=3)
    image = env.render(256).astype(int)
    camera = env.embodiment.camera
    for block, position in zip(env.blocks, env.positions):
        turned = (position - camera.centre) * np.exp(1j * camera.rotation) * 256 / camera.width
        red, green, blue = image[round(128 - turned.imag), round(128 + turned.real)]
        expected = {
            "red": red > 2 * max(green, blue),
            "blue": blue > 2 * max(red, green),
            "green": green > 2 * max(red, blue),
            "yellow": min(red, green) > 2 * blue,
        }
        assert expected[block.colour], (block.name, red, green, blue)


def test_only_the_hand_held_camera_shakes() -> None:
    moving = {}
    for name in EMBODIMENTS:
        env = TabletopEnvironment(embodiment=name)
        frames = [env.reset(seed=4)[0]["image"]]
        frames += [env.step(np.zeros(2))[0]["image"] for _ in range(10)]
        moving[name] = sum(not np.array_equal(first, second) for first, second in itertools.pairwise(frames))
    assert moving["arm"] == moving["gripper"] == 0
    assert moving["human_video"] >= 8


def test_splits_are_disjoint() -> None:
    def tasks(split: str) -> set[tuple[str, ...]]:
        found = set()
        for family in FAMILIES:
            for seed in range(250):
                scene = sample_scene(np.random.default_rng(seed), family, split, 3, True)
                objects = {(block.colour, block.shape) for block in scene.blocks}
                if split == "seen":
                    assert not objects & HELD_OUT_OBJECTS and scene.task.held_out is None
                else:
                    assert scene.task.held_out in ("object", "combination")
                named = [block.name for block in scene.blocks[: FAMILIES[family].num_named_blocks]]
                found.add((family, scene.task.argument, *named))
        return found

    seen, unseen = tasks("seen"), tasks("unseen")
    assert len(seen) > 300 and len(unseen) > 300
    assert not seen & unseen


def test_every_family_but_reach_has_held_out_combinations() -> None:
    blocks = [TabletopBlock(colour, "disc") for colour in COLOURS]
    for family, spec in FAMILIES.items():
        cases = [
            is_held_out_combination(family, block, other if spec.num_named_blocks == 2 else None, argument)
            for block, other in itertools.permutations(blocks, 2)
            for argument in spec.arguments
        ]
        assert (0 < np.mean(cases) < 0.4) == (family != "reach")


def test_sentences_tell_tasks_apart() -> None:
    blocks = [TabletopBlock(colour, shape) for colour in COLOURS for shape in SHAPES]
    meanings: dict[str, tuple[str, ...]] = {}
    for family, spec in FAMILIES.items():
        assert len(set(spec.templates)) >= 4
        others = [blocks[0], blocks[5], None] if spec.num_named_blocks == 2 else [None]
        for template, block, other, argument in itertools.product(spec.templates, blocks, others, spec.arguments):
            if spec.num_named_blocks == 2 and other in (None, block):
                continue
            sentence = format_instruction(template, block, other, argument)
            meaning = (family, block.name, other.name if other else "", argument)
            assert meanings.setdefault(sentence, meaning) == meaning
            assert all(word in sentence for word in meaning[1:])
            assert "{" not in sentence and "  " not in sentence and sentence == sentence.strip()


def test_goals_of_the_families() -> None:
    positions = [0.1 + 0.1j, -0.1 + 0j]

    def task(family: str, anchor: int | None, offset: complex, threshold: float) -> TabletopTask:
        return TabletopTask(family, "", anchor, offset, threshold, "", None)

    reach = task("reach", 0, 0j, 0.05)
    assert reach.is_solved(positions, 0.1 + 0.06j) and not reach.is_solved(positions, 0.1 + 0.04j)
    to_block = task("block_to_block", 1, 0j, 0.1)
    assert to_block.distance(positions, 0j) == pytest.approx(abs(0.2 + 0.1j) - 0.1)
    relative = task("block_to_relative", 1, 0.13j, 0.05)
    assert relative.goal(positions) == -0.1 + 0.13j
    place = task("block_to_absolute", None, 0.15 + 0.15j, 0.08)
    assert place.is_solved(positions, 0j)
    apart = task("separate", 1, 0j, 0.25)
    assert not apart.is_solved(positions, 0j) and apart.is_solved([0.16 + 0j, -0.1 + 0j], 0j)


def test_thresholds_and_number_of_blocks_are_used() -> None:
    strict = TabletopEnvironment(families=("reach",), thresholds={"reach": 0.02}, render_observations=False)
    loose = TabletopEnvironment(families=("reach",), thresholds={"reach": 0.15}, render_observations=False)
    for env, threshold in ((strict, 0.02), (loose, 0.15)):
        _, info = env.reset(seed=0)
        distance = np.hypot(*(info["state"]["block_poses"][0, :2] - info["state"]["effector"]))
        assert info["distance"] == pytest.approx(distance - threshold)
    for num_blocks in (2, 4, 6):
        env = TabletopEnvironment(num_blocks=num_blocks, distinct_colours=num_blocks <= 4, render_observations=False)
        names = env.reset(seed=0)[1]["state"]["block_names"]
        assert len(set(names)) == num_blocks
        assert num_blocks > 4 or len({name.split()[0] for name in names}) == num_blocks


def test_families_of_the_constructor_and_of_reset() -> None:
    env = TabletopEnvironment(families=("reach", "separate"), render_observations=False)
    assert {env.reset(seed=seed)[1]["family"] for seed in range(20)} == {"reach", "separate"}
    assert env.reset(seed=0, options={"family": "relative_move"})[1]["family"] == "relative_move"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"families": ("reach", "juggle")}, r"families is .*juggle.*block_to_block"),
        ({"families": "reach"}, r"families is 'reach'; accepted: a non-empty sequence"),
        ({"families": ()}, r"families is \(\)"),
        ({"embodiment": "octopus"}, r"embodiment is 'octopus'; accepted: arm, gripper, human_video"),
        ({"split": "test"}, r"split is 'test'; accepted: seen, unseen"),
        ({"image_size": 8}, r"image_size is 8; accepted: an integer, 16 to"),
        ({"num_blocks": 1}, r"num_blocks is 1; accepted: an integer, 2 to 4"),
        ({"num_blocks": 5}, r"num_blocks is 5; accepted: an integer, 2 to 4"),
        ({"max_steps": 0}, r"max_steps is 0; accepted: an integer, 1 or more"),
        ({"thresholds": {"reach": -1.0}}, r"thresholds\['reach'\] is -1.0"),
        ({"thresholds": {"juggle": 0.1}}, r"thresholds is 'juggle'; accepted: reach"),
        ({"render_mode": "human"}, r"render_mode is 'human'; accepted: 'rgb_array', None"),
    ],
)
def test_bad_arguments(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TabletopEnvironment(**settings)


def test_bad_use() -> None:
    env = TabletopEnvironment()
    with pytest.raises(RuntimeError, match="call reset"):
        env.render()
    with pytest.raises(ValueError, match=r"options\['family'\] is 'juggle'; accepted: reach"):
        env.reset(options={"family": "juggle"})
    with pytest.raises(ValueError, match=r"options has unknown keys \['scene'\]"):
        env.reset(options={"scene": 1})
    env.reset(seed=0)
    for action in ([np.nan, 0.0], [1.0], [[0.0, 0.0]]):
        with pytest.raises(ValueError, match="action is"):
            env.step(np.array(action))
    with pytest.raises(ValueError, match=r"thresholds\['relative_move'\] is 0.29 and num_blocks"):
        TabletopEnvironment(families=("relative_move",), thresholds={"relative_move": 0.29}).reset(seed=0)
    with pytest.raises(ValueError, match="noise is -1"):
        TabletopExpert(env, noise=-1)
    with pytest.raises(ValueError, match="exploration is 2"):
        TabletopExpert(env, exploration=2)


def test_recorded_episode() -> None:
    env = TabletopEnvironment(families=("block_to_absolute",), image_size=32)
    episode = record_episode(env, None, seed=9)
    steps = episode.num_steps
    assert episode.success and 5 < steps <= env.max_steps
    assert episode.frames.shape == (steps + 1, 32, 32, 3) and episode.frames.dtype == np.uint8
    assert episode.actions.shape == (steps, 2) and episode.actions.dtype == np.float32
    np.testing.assert_array_equal(episode.actions, episode.expert_actions)
    assert (episode.family, episode.embodiment, episode.seed) == ("block_to_absolute", "arm", 9)
    observation, _ = env.reset(seed=9)
    assert observation["instruction"] == episode.instruction
    for step, action in enumerate(episode.actions):
        np.testing.assert_array_equal(observation["image"], episode.frames[step])
        np.testing.assert_array_equal(observation["effector"], episode.effector_positions[step])
        observation, _, terminated, _, _ = env.step(action)
    assert terminated


def test_recording_without_rendered_observations_has_the_same_frames() -> None:
    seen, blind = (TabletopEnvironment(image_size=32, render_observations=flag) for flag in (True, False))
    np.testing.assert_array_equal(record_episode(seen, None, 2).frames, record_episode(blind, None, 2).frames)


def test_human_video_has_no_actions() -> None:
    episode = record_episode(TabletopEnvironment(embodiment="human_video"), None, seed=1)
    assert episode.actions is None and episode.expert_actions is None
    assert episode.num_steps > 3 and episode.effector_positions.shape == (episode.num_steps + 1, 2)


def test_noise_and_exploration_are_seeded() -> None:
    env = TabletopEnvironment(families=("block_to_block",), image_size=32)
    noisy = record_episode(env, None, seed=3, noise=0.4, exploration=0.1)
    again = record_episode(env, TabletopExpert(env, 0.4, 0.1), seed=3)
    np.testing.assert_array_equal(noisy.actions, again.actions)
    np.testing.assert_array_equal(noisy.frames, again.frames)
    assert np.abs(noisy.actions - noisy.expert_actions).mean() > 0.1
    assert np.abs(noisy.actions).max() <= 1.0
    with pytest.raises(ValueError, match=r"noise is 0\.1"):
        record_episode(env, TabletopExpert(env), 3, noise=0.1)


def test_expert_succeeds_with_moderate_noise() -> None:
    env = TabletopEnvironment(render_observations=False, image_size=16)
    expert = TabletopExpert(env, noise=0.3)
    assert np.mean([record_episode(env, expert, seed).success for seed in range(40)]) >= 0.85


def test_expert_moves_steadily() -> None:
    env = TabletopEnvironment(families=("block_to_block",), image_size=16)
    actions = np.concatenate([record_episode(env, None, seed).actions for seed in range(10)])
    assert (np.linalg.norm(actions, axis=1) > 0.95).mean() > 0.85


def test_expert_leaves_other_blocks_alone() -> None:
    env = TabletopEnvironment(families=("reach", "block_to_absolute"), render_observations=False, num_blocks=3)
    moved = []
    for seed in range(30):
        start = env.reset(seed=seed)[1]["state"]["block_poses"]
        play_expert(env, seed)
        moved.append(np.abs(np.array([(p.real, p.imag) for p in env.positions]) - start[:, :2])[1:].max())
    assert np.mean(np.array(moved) < 0.005) > 0.85


def test_waypoints_go_around_discs() -> None:
    assert find_waypoint(-0.2 + 0j, 0.2 + 0j, [0.2j], 0.1) == 0.2 + 0j
    position = -0.2 + 0j
    for _ in range(5):
        waypoint = find_waypoint(position, 0.2 + 0j, [0.02j], 0.1)
        assert distance_to_segment(0.02j, position, waypoint) >= 0.1 - 1e-6
        position = waypoint
    assert position == 0.2 + 0j


def test_frame_gap_of_the_paper_is_whole_steps() -> None:
    assert CONTROL_FREQUENCY == TabletopEnvironment.metadata["render_fps"] == 10.0
    assert (0.6 * CONTROL_FREQUENCY).is_integer()
