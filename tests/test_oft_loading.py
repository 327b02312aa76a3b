"""Folders that OpenVLA-OFT saved: recognised, loaded with their pixels, converted; what does not fit is refused."""

import hashlib
import json
import os
import shutil
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
import transformers
from oft import ADAPTER, GIVEN, OFT, TIMM, given, load_oft, saved_by_oft
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig
from typer.testing import CliRunner

from openvla import OpenVLAConfig, OpenVLAForActionPrediction, OpenVLAProcessor, oft_openvla
from openvla.cli import app
from openvla.conversion import convert_oft_checkpoint, package_checkpoint
from openvla.evaluation.evaluate import evaluate
from openvla.files_openvla import weights_digest
from openvla.observation import Observation
from openvla.oft_openvla import find_oft
from openvla.options.evaluation import EvaluateOptions
from openvla.policy import PIXELS
from openvla.weights_openvla import read_tensors


ROOT = Path(__file__).resolve().parents[1]
IMAGES = [Image.open(OFT / "images" / f"raw{index}.png") for index in (0, 2, 4)]
INSTRUCTION = "push the plate to the front of the stove"
STATES = {None: None, 8: np.linspace(-0.4, 0.4, 8), 14: np.linspace(-0.4, 0.4, 14)}
PUBLISHED_PATH = "/home/user/.cache/huggingface/hub/models--openvla--openvla-7b/snapshots/31f0"


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("oft")
    for variant in ("base", *GIVEN):
        saved_by_oft(variant, folder)
    return folder


@pytest.fixture
def broken(saved, tmp_path):
    """Copies of a variant, to be broken."""

    def copy(variant: str) -> Path:
        return Path(shutil.copytree(saved / variant, tmp_path / variant))

    return copy


def act(model: OpenVLAForActionPrediction) -> np.ndarray:
    images = dict(zip(model.camera_names, IMAGES))
    state = STATES[model.config.proprio_dim]
    model.action_head.num_inference_steps = 5  # of a diffusion; the goldens of test_oft_parity.py have all 50
    torch.manual_seed(0)
    return model.predict_action(images, INSTRUCTION, **({} if state is None else {"state": state}))


@pytest.fixture(scope="module")
def acted(saved):
    """What a variant answers, computed once."""
    return cache(lambda variant: act(load_oft(variant, saved)))


# Recognised -----------------------------------------------------------------------------------------------------------


EXPECTED = {
    "libero-l1": ("l1_regression", 8, 7, ["full_image", "wrist_image"], 8, False, {}),
    "aloha-film-l1": (
        "l1_regression", 25, 14, ["full_image", "left_wrist_image", "right_wrist_image"], 14, True,
        {"aloha1_put_X_into_pot_300_demos": "bounds"},
    ),
    "libero-discrete": ("parallel_tokens", 8, None, ["full_image"], None, False, {}),
    "libero-diffusion": ("diffusion", 8, 7, ["full_image", "wrist_image"], 8, False, {}),
}  # fmt: skip
FIELDS = ("action_head", "action_chunk", "action_dim", "camera_names", "proprio_dim", "use_film", "normalization")


@pytest.mark.parametrize("variant", GIVEN)
def test_the_configuration_follows_from_the_parts(saved, variant):
    config = OpenVLAConfig.from_pretrained(saved / variant, **given(variant, saved))
    assert tuple(getattr(config, field) for field in FIELDS) == EXPECTED[variant]
    assert config.constant_state == "clip"


@pytest.mark.parametrize("there", [True, False], ids=["in the cache", "named by the Hub"])
def test_a_hub_repository_without_its_adapter(saved, acted, tmp_path, monkeypatch, there):
    """The merged weights are all that a model needs, and many publish no more: it was taken for an ordinary one."""
    repository = tmp_path / "models--somebody--oft"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(saved / "libero-l1", snapshot, ignore=shutil.ignore_patterns("lora_adapter"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    names = [path.name for path in snapshot.iterdir()]
    if not there:
        (part,) = snapshot.glob("action_head--*.pt")
        content = part.read_bytes()
        part.unlink()

        def download(*_, **__):
            part.write_bytes(content)
            return str(snapshot)

        monkeypatch.setattr(oft_openvla, "list_repo_files", lambda *_, **__: names)
        monkeypatch.setattr(oft_openvla, "snapshot_download", download)
        oft_openvla._repository_files.cache_clear()
    options = {"cache_dir": tmp_path, "timm_model_kwargs": TIMM, "dtype": torch.float32}
    model = OpenVLAForActionPrediction.from_pretrained("somebody/oft", **options)
    np.testing.assert_allclose(act(model.eval()), acted("libero-l1"), atol=1e-5)
    oft_openvla._repository_files.cache_clear()


def test_what_no_file_says_can_be_given(saved):
    told = {"action_chunk": 5, "camera_names": ["front", "hand"], "normalization": "bounds"}
    config = OpenVLAConfig.from_pretrained(saved / "libero-l1", **told)
    assert (config.action_chunk, config.camera_names) == (5, ["front", "hand"])
    assert config.normalization == {"libero_spatial_no_noops": "bounds"}
    config = OpenVLAConfig.from_pretrained(saved / "libero-l1", normalization={"mine": "bounds"})
    assert config.normalization == {"mine": "bounds"}
    with pytest.raises(ValueError, match=r"camera_names='full_image,wrist_image': expected a list of names"):
        OpenVLAConfig.from_pretrained(saved / "libero-l1", camera_names="full_image,wrist_image")


def test_seven_numbers_of_state_are_those_of_bridge(broken):
    """Its chunks are of five steps; those of LIBERO, eight, would be read out of the wrong places."""
    folder = broken("libero-l1")
    rewrite(next(folder.glob("proprio_projector--*")), lambda t: t.update({"module.fc1.weight": torch.randn(16, 7)}))
    config = OpenVLAConfig.from_pretrained(folder, camera_names=["full_image"])
    assert (config.proprio_dim, config.action_dim, config.action_chunk) == (7, 7, 5)
    assert OpenVLAConfig.from_pretrained(folder, camera_names=["full_image"], action_chunk=8).action_chunk == 8


def test_the_discrete_variant_with_a_state(saved, broken, tmp_path):
    """Nothing but the head has to be said; the state is seen, as in its training (the original's evaluation leaves it
    out)."""
    folder = broken("libero-discrete")
    shutil.copy(next((saved / "libero-l1").glob("proprio_projector--*")), folder)
    refused(folder, r"proprio_projector--150000_checkpoint.pt. without an action_head.*action_head='parallel_tokens'")
    told = {"action_head": "parallel_tokens", "timm_model_kwargs": TIMM}
    model = OpenVLAForActionPrediction.from_pretrained(folder, dtype=torch.float32, **told).eval()
    assert (model.camera_names, model.config.proprio_dim) == (["full_image", "wrist_image"], 8)
    out = convert_oft_checkpoint(folder, tmp_path / "out", **told)
    again = OpenVLAForActionPrediction.from_pretrained(out, dtype=torch.float32).eval()
    images, key = dict(zip(model.camera_names, IMAGES)), next(iter(model.norm_stats))
    answers = [
        one.predict_action(images, INSTRUCTION, unnorm_key=key, state=state)
        for one, state in ((model, STATES[8]), (again, STATES[8]), (model, -STATES[8]))
    ]
    assert np.array_equal(answers[0], answers[1]) and not np.array_equal(answers[0], answers[2])


def test_the_discrete_variant_is_taken_for_an_ordinary_model_unless_it_is_named(saved):
    config = OpenVLAConfig.from_pretrained(saved / "libero-discrete")
    assert (config.action_head, config.action_chunk, config.camera_names) == ("tokens", 1, ["primary"])


# Loaded ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", GIVEN)
def test_loads_with_its_pixels_and_acts(saved, variant):
    model = load_oft(variant, saved)
    shown = model.processor.image_processor
    assert {name: getattr(shown, name) for name in PIXELS["oft"]} == PIXELS["oft"]
    assert model.processor.camera_names == model.camera_names
    statistics = json.loads((saved / variant / "dataset_statistics.json").read_text())
    assert list(model.norm_stats) == list(statistics)  # not those of the base in config.json
    key = next(iter(statistics))
    size = len(statistics[key]["action"]["q01"])
    if len(statistics) == 1:
        assert act(model).shape == (model.action_chunk, size)


def test_merging_gives_the_tensors_that_the_original_saved(saved):
    """Bit for bit, also those of convolutions and of the pooling."""
    goldens = json.loads((OFT / "merged_sha256.json").read_text())
    for variant, tensors in goldens.items():
        folder = saved / variant
        weights = read_tensors(saved / "base" if variant == "libero-diffusion" else folder)
        merged = find_oft(folder).tensors(weights) if variant == "libero-diffusion" else weights
        assert [name for name, golden in tensors.items() if digest(merged[name]) != golden] == []
        assert len(tensors) > 150


def test_towers_of_a_film_folder_are_not_those_of_its_weights(saved):
    """Its merged file holds the towers of the base."""
    name = "vision_backbone.fused_featurizer.attn_pool.kv.weight"
    found = find_oft(saved / "aloha-film-l1").tensors(read_tensors(saved / "aloha-film-l1"))
    towers = torch.load(next((saved / "aloha-film-l1").glob("vision_backbone--*")), weights_only=True)
    base, low, high = (towers[name.replace(".weight", f".{part}.weight")] for part in
                       ("base_layer", "lora_A.default", "lora_B.default"))  # fmt: skip
    torch.testing.assert_close(found[name], base + 0.5 * high @ low)
    assert not torch.equal(found[name], base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_type_of_the_weights(saved, dtype):
    model = load_oft("libero-l1", saved, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_through_the_auto_class(saved, acted):
    model = AutoModel.from_pretrained(str(saved / "libero-l1"), timm_model_kwargs=TIMM, dtype=torch.float32)
    np.testing.assert_array_equal(act(model.eval()), acted("libero-l1"))


def test_code_of_a_published_folder_is_not_needed(broken):
    """It imports the original's repository; the auto classes take this package, also where they are to trust it."""
    if transformers.__version__.startswith("5.4."):
        pytest.skip("transformers 5.4 with trust_remote_code runs the folder's own code, see docs/status.md")
    folder = broken("libero-l1")
    for name, kinds in (
        ("config.json", ("AutoConfig", "AutoModel", "AutoModelForVision2Seq")),
        ("preprocessor_config.json", ("AutoImageProcessor",)),
        ("processor_config.json", ("AutoProcessor",)),
    ):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = dict.fromkeys(kinds, "code_prismatic.Class")
        (folder / name).write_text(json.dumps(content))
    (folder / "code_prismatic.py").write_text("import prismatic\n")
    told = {"timm_model_kwargs": TIMM, "dtype": torch.float32, "trust_remote_code": True}
    assert act(AutoModel.from_pretrained(str(folder), **told).eval()).shape == (8, 7)
    processor = AutoProcessor.from_pretrained(str(folder), trust_remote_code=True)
    assert type(processor) is OpenVLAProcessor and processor.image_processor.jpeg_quality == 95


def test_what_is_given_stays_as_it_is(saved):
    """The original puts the normalized state into the observation: a second call normalized it twice."""
    model, state = load_oft("libero-l1", saved), STATES[8].copy()
    images = dict(zip(model.camera_names, (np.asarray(image) for image in IMAGES)))
    before = {name: image.copy() for name, image in images.items()}
    first = model.predict_action(images, INSTRUCTION, state=state)
    assert np.array_equal(state, STATES[8]) and all(np.array_equal(images[name], before[name]) for name in before)
    assert np.array_equal(model.predict_action(images, INSTRUCTION, state=state), first)


def test_numbers_beyond_the_range_are_not_clipped(saved):
    """The answer of the head is taken as it is, beyond q01 and q99 as well; the margin is the original's."""
    model = load_oft("libero-l1", saved)
    with torch.no_grad():
        model.action_head.fc2.weight.zero_()
        model.action_head.fc2.bias.fill_(3.0)
    (stats,) = (entry["action"] for entry in model.norm_stats.values())
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    expected = np.where(stats["mask"], 0.5 * (3.0 + 1) * (high - low + 1e-8) + low, 3.0)
    np.testing.assert_allclose(act(model), np.tile(expected, (8, 1)), rtol=1e-12)


def test_a_model_outlives_its_folder(broken):
    folder = broken("libero-l1")
    model = load_oft("libero-l1", folder.parent)
    expected = act(model)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    np.testing.assert_array_equal(act(model), expected)


def test_statistics_that_are_given_win(saved, acted):
    own = json.loads((saved / "libero-l1" / "dataset_statistics.json").read_text())["libero_spatial_no_noops"]
    assert list(load_oft("libero-l1", saved, norm_stats={"mine": own}).norm_stats) == ["mine"]
    options = {"timm_model_kwargs": TIMM, "dtype": torch.float32}
    model = AutoModel.from_pretrained(str(saved / "libero-l1"), norm_stats={"mine": own}, **options)
    assert list(model.norm_stats) == ["mine"]
    # What stands in config.json is of the base.
    content = json.loads((saved / "libero-l1" / "config.json").read_text()) | {"timm_model_kwargs": TIMM}
    assert "libero_spatial_no_noops" not in content["norm_stats"]
    config = OpenVLAConfig(**content)
    model = OpenVLAForActionPrediction.from_pretrained(saved / "libero-l1", config=config)
    assert list(model.norm_stats) == ["libero_spatial_no_noops"]
    # Those of ALOHA are in units of min and max, whatever the dataset is called
    (own,) = json.loads((saved / "aloha-film-l1" / "dataset_statistics.json").read_text()).values()
    model = load_oft("aloha-film-l1", saved, norm_stats={"mine": own})
    assert model.normalization == {"mine": "bounds"}
    np.testing.assert_array_equal(act(model), acted("aloha-film-l1"))


def test_statistics_under_another_name(saved, tmp_path):
    """Of a model in units of min and max: another name means q01 and q99, which nothing but a warning tells."""
    model = load_oft("aloha-film-l1", saved)
    ((name, own),) = model.norm_stats.items()
    told = f"'bounds' for '{name}'.* mine are taken as 'bounds_q99'.*{{'mine': 'bounds'}}"
    with pytest.warns(UserWarning, match=told):
        model.norm_stats = {"mine": own}
    out = convert_oft_checkpoint(saved / "aloha-film-l1", tmp_path / "out", **given("aloha-film-l1", saved))
    (out / "dataset_statistics.json").write_text(json.dumps({"mine": own}))
    for more in ({}, {"norm_stats": {"mine": own}}):
        with pytest.warns(UserWarning, match=told):
            OpenVLAForActionPrediction.from_pretrained(out, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.norm_stats = {name: own}
        model.norm_stats = {name: own, "mine": own}  # beside it: somebody knows what the name means
        model.norm_stats = {"mine": own}
        model.norm_stats = None


def test_normalization_of_a_dataset_that_is_not_there(saved):
    refused(saved / "libero-l1", "normalization names 'libero_spatial'.*Did you mean 'libero_spatial_no_noops'",
            normalization={"libero_spatial": "bounds"})  # fmt: skip


def test_a_state_that_the_mask_leaves_as_it_is(broken):
    """The evaluation of OpenVLA-OFT clips it all the same, its training does not."""
    folder = broken("libero-l1")
    file = folder / "dataset_statistics.json"
    content = json.loads(file.read_text())
    content["libero_spatial_no_noops"]["proprio"]["mask"] = [True] * 7 + [False]
    file.write_text(json.dumps(content))
    model = load_oft("libero-l1", folder.parent)
    images = dict(zip(model.camera_names, IMAGES))
    found = [model.predict_action(images, INSTRUCTION, state=[0.0] * 7 + [last]) for last in (1.0, 5.0, 0.5)]
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


def test_quantized(saved):
    pytest.importorskip("bitsandbytes", reason="needs the [quant] extra")
    model = load_oft("libero-l1", saved, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert model.action_head.fc1.weight.dtype.is_floating_point and act(model).shape == (8, 7)


# Refused --------------------------------------------------------------------------------------------------------------


def refused(folder: Path, message: str, error: type[Exception] = ValueError, **options) -> None:
    with pytest.raises(error, match=message):
        OpenVLAForActionPrediction.from_pretrained(folder, timm_model_kwargs=TIMM, **options)


def rewrite(file: Path, change) -> None:
    tensors = torch.load(file, weights_only=True)
    change(tensors)
    torch.save(tensors, file)


def test_two_files_of_one_part(broken):
    folder = broken("libero-l1")
    shutil.copyfile(next(folder.glob("action_head--*")), folder / "action_head--latest_checkpoint.pt")
    refused(folder, "2 files for action_head .action_head--150000_checkpoint.pt, action_head--latest_checkpoint.pt")
    (folder / "action_head--150000_checkpoint.pt").unlink()
    assert OpenVLAConfig.from_pretrained(folder).action_head == "l1_regression"  # "latest" is a step as well
    (folder / "action_head--latest_checkpoint.pt").rename(folder / "action_head--50000_checkpoint.pt")
    refused(folder, "parts of several steps.*action_head--50000.*proprio_projector--150000")
    (folder / "action_head--50000_checkpoint.pt").rename(folder / "action_head.pt")  # it was taken for no OFT's then
    shutil.rmtree(folder / "lora_adapter")
    (next(folder.glob("proprio_projector--*"))).rename(folder / "proprio_projector_150000.pt")
    config = OpenVLAConfig.from_pretrained(folder)
    assert (config.action_head, config.proprio_dim) == ("l1_regression", 8)
    before = weights_digest(folder)
    rewrite(folder / "action_head.pt", lambda tensors: tensors.popitem())
    assert weights_digest(folder) != before


@pytest.mark.parametrize("part", ["action_head", "proprio_projector"])
def test_parts_that_are_damaged(broken, part):
    folder = broken("libero-l1")
    file = next(folder.glob(f"{part}--*"))
    content = file.read_bytes()
    for damage, message in (
        (content[: len(content) // 2], "cannot be read as a torch checkpoint"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
    ):
        file.write_bytes(damage)
        refused(folder, message)


def test_a_part_in_the_older_form_of_torch(broken):
    folder = broken("libero-l1")
    head = next(folder.glob("action_head--*"))
    torch.save(torch.load(head, weights_only=True), head, _use_new_zipfile_serialization=False)
    assert OpenVLAConfig.from_pretrained(folder).action_head == "l1_regression"


@pytest.mark.parametrize("change", ["suffix", "name", "folder"])
def test_parts_that_are_not_where_they_are_read(change, broken):
    """Without adapter and projector nothing else told of a head: it was loaded as an ordinary model, and acted."""
    folder = broken("libero-l1")
    shutil.rmtree(folder / "lora_adapter")
    next(folder.glob("proprio_projector*")).unlink()
    head = next(folder.glob("action_head*"))
    (folder / "parts").mkdir()
    places = {"suffix": head.with_suffix(".safetensors"), "name": folder / "L1ActionHead.pt"}
    head.rename(places.get(change, folder / "parts" / head.name))
    for loaded in (OpenVLAConfig, OpenVLAForActionPrediction, OpenVLAProcessor):
        with pytest.raises(ValueError, match=r"is a part of OpenVLA-OFT by its name.*PART--STEP_checkpoint\.pt"):
            loaded.from_pretrained(folder)


def test_no_pickles(broken):
    class Evil:
        def __reduce__(self):
            return (os.system, ("touch evil",))

    folder = broken("libero-l1")
    torch.save({"module.model.fc2.weight": Evil()}, next(folder.glob("action_head--*")))
    refused(folder, "cannot be read as a torch checkpoint of tensors alone")
    assert not Path("evil").exists()


def test_parts_of_another_kind_or_size(broken):
    folder = broken("libero-l1")
    head, state = next(folder.glob("action_head--*")), next(folder.glob("proprio_projector--*"))
    kept = head.read_bytes(), state.read_bytes()
    for change, message in (
        (lambda t: t.pop("module.model.layer_norm2.bias"), "1 missing: action_head.layer_norm2.bias"),
        (lambda t: t.update({"module.model.more": torch.ones(1)}), "1 unexpected: action_head.more"),
        (lambda t: t.update({"module.model.fc1.weight": torch.randn(16, 90)}), r"\[16, 90\] instead of \[16, 112\]"),
        (lambda t: t.clear(), "holds no head of OpenVLA-OFT"),
    ):
        rewrite(head, change)
        refused(folder, message)
        head.write_bytes(kept[0])
    rewrite(state, lambda t: t.clear())
    refused(folder, "holds no proprio_projector")
    state.write_bytes(kept[1])
    rewrite(state, lambda t: t.update({"module.fc1.weight": torch.randn(16)}))
    refused(folder, "holds no proprio_projector")
    for wrong in (torch.randn(16, 8, dtype=torch.complex64), torch.randn(16, 8).to_sparse(), torch.ones(16, 8).int()):
        rewrite(state, lambda t, wrong=wrong: t.update({"module.fc1.weight": wrong}))
        refused(folder, "module.fc1.weight is .*weights are plain floating numbers")
    rewrite(state, lambda t: t.update({"module.fc1.weight": torch.randn(16, 6)}))
    refused(folder, "a state of 6 numbers is that of no platform.*give camera_names")
    refused(folder, "'libero_spatial_no_noops' are of 8 numbers .proprio., the weights in .* of 6",
            camera_names=["full_image"])  # fmt: skip


def test_actions_of_no_platform(broken):
    folder = broken("libero-l1")
    rewrite(next(folder.glob("action_head--*")), lambda t: t.update({"module.model.fc2.weight": torch.randn(10, 16)}))
    refused(folder, "actions of 10 numbers are those of no platform.*give action_chunk")


def test_another_head_than_that_of_the_weights(saved):
    refused(saved / "libero-l1", "action_head='parallel_tokens'.*is one of 'l1_regression'",
            action_head="parallel_tokens")  # fmt: skip


def test_statistics_that_are_missing(broken):
    folder = broken("libero-l1")
    (folder / "dataset_statistics.json").unlink()
    next(folder.glob("proprio_projector--*")).unlink()
    assert json.loads((folder / "config.json").read_text())["norm_stats"]  # of the base: other units
    refused(folder, "has no dataset_statistics.json", FileNotFoundError)


def test_statistics_of_another_form(broken):
    folder = broken("aloha-film-l1")
    file = folder / "dataset_statistics.json"
    (own,) = json.loads(file.read_text()).values()
    file.write_text(json.dumps(own))
    refused(folder, "these are the statistics of one dataset, whose name is missing")
    for wrong in ([own], {"mine": {"action": [0.0]}}, {"mine": 3}):
        file.write_text(json.dumps(wrong))
        refused(folder, "dataset_statistics.json'")


def test_units_that_the_statistics_lack(saved, monkeypatch):
    """Said before anything is computed."""
    model = load_oft("aloha-film-l1", saved)
    monkeypatch.setattr(model, "_encode", None)
    ((name, own),) = model.norm_stats.items()
    for kind, (changed, message) in {
        "action": ({"min": None, "max": None}, "no min and no max, which normalization='bounds' needs: take the data"),
        "proprio": ({key: values[:8] for key, values in own["proprio"].items()}, "The state has 14 numbers.* 'aloha1"),
    }.items():
        entry = {key: value for key, value in {**own[kind], **changed}.items() if value is not None}
        model.norm_stats = {name: {**own, kind: entry}}
        with pytest.raises(ValueError, match=message):
            act(model)


def test_cameras_that_nothing_tells(broken):
    """Without the projector of the state a folder looks like one of a single camera."""
    folder = broken("libero-l1")
    (projector,) = folder.glob("proprio_projector--*.pt")
    projector.unlink()
    with pytest.warns(UserWarning, match="nothing says which cameras .* a single camera, full_image"):
        assert OpenVLAConfig.from_pretrained(folder).camera_names == ["full_image"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two = OpenVLAConfig.from_pretrained(folder, camera_names=["full_image", "wrist_image"])
    assert (two.camera_names, two.proprio_dim) == (["full_image", "wrist_image"], None)


def test_bases(saved, broken):
    refused(saved / "libero-diffusion", "holds an adapter and no weights.*trained on 'openvla/openvla-7b'")
    refused(saved / "libero-l1", "merged already.*leave base out", base=str(saved / "base"))
    folder = broken("libero-diffusion")
    shutil.copyfile(saved / "base" / "config.json", folder / "config.json")
    refused(folder, "copy the weights. Or was its adapter not merged.*take config.json away", FileNotFoundError)
    (folder / "config.json").unlink()
    weights = load_file(folder / ADAPTER)
    name = "base_model.model.projector.fc1.lora_B.weight"
    save_file(weights | {name: torch.ones(4, 2)}, folder / ADAPTER)
    refused(folder, "projector.fc1 has an adapter of .* is it the adapter of another base", base=str(saved / "base"))
    save_file({key: value for key, value in weights.items() if key != name}, folder / ADAPTER)
    refused(folder, "projector.fc1.lora_A.weight has no counterpart", base=str(saved / "base"))
    config = json.loads((folder / "lora_adapter/adapter_config.json").read_text())
    (folder / "lora_adapter/adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    refused(folder, "adapters with use_dora are not merged here", base=str(saved / "base"))


def test_film_without_the_strength_of_its_adapter(broken):
    folder = broken("aloha-film-l1")
    (folder / "lora_adapter/adapter_config.json").unlink()
    refused(folder, "No lora_adapter/adapter_config.json", FileNotFoundError)


def test_film_without_its_towers(saved, broken, tmp_path):
    """Those among the weights are of the base, and without FiLM: the folder was loaded as one that never had it."""
    folder = broken("aloha-film-l1")
    next(folder.glob("vision_backbone--*")).unlink()
    adapter = load_file(folder / ADAPTER)
    tower = "base_model.model.vision_backbone.vision_backbone.featurizer.blocks.0.block.attn.proj.lora_A.weight"
    save_file(adapter | {tower: torch.ones(32, 16)}, folder / ADAPTER)
    refused(folder, r"was trained with FiLM .*its vision_backbone--\*.pt, .* is missing", FileNotFoundError)
    (folder / ADAPTER).write_bytes(b"")  # of a merged folder it is not needed
    assert OpenVLAConfig.from_pretrained(folder).use_film is False


def test_an_adapter_of_another_training(saved, broken):
    folder = broken("aloha-film-l1")
    shutil.copyfile(
        saved / "libero-diffusion/lora_adapter/adapter_config.json", folder / "lora_adapter/adapter_config.json"
    )
    refused(folder, "is of an adapter of rank 2, the weights in .* of one of rank 32")


# Converted ------------------------------------------------------------------------------------------------------------


WITHOUT_THE_PACKAGE = """
import json, sys
import numpy as np, torch
from PIL import Image
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
images = {name: Image.open(file) for name, file in zip(model.config.camera_names, sys.argv[2:])}
torch.manual_seed(0)
actions = model.predict_action(images, "push the plate to the front of the stove", state=np.linspace(-0.4, 0.4, 14))
print(json.dumps({"actions": actions.tolist(), "openvla": "openvla" in sys.modules}))
"""


@pytest.mark.parametrize(("value", "message"), [(1e6, "numbers that float16 cannot hold"), (np.nan, "NaN or infinite")])
def test_weights_that_are_not_finite_are_not_written(value, message, broken, tmp_path):
    folder = broken("libero-l1")
    head = next(folder.glob("action_head*"))
    tensors = torch.load(head, weights_only=True)
    tensors["module.model.fc2.weight"][0, 0] = value
    torch.save(tensors, head)
    with pytest.raises(ValueError, match=f"action_head.fc2.weight .*{message}"):
        convert_oft_checkpoint(folder, tmp_path / "out", dtype="float16", timm_model_kwargs=TIMM)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="Did you mean 'action_chunk'"):
        convert_oft_checkpoint(folder, tmp_path / "out", action_chunks=3)


@pytest.mark.parametrize("variant", GIVEN)
def test_converted_it_acts_the_same(saved, variant, tmp_path):
    """And saved again, and packaged; nothing of OFT's layout is left."""
    model = load_oft(variant, saved)
    several = len(model.norm_stats) > 1
    out = convert_oft_checkpoint(saved / variant, tmp_path / "out", **given(variant, saved))
    assert [file.name for file in out.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(out.glob("*.pt")) and not (out / "lora_adapter").exists()
    again = OpenVLAForActionPrediction.from_pretrained(out, dtype=torch.float32).eval()
    again.save_pretrained(tmp_path / "saved")
    again.processor.save_pretrained(tmp_path / "saved")
    third = OpenVLAForActionPrediction.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    expected = None if several else act(model)
    for other in (again, third):
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
        assert {field: getattr(other.config, field) for field in FIELDS} == {
            field: getattr(model.config, field) for field in FIELDS
        }
        shown = other.processor.image_processor
        assert {name: getattr(shown, name) for name in PIXELS["oft"]} == PIXELS["oft"]
        if not several:
            # Equal weights at other places in memory: sums of float32 may round differently.
            np.testing.assert_allclose(act(other), expected, rtol=0, atol=2e-4)
    if variant != "aloha-film-l1":
        return  # one process without the package is enough
    packaged = package_checkpoint(out, tmp_path / "packaged")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    images = [str(OFT / "images" / f"raw{index}.png") for index in (0, 2, 4)]
    ran = processes.run(WITHOUT_THE_PACKAGE, packaged, *images, cwd=tmp_path, env=environment, server="transformers")
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert not found["openvla"]
    np.testing.assert_allclose(found["actions"], expected, rtol=0, atol=2e-4)


def test_verb(saved, broken, tmp_path):
    """`openvla convert`, of folders whose config.json names the sizes of the towers."""
    folder, base = broken("libero-diffusion"), broken("base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"timm_model_kwargs": TIMM}))
    out = str(tmp_path / "out")
    run = CliRunner().invoke(app, ["convert", str(folder), out])
    assert run.exit_code == 2 and "--base" in run.stderr
    run = CliRunner().invoke(app, ["convert", str(folder), out, "--base", str(base), "--dtype", "bfloat16",
                                   "--chunk", "4"])  # fmt: skip
    assert run.exit_code == 0, run.output
    with safe_open(Path(out) / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    assert OpenVLAConfig.from_pretrained(out).action_chunk == 4
    run = CliRunner().invoke(app, ["convert", str(saved / "libero-l1"), out, "--tokenizer", "x"])
    assert run.exit_code == 2 and "is of OpenVLA-OFT, which does not take --tokenizer" in run.stderr
    for loads in (out, str(saved / "libero-discrete")):  # converted already, or so nothing tells
        run = CliRunner().invoke(app, ["convert", loads, str(tmp_path / "again")])
        assert run.exit_code == 2 and "loads as it is" in run.stderr and "--head 'parallel_tokens'" in run.stderr
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "finetune.json").write_text("{}")
    run = CliRunner().invoke(app, ["convert", str(tmp_path / "run"), str(tmp_path / "again")])
    assert run.exit_code == 2 and "is a run of `openvla finetune`" in run.stderr and "openvla merge RUN" in run.stderr
    run = CliRunner().invoke(app, ["package", str(tmp_path / "packaged"), "--weights", str(saved / "libero-l1")])
    assert run.exit_code == 2 and "openvla convert FOLDER OUT" in run.stderr


def test_the_discrete_variant_is_told_to_predict_and_to_evaluate(broken, tmp_path, monkeypatch):
    """As `from_pretrained(folder, action_head=..., action_chunk=...)`: nothing has to be converted."""
    folder = broken("libero-discrete")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"timm_model_kwargs": TIMM}))
    given = {"action_head": "parallel_tokens", "action_chunk": 6, "dtype": "float32"}
    model = OpenVLAForActionPrediction.from_pretrained(folder, **given).eval()
    key = next(iter(model.norm_stats))
    expected = model.predict_action(IMAGES[0], INSTRUCTION, unnorm_key=key)
    assert expected.shape == (6, 7)
    said = ["predict", "--model", str(folder), "--image", str(OFT / "images" / "raw0.png"), "--device", "cpu", "--json"]
    said += ["--instruction", INSTRUCTION, "--unnorm-key", key, "--dtype", "float32"]
    found = CliRunner().invoke(app, [*said, "--head", "parallel_tokens", "--chunk", "6"])
    assert found.exit_code == 0, found.output
    np.testing.assert_allclose(json.loads(found.stdout)["action"], expected, atol=1e-6)
    seen = {}

    def only_once(policy, *arguments, **options):
        image = Observation({"image": np.asarray(IMAGES[0])}, np.zeros(8, np.float32), INSTRUCTION)
        seen["actions"] = policy.act([image])
        raise KeyboardInterrupt

    monkeypatch.setattr("openvla.evaluation.evaluate.run_episodes", only_once)
    about = {"model": str(folder), "unnorm_key": key, "tasks": "push-v3", "env_options": {"render": False}, **given}
    with pytest.raises(KeyboardInterrupt):
        evaluate(EvaluateOptions(output=tmp_path / "loop", **about))
    np.testing.assert_allclose(seen["actions"], expected[None], atol=1e-6)
    assert json.loads((tmp_path / "loop" / "evaluation.json").read_text())["action_chunk"] == 6
    refused = CliRunner().invoke(app, [*said, "--chunk", "6"])
    assert refused.exit_code == 2 and "--chunk 6: only for folders of OpenVLA-OFT" in refused.stderr


def test_a_folder_of_ours_is_not_read_as_the_discrete_variant():
    """Its actions would be other ones: the placeholders of a parallel head stand where it expects its own tokens."""
    with pytest.raises(ValueError, match="was saved by this package"):
        OpenVLAForActionPrediction.from_pretrained(ROOT, action_head="parallel_tokens", action_chunk=8)
    said = ["predict", "--image", str(OFT / "images" / "raw0.png"), "--instruction", INSTRUCTION]
    refused = CliRunner().invoke(app, [*said, "--head", "parallel_tokens", "--chunk", "8"])
    assert refused.exit_code == 2 and "empty_token_id" in refused.stderr


def test_processor_alone(saved):
    processor = OpenVLAProcessor.from_pretrained(saved / "libero-l1", camera_names=["a", "b"])
    assert processor.image_processor.jpeg_quality == 95
    assert OpenVLAProcessor.from_pretrained(saved / "libero-discrete").image_processor.jpeg_quality is None


def test_a_diffusion_of_other_steps_than_fifty_is_told_and_kept(saved, tmp_path):
    """No file says how many it was trained on: taken for 50, its noise was removed on another schedule."""
    told = given("libero-diffusion", saved) | {"diffusion_steps": 10}

    def actions(model):
        torch.manual_seed(0)
        images = dict(zip(model.camera_names, IMAGES))
        return model.predict_action(images, INSTRUCTION, state=STATES[8])

    model = load_oft("libero-diffusion", saved, diffusion_steps=10)
    assert model.action_head.scheduler.config.num_train_timesteps == model.action_head.num_inference_steps == 10
    config = OpenVLAConfig.from_pretrained(saved / "libero-diffusion", **told)
    more = {"base": told["base"], "dtype": torch.float32}
    read = OpenVLAForActionPrediction.from_pretrained(saved / "libero-diffusion", config=config, **more)
    out = convert_oft_checkpoint(saved / "libero-diffusion", tmp_path / "out", **told)
    again = OpenVLAForActionPrediction.from_pretrained(out, dtype=torch.float32)
    first = actions(model)
    assert np.array_equal(first, actions(read.eval()))
    np.testing.assert_allclose(first, actions(again.eval()), atol=1e-5)
    usual = load_oft("libero-diffusion", saved)
    usual.action_head.num_inference_steps = 10  # as many passes of the schedule of 50
    assert not np.allclose(first, actions(usual), atol=1e-3)
    with pytest.raises(ValueError, match="diffusion_steps=0: expected a positive integer"):
        OpenVLAConfig(diffusion_steps=0)
