"""bitsandbytes on the CPU, and adapters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY, golden_image
from transformers import BitsAndBytesConfig

from openvla import OpenVLAForActionPrediction
from openvla.configuration_openvla import TRANSFORMERS


bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantized loading needs the [quant] extra")
peft = pytest.importorskip("peft", reason="adapters need peft")

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "nf4 twice": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
}


DRAWER = next((ROOT / "examples" / "frames").glob("drawer*.png"))


@pytest.fixture(scope="module")
def plain_action() -> np.ndarray:
    """Of the embedded policy at the picture of a drawer."""
    return OpenVLAForActionPrediction.from_pretrained(ROOT).predict_action(DRAWER, "open the drawer")


def quantized_layers(model) -> set[str]:
    kinds = (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def test_int8_does_not_fill_the_log(tiny_checkpoint, caplog):
    """A line for every layer and token, in which nothing is new."""
    model = tiny_checkpoint.load(quantization_config=CONFIGS["int8"])
    model.predict_action(golden_image(0), "open the drawer", unnorm_key="bridge_orig")
    assert quantized_layers(model) and "will be cast" not in caplog.text


@pytest.mark.parametrize("name", CONFIGS)
def test_load_save_reload(name, tiny_checkpoint, tiny_model, tmp_path):
    model = tiny_checkpoint.load(quantization_config=CONFIGS[name])
    layers = quantized_layers(model)
    # Seven linear layers in each block of the language model, nothing else.
    assert len(layers) == 7 * model.config.text_config.num_hidden_layers
    assert all(layer.startswith("language_model.model.layers.") for layer in layers)
    for part in ("vision_backbone", "projector", "language_model.lm_head"):
        expected = tiny_model.get_submodule(part).state_dict()
        for tensor, value in model.get_submodule(part).state_dict().items():
            assert torch.equal(value, expected[tensor]), f"{part}.{tensor}"

    image = golden_image(0)
    arguments = {"unnorm_key": "bridge_orig", "return_dict": True}
    prediction = model.predict_action(image, "open the drawer", **arguments)
    black = model.predict_action(np.zeros((8, 8, 3), dtype=np.uint8), "open the drawer", **arguments)
    assert prediction.actions.shape == (7,) and prediction.actions.tolist() != black.actions.tolist()

    model.save_pretrained(tmp_path)
    tiny_checkpoint.processor().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert quantized_layers(again) == layers
    if name == "nf4 twice":  # the CPU path of bitsandbytes quantizes the scales again when it saves
        return
    for other in (again, model):
        reloaded = other.predict_action(image, "open the drawer", **arguments)
        assert reloaded.token_ids.tolist() == prediction.token_ids.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedded_policy_is_quantized_too(dtype):
    """Its language model has rows of 672, which are no whole blocks of 64."""
    picture = np.asarray(Image.open(next((ROOT / "examples" / "frames").glob("*.png"))).convert("RGB"))
    words = ("open the drawer", "push the puck to the goal")
    plain = OpenVLAForActionPrediction.from_pretrained(ROOT, dtype=dtype).predict_action([picture] * 2, words)
    for name, config in CONFIGS.items():
        model = OpenVLAForActionPrediction.from_pretrained(ROOT, dtype=dtype, quantization_config=config)
        actions = model.predict_action([picture] * 2, words)
        assert np.abs(actions - plain).mean() < np.abs(plain[0] - plain[1]).mean(), name  # words still matter more


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_quantized_folder_in_another_type(name, tmp_path):
    """What is not quantized is of the type that was asked for throughout, not in part of that of the folder."""
    TINY[1].load(quantization_config=CONFIGS[name], dtype=torch.bfloat16).save_pretrained(tmp_path)
    TINY[1].processor().save_pretrained(tmp_path)
    again = OpenVLAForActionPrediction.from_pretrained(tmp_path, dtype=torch.float32)
    found = {parameter.dtype for parameter in again.parameters() if parameter.is_floating_point()}
    assert found == {torch.float32} and quantized_layers(again)
    again.predict_action(np.zeros((8, 8, 3), np.uint8), "open the drawer", unnorm_key="bridge_orig")


@pytest.mark.parametrize("name", CONFIGS)
def test_moving_a_quantized_model_is_explained(name):
    model = TINY[1].load(quantization_config=CONFIGS[name])
    assert model.to("cpu") is model and model.to(model.device) is model
    for argument in ("meta", torch.float16):
        with pytest.raises(ValueError, match="Choose both when loading"):
            model.to(argument)


def test_own_exceptions_are_respected():
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["vision_backbone", "projector"])
    layers = quantized_layers(TINY[1].load(quantization_config=config))
    assert "language_model.lm_head" in layers


@pytest.mark.parametrize(
    ("bits", "excepted"),  # with each of both: some layers, and none
    [
        ("load_in_4bit", ["lm_head"]),
        ("load_in_8bit", ["lm_head", "vision_backbone"]),
        ("load_in_4bit", ["lm_head", "projector"]),
        ("load_in_4bit", []),
        ("load_in_8bit", []),
    ],
    ids=str,
)
def test_towers_and_projector_may_be_quantized(bits, excepted, plain_action, tmp_path):
    """As in the original: a config that names its own exceptions quantizes all the rest; the folder loads again."""
    config = BitsAndBytesConfig(**{bits: True}, llm_int8_skip_modules=excepted)
    model = OpenVLAForActionPrediction.from_pretrained(ROOT, quantization_config=config)
    layers = quantized_layers(model)
    for part in ("vision_backbone", "projector"):
        assert any(layer.startswith(part) for layer in layers) == (part not in excepted)
    action = model.predict_action(DRAWER, "open the drawer")
    assert np.abs(action - plain_action).max() < 0.2
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    again = OpenVLAForActionPrediction.from_pretrained(tmp_path)
    assert quantized_layers(again) == layers
    assert again.predict_action(DRAWER, "open the drawer").tolist() == pytest.approx(action.tolist(), abs=0.02)


def test_keywords_of_the_original():
    """transformers 5 knows `load_in_8bit` and `load_in_4bit` no more."""
    expected = quantized_layers(TINY[1].load(quantization_config=CONFIGS["nf4"]))
    model = TINY[1].load(load_in_4bit=True, load_in_8bit=False, bnb_4bit_quant_type="nf4")
    assert quantized_layers(model) == expected
    assert model.config.quantization_config.bnb_4bit_quant_type == "nf4"
    assert quantized_layers(TINY[1].load(load_in_8bit=True)) == expected
    assert quantized_layers(TINY[1].load(quantization_config={"load_in_4bit": True})) == expected
    assert not quantized_layers(TINY[1].load(load_in_8bit=False, load_in_4bit=False))
    for both in ({"load_in_8bit": True}, {"quantization_config": CONFIGS["int8"]}):
        with pytest.raises(ValueError, match="one of them"):
            TINY[1].load(load_in_4bit=True, **both)


def test_a_name_is_no_quantization_config():
    with pytest.raises(ValueError, match="'bits': 8"):
        TINY[1].load(quantization_config="int8")


@pytest.mark.parametrize(
    "offloaded", ["", "vision_backbone", "vision_backbone.featurizer", "projector", "language_model"]
)
def test_parts_offloaded_to_disk(offloaded, plain_action, tmp_path):
    """Weights on disk have no device; the same action nevertheless."""
    parts = ["vision_backbone.featurizer", "vision_backbone.fused_featurizer", "projector", "language_model"]
    device_map = {"": "disk"} if not offloaded else {
        part: "disk" if part.startswith(offloaded) else "cpu" for part in parts
    }  # fmt: skip
    if not offloaded and TRANSFORMERS < (5, 6):
        with pytest.raises(ValueError, match="leaves all weights on disk.*put one part on .cpu"):
            OpenVLAForActionPrediction.from_pretrained(ROOT, device_map=device_map, offload_folder=tmp_path)
        return
    model = OpenVLAForActionPrediction.from_pretrained(ROOT, device_map=device_map, offload_folder=tmp_path)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert model.device.type == "cpu"
    assert model.predict_action(DRAWER, "open the drawer").tolist() == plain_action.tolist()


def lora() -> "peft.LoraConfig":
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)


@pytest.mark.parametrize("checkpoint", [*TINY, "embedded policy"], ids=str)
def test_adapter_merges(checkpoint, tmp_path):
    """Every way to use an adapter gives the same logits within 1e-4, the largest being 14 to 22.

    The tiny checkpoints in float64: their random weights amplify the float32 rounding of the merged towers to 1e-3.
    """
    if checkpoint == "embedded policy":
        load, key = lambda: OpenVLAForActionPrediction.from_pretrained(ROOT), None
        processor = load().processor
    else:
        load, key = lambda: checkpoint.load(dtype=torch.float64), "bridge_orig"
        processor = checkpoint.processor()
    inputs = processor(processor.format_prompt("open the drawer"), golden_image(1))
    base = load()
    with torch.inference_mode():
        plain = base(**inputs).logits
    model = peft.get_peft_model(base, lora()).eval()
    touched = {name.split(".")[2] for name, _ in model.named_parameters() if "lora_" in name}
    assert touched == {"vision_backbone", "projector", "language_model"}
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.1)
        adapted = model(**inputs).logits
        action = model.predict_action(golden_image(1), "open the drawer", unnorm_key=key)
    assert (adapted - plain).abs().max() > 1e-2
    model.save_pretrained(tmp_path)

    own = load()
    own.load_adapter(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(load(), tmp_path)
    ways = {"PeftModel": lambda: loaded, "load_adapter": lambda: own, "merged": loaded.merge_and_unload}
    for name, way in ways.items():
        other = way()
        with torch.inference_mode():
            assert (other(**inputs).logits - adapted).abs().max() < 1e-4, name
            again = other.predict_action(golden_image(1), "open the drawer", unnorm_key=key)
        assert again.tolist() == action.tolist(), name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # peft 0.21 calls it
def test_adapter_on_a_quantized_model():
    model = TINY[0].load(quantization_config=CONFIGS["nf4"])
    model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(model, lora())
    inputs = TINY[0].processor()("In: What action should the robot take to stop?\nOut: ", golden_image(0))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_" in name]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def packed(name: str) -> OpenVLAForActionPrediction:
    """The embedded policy of 4 bits, as it is once it has run on a CPU with AVX512-BF16."""
    pack = getattr(bitsandbytes.functional, "_convert_weight_packed_for_cpu", None)
    if pack is None:
        pytest.skip("this version of bitsandbytes packs no 4-bit weights for a CPU")
    model = OpenVLAForActionPrediction.from_pretrained(ROOT, quantization_config=CONFIGS[name])
    for module in model.modules():
        fits = isinstance(module, bitsandbytes.nn.Linear4bit) and not (
            module.in_features % 64 or module.out_features % 32
        )
        if fits:
            module.weight.data, module.weight.quant_state = pack(module.weight.data, module.weight.quant_state)
    return model


PACKED = "packing_format_for_cpu"


@pytest.mark.parametrize("name", ["nf4", "nf4 twice"])
def test_weights_that_are_packed_for_a_cpu_are_given_back(name):
    """bitsandbytes unpacks them to save them, and multiplies out what is packed as if it were not: an arm swung."""
    expected = OpenVLAForActionPrediction.from_pretrained(ROOT, quantization_config=CONFIGS[name]).dequantize()
    found = packed(name).dequantize().state_dict()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=0.01, atol=1e-6, msg=key)  # scales became bfloat16


@pytest.mark.parametrize("name", ["nf4", "nf4 twice"])
def test_adapters_are_added_to_weights_that_are_not_packed(name):
    """Packed, they would be merged into other weights, and most of them had no gradients."""
    model = packed(name)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), model)  # which adds nothing yet
    image = torch.zeros(1, *model.vision_backbone.input_shape)
    model.predict_action(input_ids=torch.tensor([[1, 5, 6]]), pixel_values=image)  # would pack them where it can
    states = [weight.quant_state for weight in model.parameters() if hasattr(weight, "quant_state")]
    assert states and not any(getattr(state, PACKED, False) for state in states)
    for part in model.modules():
        if isinstance(part, peft.tuners.lora.LoraLayer):
            before = bitsandbytes.functional.dequantize_4bit(part.base_layer.weight.data, part.weight.quant_state)
            part.merge()
            after = bitsandbytes.functional.dequantize_4bit(part.base_layer.weight.data, part.weight.quant_state)
            assert (after - before).abs().max() < 0.02 * before.abs().max()  # rounded again
