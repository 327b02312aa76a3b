"""Predictions from graphs are those of the model; here with recordings that run the functions again."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from test_llama_openvla import new_model, prompts
from torch import is_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama import modeling_llama as llama

from openvla.graphs_openvla import GraphSteps, Preparation
from openvla.llama_openvla import _POOLS


class Again:
    """As a graph: the same output, written again. Counts."""

    recorded = replayed = 0

    def __init__(self, function, stream):
        self.function, self.output = function, function()
        Again.recorded += 1

    def replay(self):
        Again.replayed += 1
        self.output.copy_(self.function())


@pytest.fixture(autouse=True)
def recordings(monkeypatch):
    monkeypatch.setattr(GraphSteps, "record", Again)
    monkeypatch.setattr(Again, "recorded", 0)
    monkeypatch.setattr(Again, "replayed", 0)


@pytest.fixture(scope="module")
def plain():
    return new_model()


def details(model, inputs, **options):
    return model.predict_action(**inputs, return_dict=True, **options)


def check(model, plain, inputs, replays: int | None = None, **options):
    """Same tokens as `plain`, after so many replays; None: as many as it takes passes, more than one."""
    Again.replayed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = details(model, inputs, **options)
    expected = details(plain, inputs, **options)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    np.testing.assert_allclose(found.token_probabilities, expected.token_probabilities, rtol=1e-4, atol=1e-6)
    passes = expected.token_passes.max()
    assert Again.replayed == replays if replays is not None else Again.replayed == passes > 1
    return found


def test_every_prompt_has_the_graphs_of_the_next_length(plain):
    model = copy.deepcopy(plain)
    done = model.prepare_for_inference(batch_sizes=(1, 3), prompt_buckets=(8, 12))
    assert isinstance(done, Preparation) and done.seconds > 0 and not done.reason
    assert done.graphs == [(1, 8), (1, 12), (3, 8), (3, 12)] and Again.recorded == 12
    for seed in range(4):  # every length, with padding or without
        for batch in (1, 3):
            inputs = prompts(batch, seed, padded=seed % 2 == 1)
            found = check(model, plain, inputs, 1)
            draft = found.token_ids if batch > 1 else found.token_ids[None]
            assert (check(model, plain, inputs, 1, draft=draft).token_passes == 1).all()
            draft = draft.copy()
            draft[:, 2] = 150
            found = check(model, plain, inputs, draft=draft)
            assert found.token_passes.max() == Again.replayed
    assert Again.recorded == 12


def test_other_sizes_and_choices_have_none(plain):
    model = copy.deepcopy(plain)
    model.prepare_for_inference(prompt_buckets=(7,))
    check(model, plain, prompts(1, 0), 1)
    check(model, plain, prompts(2, 0), 0)
    check(model, plain, prompts(1, 3), 0)  # ten tokens
    check(model, plain, prompts(1, 0), 0, constrained=False)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    drawn = [
        other.predict_action(**prompts(1), do_sample=True, generator=one)
        for other, one in zip((model, plain), generators)
    ]
    assert drawn[0].tolist() == drawn[1].tolist()


def test_chunks(plain):
    chunked = new_model(action_chunk=3)
    model = copy.deepcopy(chunked)
    model.prepare_for_inference(batch_sizes=[2], prompt_buckets=[16])
    found = check(model, chunked, prompts(2, 1, True), 1)
    check(model, chunked, prompts(2, 1, True), 1, draft=found.token_ids)
    committed = found.actions[:, :1]
    check(model, chunked, prompts(2, 1, True), 0, committed=committed)


def test_another_default_device(plain):
    """After `torch.set_default_device("cuda")` what is read on the host was made on the GPU, and met arrays here."""
    model, inputs = copy.deepcopy(plain), prompts(2, 1, True)
    expected = plain.predict_action(**inputs, return_dict=True)
    with torch.device("meta"):
        model.prepare_for_inference(batch_sizes=[2], prompt_buckets=[16])
        found = check(model, plain, inputs, 1)
        check(model, plain, inputs, 1, draft=expected.token_ids)
    assert found.token_ids.tolist() == expected.token_ids.tolist()


def lora(model):
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False), model)
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


CHANGES = {
    "cast": lambda model: model.to(torch.float64),
    "cast back": lambda model: model.to(torch.float64).to(torch.float32),
    "weights elsewhere": lambda model: setattr(
        model.language_model.lm_head, "weight", torch.nn.Parameter(model.language_model.lm_head.weight * 2)
    ),
    "another module": lambda model: setattr(model.projector, "fc2", copy.deepcopy(model.projector.fc2)),
    "an adapter": lora,
    "watched": lambda model: model.language_model.model.register_forward_hook(lambda *_: None),
    "watched at the projector": lambda model: model.projector.register_forward_hook(lambda module, given, out: out * 2),
    "watched at a product": lambda model: model.language_model.lm_head.register_forward_pre_hook(lambda *_: None),
    "another forward": lambda model: setattr(model.projector, "forward", lambda features: features[..., :32] * 2),
    "watched by a compiler": lambda model: model.language_model.model.layers[0].compile(backend="eager"),
    "fewer layers": lambda model: setattr(model.language_model.config, "num_hidden_layers", 1),
    "eager": lambda model: model.set_attn_implementation({"text_config": "eager"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_has_changed(change, plain):
    model = copy.deepcopy(plain)
    model.prepare_for_inference(prompt_buckets=[16])
    check(model, plain, prompts(1), 1)
    CHANGES[change](model)
    Again.replayed = 0
    with pytest.warns(UserWarning, match="is not what prepare_for_inference recorded"):
        found = details(model, prompts(1))
    assert Again.replayed == 0
    other = copy.deepcopy(model)  # which has no graphs
    assert found.token_ids.tolist() == details(other, prompts(1)).token_ids.tolist()
    check(model, other, prompts(1), 0)  # said once
    done = model.prepare_for_inference(prompt_buckets=[16])
    assert bool(done.reason) == change.startswith("watched")
    check(model, other, prompts(1), 0 if done.reason else 1)


def test_what_watches_all_modules(plain):
    model = copy.deepcopy(plain)
    model.prepare_for_inference(prompt_buckets=[16])
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.warns(UserWarning, match="or hooks on them"):
            details(model, prompts(1))
        check(model, plain, prompts(1), 0)
    finally:
        hook.remove()
    check(model, plain, prompts(1), 1)


def test_a_function_of_the_library_that_is_replaced(plain, monkeypatch):
    model = copy.deepcopy(plain)
    model.prepare_for_inference(prompt_buckets=[16])
    attention = llama.LlamaAttention.forward
    with monkeypatch.context() as patch:
        patch.setattr(llama.LlamaAttention, "forward", lambda *given, **options: attention(*given, **options))
        with pytest.warns(UserWarning, match="is not what prepare_for_inference recorded"):
            details(model, prompts(1))
        check(model, plain, prompts(1), 0)
    check(model, plain, prompts(1), 1)


def test_hidden_states_leave_graphs_as_they_are(plain):
    """The library's own hooks, which do nothing until these are asked for."""
    model = copy.deepcopy(plain)
    model.prepare_for_inference(prompt_buckets=[16])
    model(**prompts(1), output_hidden_states=True)
    check(model, plain, prompts(1), 1)


def test_adapters_switched_and_merged(plain):
    model = copy.deepcopy(plain)
    layers = lora(model)
    model.prepare_for_inference(prompt_buckets=[16])
    for change in (
        lambda layer: layer.enable_adapters(False),
        lambda layer: (layer.enable_adapters(True), layer.merge()),
        lambda layer: layer.unmerge(),
        lambda layer: layer.set_scale("default", 3.0),
    ):
        check(model, copy.deepcopy(model), prompts(1), 1)
        for layer in layers:
            change(layer)
        with pytest.warns(UserWarning, match="is not what"):
            details(model, prompts(1))
        model.prepare_for_inference(prompt_buckets=[16])


def test_values_may_change_in_place(plain):
    model, other = copy.deepcopy(plain), new_model(seed=1)
    model.prepare_for_inference(prompt_buckets=[16])
    model.load_state_dict(other.state_dict())
    check(model, other, prompts(1), 1)


def test_threads_take_turns(plain):
    model = copy.deepcopy(plain)
    model.prepare_for_inference(prompt_buckets=[16])
    jobs = [prompts(1, seed) for seed in range(12)]
    expected = [plain.predict_action(**inputs).tolist() for inputs in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda inputs: model.predict_action(**inputs).tolist(), jobs * 2)) == expected * 2


def test_what_is_not_finite_is_no_action(plain):
    model = copy.deepcopy(plain)
    model.prepare_for_inference(prompt_buckets=[16])
    with torch.no_grad():
        model.language_model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.predict_action(**prompts(1))


class Wrong(Again):
    """Its third replay, and all after it, end in memory that others write into."""

    def replay(self):
        super().replay()
        if Again.replayed > 2:
            self.output.copy_(self.output.roll(1, dims=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_that_predict_something_else_are_refused(dtype, monkeypatch, plain):
    monkeypatch.setattr(GraphSteps, "record", Wrong)
    model = copy.deepcopy(plain).to(dtype)
    done = model.prepare_for_inference(prompt_buckets=[16])
    assert not done.graphs and "of the probability went to other tokens" in done.reason
    check(model, copy.deepcopy(plain).to(dtype), prompts(1), 0)


class Forgetful:
    """As a graph of a GPU: it has addresses, and holds nothing but its output."""

    used: list[StorageWeakRef] = []

    def __init__(self, function, stream):
        function()  # as there, to warm up
        with Storages() as seen:
            self.output = function()
        Forgetful.used += [reference for reference in seen.read if reference.cdata not in seen.made]

    def replay(self):
        raise AssertionError("there is nothing to run")


class Storages(TorchDispatchMode):
    """The memory that operations read, and that they make."""

    def __init__(self):
        super().__init__()
        self.read: list[StorageWeakRef] = []
        self.made: set[int] = set()
        self.all: list[StorageWeakRef] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        given = [
            StorageWeakRef(value.untyped_storage()) for value in tree_leaves((arguments, options)) if is_tensor(value)
        ]
        found = function(*arguments, **(options or {}))
        self.read += [reference for reference in given if reference.cdata not in self.made]
        known = {reference.cdata for reference in given}
        made = [StorageWeakRef(value.untyped_storage()) for value in tree_leaves(found) if is_tensor(value)]
        self.made |= {reference.cdata for reference in made if reference.cdata not in known}
        self.all += made  # an address that is let go of would be another's
        return found


@pytest.mark.parametrize("compile", [False, True])
def test_memory_that_graphs_use_is_not_given_to_others(monkeypatch, compile):
    """What a recording reads or writes from outside of it is there as long as the graphs are: no name that ended with
    the recording holds it alone. The second graph reads what the first has made."""
    monkeypatch.setattr("openvla.compiled_openvla._compiled", lambda function, tuned=False: function)
    monkeypatch.setattr(GraphSteps, "record", Forgetful)
    monkeypatch.setattr("openvla.graphs_openvla.check_graphs", lambda *arguments: None)
    monkeypatch.setattr(Forgetful, "used", [])
    model = new_model(proprio_dim=3)
    model.norm_stats[next(iter(model.norm_stats))]["proprio"] = {"q01": [-1.0] * 3, "q99": [1.0] * 3}
    done = model.prepare_for_inference(compile=compile)
    assert done.graphs and done.compiled == compile
    assert len({reference.cdata for reference in Forgetful.used}) > 20
    assert not [reference for reference in Forgetful.used if reference.expired()]


def test_without_graphs(monkeypatch, plain):
    monkeypatch.undo()
    model = copy.deepcopy(plain)
    done = model.prepare_for_inference(batch_sizes=[4], prompt_buckets=[100])
    assert not done.graphs and "graphs are of CUDA devices" in done.reason
    (cache,) = _POOLS[model.language_model]._free
    assert cache.shape[2] == 4 and cache.shape[4] >= 111
    model.predict_action(**prompts(2))
    assert _POOLS[model.language_model]._free[0] is cache


def test_what_cannot_be_recorded(monkeypatch, plain):
    def refuse(function, stream):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(GraphSteps, "record", staticmethod(refuse))
    model = copy.deepcopy(plain)
    assert "cannot be recorded: operation not permitted" in model.prepare_for_inference().reason
    check(model, plain, prompts(1), 0)


@pytest.mark.parametrize(
    "sizes", [{"batch_sizes": []}, {"batch_sizes": 4}, {"prompt_buckets": (0,)}, {"prompt_buckets": (1.5,)}]
)
def test_sizes_that_are_refused(plain, sizes):
    with pytest.raises(ValueError, match="expected whole numbers of at least 1"):
        plain.prepare_for_inference(**sizes)
    with pytest.raises(KeyError, match="unnorm_key='bridge'"):
        plain.prepare_for_inference(unnorm_key="bridge")


def test_sizes_that_cannot_be_prepared():
    model = new_model()
    with pytest.raises(ValueError, match="and the language model has"):
        model.prepare_for_inference(prompt_buckets=(10**9,))
    with pytest.raises(MemoryError, match="batch_sizes"):
        model.prepare_for_inference(batch_sizes=(10**9,))
