"""Packaged folders: bytes of the weights unchanged, loadable by the auto classes in a process without this package."""

import ast
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from openvla import OpenVLAConfig, OpenVLAForActionPrediction, OpenVLAProcessor, hub
from openvla.action_spec import usual_spec
from openvla.conversion import (
    export_onnx,
    export_prismatic_checkpoint,
    hub_folder,
    package_checkpoint,
    quantize_checkpoint,
)
from openvla.model_card import model_card


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from original_folders import write_tiny  # noqa: E402 - a script, not part of the package


NAMES = ["tiny-openvla-fused", "tiny-openvla-siglip"]
IMAGE = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
INSTRUCTION = "Open the Drawer"


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    return {name: write_tiny(root / name, name) for name in NAMES}


@pytest.fixture(scope="module")
def packaged(published, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packaged")
    return {name: package_checkpoint(folder, root / name) for name, folder in published.items()}


def test_weights_are_copied_byte_for_byte(published, packaged):
    for name in NAMES:
        assert (packaged[name] / "model.safetensors").read_bytes() == (
            published[name] / "model.safetensors"
        ).read_bytes()


CLEAN_PROCESS = """
import json, sys
import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
)

image = Image.fromarray(np.load("image.npy"))
results = []
for folder, instruction in json.loads(sys.argv[1]):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(processor.format_prompt(instruction), image)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    same = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    again = f"again{len(results)}"
    processor.save_pretrained(again)
    with torch.inference_mode():
        output = model(**inputs)
    greedy = {"max_new_tokens": 7, "do_sample": False}
    first = model.generate(**inputs, **greedy, return_dict_in_generate=True)
    results.append({
        "action": model.predict_action(**inputs, unnorm_key="bridge_orig").tolist(),
        "image_text": same.predict_action(**inputs, unnorm_key="bridge_orig").tolist(),
        "raw": model.predict_action(image, instruction, unnorm_key="bridge_orig").tolist(),
        "classes": [
            type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__,
            type(model).__name__,
            type(processor).__name__,
            type(AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)).__name__,
            type(AutoImageProcessor.from_pretrained(again, trust_remote_code=True)).__name__,
        ],
        "logits": output.logits[0, -1].tolist(),
        "one_cache": output.cache is output.past_key_values and first.cache is first.past_key_values is not None,
        "generated": first.sequences.tolist(),
        "code": type(model).__module__.split(".")[0],
        "input_ids": inputs["input_ids"].tolist(),
        "tokenizer_ids": tokenizer(processor.format_prompt(instruction))["input_ids"],
    })
print(json.dumps({"results": results, "openvla": "openvla" in sys.modules}))
"""


# Further environments, which need not have this package: OPENVLA_PYTHONS=/a/bin/python:/b/bin/python make test ARGS=...
PYTHONS = [sys.executable, *filter(None, os.environ.get("OPENVLA_PYTHONS", "").split(os.pathsep))]


@pytest.mark.parametrize("python", PYTHONS)
def test_loads_without_the_package(published, packaged, tmp_path, python):
    """Prediction, generation and logits of a folder's own code, by the transformers of each environment."""
    np.save(tmp_path / "image.npy", IMAGE)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    folders = json.dumps([[str(packaged[name]), INSTRUCTION] for name in NAMES])
    # Without standard input: nothing may ask whether to trust the code
    if python == sys.executable:
        ran = processes.run(CLEAN_PROCESS, folders, cwd=tmp_path, env=environment, server="transformers")
    else:
        more = {"cwd": tmp_path, "env": environment, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        ran = subprocess.run([python, "-c", CLEAN_PROCESS, folders], **more)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "[y/N]" not in ran.stdout
    assert not any(word in ran.stderr for word in ("past_key_values", "FutureWarning")), ran.stderr
    clean = json.loads(ran.stdout.splitlines()[-1])
    assert not clean["openvla"], "the package itself was imported"
    for name, result in zip(NAMES, clean["results"], strict=True):
        model = OpenVLAForActionPrediction.from_pretrained(published[name])
        processor = OpenVLAProcessor.from_pretrained(published[name])
        expected = model.predict_action(IMAGE, INSTRUCTION, unnorm_key="bridge_orig").tolist()
        assert result["action"] == result["image_text"] == result["raw"] == expected
        assert result["classes"] == [
            "OpenVLAConfig",
            "OpenVLAForActionPrediction",
            "OpenVLAProcessor",
            "OpenVLAImageProcessor",
            "OpenVLAImageProcessor",
        ]
        assert result["code"] == "transformers_modules"
        ids = processor(processor.format_prompt(INSTRUCTION))["input_ids"].tolist()
        assert result["input_ids"] == [result["tokenizer_ids"]] == ids
        inputs = processor(processor.format_prompt(INSTRUCTION), Image.fromarray(IMAGE))
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -1]
        torch.testing.assert_close(torch.tensor(result["logits"]), logits, atol=2e-3, rtol=0)  # as in test_parity.py
        assert result["generated"] == model.generate(**inputs, max_new_tokens=7, do_sample=False).tolist()
        assert result["one_cache"]


def test_auto_map_and_code(packaged):
    folder = packaged["tiny-openvla-fused"]
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForVision2Seq"] == "modeling_openvla.OpenVLAForActionPrediction"
    assert set(auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForVision2Seq",
        "AutoProcessor",
        "AutoImageProcessor",
    }
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert f"class {name}" in (folder / f"{module}.py").read_text()
    everything = "".join(file.read_text() for file in folder.glob("*.json") if file.name != "tokenizer.json")
    assert "prismatic" not in everything.lower() and "local_files_only" not in everything


def test_model_card(published, packaged, tmp_path):
    card = ModelCard.load(packaged["tiny-openvla-fused"] / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "robotics")
    assert {"vla", "robotics"} <= set(data["tags"]) and "license" not in data
    assert "| `bridge_orig` | 7 | 45,630 | 1,739,492 |" in card.text and "| `nomask_6d` | 6 |" in card.text
    assert "trust_remote_code=True" in card.text and "meta-llama/Llama-2-7b-hf" in card.text
    assert "sizes of its own (`timm_model_kwargs`)" in card.text and "layers of width" in card.text  # no Llama-2-7b

    config = OpenVLAConfig.from_pretrained(published["tiny-openvla-siglip"])
    key, entry = next(iter(config.norm_stats.items()))
    spec = usual_spec(len(entry["action"]["q01"]), unit="x | y: 1 is\n4 cm").to_dict()
    table = model_card("mine", config, {f"{key}|lab": {**entry, "action_spec": spec}})
    assert f"| `{key}\\|lab` |" in table and "x \\| y: 1 is 4 cm |\n" in table  # cells of their own row
    for unknown in (None, "12", [3]):  # how much was recorded decides nothing
        assert f"| `{key}` | 7 | ? | 5 |" in model_card(
            "mine", config, {key: {**entry, "num_trajectories": unknown, "num_transitions": 5}}
        )

    licensed = tmp_path / "licensed"
    shutil.copytree(published["tiny-openvla-siglip"], licensed)
    (licensed / "README.md").write_text("---\nlicense: mit\nbase_model: openvla/openvla-7b\n---\n# Theirs\n")
    card = ModelCard.load(package_checkpoint(licensed, tmp_path / "out", name="me/my-robot") / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "openvla/openvla-7b")
    assert 'from_pretrained("me/my-robot"' in card.text and "Theirs" not in card.text


def test_the_code_of_a_card_is_code_whatever_the_names_are(published):
    """Quotes ended the text, and with it the code that readers copy."""
    config = OpenVLAConfig.from_pretrained(published["tiny-openvla-siglip"])
    key, entry = next(iter(config.norm_stats.items()))
    config.camera_names = ['the "left" one', "C:\\new"]
    names = ('a"b', "back\\slash", "two\nlines", "{braces}", "it's", "größe 🤖")
    for name, more in itertools.product(names, ({}, {"carries_code": True}, {"adapter_of": "base"})):
        card = model_card(name, config, {f"{key} {name}": entry}, **more)
        code = ast.parse(card.partition("```python\n")[2].partition("```")[0])
        texts = {node.value for node in ast.walk(code) if isinstance(node, ast.Constant)}
        assert {name, f"{key} {name}", *config.camera_names} <= texts, name
        assert f"# {' '.join(name.split())}\n" in card


def test_shards_stay_shards(published, tmp_path):
    """Also a folder that the package itself saved, as after merging a fine-tune."""
    model = OpenVLAForActionPrediction.from_pretrained(published["tiny-openvla-siglip"])
    model.save_pretrained(tmp_path / "merged", max_shard_size="4MB")
    OpenVLAProcessor.from_pretrained(published["tiny-openvla-siglip"]).save_pretrained(tmp_path / "merged")
    shards = sorted(file.name for file in (tmp_path / "merged").glob("model-*.safetensors"))
    assert len(shards) > 1
    folder = package_checkpoint(tmp_path / "merged", tmp_path / "out")
    assert sorted(file.name for file in folder.glob("*.safetensors")) == shards
    assert all((folder / name).read_bytes() == (tmp_path / "merged" / name).read_bytes() for name in shards)
    again = OpenVLAForActionPrediction.from_pretrained(folder)
    loaded = again.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())

    # A single file that replaces shards takes them away, and leaves what is not the model's.
    (folder / "video.mp4").touch()
    package_checkpoint(published["tiny-openvla-siglip"], folder, overwrite=True)
    left = {file.name for file in folder.iterdir()}
    assert not left & {*shards, "model.safetensors.index.json"} and {"video.mp4", "model.safetensors"} <= left

    (tmp_path / "merged" / shards[0]).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {shards[0]}"):
        package_checkpoint(tmp_path / "merged", tmp_path / "broken")


def test_packaging_a_packaged_folder_changes_nothing(packaged, tmp_path):
    folder = package_checkpoint(packaged["tiny-openvla-fused"], tmp_path / "again", name="tiny-openvla-fused")
    for file in packaged["tiny-openvla-fused"].iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_output_must_be_empty(published, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty.*--overwrite"):
        package_checkpoint(published["tiny-openvla-siglip"], tmp_path)
    with pytest.raises(ValueError, match="is a file: give a folder"):
        package_checkpoint(published["tiny-openvla-siglip"], tmp_path / "notes.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("write", [package_checkpoint, quantize_checkpoint, export_prismatic_checkpoint, export_onnx])
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "runtime.json", "dataset_statistics.json", "model-00001-of-00002.safetensors"]
)
def test_overwriting_loses_nothing_of_another_kind(published, tmp_path, monkeypatch, write, name):
    """`export --to onnx --overwrite` into a run of LoRA removed the adapter, and succeeded."""
    monkeypatch.setattr("openvla.conversion.onnx_export.require", lambda *_, **__: None)
    monkeypatch.setattr("openvla.conversion.onnx_export.MINIMUM_TORCH", (2,))
    own = {"runtime.json"} if write is export_onnx else {"dataset_statistics.json", "model-00001-of-00002.safetensors"}
    (tmp_path / name).write_text("{}")
    if name not in own:
        with pytest.raises(ValueError, match=rf"{name}' is not of .*, and would be replaced: give another folder"):
            write(published["tiny-openvla-siglip"], tmp_path, overwrite=True)
        assert [file.name for file in tmp_path.iterdir()] == [name]
    elif write is not export_onnx:  # what a killed process left of its own kind
        write(published["tiny-openvla-siglip"], tmp_path, overwrite=True)
        assert (tmp_path / "config.json").is_file()


def test_a_failure_leaves_no_folder(published, tmp_path, monkeypatch):
    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_folder, "model_card", disk_full)
    with pytest.raises(OSError, match="No space left"):
        package_checkpoint(published["tiny-openvla-siglip"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "remove, add, message",
    [
        ("model.safetensors", None, "holds no model.safetensors and no model.safetensors.index.json"),
        ("model.safetensors", "adapter_config.json", "holds a LoRA adapter.*merge"),
        ("model.safetensors", "pytorch_model.bin", "save it as safetensors first"),
        ("config.json", None, "no config.json"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("preprocessor_config.json", None, "has no preprocessor_config.json"),
    ],
)
def test_incomplete_sources(published, tmp_path, remove, add, message):
    broken = tmp_path / "broken"
    shutil.copytree(published["tiny-openvla-siglip"], broken)
    (broken / remove).unlink()
    if add:
        (broken / add).touch()
    with pytest.raises(FileNotFoundError, match=message):
        package_checkpoint(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [package_checkpoint, quantize_checkpoint, export_prismatic_checkpoint])
def test_an_adapter_beside_the_weights_is_not_left_out(published, tmp_path, make):
    both = tmp_path / "both"
    shutil.copytree(published["tiny-openvla-siglip"], both)
    (both / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="nothing says whether the weights include the adapter"):
        make(both, tmp_path / "out")


def test_damaged_weights(published, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(published["tiny-openvla-siglip"], broken)
    with open(broken / "model.safetensors", "r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(ValueError, match="model.safetensors' is damaged"):
        package_checkpoint(broken, tmp_path / "out")


def test_sources_that_do_not_fit(published, tmp_path):
    plain = Path(__file__).parent / "fixtures/tiny-openvla-fused"  # its config.json lacks the sizes of the towers
    with pytest.raises(ValueError, match=r"does not fit the configuration.*of another shape.*timm_model_kwargs"):
        package_checkpoint(plain, tmp_path / "out")
    no_statistics = tmp_path / "none"
    shutil.copytree(published["tiny-openvla-siglip"], no_statistics)
    (no_statistics / "dataset_statistics.json").unlink()
    config = json.loads((no_statistics / "config.json").read_text())
    del config["norm_stats"]
    (no_statistics / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no action statistics.*dataset_statistics.json"):
        package_checkpoint(no_statistics, tmp_path / "out")


@pytest.mark.parametrize("where", ["./nowhere", "/nowhere/at/all", "openvla/not-in-the-cache"])
def test_no_source(tmp_path, where):
    with pytest.raises(FileNotFoundError, match="No folder at|neither a folder here nor a Hub repository"):
        package_checkpoint(where, tmp_path / "out")


def test_hub_id(published, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision))
        return str(published["tiny-openvla-siglip"])

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    folder = package_checkpoint("openvla/openvla-v01-7b", tmp_path / "out", revision="main")
    assert asked == [("openvla/openvla-v01-7b", "main")]
    assert ModelCard.load(folder / "README.md").data.base_model == "openvla/openvla-v01-7b"
    weights = load_file(folder / "model.safetensors")
    assert set(weights) == set(load_file(published["tiny-openvla-siglip"] / "model.safetensors"))
