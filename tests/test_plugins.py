"""Formats and simulators of one's own, named MODULE:CLASS: from every door, and what a mistake is answered with."""

import inspect
import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from openvla.cli import app
from openvla.data import open_dataset
from openvla.data.formats import registry
from openvla.data.formats.registry import FORMATS, GIVEN_OTHERWISE, reader_class
from openvla.data.sources import open_source, open_sources
from openvla.evaluation import make_environment
from openvla.evaluation.evaluate import evaluate
from openvla.options.datasets import DatasetOptions
from openvla.options.fields import default_of
from openvla.options.training import FinetuneOptions
from openvla.plugins import load_class, read_options
from openvla.training.preparation import prepare


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL))
READER = EXAMPLES["my_reader"] + "\n\nclass NoReader:\n    pass\n"
SIMULATOR = EXAMPLES["my_simulator"]
NO_EXPERT = "\n\nclass NoExpert:\n    def reset(self, seed, task, variation=''):\n        pass\n"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with a reader, data for it, and a simulator."""
    (tmp_path / "my_reader.py").write_text(READER)
    (tmp_path / "my_simulator.py").write_text(SIMULATOR + NO_EXPERT)
    generator = np.random.default_rng(0)
    episodes = [generator.uniform(-0.4, 0.4, (4 + number, 7)).tolist() for number in range(6)]
    (tmp_path / "robot.jsonl").write_text("\n".join(map(json.dumps, episodes)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    for name in ("my_reader", "my_simulator"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def run(*arguments, code: int = 0):
    found = CliRunner().invoke(app, list(map(str, arguments)))
    assert found.exit_code == code, found.output + repr(found.exception)
    return found


# Formats --------------------------------------------------------------------------------------------------------------


def test_a_reader_of_ones_own_at_every_door(here, small_policy):
    plain = open_dataset("robot.jsonl", format="my_reader:Lines")
    assert len(plain) == 6 and plain.name == "robot" and len(plain[0]) == 4
    doubled = open_dataset("robot.jsonl", format="my_reader:Lines", scale=2.0, reverse=True)
    np.testing.assert_allclose(doubled[5].actions, 2 * plain[0].actions)

    own = ["--format", "my_reader:Lines", "--reader", "scale=2", "--reader", "reverse=yes", "--gripper-dims", "none"]
    said = run("stats", "robot.jsonl", *own, "--output", "statistics.json").stdout
    assert "robot: 6 episodes" in said
    written = json.loads((here / "statistics.json").read_text())["robot"]
    reader = {"scale": 2, "reverse": True}
    source = open_source("robot.jsonl", format="my_reader:Lines", reader=reader, gripper_dims="none")
    assert written["action"]["q99"] == source.statistics["action"]["q99"]
    assert source.statistics["action"]["max"][0] > 0.5  # scaled

    entry = "{path: robot.jsonl, format: 'my_reader:Lines', reader: {scale: 2, reverse: true}, gripper_dims: none}"
    (here / "mixture.yaml").write_text(f"robot: {entry}\n")
    (mixed,) = open_sources("mixture.yaml")
    assert mixed.statistics == source.statistics

    options = FinetuneOptions(dataset="robot.jsonl", output="run", format="my_reader:Lines", reader=reader)
    assert prepare(options).statistics["robot"]["action"]["q99"] == written["action"]["q99"]
    cheap = ["--model", small_policy, "--strategy", "last_layer", "--dry-run"]
    plan = run("finetune", "--dataset", "robot.jsonl", "--output", "run", *own, *cheap).stdout
    assert "robot: 6 episodes" in plan


@pytest.mark.parametrize(
    "format, reader, said",
    [
        ("my_raeder:Lines", [], "there is no module 'my_raeder'"),
        ("my_reader:Line", [], "has no class Line. Did you mean 'Lines'"),
        ("my_reader:NoReader", [], "NoReader has no __len__, __getitem__"),
        ("my_reader:", [], "expected MODULE:CLASS"),
        ("my_reader:Lines", ["scael=2"], "option of my_reader:Lines='scael' is unknown. Did you mean 'scale'"),
        ("my_reader:Lines", ["scale=two"], "scale='two' is not a number"),
        ("my_reader:Lines", ["scale"], "--reader scale: expected NAME=VALUE"),
        ("my_reader:Lines", ["scale=1", "scale=2"], "'scale' is given twice"),
        ("lerobto", [], "did you mean 'lerobot'"),
    ],
)
def test_mistakes_in_a_reader(here, format, reader, said):
    given = [part for text in reader for part in ("--reader", text)]
    assert said in run("stats", "robot.jsonl", "--format", format, *given, code=2).stderr


def test_options_of_readers_by_either_name(here):
    demo = ROOT / "tests/fixtures/demos/lerobot_video"
    own = run("stats", demo, "--reader", "tolerance_s=5", code=2).stderr
    assert own == run("stats", demo, "--tolerance-s", "5", code=2).stderr and "expected seconds" in own
    assert "given twice" in run("stats", demo, "--reader", "tolerance_s=1", "--tolerance-s", "1", code=2).stderr
    assert "tolerance_s is an option of LeRobot folders" in run(
        "stats", ROOT / "tests/fixtures/demos/hdf5", "--reader", "tolerance_s=1", code=2
    ).stderr.replace("--tolerance-s", "tolerance_s")
    with pytest.raises(ValueError, match="reader='x': expected a mapping"):
        open_source(demo, reader="x")


def test_every_reader_takes_what_its_format_says_and_every_verb_offers_it():
    offered = {item.name for item in fields(DatasetOptions)}
    for name, known in FORMATS.items():
        said = {item.name: default_of(item) for item in fields(known.options)}
        reader = reader_class(name)
        with pytest.raises(FileNotFoundError):  # the options are read first, and all are known
            reader("nowhere", **said)
        with pytest.raises(TypeError, match="unexpected keyword argument 'camera'"):
            reader("nowhere", camera="front")
        taken = set(list(inspect.signature(reader).parameters)[2:]) - {*GIVEN_OTHERWISE, "options"}
        assert said.keys() <= offered and taken == ({"standardize"} if known.standardizes else set())


def test_a_format_is_known_by_its_entry_alone(here, monkeypatch):
    """Opening and recording know no format by name: an entry more, and its files are recognised."""
    lines = registry.Format(
        reader="lines:Lines",
        options=DatasetOptions,
        recognises=lambda path: path.suffix == ".jsonl",
        found_by="*.jsonl (lines)",
        called="files of lines",
    )
    monkeypatch.setitem(FORMATS, "lines", lines)
    with pytest.raises(ModuleNotFoundError, match="formats.lines"):
        open_dataset("robot.jsonl")
    with pytest.raises(ValueError, match="tolerance_s is an option of LeRobot folders"):
        open_dataset(ROOT / "tests/fixtures/demos/hdf5", tolerance_s=1)
    (here / "empty").mkdir()
    with pytest.raises(ValueError, match=r"or \*.jsonl \(lines\)"):
        open_dataset(here / "empty")


# Simulators -----------------------------------------------------------------------------------------------------------


def test_a_simulator_of_ones_own_is_recorded_and_evaluated(here):
    own = ["--env", "my_simulator:Slide", "--tasks", "all", "--env-option", "start=0.5"]
    said = run("record", *own, "--episodes", "2", "--size", "16", "--output", "recorded").stdout
    assert "go: 2 episodes" in said and len(open_dataset("recorded")) == 2
    said = run("evaluate", *own, "--policy", "expert", "--episodes", "1", "--videos", "0", "--output", "out").stdout
    assert "mean success 100.0%" in said
    settings = json.loads((here / "out" / "evaluation.json").read_text())
    assert settings["env"] == "my_simulator:Slide" and settings["env_options"] == {"start": 0.5}
    given = {"env": "my_simulator:Slide", "tasks": "go", "policy": "expert", "episodes": 1, "videos": 0}
    with pytest.raises(ValueError, match=r"env_options was \{'start': 0.5\}, is \{'start': 0.6\}"):
        evaluate(output=here / "out", start=0.6, progress=False, **{**given, "tasks": "all"})


@pytest.mark.parametrize(
    "env, options, said",
    [
        ("metawrld", [], "Did you mean 'metaworld'"),
        ("my_simulatr:Slide", [], "there is no module 'my_simulatr'"),
        ("my_simulator:Slyde", [], "Did you mean 'Slide'"),
        ("my_simulator:NoExpert", [], "NoExpert has no instructions, variations, step, expert_action, close"),
        ("my_simulator:Slide", ["strat=1"], "Did you mean 'start'"),
        ("my_simulator:Slide", ["start=far"], "start='far' is not a number"),
    ],
)
@pytest.mark.parametrize("verb", ["evaluate", "record", "demo"])
def test_mistakes_in_a_simulator(here, verb, env, options, said):
    given = [part for text in options for part in ("--env-option", text)]
    assert said in run(verb, "--env", env, *given, "--output", "out", code=2).stderr
    assert not (here / "out").exists()


def test_a_mistyped_axis_or_mixture_is_answered_with_the_nearest(here):
    pytest.importorskip("metaworld", reason="Meta-World needs the [sim] extra")
    wrong = run("evaluate", "--axis", "none,vizual", "--policy", "expert", "--output", "out", code=2).stderr
    assert "'vizual' is unknown. Did you mean 'visual'" in wrong
    assert "Did you mean 'oxe_magic_soup_plus'" in run("stats", "oxe_magic_soup_pls", code=2).stderr
    assert "Did you mean 'bridge_orig'" in run("stats", "bridge_orgi:1,kuka:1", code=2).stderr


def test_what_a_class_lacks_is_said_at_once(here):
    (here / "half.py").write_text(SIMULATOR.replace(", frequency, ", ", _, ").replace("class Slide", "class Half"))
    with pytest.raises(ValueError, match="half:Half' has no frequency"):
        make_environment("half:Half")
    (here / "broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(ValueError, match="its module needs nothing_of_that_name"):
        load_class("broken:X", "reader", ())
    (here / "typo.py").write_text("def f(:\n")
    with pytest.raises(ValueError, match="its module cannot be imported"):
        load_class("typo:X", "reader", ())


def test_texts_become_what_annotations_say():
    class Made:
        def __init__(self, count: int = 1, share: "float | None" = None, on: bool = False, name: str = "", free=None):
            pass

    texts = {"count": "3", "share": "0.5", "on": "no", "name": "7", "free": "x"}
    assert read_options(Made, texts, "made") == {"count": 3, "share": 0.5, "on": False, "name": "7", "free": "x"}
    assert read_options(Made, {"count": 2.5}, "made") == {"count": 2.5}  # of Python: the class checks it
    with pytest.raises(ValueError, match="count='3.5' is not a whole number"):
        read_options(Made, {"count": "3.5"}, "made")
