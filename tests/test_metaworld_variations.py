"""Variations of Meta-World: what changes, what does not, and that nothing of one episode is left in the next."""

from types import SimpleNamespace

import numpy as np
import pytest

from openvla.evaluation import make_environment
from openvla.evaluation.environment import choose_variations, tasks_with
from openvla.evaluation.metaworld import CATALOGUE, MetaWorld
from openvla.evaluation.metaworld_variations import BEYOND, KINDS, OPPOSITES, RESIZABLE, TURN, names, outside


TEXTS = CATALOGUE["tasks"]


@pytest.fixture(scope="module")
def blind():
    environment = make_environment("metaworld", render=False)
    yield environment
    environment.close()


@pytest.fixture(scope="module")
def seeing(opengl):
    environment = make_environment("metaworld", size=96)
    yield environment
    environment.close()


def follow_expert(environment, seed, task, variation="", steps=20):
    """All that is seen in some steps of the expert, (T, 39), and whether the last was a success."""
    environment.reset(seed, task, variation)
    seen, success = [environment._simulator().seen.copy()], False
    while len(seen) < steps and not success:
        _, success = environment.step(environment.expert_action())
        seen.append(environment._simulator().seen.copy())
    return np.stack(seen), success


def test_every_task_has_its_variations(blind):
    assert set(names()) - set(blind.variations("push-v3")) == {*KINDS, "language:opposite", "motion:orientations"}
    assert "motion:orientations" in blind.variations("drawer-open-v3")
    assert "language:opposite" in blind.variations("drawer-open-v3")
    assert not any(name.startswith("physical") for name in blind.variations("drawer-open-v3"))
    assert all(set(blind.variations(task)) <= set(names()) for task in blind.tasks)
    assert [task for task in blind.tasks if "motion:positions" not in blind.variations(task)] == ["bin-picking-v3"]
    with pytest.raises(ValueError, match="Did you mean"):
        blind.variations("push")


def test_an_axis_is_run_for_the_tasks_that_have_it(blind):
    mt10 = MetaWorld.task_sets["mt10"]
    assert tasks_with(blind, mt10, "") == tasks_with(blind, mt10, "visual") == tasks_with(blind, mt10, "motion") == mt10
    assert tasks_with(blind, mt10, "physical") == ("push-v3", "pick-place-v3", "peg-insert-side-v3")
    assert tasks_with(blind, mt10, "physical:smaller") == ("push-v3", "pick-place-v3")
    assert tasks_with(blind, mt10, "language") == tuple(task for task in mt10 if task in OPPOSITES)
    with pytest.raises(ValueError, match="Did you mean 'visual:light'"):
        tasks_with(blind, mt10, "visual:lights")
    with pytest.raises(ValueError, match="axis='language' is unknown. Known: none, all, motion, "):
        tasks_with(blind, ["push-v3"], "language")


def test_all_axes_by_one_name(blind):
    mt10 = MetaWorld.task_sets["mt10"]
    assert choose_variations(blind, mt10, ["none", "all"]) == ("", *KINDS)
    assert choose_variations(blind, ["reach-v3"], ["all"]) == ("visual", "motion", "semantic")
    assert choose_variations(blind, mt10, ["visual:light", "", "visual:light"]) == ("visual:light", "")
    blind_to_all = SimpleNamespace(variations=lambda task: ())
    with pytest.raises(ValueError, match="no variations"):
        choose_variations(blind_to_all, ["lift"], ["all"])


def test_unknown_and_unavailable_variations_are_refused(blind):
    with pytest.raises(ValueError, match="Did you mean 'visual:light'"):
        blind.reset(0, "push-v3", "visual:lights")
    with pytest.raises(ValueError, match="not available in 'drawer-open-v3'. Tasks with it: .*push-v3"):
        blind.reset(0, "drawer-open-v3", "physical")
    with pytest.raises(ValueError, match="not available in 'push-v3'. Tasks with it: drawer-close-v3"):
        blind.reset(0, "push-v3", "language:opposite")


@pytest.mark.parametrize(
    "task, variation", [("push-v3", "motion"), ("push-v3", "physical"), ("push-v3", "visual:light")]
)
def test_a_varied_episode_is_the_same_each_time_and_leaves_nothing_behind(blind, task, variation):
    fresh = make_environment("metaworld", render=False)
    plain, _ = follow_expert(fresh, 5, task)
    fresh.close()
    varied, _ = follow_expert(blind, 5, task, variation)
    follow_expert(blind, 6, task, "motion", steps=5)
    np.testing.assert_array_equal(follow_expert(blind, 5, task)[0], plain)
    np.testing.assert_array_equal(follow_expert(blind, 5, task, variation)[0], varied)
    assert np.array_equal(varied, plain) == variation.startswith("visual")  # what only looks different, acts the same


def test_the_model_itself_is_put_back(blind):
    from openvla.evaluation.metaworld_variations import VARIED, VARIED_HEADLIGHT

    def values():
        model = blind._simulator().world.model
        fields = [getattr(model, name) for name in VARIED]
        return [field.copy() for field in fields + [getattr(model.vis.headlight, name) for name in VARIED_HEADLIGHT]]

    blind.reset(3, "drawer-open-v3")
    before = values()
    for variation in blind.variations("drawer-open-v3"):
        blind.reset(3, "drawer-open-v3", variation)
    blind.reset(3, "drawer-open-v3")
    assert all(np.array_equal(old, new) for old, new in zip(before, values()))


def test_an_axis_alone_is_one_of_its_kinds_by_the_seed(blind):
    drawn = set()
    for seed in range(12):
        blind.reset(seed, "push-v3", "physical")
        drawn.add(blind._simulator()._variation.kind)
    assert drawn == set(KINDS["physical"])


def test_places_are_around_the_recorded_box_and_never_in_it():
    low, high = np.array([-0.1, 0.6, 0.02, 0.3, 0.4, 0.1]), np.array([0.1, 0.7, 0.02, 0.3, 0.4, 0.1])
    draw = outside(low, high, np.array([-0.5, 0.59, 0]), np.array([0.5, 1, 0.5]), np.random.default_rng(0))
    places = np.stack([draw() for _ in range(300)])
    inside = ((places >= low) & (places <= high)).all(axis=1)
    assert not inside.any()
    np.testing.assert_array_equal(places[:, 2:], np.tile(low[2:], (300, 1)))  # what never moves stays
    assert np.abs(places[:, 0]).max() <= 0.1 + BEYOND * 0.2 and np.abs(places[:, 0]).max() > 0.13
    assert places[:, 1].min() >= 0.59 and places[:, 1].max() > 0.71  # no further than the gripper


def test_motion_moves_object_and_goal_out_of_their_boxes(blind):
    for task in MetaWorld.task_sets["mt10"][:3]:
        for seed in range(3):
            blind.reset(seed, task, "motion")
            world = blind._simulator().world
            box = world._random_reset_space
            for place, part in ((world.obj_init_pos, slice(0, 2)), (world._target_pos, slice(3, 5))):
                assert ((place[:2] < box.low[part]) | (place[:2] > box.high[part])).any()


def test_orientations_turn_things_where_they_are(blind):
    angles = []
    for seed in range(6):
        blind.reset(seed, "door-open-v3")
        world = blind._simulator().world
        place, goal = world.model.body("door").pos.copy(), world._target_pos.copy()
        blind.reset(seed, "door-open-v3", "motion:orientations")
        np.testing.assert_array_equal(world.model.body("door").pos, place)
        w, x, y, z = world.model.body("door").quat
        assert x == y == 0
        angles.append(2 * np.arctan2(z, w))
        before, after = (complex(*(each - place)[:2]) for each in (goal, world._target_pos))
        np.testing.assert_allclose(after, before * np.exp(1j * angles[-1]))  # the goal turns with the door
    assert all(np.deg2rad(TURN[0]) <= abs(angle) <= np.deg2rad(TURN[1]) for angle in angles)
    assert min(angles) < 0 < max(angles)

    blind.reset(0, "peg-insert-side-v3")
    model, data = blind._simulator().world.model, blind._simulator().world.data
    lying = data.body("peg").xmat.copy()
    blind.reset(0, "peg-insert-side-v3", "motion:orientations")
    cosine = (np.trace(lying.reshape(3, 3).T @ data.body("peg").xmat.reshape(3, 3)) - 1) / 2
    assert np.cos(np.deg2rad(TURN[1])) <= cosine <= np.cos(np.deg2rad(TURN[0]))  # what lies free turns as well
    assert model.body("box").quat[3] != 0


@pytest.mark.parametrize("task", ["door-open-v3", "drawer-open-v3", "window-close-v3", "peg-insert-side-v3"])
def test_experts_solve_turned_tasks(blind, task):
    assert follow_expert(blind, 1_000_000, task, "motion:orientations", steps=125)[1]


@pytest.mark.parametrize("kind", KINDS["visual"])
@pytest.mark.parametrize("task", ["hand-insert-v3", "sweep-into-v3"])
def test_scenes_without_walls_have_variations_of_looks_as_well(blind, task, kind):
    blind.reset(0, task, f"visual:{kind}")  # their models lack parts of the scenery that the others have


@pytest.mark.parametrize("kind, scale", [("smaller", 0.85), ("larger", 1.15)])
def test_physical_resizes_the_object_alone(blind, kind, scale):
    blind.reset(0, "pick-place-v3")
    model = blind._simulator().world.model
    before, puck = model.geom_size.copy(), model.geom("objGeom").id
    blind.reset(0, "pick-place-v3", f"physical:{kind}")
    np.testing.assert_allclose(model.geom_size[puck], before[puck] * scale)
    model.geom_size[puck] = before[puck]
    np.testing.assert_array_equal(model.geom_size, before)
    assert follow_expert(blind, 0, "pick-place-v3", f"physical:{kind}", steps=150)[1]


def test_semantic_wordings_are_never_recorded(blind):
    recorded = {text for task in blind.tasks for text in blind.instructions(task)}
    words = {word for text in recorded for word in text.split()}
    for task in ("push-v3", "window-open-v3"):
        for seed in range(4):
            paraphrase = blind.reset(seed, task, "semantic:paraphrase").instruction
            assert paraphrase in blind.instructions(task, held_out=True)
            unseen = blind.reset(seed, task, "semantic:unseen").instruction
            assert unseen not in recorded and set(unseen.split()) - words
            stepped, _ = blind.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
            assert stepped.instruction == unseen
    assert blind.reset(0, "push-v3", "visual:light").instruction == blind.instructions("push-v3")[0]


@pytest.mark.parametrize(
    "asked, other",
    [
        ("drawer-open-v3", "drawer-close-v3"),
        ("window-close-v3", "window-open-v3"),
        ("faucet-open-v3", "faucet-close-v3"),
    ],
)
def test_language_wants_the_asked_one_of_two_possible_tasks(blind, asked, other):
    ours = blind.reset(4, asked, "language").state
    start = blind._simulator().world.data.qpos.copy()
    np.testing.assert_array_equal(blind.reset(4, other, "language").state, ours)
    np.testing.assert_array_equal(blind._simulator().world.data.qpos, start)  # nothing but words tells which
    assert follow_expert(blind, 4, asked, "language", steps=200)[1]
    # The joint passes where the opposite is done, and comes back to where the asked one is: too late.
    blind.reset(4, asked, "language")
    simulator = blind._simulator()
    joint = simulator.world.data.joint(9)  # after seven of the arm and two of the gripper
    still = np.array([0, 0, 0, 0, 0, 0, 1.0])
    done = OPPOSITES[asked].done
    wrong, right = (q for q in sorted(simulator.world.model.joint(joint.id).range, key=lambda q: not done(q)))
    joint.qpos = right
    assert blind.step(still)[1]
    blind.reset(4, asked, "language")
    joint.qpos = wrong
    assert not blind.step(still)[1]
    joint.qpos = right
    assert not blind.step(still)[1]


@pytest.mark.parametrize("asked, other", [*zip(list(OPPOSITES)[::2], list(OPPOSITES)[1::2])])
def test_the_opposite_is_done_where_the_simulator_says_so(blind, asked, other):
    import mujoco

    for mine, theirs in ((asked, other), (other, asked)):
        blind.reset(2, theirs, "language")
        world = blind._simulator().world
        places = np.linspace(*world.model.jnt_range[-1], 150)
        said = []
        for place in places:
            world.data.qpos[-1] = place
            mujoco.mj_forward(world.model, world.data)
            said.append(bool(world.evaluate_state(world._get_obs(), np.zeros(4, dtype=np.float32))[1]["success"]))
        assert said == [OPPOSITES[mine].done(place) for place in places] and 0 < sum(said) < len(said)


def test_sizes_are_offered_where_the_free_object_has_plain_shapes(blind):
    for task in ("push-v3", "peg-insert-side-v3"):
        assert task in RESIZABLE
        blind.reset(0, task)
        model = blind._simulator().world.model
        body = model.jnt_bodyid[np.flatnonzero(model.jnt_type == 0)[0]]
        assert (model.geom_dataid[model.geom_bodyid == body] == -1).all()  # no meshes


@pytest.mark.parametrize("kind", KINDS["visual"])
def test_visual_changes_pictures_and_is_undone(seeing, kind):
    plain = seeing.reset(1, "push-v3").images["image"]
    varied = seeing.reset(1, "push-v3", f"visual:{kind}")
    np.testing.assert_array_equal(seeing.reset(1, "push-v3", f"visual:{kind}").images["image"], varied.images["image"])
    again = seeing.reset(1, "push-v3")
    np.testing.assert_array_equal(again.images["image"], plain)
    np.testing.assert_array_equal(again.state, varied.state)
    assert (np.abs(varied.images["image"].astype(int) - plain).max(axis=-1) > 20).sum() > 10  # pixels


def test_pictures_of_two_opposite_tasks_are_the_same(seeing):
    for asked, other in zip(list(OPPOSITES)[::2], list(OPPOSITES)[1::2]):
        pictures = [seeing.reset(2, task, "language").images["image"] for task in (asked, other)]
        np.testing.assert_array_equal(*pictures)
