"""docs/extending.md: every block of the page runs, in its order, in one folder."""

import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
from data_files import own_rlds
from safetensors.torch import load_file, save_file
from test_modeling_openvla import small_config
from typer.testing import CliRunner

from openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.action_heads_openvla import HEADS, TokenHead, make_head
from openvla.cli import app
from openvla.configuration_openvla import OpenVLAConfig
from openvla.conversion import package_checkpoint, quantize_checkpoint
from openvla.conversion.hub_folder import code_files
from openvla.conversion.own_head import carry_head
from openvla.data import open_sources
from openvla.outputs_openvla import ActionPrediction
from openvla.plugins import load_class
from openvla.quantization_openvla import OpenVLAQuantizationConfig, quantize_linears
from openvla.sampling_openvla import Choice


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "extending.md"
MODULES = ("my_reader", "my_simulator", "my_head")
END = 2


def sections() -> dict[str, list[tuple[str, str]]]:
    """Of each section its blocks, (language, text) each."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    blocks = [re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL) for text in parts[2::2]]
    return dict(zip(parts[1::2], blocks, strict=True))


def run_block(language: str, text: str, names: dict) -> None:
    if file := re.match(r"# (\w+\.py)\n", text):
        Path(file[1]).write_text(text)
    elif language == "python":
        exec(compile(text, PAGE.name, "exec"), names)
    else:
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "openvla", line
            found = CliRunner().invoke(app, arguments)
            assert found.exit_code == 0, f"{line}\n{found.output}{found.exception!r}"


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the page leaves behind: the variables of each section, after all blocks ran."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("extending"))
        patch.setattr(sys, "path", [str(Path.cwd()), *(entry for entry in sys.path if entry)])
        patch.setitem(HEADS, "gripper_first", None)  # restored afterwards
        # What the page's --dry-run needs is not counted: a second; for such a reader in test_plugins.py
        patch.setattr("openvla.training.plan.estimate", lambda *_, **__: SimpleNamespace(describe=lambda: ""))
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        left: dict[str, dict] = {}
        for section, blocks in sections().items():
            left[section] = {}
            for language, text in blocks:
                run_block(language, text, left[section])
        yield left
        for name in MODULES:
            sys.modules.pop(name, None)


def test_every_section_has_examples_that_run(names):
    assert list(names) == ["A format", "A simulator", "A policy", "A camera", "A backbone", "A head"]
    assert all(sections().values())


def test_what_the_examples_make(names):
    assert names["A policy"]["report"]["mean_success"] == 1.0
    camera = names["A camera"]
    assert camera["model"].config.camera_names == ["primary", "wrist"] and camera["action"].shape == (7,)
    swapped = camera["model"].predict_action({"image": camera["hand"], "wrist": camera["scene"]}, "go home")
    assert camera["action"].tolist() != swapped.tolist()
    backbone = names["A backbone"]["model"]
    assert backbone.language_model.config.model_type == "qwen3" and len(backbone.vision_backbone.towers) == 2
    assert Path("my-policy/config.json").exists()


def test_the_head_of_the_page(names, monkeypatch):
    """It gives its targets back: training and prediction agree on the order."""
    model, action = (names["A head"][name] for name in ("model", "action"))
    head = model.action_head
    assert type(head).__name__ == "GripperFirst" and action.shape == (7,) and np.isfinite(action).all()
    wanted = np.linspace(-0.9, 0.9, 7)
    *tokens, _ = head.targets(wanted, END)
    decoded = head.tokenizer.decode(np.array(tokens))
    np.testing.assert_allclose(np.roll(decoded, -1), wanted, atol=1 / 128)
    assert abs(decoded[0] - 0.9) < 1 / 128  # the gripper comes first

    # A draft is in the order of what a prediction gave, and is decoded in that of the tokens.
    drafts = []

    def actions(self, model, inputs, shape, choice):
        drafts.append(choice.draft)
        return ActionPrediction(token_ids=np.arange(14).reshape(1, 2, 7))

    monkeypatch.setattr(TokenHead, "actions", actions)
    for draft in ([], [list(range(9))]):
        found = head.actions(None, None, (2, 7), Choice(draft=draft))
    head.actions(None, None, (2, 7), Choice(draft=[found.token_ids.reshape(-1).tolist(), []]))
    assert drafts == [[], [[6, 0, 1, 2, 3, 4, 5]], [list(range(14)), []]]


WITHOUT_THE_PACKAGE = """
import json, sys
import numpy as np
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
action = model.predict_action(np.full((16, 16, 3), 50, np.uint8), "go home")
print(json.dumps([type(model.action_head).__name__, "openvla" in sys.modules, action.tolist()]))
"""


def test_a_packaged_folder_brings_its_head(names, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    ran = processes.run(
        WITHOUT_THE_PACKAGE, Path("my-head-hub").resolve(), cwd=tmp_path, env=environment, server="transformers"
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    head, with_package, action = json.loads(ran.stdout.splitlines()[-1])
    assert (head, with_package) == ("GripperFirst", False)
    np.testing.assert_allclose(action, names["A head"]["action"], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("needs_more", "from openvla.training import finetune", "imports openvla.training, which a packaged folder"),
        ("needs_root", "from openvla import ActionTokenizer", "imports openvla, which a packaged folder"),
        ("pixels_openvla", "", "has the name of a file of this package"),
    ],
)
def test_heads_that_cannot_be_packaged(name, line, message, tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / f"{name}.py").write_text(
        f"from openvla.action_heads_openvla import TokenHead\n{line}\nclass Own(TokenHead): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(HEADS, "own", load_class(f"own.{name}:Own", "head", ["loss"]))
    (tmp_path / "folder").mkdir()
    for file in code_files():
        (tmp_path / "folder" / file).touch()
    with pytest.raises(ValueError, match=message):
        carry_head(tmp_path / "folder", "own")
    for module in ("own", f"own.{name}"):
        sys.modules.pop(module, None)


def test_a_module_that_is_not_there():
    refused = CliRunner().invoke(app, ["--import", "my_heda", "stats", "robot"])
    assert refused.exit_code == 2 and "--import my_heda: there is no module 'my_heda'" in refused.stderr
    for name in ("./my_head.py", ".my_head", ""):
        refused = CliRunner().invoke(app, ["--import", name, "stats", "robot"])
        assert refused.exit_code == 2 and f"{name!r} is no name of a module" in refused.stderr


def test_a_head_that_was_not_registered(monkeypatch):
    monkeypatch.delitem(HEADS, "gripper_first", raising=False)
    with pytest.raises(ValueError, match=r"action_head='gripper_first' is unknown.*HEADS"):
        make_head(OpenVLAConfig(action_head="gripper_first"))


WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LANGUAGE_MODELS = {
    "qwen2": {**WIDE, "num_key_value_heads": 2},
    "gemma2": {**WIDE, "num_key_value_heads": 2, "head_dim": 8},
    "gpt_neox": WIDE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "opt": {**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "biogpt": WIDE,  # its output layer is that of the embeddings, under a name of its own
    "mixtral": {**WIDE, "num_key_value_heads": 2, "num_local_experts": 2},
}


def small_model(model_type: str) -> OpenVLAForActionPrediction:
    """With the tokenizer, pixels and units of the embedded policy, random weights, and another language model."""
    processor = OpenVLAProcessor.from_pretrained(ROOT)
    images = processor.image_processor
    tower = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    fields = {
        "vocab_size": processor.tokenizer.vocab_size + 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = OpenVLAConfig(
        vision_backbone_id="mine",
        llm_backbone_id="mine",
        timm_model_ids=["vit_tiny_patch16_224"] * 2,
        image_sizes=[224] * 2,
        timm_model_kwargs=[tower] * 2,
        use_fused_vision_backbone=True,
        image_resize_strategy=images.image_resize_strategy,
        text_config={"model_type": model_type, **fields, **LANGUAGE_MODELS[model_type]},
        norm_stats=json.loads((ROOT / "dataset_statistics.json").read_text()),
    )
    model = OpenVLAForActionPrediction(config).eval()
    model.processor = processor
    return model


def test_rlds_with_a_transform_of_ones_own(tmp_path, monkeypatch):
    """What the original's users register; here a class of theirs, which the page describes."""
    (tmp_path / "my_rlds.py").write_text(
        "from openvla.data.formats.rlds import RLDSDataset\n"
        "def transform(trajectory):\n"
        "    half = trajectory['action'] * ([0.5] * 6 + [1.0])\n"
        "    return {**trajectory, 'action': half, 'language_instruction': [b'shut it'] * len(half)}\n"
        "class Mine(RLDSDataset):\n"
        "    def __init__(self, path, split='train', **options):\n"
        "        super().__init__(path, split, standardize=transform, **options)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = own_rlds(tmp_path / "robot")
    (source,), (plain,) = open_sources(str(folder), format="my_rlds:Mine"), open_sources(str(folder))
    assert source.dataset[0].instruction == "shut it" and plain.dataset[0].instruction == "open it"
    np.testing.assert_allclose(source.dataset[0].actions[:, :6], plain.dataset[0].actions[:, :6] / 2)
    assert source.statistics["action"]["q99"][:6] == [0.25] * 6 and list(source.dataset[0].images) == list(
        plain.dataset[0].images
    )


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
@pytest.mark.filterwarnings("ignore:`input_embeds` is deprecated")  # by BioGPT of transformers 5.4
def test_language_models_of_other_families_act(model_type):
    model = small_model(model_type)
    dark, light = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    both = model.predict_action([dark, light], ["open the drawer", "push the small puck"], return_dict=True)
    one = model.predict_action(dark, "open the drawer", return_dict=True)
    assert both.actions.shape == (2, 7) and both.token_ids[0].tolist() == one.token_ids.tolist()
    inputs = model.processor("In: a\nOut:", dark)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.language_model.parameters() if p.requires_grad)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "roberta"])
def test_other_language_models_read_in_both_directions(model_type, monkeypatch):
    """OPT counted positions by the mask, which is one of all pairs here, and ended in an error of torch. Those of
    RoBERTa begin behind the one of its padding."""
    monkeypatch.setitem(LANGUAGE_MODELS, "roberta", {**WIDE, "is_decoder": True})
    model = small_model(model_type)
    model.add_parts(action_head="parallel_tokens")
    model.config.action_chunk = 3
    seen = []
    if model_type == "roberta":
        positions = model.get_decoder().embeddings.position_embeddings
        positions.register_forward_pre_hook(lambda _, given: seen.append(int(given[0].min())))
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    both = model.predict_action(list(images), ["open the drawer", "push the small puck"], return_dict=True)
    one = model.predict_action(images[0], "open the drawer", return_dict=True)
    np.testing.assert_allclose(both.token_probabilities[0], one.token_probabilities, rtol=1e-4)
    with torch.no_grad():  # the end of the sequence is seen by the first action
        model.get_input_embeddings().weight[2] += torch.linspace(-9, 9, 32) ** 2
    again = model.predict_action(images[0], "open the drawer", return_dict=True)
    assert again.token_entropies[0, 0] != one.token_entropies[0, 0]
    assert set(seen) <= {1}


def test_positions_that_have_a_direction():
    config = {"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 400}
    with pytest.raises(ValueError, match=r"'l1_regression' reads in both directions.*'bloom'.*ALiBi.*'tokens'"):
        OpenVLAForActionPrediction(small_config(text_config=config, action_head="l1_regression", action_dim=7))
    model = OpenVLAForActionPrediction(small_config(text_config=config))
    with pytest.raises(ValueError, match="reads in both directions"):
        model.add_parts(action_head="parallel_tokens")
    assert model.config.action_head == "tokens"


@pytest.mark.parametrize("model_type", ["gpt_neox", "mixtral", "biogpt"])
@pytest.mark.filterwarnings("ignore:.* of the weights can have 8 bits", "ignore:`input_embeds` is deprecated")
def test_language_models_that_the_library_stores_under_other_names(model_type, tmp_path):
    """Or without the output layer: `package` and `quantize` said that config.json was of another model."""
    model = small_model(model_type)
    model.save_pretrained(tmp_path / "own")
    model.processor.save_pretrained(tmp_path / "own")
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    packaged = package_checkpoint(tmp_path / "own", tmp_path / "packaged")
    acted = OpenVLAForActionPrediction.from_pretrained(packaged).predict_action(image, "open the drawer")
    np.testing.assert_array_equal(acted, model.predict_action(image, "open the drawer"))

    quantized = OpenVLAForActionPrediction.from_pretrained(quantize_checkpoint(packaged, tmp_path / "small"))
    assert isinstance(quantized.get_output_embeddings(), torch.nn.Linear)
    quantize_linears(model, OpenVLAQuantizationConfig(8))
    np.testing.assert_array_equal(
        quantized.predict_action(image, "open the drawer"), model.predict_action(image, "open the drawer")
    )
    weights = load_file(packaged / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "layers.1." not in name}, packaged / "model.safetensors"
    )
    with pytest.raises(
        ValueError, match=r"missing: [a-z_.]*layers\.1\.\S*, [^;]*\. Likely cause: the weights are incomp"
    ):
        quantize_checkpoint(packaged, tmp_path / "incomplete")
