"""What a model sees: cameras by name, from a data set to the model, and back in control."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_modeling_openvla import small_config
from tiny import TINY
from typer.testing import CliRunner

from openvla import OpenVLAConfig, OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.cameras_openvla import find_cameras, order_cameras
from openvla.cli import app
from openvla.data.dataset import PythonDataset
from openvla.data.samples import main_camera
from openvla.data.sources import open_source
from openvla.observation import Observation
from openvla.policy import OpenVLAPolicy
from openvla.training import FinetuneOptions, finetune, merge_adapter, plan_run


ROOT = Path(__file__).resolve().parents[1]
DEMOS = Path(__file__).parent / "fixtures" / "demos" / "hdf5"
RLDS = Path(__file__).parent / "fixtures" / "oxe_rlds"
RNG = np.random.default_rng(0)
SCENE, HAND = (RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(2))
TWO = ["primary", "wrist"]


@pytest.mark.parametrize(
    ("names", "views", "found"),
    [
        (["image"], ["primary"], ["image"]),
        (["wrist_image", "full_image"], TWO, ["full_image", "wrist_image"]),
        (["agentview_rgb", "eye_in_hand_rgb"], TWO, ["agentview_rgb", "eye_in_hand_rgb"]),
        (["robot0_eye_in_hand_image"], ["primary"], ["robot0_eye_in_hand_image"]),  # nothing else there
        (
            ["cam_high", "cam_left_wrist", "cam_right_wrist"],
            ["primary", "right_wrist"],
            ["cam_high", "cam_right_wrist"],
        ),
        (["front_depth", "front", "side"], ["primary", "secondary"], ["front", "side"]),
        (["gripper_cam", "front"], TWO, ["front", "gripper_cam"]),
        (["Wrist", "front"], TWO, ["front", "Wrist"]),
        (["a", "b"], ["b", "a"], ["b", "a"]),
        (["full_image"], ["primary"], ["full_image"]),
        (["primary"], ["full_image"], ["primary"]),
        (["secondary", "side"], ["primary"], ["side"]),
    ],
)
def test_views_by_name(names, views, found):
    assert find_cameras(names, views) == found
    if views[0] == "primary" and "secondary" not in names:  # training chooses as prediction does
        images = {name: np.zeros((1, 8, 8, 3), np.uint8) for name in names}
        source = open_source([{"actions": np.ones((1, 7)), "instruction": "go", "images": images}])
        assert [*next(source.frames(source.dataset[0])).images] == found[:1]


@pytest.mark.parametrize(
    ("names", "views", "message"),
    [
        (["image"], TWO, "no camera for the view 'wrist': there are image"),
        (["wrist_image"], TWO, "no camera for the view 'primary': there are wrist_image"),
        (["eye_in_hand_rgb"], TWO, "'eye_in_hand_rgb' alone for two views"),
        (["wrist"], ["primary"], "no camera for the view 'primary': there are wrist"),  # as the server has it
        (["full_image"], ["wrist"], "no camera for the view 'wrist'"),
        (["left_wrist_image", "image"], TWO, "no camera for the view 'wrist'"),
        ([], ["primary"], "there are none"),
        (["front_depth"], ["primary"], "no camera for the view 'primary'"),
        (["image", "side"], ["top"], "Views: primary, secondary"),
    ],
)
def test_views_that_are_not_there(names, views, message):
    with pytest.raises(ValueError, match=message):
        find_cameras(names, views)


def test_one_of_two_views_that_nobody_named(tiny_model, tiny_processor):
    """The first of a dict was taken, and another order of its entries was another camera."""
    left, right = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="The view 'primary' of the model may be left or right: give its image as"):
        tiny_model.predict_action({"left": left, "right": right}, "go", unnorm_key="bridge_orig")
    with pytest.raises(ValueError, match="'primary' of the model may be front or side"):
        find_cameras(["front", "side"], ["primary", "secondary"], ordered=False)
    named = tiny_model.predict_action({"right": right, "primary": left}, "go", unnorm_key="bridge_orig")
    policy = OpenVLAPolicy(tiny_model, unnorm_key="bridge_orig")
    for images in ({"left": left, "right": right}, {"right": right, "left": left}):  # of a simulator
        seen = policy.act([Observation(images, np.zeros(0, np.float32), "go")])
        np.testing.assert_array_equal(np.ravel(seen), named)


def test_a_simulator_is_seen_through_the_camera_that_was_trained_with():
    """Data sets have cameras by name, whatever the order they were recorded in; so have objects in Python."""
    side, front = np.zeros((2, 8, 8, 3), np.uint8)
    images = {"side": side, "gripper_camera": side, "front": front}
    recorded = {name: [image] for name, image in images.items()}
    (episode,) = PythonDataset([{"actions": np.zeros((1, 7)), "instruction": "go", "images": recorded}])
    assert main_camera(episode) == "front" and find_cameras(order_cameras([*images]), ["primary"]) == ["front"]
    model = SimpleNamespace(camera_names=("primary", "wrist"), norm_stats={"robot": {}})
    policy = object.__new__(OpenVLAPolicy)
    policy.model, policy.camera = model, None
    shown = policy._images(Observation(images, np.zeros(0, np.float32), "go"))
    assert shown["primary"] is front and shown["wrist"] is side


@pytest.mark.parametrize("names", ["primary", [], [1], ["a", "a"], [""]])
def test_camera_names_of_a_config(names):
    with pytest.raises(ValueError, match="camera_names="):
        OpenVLAConfig(camera_names=names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny checkpoint that sees two cameras."""
    folder = tmp_path_factory.mktemp("two") / "model"
    model = TINY[0].load()
    model.config.camera_names = TWO
    model.save_pretrained(folder)
    TINY[0].processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two_cameras(folder) -> OpenVLAForActionPrediction:
    """It, saved and loaded again."""
    return OpenVLAForActionPrediction.from_pretrained(folder).eval()


def test_a_model_of_two_cameras(folder, two_cameras):
    model = two_cameras
    processor = OpenVLAProcessor.from_pretrained(folder)
    images = {"wrist_image": HAND, "full_image": SCENE, "depth": SCENE[..., 0]}
    inputs = processor(processor.format_prompt("open the drawer"), images)
    single = TINY[0].processor()
    parts = [single(images=image, return_tensors="pt")["pixel_values"] for image in (SCENE, HAND)]
    assert torch.equal(inputs["pixel_values"], torch.cat(parts, dim=1))  # as in OpenVLA-OFT
    # Patches of one camera after those of the other
    with torch.inference_mode():
        features = model.encode_images(inputs["pixel_values"])
        one = torch.cat([model.encode_images(part) for part in parts], dim=1)
        assert model.forward(**inputs).logits.shape[1] == inputs["input_ids"].shape[1] + model.num_patches
    torch.testing.assert_close(features, one)
    assert features.shape[1] == model.num_patches == 2 * model.vision_backbone.num_patches

    key = {"unnorm_key": "bridge_orig"}
    action = model.predict_action(images, "open the drawer", **key)
    assert action.shape == (7,)
    assert np.array_equal(action, model.predict_action(**inputs, **key))
    swapped = {"wrist_image": SCENE, "full_image": HAND}
    batch = model.predict_action([images, swapped], ["open the drawer"] * 2, **key)
    np.testing.assert_allclose(batch[0], action, atol=1e-6)
    assert not np.array_equal(batch[1], action)
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 3


def test_a_processor_of_the_hub_knows_the_cameras(folder, tmp_path):
    """Of a Hub id it saw one camera, and was not compared with the model."""
    repository = tmp_path / "models--me--robot"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    processor = OpenVLAProcessor.from_pretrained("me/robot", cache_dir=tmp_path, local_files_only=True)
    assert processor.camera_names == TWO


def test_images_that_do_not_fit_the_cameras(two_cameras):
    model = two_cameras
    for image, message in (
        (SCENE, "The model sees primary, wrist: give {camera: image}"),
        ({"full_image": SCENE}, "no camera for the view 'wrist'"),
        ({"pixel_values": torch.zeros(1, 6, 224, 224)}, r"predict_action\(\*\*inputs\)"),
        ([SCENE, HAND], r"2 image\(s\) for 1 instruction"),
        ({"full_image": [SCENE, HAND], "wrist_image": []}, r"'full_image' shows 2 image\(s\) in a list"),
        ({"full_image": [SCENE], "wrist_image": HAND}, r"give a list of {camera: image}, one for each sample"),
        ({"full_image": np.stack([SCENE, HAND]), "wrist_image": HAND[None][:0]}, r"shows 2 image\(s\)"),
        ({0: SCENE, 1: HAND}, r"by the names of their cameras, got \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict_action(image, "open the drawer", unnorm_key="bridge_orig")
    with pytest.raises(ValueError, match=r"expected \(1, 12, 224, 224\)"):
        model.predict_action(
            input_ids=torch.tensor([[1, 5, 6]]), pixel_values=torch.zeros(1, 6, 224, 224), unnorm_key="bridge_orig"
        )


def test_predict_takes_a_frame_of_each_camera(folder, two_cameras, tmp_path, monkeypatch):
    model = two_cameras
    frames = {"full_image": tmp_path / "scene.png", "wrist": tmp_path / "a=b.png"}
    for path, image in zip(frames.values(), (SCENE, HAND)):
        Image.fromarray(image).save(path)
    said = ["predict", "--model", folder, "--unnorm-key", "bridge_orig", "--instruction", "open the drawer"]
    said += ["--device", "cpu", "--json"]

    def predict(*images):
        told = [*said, *(part for image in images for part in ("--image", image))]
        return CliRunner().invoke(app, [str(part) for part in told])

    found = predict(*(f"{name}={path}" for name, path in frames.items()))
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert record["image"] == {name: str(path) for name, path in frames.items()}
    expected = model.predict_action({"full_image": SCENE, "wrist": HAND}, "open the drawer", unnorm_key="bridge_orig")
    np.testing.assert_allclose(record["action"], expected, atol=1e-6)
    # What is wrong is said before the weights are read
    monkeypatch.setattr(OpenVLAForActionPrediction, "from_pretrained", None)
    scene, hand = (f"{name}={path}" for name, path in frames.items())
    for images, message in (
        (
            [frames["full_image"]],
            "sees primary, wrist, give each its frame by name: --image primary=PATH --image wrist",
        ),
        ([frames["wrist"]], "give each its frame by name"),  # which has the sign in its name
        ([scene], "no camera for the view 'wrist'"),
        ([scene, scene], "full_image is given twice"),
        ([scene, hand, f"top={frames['wrist']}"], "'top' is none of these: leave it out"),
        ([scene, "wrist=none.png"], "No image file at 'none.png'"),
    ):
        refused = predict(*images)
        assert refused.exit_code == 2 and message in refused.stderr, refused.output
    state = CliRunner().invoke(app, [*map(str, said), "--image", scene, "--image", hand, "--state", "1,2"])
    assert state.exit_code == 2 and "state" in state.stderr


def test_a_model_of_one_camera_takes_its_own():
    model = OpenVLAForActionPrediction(small_config())
    assert model.camera_names == ["primary"] and model.num_patches == 4
    tiny = TINY[0].load()
    tiny.processor = TINY[0].processor()
    key = {"unnorm_key": "bridge_orig"}
    expected = tiny.predict_action(SCENE, "open the drawer", **key)
    named = tiny.predict_action({"wrist": HAND, "front": SCENE}, "open the drawer", **key)
    assert np.array_equal(named, expected)


def test_frames_hold_what_the_model_sees():
    source = open_source(DEMOS, camera_names=TWO)
    frame = next(source.frames(source.dataset[0]))
    assert list(frame.images) == ["agentview_rgb", "eye_in_hand_rgb"]
    source = open_source(RLDS / "libero_spatial_no_noops", camera_names=["wrist", "primary"])
    assert list(next(source.frames(source.dataset[0])).images) == ["wrist_image", "image"]
    with pytest.raises(ValueError, match="has no secondary view"):
        open_source(RLDS / "libero_spatial_no_noops", camera_names=["primary", "secondary"])


@pytest.mark.parametrize("strategy", ["last_layer", "lora"])
def test_two_cameras_are_trained_saved_and_predicted(strategy, small_policy, tmp_path):
    pytest.importorskip("accelerate", reason="training needs the [train] extra")
    pytest.importorskip("peft", reason="adapters need the [train] extra")
    settings = {"steps": 1, "batch_size": 2, "rank": 4, "shuffle_buffer": 16, "name": "mine", "logging": "none"}
    made = {"model": str(small_policy), "dataset": str(DEMOS), "output": str(tmp_path / "run"), "strategy": strategy}
    finetune(FinetuneOptions(**made, **settings, camera_names="primary, wrist"))
    folder = tmp_path / "run"
    images = {"agentview_rgb": SCENE, "eye_in_hand_rgb": HAND}
    action = OpenVLAForActionPrediction.from_pretrained(folder).eval().predict_action(images, "open the drawer")
    assert action.shape == (7,) and OpenVLAConfig.from_pretrained(folder).camera_names == TWO
    if strategy == "lora":
        assert merge_adapter(folder, tmp_path / "merged") < 1e-3
        merged = OpenVLAForActionPrediction.from_pretrained(tmp_path / "merged").eval()
        assert merged.config.camera_names == TWO and merged.predict_action(images, "open the drawer").shape == (7,)


# State ----------------------------------------------------------------------------------------------------------------


def test_the_state_is_one_position_after_the_images(tmp_path):
    model = OpenVLAForActionPrediction(small_config(proprio_dim=5)).eval()
    assert model.num_patches == 5
    inputs = {"input_ids": torch.tensor([[1, 5, 6], [1, 8, 9]]), "pixel_values": torch.randn(2, 6, 28, 28)}
    states = torch.randn(2, 5)
    with torch.inference_mode():
        features = model._encode(inputs["pixel_values"], states)
        torch.testing.assert_close(features[:, -1:], model.proprio_projector(states))
        logits = model(**inputs, proprio=states).logits
        assert logits.shape[1] == 3 + 5
        other = model(**inputs, proprio=states + 1).logits
        assert not torch.equal(logits[:, -1], other[:, -1]) and torch.equal(logits[:, :5], other[:, :5])
        tokens = model.generate(**inputs, proprio=states, max_new_tokens=3, do_sample=False)
    assert tokens.shape == (2, 6)
    for proprio in (None, states[:1], states[:, :4]):
        with pytest.raises(ValueError, match=r"The state of the robot \(proprio\) has shape"):
            model(**inputs, proprio=proprio)
    with pytest.raises(ValueError, match="the model sees None"):
        OpenVLAForActionPrediction(small_config())(**inputs, proprio=states)
    model.save_pretrained(tmp_path)
    again = OpenVLAForActionPrediction.from_pretrained(tmp_path)
    torch.testing.assert_close(again.proprio_projector.fc1.weight, model.proprio_projector.fc1.weight)


@pytest.mark.parametrize("dim", [0, -1, "8", True, 1.5])
def test_proprio_dim_of_a_config(dim):
    with pytest.raises(ValueError, match="proprio_dim="):
        OpenVLAConfig(proprio_dim=dim)


def test_the_state_is_trained_saved_and_predicted(small_policy, tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="training needs the [train] extra")
    settings = {"steps": 1, "batch_size": 2, "shuffle_buffer": 16, "name": "mine", "logging": "none"}
    made = {"model": str(small_policy), "dataset": str(DEMOS), "output": str(tmp_path / "run")}
    options = FinetuneOptions(**made, **settings, strategy="frozen_vision", proprio=True, camera_names="primary,wrist")
    assert "trains" in plan_run(options)
    finetune(options)
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "run").eval()
    assert model.config.proprio_dim == 8
    images = {"agentview_rgb": SCENE, "eye_in_hand_rgb": HAND}
    low, high = (np.array(model.norm_stats["mine"]["proprio"][name]) for name in ("q01", "q99"))
    action = model.predict_action(images, "open the drawer", state=low)
    prompt = model.processor.format_prompt("open the drawer")
    inputs = model.processor(prompt, images, state=low).to(torch.float64)
    assert inputs["state"] is low  # in all its digits
    assert np.array_equal(model.predict_action(**inputs), action)
    batch = model.predict_action([images] * 2, ["open the drawer"] * 2, state=np.stack([low, high]))
    np.testing.assert_allclose(batch[0], action, atol=1e-6)
    seen = [Observation(images, state.astype(np.float32), "open the drawer") for state in (low, high)]
    np.testing.assert_allclose(OpenVLAPolicy(model).act(seen), batch, atol=1e-3)
    for state, message in (
        (None, r"sees the state of the robot \(8 numbers\)"),
        (low[:7], r"state has shape \(1, 7\), expected finite numbers \(1, 8\)"),
        (low * np.nan, r"shape \(1, 8\) and holds NaN or infinity, expected finite numbers"),
        ("far", "state must be"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict_action(images, "open the drawer", state=state)
    # A further run keeps it, and adapters bring it
    again = {**made, "model": str(tmp_path / "run"), "output": str(tmp_path / "again")}
    finetune(FinetuneOptions(**again, **settings, strategy="last_layer"))
    assert OpenVLAForActionPrediction.from_pretrained(tmp_path / "again").config.proprio_dim == 8
    # What it needs is not counted again: half a second
    monkeypatch.setattr("openvla.training.plan.estimate", lambda *_, **__: SimpleNamespace(describe=lambda: ""))
    planned = FinetuneOptions(**{**made, "output": str(tmp_path / "x")}, **settings, strategy="lora", proprio=True)
    assert "lora" in plan_run(planned)


def test_a_model_that_sees_no_state_refuses_one(small_policy):
    model = OpenVLAForActionPrediction.from_pretrained(small_policy)
    with pytest.raises(ValueError, match="The model sees no state"):
        model.predict_action(SCENE, "open the drawer", state=np.zeros(8))
