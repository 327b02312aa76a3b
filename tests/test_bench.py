"""What `openvla bench` measures, on a tiny scale: figures are there, and belong to what they are said to be of."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from openvla import OpenVLAConfig
from openvla.action_heads_openvla import HEADS, TokenHead
from openvla.bench import bench, other, worker
from openvla.bench.latency import _figures
from openvla.bench.roofline import count_work, limit_ms
from openvla.bench.startup import measure, startup, table
from openvla.bench.subject import _value, frames_of, numbers, open_subject
from openvla.int8_linear_openvla import Int8Linear
from openvla.options.benchmark import BenchOptions
from openvla.policy import load_model
from openvla.quantization_openvla import OpenVLAQuantizationConfig, quantize_linears
from openvla.stages_openvla import STAGES, stage, watch_stages


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from original_folders import write_tiny  # noqa: E402 - a script, not part of the package


DEMONSTRATIONS = str(ROOT / "tests" / "fixtures" / "demos" / "lerobot_image")
TWO_CAMERAS = ROOT / "tests" / "fixtures" / "demos" / "rlds" / "metaworld_demo"
ANSWERS = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    print(json.dumps({"actions": [0.0] * 7, "ms": 1.5, "shape": json.loads(line)["shape"]}), flush=True)
"""


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    """The rates of the machine are measured once, not as the best of several times: a second."""
    monkeypatch.setattr("openvla.bench.roofline.ROUNDS", 1)


def test_stages_are_told_where_they_begin():
    told = []

    class Watched:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            told.append(self.name)

        def __exit__(self, *_):
            told.append("end")

    model = load_model(str(ROOT))
    with watch_stages(Watched):
        model.predict_action(np.zeros((64, 64, 3), np.uint8), "open the drawer")
    assert told == [word for name in (*STAGES[:3], *["decode"] * 6) for word in (name, "end")]
    with stage("vision"):  # nobody watches any more
        pass
    assert len(told) == 18


def test_latency_of_the_embedded_policy(tmp_path, monkeypatch):
    fake = tmp_path / "worker.py"
    fake.write_text(ANSWERS)
    monkeypatch.setattr(other, "WORKER", fake)
    report, table = bench(
        BenchOptions(
            what="latency", dataset=DEMONSTRATIONS, frames=4, device="cpu", threads=1, against={"fake": sys.executable},
            output=tmp_path / "latency.json",
        )
    )  # fmt: skip
    assert json.loads((tmp_path / "latency.json").read_text()) == report
    assert Image.open(tmp_path / "latency.png").width > 300
    ways = report["ways"]
    assert list(ways) == ["predict_action", "plain decoding", "drafts", "right drafts", "fake"]
    assert [row["same"] for row in ways.values()] == [1, 1, 1, 1, 0]
    assert [found["frame"] for found in ways["fake"]["differences"]] == [0, 1, 2, 3]
    assert all(found["gap"] > report["near"] for found in ways["fake"]["differences"])  # of zeros, which it never chose
    assert (ways["plain decoding"]["passes"], ways["right drafts"]["passes"]) == (7, 1)
    assert set(ways["predict_action"]["stages"]) == {*STAGES[:4], "other"} and not ways["fake"]["stages"]
    for row in ways.values():
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert sum(found["min_ms"] for found in row["stages"].values()) < 5 * row["p99_ms"]
    assert ways["fake"]["min_ms"] == ways["fake"]["p99_ms"] == 1.5  # by its own clock
    vision = ways["predict_action"]["stages"]["vision"]
    assert vision["limit_ms"] == limit_ms(vision, report["machine"])
    assert "right drafts" in table and "limit" in table and "e+0" in table.splitlines()[-1]


def test_work_is_what_the_layers_multiply():
    model = load_model(str(ROOT))
    work = count_work(model, lambda: model.predict_action(np.zeros((64, 64, 3), np.uint8), "open the drawer"))
    layers = model.language_model.model.layers
    weights = sum(module.weight.numel() for module in layers.modules() if isinstance(module, torch.nn.Linear))
    one_token = 2 * (weights + 256 * model.llm_dim) / 1e9
    assert work["decode"]["gflop"] == pytest.approx(6 * one_token, rel=0.05)  # the rest is attention
    assert work["prefill"]["gflop"] > 20 * one_token and work["vision"]["gflop"] > work["prefill"]["gflop"] / 5
    assert 5.5 < work["decode"]["gbyte"] / work["prefill"]["gbyte"] < 6.5
    behind = ("blocks.2.", "norm.", "attn_pool.")  # each tower ends after the second of three blocks
    read = sum(
        weight.nbytes
        for part in (model.vision_backbone.featurizer, model.vision_backbone.fused_featurizer, model.projector)
        for name, weight in part.named_parameters()
        if not name.startswith(behind)
    )
    assert work["vision"]["gbyte"] == pytest.approx(read / 1e9)
    quantize_linears(model, OpenVLAQuantizationConfig(8))
    known = count_work(model, lambda: model.predict_action(np.zeros((64, 64, 3), np.uint8), "open the drawer"))
    assert {name: np.isfinite(part["gflop"]) for name, part in known.items() if part["gbyte"]} == {
        "vision": True, "prefill": False, "decode": False
    }  # fmt: skip
    assert known["vision"] == work["vision"]
    assert limit_ms({"gflop": 1.0, "gbyte": 0.0}, {"gflops": 100.0, "gbytes": 10.0}) == 10.0
    assert limit_ms({"gflop": 0.0, "gbyte": 1.0}, {"gflops": 100.0, "gbytes": 10.0}) == 100.0


def test_stages_that_some_frames_do_not_have():
    """A frame whose draft is right has no passes of decoding; one graph has both towers and prefill, another all."""
    unit = {"gflop": 1.0, "gbyte": 1.0}
    times = [{"total": 9.0}, {"total": 8.0, "prefill": 5.0}, {"total": 9.0, "prefill": 5.0, "decode": 3.0}]
    found = _figures(
        times, [], [1, 1, 2], {"vision": unit, "prefill": unit, "decode": unit}, {"gflops": 1, "gbytes": 1}
    )
    assert found["min_ms"] == 9.0 and list(found["stages"]) == ["prefill", "decode", "other"]
    assert found["stages"]["decode"]["min_ms"] == 0.0 and "share" not in found["stages"]["decode"]
    assert found["stages"]["prefill"]["limit_ms"] == 2000.0 and found["stages"]["other"]["p99_ms"] < 3.0
    work = {"vision": unit, "prefill": unit, "decode": unit}
    found = _figures([{"total": 9.0, "answer": 8.0}] * 2, [], [7, 7], work, {"gflops": 1, "gbytes": 1})
    assert list(found["stages"]) == ["answer", "other"] and found["stages"]["answer"]["limit_ms"] == 3000.0


def test_fields_of_a_preset_are_numbers_and_lists():
    texts = ("8", "true", "null", '["primary", "wrist"]', "l1_regression", "0.5")
    assert [_value(text) for text in texts] == [8, True, None, ["primary", "wrist"], "l1_regression", 0.5]


@pytest.mark.parametrize("towers", [False, True])
def test_a_preset_is_quantized_with_its_towers_or_without(monkeypatch, small_policy, towers):
    small = OpenVLAConfig.from_pretrained(small_policy)
    monkeypatch.setattr("openvla.bench.subject.load_preset_config", lambda preset: small)
    what = {"what": "load", "preset": "openvla-7b", "device": "cpu", "dtype": "float32", "quantization": "int8"}
    model, _ = open_subject(BenchOptions(**what, towers=towers))
    kinds = {name.partition(".")[0] for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert kinds == ({"language_model", "vision_backbone", "projector"} if towers else {"language_model"})


def test_an_export_of_another_model(monkeypatch):
    def refuse(*arguments, **options):
        raise KeyError("unnorm_key='mine' is unknown")

    monkeypatch.setattr("openvla_runtime.OnnxPolicy", refuse)
    with pytest.raises(ValueError, match="onnx='exported' is an export of another model: it does not know 'mine'"):
        other.open_onnx(BenchOptions(what="latency", onnx="exported"), "mine")


def test_throughput():
    report, table = bench(
        BenchOptions(what="throughput", frames=2, batch_sizes="1,2", device="cpu", size="40,60", quantization="int8")
    )
    assert table.startswith(f"{ROOT.name}: int8, ")
    assert list(report["batches"]) == ["1", "2"] and "actions/s" in table
    two = report["batches"]["2"]
    assert (
        two["actions_per_second"] == pytest.approx(2000 / two["p50_ms"]) == pytest.approx(1000 / two["ms_per_sample"])
    )


@pytest.mark.parametrize(
    "what, stages",
    [
        ("load", ["imports", "loading", "first action", "later action"]),
        ("memory", ["imports", "loading", "1 actions", "2 actions", "5 actions", "10 actions", "20 actions"]),
    ],
)
def test_startup_of_a_process(what, stages, capsys):
    frames = {"frames": 20} if what == "memory" else {}
    measure(json.dumps({"what": what, "device": "cpu", "size": "40,60", **frames}), 0.0)
    report = json.loads(capsys.readouterr().out.removeprefix("openvla-bench "))
    assert list(report["stages"]) == stages
    shown = table(report)
    assert ("growth_mb" in report) == (what == "memory" and sys.platform == "linux") == ("first tenth" in shown)
    if sys.platform == "linux":
        assert all(
            row["peak_mb"] >= row["memory_mb"] > row["without_files_mb"] > 10 for row in report["stages"].values()
        )


def test_a_process_imports_heads_of_others(monkeypatch):
    def run(arguments, **_):
        assert arguments[-2:] == [arguments[3], "my_heads"] and "import_module(name)" in arguments[2]
        return SimpleNamespace(stdout='openvla-bench {"stages": {}}', returncode=0)

    head = type("Mine", (TokenHead,), {"__module__": "my_heads"})
    monkeypatch.setitem(HEADS, "mine", head)
    monkeypatch.setattr("subprocess.run", run)
    assert startup(BenchOptions(what="load")) == {"stages": {}}


def test_a_dataset_that_ends_while_it_warms_up(monkeypatch):
    monkeypatch.setattr("openvla.bench.latency.frames_of", lambda *_: [None] * 3)
    with pytest.raises(ValueError, match="holds 3 frame.s., and 3 are not counted"):
        bench(BenchOptions(what="latency", dataset=DEMONSTRATIONS, device="cpu"))


SETTINGS = {"unnorm_key": "metaworld", "threads": None, "device": "auto", "dtype": "auto", "code": None}


def test_what_another_environment_runs():
    settings = {**SETTINGS, "model": str(ROOT)}
    image = np.zeros((64, 64, 3), np.uint8)
    action = worker.open_model({**settings, "device": "cpu"})(image, "open the drawer")
    expected = load_model(str(ROOT)).predict_action(image, "open the drawer")
    assert action.tolist() == expected.tolist()


# In place of the original's three files, and of the old transformers that they need: what is asked of both.
ORIGINAL = {
    "configuration": "class OpenVLAConfig: pass",
    "processing": """
from .configuration_prismatic import OpenVLAConfig
class PrismaticImageProcessor: pass
class PrismaticProcessor:
    def __call__(self, prompt, image): return Inputs(prompt=prompt, image=image)
class Inputs(dict):
    def to(self, device, dtype): return self
""",
    "modeling": """
import timm
class OpenVLAForActionPrediction:
    dtype = None
    def to(self, device): return self
    def eval(self): return self
    def predict_action(self, prompt, image, unnorm_key, do_sample):
        assert prompt == "In: What action should the robot take to open the drawer?\\nOut:" and not do_sample
        depths = [len(timm.create_model(name, pretrained=False, num_classes=0).blocks) for name in NAMES]
        return [*image.size, *depths, unnorm_key]
NAMES = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"
""",
}


def test_the_original_is_run_from_a_folder_of_its_code(tmp_path, monkeypatch):
    code = tmp_path / "clone" / "hf"
    code.mkdir(parents=True)
    for name, content in ORIGINAL.items():
        (code / f"{name}_prismatic.py").write_text(content)
    tiny = write_tiny(tmp_path / "tiny")
    monkeypatch.setitem(sys.modules, "openvla", None)  # an environment without it
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr("timm.create_model", timm.create_model)  # worker replaces it
    registered = {}
    autos = ("AutoConfig", "AutoImageProcessor", "AutoProcessor", "AutoModelForVision2Seq")
    old = SimpleNamespace(**{auto: FakeAuto(registered) for auto in autos})
    monkeypatch.setitem(sys.modules, "transformers", old)
    predict = worker.open_model({**SETTINGS, "model": str(tiny), "device": "cpu", "code": str(code)})
    assert predict(np.zeros((48, 64, 3), np.uint8), "Open the drawer") == [64, 48, 3, 4, "metaworld"]


class FakeAuto:
    """An auto class that makes what was registered last."""

    def __init__(self, registered: dict):
        self.registered = registered

    def register(self, key, value):
        self.registered[id(self)] = value

    def from_pretrained(self, folder, **options):
        assert not options and (Path(folder) / "config.json").is_file()
        return self.registered[id(self)]()


def test_code_that_is_not_the_originals(tmp_path):
    given = {"what": "latency", "against": {"original": sys.executable}, "original_code": tmp_path, "device": "cpu"}
    with pytest.raises(ValueError, match="give prismatic/extern/hf of a clone"):
        bench(BenchOptions(**given))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"what": "throughput", "batch_sizes": "1,x"}, "batch_sizes='1,x': expected whole numbers"),
        ({"what": "latency", "size": "256"}, "expected height and width"),
        (
            {"what": "latency", "size": "10000000,1000000"},
            r"random images take .* GiB, at most 8 are kept: give smaller or",
        ),
        ({"what": "latency", "threads": 100_000}, "threads=100000: it must be a whole number of at least 1 and below"),
        ({"what": "latency", "frames": 1, "against": {"x": "/none/python"}}, "cannot be started"),
        ({"what": "latency", "frames": 1, "against": {"x": sys.executable}}, "no answer"),
        ({"what": "latency", "preset": "openvla-7b", "preset_fields": {"wings": 2}}, "no such field"),
        (
            {"what": "latency", "preset": "openvla-7b", "preset_fields": {"action_head": "l1"}},
            "action_head='l1' is unknown",
        ),
        ({"what": "exact"}, "give --dataset"),
        (
            {"what": "latency", "batch_sizes": "1"},
            "batch_sizes=...: latency has no use for it, only throughput: leave it out",
        ),
        ({"what": "throughput", "onnx": Path("folder")}, "onnx=...: throughput has no use"),
        ({"what": "memory", "against": {"x": sys.executable}}, "against=...: memory has no use"),
        ({"what": "load", "frames": 3}, "frames=...: load has no use"),
        ({"what": "memory", "compile": True}, "compile=...: memory has no use"),
        ({"what": "latency", "preset_fields": {"action_chunk": 8}}, "preset_fields=... says nothing without preset"),
        ({"what": "latency", "towers": True, "quantization": "int8"}, "towers=... says nothing without preset"),
        ({"what": "load", "preset": "openvla-7b", "towers": True}, "towers=... says nothing without quantization"),
        ({"what": "latency", "split": "test"}, "split=... says nothing without dataset"),
        ({"what": "latency", "original_code": Path("code")}, "original_code=... says nothing without against"),
        ({"what": "load", "preset": "openvla-7b", "model": "mine"}, "model=... beside preset="),
        ({"what": "load", "preset": "openvla-7b", "action_chunk": 8}, "action_chunk=... beside preset="),
        ({"what": "latency", "dataset": DEMONSTRATIONS, "size": "64,64"}, "size=... beside dataset="),
    ],
)
def test_what_cannot_be_measured(given, message, monkeypatch, tmp_path):
    monkeypatch.setattr(other, "WORKER", tmp_path / "missing.py")
    with pytest.raises(ValueError, match=message):
        bench(BenchOptions(**{"device": "cpu", **given}))
    assert numbers("batch_sizes", "1, 16") == [1, 16]


def test_what_is_wrong_with_the_model_of_a_process_is_one_line(tmp_path, monkeypatch, capsys):
    settings = json.dumps({"what": "load", "device": "cpu", "model": str(tmp_path)})
    measure(settings, 0.0)
    said = capsys.readouterr().out
    monkeypatch.setattr("subprocess.run", lambda *_, **__: SimpleNamespace(stdout=said, returncode=0))
    with pytest.raises(ValueError, match="holds no model.safetensors"):
        bench(BenchOptions(what="load"))
    measure(json.dumps({"what": "load", "device": "cpu", "unnorm_key": "nothing"}), 0.0)
    assert "unnorm_key='nothing' is not among" in json.loads(capsys.readouterr().out.partition(" ")[2])["refused"]


def test_what_cannot_be_written_is_known_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("openvla.bench.latency.latency", lambda options: pytest.fail("measured"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        bench(BenchOptions(what="latency", output=tmp_path / "file" / "latency.json"))
    with pytest.raises(ValueError, match="is a folder: give a file"):
        bench(BenchOptions(what="latency", output=tmp_path))
    with pytest.raises(ValueError, match="latency.png' is where the plot goes: give a .json"):  # which replaced figures
        bench(BenchOptions(what="latency", output=tmp_path / "latency.png"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ModuleNotFoundError, match="openvla.demo"):
        bench(BenchOptions(what="latency", output=tmp_path / "latency.json"))


def test_frames_of_demonstrations_are_of_the_cameras_of_the_model():
    """Of a model with two it said that there is no camera 'wrist'."""
    statistics = {"mine": {"action": json.loads((ROOT / "dataset_statistics.json").read_text())["metaworld"]["action"]}}
    seen = {}
    for names in (["primary"], ["full_image", "wrist_image"]):
        model = SimpleNamespace(camera_names=names, norm_stats=statistics, config=SimpleNamespace(proprio_dim=None))
        options = BenchOptions(what="latency", dataset=TWO_CAMERAS, split="all", frames=2)
        seen[len(names)] = [frame.images for frame in frames_of(options, model, "mine", 2)]
        assert [list(images) for images in seen[len(names)]] == [names] * 2
    for one, both in zip(seen[1], seen[2]):
        assert np.array_equal(one["primary"], both["full_image"]) and both["wrist_image"].shape[:2] == (128, 128)
