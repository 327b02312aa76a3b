"""An OpenVLA model behind requests: actions of `predict_action`, whatever else is asked at once or was before."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oft import load_oft, saved_by_oft
from tiny import TINY

from openvla import OpenVLAForActionPrediction
from openvla.action_spec import usual_spec
from openvla.observation import Observation
from openvla.options.serving import ServeOptions
from openvla.policy import OpenVLAPolicy
from openvla.serving.contract import BadRequest, Request
from openvla.serving.model import OpenVLAModel, dataset_of, memory_errors


ROOT = Path(__file__).resolve().parents[1]
INSTRUCTIONS = ("open the drawer", "push the puck to the goal that is behind it", "reach", "close the window")
FRAMES = np.random.default_rng(0).integers(0, 256, (8, 48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def served() -> OpenVLAModel:
    return OpenVLAModel.load(ServeOptions(dtype="float32", device="cpu"))


def asked(served: OpenVLAModel, number: int = 0, state=(), key: str | None = None, **given) -> Request:
    """Of another frame and instruction for each number."""
    seen = {name: given.pop(name) for name in ("step", "committed") if name in given}
    images = {camera: FRAMES[(number + place) % 8] for place, camera in enumerate(served.info.cameras)}
    observation = Observation(images, np.asarray(state, np.float32), INSTRUCTIONS[number % 4], **seen)
    return Request(observation, key or next(iter(served.info.datasets)), **given)


def test_what_clients_are_told(served):
    info = served.info
    assert (info.model, info.default_key, info.cameras) == ("embedded policy", "metaworld", ("primary",))
    assert (info.chunk, info.image_size) == (1, (224, 224))
    dataset = info.datasets["metaworld"]
    assert dataset.spec.names[-1] == "gripper" and dataset.state_dim is None
    assert dataset.low[:3] == (-1, -1, -1) and dataset.high[:4] == (1, 1, 1, 0)


def test_actions_are_those_of_the_model_alone_and_together(served):
    requests = [asked(served, number, distributions=number == 1) for number in range(6)]
    together = served.act(requests)
    for request, answer in zip(requests, together):
        seen = request.observation
        expected = served.policy.model.predict_action(seen.images, seen.instruction, return_dict=True)
        (alone,) = served.act([request])
        for found in (answer, alone):
            assert found.actions.tolist() == [expected.actions.tolist()]
            assert found.normalized.tolist() == [expected.normalized_actions.tolist()]
            np.testing.assert_allclose(found.probabilities[0], expected.token_probabilities, atol=1e-5)
        assert (answer.distributions is None) == (not request.distributions)
    bins = together[1].distributions
    assert bins.shape == (1, 7, 256) and np.allclose(bins.sum(axis=-1), 1, atol=1e-5)
    centers = served.policy.model.bin_centers
    assert together[1].normalized.tolist() == [centers[np.minimum(bins[0].argmax(axis=-1), 254)].tolist()]


def test_what_is_kept_of_a_session_changes_nothing(served):
    """Drafts of the session, of another robot, after a reset, or none: the same numbers."""
    for number in (0, 0, 1, 2, 1):
        (plain,) = served.act([asked(served, number)])
        found = served.act([asked(served, number, session="a"), asked(served, number + 1, session="b")])
        assert found[0].actions.tolist() == plain.actions.tolist()
        if number == 2:
            served.end_session("a")
            served.end_session("nobody")
    assert set(served._slots) == {"a", "b"} and len(served.policy._last) == 2
    served.act([asked(served, 0, session="a")])
    served.policy.act([replace(asked(served, 0).observation, slot=served._slots["a"])])
    assert served.policy.passes == [1]  # the draft was right


def test_sessions_are_bounded(served):
    bounded = OpenVLAModel(served.policy.model, "mine", sessions=2)
    for session in ("a", "b", "a", "c", None):
        bounded.act([asked(bounded, session=session)])
    assert list(bounded._slots) == ["a", "c"] and len(bounded.policy._last) == 2


def test_means_of_distributions_are_served(served):
    model = OpenVLAModel(served.policy.model, "mine", decoding="mean")
    request = asked(model)
    [found], [chosen] = model.act([request]), served.act([request])
    [expected] = OpenVLAPolicy(served.policy.model, decoding="mean").predict([request.observation])
    np.testing.assert_allclose(found.actions, expected["actions"], atol=1e-6)
    assert np.abs(found.actions - chosen.actions).max() > 1e-3 and found.distributions is None
    assert ServeOptions(decoding="mean").decoding == "mean"


def test_an_instruction_that_the_model_cannot_read_is_the_mistake_of_its_sender(served):
    request = asked(served)
    for words, message in (("word " * 3000, "instruction: The prompt has .* shorten"), ("...", "instruction is empty")):
        wrong = replace(request, observation=replace(request.observation, instruction=words))
        refusal, answer = served.act([wrong, request])
        assert isinstance(refusal, BadRequest) and re.search(message, str(refusal))
        [alone] = served.act([request])
        np.testing.assert_allclose(answer.actions, alone.actions, atol=1e-6)
        assert len(served.act([wrong])) == 1


def test_warm_up(served):
    served.warm_up([1, 2])
    assert len(served._slots) <= 2


def test_several_datasets_in_a_batch(monkeypatch):
    model = TINY[0].load()
    keys = list(model.norm_stats)[:2]
    served = OpenVLAModel(model, "tiny")
    assert served.info.default_key is None and len(served.info.datasets) > 1
    assert OpenVLAModel(model, "tiny", unnorm_key=keys[1]).info.default_key == keys[1]
    with pytest.raises(KeyError, match="unnorm_key='nothing'"):
        OpenVLAModel(model, "tiny", unnorm_key="nothing")
    requests = [asked(served, number, key=keys[number % 2]) for number in range(4)]
    for request, answer in zip(requests, served.act(requests)):
        seen = request.observation
        expected = model.predict_action(seen.images, seen.instruction, unnorm_key=request.unnorm_key)
        assert answer.actions.tolist() == [expected.tolist()]
    assert not served.policy._last
    predict = served.policy._predict

    def failing(observations, unnorm_key, **more):
        if unnorm_key == keys[1]:
            raise RuntimeError("no kernels")
        return predict(observations, unnorm_key=unnorm_key, **more)

    monkeypatch.setattr(served.policy, "_predict", failing)
    with pytest.raises(RuntimeError, match="no kernels"):
        served.act(requests)
    assert not served.policy._last  # requests without a session leave nothing


def test_chunks_and_committed_steps(served):
    model = OpenVLAForActionPrediction.from_pretrained(ROOT, dtype=torch.float32, action_chunk=3).eval()
    chunked = OpenVLAModel(model, "chunked")
    (before,) = chunked.act([asked(chunked, 0)])
    assert before.actions.shape == before.probabilities.shape == (3, 7)
    decided = before.actions[:2]
    requests = [asked(chunked, 0), asked(chunked, 1, committed=decided), asked(chunked, 2), asked(chunked, 3)]
    for request, answer in zip(requests, chunked.act(requests)):
        assert answer.actions.tolist() == chunked.act([request])[0].actions.tolist()
    assert chunked.act(requests)[1].actions[:2].tolist() == decided.tolist()


def test_a_model_that_sees_two_cameras_and_a_state(tmp_path, monkeypatch):
    """Heads that give numbers have no tokens, and no drafts."""
    saved_by_oft("libero-l1", tmp_path)
    served = OpenVLAModel(load_oft("libero-l1", tmp_path), "oft")
    assert len(served.info.cameras) == 2 and served.info.chunk == 8
    (dataset,) = served.info.datasets.values()
    assert dataset.state_dim == 8
    requests = [asked(served, number, state=np.linspace(-1, 1, 8), session="a") for number in range(2)]
    for request, answer in zip(requests, served.act(requests)):
        assert answer.actions.shape == (8, 7) and answer.probabilities is answer.distributions is None
        np.testing.assert_allclose(answer.actions, served.act([request])[0].actions, atol=1e-5)
    served.warm_up([1])
    with monkeypatch.context() as patch:  # said before robots ask
        patch.setitem(sys.modules, "simplejpeg", None)
        with pytest.raises(ModuleNotFoundError, match=r"openvla\[oft\]"):
            served.warm_up([1])
    known = served.policy.model.norm_stats
    ((key, stated),) = known.items()
    known["stateless"] = {name: value for name, value in stated.items() if name != "proprio"}
    assert list(OpenVLAModel(served.policy.model, "mine").info.datasets) == [key]
    with pytest.raises(ValueError, match=f"unnorm_key='stateless': 'mine' sees the state .* those that have: {key}"):
        OpenVLAModel(served.policy.model, "mine", "stateless")
    for sure in (True, False):  # of what finetune took for changes and nobody said
        stated["action_spec"] = usual_spec(7, stated=sure).to_dict()
        assert dataset_of(served.policy.model, key).stated is sure
    stated.pop("proprio")
    with pytest.raises(ValueError, match="statistics have no proprio of any dataset"):
        OpenVLAModel(served.policy.model, "mine")


def test_errors_of_allocators_are_memory_errors():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    ):
        with pytest.raises(MemoryError), memory_errors():
            raise error
    with pytest.raises(RuntimeError, match="device-side assert"), memory_errors():
        raise RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(MemoryError), memory_errors():
        torch.empty(2**60)
