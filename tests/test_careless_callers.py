"""What users of transformers do with a model and its inputs: it works, or an error says what to do instead."""

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
from tiny import TINY, golden_image
from transformers import AutoConfig, AutoModel, AutoProcessor, BitsAndBytesConfig

import openvla
from openvla import OpenVLAConfig, OpenVLAForActionPrediction


INSTRUCTION = "open the drawer"


@pytest.fixture(scope="module")
def model() -> OpenVLAForActionPrediction:
    model = TINY[1].load()
    model.processor = TINY[1].processor()
    return model


@pytest.fixture(scope="module")
def image():
    return golden_image(0)


@pytest.fixture(scope="module")
def inputs(model, image):
    return model.processor(model.processor.format_prompt(INSTRUCTION), image)


# Weights of a variant -------------------------------------------------------------------------------------------------


@pytest.fixture
def variant(model, tmp_path):
    """A folder whose weights have names of a variant alone."""
    model.save_pretrained(tmp_path, variant="fp16")
    return tmp_path


def load(folder, **options) -> OpenVLAForActionPrediction:
    return OpenVLAForActionPrediction.from_pretrained(folder, **options)


def test_weights_of_a_variant_load(model, variant, image):
    again = load(variant, variant="fp16")
    again.processor = model.processor
    expected = model.predict_action(image, INSTRUCTION, unnorm_key="bridge_orig")
    assert np.array_equal(again.predict_action(image, INSTRUCTION, unnorm_key="bridge_orig"), expected)


def whole_numbers(file):
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file(tensors | {name: tensors[name].mul(100).to(torch.int8)}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda file: file.write_bytes(file.read_bytes()[:100_000]), "damaged or cut off"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        (whole_numbers, "tensor\\(s\\) of whole numbers"),
    ],
)
def test_weights_of_a_variant_are_checked(variant, change, said):
    file = variant / "model.fp16.safetensors"
    change(file)
    with pytest.raises(ValueError, match=f"model.fp16.safetensors.*{said}"):
        load(variant, variant="fp16")


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "holds no model.safetensors or pytorch_model.bin; there are model.fp16.safetensors: say so by variant="),
        ({"variant": "bf16"}, "holds no model.bf16.safetensors or pytorch_model.bf16.bin; there are model.fp16"),
        ({"variant": "fp16", "use_safetensors": False}, "holds no pytorch_model.fp16.bin; there are model.fp16"),
    ],
)
def test_names_that_are_not_those_of_the_weights(variant, options, said):
    with pytest.raises(FileNotFoundError, match=said):
        load(variant, **options)


def test_no_weights_at_all(variant):
    (variant / "model.fp16.safetensors").rename(variant / "adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match="holds no model.safetensors .*copy or download the weights"):
        load(variant)


def test_parts_without_their_index(model, tmp_path):
    """What is left of a download that broke off: variant=... was advised."""
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="no index of these parts: copy its model.safetensors.index.json, too"):
        load(tmp_path)


def test_weights_under_a_name_of_their_own(model, tmp_path):
    """As trainers of reinforcement learning write them."""
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "full_weights.pt")
    torch.save({}, tmp_path / "optimizer.pt")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="there are full_weights.pt: save their tensors as model.safetensors"):
        load(tmp_path)
    save_file(tensors | {"value_head.weight": torch.ones(1, 8)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 unexpected: value_head.weight.*a value head of reinforcement learning"):
        load(tmp_path)


def test_a_missing_part_of_a_variant(model, tmp_path):
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="1MB")
    next(tmp_path.glob("model.fp16-00002-*")).unlink()
    with pytest.raises(FileNotFoundError, match="lacks model.fp16-00002-.*model.safetensors.index.fp16.json"):
        load(tmp_path, variant="fp16")


def test_older_weights_of_a_variant_in_a_folder_that_is_saved_to(model, variant):
    """The library loads the single file, where there is one."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.projector.fc1.weight.zero_().add_(torch.rand_like(changed.projector.fc1.weight))
    changed.save_pretrained(variant, variant="fp16", max_shard_size="1MB")
    assert torch.equal(load(variant, variant="fp16").projector.fc1.weight, changed.projector.fc1.weight)


def test_a_file_in_the_place_of_a_folder(model, tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(ValueError, match="model' is a file: give a folder"):
        model.save_pretrained(tmp_path / "model")


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "torch.float32", float, 32])
@pytest.mark.parametrize("auto", [True, False])
def test_what_is_no_dtype(dtype, auto):
    loading = AutoModel if auto else OpenVLAForActionPrediction
    with pytest.raises(ValueError, match="dtype.*(expected a torch.dtype or the name of one|can be|can only be)"):
        loading.from_pretrained(TINY[1].folder, dtype=dtype, timm_model_kwargs=TINY[1].timm_model_kwargs)


@pytest.mark.parametrize("dtype", ["float32", "half", "auto", torch.bfloat16, {"": torch.float32}])
def test_what_is_a_dtype(dtype):
    loading = {"dtype": dtype, "timm_model_kwargs": TINY[1].timm_model_kwargs}
    kind = {"half": torch.float16, torch.bfloat16: torch.bfloat16}.get(dtype if isinstance(dtype, str) else None)
    model = AutoModel.from_pretrained(TINY[1].folder, **loading)
    assert model.dtype == (kind or (dtype if isinstance(dtype, torch.dtype) else model.dtype))


@pytest.mark.parametrize(
    "option, remedy",
    [
        ({"use_flash_attention_2": True}, "attn_implementation='flash_attention_2'"),
        ({"use_auth_token": True}, "token="),
        ({"resume_download": True}, "always resumed"),
    ],
)
def test_arguments_of_transformers_4(option, remedy):
    with pytest.raises(ValueError, match=f"does not know {next(iter(option))}=True.*{remedy}"):
        TINY[1].load(**option)


def test_options_that_are_numbers_of_numpy(model, image):
    """Columns of a table of experiments are such."""
    plain = model.predict_action(image, INSTRUCTION, unnorm_key="bridge_orig")
    options = {"max_new_tokens": np.int64(7), "num_beams": np.int32(1), "length_penalty": np.float32(1)}
    options |= {"output_scores": np.False_, "do_sample": np.False_}
    keys = np.array(["bridge_orig"])
    assert np.array_equal(model.predict_action(image, INSTRUCTION, unnorm_key=keys, **options), plain)
    with pytest.raises(ValueError, match="num_beams=4 cannot be used here"):
        model.predict_action(image, INSTRUCTION, unnorm_key="bridge_orig", num_beams=np.int64(4))
    with pytest.raises(ValueError, match="2 unnorm_keys for 1 sample"):
        model.predict_action(image, INSTRUCTION, unnorm_key=np.array(["bridge_orig"] * 2))


def test_fields_of_a_configuration_that_are_of_numpy(tmp_path):
    options = {"llm_max_length": np.int64(64), "use_film": np.False_, "timm_model_kwargs": TINY[1].timm_model_kwargs}
    read = AutoConfig.from_pretrained(TINY[1].folder, **options)
    made = OpenVLAConfig(**{**read.to_dict(), "action_chunk": np.int32(4), "camera_names": np.array(["a", "b"])})
    made.save_pretrained(tmp_path)
    again = OpenVLAConfig.from_pretrained(tmp_path)
    assert (again.llm_max_length, again.action_chunk, again.camera_names) == (64, 4, ["a", "b"])


@pytest.mark.parametrize("name", ["device", "keywords", "action_dim"])
def test_options_with_names_that_the_code_uses_itself(model, image, name):
    with pytest.raises(ValueError, match=f"predict_action does not know {name}='cpu'"):
        model.predict_action(image, INSTRUCTION, unnorm_key="bridge_orig", **{name: "cpu"})


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_model_inputs_in_the_place_of_an_image(model, inputs):
    with pytest.raises(ValueError, match=r"predict_action\(\*\*inputs\)"):
        model.predict_action(inputs, unnorm_key="bridge_orig")


def test_images_that_are_none_yet(model, image):
    pixels = np.ma.masked_greater(np.asarray(image.convert("RGB")), 200)
    with pytest.raises(ValueError, match="masked pixels.*fill them"):
        model.predict_action(pixels, INSTRUCTION, unnorm_key="bridge_orig")
    expected = model.predict_action(pixels.data, INSTRUCTION, unnorm_key="bridge_orig")
    whole = np.ma.masked_array(pixels.data)
    assert np.array_equal(model.predict_action(whole, INSTRUCTION, unnorm_key="bridge_orig"), expected)
    with pytest.raises(ValueError, match="not decoded .*give its bytes or its path"):
        model.predict_action({"bytes": b"", "path": None}, INSTRUCTION, unnorm_key="bridge_orig")


def test_forward_and_generate_take_tensors(model, inputs, image):
    array, rows = inputs["pixel_values"].numpy(), list(inputs["pixel_values"])
    for pixels in (array, rows, image):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="pixel_values must be a tensor, got .*processor"):
                call(input_ids=inputs["input_ids"], pixel_values=pixels)
    with pytest.raises(ValueError, match="input_ids must be a tensor, got .*Image.*predict_action"):
        model.generate(image, INSTRUCTION)
    with pytest.raises(ValueError, match="input_ids must be integers, got torch.float32"):
        model(inputs["pixel_values"])


@pytest.mark.parametrize("name", ["images", "pixel_value"])
def test_an_image_under_another_name(model, inputs, name):
    """The library hands on what it does not know, and nothing would look at it."""
    with pytest.raises(ValueError, match=f"{name} of shape .*: images are given as pixel_values"):
        model(input_ids=inputs["input_ids"], **{name: inputs["pixel_values"]})


def test_a_processor_that_was_loaded_with_the_options_of_a_model_is_saved(tmp_path):
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": torch.device("cpu")}}
    options |= {"attn_implementation": "sdpa", "low_cpu_mem_usage": True}
    processor = AutoProcessor.from_pretrained(TINY[1].folder, **options)
    processor.save_pretrained(tmp_path)
    assert not json.loads((tmp_path / "tokenizer_config.json").read_text()).keys() & options.keys()


# Weights without values -----------------------------------------------------------------------------------------------


def test_a_model_on_meta_neither_generates_nor_is_saved(model, inputs, tmp_path):
    empty = copy.deepcopy(model).to("meta")
    with pytest.raises(ValueError, match='weights are on "meta", where they have no values'):
        empty.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match='weights are on "meta", where they have no values'):
        empty.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    empty.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    shutil.copy(TINY[1].folder / "tokenizer.json", tmp_path / "given")
    assert torch.equal(load(tmp_path / "given").projector.fc1.weight, model.projector.fc1.weight)


# A folder's own code --------------------------------------------------------------------------------------------------


SAVE = """
import sys
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained("saved")
model.processor.save_pretrained("saved")
print(type(AutoProcessor.from_pretrained("saved", trust_remote_code=True)).__name__)
"""


def test_the_processor_of_a_model_is_saved_with_its_code(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    folder = str(Path(openvla.__file__).parent)
    ran = processes.run(SAVE, folder, cwd=tmp_path, env=environment, server="transformers")
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.splitlines()[-1] == "OpenVLAProcessor"
