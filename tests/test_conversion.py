"""Training checkpoints of the original -> Hub folders and back, on checkpoints rebuilt from the published tiny ones.

The training names are written out here once more, from the original's modules (`prismatic/models`), so that the name
table of the package is not tested against itself.
"""

import copy
import json
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from openvla import OpenVLAConfig, OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.conversion import convert_prismatic_checkpoint, export_prismatic_checkpoint, prismatic
from openvla.conversion.hub_folder import expected_shapes, read_weights
from openvla.conversion.training_run import name_table, rename
from openvla.folders import save_processor


pytestmark = pytest.mark.filterwarnings("ignore:.*has other sizes than")  # the tiny models do
PROJECTOR = {"fc1": "projector.0", "fc2": "projector.2", "fc3": "projector.4"}


def training_parts(weights: dict[str, torch.Tensor], fused: bool) -> dict[str, dict[str, torch.Tensor]]:
    """The published tensors as the original's trainer saves them."""
    parts = {"vision_backbone": {}, "projector": {}, "llm_backbone": {}}
    for name, tensor in weights.items():
        if name.startswith("language_model."):
            parts["llm_backbone"]["llm." + name[len("language_model.") :]] = tensor
        elif name.startswith("projector."):
            _, layer, kind = name.split(".")
            parts["projector"][f"{PROJECTOR[layer]}.{kind}"] = tensor
        else:
            name = name[len("vision_backbone.") :]
            if fused:
                name = re.sub(r"^featurizer\.", "dino_featurizer.", name)
                name = re.sub(r"^fused_featurizer\.", "siglip_featurizer.", name)
            parts["vision_backbone"][re.sub(r"\.scale_factor$", ".gamma", name)] = tensor
    return parts


@pytest.fixture
def small_files():
    """A process that may not write files above 1 MB, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint) -> SimpleNamespace:
    """Published weights, their training layout, and what a tiny model needs besides."""
    weights = load_file(tiny_checkpoint.folder / "model.safetensors")
    fused = "fused" in tiny_checkpoint.name
    sizes = tiny_checkpoint.timm_model_kwargs
    config = OpenVLAConfig.from_pretrained(tiny_checkpoint.folder, timm_model_kwargs=sizes)
    return SimpleNamespace(
        folder=tiny_checkpoint.folder,
        weights=weights,
        parts=training_parts(weights, fused),
        fused=fused,
        config=lambda: copy.deepcopy(config),
        checkpoint=tiny_checkpoint,
    )


def write_run(run: Path, tiny, parts: dict | None = None, base_vlm: str = "tiny") -> Path:
    """A run folder of the original with one checkpoint."""
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"model": tiny.parts if parts is None else parts}, run / "checkpoints/latest-checkpoint.pt")
    (run / "config.json").write_text(json.dumps({"vla": {"base_vlm": base_vlm}, "run_id": "tiny"}))
    shutil.copyfile(tiny.folder / "dataset_statistics.json", run / "dataset_statistics.json")
    return run


def model_folder(tiny, folder: Path) -> Path:
    """The published folder with the sizes of its towers, weights linked."""
    folder.mkdir()
    tiny.config().save_pretrained(folder)
    (folder / "model.safetensors").symlink_to(tiny.folder / "model.safetensors")
    return folder


def convert(run: Path, output: Path, tiny, **kwargs) -> Path:
    kwargs = {"config": tiny.config(), "tokenizer": tiny.folder, "dtype": "float32", **kwargs}
    return convert_prismatic_checkpoint(run, output, **kwargs)


@pytest.fixture
def run(tiny, tmp_path) -> Path:
    return write_run(tmp_path / "run", tiny)


def test_names_are_the_published_ones(tiny):
    table = name_table(tiny.config())
    published = {rename(f"{part}.{name}", table) for part in tiny.parts for name in tiny.parts[part]}
    assert published == set(tiny.weights)


def test_names_of_dino_and_clip():
    table = name_table(OpenVLAConfig(vision_backbone_id="dinoclip-vit-l-336px"))
    name = "vision_backbone.clip_featurizer.blocks.0.norm1.weight"
    assert rename(name, table) == "vision_backbone.fused_featurizer.blocks.0.norm1.weight"
    assert rename(rename(name, table), table, back=True) == name
    layer_scale = "vision_backbone.dino_featurizer.blocks.3.ls2.gamma"
    assert rename(layer_scale, table) == "vision_backbone.featurizer.blocks.3.ls2.scale_factor"
    assert rename(rename(layer_scale, table), table, back=True) == layer_scale


def test_converted_model_is_the_published_one(tiny, tmp_path):
    run = write_run(tmp_path / "run", tiny)
    folder = convert(run / "checkpoints/latest-checkpoint.pt", tmp_path / "out", tiny)

    converted = load_file(folder / "model.safetensors")
    assert set(converted) == set(tiny.weights)
    assert all(torch.equal(converted[name], tiny.weights[name]) for name in tiny.weights)
    assert (folder / "dataset_statistics.json").is_file()

    model = OpenVLAForActionPrediction.from_pretrained(folder, dtype=torch.float32)
    processor, published = OpenVLAProcessor.from_pretrained(folder), tiny.checkpoint.processor()
    assert model.config.empty_token_id == published.empty_token_id
    assert model.config.pad_token_id == 32000 and model.config.action_vocab_size == 32000
    assert processor.prompt_template == published.prompt_template
    assert (
        processor.image_processor.to_dict().items()
        >= {
            key: getattr(published.image_processor, key)
            for key in ("input_sizes", "interpolations", "means", "stds", "image_resize_strategy")
        }.items()
    )
    image = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    action = model.predict_action(image, "Open the Drawer", unnorm_key="bridge_orig")
    reference = tiny.checkpoint.load()
    np.testing.assert_array_equal(action, reference.predict_action(image, "Open the Drawer", unnorm_key="bridge_orig"))
    ids = processor("In: What action should the robot take to x?\nOut:")["input_ids"]
    assert torch.equal(ids, published("In: What action should the robot take to x?\nOut:")["input_ids"])


def test_pixels_of_a_run_with_random_crops(tiny, tmp_path, run):
    """They are stored with the processor: a model that never saw a complete image is shown none."""
    content = json.loads((run / "config.json").read_text())
    for image_aug, crop in ((True, 0.9), (False, None)):
        (run / "config.json").write_text(json.dumps({**content, "image_aug": image_aug}))
        folder = convert(run, tmp_path / str(image_aug), tiny)
        images = OpenVLAProcessor.from_pretrained(folder).image_processor
        assert (images.resize_filter, images.center_crop) == ("lanczos3" if crop else None, crop)


@pytest.mark.parametrize("shown", [("lanczos3", 0.9, None), ("lanczos3", None, None), (None, None, None)])
def test_pixels_come_back_from_an_exported_run(tiny, tmp_path, run, shown):
    """A model of `finetune` came back as one that sees complete images, resized in another way."""
    folder = convert(run, tmp_path / "model", tiny)
    OpenVLAProcessor.from_pretrained(folder).with_pixels(*shown).save_pretrained(folder)
    exported = export_prismatic_checkpoint(folder, tmp_path / "exported")
    assert json.loads((exported / "config.json").read_text())["image_aug"] is (shown[1] is not None)
    images = OpenVLAProcessor.from_pretrained(convert(exported, tmp_path / "again", tiny)).image_processor
    assert (images.resize_filter, images.center_crop, images.jpeg_quality) == shown


def test_prompts_of_its_own_are_not_exported(tiny, tmp_path, run):
    folder = convert(run, tmp_path / "model", tiny)
    processor = OpenVLAProcessor.from_pretrained(folder)
    processor.prompt_template = "Robot, {instruction}!"
    processor.save_pretrained(folder)
    with pytest.raises(ValueError, match="prompt_template='Robot, {instruction}!'.* original's training code asks"):
        export_prismatic_checkpoint(folder, tmp_path / "exported")


def test_prompts_that_are_not_known_are_said(tiny, tmp_path, run):
    config = tiny.config()
    config.llm_backbone_id = "llama2-7b-chat"
    with pytest.warns(UserWarning, match="llama2-7b-chat with a prompt form of its own.*Replace its prompt_template"):
        convert(run, tmp_path / "chat", tiny, config=config)


def test_bfloat16_shards(tiny, tmp_path):
    folder = convert(write_run(tmp_path / "run", tiny), tmp_path / "out", tiny, dtype="bfloat16", max_shard_size="4MB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(tiny.weights) and len(set(index.values())) > 1
    for name, file in index.items():
        with safe_open(folder / file, framework="pt") as handle:
            assert torch.equal(handle.get_tensor(name), tiny.weights[name].to(torch.bfloat16))
    assert OpenVLAForActionPrediction.from_pretrained(folder).dtype == torch.bfloat16


def test_round_trip_is_bit_equal(tiny, tmp_path):
    folder = convert(write_run(tmp_path / "run", tiny), tmp_path / "out", tiny)
    run = export_prismatic_checkpoint(folder, tmp_path / "back")
    parts = torch.load(run / "checkpoints/latest-checkpoint.pt", weights_only=True)["model"]
    assert {part: set(tensors) for part, tensors in parts.items()} == {
        part: set(tensors) for part, tensors in tiny.parts.items()
    }
    assert all(torch.equal(parts[part][name], tiny.parts[part][name]) for part in parts for name in parts[part])
    # The exported run names what it was built from, so that it converts without options (but for the sizes).
    config = prismatic.config_of_ids(prismatic.run_ids(run), run)
    assert config.vision_backbone_id == tiny.config().vision_backbone_id
    assert config.llm_backbone_id == tiny.config().llm_backbone_id
    assert config.image_resize_strategy == tiny.config().image_resize_strategy
    again = convert(run, tmp_path / "again", tiny)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    export_prismatic_checkpoint(folder, run, overwrite=True)


def test_a_model_of_other_sizes_is_taken_back_with_its_configuration(small_policy, tmp_path):
    """Its table has more rows than the original makes; ids cannot say it, and the command line takes no sizes."""
    with pytest.warns(UserWarning, match="other sizes than .* llama2-7b-pure stand for.*takes it back"):
        run = export_prismatic_checkpoint(small_policy, tmp_path / "run")
    assert str(tmp_path) not in (run / "config.json").read_text()
    again = convert_prismatic_checkpoint(run, tmp_path / "again", tokenizer=small_policy, dtype="float32")
    of_run = json.loads((run / "config.json").read_text())
    del of_run["hub_config"]  # as earlier versions exported
    (run / "config.json").write_text(json.dumps(of_run))
    with pytest.raises(ValueError, match="1008 embeddings, but a tokenizer of 945 tokens"):
        convert_prismatic_checkpoint(run, tmp_path / "out", tokenizer=small_policy)
    config = OpenVLAConfig.from_pretrained(small_policy)
    made = {"config": config, "tokenizer": small_policy, "dtype": "float32"}
    given = convert_prismatic_checkpoint(run, tmp_path / "given", **made)
    assert (given / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected, found = (
        OpenVLAForActionPrediction.from_pretrained(folder).predict_action(image, "open the drawer")
        for folder in (small_policy, again)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"action_chunk": 4},
        {"camera_names": ["primary", "wrist"]},
        {"action_head": "parallel_tokens"},
        {"action_head": "l1_regression", "action_dim": 7},
        {"proprio_dim": 8},
        {"n_action_bins": 64},
        {"normalization": {"mine": "bounds"}},  # whose actions had the units of q01 and q99 there
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_the_original_does_not_know_is_not_exported(tmp_path, fields):
    folder = tmp_path / "model"
    OpenVLAConfig(**fields).save_pretrained(folder)
    with pytest.raises(ValueError, match=f"has {next(iter(fields))}.*=.* does not know: one image, one step"):
        export_prismatic_checkpoint(folder, tmp_path / "run")


@pytest.mark.parametrize("base_kind", ["hub folder", "checkpoint"])
def test_frozen_parts_come_from_the_base(tiny, tmp_path, base_kind):
    trained = {"llm_backbone": tiny.parts["llm_backbone"]}
    run = write_run(tmp_path / "run", tiny, trained)
    with pytest.raises(ValueError, match=r"lacks vision_backbone and projector: frozen.*--base"):
        convert(run, tmp_path / "out", tiny)
    assert not (tmp_path / "out").exists()
    base = tiny.folder if base_kind == "hub folder" else write_run(tmp_path / "base", tiny)
    converted = load_file(convert(run, tmp_path / "out", tiny, base=base) / "model.safetensors")
    assert all(torch.equal(converted[name], tiny.weights[name]) for name in tiny.weights)
    with pytest.raises(ValueError, match="does not hold vision_backbone either"):
        convert(run, tmp_path / "other", tiny, base=run)


def test_frozen_towers_come_from_timm(tiny, tmp_path, monkeypatch):
    towers = iter(["featurizer", "fused_featurizer"])
    asked = []

    def create_model(model_id, pretrained, **kwargs):
        asked.append((model_id, pretrained))
        prefix = f"vision_backbone.{next(towers)}."
        state = {
            name.removeprefix(prefix).replace("scale_factor", "gamma"): tensor
            for name, tensor in tiny.weights.items()
            if name.startswith(prefix)
        }
        return SimpleNamespace(state_dict=lambda: state)

    monkeypatch.setattr(prismatic.timm, "create_model", create_model)
    found = prismatic.timm_towers(tiny.config())
    assert asked == [(model_id, True) for model_id in tiny.config().timm_model_ids]
    assert set(found) == {name for name in tiny.weights if name.startswith("vision_backbone.")}
    assert all(torch.equal(tensor.read(), tiny.weights[name]) for name, tensor in found.items())


# What a run says about itself -----------------------------------------------------------------------------------------


def test_ids_of_the_published_runs(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vla": {"base_vlm": "siglip-224px+7b"}}))
    config = prismatic.config_of_ids(prismatic.run_ids(tmp_path), tmp_path)
    assert (config.vision_backbone_id, config.llm_backbone_id) == ("siglip-vit-so400m", "vicuna-v15-7b")
    assert config.image_resize_strategy == "letterbox" and config.arch_specifier == "no-align+gelu-mlp"


@pytest.mark.parametrize(
    "llm_backbone_id, hidden, layers, parameters",
    [("llama2-13b-pure", 5120, 40, 13_016_519_680), ("phi-2-3b", 2560, 32, 2_779_683_840)],
)
def test_sizes_of_other_language_models(tmp_path, llm_backbone_id, hidden, layers, parameters):
    ids = {
        "vision_backbone_id": "clip-vit-l",
        "llm_backbone_id": llm_backbone_id,
        "image_resize_strategy": "letterbox",
    }
    config = prismatic.config_of_ids(ids, tmp_path)
    rows = {"llama2-13b-pure": 32064, "phi-2-3b": 51200}[llm_backbone_id]
    config.text_config.vocab_size = rows
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (hidden, layers)
    shapes = {k: s for k, s in expected_shapes(config).items() if k.startswith("language_model.")}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({}, r"does not tell vision_backbone_id.*base_vlm is 'tiny'.*give --vision-backbone-id, --llm-backbone-id"),
        (
            {"vision_backbone_id": "dinosiglip", "llm_backbone_id": "phi-2-3b", "image_resize_strategy": "letterbox"},
            r"vision_backbone_id='dinosiglip' is unknown. Did you mean 'dinosiglip-vit-so-\d+px'",
        ),
        ({"dtype": "int8"}, "dtype='int8' is unknown.*bfloat16"),
    ],
)  # fmt: skip
def test_unknown_ids(tiny, tmp_path, kwargs, message):
    run = write_run(tmp_path / "run", tiny)
    with pytest.raises(ValueError, match=message):
        convert_prismatic_checkpoint(run, tmp_path / "out", tokenizer=tiny.folder, **kwargs)
    assert not (tmp_path / "out").exists()


def test_wrong_sizes_are_listed(tiny, tmp_path):
    """The ids mean 7B towers and language model; the checkpoint is tiny."""
    run = write_run(tmp_path / "run", tiny, base_vlm="prism-dinosiglip-224px+7b" if tiny.fused else "siglip-224px+7b")
    with pytest.raises(ValueError, match=r"missing: .*of another shape: .*\[.*\] instead of \[.*timm_model_kwargs"):
        convert_prismatic_checkpoint(run, tmp_path / "out", tokenizer=tiny.folder)


def test_missing_and_unexpected_names_are_listed(tiny, tmp_path):
    parts = {**tiny.parts, "projector": dict(tiny.parts["projector"])}
    parts["projector"]["projector.7.weight"] = parts["projector"].pop("projector.2.weight")
    run = write_run(tmp_path / "run", tiny, parts)
    with pytest.raises(
        ValueError, match=r"1 missing: projector.fc2.weight; 1 unexpected: projector.projector.7.weight"
    ):
        convert(run, tmp_path / "out", tiny)


def test_wrong_tokenizer(tiny, tmp_path):
    run = write_run(tmp_path / "run", tiny)
    with pytest.raises(FileNotFoundError, match=r"No fast tokenizer.*--tokenizer"):
        convert(run, tmp_path / "out", tiny, tokenizer=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No fast tokenizer.*(meta-llama|lmsys).*--tokenizer"):
        convert(run, tmp_path / "out", tiny, tokenizer=None)  # gated or offline
    other = tiny.checkpoint.processor().tokenizer
    other.add_tokens([f"<extra{n}>" for n in range(100)])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"32064 embeddings, but a tokenizer of 32101 tokens.*makes 32128"):
        convert(run, tmp_path / "out", tiny, tokenizer=tmp_path / "other")


def test_what_is_not_a_checkpoint(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        convert(tmp_path / "nothing.pt", tmp_path / "out", tiny)
    with pytest.raises(FileNotFoundError, match=r"no checkpoints/latest-checkpoint.pt and no checkpoints/step"):
        convert(tmp_path, tmp_path / "out", tiny)
    run = write_run(tmp_path / "run", tiny)
    for content, message in (({"state_dict": {}}, "no training checkpoint.*got state_dict"), ([1], "got list")):
        torch.save(content, run / "checkpoints/latest-checkpoint.pt")
        with pytest.raises(ValueError, match=message):
            convert(run, tmp_path / "out", tiny)
    (run / "checkpoints/latest-checkpoint.pt").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="cannot be read as a torch checkpoint"):
        convert(run, tmp_path / "out", tiny)
    (run / "dataset_statistics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"No action statistics.*--statistics"):
        convert(run, tmp_path / "out", tiny)


def test_code_in_a_checkpoint_is_not_run(tiny, tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    run = write_run(tmp_path / "run", tiny)
    torch.save({"model": Harmful()}, run / "checkpoints/latest-checkpoint.pt")
    with pytest.raises(ValueError, match="cannot be read as a torch checkpoint of tensors alone"):
        convert(run, tmp_path / "out", tiny)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(("value", "message"), [(1e6, "numbers that float16 cannot hold"), (np.nan, "NaN or infinite")])
def test_weights_that_are_not_finite_are_not_exported(tiny, tmp_path, run, value, message):
    folder = convert(run, tmp_path / "model", tiny)
    weights = load_file(folder / "model.safetensors")
    weights["projector.fc1.bias"][0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"projector.fc1.bias .*{message}"):
        export_prismatic_checkpoint(folder, tmp_path / "exported", dtype="float16")
    assert not (tmp_path / "exported").exists()


def test_latest_step_stands_for_a_run(tiny, tmp_path):
    run = write_run(tmp_path / "run", tiny)
    latest = run / "checkpoints/latest-checkpoint.pt"
    latest.rename(run / "checkpoints/step-002500-epoch-01-loss=0.5.pt")
    (run / "checkpoints/step-000500-epoch-00-loss=0.9.pt").touch()
    assert prismatic.find_checkpoint(run)[0].name.startswith("step-002500")


def test_a_full_disk_leaves_no_folder(tiny, tmp_path, run, small_files):
    with pytest.raises(OSError, match="Cannot write.*model.safetensors"):
        convert(run, tmp_path / "out", tiny)
    with pytest.raises(OSError, match="Cannot write.*latest-checkpoint.pt"):
        export_prismatic_checkpoint(model_folder(tiny, tmp_path / "model"), tmp_path / "exported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_a_disk_that_is_full_before_the_tokenizer_is_an_error_of_a_file(tiny, tmp_path):
    """tokenizers has a bare Exception for it, which ended a run with a traceback and without a way on."""
    processor = tiny.checkpoint.processor()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"Cannot write '{tmp_path}': .*os error"):
            save_processor(processor, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(ValueError, match="another"):  # other errors stay what they are
        save_processor(SimpleNamespace(save_pretrained=lambda folder: int("another")), tmp_path)


def test_lazy_weights_know_shapes_without_reading(tiny):
    lazy = read_weights(tiny.folder)
    assert {name: tensor.shape for name, tensor in lazy.items()} == {
        name: tuple(tensor.shape) for name, tensor in tiny.weights.items()
    }
