"""What belongs to an adapter (units, prompt form, pixels, base) is its own by every way it gets onto a model."""

import copy
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import openvla
from openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.adapters_openvla import find_base
from openvla.hub import statistics_of
from openvla.options.prediction import PredictOptions
from openvla.prediction import predict
from openvla.training import FinetuneOptions, finetune, merge_adapter


peft = pytest.importorskip("peft", reason="adapters need the [train] extra")
pytest.importorskip("accelerate", reason="training needs the [train] extra")

ROOT = Path(__file__).resolve().parents[1]
DEMOS = Path(__file__).parent / "fixtures" / "demos"
FRAME = Path(__file__).parent / "fixtures" / "goldens" / "images" / "img0.png"
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "processor_config.json")


def model_folder(source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in (*MODEL_FILES, "dataset_statistics.json"):
        shutil.copyfile(source / name, folder / name)
    return folder


def train(model: Path | str, output: Path | str, **changes) -> Path:
    made = {"steps": 1, "batch_size": 2, "rank": 4, "shuffle_buffer": 8, "name": "mine", "logging": "none"}
    made |= {"held_out": 0.0, "eval_every": 0, "save_every": 1}
    dataset = str(DEMOS / "lerobot_image")
    return finetune(FinetuneOptions(model=str(model), dataset=dataset, output=str(output), **{**made, **changes}))


@pytest.fixture(scope="module")
def trained(small_policy, tmp_path_factory) -> Path:
    """A folder with a base and a run on it, which was started with relative paths."""
    place = tmp_path_factory.mktemp("place")
    (model_folder(small_policy, place / "base") / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train("base", "run", logging="tensorboard")
    return place


@pytest.fixture(scope="module")
def expected(trained) -> list[float]:
    """What the run answers."""
    return act(OpenVLAForActionPrediction.from_pretrained(trained / "run"))


@pytest.fixture(scope="module")
def merged(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "merged"
    merge_adapter(trained / "run", folder)
    return folder


@pytest.fixture
def place(trained, tmp_path) -> Path:
    """A copy of that folder that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "place"))


def other_run(run: Path, name: str = "other", **processor) -> Path:
    """A copy of a run under other statistics, and other settings of the processor."""
    folder = Path(shutil.copytree(run, run.parent / name))
    entry = json.loads((run / "dataset_statistics.json").read_text())["mine"]
    entry["action"]["q99"] = [2 * value + 1 for value in entry["action"]["q99"]]
    entry["action"]["max"] = [2 * value + 1 for value in entry["action"]["max"]]
    (folder / "dataset_statistics.json").write_text(json.dumps({name: entry}))
    content = json.loads((folder / "processor_config.json").read_text()) | processor
    (folder / "processor_config.json").write_text(json.dumps(content))
    return folder


def act(model) -> list[float]:
    return model.eval().predict_action(IMAGE, "open the drawer").tolist()


# Units, prompt form and pixels


def test_a_shallow_copy_has_the_same_adapters(trained, expected):
    """As it has the same layers: what one of them loads acted in the other as well, in the units of the base."""
    model = OpenVLAForActionPrediction.from_pretrained(trained / "base")
    copy.copy(model).load_adapter(str(trained / "run"))
    assert act(model) == expected


def test_every_way_gives_the_units_of_the_run(trained, expected, tmp_path):
    run, base = trained / "run", trained / "base"
    assert act(OpenVLAForActionPrediction.from_pretrained(base)) != expected
    for auto_class in (AutoModel, openvla.AutoModelForVision2Seq):
        model = auto_class.from_pretrained(run)
        assert list(model.norm_stats) == ["mine"] and act(model) == expected
    model = OpenVLAForActionPrediction.from_pretrained(base)
    model.load_adapter(str(run))
    assert act(model) == expected
    alone = tmp_path / "alone"  # they stand in the adapter's configuration as well
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(run / name, alone / name)
    for folder in (run, alone):
        model = peft.PeftModel.from_pretrained(OpenVLAForActionPrediction.from_pretrained(base), folder)
        assert act(model) == expected
    merged = model.merge_and_unload()
    assert list(merged.norm_stats) == ["mine"] and act(merged) == pytest.approx(expected, abs=1e-6)
    merged.save_pretrained(tmp_path / "merged")
    assert list(json.loads((tmp_path / "merged" / "dataset_statistics.json").read_text())) == ["mine"]


def layers(model) -> list:
    """Layers of adapters. What set_adapter and disable_adapters of transformers do to them is done to them directly:
    those refuse a PEFT that is older than they like."""
    return [module for module in model.modules() if hasattr(module, "merged_adapters")]


def test_units_follow_the_active_adapter(place):
    run, other = place / "run", other_run(place / "run")
    model = OpenVLAForActionPrediction.from_pretrained(place / "base")
    base = act(model)
    model.load_adapter(str(run))
    mine = act(model)
    model.load_adapter(str(other), adapter_name="second")
    for active, datasets in (("second", ["other"]), (["default", "second"], ["mine", "other"]), ("default", ["mine"])):
        for layer in layers(model):
            layer.set_adapter(active)
        assert list(model.norm_stats) == datasets
        if len(datasets) > 1:
            with pytest.raises(ValueError, match="2 datasets; pass unnorm_key"):
                act(model)
        else:
            assert (act(model) == mine) == (active == "default")
    for layer in layers(model):
        layer.enable_adapters(False)
    assert list(model.norm_stats) == ["metaworld"] and act(model) == base
    for layer in layers(model):
        layer.enable_adapters(True)
    assert act(model) == mine
    for config in model.peft_config.values():  # one dataset with two statistics
        statistics = config.auto_mapping["openvla"]["norm_stats"]
        config.auto_mapping["openvla"]["norm_stats"] = {"mine": next(iter(statistics.values()))}
    for layer in layers(model):
        layer.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="differ in norm_stats, 'mine'"):
        act(model)


def test_units_follow_the_active_adapter_of_peft(place):
    run, other = place / "run", other_run(place / "run")
    content = json.loads((other / "adapter_config.json").read_text())
    content["auto_mapping"]["openvla"]["norm_stats"] = json.loads((other / "dataset_statistics.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(content))
    model = peft.PeftModel.from_pretrained(OpenVLAForActionPrediction.from_pretrained(place / "base"), run)
    model.load_adapter(other, "second")
    assert list(model.norm_stats) == ["mine"]
    model.set_adapter("second")
    assert list(model.norm_stats) == ["other"]
    with model.disable_adapter():
        assert list(model.norm_stats) == ["metaworld"]
    model.delete_adapter("second")
    assert list(model.norm_stats) == ["mine"]
    assert list(model.unload().norm_stats) == ["metaworld"]


def in_configuration(run: Path) -> Path:
    """Statistics also where PEFT reads them, as a run writes them."""
    content = json.loads((run / "adapter_config.json").read_text())
    content["auto_mapping"]["openvla"]["norm_stats"] = json.loads((run / "dataset_statistics.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(content))
    return run


def two_adapters(place: Path, other: Path, **options):
    model = OpenVLAForActionPrediction.from_pretrained(place / "base")
    model = peft.PeftModel.from_pretrained(model, place / "run", **options)
    model.load_adapter(other, "second", **options)
    return model


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_units_of_adapters_made_of_others(place, is_trainable, alone):
    """PEFT gives them the configuration of the first."""
    other = in_configuration(other_run(place / "run"))
    for folder in (place / "run", other):  # with a task, PEFT saves what the configuration says of its training
        content = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**content, "task_type": "CAUSAL_LM"}))
    model = two_adapters(place, other, is_trainable=is_trainable)
    model.add_weighted_adapter(["second", "default"], [0.5, 0.5], "both", combination_type="linear")
    model.set_adapter("both")
    if alone and is_trainable:
        model.state_dict()  # looked at once before they are gone
    for name in ("default", "second") if alone else ():
        model.delete_adapter(name)
    for _ in range(2):
        with pytest.raises(ValueError, match="'both' was made of others.*say them while it is active"):
            act(model)
    model.save_pretrained(place / "saved", selected_adapters=["both"])
    loaded = OpenVLAForActionPrediction.from_pretrained(place / "base")
    with pytest.raises(ValueError, match="'both' was made of others"):
        loaded.load_adapter(str(place / "saved" / "both"))
    model.get_base_model().norm_stats = own = {"own": {"action": {"q01": [-2.0] * 7, "q99": [2.0] * 7}}}
    assert model.norm_stats == own and max(map(abs, act(model))) > 1
    if not alone:
        model.set_adapter("default")
        assert list(model.norm_stats) == ["mine"]
    model.set_adapter("both")
    assert list(model.merge_and_unload().norm_stats) == ["own"]


def test_adapters_made_of_others_that_agree(place):
    model = two_adapters(place, Path(shutil.copytree(place / "run", place / "again")))
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="linear")
    model.set_adapter("both")
    assert list(model.norm_stats) == ["mine"] and act(model)


def test_other_weights_under_one_name(place):
    other = in_configuration(other_run(place / "run"))
    weights = load_file(other / "adapter_model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, other / "adapter_model.safetensors")
    model = peft.PeftModel.from_pretrained(OpenVLAForActionPrediction.from_pretrained(place / "base"), place / "run")
    model.load_adapter(place / "run", "default")  # the same ones again
    assert list(model.norm_stats) == ["mine"]
    model.load_adapter(other, "default")
    with pytest.raises(ValueError, match="Other weights were loaded under the name of the adapter 'default'"):
        act(model)
    with pytest.raises(ValueError, match="Other weights"):
        model.merge_adapter()
        act(model)
    with pytest.warns(UserWarning, match="merged model has no action statistics"):
        merged = model.merge_and_unload()
        with pytest.raises(ValueError, match="no action statistics"):  # older PEFT unloads it by then
            act(merged)


def test_weights_that_are_merged_give_the_units(place):
    """Also those of an adapter that is not active, or is not in the first layers."""
    other = in_configuration(other_run(place / "run"))
    content = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**content, "target_modules": ["q_proj"]}))
    weights = {k: v for k, v in load_file(other / "adapter_model.safetensors").items() if "q_proj" in k}
    save_file(weights, other / "adapter_model.safetensors")
    model = two_adapters(place, other)
    model.merge_adapter(["second"])
    with pytest.raises(ValueError, match="2 datasets; pass unnorm_key"):  # elsewhere "default" computes
        act(model)
    model.unmerge_adapter()
    assert list(model.norm_stats) == ["mine"]
    model.set_adapter("second")
    model.merge_adapter()
    assert list(model.norm_stats) == ["other"]
    model.unmerge_adapter()
    assert list(model.merge_and_unload(adapter_names=["second"]).norm_stats) == ["other"]


def test_adapters_that_were_never_filled(place):
    file = place / "run" / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)
    model = OpenVLAForActionPrediction.from_pretrained(place / "base")
    for load in (
        lambda: OpenVLAForActionPrediction.from_pretrained(place / "run"),
        lambda: model.load_adapter(str(place / "run")),
        lambda: peft.PeftModel.from_pretrained(
            OpenVLAForActionPrediction.from_pretrained(place / "base"), place / "run"
        ),
    ):
        with pytest.raises(ValueError, match="weights of the adapter 'default' are all zero"):
            load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: {name: name.replace("projector", "connector") for name in names}, "missing.*does not have"),
        (lambda names: {name: name.replace(".model.", ".model.policy.") for name in names}, "missing.*does not have"),
        (lambda names: {name: name for name in names if "projector" not in name}, r"\d missing: projector"),
        (lambda names: {name: name for name in names if "lora_A" in name}, r"missing: .*lora_B"),
    ],
    ids=["of another base", "under a prefix", "of a part", "half of each"],
)
def test_weights_of_an_adapter_that_do_not_fit(place, change, message):
    """The libraries leave layers without weights as they are, and pass over others: the base would act."""
    file = place / "run" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({new: weights[old] for old, new in change(weights).items()}, file, metadata={"format": "pt"})
    base = OpenVLAForActionPrediction.from_pretrained(place / "base")
    for load in (
        lambda: OpenVLAForActionPrediction.from_pretrained(place / "run"),
        lambda: base.load_adapter(str(place / "run")),
        lambda: peft.PeftModel.from_pretrained(
            OpenVLAForActionPrediction.from_pretrained(place / "base"), place / "run"
        ),
        lambda: merge_adapter(place / "run", place / "merged"),
    ):
        with pytest.raises(ValueError, match=f"adapter 'default' are not those of its adapter_config.json.*{message}"):
            load()
    with pytest.raises(ValueError, match="are not those of its adapter_config.json"):  # nor does it act later
        act(base)


KINDS = {  # of PEFT; what they answer with is compared with its own forward
    "dora": lambda layers: peft.LoraConfig(r=2, target_modules=layers, use_dora=True, init_lora_weights=False),
    "vera": lambda layers: peft.VeraConfig(r=2, target_modules=layers, d_initial=0.5, init_weights=False),
    "loha": lambda layers: peft.LoHaConfig(r=2, target_modules=layers, init_weights=False),
    "lokr": lambda layers: peft.LoKrConfig(r=2, target_modules=layers, init_weights=False),
    "ia3": lambda layers: peft.IA3Config(target_modules=layers, feedforward_modules=[], init_ia3_weights=False),
    "oft": lambda layers: peft.OFTConfig(oft_block_size=4, r=0, target_modules=layers, init_weights=False),
}
BY_PEFT_ALONE = ("dora", "vera")  # what the library's load_adapter cannot load


@pytest.mark.filterwarnings("ignore:The adapter came without action statistics")
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_other_kinds(place, kind):
    """All ways to load one give what it gave where it was made, or are refused, as are weights that do not fit it."""
    base, folder = place / "base", place / "kind"
    made = peft.get_peft_model(OpenVLAForActionPrediction.from_pretrained(base), KINDS[kind](["q_proj"])).eval()
    for parameter in (each for each in made.parameters() if each.requires_grad):
        parameter.data += 0.1 * torch.randn_like(parameter)
    made.save_pretrained(folder)

    def answers(model) -> tuple[torch.Tensor, torch.Tensor]:
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        inputs = model.processor("In: What action should the robot take to open the drawer?\nOut:", IMAGE)
        with torch.inference_mode():
            logits = model(**inputs).logits  # of the library's layers; a prediction has its own passes
        predicted = model.predict_action(IMAGE, "open the drawer", return_dict=True)
        return logits, torch.as_tensor(predicted.token_probabilities)

    expected = answers(made)
    plain = answers(OpenVLAForActionPrediction.from_pretrained(base))
    assert (plain[0] - expected[0]).abs().max() > 0.1

    def with_peft():
        return peft.PeftModel.from_pretrained(OpenVLAForActionPrediction.from_pretrained(base), folder).eval()

    def ours():
        return OpenVLAForActionPrediction.from_pretrained(folder).eval()

    for load in (with_peft, lambda: with_peft().merge_and_unload(), *(() if kind in BY_PEFT_ALONE else (ours,))):
        for found, value in zip(answers(load()), expected):
            torch.testing.assert_close(found, value, atol=1e-4, rtol=1e-4)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    if kind in BY_PEFT_ALONE:
        try:  # PEFT 0.18 takes a VeRA
            torch.testing.assert_close(answers(ours())[0], expected[0], atol=1e-4, rtol=1e-4)
        except ValueError as error:
            assert "peft.PeftModel.from_pretrained(model, RUN)" in str(error)
    for damaged in (
        {name: value for name, value in weights.items() if "layers.0" not in name},
        {name.replace("self_attn", "attn"): value for name, value in weights.items()},
    ):
        save_file(damaged, file, metadata={"format": "pt"})
        for load in (with_peft, ours)[: 1 if kind in BY_PEFT_ALONE else 2]:
            with pytest.raises(ValueError, match="missing: language_model"):
                load()


def test_an_adapter_of_layers_that_are_offloaded(place):
    """Its weights were nowhere, and the answer whatever lay in memory."""
    if transformers.__version__.startswith("5.4."):
        pytest.skip("transformers 5.4 fails with an IndexError before")
    parts = {"vision_backbone": "cpu", "projector": "cpu", "language_model": "disk"}
    with pytest.raises(ValueError, match="on layers that are offloaded.*openvla merge"):
        OpenVLAForActionPrediction.from_pretrained(
            place / "run", device_map=parts, offload_folder=str(place / "offloaded")
        )


def test_statistics_that_are_given_count_for_an_adapter(place):
    own = {"own": {"action": {"q01": [-2.0] * 7, "q99": [2.0] * 7}}}
    model = OpenVLAForActionPrediction.from_pretrained(place / "run", norm_stats=own)
    assert model.norm_stats == own and list(model.config.norm_stats) == ["metaworld"]
    assert AutoModel.from_pretrained(str(place / "run"), norm_stats=own).norm_stats == own
    for config in (place / "run", place / "base"):
        model = OpenVLAForActionPrediction.from_pretrained(place / "run", config=AutoConfig.from_pretrained(config))
        assert list(model.norm_stats) == ["mine"]


def test_a_chunk_that_an_adapter_learned_is_not_said_to_be_unknown(place):
    file, options = place / "run" / "adapter_config.json", {"action_chunk": 2}
    content = json.loads(file.read_text())
    content["auto_mapping"]["openvla"]["model"] |= options
    file.write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for load in (OpenVLAForActionPrediction.from_pretrained, AutoModel.from_pretrained):
            for asked in ({}, options):
                assert load(str(place / "run"), **asked).action_chunk == 2
    with pytest.warns(UserWarning, match="action_chunk=3: the adapter in .*run' was trained with 2, which counts"):
        assert OpenVLAForActionPrediction.from_pretrained(place / "run", action_chunk=3).action_chunk == 2


def test_a_model_and_an_adapter_in_one_folder(place):
    """Merged weights that were saved into the folder of their adapter would be given it twice."""
    merged = OpenVLAForActionPrediction.from_pretrained(place / "run")
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(place / "base" / name, place / "run" / name)
    del merged
    for load in (OpenVLAForActionPrediction.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match="holds a model .model.safetensors. and an adapter"):
            load(place / "run")
    with pytest.raises(ValueError, match="holds a model"):
        train(place / "run", place / "again")


def in_hub_cache(cache: Path, folder: Path, name: str) -> None:
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def test_adapters_of_the_hub(place, expected):
    """A run keeps the configuration of its base, so that config.json tells nothing."""
    content = json.loads((place / "run" / "adapter_config.json").read_text())
    content["base_model_name_or_path"] = "somebody/base"
    del content["auto_mapping"]["openvla"]["base_digest"]  # by which the base is found on this machine
    (place / "run" / "adapter_config.json").write_text(json.dumps(content))
    options = {"cache_dir": place / "hub", "local_files_only": True}
    in_hub_cache(place / "hub", place / "run", "somebody/run")
    in_hub_cache(place / "hub", place / "base", "somebody/base")
    model = OpenVLAForActionPrediction.from_pretrained("somebody/run", **options)
    assert list(model.norm_stats) == ["mine"] and act(model) == expected
    weights = load_file(place / "base" / "model.safetensors")
    del weights["projector.fc2.weight"]
    snapshot = place / "hub" / "models--somebody--base" / "snapshots" / ("0" * 40)
    save_file(weights, snapshot / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing: projector.fc2.weight"):
        OpenVLAForActionPrediction.from_pretrained("somebody/run", **options)


def test_prompt_form_and_pixels_are_those_of_the_adapter(place):
    images = json.loads((place / "run" / "processor_config.json").read_text())["image_processor"]
    images["image_resize_strategy"] = "letterbox"
    other = other_run(place / "run", image_processor=images, prompt_template="Do {instruction}. Out:")
    model = OpenVLAForActionPrediction.from_pretrained(other)
    assert model.processor.format_prompt("stop") == "Do stop. Out:"
    assert model.processor.image_processor.image_resize_strategy == "letterbox"
    for layer in layers(model):
        layer.enable_adapters(False)
    assert model.processor.format_prompt("stop").startswith("In: What action")
    assert model.processor.image_processor.image_resize_strategy == "resize-naive"
    model = OpenVLAForActionPrediction.from_pretrained(other)
    model.processor = own = OpenVLAProcessor.from_pretrained(place / "base")
    assert model.processor is own


def test_an_adapter_without_statistics_is_said(place):
    made = peft.get_peft_model(
        OpenVLAForActionPrediction.from_pretrained(place / "base"), peft.LoraConfig(r=2, target_modules=["fc1", "fc2"])
    )
    made.save_pretrained(place / "bare")
    model = OpenVLAForActionPrediction.from_pretrained(place / "base")
    with pytest.warns(UserWarning, match="without action statistics.*units of its base .metaworld"):
        model.load_adapter(str(place / "bare"))
    model = peft.PeftModel.from_pretrained(OpenVLAForActionPrediction.from_pretrained(place / "base"), place / "bare")
    with pytest.warns(UserWarning, match="without action statistics"):
        act(model)
    with pytest.raises(FileNotFoundError, match="no dataset_statistics.json"):
        merge_adapter(place / "bare", place / "merged")
    with pytest.raises(FileNotFoundError, match="no adapter"):
        model.get_base_model().load_adapter(str(place / "base"))


def test_adapters_of_compiled_parts(place):
    """PEFT saves them with the names of these parts, under which nothing found them again."""

    def compiled():
        model = OpenVLAForActionPrediction.from_pretrained(place / "base")
        for name in ("vision_backbone", "language_model"):
            setattr(model, name, torch.compile(getattr(model, name), backend="eager"))
        return model

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    with torch.compiler.set_stance("force_eager"):
        made = peft.get_peft_model(compiled(), config)
        expected = act(made)
        made.save_pretrained(place / "made")
        model = compiled()
        model.load_adapter(str(place / "made"))
        assert act(model) == expected
        model = OpenVLAForActionPrediction.from_pretrained(place / "base")
        for layer in model.language_model.model.layers:  # what the adapter replaces was compiled itself
            layer.self_attn.q_proj = torch.compile(layer.self_attn.q_proj, backend="eager")
        model.load_adapter(str(place / "made"))
        assert act(model) == expected
    assert act(OpenVLAForActionPrediction.from_pretrained(place / "made")) == expected
    with pytest.raises(ValueError, match=r"saved of compiled parts: OpenVLAForActionPrediction.from_pretrained\(RUN\)"):
        peft.PeftModel.from_pretrained(OpenVLAForActionPrediction.from_pretrained(place / "base"), place / "made")


def test_adapters_that_a_prediction_would_leave_out(place):
    """PEFT finds where an activated LoRA begins in forward and generate alone; transformers loads no magnitudes."""
    base, layers = place / "base", ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=2, target_modules=layers, alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    made = peft.get_peft_model(OpenVLAForActionPrediction.from_pretrained(base), config)
    with pytest.raises(ValueError, match="activated LoRA"):
        act(made)
    with made.disable_adapter():
        assert act(made)
    made = peft.get_peft_model(
        OpenVLAForActionPrediction.from_pretrained(base), peft.LoraConfig(r=2, target_modules=layers, use_dora=True)
    )
    made.save_pretrained(place / "dora")
    with pytest.raises(ValueError, match="use_dora.*PeftModel.from_pretrained"):
        OpenVLAForActionPrediction.from_pretrained(base).load_adapter(str(place / "dora"))
    assert act(peft.PeftModel.from_pretrained(OpenVLAForActionPrediction.from_pretrained(base), place / "dora"))


def test_an_adapter_in_a_subfolder(place, expected):
    for options in ({"subfolder": "run"}, {"adapter_kwargs": {"subfolder": "run"}}):
        model = OpenVLAForActionPrediction.from_pretrained(place / "base")
        model.load_adapter(str(place), **options)
        assert act(model) == expected


# The base


def test_the_base_is_found_from_anywhere(place, expected, monkeypatch):
    """Relative to the run, also for a checkpoint of it, or for the files of the adapter alone, elsewhere together."""
    monkeypatch.chdir("/")
    assert act(OpenVLAForActionPrediction.from_pretrained(place / "run")) == expected
    assert act(OpenVLAForActionPrediction.from_pretrained(place / "run" / "checkpoints" / "checkpoint-1")) == expected
    (place / "alone").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(place / "run" / name, place / "alone" / name)
    assert act(OpenVLAForActionPrediction.from_pretrained(place / "alone")) == expected
    assert merge_adapter(place / "alone", place / "merged") < 1e-4
    assert act(OpenVLAForActionPrediction.from_pretrained(place / "merged")) == pytest.approx(expected, abs=1e-6)


def test_a_base_far_away_is_noted_on_this_machine(small_policy, tmp_path):
    base = model_folder(small_policy, tmp_path / "far" / "away" / "models" / "base")
    run = train(base, tmp_path / "a" / "b" / "c" / "run", strategy="lora")
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    act(OpenVLAForActionPrediction.from_pretrained(run))


def test_the_base_is_found_where_the_cache_may_not_be_read(place, monkeypatch):
    """As of a user whose HOME is that of root."""
    monkeypatch.setenv("OPENVLA_CACHE", str(place / "closed"))
    stat = os.stat

    def refused(path, **more):
        if str(path).startswith(str(place / "closed")):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **more)

    monkeypatch.setattr(os, "stat", refused)
    assert find_base(place / "run") == str((place / "base").resolve())


def test_a_base_that_is_not_there_is_asked_for(place, monkeypatch):
    monkeypatch.setenv("OPENVLA_CACHE", str(place / "cache"))
    (place / "base").rename(place / "moved")
    for load in (OpenVLAForActionPrediction.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(FileNotFoundError, match="--base BASE"):
            load(place / "run")
    with pytest.raises(FileNotFoundError, match="'../base'.*--base BASE"):
        merge_adapter(place / "run", place / "merged")
    assert merge_adapter(place / "run", place / "merged", base=place / "moved") < 1e-4


def test_a_base_with_other_weights(place):
    weights = load_file(place / "base" / "model.safetensors")
    weights["projector.fc1.bias"] += 1
    save_file(weights, place / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not those the adapter was trained on"):
        OpenVLAForActionPrediction.from_pretrained(place / "run")
    with pytest.raises(ValueError, match="--base"):
        merge_adapter(place / "run", place / "merged")
    with pytest.warns(UserWarning, match="not those the adapter was trained on"):
        OpenVLAForActionPrediction.from_pretrained(place / "base").load_adapter(str(place / "run"))
    with pytest.warns(UserWarning, match="not those the adapter was trained on"):
        merge_adapter(place / "run", place / "merged", base=place / "base")


def test_a_base_with_other_weights_is_told_however_an_adapter_is_merged(place):
    base, run = place / "base", place / "run"
    model = peft.PeftModel.from_pretrained(OpenVLAForActionPrediction.from_pretrained(base), run)
    merged = model.merge_and_unload()
    act(merged)  # by then older PEFT is known to have merged it
    with pytest.warns(UserWarning, match="An adapter was merged into the weights of .*base. before"):
        act(peft.PeftModel.from_pretrained(merged, run))
    weights = load_file(base / "model.safetensors")
    weights["projector.fc1.bias"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    model = peft.PeftModel.from_pretrained(OpenVLAForActionPrediction.from_pretrained(base), run)
    with pytest.warns(UserWarning, match="not those the adapter was trained on"):
        act(model.merge_and_unload())


@pytest.mark.parametrize(("named", "told"), [("../other", True), ("old/place/base", False), (None, False)])
def test_a_base_that_is_known_by_its_name_alone(place, named, told):
    content = json.loads((place / "run" / "adapter_config.json").read_text())
    del content["auto_mapping"]["openvla"]["base_digest"]
    (place / "run" / "adapter_config.json").write_text(json.dumps({**content, "base_model_name_or_path": named}))
    model = OpenVLAForActionPrediction.from_pretrained(place / "base")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.load_adapter(str(place / "run"))
    found = [str(each.message) for each in said if "as its base" in str(each.message)]
    assert bool(found) == told and all("names '../other' as its base" in text for text in found)


@pytest.mark.parametrize("change", [{"base_digest": "0" * 32}, {"model": {"action_chunk": 3}}])
def test_adapters_of_other_bases_or_settings_are_not_made_into_one(place, change):
    other = Path(shutil.copytree(place / "run", place / "other"))
    content = json.loads((other / "adapter_config.json").read_text())
    content["auto_mapping"]["openvla"] |= change
    (other / "adapter_config.json").write_text(json.dumps(content))
    model = two_adapters(place, other)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="linear")
    model.set_adapter("both")
    with pytest.raises(ValueError, match="their units, settings or bases differ"):
        act(model)


def test_statistics_of_another_run_beside_an_adapter_are_said(place):
    other = other_run(place / "run", name="theirs")
    with pytest.warns(UserWarning, match=r"other statistics \(theirs\) than the adapter was trained with.*\(mine\)"):
        assert list(OpenVLAForActionPrediction.from_pretrained(other).norm_stats) == ["theirs"]


def test_weights_of_another_run_beside_an_adapter_are_said(place):
    """They fit as well, and acted in the units of the run whose folder they were copied into, silently."""
    other = train(place / "base", place / "other", seed=1)
    shutil.copyfile(other / "adapter_model.safetensors", place / "run" / "adapter_model.safetensors")
    for load in (
        lambda: OpenVLAForActionPrediction.from_pretrained(place / "run"),
        lambda: OpenVLAForActionPrediction.from_pretrained(place / "base").load_adapter(str(place / "run")),
        lambda: merge_adapter(place / "run", place / "merged"),
    ):
        with pytest.warns(UserWarning, match=r"is not the file that was saved with its adapter_config.json.*\(mine\)"):
            load()


def test_parts_of_another_step_beside_an_adapter_are_said(place):
    """A head and an adapter belong together; one of them alone was copied from a later checkpoint."""
    run = train(place / "base", place / "head", head="l1_regression", steps=2, keep=2)
    shutil.copyfile(run / "checkpoints" / "checkpoint-1" / "added_parts.safetensors", run / "added_parts.safetensors")
    with pytest.warns(UserWarning, match=r"added_parts.safetensors' is not the file that was saved.*or step"):
        OpenVLAForActionPrediction.from_pretrained(run)


@pytest.mark.filterwarnings("error:.*is not the file that was saved")
def test_weights_that_peft_saves_again_are_their_own(place):
    """Trained further by PEFT: the digest of the file before would not be theirs."""
    base = OpenVLAForActionPrediction.from_pretrained(place / "base")
    model = peft.PeftModel.from_pretrained(base, place / "run", is_trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    model.save_pretrained(place / "again")
    for folder in (place / "again", place / "run", place / "run" / "checkpoints" / "checkpoint-1"):
        OpenVLAForActionPrediction.from_pretrained(place / "base").load_adapter(str(folder))


# What others get


def test_no_path_of_the_machine_is_written(trained, merged):
    """In no file at all: texts, curves of TensorBoard, weights, states of the optimizer."""
    files = [path for folder in (trained / "run", merged) for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if "tfevents" in path.name]
    for path in files:
        content = path.read_bytes()
        for known in (str(trained), str(merged.parent), str(ROOT), str(Path.home()) + "/"):
            assert known.encode() not in content, f"{known} in {path}"
    texts = [path for path in files if path.suffix in (".json", ".md")]
    assert {path.name for path in texts} >= {"README.md", "finetune.json", "adapter_config.json", "config.json"}
    for path in texts:
        content = path.read_text()
        for known in ('"is_local"', "local_files_only"):
            assert known not in content, f"{known} in {path}"
        assert "huggingface.co//" not in content
    started = json.loads((trained / "run" / "finetune.json").read_text())
    assert (started["model"], started["output"]) == ("../base", "run")


def test_cards_say_what_is_true_of_their_folder(trained, merged):
    cards = {folder: (folder / "README.md").read_text() for folder in (trained / "run", merged)}
    card = cards[trained / "run"]
    assert "holds a LoRA adapter of\n`../base`" in card and 'load_adapter("run")' in card
    for text in cards.values():
        assert text.startswith("---\n") and "\nlicense: cc-by-nc-4.0\n" in text.split("---")[1]  # that of the base
        assert "trust_remote_code" not in text and "carries its own code" not in text
    assert "auto_map" not in json.loads((merged / "config.json").read_text())
    for folder, text in cards.items():
        code = text.split("```python\n")[1].split("```")[0]
        code = code.replace(f'"{folder.name}"', f'"{folder}"').replace(
            'Image.open("frame.png")', "__import__('numpy').zeros((8, 8, 3), 'uint8')"
        )
        exec(code, found := {})
        assert found["action"].shape == (7,)


# Fine-tuning continues from a run


def test_an_adapter_goes_on_learning(place):
    again = train(place / "run", place / "again", learning_rate=1e-9)
    content = json.loads((again / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "../base"
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (place / "run", again))
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="rank 4, alpha 4"):
        train(place / "run", place / "third", rank=8)


def test_an_adapter_that_lacks_weights_does_not_go_on_learning(place):
    """Layers whose weights are gone were left without an adapter silently, and acted as the base."""
    file = place / "run" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if ".q_proj." not in name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"of 2 of \d+ modules there are none .*q_proj.* cut off"):
        train(place / "run", place / "again")


def test_only_lora_goes_on_learning(place):
    made = peft.get_peft_model(OpenVLAForActionPrediction.from_pretrained(place / "base"), KINDS["loha"](["q_proj"]))
    made.save_pretrained(place / "loha")
    with pytest.raises(ValueError, match="is one of LOHA, and lora and qlora continue LORA alone: merge it first"):
        train(place / "loha", place / "again")


def test_weights_learn_on_from_base_and_adapter(place):
    merge_adapter(place / "run", place / "merged")
    again = train(place / "run", place / "again", strategy="last_layer", learning_rate=1e-9)
    expected, found = (load_file(folder / "model.safetensors") for folder in (place / "merged", again))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_an_output_layer_that_is_one_with_the_embeddings(place):
    """The adapter is on the output layer alone: merged into weights that are both, it changed what the model reads."""
    tied = OpenVLAForActionPrediction.from_pretrained(place / "base").config
    tied.tie_word_embeddings = tied.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    OpenVLAForActionPrediction(tied).save_pretrained(place / "tied")
    for file in (*place.glob("base/tokenizer*"), place / "base" / "processor_config.json"):
        shutil.copyfile(file, place / "tied" / file.name)
    run = train(place / "tied", place / "of_tied", learning_rate=0.05, steps=3)
    assert merge_adapter(run, place / "merged") < 1e-4
    again = train(run, place / "again", strategy="last_layer", learning_rate=1e-9)
    weights = [load_file(folder / "model.safetensors") for folder in (place / "merged", again)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-5, rtol=1e-3)
    head, table = (f"language_model.{name}.weight" for name in ("lm_head", "model.embed_tokens"))
    assert torch.equal(weights[0][table], load_file(place / "tied" / "model.safetensors")[table])
    assert not torch.allclose(weights[0][head], weights[0][table], atol=1e-3)


def test_an_adapter_that_learned_on_4_bits_is_merged_with_a_warning(place):
    settings = json.loads((place / "run" / "finetune.json").read_text())
    (place / "run" / "finetune.json").write_text(json.dumps({**settings, "strategy": "qlora"}))
    with pytest.warns(UserWarning, match="learned on a base of 4 bits, and is merged into the base as stored"):
        merge_adapter(place / "run", place / "merged")


# Folders with other files than those of a run, and unlucky names


def adapter_alone(run: Path, **changes) -> Path:
    """A folder with the two files of PEFT."""
    folder = run.parent / "alone"
    folder.mkdir()
    shutil.copyfile(run / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    content = json.loads((run / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def predicted(model: Path) -> dict:
    return predict(PredictOptions(image=[str(FRAME)], instruction="open the drawer", model=str(model)))


def test_predict_has_the_units_of_an_adapter_alone(place):
    alone = adapter_alone(place / "run")
    assert predicted(alone)["unnorm_key"] == "mine"
    assert predicted(alone)["action"] == predicted(place / "run")["action"]
    assert statistics_of(alone) == statistics_of(place / "run")


def test_empty_statistics_beside_an_adapter_say_nothing(place, expected):
    run = place / "run"
    (run / "dataset_statistics.json").write_text("{}")
    assert act(OpenVLAForActionPrediction.from_pretrained(run)) == expected
    assert predicted(run)["unnorm_key"] == "mine"
    file = run / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_mapping": None}))
    with pytest.warns(UserWarning, match="came without action statistics"):
        act(OpenVLAForActionPrediction.from_pretrained(run))


@pytest.mark.filterwarnings("ignore:The adapter came without action statistics")
def test_an_adapter_without_units_has_those_that_count_for_its_base(place):
    alone, file = adapter_alone(place / "run", auto_mapping=None), place / "base" / "dataset_statistics.json"
    (known,) = json.loads(file.read_text()).values()
    file.write_text(json.dumps({"theirs": known}))  # not what its config.json says
    assert list(statistics_of(alone)) == ["theirs"] and predicted(alone)["unnorm_key"] == "theirs"


def test_pixels_of_the_published_layout_beside_an_adapter(place):
    run, file = place / "run", place / "run" / "processor_config.json"
    pixels = json.loads(file.read_text())["image_processor"]
    (run / "preprocessor_config.json").write_text(json.dumps(pixels | {"center_crop": 0.5}))
    file.write_text(json.dumps({"processor_class": "PrismaticProcessor"}))
    model = OpenVLAForActionPrediction.from_pretrained(run)
    assert model.processor.image_processor.center_crop == 0.5
    assert OpenVLAProcessor.from_pretrained(run).image_processor.center_crop == 0.5


def test_a_processor_file_that_says_nothing_leaves_what_the_adapter_says(place):
    run = place / "run"
    expected = OpenVLAForActionPrediction.from_pretrained(run).processor.image_processor.to_dict()
    (run / "processor_config.json").write_text(json.dumps({"processor_class": "PrismaticProcessor"}))
    model = OpenVLAForActionPrediction.from_pretrained(run)
    assert model.processor.image_processor.to_dict() == expected


def test_another_revision_of_the_base_is_not_passed_over(place):
    of_others = {"base_model_name_or_path": "me/base", "revision": "v2", "auto_mapping": None}
    alone = adapter_alone(place / "run", **of_others)
    with pytest.raises(ValueError, match="was trained on revision 'v2'"):
        predicted(alone)
    with pytest.raises(ValueError, match=r"was trained on revision 'v2' of 'me/base'.*revision='v2'\)"):
        OpenVLAForActionPrediction.from_pretrained(alone)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("names", [("0", "1"), ("q_proj", "default"), ("lora_A",)])
@pytest.mark.parametrize("of_peft", [False, True])
def test_adapters_with_the_names_of_parts_of_the_model(place, names, of_peft):
    run = place / "run"
    expected = act(OpenVLAForActionPrediction.from_pretrained(run))
    model = OpenVLAForActionPrediction.from_pretrained(place / "base")
    if of_peft:
        model = peft.PeftModel.from_pretrained(model, run, adapter_name=names[0])
    for name in names[of_peft:]:
        model.load_adapter(str(run), name)
    if of_peft:
        model.set_adapter(names[-1])
    assert act(model) == expected
