"""Models of 8 bits, 4 bits and fp8: rounded while they are loaded, or a folder of `openvla quantize`."""

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_llama_openvla import new_model, prompts
from test_modeling_openvla import small_config
from tiny import TINY, golden_image
from transformers import AwqConfig, BitsAndBytesConfig
from typer.testing import CliRunner

from openvla import OpenVLAForActionPrediction, cli
from openvla.conversion import export_prismatic_checkpoint, package_checkpoint, quantize_checkpoint
from openvla.float8_linear_openvla import Float8Linear
from openvla.int4_linear_openvla import Int4Linear
from openvla.int8_linear_openvla import Int8Linear
from openvla.policy import QUANTIZATIONS, load_model
from openvla.products_openvla import Linear
from openvla.quantization_openvla import (
    NEVER_QUANTIZED,
    OpenVLAQuantizationConfig,
    has_quantized_layers,
    quantize_linears,
)
from openvla.quantized_linear_openvla import QuantizedLinear
from openvla.training import apply_strategy


ROOT = Path(__file__).resolve().parents[1]
PICTURE = next((ROOT / "examples" / "frames").glob("drawer*.png"))
KINDS = {8: Int8Linear, 4: Int4Linear, "fp8": Float8Linear}
NAMES = {8: "int8", 4: "int4", "fp8": "fp8"}


def quantized_layers(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def load(folder=ROOT, **options):
    return OpenVLAForActionPrediction.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def plain():
    return load()


@pytest.fixture(scope="module", params=KINDS, ids=NAMES.get)
def folder(request, tmp_path_factory):
    """The embedded policy, written with fewer bits; and how many."""
    return quantize_checkpoint(ROOT, tmp_path_factory.mktemp("quantized") / "out", bits=request.param), request.param


@pytest.fixture(scope="module")
def stored(folder):
    """Its model, for tests that do not change it."""
    return load(folder[0])


@pytest.mark.parametrize(
    ("tiny_checkpoint", "bits", "dtype"),  # each two of these together
    [
        ("tiny-openvla-fused", 8, torch.float32),
        ("tiny-openvla-fused", 4, torch.bfloat16),
        ("tiny-openvla-siglip", 8, torch.bfloat16),
        ("tiny-openvla-siglip", 4, torch.float32),
        ("tiny-openvla-siglip", "fp8", torch.bfloat16),
        ("tiny-openvla-fused", "fp8", torch.float32),
    ],
    indirect=["tiny_checkpoint"],
)
def test_rounded_while_it_is_loaded(bits, dtype, tiny_checkpoint, tmp_path):
    unquantized = tiny_checkpoint.load(dtype=dtype)
    model = tiny_checkpoint.load(dtype=dtype, quantization_config=OpenVLAQuantizationConfig(bits))
    layers = quantized_layers(model)
    assert len(layers) == 7 * model.config.text_config.num_hidden_layers
    assert all(layer.startswith("language_model.model.layers.") for layer in layers)
    for name in layers:
        expected = KINDS[bits].quantize(unquantized.get_submodule(name).weight)
        assert all(torch.equal(model.get_submodule(name).state_dict()[key], expected[key]) for key in expected), name
    found = model.state_dict()
    for name, value in unquantized.state_dict().items():
        if name.rpartition(".")[0] not in layers:
            assert torch.equal(found[name], value), name
    assert model.dtype == dtype and model.get_memory_footprint() < unquantized.get_memory_footprint()

    arguments = {"unnorm_key": "bridge_orig", "return_dict": True}
    found = model.predict_action(golden_image(0), "open the drawer", **arguments)
    black = model.predict_action(np.zeros((8, 8, 3), dtype=np.uint8), "open the drawer", **arguments)
    assert found.actions.tolist() != black.actions.tolist()
    model.save_pretrained(tmp_path)  # after it has run: packed
    tiny_checkpoint.processor().save_pretrained(tmp_path)
    again = load(tmp_path)
    assert quantized_layers(again) == layers and again.dtype == dtype
    for other in (again, model, copy.deepcopy(model)):
        assert other.predict_action(golden_image(0), "open the drawer", **arguments).token_ids.tolist() == (
            found.token_ids.tolist()
        )


def test_a_folder_is_what_rounding_while_loading_gives(folder, stored, plain):
    path, bits = folder
    expected = load(quantization_config=OpenVLAQuantizationConfig(bits)).state_dict()
    assert stored.state_dict().keys() == expected.keys()
    for name, value in stored.state_dict().items():
        assert torch.equal(value, expected[name]), name
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "openvla" and config["bits"] == bits
    action, expected = (model.predict_action(PICTURE, "open the drawer") for model in (stored, plain))
    assert np.abs(action - expected).max() < 0.2
    other = 4 if bits == 8 else 8
    with pytest.raises(ValueError, match=f"holds weights of {bits}( bits)?, and {other} bits were asked for"):
        load_model(str(path), quantization=NAMES[other])
    with pytest.raises(ValueError, match="is quantized: give the model that it was made of"):
        quantize_checkpoint(path, path.parent / "again")
    with pytest.raises(ValueError, match="is quantized: give the model that it was made of"):
        export_prismatic_checkpoint(path, path.parent / "again")
    assert not (path.parent / "again").exists()
    mixed = load(path, dtype=torch.bfloat16)
    assert {module.weight.dtype for name, module in mixed.named_modules() if name in quantized_layers(mixed)} == {
        KINDS[bits].stored(64, 64)["weight"][1]
    }
    assert mixed.predict_action(PICTURE, "open the drawer").shape == (7,)


def test_a_folder_carries_its_code(folder, stored, tmp_path):
    """Packaged once more, and loaded in a process without this package."""
    path, bits = folder
    packaged = package_checkpoint(path, tmp_path / "packaged")
    expected = stored.predict_action(PICTURE, "open the drawer").tolist()
    program = """
import json, sys
from transformers import AutoModel, AutoModelForImageTextToText
from PIL import Image
for name, kind in zip(sys.argv[2:4], (AutoModel, AutoModelForImageTextToText)):
    model = kind.from_pretrained(name, trust_remote_code=True)
    print(json.dumps(model.predict_action(Image.open(sys.argv[1]), "open the drawer").tolist()))
    print(sum(type(module).__name__ == sys.argv[4] for module in model.modules()), "openvla" in sys.modules)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    ran = processes.run(
        program, PICTURE, path, packaged, KINDS[bits].__name__, cwd=tmp_path, env=environment, server="transformers"
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert [json.loads(line) for line in lines[::2]] == [expected] * 2
    assert lines[1::2] == [f"{len(quantized_layers(stored))} False"] * 2


@pytest.mark.parametrize("bits", KINDS)
def test_towers_and_projector_may_be_quantized(bits, plain, tmp_path):
    path = quantize_checkpoint(ROOT, tmp_path / "out", bits=bits, towers=True, dtype="bfloat16")
    model = load(path)
    assert model.dtype == torch.bfloat16
    layers = quantized_layers(model)
    assert {name.split(".")[0] for name in layers} == {"vision_backbone", "projector", "language_model"}
    assert not any(part in name.split(".") for name in layers for part in NEVER_QUANTIZED)
    action = model.predict_action(PICTURE, "open the drawer")
    assert np.abs(action - plain.predict_action(PICTURE, "open the drawer")).max() < 0.3


@pytest.fixture(scope="module")
def modulated(tmp_path_factory):
    """Folder of a small model with FiLM, the state and a head of its own, all of which its actions depend on."""
    statistics = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    model = new_model(
        text_config={**small_config().text_config.to_dict(), "hidden_size": 64, "intermediate_size": 128},
        action_head="l1_regression", action_dim=7, action_chunk=2, use_film=True, proprio_dim=7,
        norm_stats={"robot": {"action": statistics, "proprio": statistics}},
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and any(part in name for part in ("scale", "shift", "proprio", "action_head")):
                weight.normal_(std=1.5 * weight.shape[1] ** -0.5)
    folder = tmp_path_factory.mktemp("modulated")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "given",
    [
        *[{"quant_method": "openvla", "bits": bits, "modules_to_not_convert": NEVER_QUANTIZED} for bits in KINDS],
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]},
    ],
    ids=["int8", "int4", "fp8", "bnb-int8", "bnb-fp4"],
)
def test_what_parts_of_few_bits_are_given_is_not_rounded_to_their_type(given, modulated):
    """Words for FiLM, the state and what a head sees are floats, and as whole numbers nearly all of them zeros."""
    if given["quant_method"] == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="needs the [quant] extra")
    inputs = {**prompts(2), "state": np.linspace(-0.9, 0.9, 14).reshape(2, 7)}
    model = load(modulated, quantization_config=given)
    scale = model.get_submodule("vision_backbone.featurizer.blocks.0.scale")
    assert type(scale) is not Linear
    found = model.predict_action(**inputs)
    expected = model.dequantize().predict_action(**inputs)
    np.testing.assert_allclose(found, expected, atol=0.2)  # of numbers up to 4


def test_drafts_ride_along(stored):
    """They are read with the prompt or together: the same tokens, and fewer passes where they are right."""
    model, arguments = stored, {"return_dict": True}
    found = model.predict_action(PICTURE, "open the drawer", **arguments)
    wrong = found.token_ids.copy()
    wrong[[0, 3]] -= 1
    for draft in (found.token_ids, wrong):
        again = model.predict_action(PICTURE, "open the drawer", draft=draft[None], **arguments)
        assert again.token_ids.tolist() == found.token_ids.tolist()
        assert again.token_passes.max() < found.token_passes.max()


def test_in_memory_as_in_a_folder(folder, stored, tmp_path):
    model = quantize_linears(load(), OpenVLAQuantizationConfig(folder[1]))
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in stored.state_dict().items())
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    assert quantized_layers(load(tmp_path)) == quantized_layers(stored)


def test_moved_cast_and_dequantized(folder, stored):
    path, _ = folder
    model = load(path)
    action = model.predict_action(PICTURE, "open the drawer").tolist()
    assert model.to("cpu") is model and model.predict_action(PICTURE, "open the drawer").tolist() == action
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    scales = [buffer for name, buffer in model.named_buffers() if "scale" in name.rpartition(".")[2]]
    before = [buffer for name, buffer in stored.named_buffers() if "scale" in name.rpartition(".")[2]]
    assert len(scales) == len(before) and all(torch.equal(a, b) for a, b in zip(scales, before))
    assert model.predict_action(PICTURE, "open the drawer").shape == (7,)
    back = load(path).dequantize()
    assert not has_quantized_layers(back) and back.config.to_dict().get("quantization_config") is None
    assert np.abs(back.predict_action(PICTURE, "open the drawer") - action).max() < 0.1


def test_vocabulary_may_grow(folder):
    path, _ = folder
    model = load(path)
    before = model.predict_action(PICTURE, "open the drawer").tolist()
    model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + 8)
    assert model.predict_action(PICTURE, "open the drawer").tolist() == before


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_few_bits_are_put_into_a_plain_model(stored, plain, strict):
    """Without their steps whole numbers would be weights."""
    model = copy.deepcopy(plain)
    with pytest.raises(ValueError, match="are those of a quantized model"):
        model.load_state_dict(stored.state_dict(), strict=strict)
    before = plain.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_few_bits_are_asked_to_learn(folder):
    path, _ = folder
    model = load(path)
    with pytest.raises(ValueError, match=r"do not learn: model.dequantize\(\) gives plain layers"):
        model.requires_grad_(True)
    assert not any(weight.requires_grad for weight in model.requires_grad_(False).parameters())
    assert all(weight.requires_grad for weight in model.dequantize().requires_grad_().parameters())


@pytest.mark.parametrize("method", ["awq", "of_tomorrow"])
def test_weights_that_others_quantized(folder, method, tmp_path):
    path, _ = folder
    broken = Path(shutil.copytree(path, tmp_path / "model"))
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"is quantized by '{method}', which does not load here.*openvla quantize"):
        load(broken)
    with pytest.raises(ValueError, match="^quantization_config asks for 'awq', and that failed"):
        load(quantization_config=AwqConfig())


def test_nothing_is_trained_on_it(folder, tmp_path):
    path, _ = folder
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model = load(path)
    for strategy, words in (("lora", "to which no adapter can be added"), ("full", "quantized and cannot learn")):
        with pytest.raises(ValueError, match=words):
            apply_strategy(model, strategy)
    adapted = peft.get_peft_model(load(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="openvla merge RUN OUT.*openvla quantize OUT"):
        model.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match="not supported"):
        peft.PeftModel.from_pretrained(model, tmp_path)


@pytest.mark.parametrize("damage", ["scales", "steps", "type", "weights", "missing", "config"])
def test_a_damaged_folder(folder, damage, tmp_path):
    path, bits = folder
    tensors = load_file(path / "model.safetensors")
    layer = "language_model.model.layers.1.mlp.up_proj"
    scale = f"{layer}.{next(iter(KINDS[bits].fixed))}"
    if damage == "scales":
        tensors[scale].view(-1)[3] = torch.nan
    elif damage == "steps":  # of zeros, as a download that was cut leaves them
        tensors[scale].zero_()
    elif damage == "type":
        weight = tensors[f"{layer}.weight"].contiguous().view(torch.uint8)
        tensors[f"{layer}.weight"] = weight if bits != 4 else weight.view(torch.int8)
    elif damage == "missing":
        del tensors[scale]
    elif damage == "weights":
        tensors[f"{layer}.weight"].zero_()
    config = json.loads((path / "config.json").read_text())
    if damage == "config":
        config["quantization_config"]["bits"] = 3
    for name in ("generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((path / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = {
        "scales": f"weights of {layer}, or their .*, are not finite",
        "steps": f"{scale.rpartition('.')[2]} of {layer} holds steps that are not above 0",
        "type": f"weights of {layer} are torch.u?int8, and .* are stored as",
        "weights": "matrices of one value throughout",
        "missing": f"1 missing: {scale}",
        "config": "bits=3: expected one of 8, 4, 'fp8'",
    }
    with pytest.raises(ValueError, match=expected[damage]):
        load(tmp_path)


@pytest.mark.parametrize("how", ["while loading", "as a folder"])
def test_weights_that_are_not_finite(how, tmp_path):
    tensors = load_file(ROOT / "model.safetensors")
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    tensors[name][5, 5] = torch.inf
    for file in ROOT.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name.removesuffix('.weight')}.* not finite"):
        if how == "as a folder":
            quantize_checkpoint(tmp_path, tmp_path / "out")
        else:
            load(tmp_path, quantization_config=OpenVLAQuantizationConfig(8))


def test_names_of_the_command_line(tmp_path):
    pytest.importorskip("bitsandbytes", reason="it needs the [quant] extra")
    assert list(QUANTIZATIONS) == ["int8", "int4", "fp8", "bnb-int8", "bnb-nf4"]
    kinds = {}
    for name in QUANTIZATIONS:
        model = load_model(str(ROOT), quantization=name)
        module = model.get_submodule("language_model.model.layers.0.mlp.up_proj")
        kinds[name] = type(module).__name__
    assert list(kinds.values()) == ["Int8Linear", "Int4Linear", "Float8Linear", "Linear8bitLt", "Linear4bit"]
    given = ["--image", str(PICTURE), "--instruction", "open the drawer", "--device", "cpu", "--json"]
    run = CliRunner().invoke
    written = run(cli.app, ["quantize", str(ROOT), str(tmp_path / "out"), "--bits", "8"])
    assert written.exit_code == 0 and written.output == f"wrote {tmp_path / 'out'}\n", written.output
    outputs = [
        json.loads(run(cli.app, ["predict", *given, *more]).stdout)
        for more in (["--quantization", "int8"], ["--model", str(tmp_path / "out")])
    ]
    assert outputs[0].pop("model") != outputs[1].pop("model") and outputs[0] == outputs[1]
    refused = run(cli.app, ["quantize", str(ROOT), str(tmp_path / "other"), "--bits", "3"])
    assert refused.exit_code == 2 and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "given, words",
    [
        ({"bits": 5}, "bits=5: expected one of 8, 4, 'fp8'"),
        ({"bits": True}, "bits=True"),
        ({"bits": [8]}, "bits=.8.: expected one of"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert='lm_head': expected a list"),
        ({"bits": 8, "groups": 3}, "holds groups, which this version"),
    ],
)
def test_unknown_configurations(given, words):
    with pytest.raises(ValueError, match=words):
        OpenVLAQuantizationConfig(**given)


def test_exceptions_that_are_misspelled():
    """The towers were rounded, and nothing said so."""
    kept = {"quant_method": "openvla", "bits": 8, "modules_to_not_convert": ["vision_backbne", "projector"]}
    with pytest.raises(
        ValueError, match="names 'vision_backbne', and the .* no such part. Did you mean 'vision_backbone'"
    ):
        TINY[0].load(quantization_config=kept)
    kept["modules_to_not_convert"] = ["vision_backbone", "action_head", "down_proj"]  # the second only some models have
    assert {name.rpartition(".")[2] for name in quantized_layers(TINY[0].load(quantization_config=kept))} > {
        "fc1",
        "up_proj",
    }


def test_types_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="dtype='int8' is unknown"):
        quantize_checkpoint(ROOT, tmp_path / "out", dtype="int8")
    with pytest.raises(ValueError, match="max_shard_size='lots': expected a size such as '5GB'"):
        quantize_checkpoint(ROOT, tmp_path / "out", max_shard_size="lots")
    assert not (tmp_path / "out").exists()


def test_one_way_at_a_time():
    with pytest.raises(ValueError, match="one of them"):
        TINY[0].load(load_in_4bit=True, quantization_config=OpenVLAQuantizationConfig(8))
    model = TINY[0].load(quantization_config={"quant_method": "openvla", "bits": 8})
    assert quantized_layers(model)
    pytest.importorskip("bitsandbytes", reason="it needs the [quant] extra")
    both = TINY[0].load(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert not quantized_layers(both)
