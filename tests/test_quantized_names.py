"""What a quantized model is called is what it is: in errors, in figures, and where nothing was rounded at all."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from openvla import OpenVLAConfig, OpenVLAForActionPrediction
from openvla.bench.clock import described
from openvla.conversion import quantize_checkpoint
from openvla.options.benchmark import BenchOptions
from openvla.policy import QUANTIZATIONS, load_model, quantization_of
from openvla.quantization_openvla import OpenVLAQuantizationConfig, quantize_linears


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A folder that bitsandbytes quantized, nf4."""
    pytest.importorskip("bitsandbytes", reason="needs the [quant] extra")
    folder = tmp_path_factory.mktemp("packed") / "nf4"
    TINY[1].load(quantization_config=dict(QUANTIZATIONS["bnb-nf4"])).save_pretrained(folder)
    TINY[1].processor().save_pretrained(folder)
    return folder


def test_a_folder_of_bitsandbytes_is_not_another_one_of_it(packed):
    """The library warns and takes what is stored: figures of "bnb-int8" were those of nf4."""
    for options in ({"quantization_config": dict(QUANTIZATIONS["bnb-int8"])}, {"load_in_8bit": True}):
        with pytest.raises(ValueError, match=r"holds weights of 4 bits of bitsandbytes \(nf4\), and 8 bits"):
            OpenVLAForActionPrediction.from_pretrained(packed, **options)
    with pytest.raises(ValueError, match=r"4 bits of bitsandbytes \(nf4\), and 8 bits were asked for"):
        load_model(str(packed), quantization="int8")
    for options in ({}, {"load_in_4bit": True}, {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="You passed")
            model = OpenVLAForActionPrediction.from_pretrained(packed, **options)
        assert quantization_of(model) == "bnb-nf4"


@pytest.mark.parametrize(("bits", "name"), [(8, "int8"), (4, "int4"), ("fp8", "fp8")])
def test_another_quantization_is_refused_before_weights_are_read(bits, name, tmp_path, monkeypatch):
    """The library said first that it passes over what was asked for, and read all weights."""
    folder = quantize_checkpoint(ROOT, tmp_path / "out", bits=bits)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    for other in QUANTIZATIONS.keys() - {name}:
        with pytest.raises(
            ValueError, match=r"out' holds weights of .*, and .* were asked for: leave quantization out"
        ):
            OpenVLAForActionPrediction.from_pretrained(folder, quantization_config=dict(QUANTIZATIONS[other]))
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert quantization_of(load_model(str(folder), quantization=name)) == name
        auto = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=dict(QUANTIZATIONS[name]))
    assert quantization_of(auto) == name


@pytest.mark.parametrize("towers", [False, True])
@pytest.mark.parametrize(("bits", "name"), [(8, "int8"), (4, "int4"), ("fp8", "fp8")])
def test_figures_of_a_folder_say_how_it_is_stored(bits, name, towers, tmp_path):
    folder = quantize_checkpoint(ROOT, tmp_path / "out", bits=bits, towers=towers)
    model = load_model(str(folder))
    said = described(BenchOptions(what="latency", model=str(folder)), model)
    assert said["quantization"] == quantization_of(model) == name
    assert quantization_of(model.dequantize()) is None


def test_what_was_rounded_in_memory_is_given_back(tmp_path):
    """Errors advise `dequantize`, which said that the model was not quantized."""
    model = OpenVLAForActionPrediction.from_pretrained(ROOT)
    quantize_linears(model, OpenVLAQuantizationConfig(8))
    rounded = model.language_model.model.layers[0].mlp.up_proj.dequantize(model.dtype)
    model.save_pretrained(tmp_path / "rounded")
    assert quantization_of(OpenVLAForActionPrediction.from_pretrained(tmp_path / "rounded")) == "int8"
    model.dequantize()  # after it was saved: config.dtype is a text then
    weight = model.language_model.model.layers[0].mlp.up_proj.weight
    assert weight.equal(rounded) and weight.requires_grad and quantization_of(model) is None
    model.save_pretrained(tmp_path / "plain")
    plain = OpenVLAForActionPrediction.from_pretrained(tmp_path / "plain")
    assert quantization_of(plain) is None and plain.language_model.model.layers[0].mlp.up_proj.weight.equal(weight)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_plain_layers_have_the_type_of_the_model(name):
    """That it was cast to, and not that it was loaded in: parts of two types predict nothing together."""
    model = load_model(str(ROOT), dtype="float32", quantization=name).to(torch.bfloat16)
    model.predict_action(np.zeros((48, 64, 3), np.uint8), "open the drawer")
    model.dequantize()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.predict_action(np.zeros((48, 64, 3), np.uint8), "open the drawer")


def test_a_model_of_bitsandbytes_is_given_back_after_it_was_saved(packed, tmp_path):
    """transformers made a device of the text "float32"; a folder of 4 bits it cannot save again, and said nothing."""
    model = OpenVLAForActionPrediction.from_pretrained(packed)
    try:
        model.save_pretrained(tmp_path / "again")
    except ValueError as error:  # 5.24
        assert "copy that folder, or save model.dequantize()" in str(error)
    else:
        assert quantization_of(OpenVLAForActionPrediction.from_pretrained(tmp_path / "again")) == "bnb-nf4"
    rounded = TINY[1].load(quantization_config=dict(QUANTIZATIONS["bnb-nf4"]))
    rounded.save_pretrained(tmp_path / "saved")
    for given_back in (model.dequantize(), rounded.dequantize()):
        assert quantization_of(given_back) is None
        assert {parameter.dtype for parameter in given_back.parameters()} == {given_back.dtype}
    model.save_pretrained(tmp_path / "plain")
    assert quantization_of(OpenVLAForActionPrediction.from_pretrained(tmp_path / "plain")) is None


def test_other_parts_are_told(tmp_path):
    folder = quantize_checkpoint(ROOT, tmp_path / "out", towers=True)
    with pytest.raises(ValueError, match=r"8 bits but in \['lm_head', .*, and 8 bits in other parts were asked for"):
        load_model(str(folder), quantization="int8")


def other_language_model(folder: Path, **text) -> Path:
    """The embedded policy with random weights and another language model."""
    config = OpenVLAConfig.from_pretrained(ROOT)
    ids = {name: value for name, value in config.text_config.to_dict().items() if name.endswith("_token_id")}
    fields = {**config.to_dict(), "text_config": {**ids, "vocab_size": config.text_config.vocab_size, **text}}
    OpenVLAForActionPrediction(OpenVLAConfig.from_dict(fields)).save_pretrained(folder)
    OpenVLAForActionPrediction.from_pretrained(ROOT).processor.save_pretrained(folder)
    return folder


def test_nothing_that_can_be_rounded(tmp_path):
    """GPT-2 has layers of a class of its own: a folder of "4 bits" was as large as before."""
    folder = other_language_model(tmp_path / "gpt2", model_type="gpt2", n_embd=32, n_layer=1, n_head=2)
    OpenVLAForActionPrediction.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"No weight can have 8 bits: this language model \(gpt2\)"):
        load_model(str(folder), quantization="int8")
    for bits in (8, 4, "fp8"):
        with pytest.raises(ValueError, match="No weight can have"):
            quantize_checkpoint(folder, tmp_path / "out", bits=bits)
    assert not (tmp_path / "out").exists()


def test_little_that_can_be_rounded(tmp_path):
    """Experts are one tensor in transformers 5, and most of the weights of such a model."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8}
    folder = other_language_model(tmp_path / "moe", model_type="qwen3_moe", **sizes, **heads)
    with pytest.warns(UserWarning, match=r"8% of the weights can have 8 bits, .*\(qwen3_moe\) keeps them elsewhere"):
        model = load_model(str(folder), quantization="int8")
    assert quantization_of(model) == "int8"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(str(ROOT), quantization="int4")
