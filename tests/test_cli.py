"""The verbs from the outside: what they print, what they write, and what a user's mistake looks like."""

import errno
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np
import processes
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import openvla
from openvla import OpenVLAForActionPrediction, cli
from openvla.cli_errors import reason
from openvla.evaluation.environment import ENVIRONMENTS
from openvla.folders import locked, locked_file
from openvla.options.prediction import EMBEDDED_POLICY
from openvla.training import STRATEGIES, FinetuneOptions


VERBS = [
    "predict",
    "stats",
    "finetune",
    "merge",
    "record",
    "evaluate",
    "bench",
    "demo",
    "convert",
    "export",
    "package",
    "quantize",
]


def run(*arguments, code: int = 0):
    """Outcome of a command line with the expected exit code."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="openvla")
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_a_daemon_begins_without_streams():
    """A socket or a file took their numbers, and processes of simulators failed for what was said into it."""
    program = """
import os, sys
from openvla.cli import open_streams
answer = os.dup(1)
sys.stdin = sys.stdout = sys.stderr = None
os.closerange(0, 3)
open_streams()
print("lost"), print("lost", file=sys.stderr, flush=True), sys.stdin.read()
streams = [stream.fileno() for stream in (sys.stdin, sys.stdout, sys.stderr)]
os.write(answer, repr([streams, [*map(os.get_inheritable, streams)]]).encode())
"""
    done = processes.run(program)
    assert (done.returncode, done.stdout) == (0, "[[0, 1, 2], [True, True, True]]"), done


def test_arguments_that_the_encoding_of_a_terminal_does_not_have(monkeypatch):
    """Of a folder with such a name a table was said to be damaged."""
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    said = error_of("stats", "d\udcc3\udca4t")
    assert "dataset='d\\udcc3\\udca4t': " in said and "(ascii) does not have: export PYTHONUTF8=1" in said


def error_of(*arguments) -> str:
    """The one line a mistake is answered with."""
    result = run(*arguments, code=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and result.stderr.endswith(errors[0] + "\n") and "Traceback" not in result.output
    assert result.stdout == ""
    return errors[0]


@pytest.fixture(scope="module")
def model(tiny_checkpoint, tmp_path_factory) -> Path:
    """A published checkpoint whose config.json also tells the sizes of its towers."""
    folder = tmp_path_factory.mktemp("model") / tiny_checkpoint.name
    shutil.copytree(tiny_checkpoint.folder, folder, copy_function=shutil.copyfile)
    config = json.loads((folder / "config.json").read_text())
    config["timm_model_kwargs"] = tiny_checkpoint.timm_model_kwargs
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def any_model(small_policy) -> Path:
    """For what does not depend on the model."""
    return small_policy


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "frame.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    return path


def test_help_teaches():
    overview = run("--help").stdout
    for verb in VERBS:
        assert re.search(rf"^  {verb} .*[^.]\.$", overview, re.MULTILINE), f"{verb} is cut off or missing"
        assert f"  openvla {verb} " in run(verb, "--help").stdout, "no example"
    assert "metres and radians" in run("predict", "--help").stdout
    assert (run("-h").stdout, run("predict", "-h").stdout) == (overview, run("predict", "--help").stdout)
    assert "Did you mean 'predict'?" in run("prdict", code=2).stderr


def test_every_option_is_a_sentence():
    """What it is, not half of it ("Of the optimizer."), in every verb; values that are fixed elsewhere are the same."""
    for verb, command in typer.main.get_command(cli.app).commands.items():
        for parameter in command.params:
            text = parameter.help or ""
            assert text.endswith(".") and not text.startswith(("Of ", "Default", "The same ")), (verb, parameter.name)
    assert all(name in run("evaluate", "--help").stdout for name in ENVIRONMENTS)


def test_help_of_verbs_with_many_options_has_headings():
    for verb, command in typer.main.get_command(cli.app).commands.items():
        sections = [part.split("\n  -")[1:] for part in re.split(r"\n(?=[A-Z].*:\n)", run(verb, "--help").stdout)]
        assert sum(map(len, sections)) == 1 + sum(item.param_type_name == "option" for item in command.params)
        assert max(map(len, sections)) <= 16, f"{verb}: more than one can take in"
    text = run("finetune", "--help").stdout
    assert "Needed:\n  --output" in text and text.index("--rank") > text.index("Adapter:")
    assert text.index("Data:") < text.index("--read-cameras") < text.index("Precision, memory, speed:")


def test_version():
    assert re.fullmatch(
        rf"openvla {openvla.__version__} \(transformers .*, torch .*, Python .*\)\n", run("--version").stdout
    )


def test_the_package_runs_as_the_command(monkeypatch):
    called = []
    monkeypatch.setattr(cli, "main", lambda: called.append("main"))
    runpy.run_module("openvla", run_name="__main__")
    assert called == ["main"]


CONSOLE = """
import sys
sys.path.append(sys.argv[1])  # also where the console script is of an older installation
import openvla_console
for line in sys.argv[2].split(";"):
    sys.argv = ["openvla", *line.split()]
    try:
        openvla_console.main()
    except SystemExit as end:
        print("code", end.code)
"""


def console(lines: str, then: str) -> subprocess.CompletedProcess:
    """What the console script does with command lines, one after the other, and what Python says `then`."""
    command = [sys.executable, "-c", CONSOLE + then, str(Path(cli.__file__).parent), lines]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_and_mistakes_come_before_anything_heavy():
    """Nothing of what takes seconds is imported for --help, for the versions, and for an option that is wrong."""
    wrong = ["predict --imgae x", "evaluate --output o --policy none", "record --output o --noise -1"]
    wrong += ["finetune --dataset d --output o --logging none --rank 0", "evaluate --output o --env-option x", "prdict"]
    lines = ["--help", "--version", *(f"{verb} --help" for verb in VERBS), *wrong]
    heavy = "print(sorted({'torch', 'transformers', 'timm', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    ran = console(";".join(lines), heavy)
    codes = [line for line in ran.stdout.splitlines() if line.startswith("code")]
    assert codes == ["code 0"] * (2 + len(VERBS)) + ["code 2"] * len(wrong), ran.stderr
    assert ran.stdout.splitlines()[-1] == "[]", ran.stdout
    assert "Did you mean" in ran.stderr and "--noise -1.0: it must be a number of at least 0" in ran.stderr


def test_a_verb_that_works_has_the_complete_package(tmp_path):
    said = f"package {tmp_path / 'out'} --weights {tmp_path / 'none'}"
    then = "import openvla; print(openvla.OpenVLAForActionPrediction.__module__)"
    ran = processes.run(CONSOLE + then, Path(cli.__file__).parent, said, server="transformers")
    assert "error: No folder at" in ran.stderr and "code 2" in ran.stdout, ran.stderr
    assert ran.stdout.endswith("openvla.modeling_openvla\n")


AS_THE_CONSOLE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("openvla", sys.argv[1], submodule_search_locations=[sys.argv[2]])
sys.modules["openvla"] = importlib.util.module_from_spec(spec)  # not executed, as by the console script
heavy = {"timm", "torchvision", "torch._dynamo"}
"""
CONFIGURATION = """
for name in list(sys.modules):
    if any(f"{name}.".startswith(f"{module}.") for module in heavy):
        del sys.modules[name]  # the server has imported it
from openvla.action_tokenizer import ActionTokenizer
from openvla.configuration_openvla import OpenVLAConfig
print(sorted(heavy & set(sys.modules)))
"""
PROCESSOR = """
import transformers.processing_utils
sys.modules.pop("timm", None)  # the library has found it
needed = set(sys.modules)
from openvla.processing_openvla import OpenVLAProcessor
print(sorted(heavy & (set(sys.modules) - needed)))
"""


def test_configuration_processor_and_action_tokenizer_need_no_towers():
    """No timm, and of torchvision, whose operators bring torch's compiler, no more than transformers' own processors
    import where it is installed."""
    root = Path(cli.__file__).parent
    for program, server in ((CONFIGURATION, "libraries"), (PROCESSOR, "transformers")):
        ran = processes.run(AS_THE_CONSOLE + program, root / "__init__.py", root, server=server)
        assert ran.stdout == "[]\n", ran.stdout + ran.stderr


@pytest.mark.parametrize("verb", ["record", "evaluate"])
def test_ctrl_c_says_that_the_same_command_continues(verb, tmp_path, monkeypatch):
    def stopped(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"openvla.evaluation.{verb}.{verb}", stopped)
    result = run(verb, "--output", tmp_path / "out", code=130)
    assert result.stderr.strip() == "stopped: the same command continues."


def test_predict(model, image):
    options = ["--image", image, "--instruction", "Open the Drawer", "--model", model, "--unnorm-key", "bridge_orig"]
    options += ["--device", "cpu"]
    record = json.loads(run("predict", *options, "--json").stdout)
    policy = OpenVLAForActionPrediction.from_pretrained(model)
    expected = policy.predict_action(Image.open(image), "Open the Drawer", unnorm_key="bridge_orig", return_dict=True)
    assert record["action"] == expected.actions.tolist()
    assert record["normalized"] == expected.normalized_actions.tolist()
    np.testing.assert_allclose(record["probabilities"], expected.token_probabilities, atol=1e-6)
    assert record["names"][-1] == "gripper"
    assert record["unnorm_key"] == "bridge_orig" and record["instruction"] == "Open the Drawer"
    assert record["image"] == str(image) and record["model"] == str(model)

    lines = run("predict", *options, "--dtype", "float32").stdout.splitlines()
    assert [line.split()[0] for line in lines[:7]] == record["names"]
    assert [float(line.split()[1]) for line in lines[:7]] == pytest.approx(record["action"], abs=1e-5)
    assert "confidence" in lines[7] and "bridge_orig" in lines[8]
    assert run("predict", *options, "--dtype", "bfloat16", "--json").stdout.count("\n") == 1


def test_the_default_model_is_the_package():
    assert Path(EMBEDDED_POLICY) == Path(cli.__file__).parent


def test_mistakes_in_predict(model, image, tmp_path, monkeypatch):
    predict = ["predict", "--instruction", "x", "--device", "cpu"]
    assert "No image file at" in error_of(*predict, "--image", tmp_path / "none.png", "--model", model)
    assert "No folder at" in error_of(*predict, "--image", image, "--model", tmp_path / "none")
    assert "nor a Hub repository" in error_of(*predict, "--image", image, "--model", "openvla/not-in-the-cache")
    wrong_key = error_of(*predict, "--image", image, "--model", model, "--unnorm-key", "bridge")
    assert "Did you mean 'bridge_orig'?" in wrong_key and not wrong_key.endswith('"')
    (tmp_path / "text.png").write_text("no image")
    assert "it is no PNG, no JPEG" in error_of(*predict, "--image", tmp_path / "text.png", "--model", model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = error_of("predict", "--instruction", "x", "--image", image, "--model", model, "--device", "cuda")
    assert "no GPU" in gpu and "--device cpu" in gpu
    assert "Missing option '--image'" in run("predict", "--instruction", "x", code=2).stderr


def test_predict_refuses_before_weights_are_read(model, image, monkeypatch):
    monkeypatch.setattr(OpenVLAForActionPrediction, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    predict = ["predict", "--image", image, "--model", model, "--device", "cpu"]
    wrong_key = error_of(*predict, "--instruction", "go", "--unnorm-key", "bridge")
    assert "--unnorm-key 'bridge'" in wrong_key and "Did you mean 'bridge_orig'?" in wrong_key
    assert "The instruction is empty" in error_of(*predict, "--instruction", " ", "--unnorm-key", "bridge_orig")


def test_traceback_on_request(tmp_path):
    arguments = ["package", tmp_path / "out", "--weights", tmp_path / "none"]
    assert "No folder at" in error_of(*arguments)
    assert isinstance(run("--traceback", *arguments, code=1).exception, FileNotFoundError)


def test_package_export_convert(model, tmp_path):
    """All the way round: package, export as a run of the original, convert back; what it says of other sizes."""
    packaged, original, out = tmp_path / "packaged", tmp_path / "run", tmp_path / "out"
    assert run("package", packaged, "--weights", model, "--name", "me/robot").stdout == f"wrote {packaged}\n"
    assert "# me/robot" in (packaged / "README.md").read_text()
    assert run("export", packaged, original, "--dtype", "float32").stdout == f"wrote {original}\n"

    parts = torch.load(original / "checkpoints/latest-checkpoint.pt", weights_only=True)["model"]
    assert sum(map(len, parts.values())) == len(load_file(model / "model.safetensors"))
    said = error_of("convert", original, out, "--tokenizer", model, "--image-resize-strategy", "letterbox")
    assert "does not fit the configuration" in said
    assert "--llm-backbone-id 'llama' is unknown" in error_of("convert", original, out, "--llm-backbone-id", "llama")
    assert "is not empty" in error_of("package", packaged, "--weights", model)
    run("package", packaged, "--weights", model, "--overwrite")
    assert not out.exists()
    run("convert", original, out, "--tokenizer", model, "--dtype", "float32")
    again, first = (load_file(folder / "model.safetensors") for folder in (out, model))
    assert all(torch.equal(again[name], first[name]) for name in again.keys() | first.keys())


def test_convert_passes_everything_on(tmp_path, monkeypatch):
    from openvla.conversion import oft

    seen = {}
    monkeypatch.setattr(
        oft,
        "convert_prismatic_checkpoint",
        lambda checkpoint, out, **kwargs: seen.update(checkpoint=checkpoint, **kwargs) or out,
    )
    given = {
        "vision_backbone_id": "siglip-vit-so400m",
        "llm_backbone_id": "vicuna-v15-7b",
        "image_resize_strategy": "letterbox",
        "tokenizer": "some/id",
        "base": "timm",
        "dtype": "float16",
        "max_shard_size": "2GB",
    }
    options = [part for field, value in given.items() for part in ("--" + field.replace("_", "-"), value)]
    run("convert", "a.pt", tmp_path / "out", *options, "--statistics", "s.json", "--overwrite")
    assert seen == {"checkpoint": Path("a.pt"), **given, "statistics": Path("s.json"), "overwrite": True}


def test_export_writes_what_it_is_asked_for(model, tmp_path, monkeypatch):
    """ONNX graphs themselves: tests/test_runtime.py."""
    seen = {}
    monkeypatch.setattr(
        "openvla.conversion.export_onnx", lambda weights, out, **kwargs: seen.update(weights=weights, **kwargs) or out
    )
    run("export", "me/robot", tmp_path / "out", "--to", "onnx", "--dtype", "int8", "--overwrite")
    assert seen == {"weights": "me/robot", "dtype": "int8", "overwrite": True}
    assert "--dtype 'int8' is unknown" in error_of("export", model, tmp_path / "out", "--dtype", "int8")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["bench", "latncy"], "what='latncy' is unknown. Did you mean 'latency'? Known: latency, throughput"),
        (["bench", "latency", "--preset", "openvla7b"], "--preset 'openvla7b' is unknown. Did you mean 'openvla-7b'?"),
        (["finetune", "--dataset", "d", "--output", "o", "--strategy", "lorra"], "Did you mean 'lora'? Known: full, "),
        (["quantize", "m", "o", "--bits", "3"], "--bits '3' is unknown. Known: 8, 4, fp8."),
    ],
)
def test_a_misspelled_choice_is_answered_with_the_nearest(command, told):
    assert told in error_of(*command)


# Data and training


DEMO = Path(__file__).parent / "fixtures" / "demos" / "lerobot_image"


def test_stats(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs the [demo] extra")
    options = ["--output", tmp_path / "statistics.json", "--name", "mine", "--plot", tmp_path / "actions.png"]
    lines = run("stats", DEMO, *options).stdout.splitlines()
    assert "1 episode, 95 steps" in lines[0] and any("never changes" in line for line in lines)
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    assert len(statistics["mine"]["action"]["q99"]) == 7
    assert (tmp_path / "actions.png").stat().st_size > 5000


def test_stats_in_units_that_are_lent(tmp_path):
    """A mixture of two recordings of one robot ended as "error: num_trajectories"."""
    pytest.importorskip("matplotlib", reason="the plot needs the [demo] extra")
    (tmp_path / "both.yaml").write_text(f"one: {{path: {DEMO}}}\ntwo: {{path: {DEMO}, split: all, statistics: one}}\n")
    lines = run("stats", tmp_path / "both.yaml", "--output", tmp_path / "both.json").stdout.splitlines()
    assert len([line for line in lines if line.startswith("dx ")]) == 2
    assert json.loads((tmp_path / "both.json").read_text()).keys() == {"one", "two"}
    (tmp_path / "q.json").write_text(json.dumps({"one": {"action": {"q01": [-1] * 7, "q99": [1] * 7}}}))
    (tmp_path / "both.yaml").write_text(f"one: {{path: {DEMO}, statistics: q.json}}\n")
    table = run("stats", tmp_path / "both.yaml", "--plot", tmp_path / "one.png").stdout
    assert re.search(r"^dx +-1.0000 +1.0000 +- .* yes$", table, re.M) and (tmp_path / "one.png").is_file()


def test_stats_of_dimensions():
    """With the names that were recorded; the mask and grippers that the user says."""
    table = run("stats", DEMO).stdout
    assert re.search(r"^dx .* yes$", table, re.M)
    assert "warning   lerobot_image: droll, dpitch, dyaw, gripper never change" in table
    assert re.search(r"^dx .* no$", run("stats", DEMO, "--mask", "0,1,1,1,1,1,1").stdout, re.M)
    assert "--gripper-dims" in run("stats", "--help").stdout
    assert "--gripper-dims 'six'" in error_of("stats", DEMO, "--gripper-dims", "six")
    assert "mask has 2 entries" in error_of("stats", DEMO, "--mask", "1,0")


def test_finetune_has_an_option_for_every_field():
    text = run("finetune", "--help").stdout
    for item in fields(FinetuneOptions):
        assert (item.metadata.get("flag") or f"--{item.name.replace('_', '-')}") in text, item.name
    assert set(get_args(FinetuneOptions.__annotations__["strategy"])) == set(STRATEGIES)


def test_plan_train_merge_and_predict(small_policy, tmp_path, image):
    options = ["--dataset", DEMO, "--output", tmp_path / "run", "--steps", "2", "--batch-size", "2", "--rank", "4"]
    options += ["--model", small_policy]
    plan = run("finetune", *options, "--dry-run").stdout
    parameters = sum(tensor.numel() for tensor in load_file(small_policy / "model.safetensors").values())
    assert (
        f"of {parameters / 1e6:.1f}M parameters" in plan
        and "2 steps x 2" in plan
        and "never change" in plan
        and not (tmp_path / "run").exists()
    )
    said = run("finetune", *options, "--merge", tmp_path / "merged").stdout
    assert f"wrote {tmp_path / 'run'}" in said and re.search(r"relative to the largest logit: \d\.\de-\d+", said)
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))  # TensorBoard
    record = run(
        "predict", "--model", tmp_path / "merged", "--image", image, "--instruction", "open the drawer", "--json"
    )
    assert json.loads(record.stdout)["unnorm_key"] == "lerobot_image"
    again = run("finetune", *options, code=2).stderr
    assert "finished run" in again and "--resume" in again


def test_stats_replaces_only_statistics(tmp_path, monkeypatch):
    """And says so before the data is read."""
    monkeypatch.setattr("openvla.data.report.open_sources", lambda *a, **k: pytest.fail("read"))
    (tmp_path / "notes.txt").write_text("mine")
    for option, file, said in [
        ("--output", "notes.txt", "holds no statistics and would be replaced"),
        ("--output", "", "is a folder: give a file"),
        ("--output", "notes.txt/x.json", "Cannot write to '.*notes.txt/x.json'"),
        ("--output", "/proc/x.json", "Cannot write to '/proc/x.json'"),
        ("--plot", "notes.txt", "is no plot and would be replaced"),
        ("--plot", "notes.txt/x.png", "notes.txt'?: "),
        ("--plot", "x.bmpp", "x.bmpp': expected a file that ends in .png"),
        ("--plot", "x", "x': expected a file that ends in .png"),
    ]:
        assert re.search(said, error_of("stats", DEMO, option, tmp_path / file)), (option, file)
    for mark in ("config.json", "adapter_config.json"):  # whose actions were other ones from then on
        (tmp_path / mark).write_text("{}")
        said = error_of("stats", DEMO, "--output", tmp_path / "dataset_statistics.json")
        assert f"of the model beside it ('{mark}')" in said and "give another file. finetune writes" in said
        (tmp_path / mark).unlink()
    with locked_file(tmp_path / "out.json"):
        assert "Another process is writing to" in error_of("stats", DEMO, "--output", tmp_path / "out.json")
    assert os.listdir(tmp_path) == ["notes.txt"] and (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("verb", ["package", "export", "finetune", "record"])
def test_a_second_process_is_refused_in_one_line(verb, any_model, tmp_path):
    out = tmp_path / "out"
    arguments = {
        "package": ["package", out, "--weights", any_model],
        "export": ["export", any_model, out],
        "finetune": ["finetune", "--dataset", DEMO, "--output", out, "--logging", "none"],
        "record": ["record", "--output", out],
    }
    with locked(out):
        assert "Another process is writing to" in error_of(*arguments[verb])
    assert not list(tmp_path.iterdir())


def test_what_the_operating_system_says_comes_with_the_file_and_a_way_out():
    full = OSError(errno.ENOSPC, "No space left on device", "/data/x.npz")
    assert reason(full).startswith("'/data/x.npz': No space left on device: make room")
    copied = OSError(errno.ENOSPC, "No space left on device", "/models/x.safetensors", None, "/data/x.safetensors")
    assert reason(copied).startswith("'/data/x.safetensors': No space left")  # where room is to be made
    assert reason(OSError(errno.ENOSPC, "No space left on device")).startswith("No space left on device: make")
    assert reason(OSError("'/data' is full: make room.")) == "'/data' is full: make room."
    assert reason(KeyError("no 'x'")) == "no 'x'"


def test_overwriting_spares_what_is_something_else(any_model, tmp_path):
    """The folder that is read, and a config.json of another kind."""
    model = any_model
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"vla": {}}')
    assert "is not of a model, and would be replaced" in error_of("package", run, "--weights", model, "--overwrite")
    for verb in (["package", model, "--weights", model], ["export", model, model]):
        assert "is what is read" in error_of(*verb, "--overwrite")
    other = shutil.copytree(model, tmp_path / "other", copy_function=shutil.copyfile)
    assert "is not of a run of the original" in error_of("export", model, other, "--overwrite")


def test_a_folder_to_merge_into_is_looked_at_before_training(tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").touch()
    options = ["finetune", "--dataset", DEMO, "--output", tmp_path / "run", "--merge"]
    assert "is not empty: choose another folder" in error_of(*options, tmp_path / "merged")
    assert "is the output of the run" in error_of(*options, tmp_path / "run")


def test_finetune_errors(tmp_path):
    to = ["--output", tmp_path / "run"]
    assert "no adapter to merge" in error_of(
        "finetune", "--dataset", DEMO, *to, "--strategy", "full", "--merge", tmp_path
    )
    assert "nowhere" in error_of("finetune", "--dataset", tmp_path / "nowhere", *to)
    assert "--steps 0" in error_of("finetune", "--dataset", DEMO, *to, "--steps", "0")
