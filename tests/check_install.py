"""What `pip install .` without extras gives: all files, every --help, predictions, and one line for each extra.

Run by `make test-install` with the Python of an environment that has no extras; no part of the test-suite.
"""

import filecmp
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import openvla
from openvla.data import open_dataset
from openvla.evaluation import make_environment
from openvla.extras import EXTRAS


REPOSITORY = Path(__file__).resolve().parents[1]
DEMOS = REPOSITORY / "tests" / "fixtures" / "demos"
INSTALLED = Path(openvla.__file__).parent
COMMAND = Path(sys.executable).with_name("openvla")
VERBS = (
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
    "serve",
)
PACKAGES = ("conversion", "data", "evaluation", "options", "presets", "serving", "training")
# Command line without its output folder -> what it asks for
NEEDS = {
    ("stats", DEMOS / "lerobot_image"): "openvla[data]",
    ("stats", DEMOS / "hdf5"): "openvla[data]",
    ("stats", DEMOS / "rlds" / "metaworld_demo"): "openvla[data]",
    ("finetune", "--dataset", DEMOS / "lerobot_image", "--output", "run"): "openvla[train]",
    ("finetune", "--dataset", DEMOS / "lerobot_image", "--output", "run", "--logging", "none"): "openvla[train]",
    ("finetune", "--dataset", DEMOS / "lerobot_image", "--output", "run", "--strategy", "qlora"): "openvla[train]",
    ("merge", "run", "merged"): "openvla[train]",
    ("record", "--output", "recorded"): "openvla[sim]",
    ("evaluate", "--output", "evaluated"): "openvla[sim]",
    ("evaluate", "--output", "evaluated", "--quantization", "int8"): "openvla[sim]",
    ("demo", "--output", "films"): "openvla[sim]",
    ("serve", "--sim"): "openvla[serve]",
    ("export", "packaged", "graphs", "--to", "onnx"): "openvla[onnx]",
}


def run(folder: Path, *arguments, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run([COMMAND, *map(str, arguments)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, f"{arguments}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def check_files() -> None:
    assert INSTALLED == Path(sysconfig.get_path("purelib")) / "openvla", f"{INSTALLED} is no installation"
    there = [name for name in EXTRAS if importlib.util.find_spec(name)]
    assert not there, f"{there} are installed: this environment has extras"
    files = [file for pattern in ("*.py", "*.json", "*.safetensors", "README.md") for file in REPOSITORY.glob(pattern)]
    endings = ("py", "json", "yaml", "md", "html", "js", "css")
    for package in PACKAGES:
        files += [file for ending in endings for file in (REPOSITORY / package).rglob(f"*.{ending}")]
    files += (REPOSITORY / "examples" / "frames").iterdir()
    for file in files:
        name = file.relative_to(REPOSITORY)
        assert (INSTALLED / name).is_file(), f"{name} was not installed"
        assert filecmp.cmp(file, INSTALLED / name, shallow=False), f"{name} is another file: remove build/"
    print(f"{len(files)} files installed")


def check_verbs(folder: Path) -> None:
    run(folder, "--help")
    for verb in VERBS:
        assert f"openvla {verb}" in run(folder, verb, "--help").stdout
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "frame.png")
    predicted = run(folder, "predict", "--image", "frame.png", "--instruction", "open the drawer", "--json")
    assert '"action": [' in predicted.stdout
    run(folder, "package", "packaged", "--weights", INSTALLED)
    run(folder, "export", "packaged", "exported")
    for arguments, extra in NEEDS.items():
        said = run(folder, *arguments, code=2).stderr.splitlines()
        print(said[-1])
        assert len(said) == 1 and said[0].startswith("error: ") and f"pip install '{extra}'" in said[0], said
    assert sorted(path.name for path in folder.iterdir()) == ["exported", "frame.png", "packaged"]


def check_python() -> None:
    for call, extra in (
        (lambda: open_dataset(DEMOS / "lerobot_image"), "openvla[data]"),
        (lambda: make_environment("metaworld"), "openvla[sim]"),
        (lambda: make_environment("robosuite"), "openvla[robosuite]"),
        (lambda: make_environment("libero_spatial"), "hf-libero"),
    ):
        try:
            call()
        except (ValueError, ModuleNotFoundError) as error:
            assert f"pip install '{extra}'" in str(error), error
        else:
            raise AssertionError(f"{extra} is not needed?")


if __name__ == "__main__":
    check_files()
    check_python()
    with tempfile.TemporaryDirectory() as folder:
        check_verbs(Path(folder))
    print("The installation without extras is right.")
