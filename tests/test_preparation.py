"""What is known of a run before weights are read: whatever it would stop for is said by the dry run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from data_files import jpeg, own_rlds, write_lerobot

from openvla import OpenVLAConfig
from openvla.action_spec import action_names
from openvla.data import PythonDataset
from openvla.data.report import report_statistics
from openvla.data.sources import open_source
from openvla.options.datasets import StatsOptions
from openvla.training import FinetuneOptions, plan_run, preparation
from openvla.training.checks import check_meaning, check_rates, check_shared, check_units_of_one_robot
from openvla.training.dry_run import text_tokens
from openvla.training.preparation import num_patches, prepare, proprio_dim
from openvla.training.prepared_run import Run, check_dtype


pytest.importorskip("accelerate", reason="training needs the [train] extra")

ROOT = Path(__file__).resolve().parents[1]


def options(tmp_path, **changes) -> FinetuneOptions:
    given = {"dataset": "mine", "output": str(tmp_path / "out"), "model": str(ROOT), "logging": "none"}
    return FinetuneOptions(**{**given, "strategy": "last_layer", **changes})


def episode(instruction="open the drawer", images=None, steps: int = 10) -> dict:
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, 7))
    actions[:, -1] = np.arange(steps) < steps // 2
    images = {"front": [jpeg(level) for level in range(steps)]} if images is None else images
    return {"actions": actions, "instruction": instruction, "images": images}


def dataset(*episodes: dict) -> PythonDataset:
    return PythonDataset(list(episodes), "mine")


def test_steps_without_words_are_left_out_and_counted(tmp_path):
    """A padding step, annotations of single steps, an episode without any."""
    data = dataset(
        episode(["open the drawer"] * 9 + [""]), episode(), episode(["", "open it"] + [" ", "\0"] * 4), episode("")
    )
    run = prepare(options(tmp_path, held_out=0.0), data=data)
    (source,) = run.sources
    words = [frame.instruction for episode in source.dataset for frame in source.frames(episode)]
    assert words == ["open the drawer"] * 19 + ["open it"]
    assert source.num_frames == 20
    assert "unlabeled: removed 20 steps, of these 1 complete episodes" in run.describe()
    assert text_tokens(run) > 8
    kept = prepare(options(tmp_path, held_out=0.0, keep_unlabeled=True), data=data)
    assert kept.sources[0].num_frames == 40
    assert "without an instruction: 20 steps, kept with an empty one" in kept.describe()


def test_the_state_of_libero_is_what_its_simulator_gives(tmp_path, monkeypatch):
    """Eight numbers, as OpenVLA-OFT was trained; the layout of OpenVLA, which showed no model a state, adds a zero."""
    folder = Path(__file__).parent / "fixtures" / "oxe_rlds" / "libero_spatial_no_noops"
    padded = open_source(folder)
    monkeypatch.setattr(preparation, "check_samples", lambda source: [])  # the fixture keeps few images
    made = options(tmp_path, dataset=str(folder), proprio=True, camera_names="full_image,wrist_image")
    run = prepare(made)
    (source,) = run.sources
    assert (padded.state_dim, source.state_dim, run.config.proprio_dim) == (9, 8, 8)
    assert not np.any(padded.dataset[0].state[:, 6])
    np.testing.assert_array_equal(source.dataset[0].state, np.delete(padded.dataset[0].state, 6, axis=1))
    assert len(run.statistics["libero_spatial_no_noops"]["proprio"]["q01"]) == 8
    other = open_source(folder, state_key=["EEF_state"])
    with pytest.raises(ValueError, match=r"has states of 6 numbers; expected 8 \(--state-key says which"):
        proprio_dim(made, [other], run.config)


def test_statistics_of_libero_with_and_without_the_zero(tmp_path):
    """Those of OpenVLA-OFT have eight numbers of state, OpenVLA's layout nine: either is taken by a model that sees
    states and by one that does not. `openvla stats` writes the eight."""
    folder = Path(__file__).parent / "fixtures" / "oxe_rlds" / "libero_spatial_no_noops"
    own = {sees: open_source(folder, sees_state=sees).statistics for sees in (True, False)}
    for sees, other in ((True, False), (False, True)):
        assert open_source(folder, sees_state=sees, statistics=own[other]).statistics == own[sees]
        masked = {**own[other], "proprio": {**own[other]["proprio"], "mask": [True] * (8 if other else 9)}}
        assert len(open_source(folder, sees_state=sees, statistics=masked).statistics["proprio"]["mask"]) == 9 - sees
    filled = {**own[False], "proprio": {**own[False]["proprio"], "max": [1.0] * 9}}
    with pytest.raises(ValueError, match="states have 8 dimensions, the proprio statistics given 9"):
        open_source(folder, sees_state=True, statistics=filled)
    written = tmp_path / "dataset_statistics.json"
    assert list(report_statistics(StatsOptions(dataset=str(folder), output=written)))
    (content,) = json.loads(written.read_text()).values()
    assert content["proprio"] == own[True]["proprio"]


def test_the_state_of_bridge_with_and_without_the_zero():
    """As docs/data.md has it."""
    folder = Path(__file__).parent / "fixtures" / "oxe_rlds" / "bridge_orig"
    padded = open_source(folder, sees_state=True)
    plain = open_source(folder, sees_state=True, state_key="EEF_state,gripper_state")
    assert (padded.state_dim, plain.state_dim) == (8, 7) and not padded.dataset[0].state[:, 6].any()
    with pytest.raises(ValueError, match="no key 'QQ'; there are"):
        open_source(folder, state_key="QQ")


def test_states_that_are_zero(tmp_path):
    """Their statistics are those of a dataset without states, and that is what was said of them."""
    data = dataset(*(episode() | {"state": np.zeros((10, 8))} for _ in range(2)))
    with pytest.raises(ValueError, match=r"'mine' has states that are 0 in every step, .*--state-key"):
        prepare(options(tmp_path, proprio=True), data=data)


def test_a_head_that_stays(tmp_path):
    """What `add_parts` refuses once the weights are read, a dry run passed over."""
    config = OpenVLAConfig.from_pretrained(ROOT, action_head="l1_regression", action_dim=4, action_chunk=2)
    config.prefix_training = 1
    model = Path(shutil.copytree(ROOT, tmp_path / "model", ignore=lambda _, names: {
        name for name in names if not name.startswith(("tokenizer", "processor_config", "dataset_stat"))}))  # fmt: skip
    config.save_pretrained(model)
    for head, message in (
        ("tokens", r"head='tokens': the model has action_head='l1_regression'.*give head='l1_regression'"),
        ("diffusion", "head='diffusion': the model has action_head='l1_regression'"),
        (None, r"is for actions of 4 numbers, those of the data have 7: .*--action-key"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(options(tmp_path, model=str(model), head=head), data=dataset(episode()))
    with pytest.raises(ValueError, match="film=True: for heads that predict in one pass, and the head is 'tokens'"):
        prepare(options(tmp_path, film=True), data=dataset(episode()))
    config.action_dim = 7
    config.save_pretrained(model)
    for given in (None, 1):
        made = prepare(options(tmp_path, model=str(model), prefix_training=given), data=dataset(episode()))
        assert any("--prefix-training 1 keeps it" in warning for warning in made.warnings) is (given is None)


def test_places_in_one_dataset_and_changes_in_another():
    one, other = (open_source(dataset(episode()), name=name, cache=False) for name in ("one", "other"))
    assert check_meaning([one, other]) == []
    other.absolute_dims = (0, 2)
    (warning,) = check_meaning([one, other])
    assert warning.startswith("x, z: places in other, changes in one (--absolute-dims)")


def test_two_recordings_of_one_robot_in_units_of_their_own():
    slow = episode()
    slow["actions"][:, 1] *= 0.5
    slow["actions"][:, 6] *= 0.5  # a gripper stays as recorded
    sources = {
        name: open_source(dataset(each), name=name, cache=False)
        for name, each in (("shown", episode()), ("driven", slow), ("again", slow))
    }
    assert check_units_of_one_robot([*sources.values()], False) == []  # nothing says that it is one robot
    for source in sources.values():
        source.recorded_names = ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"]
    (warning, other) = check_units_of_one_robot([*sources.values()], False)
    assert warning.startswith("driven and shown have the same dimensions and other units (dy): ")
    assert "statistics: shown for driven" in warning and other.startswith("again and shown")
    for name in ("driven", "again"):
        sources[name].statistics = sources["shown"].statistics
    assert check_units_of_one_robot([*sources.values()], False) == []
    sources["shown"].state_names = sources["driven"].state_names = ["height"]
    for name, height in (("shown", 0.0), ("driven", 1.0)):
        sources[name].survey = replace(sources[name].survey, proprio={"some": 1})
        proprio = {"q01": [height], "q99": [height + 2]}
        sources[name].statistics = {**sources["shown"].statistics, "proprio": proprio}
    (warning,) = check_units_of_one_robot([sources["shown"], sources["driven"]], True)
    assert "(state height)" in warning


def test_recordings_of_one_robot_at_two_rates():
    """A step of the slower one moves further; each had a rate, and nothing was said."""
    slow, other = episode(), episode()
    slow["actions"][:, :6] *= 2
    other["actions"][:, :6] *= 3
    sources = [
        open_source(dataset(each), name=name, hz=hz, cache=False)
        for name, each, hz in (
            ("fast", episode(), 20),
            ("slow", slow, 10),
            ("other", other, 10),
            ("unsaid", slow, None),
        )
    ]
    assert check_rates(sources) == []  # nothing says that it is one robot
    sources[1].statistics = sources[0].statistics  # as `statistics: fast` gives them in a mixture
    (warning,) = check_rates(sources)
    assert warning.startswith("slow and fast have the same dimensions, at 10 and 20 actions a second: ")
    for source in sources:
        source.recorded_names = ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"]
    assert [text.partition(" have")[0] for text in check_rates(sources)] == ["slow and fast", "other and fast"]


def test_an_episode_in_two_datasets_of_a_mixture():
    """As of a folder and a file in it: their paths are two."""
    other = episode()
    other["actions"][:, :6] *= 2
    both, one = (
        open_source(dataset(*each), name=str(len(each)), cache=False) for each in ((other, episode()), (other,))
    )
    assert check_shared([both]) == []
    (warning,) = check_shared([both, one])
    assert warning.startswith("1: 1 of 1 episodes are in 2 as well: they count twice")


def test_recordings_of_one_robot_that_differ_in_more_than_quantiles():
    """Units of min and max beside those of q01 and q99, a gripper that only one of them scales, numbers in another
    order: no warning came of these."""
    always_open = episode()
    always_open["actions"][:, 6] = 1
    made = {"shown": (episode(), {}), "driven": (episode(), {"normalization": "bounds"}), "held": (always_open, {})}
    sources = {name: open_source(dataset(each), name=name, cache=False, **more) for name, (each, more) in made.items()}
    names = ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"]
    for source in sources.values():
        source.recorded_names = names
    sources["driven"].statistics["action"] |= {"max": [2.0] * 7}
    (warning, other) = check_units_of_one_robot([*sources.values()], False)
    assert warning.startswith("driven and shown have the same dimensions and other units (dx, dy, dz, droll, ")
    assert other.startswith("held and shown have the same dimensions and other units (gripper): ")
    sources["driven"].recorded_names = names[::-1]
    (warning,) = check_units_of_one_robot([sources["shown"], sources["driven"]], False)
    assert "driven and shown have the same dimensions in another order (gripper, dyaw, " in warning


def test_a_type_in_which_most_updates_are_lost(tmp_path):
    """Five steps of `full` in bfloat16 changed 7% of the weights (float32: 85%), without a word."""
    for strategy, dtype, said in (("full", "bfloat16", True), ("lora", "bfloat16", False), ("full", "auto", False)):
        assert bool(check_dtype(options(tmp_path, strategy=strategy, dtype=dtype))) is said
    (warning,) = check_dtype(options(tmp_path, strategy="full", dtype="bfloat16"))
    assert "an update of the learning rate (2e-05) is lost in weights above 0.005" in warning
    run = prepare(options(tmp_path, dtype="float16"), data=dataset(episode()))
    assert any(text.startswith("--dtype float16: ") for text in run.warnings)


@pytest.mark.parametrize("warmup", [9, 10])
def test_a_warmup_that_is_longer_than_the_run(tmp_path, warmup):
    run = prepare(options(tmp_path, steps=10, warmup_steps=warmup), data=dataset(episode()))
    assert any(text.startswith(f"--warmup-steps {warmup} of --steps 10: ") for text in run.warnings) is (warmup == 10)


def test_what_is_logged_of_a_base_in_4_bits(tmp_path):
    for strategy in ("lora", "qlora"):
        run = prepare(options(tmp_path, strategy=strategy), data=dataset(episode()))
        said = any(text.startswith("--strategy qlora: the log is of the base in 4 bits") for text in run.warnings)
        assert said is (strategy == "qlora")


def test_a_learning_rate_of_zero(tmp_path):
    """The result has the weights of the model and the units of the data."""
    for rate in (0.0, 1e-3):
        run = prepare(options(tmp_path, learning_rate=rate), data=dataset(episode()))
        assert any(text.startswith("--learning-rate 0: nothing is learned") for text in run.warnings) is (rate == 0)


def test_the_name_of_a_list(tmp_path):
    """Its statistics, and with them the unnorm_key, were those of "list"."""
    for given, name in (({}, "mine"), ({"name": "yours"}, "yours")):
        assert [*prepare(options(tmp_path, **given), data=[episode()]).statistics] == [name]
    assert [*prepare(options(tmp_path), data=PythonDataset([episode()], "ours")).statistics] == ["ours"]


def test_a_view_that_is_another_camera_in_some_episodes(tmp_path):
    """Of each episode the first camera by name was taken, whatever it was in the others."""
    made = [episode(images={name: [jpeg(1)] * 10, "wrist": [jpeg(2)] * 10}) for name in ("front", "front", "side")]
    (warning,) = prepare(options(tmp_path), data=dataset(*made)).mixed_views
    assert "as primary has other names in some episodes: front (mine, episode 0); side (mine, episode 2)" in warning
    assert not prepare(options(tmp_path), data=dataset(*made[:2])).mixed_views
    with pytest.raises(ValueError, match="episode 2: no camera 'front'; there are side, wrist"):
        prepare(options(tmp_path, camera="front"), data=dataset(*made))


def test_one_episode_of_many_without_the_camera_of_the_others(tmp_path):
    """Eight of each split were looked at; the rest were trained on through the camera on the gripper, unsaid."""
    made = [episode(images={name: [jpeg(1)] * 10 for name in ("front", "wrist")}) for _ in range(40)]
    del made[17]["images"]["front"]
    (warning,) = prepare(options(tmp_path), data=dataset(*made)).mixed_views
    assert "front (mine, episode 0); wrist (mine, episode 17)" in warning

    folder = tmp_path / "open_it_demo.hdf5"
    with h5py.File(folder, "w") as file:
        for number in range(40):
            demo = file.create_group(f"data/demo_{number}")
            demo["actions"] = np.array(made[0]["actions"])
            for camera in ("agentview_rgb", "eye_in_hand_rgb")[number == 17 :]:
                demo[f"obs/{camera}"] = np.zeros((10, 8, 8, 3), np.uint8)
    (warning,) = prepare(options(tmp_path, dataset=str(folder))).mixed_views
    assert "agentview_rgb (" in warning and "demo_0); eye_in_hand_rgb (" in warning and "demo_17)" in warning


def test_a_film_that_is_missing_is_said_before_training(tmp_path):
    folder = write_lerobot(tmp_path / "set", "v2.1", episodes=15, steps=2)
    (folder / "videos/chunk-000/observation.images.front/episode_000004.mp4").unlink()
    with pytest.raises(ValueError, match="episode_000004.mp4: the video is missing, as are 0 others of 15"):
        prepare(options(tmp_path, dataset=str(folder)))


def test_one_instruction_in_two_spellings_is_one(tmp_path):
    """A model reads both alike; chunks ended between them, and what follows was not learned."""
    data = dataset(episode(["Open the drawer"] * 5 + ["open  the drawer "] * 5), episode())
    (source,) = prepare(options(tmp_path, action_chunk=4), data=data).sources
    padded = [[frame.padded for frame in source.frames(each)] for each in source.dataset]
    assert padded[0] == padded[1] == [0] * 7 + [1, 2, 3]


def test_a_chunk_that_is_longer_than_every_episode(tmp_path):
    """Past the end nothing is learned, and the numbers of the last steps were acted on as they began, at random."""
    data = dataset(episode(steps=11), episode(steps=5))
    with pytest.raises(ValueError, match="action_chunk=12: the longest .* 11 steps.*chunk_end='still'"):
        prepare(options(tmp_path, action_chunk=12), data=data)
    for fits in ({"action_chunk": 11}, {"action_chunk": 12, "chunk_end": "still"}):
        prepare(options(tmp_path, **fits), data=data)


def test_grippers_that_the_model_learned_scaled(tmp_path):
    """All fourteen numbers of ALOHA are; own grippers in [0, 1] stay as recorded unless --mask says otherwise."""
    model = Path(shutil.copytree(ROOT, tmp_path / "model", ignore=lambda _, names: {
        name for name in names if not name.startswith(("config.json", "tokenizer", "processor_config"))}))  # fmt: skip
    for scaled, given, expected in ((True, None, True), (False, None, False), (True, "1,1,1,1,1,1,1", False)):
        content = json.loads((ROOT / "config.json").read_text())
        learned = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [scaled]}
        content["norm_stats"] = {"aloha": {"action": learned}}
        (model / "config.json").write_text(json.dumps(content))
        run = prepare(options(tmp_path, model=str(model), mask=given), data=dataset(episode()))
        found = [warning for warning in run.warnings if "and of this gripper stay as recorded" in warning]
        assert bool(found) is expected and all("--mask 1,1,1,1,1,1,1 " in warning for warning in found)


def test_a_scene_that_only_the_wrist_shows(tmp_path):
    """Pixels of four channels are no colours: what was left was learned under the name of the scene, silently."""
    images = {"wrist": [jpeg(level) for level in range(10)]}
    for given, expected in (({}, True), ({"camera_names": "wrist"}, False)):
        run = prepare(options(tmp_path, **given), data=dataset(episode(images=images)))
        found = [warning for warning in run.warnings if "on the arm, under the name of the scene" in warning]
        assert bool(found) is expected and all("No other one is in colours" in warning for warning in found)
    both = {"front": images["wrist"], **images}
    assert "on the arm" not in prepare(options(tmp_path), data=dataset(episode(images=both))).describe()


def test_no_words_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)Nothing is left.*--language-key.*--keep-unlabeled"):
        prepare(options(tmp_path), data=dataset(episode("")))
    assert prepare(options(tmp_path, keep_unlabeled=True), data=dataset(episode(""))).sources[0].num_frames == 10


def test_words_that_are_held_out_alone(tmp_path):
    """A mixture trained until it drew the first sample of such a dataset."""
    data = dataset(*[episode("")] * 4, episode())
    with pytest.raises(ValueError, match=r"mine: nothing is left of the 4 episodes.*--held-out 0"):
        prepare(options(tmp_path), data=data)
    assert prepare(options(tmp_path, held_out=0.0), data=data).sources[0].num_frames == 10


def test_images_are_looked_at(tmp_path):
    damaged = episode(images={"front": [jpeg(1)[:30]] + [jpeg(1)] * 9})
    with pytest.raises(ValueError, match="episode 1.*image of step 0"):
        prepare(options(tmp_path), data=dataset(episode(), damaged))
    late = episode(images={"front": [jpeg(1)] * 9 + [jpeg(1)[:30]]})
    with pytest.raises(ValueError, match="episode 1.*image of step"):
        prepare(options(tmp_path), data=dataset(episode(), late))
    with pytest.raises(ValueError, match="no camera image"):
        prepare(options(tmp_path), data=dataset(episode(), episode(images={})))
    with pytest.raises(ValueError, match="no camera 'side'; there are front"):
        prepare(options(tmp_path, camera="side"), data=dataset(episode()))
    with pytest.raises(ValueError, match="image of step 0"):  # the last of five is held out
        prepare(options(tmp_path), data=dataset(*[episode()] * 4, damaged))


def test_a_prompt_that_does_not_fit_the_model(tmp_path):
    with pytest.raises(ValueError, match="longest instruction makes a sequence of .* tokens, and the model reads"):
        prepare(options(tmp_path), data=dataset(episode(), episode("very " * 4000 + "long")))
    with pytest.raises(ValueError, match=r"or give a smaller action_chunk \(--chunk\), of which 560 are"):
        prepare(options(tmp_path, action_chunk=80, chunk_end="still"), data=dataset(episode()))


def test_an_instruction_that_makes_no_prompt(tmp_path):
    cut = "In: What action should the robot take to open the drawer"
    with pytest.raises(ValueError, match="mine: the instruction .* makes no prompt"):
        prepare(options(tmp_path), data=dataset(episode(), episode(["open the drawer"] * 9 + [cut])))


def test_patches_of_a_model(tmp_path):
    run = prepare(options(tmp_path), data=dataset(episode()))
    from openvla import OpenVLAForActionPrediction

    model = OpenVLAForActionPrediction.from_pretrained(ROOT)
    assert num_patches(run.config) == model.vision_backbone.num_patches


def test_dimensions_from_the_options(tmp_path):
    with h5py.File(tmp_path / "push_demo.hdf5", "w") as file:
        for number in range(3):
            file[f"data/demo_{number}/actions"] = episode(steps=40)["actions"]
            file[f"data/demo_{number}/obs/agentview_rgb"] = np.zeros((40, 8, 8, 3), np.uint8)
    chosen = {"dataset": str(tmp_path / "push_demo.hdf5"), "name": "mine"}
    run = prepare(options(tmp_path, **chosen))
    assert run.statistics["mine"]["action"]["mask"] == [True] * 6 + [False]
    run = prepare(options(tmp_path, **chosen, gripper_dims="none"))
    assert run.statistics["mine"]["action"]["mask"] == [True] * 7
    run = prepare(options(tmp_path, **chosen, mask="1,1,1,1,1,0,1"))
    assert run.statistics["mine"]["action"]["mask"] == [True] * 5 + [False, True]
    with pytest.raises(ValueError, match="gripper_dims='six'"):
        prepare(options(tmp_path, **chosen, gripper_dims="six"))
    with pytest.raises(ValueError, match="mask has 2 entries"):
        plan_run(options(tmp_path, **chosen, mask="1,0"))


def test_the_plan_says_how_data_is_standardized(tmp_path):
    own_rlds(tmp_path / "libero_spatial_no_noops")
    plan = plan_run(options(tmp_path, dataset=str(tmp_path / "libero_spatial_no_noops")))
    assert "standardized as 'libero_spatial_no_noops' (--standardize none reads as recorded)" in plan


def test_statistics_that_are_given(tmp_path):
    file = tmp_path / "dataset_statistics.json"
    stats = {"q01": [-1.0] * 7, "q99": [-0.9] * 7, "mask": [True] * 6 + [False]}
    file.write_text(json.dumps({"mine": {"action": stats}}))
    with pytest.warns(UserWarning, match="do not fit the data: x"):
        run = prepare(options(tmp_path, statistics=str(file)), data=dataset(episode()))
    assert any("do not fit the data" in warning for warning in run.warnings)
    file.write_text(json.dumps({"other": {"action": stats}}))
    with pytest.raises(KeyError, match="of other, not of 'mine'"):
        prepare(options(tmp_path, statistics=str(file)), data=dataset(episode()))
    for text, message in (
        ("", "is empty"),
        ("{", "not valid JSON"),
        ('{"mine": {"action": {"q01": [0]}}}', "q99 missing"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            prepare(options(tmp_path, statistics=str(file)), data=dataset(episode()))


@pytest.mark.parametrize(
    "recorded, expected",
    [
        (["shoulder", "elbow", "wrist"], ["shoulder", "elbow", "wrist"]),
        (["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"], action_names(7)),
    ],
)
def test_the_log_calls_numbers_as_they_were_recorded(recorded, expected):
    """Seven joints were logged as x, y, z, roll, ..."""
    source = SimpleNamespace(names=recorded, action_dim=len(recorded))
    run = Run(None, [source, source], SimpleNamespace(action_chunk=1), None)
    assert run.action_names == expected
    run = Run(None, [source, SimpleNamespace(names=recorded[::-1])], SimpleNamespace(action_chunk=1), None)
    assert run.action_names == action_names(len(recorded))
