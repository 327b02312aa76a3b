"""What acts: the protocol of a policy, a model as one, checks of the numbers it gives."""

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openvla import OpenVLAForActionPrediction
from openvla.device import emulated, torch_device
from openvla.observation import Observation
from openvla.policy import FARTHEST, OpenVLAPolicy, begin_episode, check_numbers, check_reach, load_model


ROOT = Path(__file__).resolve().parents[1]
FRONT, WRIST = np.random.default_rng(0).integers(0, 256, (2, 64, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> OpenVLAForActionPrediction:
    return load_model(str(ROOT), dtype="float32")


def seen(**images: np.ndarray) -> Observation:
    return Observation(images, np.zeros(8, np.float32), "open the drawer")


def test_a_policy_acts_as_its_model_predicts(model):
    both = seen(front=FRONT, wrist=WRIST)
    one, other = (model.predict_action(image, "open the drawer") for image in (FRONT, WRIST))
    assert not np.array_equal(one, other)
    np.testing.assert_allclose(OpenVLAPolicy(model).act([both, both]), [one, one], atol=1e-6)  # the first camera
    np.testing.assert_allclose(OpenVLAPolicy(model, camera="wrist").act([both]), [other], atol=1e-6)
    assert model.dtype.is_floating_point and not model.training


def test_what_a_policy_cannot_act_on(model):
    with pytest.raises(ValueError, match="No camera 'top' in the observation; there are front, wrist"):
        OpenVLAPolicy(model, camera="top").act([seen(front=FRONT, wrist=WRIST)])
    with pytest.raises(ValueError, match="holds no image"):
        OpenVLAPolicy(model).act([seen()])
    with pytest.raises(ValueError, match="observations is empty"):
        OpenVLAPolicy(model).act([])
    policy, one = OpenVLAPolicy(model), seen(front=FRONT)
    with pytest.raises(ValueError, match="observations is of type Observation: expected a list of Observation"):
        policy.act(one)
    with pytest.raises(ValueError, match=r"observations\[1\] of type dict has no images: expected an Observation"):
        policy.act([one, {"images": {"front": FRONT}}])
    with pytest.raises(ValueError, match=r"observations\[0\] of type Observation has images of type ndarray"):
        policy.predict([Observation(FRONT, np.zeros(8), "go")])
    for keys in ("metaworld", ["metaworld", "metaworld"]):
        with pytest.raises(ValueError, match="unnorm_keys=.*: expected one for each of 1 observations"):
            policy.predict([one], unnorm_keys=keys)
    with pytest.raises(ValueError, match="no camera for the view 'primary': there are wrist"):
        OpenVLAPolicy(model).act([seen(wrist=WRIST)])
    with pytest.raises(KeyError, match="unnorm_key='bridge'"):
        OpenVLAPolicy(model, unnorm_key="bridge")
    with pytest.raises(ValueError, match="quantization='int5' is unknown"):
        load_model(str(ROOT), quantization="int5")


def test_options_that_are_no_such_value(model):
    """`crop="no"` cropped. A step of another kind was an error of numpy's, or the draft of another step."""
    for given in ({"crop": "no"}, {"drafts": 0}):
        with pytest.raises(ValueError, match=rf"{next(iter(given))}=.*: expected True, False or None"):
            OpenVLAPolicy(model, **given)
    policy, image = OpenVLAPolicy(model, drafts=np.True_), np.zeros((8, 8, 3), np.uint8)
    for step in (2.5, "3", True, -1, np.nan):
        with pytest.raises(ValueError, match=r"observations\[0\].step=.*: expected a whole number of steps"):
            policy.act([Observation({"primary": image}, None, "open the drawer", step=step)])
    policy.act([Observation({"primary": image}, None, "open the drawer", step=np.int64(3))])


def test_a_policy_that_keeps_nothing_needs_no_reset(model):
    class Still:
        def act(self, observations):
            return np.zeros((len(observations), 7))

    begin_episode(Still())
    begin_episode(OpenVLAPolicy(model), slot=3)


@pytest.mark.parametrize("dims", [6, 7, 14])
def test_actions_of_any_dimension_are_checked(dims):
    given = np.linspace(-1, 1, dims)
    np.testing.assert_array_equal(check_reach(check_numbers(given.tolist())), given)
    for wrong in (np.full(dims, np.nan), ["a"] * dims, [[0.0] * dims, [0.0]]):
        with pytest.raises(ValueError, match="expected finite numbers"):
            check_numbers(wrong)
    with pytest.raises(ValueError, match="within 100 of 0"):
        check_reach(np.full(dims, -FARTHEST - 1))


def test_environments_load_no_model():
    """`policy` and `observation` are imported by every process that runs a simulator."""
    code = """
import sys, types
package = types.ModuleType("openvla"); package.__path__ = [sys.argv[1]]; sys.modules["openvla"] = package
import openvla.policy, openvla.observation
print([name for name in ("torch", "transformers", "timm") if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_a_model_of_two_cameras_is_given_both(model):
    """Which image is which view is told by its name, as in training."""
    asked = []

    class TwoCameras:
        norm_stats = model.norm_stats

        def predict_action(self, images, instructions, unnorm_key):
            asked.append(images)
            return np.zeros((len(images), 7))

    both = {"front": FRONT, "wrist": WRIST}
    OpenVLAPolicy(TwoCameras()).act([seen(**both)])
    OpenVLAPolicy(TwoCameras(), camera="wrist").act([seen(**both)])
    assert asked[0] == [both]
    assert asked[1] == [{"wrist": WRIST}]


@pytest.mark.parametrize(("choice", "where"), [("auto", "cpu"), ("cpu", "cpu"), ("mps", "mps")])
def test_where_a_model_runs(choice, where, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert torch_device(choice) == where


@pytest.mark.parametrize("choice", ["cuda", "mps"])
def test_a_gpu_that_is_not_there_is_refused(choice, monkeypatch):
    monkeypatch.setattr(f"torch.{'backends.' if choice == 'mps' else ''}{choice}.is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device='{choice}': torch finds no GPU"):
        torch_device(choice)


def test_names_of_version_0_1_0():
    """What scripts written against it import and call."""
    from openvla.evaluation.options import RecordOptions
    from openvla.evaluation.policies import OpenVLAPolicy as Policy
    from openvla.training.options import FinetuneOptions

    assert {RecordOptions.__module__, FinetuneOptions.__module__} == {
        "openvla.options.evaluation",
        "openvla.options.training",
    }
    model = OpenVLAForActionPrediction.from_pretrained(ROOT)
    assert Policy(model, crop=True).crop


@pytest.mark.parametrize("there", [True, False])
def test_half_precision_without_instructions_is_said(there, monkeypatch):
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: there, raising=False)
    slow = {str(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16) if emulated("cpu", dtype)}
    assert slow == (set() if there else {"torch.bfloat16", "torch.float16"})
    assert emulated("cuda:0", torch.bfloat16) is None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load_model(str(ROOT), dtype="bfloat16")
        load_model(str(ROOT), dtype="float32")
    found = [str(warning.message) for warning in said if "instructions" in str(warning.message)]
    assert len(found) == (0 if there else 1) and all("give dtype=float32" in text for text in found)


def test_states_that_the_model_does_not_see():
    """Each is looked at by itself, before any compute."""
    config = SimpleNamespace(proprio_dim=8, action_chunk=1)
    blind = OpenVLAPolicy(SimpleNamespace(config=config, norm_stats={"mine": {}}), "mine")
    with pytest.raises(ValueError, match=r"sees the state of the robot \(8 numbers\)"):
        blind.act([Observation({"front": FRONT}, None, "open the drawer")])
    with pytest.raises(ValueError, match=r"The state has 7 numbers, and the model sees 8 of one robot: \(8,\)"):
        blind.act([seen(front=FRONT), Observation({"front": FRONT}, np.zeros(7), "open the drawer")])
    with pytest.raises(ValueError, match=r"The state has shape \(1, 8\)"):
        blind.act([Observation({"front": FRONT}, np.zeros((1, 8)), "open the drawer")])


def test_means_of_distributions(model, monkeypatch):
    """Of what is scaled; the gripper stays the chosen one, and so does what was decided already."""
    policy, one = OpenVLAPolicy(model, decoding="mean"), seen(front=FRONT)
    [found], [chosen] = policy.predict([one]), OpenVLAPolicy(model).predict([one])
    assert found["token_ids"].tolist() == chosen["token_ids"].tolist()
    numbers = model.action_head.tokenizer.decode(np.arange(*model.action_head.tokenizer.token_range))
    means = (found["token_distributions"] * numbers).sum(axis=-1)
    np.testing.assert_allclose(found["normalized_actions"][:, :6], means[:, :6], atol=1e-6)
    np.testing.assert_allclose(policy.act([one]), found["actions"], atol=1e-6)
    assert np.abs(found["actions"] - chosen["actions"])[:, :3].min() > 1e-3
    assert found["actions"][:, 6] == chosen["actions"][:, 6]

    chunks = load_model(str(ROOT), dtype="float32", action_chunk=3)
    decided = np.array([[0.1, -0.2, 0.3, 0, 0, 0, 1.0]])
    [found] = OpenVLAPolicy(chunks, decoding="mean").predict([replace(one, committed=decided)])
    [chosen] = OpenVLAPolicy(chunks).predict([replace(one, committed=decided)])
    assert found["actions"][0].tolist() == chosen["actions"][0].tolist() == decided[0].tolist()
    assert np.abs(found["actions"] - chosen["actions"])[1:, :3].min() > 1e-4
    entry = model.norm_stats["metaworld"]
    far = {**entry["action"], "min": [-2.0] * 7, "max": [4.0] * 7}
    chunks.norm_stats = {"metaworld": {**entry, "action": far}}
    # As of an active adapter, whose own they are
    monkeypatch.setattr(type(chunks), "normalization", property(lambda model: {"metaworld": "bounds"}))
    [found] = OpenVLAPolicy(chunks, decoding="mean").predict([one])
    np.testing.assert_allclose(found["actions"][:, :6], 3 * (found["normalized_actions"][:, :6] + 1) - 2)
    names, places = ["x", "y", "yaw", "droll", "dpitch", "dyaw", "gripper"], [False] * 3 + [True] * 3 + [False]
    turning = {"names": names, "relative": places, "grippers": [6]}
    chunks.norm_stats = {"metaworld": {**entry, "action_spec": turning}}
    [found], [chosen] = (OpenVLAPolicy(chunks, decoding=way).predict([one]) for way in ("mean", "mode"))
    assert found["actions"][:, 2].tolist() == chosen["actions"][:, 2].tolist()  # the mean of pi and -pi is behind it
    assert np.abs(found["actions"] - chosen["actions"])[:, :2].min() > 1e-4
    with pytest.raises(ValueError, match="decoding='median'.*mode, mean"):
        OpenVLAPolicy(model, decoding="median")
    with pytest.raises(ValueError, match="decoding='mean': this head chooses no tokens"):
        OpenVLAPolicy(SimpleNamespace(action_head=SimpleNamespace(takes_drafts=False)), decoding="mean")
