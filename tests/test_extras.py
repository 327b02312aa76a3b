"""Without an extra: one line that names it, for libraries that extras bring and for no others."""

import sys
import tomllib
from pathlib import Path

import processes
import pytest
from typer.testing import CliRunner

from openvla import cli
from openvla.evaluation.evaluate import evaluate
from openvla.extras import EXTRAS, remedy, require
from openvla.training import plan


ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "tests" / "fixtures" / "demos" / "lerobot_image"
WITHOUT = """
import sys
for name in sys.argv[1].split(","):
    assert name not in sys.modules or name == "av"  # which older torchvision imports
    sys.modules[name] = None  # as if it were not installed
from openvla.cli import main
for line in sys.argv[2:]:
    sys.argv = ["openvla", *line.split()]
    try:
        main()
    except SystemExit as end:
        print(end.code)
"""


def test_the_table_names_extras_that_exist():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for library, extras in EXTRAS.items():
        for extra in extras:
            wanted = " ".join([*declared[extra], *(declared["data"] if "openvla[data]" in declared[extra] else [])])
            known = library.replace("_", "-") in wanted or library in ("gymnasium", "mujoco")  # which metaworld brings
            assert known, f"{library} is not in [{extra}]"


def test_every_simulator_brings_what_films_and_recordings_need():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("sim", "robosuite"):  # robosuite's once did not: its episodes ran, and the first video failed
        assert "openvla[data]" in declared[extra]


def test_the_extra_of_a_verb_is_preferred():
    assert remedy("simplejpeg") == "simplejpeg, which is not installed: pip install 'openvla[data]'."
    assert "'openvla[sim]'" in str(remedy("simplejpeg", "sim"))
    assert remedy("torch") is None and remedy(None) is None and remedy("openvla") is None


def test_require():
    require("av", "h5py", purpose="this")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(ModuleNotFoundError, match=r"'int8' needs bitsandbytes.*openvla\[quant\]"):
            require("bitsandbytes", purpose="'int8'")


def test_what_is_missing_is_said_before_work_begins(monkeypatch, tmp_path, capsys):
    """Videos are written last, adapters are made after a model without values."""
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"A video \(--videos\) needs av.*openvla\["):
        evaluate(policy="mean", tasks="reach-v3", episodes=1, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit):
        plan.main(["openvla-7b"])
    assert "strategy 'lora' needs peft" in capsys.readouterr().err


def test_verbs_without_extras(tmp_path):
    """In one process, as what could not be imported is tried again."""
    verbs = {f"stats {DEMO}": "data", f"finetune --dataset {DEMO} --output run --logging none": "train"}
    verbs["demo --output films"] = "sim"
    done = processes.run(WITHOUT, ",".join(EXTRAS), *verbs, cwd=tmp_path, server="libraries")
    lines = done.stderr.splitlines()
    assert done.stdout.split() == ["2"] * 3 and len(lines) == 3, done.stderr
    for line, extra in zip(lines, verbs.values()):
        assert line.startswith("error: ") and f"pip install 'openvla[{extra}]'" in line
    assert not list(tmp_path.iterdir())


def test_a_fault_of_the_package_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'openvla.gone'", name="openvla.gone")

    monkeypatch.setattr("openvla.conversion.package_checkpoint", broken)
    found = CliRunner().invoke(cli.app, ["package", str(tmp_path / "out"), "--weights", "x"])
    assert isinstance(found.exception, ModuleNotFoundError) and found.exit_code == 1
