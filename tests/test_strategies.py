"""Which parameters each strategy trains: those of the paper's table 1, to its last digit."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
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
