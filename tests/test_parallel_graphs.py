"""Heads that predict in one pass, from graphs; here with recordings that run the pass again."""

import copy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_graphs import Again, Forgetful
from test_llama_openvla import new_model, prompts
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openvla import graphs_openvla
from openvla.action_heads_openvla import HEADS, ParallelTokenHead
from openvla.outputs_openvla import ActionPrediction
from openvla.parallel_graphs_openvla import SequenceGraph


STATE = {"q01": [-1.0] * 3, "q99": [1.0] * 3}
MODELS = {
    "parallel_tokens": {},
    "l1_regression": {},
    "wrist, state, FiLM": {
        "action_head": "l1_regression", "camera_names": ["full_image", "wrist_image"], "proprio_dim": 3,
        "use_film": True,
    },
    "eager": {"action_head": "parallel_tokens", "attn_implementation": "eager"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def recordings(monkeypatch):
    monkeypatch.setattr(SequenceGraph, "record", Again)
    monkeypatch.setattr(Again, "recorded", 0)
    monkeypatch.setattr(Again, "replayed", 0)


def make(kind: str = "l1_regression"):
    fields = {"action_head": kind, "action_dim": 7, "action_chunk": 2, **MODELS.get(kind, {})}
    attention = fields.pop("attn_implementation", None)
    model = new_model(**fields)
    if attention:
        model.set_attn_implementation(attention)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "language_model" not in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    if model.config.proprio_dim is not None:
        model.norm_stats[next(iter(model.norm_stats))]["proprio"] = STATE
    return model


def inputs_of(model, batch: int, seed: int = 0, padded: bool = False) -> dict:
    given = prompts(batch, seed, padded)
    cameras = len(model.camera_names)
    given["pixel_values"] = torch.cat([given["pixel_values"] * (1 + camera) for camera in range(cameras)], dim=1)
    if model.config.proprio_dim is not None:
        given["state"] = np.linspace(-0.5, 0.5, 3 * batch).reshape(batch, 3)
    return given


def check(model, plain, given: dict, replays: int, **options) -> None:
    """The numbers of `plain`, after so many replays."""
    Again.replayed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model.predict_action(**given, return_dict=True, **options)
    expected = plain.predict_action(**given, return_dict=True, **options)
    assert found.keys() == expected.keys() and Again.replayed == replays
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_every_prompt_has_the_graph_of_the_next_length(kind):
    plain = make(kind)
    model = copy.deepcopy(plain)
    done = model.prepare_for_inference(batch_sizes=(1, 3), prompt_buckets=(8, 12))
    assert not done.reason and done.graphs == [(1, 8), (1, 12), (3, 8), (3, 12)] and not done.compiled
    for seed in range(4):  # every length, with padding or without
        for batch in (1, 3):
            check(model, plain, inputs_of(model, batch, seed, padded=seed % 2 == 1), 1)
    assert Again.recorded == 4


def test_what_a_graph_holds_is_of_the_prediction_alone():
    """Nothing of a longer prompt, another image or another state before it."""
    plain = make("wrist, state, FiLM")
    model = copy.deepcopy(plain)
    model.prepare_for_inference(batch_sizes=[3], prompt_buckets=[16])
    for seed, padded in ((3, False), (0, True), (2, False), (0, True)):
        given = inputs_of(model, 3, seed, padded)
        given["state"] = given["state"] * (seed - 1) / 2
        check(model, plain, given, 1)


def test_other_sizes_and_decided_actions_have_none():
    plain = make("parallel_tokens")
    model = copy.deepcopy(plain)
    model.prepare_for_inference(prompt_buckets=(7,))
    check(model, plain, inputs_of(model, 1), 1, return_distributions=True)
    check(model, plain, inputs_of(model, 1), 1, constrained=False)
    check(model, plain, inputs_of(model, 2), 0)
    check(model, plain, inputs_of(model, 1, 3), 0)  # ten tokens
    numbers = make()
    numbers.action_head.prefix_training = 1
    found = copy.deepcopy(numbers)
    found.prepare_for_inference(prompt_buckets=(7,))
    decided = numbers.predict_action(**inputs_of(numbers, 1))[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it did not learn to continue actions
        Again.replayed = 0
        both = [other.predict_action(**inputs_of(other, 1), committed=decided) for other in (found, numbers)]
    np.testing.assert_allclose(*both, rtol=1e-5)
    assert Again.replayed == 0


CHANGES = {
    "cast": lambda model: model.to(torch.float64),
    "another head": lambda model: setattr(model.action_head, "fc2", copy.deepcopy(model.action_head.fc2)),
    "watched": lambda model: model.language_model.model.register_forward_hook(lambda *_: None),
    "fewer layers": lambda model: setattr(model.language_model.config, "num_hidden_layers", 1),
    "eager": lambda model: model.set_attn_implementation({"text_config": "eager"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_has_changed(change):
    plain = make()
    model = copy.deepcopy(plain)
    model.prepare_for_inference(prompt_buckets=[16])
    for changed in (model, plain):
        CHANGES[change](changed)
    with pytest.warns(UserWarning, match="is not what prepare_for_inference recorded"):
        model.predict_action(**inputs_of(model, 1))
    check(model, plain, inputs_of(model, 1), 0)
    assert change == "watched" or not model.prepare_for_inference(prompt_buckets=[16]).reason


def test_graphs_that_give_other_actions_are_not_used(monkeypatch):
    class Wrong(Again):
        def replay(self):
            super().replay()
            self.output.neg_()  # the norm of a head would take a constant away

    monkeypatch.setattr(SequenceGraph, "record", Wrong)
    for kind in ("l1_regression", "parallel_tokens"):
        plain = make(kind)
        model = copy.deepcopy(plain)
        done = model.prepare_for_inference(prompt_buckets=[16])
        assert not done.graphs and "actions differ by" in done.reason
        check(model, plain, inputs_of(model, 1), 0)


class Numbers(ParallelTokenHead):
    """A head of one's own: numbers alone, of tokens."""

    def actions(self, model, inputs, shape, choice):
        return ActionPrediction(normalized_actions=super().actions(model, inputs, shape, choice).normalized_actions)


def test_graphs_of_a_head_of_ones_own_that_gives_numbers(monkeypatch):
    monkeypatch.setitem(HEADS, "numbers", Numbers)
    plain = make("numbers")
    model = copy.deepcopy(plain)
    assert model.prepare_for_inference(prompt_buckets=[16]).graphs
    check(model, plain, inputs_of(model, 1), 1)


def test_memory_that_a_graph_uses_is_not_given_to_others(monkeypatch):
    monkeypatch.setattr(SequenceGraph, "record", Forgetful)
    monkeypatch.setattr("openvla.graphs_openvla.check_graphs", lambda *arguments: None)
    monkeypatch.setattr(Forgetful, "used", [])
    model = make("wrist, state, FiLM")
    assert model.prepare_for_inference().graphs
    assert len({reference.cdata for reference in Forgetful.used}) > 20
    assert not [reference for reference in Forgetful.used if reference.expired()]


def test_threads_with_streams_of_their_own_wait_for_each_other(monkeypatch):
    """A lock ends with what was asked for, and not with what was computed: the next one wrote into what is read."""
    waits: list[tuple[str, str]] = []
    streams = [SimpleNamespace(wait_stream=lambda other, name=name: waits.append((name, other))) for name in "abc"]
    model = make()
    model.prepare_for_inference(prompt_buckets=[16])
    (graph,) = graphs_openvla._PREPARED[model].graphs
    assert graph.last is graph.stream is None  # on a CPU
    graph.last = streams[0]
    for stream in streams[1:]:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        model.predict_action(**inputs_of(model, 1))
    assert waits == [("b", streams[0]), ("c", streams[1])]


class Moves(TorchDispatchMode):
    """The operations that copy something from one device to another."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        devices = {value.device.type for value in tree_leaves((arguments, options, made)) if torch.is_tensor(value)}
        if len(devices) > 1:
            self.found.append(str(function))
        return made


def has_cuda_tensors_without_values() -> bool:
    try:
        with FakeTensorMode():
            torch.zeros(1).to("cuda")
    except RuntimeError:  # torch 2.6 asks the driver
        return False
    return True


@pytest.mark.skipif(not has_cuda_tensors_without_values(), reason="this torch needs a GPU for that")
@pytest.mark.parametrize("kind", MODELS)
def test_nothing_in_it_waits_for_the_device(kind, monkeypatch):
    """A graph holds neither reads of the device nor copies from the host; of a CUDA device that has no values."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)  # there is none
    model, mode = make(kind), FakeTensorMode()
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    fake = mode.from_tensor(tensor.detach())
                    with mode:
                        held[name] = torch.nn.Parameter(fake.to("cuda"), requires_grad=False)
    with mode, torch.inference_mode(), Moves() as moves:
        graph = SequenceGraph(model, 2, 16, 14)
    assert graph.reading.output.device.type == "cuda" and not moves.found


def test_under_autocast_there_are_none():
    """Weights that it casts are not in the memory of a graph; what it asks for is no recording of another type."""
    plain = make()
    model = copy.deepcopy(plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast is on" in model.prepare_for_inference(prompt_buckets=[16]).reason
    assert not model.prepare_for_inference(prompt_buckets=[16]).reason
    with torch.autocast("cpu", torch.bfloat16):
        check(model, plain, inputs_of(model, 1), 0)
    check(model, plain, inputs_of(model, 1), 1)


def test_where_there_are_none(monkeypatch):
    assert "not compiled" in make().prepare_for_inference(compile=True).reason
    pytest.importorskip("diffusers", reason="needs the [oft] extra")
    assert "in passes of its own" in make("diffusion").prepare_for_inference().reason
    with pytest.raises(ValueError, match="14 tokens of an answer that is .* positions, and the language model has"):
        make().prepare_for_inference(prompt_buckets=[10**6])
    monkeypatch.undo()
    assert "graphs are of CUDA devices" in make().prepare_for_inference().reason
