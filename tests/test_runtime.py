"""`openvla export --to onnx` and `packages/openvla-runtime`, which acts with it where there is no torch."""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openvla_runtime import OnnxPolicy
from openvla_runtime import __version__ as runtime_version
from openvla_runtime.sessions import open_session
from tiny import TINY, TinyCheckpoint
from wheels import build

import openvla
from openvla import OpenVLAConfig, OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.conversion import export_onnx, export_prismatic_checkpoint, quantize_checkpoint
from openvla.conversion.onnx_export import MINIMUM_TORCH, check_exportable
from openvla.conversion.onnx_graphs import Int8Product
from openvla.folders import write_json
from openvla.int8_linear_openvla import Int8Linear


for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason="needs the [onnx] extra")

if tuple(map(int, torch.__version__.split(".")[:2])) < MINIMUM_TORCH:
    pytest.skip("older torch cannot trace the graphs", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = ROOT / "packages/openvla-runtime"
FRAMES = json.loads((ROOT / "examples/frames/frames.json").read_text())
STATE = np.array([0.1, 0.6, 0.2, 0, 0, 0, 0, 0.5])

WORDS = {"model": {"type": "none that there is"}}

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "transformers", "timm", "openvla", "onnx"):
            raise ModuleNotFoundError(f"{name} is not here")
sys.meta_path.insert(0, Blocked())
"""
ACT = """
import numpy, json
from openvla_runtime import OnnxPolicy
policy = OnnxPolicy(sys.argv[1], threads=1)
image = numpy.full((48, 64, 3), 90, numpy.uint8)
print(json.dumps(policy.predict(image, "open the drawer", state=json.loads(sys.argv[2])).token_ids.tolist()))
"""


def write_small(folder: Path, **text: Any) -> Path:
    """A model of random weights, two steps and a state, with the embedded policy's tokenizer, pixels and units."""
    config = OpenVLAConfig.from_pretrained(ROOT)
    config.action_chunk, config.proprio_dim = 2, 8
    config.timm_model_kwargs = [{**sizes, "depth": 2, "embed_dim": 48} for sizes in config.timm_model_kwargs]
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 12,
        "initializer_range": 0.4,
    }
    fields = {**config.to_dict(), "text_config": {**config.text_config.to_dict(), **sizes, **text}}
    torch.manual_seed(3)
    OpenVLAForActionPrediction(OpenVLAConfig.from_dict(fields)).save_pretrained(folder)
    OpenVLAProcessor.from_pretrained(ROOT).save_pretrained(folder)
    shutil.copyfile(ROOT / "dataset_statistics.json", folder / "dataset_statistics.json")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_small(tmp_path_factory.mktemp("runtime") / "model", num_key_value_heads=2)


@pytest.fixture(scope="module")
def exported(small) -> Path:
    return export_onnx(small, small.with_name("exported"))


@pytest.fixture(scope="module")
def model(small) -> OpenVLAForActionPrediction:
    return OpenVLAForActionPrediction.from_pretrained(small).eval()


@pytest.fixture(scope="module")
def policy(exported) -> OnnxPolicy:
    return OnnxPolicy(exported, threads=1)


def frames(count: int) -> list[np.ndarray]:
    """Camera frames that change slowly."""
    generator = np.random.default_rng(0)
    image, frames = generator.uniform(0, 255, (12, 16, 3)), []
    for _ in range(count):
        image = np.clip(image + generator.normal(0, 6, image.shape), 0, 255)
        frames.append(np.kron(image, np.ones((4, 4, 1))).astype(np.uint8))
    return frames


# The same as the model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_the_tokens_of_the_model(provider, exported, model):
    if provider == "openvino":
        pytest.importorskip("openvino")
    policy = OnnxPolicy(exported, provider=provider, threads=1)
    plain = OnnxPolicy(exported, provider=provider, threads=1, drafts=False)
    passes = set()
    for index, image in enumerate(np.repeat(frames(6), 2, axis=0)):  # each twice, the second time with a right draft
        state = STATE + index // 2 * 0.01
        instruction = f"Open  the {'drawer' if index < 6 else 'window'}, <s> 抽屉"
        expected = model.predict_action(image, instruction, state=state, return_dict=True)
        for one in (policy, plain):
            found = one.predict(image, instruction, state=state, executed=0 if index % 2 else None)
            assert found.token_ids.tolist() == expected.token_ids.tolist()
            assert found.actions.tolist() == expected.actions.tolist() and found.actions.dtype == np.float64
            assert found.normalized_actions.tolist() == expected.normalized_actions.tolist()
            np.testing.assert_allclose(found.token_probabilities, expected.token_probabilities, atol=2e-4)
            np.testing.assert_allclose(found.token_entropies, expected.token_entropies, atol=1e-3)
            passes.add(found.passes)
        assert found.passes == 14  # without drafts as many as tokens
    assert 1 in passes


def test_prompts_and_pixels_are_those_of_the_processor(policy, model):
    processor = model.processor
    for text in ("open the drawer", "öffne die Schublade 抽屉 🤖 </s>", "Lift\tthe LID", FRAMES[0]["instruction"]):
        assert policy.prompt_ids(text, 14) == processor.prompt_ids(text)
    actions = processor.tokenizer.convert_ids_to_tokens([900])[0]  # a character that stands for a motion
    assert policy.prompt_ids(f"draw {actions}", 14) == processor.prompt_ids(f"draw {actions}")
    image = ROOT / "examples/frames" / FRAMES[0]["file"]
    expected = processor.image_processor(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(policy.pixel_values([image]), expected)


def test_a_draft_costs_passes_and_changes_nothing(policy):
    """After a wrong token: another pass, with the right one in its place and behind it what the model chose."""
    image = frames(1)[0]
    policy.reset()
    right = policy.predict(image, "open the drawer", state=STATE)
    assert right.passes == 14
    assert policy.predict(image, "open the drawer", state=STATE, executed=0).passes == 1
    for wrong in range(14):
        draft = right.token_ids.copy().reshape(-1)
        draft[wrong] = 700 if draft[wrong] != 700 else 701
        policy._draft = draft.reshape(2, 7)
        found = policy.predict(image, "open the drawer", state=STATE, executed=0)
        assert found.token_ids.tolist() == right.token_ids.tolist()
        assert found.passes == 1 if wrong == 13 else 2 <= found.passes <= 14 - wrong
    policy._draft = np.full((2, 7), 700)
    assert policy.predict(image, "open the drawer", state=STATE).token_ids.tolist() == right.token_ids.tolist()


def test_what_a_caller_writes_into_a_prediction_is_no_draft(policy):
    """It was the next one, whatever it held: as many passes as tokens."""
    image = frames(1)[0]
    policy.reset()
    first = policy.predict(image, "open the drawer", state=STATE)
    expected = first.token_ids.tolist()
    first.token_ids[:] = -1
    again = policy.predict(image, "open the drawer", state=STATE, executed=0)
    assert again.token_ids.tolist() == expected and again.passes == 1


def test_a_number_of_steps_is_looked_at_before_anything_is_computed(policy, monkeypatch):
    policy.predict(frames(1)[0], "open the drawer", state=STATE)
    monkeypatch.setattr(policy, "_vision", None)
    with pytest.raises(ValueError, match="executed=3: expected a number of steps from 0 to 2"):
        policy.predict(frames(1)[0], "open the drawer", state=STATE, executed=3)
    assert policy._draft is not None


def test_an_episode_begins_after_what_runs_has_ended(policy):
    """Of another thread: its tokens were the first draft of the new episode."""
    with policy._lock:  # a prediction
        resetting = threading.Thread(target=policy.reset)
        resetting.start()
        resetting.join(0.05)
        policy._draft = np.zeros((1, 7), np.int64)
    resetting.join(10)
    assert policy._draft is None


def test_what_remains_of_a_chunk_is_the_draft(policy, monkeypatch):
    policy._draft = np.arange(700, 714).reshape(2, 7)
    assert policy._shifted((2, 7), 0) == [*range(700, 714)]
    assert policy._shifted((2, 7), 1) == policy._shifted((2, 7), None) == [*range(707, 714)] * 2
    middle = policy.action_tokenizer.encode(np.zeros(7)).tolist()
    assert policy._shifted((1, 7), None) == middle  # of a model of another dataset
    assert policy._shifted((2, 7), np.int64(1)) == policy._shifted((2, 7), 1)  # a difference of counted steps
    for executed in (3, -1, True, 1.0):
        with pytest.raises(ValueError, match="from 0 to 2"):
            policy._shifted((2, 7), executed)
    policy.reset()
    assert policy._shifted((2, 7), None) == middle * 2
    monkeypatch.setattr(policy, "drafts", False)
    assert policy._shifted((1, 7), None) == []


# Without torch --------------------------------------------------------------------------------------------------------


def act_without_torch(packages: Path, exported: Path) -> list:
    arguments = [sys.executable, "-c", BLOCKED + f"sys.path.insert(0, {str(packages)!r})" + ACT, exported]
    done = subprocess.run([*arguments, json.dumps(STATE.tolist())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_acts_where_torch_is_missing(exported, model):
    image = np.full((48, 64, 3), 90, np.uint8)
    expected = model.predict_action(image, "open the drawer", state=STATE, return_dict=True).token_ids
    assert act_without_torch(RUNTIME, exported) == expected.tolist()


ENDED = """
import signal, sys
from openvla_runtime import OnnxPolicy
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
first = OnnxPolicy(sys.argv[1], threads=1, provider="openvino")
second = OnnxPolicy(sys.argv[1], threads=1, provider="openvino")
del first, second
try:
    signal.raise_signal(signal.SIGINT)  # sent to the process, another thread may take it
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_program_is_interrupted_after_its_policies_are_gone(exported):
    """OpenVINO gives a thread another stack for signals. It was gone with the policy, and Ctrl-C a crash: nothing that
    stops an arm ran any more."""
    pytest.importorskip("openvino", reason="needs openvino")
    program = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(RUNTIME)!r})" + ENDED, exported]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "interrupted"), done.stderr


def test_the_wheel_holds_the_shared_files(exported, tmp_path):
    """From the checkout, and from the sdist."""
    pytest.importorskip("hatchling")
    source = build(RUNTIME, "sdist", tmp_path / "sdist")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    wheels = [
        build(RUNTIME, "wheel", tmp_path / "wheel"),
        build(tmp_path / source.name.removesuffix(".tar.gz"), "wheel", tmp_path / "again"),
    ]
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".py")]
            for name in names:
                shared = ROOT / Path(name).name
                place = RUNTIME / name if (RUNTIME / name).exists() else shared
                assert archive.read(name) == place.read_bytes(), name
            assert {f"openvla_runtime/{name}.py" for name in shared_files()} < set(names)
            archive.extractall(tmp_path / "installed")
    assert len(act_without_torch(tmp_path / "installed", exported)) == 2
    assert not list((RUNTIME / "openvla_runtime").glob("*_openvla.py"))  # nothing is left behind


def shared_files() -> tuple[str, ...]:
    tree = ast.parse((RUNTIME / "hatch_build.py").read_text())
    (shared,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SHARED"
    )
    return ast.literal_eval(shared)


def test_shared_files_are_those_that_are_imported_and_need_no_torch():
    needed, waiting = set(), {"policy", "sessions", "decoding"}
    while waiting:
        name = waiting.pop()
        own = RUNTIME / "openvla_runtime" / f"{name}.py"
        tree = ast.walk(ast.parse((own if own.exists() else ROOT / f"{name}.py").read_text()))
        modules = {str(node.module) for node in tree if isinstance(node, ast.ImportFrom) and node.level}
        needed |= {module for module in modules if not (RUNTIME / "openvla_runtime" / f"{module}.py").exists()}
        waiting |= modules & needed - {name} if own.exists() else modules - needed
        if not own.exists():
            needed |= modules
            waiting |= modules
    assert needed == set(shared_files())
    assert runtime_version == openvla.__version__


# What is refused ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_acted_on(policy, model, monkeypatch):
    image = frames(1)[0]
    for error, message, call in (
        (ValueError, "No image given", lambda: policy.act(None, "open the drawer", state=STATE)),
        (ValueError, "No instruction given", lambda: policy.act(image, None, state=STATE)),
        (ValueError, "The instruction is empty", lambda: policy.act(image, " ", state=STATE)),
        (ValueError, "shorten the instruction", lambda: policy.act(image, "a drawer " * 200, state=STATE)),
        (ValueError, "one robot", lambda: policy.act([image] * 2, ["open", "close"], state=STATE)),
        (ValueError, "sees the state", lambda: policy.act(image, "open the drawer")),
        (
            ValueError,
            "holds NaN or infinity, expected finite numbers",
            lambda: policy.act(image, "open the drawer", state=STATE * np.nan),
        ),
        (ValueError, "finite numbers", lambda: policy.act(image, "open the drawer", state=STATE[:7])),
        (ValueError, "expected 8 numbers", lambda: policy.act(image, "open the drawer", state=["1"] * 8)),
        (ValueError, "expected 8 numbers", lambda: policy.act(image, "open the drawer", state=STATE * 1j)),
        (ValueError, "NaN or infinite pixels", lambda: policy.act(image * np.nan, "open the drawer", state=STATE)),
        (KeyError, "Did you mean 'metaworld'", lambda: policy.act(image, "open", unnorm_key="metaworl", state=STATE)),
        (FileNotFoundError, "No image file", lambda: policy.act("none.png", "open the drawer", state=STATE)),
    ):
        with pytest.raises(error, match=message):
            call()
    for unknown in (np.ma.masked_array(STATE, [True] + [False] * 7), STATE > 0.1, [True, *STATE[1:]]):
        for acting in (policy.act, model.predict_action):
            with pytest.raises(ValueError, match="has masked numbers, or True and False among them: give 8 numbers"):
                acting(image, "open the drawer", state=unknown)
    broken = {"features": np.full((1, 50, 48), np.nan, np.float32)}
    monkeypatch.setattr(policy._vision, "run", lambda values: broken)
    with pytest.raises(ValueError, match="NaN or infinite values"):
        policy.act(image, "open the drawer", state=STATE)
    assert policy._draft is None


def test_folders_that_are_no_export(exported, tmp_path):
    def damaged(name: str, change) -> Path:
        folder = tmp_path / name
        shutil.copytree(exported, folder)
        change(folder)
        return folder

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    def fields(**changed):
        return lambda folder: write_json(
            folder / "runtime.json", {**json.loads((exported / "runtime.json").read_text()), **changed}
        )

    content = json.loads((exported / "runtime.json").read_text())
    pixels, config = content["pixels"], content["config"]
    text = {**config["text_config"], "max_position_embeddings": "x"}
    for error, message, folder in (
        (FileNotFoundError, "openvla export MODEL FOLDER --to onnx", tmp_path),
        (ValueError, "format_version 2", damaged("newer", fields(format_version=2))),
        (ValueError, "is damaged", damaged("fields", fields(pixels={}))),
        (ValueError, "means is .]", damaged("means", fields(pixels={**pixels, "means": []}))),
        (ValueError, "pixels.do_resize is None", damaged("resize", fields(pixels={**pixels, "do_resize": None}))),
        (ValueError, "no place for the .instruction", damaged("prompt", fields(prompt_template="Out:"))),
        (ValueError, "constant_state='mean'", damaged("constant", fields(constant_state="mean"))),
        (ValueError, "num_patches is '8'", damaged("patches", fields(num_patches="8"))),
        (ValueError, "action_chunk is 0", damaged("chunk", fields(config={**config, "action_chunk": 0}))),
        (ValueError, "empty_token_id is -1", damaged("empty", fields(config={**config, "empty_token_id": -1}))),
        (
            ValueError,
            "max_position_embeddings is 'x'",
            damaged("longest", fields(config={**config, "text_config": text})),
        ),
        (ValueError, "camera_names is .3]", damaged("cameras", fields(camera_names=[3]))),
        (ValueError, "rescale_factor is 0", damaged("scale", fields(pixels={**pixels, "rescale_factor": 0}))),
        (ValueError, "tells of other images", damaged("two", fields(camera_names=["primary", "wrist"]))),
        (ValueError, "another state", damaged("state", fields(config={**config, "proprio_dim": 7}))),
        (
            ValueError,
            "not a finite number",
            damaged("units", fields(statistics={"a": {"action": {"q01": [None], "q99": [1]}}})),
        ),
        (FileNotFoundError, "No graph at", damaged("graph", lambda folder: (folder / "vision.onnx").unlink())),
        (ValueError, "another export", damaged("cut", lambda folder: (folder / "vision.onnx").write_bytes(b"x" * 99))),
        (ValueError, "another export", damaged("bit", lambda folder: flip(folder / "language_model.onnx.data"))),
        (FileNotFoundError, "vision.onnx.data", damaged("data", lambda folder: (folder / "vision.onnx.data").unlink())),
        (ValueError, "is damaged", damaged("digests", fields(files=[]))),
        (ValueError, "another export", damaged("words", lambda folder: write_json(folder / "tokenizer.json", WORDS))),
        (
            ValueError,
            "is damaged .'vision.onnx'",
            damaged("unknown", fields(files=dict(list(content["files"].items())[:3]))),
        ),
    ):
        with pytest.raises(error, match=message):
            OnnxPolicy(folder)
    with pytest.raises(FileNotFoundError, match="'me/robot' holds no runtime.json.*hf download ID --local-dir FOLDER"):
        OnnxPolicy("me/robot")
    for nothing in (None, 3, b"exported"):
        with pytest.raises(ValueError, match="folder=.*: expected the path of a folder"):
            OnnxPolicy(nothing)
    with pytest.raises(ValueError, match="Did you mean 'cuda'"):
        OnnxPolicy(exported, provider="cudaa")
    with pytest.raises(ValueError, match="not in this build"):
        OnnxPolicy(exported, provider="coreml" if sys.platform != "darwin" else "directml")
    with pytest.raises(KeyError, match="unnorm_key"):
        OnnxPolicy(exported, "none")
    for threads in (0, -1, True, "2", 1.5, 10**6):
        with pytest.raises(ValueError, match="threads=.*from 1 to 1024"):
            OnnxPolicy(exported, threads=threads)
    with pytest.raises(ValueError, match="drafts='no': expected True"):
        OnnxPolicy(exported, drafts="no")


def test_a_provider_is_what_was_asked_for(exported, monkeypatch):
    """ONNX Runtime takes the CPU where libraries of a GPU are missing, and fewer bits on a GPU than in the graph."""
    import onnxruntime

    made, started = [], ["CUDAExecutionProvider", "CPUExecutionProvider"]

    class Session(onnxruntime.InferenceSession):
        def __init__(self, file, options, providers):
            made.append(providers)
            super().__init__(file, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return started

    there = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    assert OnnxPolicy(exported, provider="cuda").drafts
    assert made[0] == [("CUDAExecutionProvider", {"use_tf32": "0"}), ("CPUExecutionProvider", {})]
    started[0] = "TensorrtExecutionProvider"
    assert not OnnxPolicy(exported, provider="tensorrt").drafts
    del started[0]
    with pytest.raises(ValueError, match="provider='cuda' could not be started"):
        OnnxPolicy(exported, provider="cuda")


def test_files_of_the_hubs_cache_are_links(exported, tmp_path):
    """Out of the folder, where OpenVINO does not follow them: another export has them as well."""
    snapshot = tmp_path / "snapshots" / "a"
    snapshot.mkdir(parents=True)
    for file in exported.iterdir():
        (snapshot / file.name).symlink_to(file)
    expected = OnnxPolicy(exported, threads=1).act(frames(1)[0], "open the drawer", state=STATE)
    assert (OnnxPolicy(snapshot, threads=1).act(frames(1)[0], "open the drawer", state=STATE) == expected).all()
    pytest.importorskip("openvino", reason="needs openvino")
    try:
        found = OnnxPolicy(snapshot, threads=1, provider="openvino").act(frames(1)[0], "open the drawer", state=STATE)
    except ValueError as error:  # since 2026
        assert "snapshot_download(..., local_dir=FOLDER)" in str(error)
    else:
        np.testing.assert_allclose(found, expected)


def test_products_of_8_bits_are_those_of_the_model(tmp_path):
    """A draft changed what was chosen: one step held for all that was read together. And ONNX Runtime's largest number
    passes over NaN, which was a number afterwards."""
    torch.manual_seed(0)
    layer = Int8Linear(96, 40)
    layer.load_state_dict({**Int8Linear.quantize(torch.randn(40, 96)), "bias": torch.randn(40)})
    rows = torch.export.Dim.DYNAMIC
    torch.onnx.export(
        Int8Product(layer), (torch.randn(1, 7, 96),), tmp_path / "product.onnx", dynamo=True, input_names=["x"],
        output_names=["y"], dynamic_shapes=({1: rows},), verbose=False,
    )  # fmt: skip
    session = open_session(tmp_path / "product.onnx", "cpu", 1, of_8_bits=True)
    x = torch.randn(1, 9, 96) * torch.logspace(-3, 3, 9)[:, None]
    found = session.run({"x": x.numpy()})["y"]
    expected = Int8Product(layer)(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - (x @ layer.dequantize(torch.float32).T + layer.bias).numpy()).std() < 0.02 * found.std()
    for row in range(9):
        np.testing.assert_array_equal(session.run({"x": x[:, row : row + 1].numpy()})["y"], found[:, row : row + 1])
    for place in (0, 5, 95):
        for value in (np.nan, np.inf, -np.inf):
            x[0, 4, place] = value
            assert np.isfinite(session.run({"x": x.numpy()})["y"]).all(-1).tolist() == [[row != 4 for row in range(9)]]


def test_a_folder_of_8_bits(small, tmp_path, monkeypatch):
    """It was refused, and an export in int8 rounded otherwise than the model: 83% of its actions, 63% with drafts."""
    source = quantize_checkpoint(small, tmp_path / "of 8 bits", towers=True)
    with pytest.raises(ValueError, match="holds weights of 8 bits, which are exported in int8: leave dtype='float16'"):
        export_onnx(source, tmp_path / "out", dtype="float16")
    model = OpenVLAForActionPrediction.from_pretrained(source).eval()
    folder, told = export_onnx(source, tmp_path / "out"), []
    monkeypatch.setattr("openvla_runtime.sessions.needs_wide_sums", lambda: told.append(True))
    plain, drafting = (OnnxPolicy(folder, threads=1, drafts=drafts) for drafts in (None, True))
    assert (plain.dtype, plain.drafts, len(told)) == (
        "int8",
        False,
        4,
    )  # of both graphs: sums that do not fit are wrong
    for image in frames(3):
        expected = model.predict_action(image, "open the drawer", state=STATE, return_dict=True)
        for policy in (plain, drafting, drafting):
            found = policy.predict(image, "open the drawer", state=STATE, executed=0)
            shares = found.token_probabilities[0, 0], expected.token_probabilities[0, 0]  # those behind follow others
            np.testing.assert_allclose(*shares, rtol=0.05)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [(1e6, "float16", "float16 cannot hold"), (np.nan, "float32", "NaN or infinite"), (np.inf, "int8", "not finite")],
)
def test_weights_that_a_graph_cannot_hold(value, dtype, message, small, tmp_path):
    """The export was written, and every action of it an error."""
    model = OpenVLAForActionPrediction.from_pretrained(small)
    with torch.no_grad():
        model.language_model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    source = shutil.copytree(small, tmp_path / "model")
    model.save_pretrained(source)
    with pytest.raises(ValueError, match=rf"language_model.model.layers.1.mlp.up_proj.* {message}"):
        export_onnx(source, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_what_is_not_exported(small, tmp_path, monkeypatch):
    config = OpenVLAConfig.from_pretrained(small)
    for name, value, message in (
        ("action_head", "parallel_tokens", "only token heads"),
        ("quantization_config", {"load_in_8bit": True}, "not in 8 bits of ours"),
        ("use_film", True, "have FiLM"),
    ):
        changed = OpenVLAConfig.from_dict(config.to_dict())
        setattr(changed, name, value)
        with pytest.raises(ValueError, match=message):
            check_exportable(changed)
    config.text_config.sliding_window = 16
    with pytest.raises(ValueError, match="sliding_window"):
        check_exportable(config)
    config.text_config.sliding_window = 0  # of Qwen2 MoE: none
    check_exportable(config)
    config.text_config.sliding_window = None
    config.text_config.window_size = 16  # of GPT-Neo: with a wrong draft between them, tokens saw less far
    config.text_config.attention_layers = ["global", "local"]
    with pytest.raises(ValueError, match="sees 16 positions back only .window_size"):
        check_exportable(config)
    config.text_config.attention_layers = ["global", "global"]
    check_exportable(config)
    for field, value, causal in (("is_causal", False, True), ("use_bidirectional_attention", True, None)):
        setattr(config.text_config, field, value)
        with pytest.raises(ValueError, match="sees behind a position"):
            check_exportable(config)
        setattr(config.text_config, field, causal)
    for kind in ("dynamic", "longrope"):
        rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
        for parameters in (rope, {"full_attention": {"rope_type": "default"}, "sliding_attention": rope}):
            config.text_config.rope_parameters = parameters
            with pytest.raises(ValueError, match=f"rope_type='{kind}'"):
                check_exportable(config)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="dtype='bfloat16' is unknown"):
        export_onnx(small, out, dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype='int8' is unknown"):
        export_prismatic_checkpoint(small, out, dtype="int8")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(ValueError, match="openvla merge RUN OUT"):
        export_onnx(adapter, out)
    with pytest.raises(ValueError, match="is not of an ONNX export"):
        export_onnx(small, shutil.copytree(small, tmp_path / "other"), overwrite=True)
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else there(name))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'openvla\[onnx\]'"):
        export_onnx(small, out)
    assert not out.exists()


def test_a_language_model_that_torch_makes_no_graph_of(small, tmp_path, monkeypatch):
    """Bloom, Falcon, Mixtral: a page of torch's exporter, which asked to file an issue there."""

    def export(*_, **__):
        raise torch.onnx.OnnxExporterError("This is step 1/3") from TypeError("no such shape")

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(
        ValueError, match=r"makes no graph of it \(vision.onnx; TypeError: no such shape\). Predict with"
    ):
        export_onnx(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_processor_of_another_model_is_told_before_anything_is_written(small, tmp_path, monkeypatch):
    """After both graphs were: of a 7B minutes later."""
    source = shutil.copytree(small, tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    write_json(source / "config.json", {**config, "pad_to_multiple_of": config["pad_to_multiple_of"] + 8})
    monkeypatch.setattr("openvla.conversion.onnx_export.write_vision", lambda *_: pytest.fail("written"))
    with pytest.raises(ValueError, match="The tokenizer has .* tokens of its own, the model expects"):
        export_onnx(source, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_full_disk_names_the_file_and_leaves_no_folder(dtype, small, tmp_path):
    resource = pytest.importorskip("resource", reason="no limits on this system")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"Cannot write '.*\.onnx': .*\. Make room"):
            export_onnx(small, tmp_path / "out", dtype=dtype)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_language_model_that_looks_at_places_in_the_cache(tmp_path):
    """After a wrong draft these are no positions (ALiBi)."""
    source = write_small(tmp_path / "model", model_type="mpt", d_model=48, n_heads=4, n_layers=2, num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"where a position lies in the cache .logits differ by .*% of the largest"):
        export_onnx(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_says_nothing_about_the_machine_it_was_made_on(exported):
    for file in exported.iterdir():
        assert str(ROOT).encode() not in file.read_bytes() and sys.prefix.encode() not in file.read_bytes(), file


# Minutes --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "checkpoint", [None, *TINY], ids=lambda checkpoint: checkpoint.name if checkpoint else "embedded"
)
def test_policies_act_as_in_torch(checkpoint: TinyCheckpoint | None, tmp_path):
    """The embedded policy, and what the original saved."""
    source = ROOT
    if checkpoint is not None:
        source = tmp_path / "model"
        checkpoint.load().save_pretrained(source)
        checkpoint.processor().save_pretrained(source)
    model = OpenVLAForActionPrediction.from_pretrained(source).eval()
    policy = OnnxPolicy(export_onnx(source, tmp_path / "exported"), threads=1)
    key = next(iter(model.norm_stats))
    for frame in FRAMES:
        image = ROOT / "examples/frames" / frame["file"]
        expected = model.predict_action(str(image), frame["instruction"], unnorm_key=key, return_dict=True)
        for _ in range(2):
            found = policy.predict(image, frame["instruction"], unnorm_key=key)
            assert found.token_ids.tolist() == expected.token_ids.tolist()
            assert found.actions.tolist() == expected.actions.tolist()
        assert found.passes == 1


@pytest.mark.slow
def test_a_language_model_that_is_no_llama(tmp_path):
    """The library's own last layer, with all positions."""
    source = write_small(tmp_path / "model", model_type="mistral", sliding_window=None)
    model = OpenVLAForActionPrediction.from_pretrained(source).eval()
    policy = OnnxPolicy(export_onnx(source, tmp_path / "exported"), threads=1)
    for image in frames(4):
        expected = model.predict_action(image, "open the drawer", state=STATE, return_dict=True).token_ids
        assert policy.predict(image, "open the drawer", state=STATE).token_ids.tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_smaller_weights_act_nearly_the_same(dtype, tmp_path):
    model = OpenVLAForActionPrediction.from_pretrained(ROOT).eval()
    policy = OnnxPolicy(export_onnx(ROOT, tmp_path / "exported", dtype=dtype), threads=1)
    differences = []
    for frame in FRAMES:
        image = ROOT / "examples/frames" / frame["file"]
        expected = model.predict_action(str(image), frame["instruction"], return_dict=True)
        differences.append(
            np.abs(policy.predict(image, frame["instruction"]).normalized_actions - expected.normalized_actions)
        )
    assert np.mean(differences) < {"float16": 0.002, "int8": 0.01}[dtype]
