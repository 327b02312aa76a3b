"""What a folder may hold when it is loaded: everything that is missing, damaged or of another model is an error."""

import copy
import json
import os
import shutil
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny import TINY, golden_image
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils import PushToHubMixin

from openvla import AutoModelForVision2Seq, OpenVLAConfig, OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.conversion import package_checkpoint
from openvla.options.training import FinetuneOptions
from openvla.training.preparation import prepare
from openvla.weights_openvla import check_filled


EMBEDDED = Path(__file__).resolve().parents[1]


LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345678\n"


@pytest.fixture(scope="session")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(TINY[1].folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A complete model folder in the published layout, which a test may damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in TINY[1].folder.iterdir():
        (shutil.copyfile if file.suffix == ".json" else os.symlink)(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    config["timm_model_kwargs"] = TINY[1].timm_model_kwargs
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def replace_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder, **kwargs) -> OpenVLAForActionPrediction:
    return OpenVLAForActionPrediction.from_pretrained(folder, **kwargs)


def prefixed(prefix: str):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def without(name: str):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("projector.fc2.weight"), r"1 missing: projector\.fc2\.weight\. Likely cause: .*incomplete"),
        (lambda t: {k: v for k, v in t.items() if k.startswith("language")}, r"missing: .*, \.\.\.\. .*incomplete"),
        (prefixed("module."), r"missing: .*unexpected: module\..*DistributedDataParallel.*remove 'module\.'"),
        (prefixed("_orig_mod."), r"torch\.compile.*remove '_orig_mod\.'"),
        (prefixed("base_model.model."), r"PEFT model.*merge_and_unload"),
        (prefixed("policy."), r"begin with 'policy\.'"),
        (
            lambda t: {**t, "language_model.lm_head.lora_A.weight": torch.zeros(2, 64)},
            r"1 unexpected.*merge_and_unload",
        ),
        (lambda t: {k.replace("lm_head", "lm_head.base_layer"): v for k, v in t.items()}, "merge_and_unload"),
        (lambda t: {k.replace("fc1", "fc0"): v for k, v in t.items()}, r"2 missing: .*2 unexpected: .*another model"),
        (lambda t: {**t, "proprio_projector.fc1.weight": torch.zeros(2)}, "parts of OpenVLA-OFT"),
        (lambda t: {**t, "projector.fc2.bias": torch.zeros(3)}, r"1 of another shape: projector\.fc2\.bias \[3\]"),
    ],
    ids=lambda value: None if callable(value) else value[:30],
)
def test_tensors_that_do_not_fit(folder, tensors, change, message):
    replace_weights(folder, change(tensors))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_names_of_timm(tmp_path, tensors):
    """timm calls LayerScale's parameter gamma; the tiny DINOv2 tower has it."""
    source = TINY[0].folder
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    renamed = {k.replace("scale_factor", "gamma"): v for k, v in load_file(source / "model.safetensors").items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"rename '\.gamma' to '\.scale_factor'"):
        load(tmp_path, timm_model_kwargs=TINY[0].timm_model_kwargs)


@pytest.mark.parametrize("auto", [AutoModel, OpenVLAForActionPrediction])
def test_ways_around(folder, tensors, auto):
    """Random parts only for those who say so."""
    replace_weights(folder, {**without("projector.fc1.bias")(tensors), "projector.fc2.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"1 missing: projector\.fc1\.bias; 1 of another shape"):
        auto.from_pretrained(str(folder))
    with pytest.raises(ValueError, match=r"1 missing: projector\.fc1\.bias\. "):
        auto.from_pretrained(str(folder), ignore_mismatched_sizes=True)
    model, info = auto.from_pretrained(str(folder), output_loading_info=True)
    assert info["missing_keys"] == {"projector.fc1.bias"} and isinstance(model, OpenVLAForActionPrediction)
    assert [name for name, *_ in info["mismatched_keys"]] == ["projector.fc2.bias"]
    replace_weights(folder, {**tensors, "projector.fc2.bias": torch.zeros(3)})
    assert auto.from_pretrained(str(folder), ignore_mismatched_sizes=True).projector.fc2.bias.shape == (64,)


def zero(part: str):
    return lambda tensors: {
        name: torch.zeros_like(tensor) if part in name and tensor.ndim > 1 else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (zero(""), r"holds \d\d matrices of one value throughout: .* \(0\), \.\.\.\. .*never filled"),
        (zero("vision_backbone.featurizer.blocks.1.mlp.fc1"), r"1 matrices .*blocks\.1\.mlp\.fc1\.weight \(0\)"),
        (zero("patch_embed"), r"patch_embed\.proj\.weight"),
        (lambda t: {**t, "projector.fc2.weight": torch.full((64, 64), 0.5)}, r"projector\.fc2\.weight \(0\.5\)"),
    ],
    ids=["all", "one", "convolution", "constant"],
)
def test_weights_that_were_never_filled(folder, tensors, change, message):
    replace_weights(folder, change(tensors))
    for loader in (load, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=message):
            loader(str(folder))
    with pytest.raises(ValueError, match=message.replace("holds", "state_dict holds")):
        OpenVLAForActionPrediction.from_pretrained(
            None, config=OpenVLAConfig.from_pretrained(folder), state_dict=change(tensors)
        )


def test_zeros_that_weights_may_have(folder, tensors):
    """Biases, and rows of the embedding table that no text uses."""
    weight = tensors["projector.fc1.weight"].clone()
    weight[1:] = 0
    biases = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name.endswith(".bias")}
    replace_weights(folder, {**tensors, **biases, "projector.fc1.weight": weight})
    assert torch.equal(load(folder).projector.fc1.weight, weight)
    check_filled(folder, [("experts.down_proj_bias", torch.zeros(4, 8))])  # of GPT-OSS, side by side
    with pytest.raises(ValueError, match="1 matrices of one value throughout: experts.down_proj"):
        check_filled(folder, [("experts.down_proj", torch.zeros(4, 8))])


def test_state_dicts(folder, tensors):
    config = OpenVLAConfig.from_pretrained(folder)
    model = OpenVLAForActionPrediction.from_pretrained(None, config=config, state_dict=dict(tensors))
    assert torch.equal(model.projector.fc1.weight, tensors["projector.fc1.weight"])
    with pytest.raises(ValueError, match="knows no processor: set model.processor"):
        _ = model.processor
    OpenVLAForActionPrediction.from_pretrained(None, config=config, state_dict={})  # all random on purpose
    with pytest.raises(ValueError, match=r"given state_dict .*1 missing: projector\.fc1\.weight"):
        OpenVLAForActionPrediction.from_pretrained(
            None, config=config, state_dict=without("projector.fc1.weight")(tensors)
        )


def test_names_of_older_libraries(folder, tensors):
    """Llama checkpoints of transformers before 4.32 hold a buffer that is computed today."""
    replace_weights(folder, {**tensors, "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert torch.equal(load(folder).projector.fc1.weight, tensors["projector.fc1.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tied, tmp_path):
    text = {"model_type": "llama", "vocab_size": 400, "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": tied}  # fmt: skip
    config = OpenVLAConfig(
        text_config=text, tie_word_embeddings=tied, timm_model_kwargs=[{"embed_dim": 16, "depth": 2, "num_heads": 2}]
    )
    OpenVLAForActionPrediction(config).save_pretrained(tmp_path)
    assert ("language_model.lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    head, embeddings = (load(tmp_path).get_submodule(f"language_model.{name}") for name in ("lm_head", "model"))
    assert torch.equal(head.weight, embeddings.embed_tokens.weight) is tied


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_whole_numbers_without_their_quantization(folder, tensors, dtype):
    name = "language_model.lm_head.weight"
    replace_weights(folder, {**tensors, name: tensors[name].to(dtype)})
    with pytest.raises(
        ValueError, match=r"1 tensor\(s\) of whole numbers, for example language_model\.lm_head\.weight"
    ):
        load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))  # says no more
    with pytest.raises(ValueError, match=r"1 tensor\(s\) of whole numbers"):
        load(folder)


def test_a_model_knows_its_folder_wherever_the_process_goes(folder, tmp_path, monkeypatch):
    """Its processor is loaded when it is first needed; another folder of the same name may be there then."""
    monkeypatch.chdir(folder.parent)
    model = load(folder.name)
    (tmp_path / "elsewhere" / folder.name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert model.processor.tokenizer.vocab_size == 32000


def test_shards_and_older_files(folder, tensors, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1 and load(tmp_path / "sharded").num_parameters() == model.num_parameters()
    (tmp_path / "sharded" / "model.safetensors").symlink_to(folder / "model.safetensors")  # of another training
    with pytest.raises(ValueError, match="holds weights twice.*Remove the older ones"):
        load(tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    content = shards[1].read_bytes()
    shards[1].write_text(LFS_POINTER)
    with pytest.raises(ValueError, match=f"{shards[1].name}' is a Git LFS pointer"):
        load(tmp_path / "sharded")
    shards[1].write_bytes(content[:-8])
    with pytest.raises(ValueError, match=f"{shards[1].name}' is damaged or cut off"):
        load(tmp_path / "sharded")
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {shards[1].name}"):
        load(tmp_path / "sharded")

    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(load(folder).projector.fc1.weight, model.projector.fc1.weight)
    content = (folder / "pytorch_model.bin").read_bytes()
    for damaged, message in ((content[:-100], "damaged or cut off"), (LFS_POINTER.encode(), "Git LFS"), (b"", "empty")):
        (folder / "pytorch_model.bin").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"pytorch_model\.bin' is .*{message}"):
            load(folder)


def test_the_base_of_an_adapter_is_checked(folder, tensors, tmp_path):
    peft = pytest.importorskip("peft", reason="adapters need peft")
    adapted = peft.get_peft_model(load(folder), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    model, info = load(tmp_path / "adapter", output_loading_info=True)
    assert any("lora_A" in name for name, _ in model.named_parameters()) and not info["missing_keys"]
    replace_weights(folder, without("projector.fc2.weight")(tensors))
    with pytest.raises(ValueError, match=r"1 missing: projector\.fc2\.weight"):
        load(tmp_path / "adapter")


# Files ----------------------------------------------------------------------------------------------------------------


def doors(folder: Path, tmp_path: Path):
    """Every way into a model folder."""
    options = {"dataset": str(tmp_path), "output": str(tmp_path / "run")}
    return [
        lambda: OpenVLAConfig.from_pretrained(folder),
        lambda: load(folder),
        lambda: package_checkpoint(folder, tmp_path / "out"),
        lambda: prepare(FinetuneOptions(model=str(folder), **options)),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json in"),
        ("", "config.json' is empty"),
        ("{}", "has no model_type"),
        ("{", "config.json' is not valid JSON"),
        ("[]", "expected an object"),
        ("null", "expected an object"),
        (LFS_POINTER, "config.json' is a Git LFS pointer"),
        ('{"model_type": "llama"}', "describes a model of type 'llama', expected 'openvla'"),
        ('{"model": {}, "vla": {}}', "openvla convert"),
    ],
)
def test_config_that_is_none(folder, tmp_path, content, message):
    """Such a folder was taken for a random 7B model."""
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    for door in [*doors(folder, tmp_path), lambda: OpenVLAProcessor.from_pretrained(folder)]:
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            door()


@pytest.mark.parametrize("where", ["/nowhere/at/all", "./nowhere", "nowhere", "", "a/b/c"])
def test_no_folder(where):
    ways = (
        load,
        OpenVLAConfig.from_pretrained,
        OpenVLAProcessor.from_pretrained,
        partial(package_checkpoint, output="x"),
    )
    for way in ways:
        with pytest.raises(FileNotFoundError, match="No folder at"):
            way(where)


@pytest.mark.parametrize("way", [load, OpenVLAConfig.from_pretrained])
def test_no_repository(way, monkeypatch):
    """It is asked for once: the Hub's library tries each file for half a minute, and seven were looked for."""
    asked = []

    def not_there(repository, file, **_):
        asked.append(file)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", not_there)
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a Hub repository"):
        way("openvla/not-in-the-cache")
    assert asked == ["config.json"]


def test_an_export_to_onnx_is_no_folder_of_weights(tmp_path):
    (tmp_path / "language_model.onnx").write_bytes(b"graph")
    with pytest.raises(FileNotFoundError, match="an export to ONNX: openvla_runtime.OnnxPolicy acts with it"):
        OpenVLAForActionPrediction.from_pretrained(tmp_path)


def test_a_file_is_no_folder(folder):
    for door in (load, OpenVLAConfig.from_pretrained, OpenVLAProcessor.from_pretrained):
        with pytest.raises(FileNotFoundError, match="is a file, a model is a folder: give"):
            door(folder / "model.safetensors")
    assert OpenVLAConfig.from_pretrained(folder / "config.json").model_type == "openvla"


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "processor_config.json",
                                  "tokenizer_config.json", "special_tokens_map.json"])  # fmt: skip
@pytest.mark.parametrize("content", [LFS_POINTER, "{", "[]", ""])
def test_damaged_processor(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}' (is|holds)"):
        OpenVLAProcessor.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                                  "preprocessor_config.json", "processor_config.json"])  # fmt: skip
def test_a_byte_order_mark_that_the_library_does_not_read(folder, name):
    """It passed over a generation_config.json with one silently."""
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    with pytest.raises(ValueError, match=f"{name}' begins with a byte order mark"):
        load(folder).processor  # noqa: B018 - loads it


def test_missing_processor(folder, tmp_path):
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (folder / name).rename(tmp_path / name)
        with pytest.raises(FileNotFoundError, match=f"has no {name}"):
            load(folder).processor  # noqa: B018 - loads it
        (tmp_path / name).rename(folder / name)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        OpenVLAProcessor.from_pretrained(folder)


@pytest.mark.parametrize("content", [LFS_POINTER, "{", "[]", ""])
def test_damaged_generation_config(folder, content):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json'"):
        load(folder)
    (folder / "generation_config.json").unlink()
    assert load(folder).generation_config.pad_token_id == 32000  # from config.json


@pytest.mark.parametrize(
    "part",
    ["proprio_projector--1_checkpoint.pt", "vision_backbone--1_checkpoint.pt", "lora_adapter/adapter_config.json",
     "noisy_action_projector--250000_checkpoint.pt", "action_head--150000_checkpoint.pt"],
)  # fmt: skip
def test_parts_of_oft_that_do_not_tell_the_head(folder, tmp_path, part):
    """Downloaded in part, or of the discrete variant: read as an ordinary model it would move the arm wrongly."""
    (folder / part).parent.mkdir(exist_ok=True)
    (folder / part).touch()
    expected = rf"checkpoint of OpenVLA-OFT \({part}\) without an action_head"
    for door in doors(folder, tmp_path):
        with pytest.raises(
            ValueError, match="is empty|openvla convert FOLDER OUT" if part.startswith("action_head") else expected
        ):
            door()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_stat": {}}, "does not know norm_stat={}. Did you mean 'norm_stats'"),
        ({"devicemap": "auto"}, "devicemap='auto'. Did you mean 'device_map'"),
        ({"n_action_bin": 64}, "Did you mean 'n_action_bins'"),
        ({"unknown": 1}, "does not know unknown=1.$"),
    ],
)
def test_arguments_that_are_unknown(folder, options, message):
    for loader in (load, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=message):
            loader(str(folder), **options)
    config = OpenVLAConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="action_chunk=4 beside config=...: set it in the configuration.$"):
        load(str(folder), config=config, action_chunk=4)
    with pytest.raises(ValueError, match="config is a dict, expected an OpenVLAConfig"):
        load(str(folder), config=config.to_dict())


@pytest.mark.parametrize("content", ["null", "[]", '"openvla"', "{", ""])
def test_the_auto_class_of_the_original_reads_config_json(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json"):
        AutoModelForVision2Seq.from_pretrained(str(folder))


def test_no_statistics(folder):
    (folder / "dataset_statistics.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"norm_stats": None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no action statistics.*put a dataset_statistics.json beside"):
        load(folder).predict_action(golden_image(0), "open the drawer")


def test_statistics_that_are_given_win(folder):
    given = {"mine": {"action": {"q01": [-2.0] * 7, "q99": [2.0] * 7}}}
    assert list(load(folder, norm_stats=given).norm_stats) == ["mine"]
    # An auto class puts them into the config. Those of config.json do not win over the file beside it.
    assert list(AutoModelForVision2Seq.from_pretrained(str(folder), norm_stats=given).norm_stats) == ["mine"]
    config = AutoConfig.from_pretrained(str(folder))
    own = json.loads((folder / "dataset_statistics.json").read_text())
    assert load(folder, config=config).norm_stats.keys() == own.keys()
    given["mine"]["action"]["q01"][3] = 9.0
    with pytest.raises(ValueError, match="'mine', action, dimension 3.*mirror the motion"):
        load(folder, norm_stats=given)


def test_older_weights_in_a_folder_that_is_saved_to(folder, tmp_path):
    """One file is looked for first, also where newer weights lie in several beside it."""
    model, run = load(folder), tmp_path / "run"
    for number, size in enumerate(("50GB", "5MB", "50GB")):
        torch.nn.init.constant_(model.projector.fc1.bias, number)
        model.save_pretrained(run, max_shard_size=size)
        assert (load(run).projector.fc1.bias == number).all()
        assert (run / "model.safetensors").is_file() == (size == "50GB")
        assert (run / "model.safetensors.index.json").is_file() == (size == "5MB")  # of files that are there


@pytest.mark.parametrize("as_numbers", [lambda x: np.array(x, dtype=np.float32), torch.tensor])
def test_statistics_of_arrays_are_saved(folder, tmp_path, as_numbers):
    """As those of TensorFlow datasets and of scripts come, wherever they enter."""
    model = load(folder)
    given = {"mine": {"action": {"q01": as_numbers([-0.5] * 7), "q99": as_numbers([0.5] * 7)}, "n": np.int64(3)}}
    model.norm_stats = given
    OpenVLAConfig(**{**model.config.to_dict(), "norm_stats": given}).save_pretrained(tmp_path / "config")
    model.save_pretrained(tmp_path / "set")
    model.config.norm_stats = given
    assert "mine" in repr(model.config)
    model.save_pretrained(tmp_path / "config_set")
    for name in ("set", "config_set"):
        assert load(tmp_path / name).norm_stats == {"mine": {"action": {"q01": [-0.5] * 7, "q99": [0.5] * 7}, "n": 3}}
    assert json.loads((tmp_path / "config" / "config.json").read_text())["norm_stats"]["mine"]["n"] == 3
    with pytest.raises(TypeError, match="norm_stats holds <object.*expected numbers"):
        model.norm_stats = {"mine": object()}


def test_statistics_of_a_folder_that_is_saved_to(folder, tmp_path, monkeypatch):
    """Scripts of the original write those of the training first, and then save a model that has those of its base."""
    model, file = load(folder), tmp_path / "run" / "dataset_statistics.json"
    own = json.loads((folder / "dataset_statistics.json").read_text())
    file.parent.mkdir()
    file.write_text(json.dumps({"mine": next(iter(own.values()))} | own))
    with pytest.warns(UserWarning, match="had other statistics of mine, and now.*set model.norm_stats before"):
        model.save_pretrained(file.parent)
    assert json.loads(file.read_text()) == own
    model.save_pretrained(file.parent)
    model.norm_stats = None
    with pytest.warns(UserWarning, match="no statistics: those that were in.*will count"):
        model.save_pretrained(file.parent)
    assert json.loads(file.read_text()) == own
    # `save_pretrained(push_to_hub=True)` uploads from within
    seen = {}
    monkeypatch.setattr(
        PushToHubMixin, "_upload_modified_files", lambda self, place, *_: seen.update({"there": os.listdir(place)})
    )
    (tmp_path / "new").mkdir()
    load(folder)._upload_modified_files(tmp_path / "new", "me/mine", {})
    assert seen["there"] == ["dataset_statistics.json"]


# Parts that contradict each other -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_action_bins": 50000}, "n_action_bins=50000 does not fit a vocabulary of 32000"),
        ({"n_action_bins": "256"}, "n_action_bins='256': expected a positive integer"),
        ({"image_sizes": [224, 224]}, "2 entries for 1 vision tower"),
        ({"image_sizes": [0]}, r"image_sizes=\[0\]"),
        ({"image_token_id": 40000}, "image_token_id=40000 is no id of a vocabulary of 32064"),
        ({"empty_token_id": True}, "empty_token_id=True is no id of a vocabulary"),
        ({"llm_max_length": 0}, "llm_max_length=0"),
    ],
)
def test_config_that_contradicts_itself(folder, fields, message):
    """In the file as well as by name."""
    with pytest.raises(ValueError, match=message):
        load(folder, **fields)
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_processor_of_another_model(folder):
    model = load(folder)
    fused = TINY[0].processor()
    with pytest.raises(ValueError, match="processor of another model"):
        model.processor = fused
    shutil.copyfile(Path(__file__).parents[1] / "tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(ValueError, match="944 tokens of its own, the model expects 32000.*tokenizer of another model"):
        OpenVLAProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match="tokenizer of another model"):
        model.processor  # noqa: B018 - loads it


@pytest.mark.parametrize("step", ["do_resize", "do_rescale", "do_normalize"])
def test_processor_that_leaves_a_step_out(folder, step):
    fields = json.loads((folder / "preprocessor_config.json").read_text()) | {step: False}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"{step}=False"):
        OpenVLAProcessor.from_pretrained(folder)


@pytest.mark.parametrize("value", [None, "processor", TINY[0].processor().tokenizer], ids=type)
def test_what_is_no_processor(folder, value):
    with pytest.raises(ValueError, match="model.processor is an OpenVLAProcessor, got"):
        load(folder).processor = value


@pytest.mark.parametrize("field", ["input_sizes", "means", "stds"])
@pytest.mark.parametrize("value", [5, [5], [[1, 2]], [["a", "b", "c"]], [[float("nan")] * 3]])
def test_damaged_image_processor(folder, field, value):
    fields = json.loads((folder / "preprocessor_config.json").read_text()) | {field: value}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"{field}=.*three numbers for each tower"):
        OpenVLAProcessor.from_pretrained(folder)


# Saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_the_hub", [True, False])
def test_saved_folders_name_no_code_that_is_not_there(folder, tmp_path, of_the_hub):
    if of_the_hub:
        for file in folder.glob("*.json"):
            if file.name != "tokenizer.json":
                text = file.read_text()
                for module in ("configuration", "modeling", "processing"):
                    text = text.replace(f'"{module}_prismatic.', f'"openvla/openvla-7b--{module}_prismatic.')
                file.write_text(text)
    saved = tmp_path / "saved"
    load(folder).save_pretrained(saved)
    OpenVLAProcessor.from_pretrained(folder).save_pretrained(saved)
    for file in saved.glob("*.json"):
        assert "_prismatic" not in file.read_text() and "auto_map" not in file.read_text(), file.name
    for remote in (True, False):
        model = AutoModel.from_pretrained(str(saved), trust_remote_code=remote)
        assert isinstance(model, OpenVLAForActionPrediction)
        assert isinstance(AutoProcessor.from_pretrained(str(saved), trust_remote_code=remote), OpenVLAProcessor)


def test_saved_folders_keep_the_names_of_code_that_is_there(folder, tmp_path):
    (tmp_path / "configuration_mine.py").touch()
    config = OpenVLAConfig.from_pretrained(folder)
    config.auto_map = {"AutoConfig": "me/robot--configuration_mine.OpenVLAConfig", "AutoModel": "modeling_mine.Model"}
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == {"AutoConfig": "configuration_mine.OpenVLAConfig"}
    assert set(config.auto_map) == {"AutoConfig", "AutoModel"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_leaves_positions_as_they_are(folder, dtype):
    """`model.to(torch.bfloat16)` rounded rotary frequencies, angles of position 300 by up to 0.37 radians, silently."""
    loaded = OpenVLAForActionPrediction.from_pretrained(folder, dtype=dtype)
    cast = OpenVLAForActionPrediction.from_pretrained(folder, dtype=torch.float32)
    adapted = PeftModel(copy.deepcopy(cast), LoraConfig(target_modules=["q_proj"]))
    expected = dict(loaded.named_buffers())
    assert any(name.endswith("inv_freq") for name in expected)
    for model in (cast.to(dtype), adapted.to(dtype).get_base_model()):
        for name, buffer in model.named_buffers():
            assert buffer.dtype == expected[name].dtype and torch.equal(buffer, expected[name]), name
    assert cast.dtype == dtype and cast.to("meta").language_model.model.rotary_emb.inv_freq.is_meta


@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.ModuleList([]).append], ids=["alone", "in another"])
def test_a_model_that_was_made_on_meta_has_positions(folder, tensors, wrap):
    """They are in no state_dict: after `to_empty` they were what the memory held, and actions as well."""
    loaded = load(folder)
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(loaded.config)
    wrap(model).to_empty(device="cpu")
    model.load_state_dict(tensors)
    for name, buffer in loaded.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


@pytest.mark.parametrize("bits", [None, 8])
def test_weights_that_accelerate_holds_are_saved_once_they_are_back(folder, tmp_path, bits):
    """Those of 8 bits were said to be quantized by another library."""
    accelerate = pytest.importorskip("accelerate", reason="offloading is of accelerate")
    quantization = None if bits is None else {"quant_method": "openvla", "bits": bits}
    model = accelerate.cpu_offload(load(folder, quantization_config=quantization), execution_device="cpu")
    with pytest.raises(ValueError, match=r"accelerate holds weights.*remove_hook_from_submodules\(model\)"):
        model.save_pretrained(tmp_path / "saved")
    accelerate.hooks.remove_hook_from_submodules(model)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_a_chunk_that_weights_never_learned_is_said(tmp_path):
    """The steps beyond theirs look like actions, and are none that anybody taught."""
    with pytest.warns(UserWarning, match=r"action_chunk=8: the config.json of .* says 1"):
        model = OpenVLAForActionPrediction.from_pretrained(EMBEDDED, action_chunk=8)
    with pytest.warns(UserWarning, match=r"camera_names=\['front', 'wrist'\]: the config.json of .* says \['"):
        OpenVLAForActionPrediction.from_pretrained(EMBEDDED, camera_names=["front", "wrist"])
    # The auto classes hand options on in a config.
    for option in ({"action_chunk": 8}, {"n_action_bins": 128}):
        with pytest.warns(UserWarning, match=f"{next(iter(option))}=.*: the config.json of .* says"):
            AutoModel.from_pretrained(EMBEDDED, **option)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        OpenVLAForActionPrediction.from_pretrained(EMBEDDED, action_chunk=1, camera_names=["front"])
        AutoModel.from_pretrained(EMBEDDED)
        model.config.action_head = "parallel_tokens"
        model.save_pretrained(tmp_path)
        assert OpenVLAForActionPrediction.from_pretrained(tmp_path).config.action_chunk == 8
        OpenVLAForActionPrediction.from_pretrained(tmp_path, diffusion_steps=7)  # of no diffusion
        # A folder says nothing of its weights without a config.json that can be used.
        config = OpenVLAConfig.from_pretrained(tmp_path, action_chunk=2)
        file = tmp_path / "config.json"
        file.write_text(file.read_text().replace('"action_chunk": 8', '"action_chunk": -1'))
        for spoil in (lambda: None, file.unlink):
            spoil()
            assert OpenVLAForActionPrediction.from_pretrained(tmp_path, config=config).config.action_chunk == 2
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="action_head='tokens': the config.json of .* says 'parallel_tokens'"):
        OpenVLAForActionPrediction.from_pretrained(tmp_path, action_head="tokens")


def test_steps_of_noise_that_a_diffusion_never_learned_are_said(tmp_path):
    """Its noise would be removed on another schedule."""
    text = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2}  # fmt: skip
    tower = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    config = OpenVLAConfig(text_config=text, timm_model_kwargs=[tower], action_head="diffusion", action_dim=7)
    OpenVLAForActionPrediction(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="diffusion_steps=7: the config.json of .* says 50"):
        OpenVLAForActionPrediction.from_pretrained(tmp_path, diffusion_steps=7)
