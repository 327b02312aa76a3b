"""Options are taken as they are given, or refused: never read as something else."""

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from openvla.cli import app
from openvla.data import PythonDataset
from openvla.data.mixture import mixture_probabilities
from openvla.data.sources import open_source, open_sources
from openvla.evaluation.environment import make_environment
from openvla.evaluation.evaluate import evaluate
from openvla.options.conversion import QuantizeOptions
from openvla.options.datasets import StatsOptions
from openvla.options.evaluation import EvaluateOptions, RecordOptions
from openvla.options.fields import respelled
from openvla.options.prediction import PredictOptions
from openvla.options.serving import ServeOptions
from openvla.options.training import FinetuneOptions, FinetuneVerb, MergeOptions
from openvla.training.prepared_run import learning_rate


def finetune_options(**changes) -> FinetuneOptions:
    return FinetuneOptions(**{"dataset": "d", "output": "o", "model": "m", "logging": "none", **changes})


def test_learning_rates():
    assert learning_rate(finetune_options()) == 5e-4
    assert learning_rate(finetune_options(strategy="full")) == 2e-5
    assert learning_rate(finetune_options(learning_rate=0.0)) == 0.0
    assert learning_rate(finetune_options(learning_rate=np.float64(1e-3))) == 1e-3


def test_paths_are_texts_and_texts_are_paths():
    """A `Path` of a dataset ended the run in an AttributeError once all was read."""
    made = finetune_options(dataset=Path("d") / "e", output=Path("o"), statistics=Path("s.json"))
    assert (made.dataset, made.output, made.statistics) == (str(Path("d/e")), "o", "s.json")
    assert MergeOptions(run="run", out="out").run == Path("run")
    assert FinetuneVerb(dataset="d", output="o", logging="none", merge="merged").merge == Path("merged")


def test_options_that_have_no_effect_beside_others():
    for given, message in (
        ({"strategy": "full", "rank": 8}, "rank=8: strategy='full' has no adapter"),
        ({"strategy": "sandwich", "alpha": 8}, "alpha=8: strategy='sandwich' has no adapter"),
        ({"strategy": "last_layer", "dropout": 0.1}, "dropout=0.1: .*leave it out, or give strategy='lora'"),
        ({"eval_every": 0, "eval_samples": 8}, "eval_samples=8: nothing is evaluated with eval_every=0"),
    ):
        with pytest.raises(ValueError, match=message):
            FinetuneVerb(dataset="d", output="o", logging="none", **given)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "max_grad_norm", "dropout", "held_out"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "0.1", True])
def test_numbers_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        finetune_options(**{name: value})


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 2.5},
        {"steps": "10"},
        {"eval_every": -1},
        {"alpha": 0},
        {"seed": -1},
        {"seed": 2**32},
        {"rank": None},
        {"batch_size": math.nan},
        {"dropout": 1.0},
        {"strategy": "lora "},
        {"optimizer": "adam"},
        {"schedule": "cosin"},
        {"dtype": "bf16"},
        {"logging": "tensorbord"},
    ],
    ids=str,
)
def test_finetune_options_that_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        finetune_options(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"noise": math.nan}, {"noise": math.inf}, {"size": 2.5}, {"format": "rlds"}], ids=str
)
def test_record_options_that_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        RecordOptions(output="o", **wrong)


@pytest.mark.parametrize(
    "kind, given",
    [(RecordOptions, {"size": 64}), (RecordOptions, {"wrist": True}), (EvaluateOptions, {"camera": "corner2"})],
    ids=str,
)
def test_a_simulator_is_told_one_thing(kind, given):
    """Of two, one was ignored, and stood in what was written down."""
    (name,) = given
    with pytest.raises(ValueError, match=f"{name}=.*: the options of the simulator say 'other'"):
        kind(output="o", env_options={name: "other"}, **given)
    assert kind(output="o", env_options={name: "other"}).environment_options[name] == "other"


@pytest.mark.parametrize(
    "wrong",
    [{"max_steps": 0}, {"workers": 0}, {"latency": math.nan}, {"hz": 0.0}, {"hz": math.nan}, {"episodes": 10**20}],
    ids=str,
)
def test_evaluation_options_that_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        evaluate(model="none", output=tmp_path, policy="random", **wrong)


def test_an_environment_says_which_options_it_has():
    with pytest.raises(ValueError, match="camera='frontal' is unknown. .*agentview"):
        make_environment("libero_spatial", camera="frontal")
    with pytest.raises(ValueError, match="option of libero_spatial='cameras' is unknown. Did you mean 'camera'"):
        make_environment("libero_spatial", cameras="agentview")


# Of datasets ----------------------------------------------------------------------------------------------------------


def episodes() -> PythonDataset:
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 7))
    actions[:, -1] = np.arange(40) < 20
    return PythonDataset([{"actions": actions, "instruction": "go"}] * 3, "mine")


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": 0},
        {"weight": -1.0},
        {"weight": math.nan},
        {"weight": math.inf},
        {"weight": True},
        {"held_out": 1},
        {"held_out": -0.1},
        {"held_out": math.nan},
        {"held_out": "0.1"},
        {"held_out": True},
        {"max_action": 0},
        {"max_action": -1.0},
        {"max_proprio": math.nan},
        {"keep_unlabeled": "no"},
        {"on_error": "ignore"},
        {"camera": 1},
        {"filters": 7},
    ],
    ids=str,
)
def test_options_of_a_dataset_that_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        open_source(episodes(), **wrong)


@pytest.mark.parametrize("make", [RecordOptions, EvaluateOptions, ServeOptions], ids=lambda kind: kind.__name__)
def test_numbers_that_fill_a_machine(make):
    """So many processes or requests were begun, until the memory was full."""
    for name in {"workers", "size", "max_batch"} & {item.name for item in fields(make)}:
        with pytest.raises(ValueError, match=f"{name}=100000: it must be a whole number of at least 1 and below"):
            make(**{} if make is ServeOptions else {"output": "out"}, **{name: 100_000})


@pytest.mark.parametrize("value", [None, ["reach-v3"], 5, b"reach-v3", {"a": 1}], ids=str)
def test_texts_that_are_none(value):
    with pytest.raises(ValueError, match="env=.*: expected a text"):
        RecordOptions(output="out", env=value)
    if value is not None:
        with pytest.raises(ValueError, match="allow_host=.*: expected a text"):
            ServeOptions(allow_host=value)
    with pytest.raises(ValueError, match="insecure=.*: expected true or false"):
        ServeOptions(insecure=value)
    with pytest.raises(ValueError, match="bits=.* is unknown.* Known: 8, 4, fp8"):
        QuantizeOptions(model="m", out="o", bits=value)


def test_what_is_switched_on_by_a_word_is_not():
    """A text is true, "false" as well: a server that listens to everybody."""
    with pytest.raises(ValueError, match="insecure='false': expected true or false"):
        ServeOptions(insecure="false")
    assert RecordOptions(output=Path("out"), student=Path("model")).output == "out"  # a path is a text


def test_numbers_of_numpy_and_yaml_are_those_of_json():
    """They could not be written down, or broke what counts with them; one of 400 digits was an OverflowError."""
    made = RecordOptions(output="out", episodes=np.int64(2), size=32.0, noise=np.float32(0.5), delay=np.uint8(3))
    saved = {name: (type(value), value) for name, value in vars(made).items() if name in ("episodes", "size", "delay")}
    assert saved == {"episodes": (int, 2), "size": (int, 32), "delay": (int, 3)}
    assert type(made.noise) is float and made.noise == 0.5
    assert type(finetune_options(learning_rate=1).learning_rate) is int  # as it was given
    for name in ("episodes", "noise"):
        with pytest.raises(ValueError, match=f"{name}=1000.*it must be"):
            RecordOptions(output="out", **{name: 10**400})


@pytest.mark.parametrize("names", ["http://gpu-box", "gpu-box:8000", "gpu-box other", "*.example", "gpu-box, me@there"])
def test_names_that_no_client_asks_under(names):
    """They let nobody in, and the refusal told to give what was given."""
    with pytest.raises(ValueError, match="allow_host=.*: expected names of machines"):
        ServeOptions(allow_host=names)
    assert ServeOptions(allow_host=" gpu-box, robots.example ,").allow_host


def test_options_that_say_nothing():
    for filters in ("", " , ", [], [""], None):
        assert open_source(episodes(), filters=filters).removed == {"unlabeled": {"steps": 0, "episodes": 0}}
    assert list(open_source(episodes(), filters="no-ops, no-ops").removed) == ["no-ops", "unlabeled"]
    assert open_source(episodes(), weight="0.5").weight == 0.5


def test_weights_of_a_mixture():
    for weight in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="numbers above 0"):
            mixture_probabilities([1.0, weight], [10, 10])
    for text in ("a:0,b:1", "a:-1", "a:nan", "a:inf"):
        with pytest.raises(ValueError, match="The weight of 'a' is"):
            open_sources(text)


@pytest.mark.parametrize(
    "message, at_the_command_line, in_yaml",
    [
        ("tolerance_s=5: expected less", "--tolerance-s 5: expected less", "tolerance_s: 5: expected less"),
        ("allow more (tolerance_s)", "allow more (--tolerance-s)", "allow more ('tolerance_s')"),
        ("name='a b' is taken", "--name 'a b' is taken", "name: 'a b' is taken"),
        ("leave keep_unlabeled=False out", "leave --no-keep-unlabeled out", "leave keep_unlabeled: False out"),
        ("name it with name=... (--name)", "name it with --name", "name it with 'name'"),
        ("'/x/tolerance_s/y' and name", "'/x/tolerance_s/y' and name", "'/x/tolerance_s/y' and name"),
    ],
)
def test_each_door_names_its_own_spelling(message, at_the_command_line, in_yaml):
    names = ("tolerance_s", "name", "keep_unlabeled")
    assert respelled(message, {name: f"--{name.replace('_', '-')}" for name in names}) == at_the_command_line
    of_file = respelled(message, {name: name for name in names}, "{name}: {value}")
    assert of_file == in_yaml
    assert respelled(of_file, {name: f"--{name.replace('_', '-')}" for name in names}) == in_yaml  # as it was written
    assert respelled(message, {}) == message


@pytest.mark.parametrize("weight", ["-2", "0", "nan", "inf", "1:2", "x", ""])
def test_weights_that_are_none(weight):
    with pytest.raises(ValueError, match="weight"):
        open_sources(f"a:1.0,b:{weight}")


def test_a_mixture_names_each_dataset_once(tmp_path):
    for text in ("a:1,a:2", ":1.0,a", "a:1,:2"):
        with pytest.raises(ValueError, match="twice|dataset:weight"):
            open_sources(text)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="'a' and './a' in '.*' are one dataset"):
        open_sources("a:1,./a:2", data_root=tmp_path)
    (tmp_path / "m.yaml").write_text("a: 1\nb: {path: a, weight: 2}\n")
    with pytest.raises(ValueError, match="'a' and 'b' in '.*m.yaml' are one dataset"):
        open_sources(tmp_path / "m.yaml")


def test_an_option_of_a_yaml_file_is_called_as_it_is_there(tmp_path):
    demos = Path(__file__).parent / "fixtures/demos"
    (tmp_path / "m.yaml").write_text(f"a: {{path: {demos}/lerobot_video, tolerance_s: 5}}\nb: {{path: {demos}/hdf5}}\n")
    found = CliRunner().invoke(app, ["stats", str(tmp_path / "m.yaml")])
    assert found.exit_code == 2 and "m.yaml, 'a': tolerance_s: 5: expected seconds" in found.stderr
    found = CliRunner().invoke(app, ["stats", f"{demos}/lerobot_video", "--tolerance-s", "5"])
    assert found.exit_code == 2 and "error: --tolerance-s 5.0: expected seconds" in found.stderr


def test_the_home_folder_in_a_path(monkeypatch, tmp_path):
    """A shell leaves it in --output=~/x, and a folder named "~" was made in the working directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    made = FinetuneOptions(output="~/run", model="~/base", dataset="~/d", logging="none")
    assert (made.output, made.model, made.dataset) == tuple(f"{tmp_path}/{name}" for name in ("run", "base", "d"))
    assert StatsOptions(dataset="d", output=Path("~/s.json")).output == tmp_path / "s.json"
    assert PredictOptions(image=["a.png"], instruction="~20 cm to the left").instruction == "~20 cm to the left"
    with pytest.raises(ValueError, match="there is no home folder '~nobody_here'"):
        FinetuneOptions(output="~nobody_here/run", dataset="d", logging="none")
