"""Which parameters each strategy trains: those of the paper's table 1, to its last digit."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_extending import small_model
from test_heads_and_strategies import LEARNS
from tiny import golden_image

from openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.data.collate import ActionCollator
from openvla.presets import load_preset_config
from openvla.training import STRATEGIES, apply_strategy, qlora_quantization, trainable_parameters
from openvla.training.strategies import freeze_unused


peft = pytest.importorskip("peft", reason="adapters need the [train] extra")


def published() -> OpenVLAForActionPrediction:
    with torch.device("meta"):
        return OpenVLAForActionPrediction(load_preset_config("openvla-v01-7b"))


def test_table_1():
    """One model after another strategy: each decides about all weights."""
    model = published()
    millions = {"full": 7188.1, "last_layer": 465.1, "frozen_vision": 6760.4, "sandwich": 914.2}
    for name in millions:
        assert round(trainable_parameters(apply_strategy(model, name)) / 1e6, 1) == millions[name], name


@pytest.mark.parametrize(("rank", "millions"), [(32, 97.6), (64, 195.2)])
def test_table_1_of_adapters(rank, millions):
    with torch.device("meta"):
        model = apply_strategy(published(), "lora", rank=rank)
    assert round(trainable_parameters(model) / 1e6, 1) == millions


def load(folder, **options) -> OpenVLAForActionPrediction:
    return OpenVLAForActionPrediction.from_pretrained(folder, dtype=torch.float32, **options)


@pytest.fixture(scope="module")
def batch(small_policy) -> dict[str, torch.Tensor]:
    sample = {"instruction": "open the drawer", "actions": np.linspace(-0.9, 0.9, 7), "image": golden_image(0)}
    return ActionCollator(OpenVLAProcessor.from_pretrained(small_policy))([sample])


@pytest.mark.parametrize("name", ["full", "last_layer", "frozen_vision", "sandwich", "lora", "qlora"])
def test_only_the_chosen_parameters_learn(name, small_policy, batch):
    if name == "qlora":
        pytest.importorskip("bitsandbytes", reason="qlora needs the [quant] extra")
        model = load(small_policy, quantization_config=qlora_quantization(torch.float32))
    else:
        model = load(small_policy)
    model = apply_strategy(model, name, **({"rank": 4} if "lora" in name else {}))
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    changed = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert changed and changed <= trainable
    last = len(model.language_model.model.layers) - 1
    learns = tuple(prefix.replace("layers.1", f"layers.{last}") for prefix in LEARNS[name])
    assert all(key.startswith(learns) or "lora_" in key for key in changed)
    assert all(any(key.startswith(prefix) for key in changed) for prefix in learns)
    assert any("lora_" in key for key in changed) == ("lora" in name)
    if "lora" in name:
        assert all("lora_" in key for key in trainable)
        assert any("lm_head" in key for key in trainable) and any("vision_backbone" in key for key in trainable)


@pytest.mark.parametrize("name", ["full", "lora", "sandwich"])
def test_what_stays_trainable_has_gradients(name, small_policy, batch):
    model = apply_strategy(load(small_policy), name)
    before = trainable_parameters(model)
    freeze_unused(model)
    assert trainable_parameters(model) < before
    model(**batch).loss.backward()
    without = [key for key, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert without == []


LAST_BLOCKS = {"gpt2": "transformer.h.1.", "gpt_neox": "gpt_neox.layers.1.", "opt": "model.decoder.layers.1."}


@pytest.mark.parametrize("model_type", LAST_BLOCKS)
def test_the_last_layer_of_other_language_models(model_type):
    """Their blocks and final norms have other names: last_layer and sandwich ended in an AttributeError."""
    model = apply_strategy(small_model(model_type), "last_layer")
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    block = f"language_model.{LAST_BLOCKS[model_type]}"
    assert {name for name, _ in model.named_parameters() if name.startswith(block)} <= learns
    shared = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    others = [name for name in learns if not name.startswith(block)]
    named = dict(model.named_parameters())
    norm = [name for name in others if not any(named[name] is weight for weight in shared)]
    assert {name.rpartition(".")[2] for name in norm} == {"weight", "bias"} and "norm" in norm[0] or "ln_f" in norm[0]
    del model.get_decoder()._modules[block.split(".")[-3]]
    with pytest.raises(ValueError, match="its last layer is not found. Take another strategy"):
        apply_strategy(model, "last_layer")


def test_adapters_of_gpt2_and_of_experts():
    """GPT-2's layers are no torch.nn.Linear: none of them had an adapter, and nothing said so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        adapted = [name for name, _ in apply_strategy(small_model("gpt2"), "lora").named_modules()]
    assert all(
        f"h.{block}.{layer}.lora_A" in " ".join(adapted) for block in (0, 1) for layer in ("attn.c_attn", "mlp.c_fc")
    )
    with pytest.warns(UserWarning, match=r"\d\d% of the language model's weights get adapters.*experts in one tensor"):
        apply_strategy(small_model("mixtral"), "lora")


def test_an_evaluation_does_not_change_the_gradients_of_a_quantized_base(small_policy, batch):
    pytest.importorskip("bitsandbytes", reason="qlora needs the [quant] extra")
    model = load(small_policy, quantization_config=qlora_quantization(torch.float32))
    model = apply_strategy(model, "qlora", rank=4)

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(**batch).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    before = gradients()
    with torch.no_grad():
        model.eval()(**batch)
    for one, other in zip(before, gradients(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_table_of_strategies_has_no_numbers_of_another_command(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "studies")
    import compare_strategies

    arguments = SimpleNamespace(dataset="demos", steps=300)
    (tmp_path / "taken.json").write_text(json.dumps({"command": ["-m", "openvla.cli"], "log": []}))
    with pytest.raises(SystemExit, match="holds the run of another command .*openvla.cli.*--runs"):
        compare_strategies.run("lora", arguments, [], tmp_path)


def test_every_strategy_is_tested():
    assert set(STRATEGIES) == {"full", "last_layer", "frozen_vision", "sandwich", "lora", "qlora"}


def test_errors(small_policy):
    model = load(small_policy)
    with pytest.raises(ValueError, match="Did you mean 'lora'"):
        apply_strategy(model, "loar")
    with pytest.raises(ValueError, match="4-bit base"):
        apply_strategy(model, "qlora")
    with pytest.raises(ValueError, match="at least 1"):
        apply_strategy(model, "lora", rank=0)
    pytest.importorskip("bitsandbytes", reason="a quantized model needs the [quant] extra")
    with pytest.raises(ValueError, match="quantized"):
        apply_strategy(load(small_policy, quantization_config=qlora_quantization(torch.float32)), "full")
