"""Runs that end otherwise than planned: diverged, killed, changed in between, finished twice, damaged, without room."""

import hashlib
import json
import os
import shutil
import signal
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import processes
import pytest
import torch
import yaml
from data_files import write_lerobot
from safetensors.torch import load_file, save_file
from test_extending import small_model
from typer.testing import CliRunner

from openvla import OpenVLAForActionPrediction, cli
from openvla.action_heads_openvla import TokenHead
from openvla.data.sources import open_sources
from openvla.folders import locked
from openvla.training import FinetuneOptions, begun, finetune, plan_run, resume
from openvla.training import trainer as trainer_module
from openvla.training.checks import DivergedError


pytest.importorskip("accelerate", reason="training needs the [train] extra")
pytest.importorskip("peft", reason="training needs the [train] extra")

ROOT = Path(__file__).resolve().parents[1]
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "processor_config.json")
BASE = ROOT  # until `small_base`: what is trained where a test names no model
pytestmark = pytest.mark.usefixtures("small_base")


def demos(file: Path, scale: float = 1.0, episodes: int = 3) -> Path:
    rng = np.random.default_rng(0)
    file.unlink(missing_ok=True)  # it may be open
    with h5py.File(file, "w") as content:
        for number in range(episodes):
            group = content.create_group(f"data/demo_{number}")
            group["actions"] = np.column_stack([scale * rng.uniform(-1, 1, (9, 6)), np.arange(9) < 5])
            group["obs/agentview_rgb"] = rng.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    return file


@pytest.fixture
def dataset(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    return demos(tmp_path / "data" / "push_the_cup_demo.hdf5")


def options(output: Path, dataset: Path, **changes) -> FinetuneOptions:
    settings = {"steps": 2, "batch_size": 1, "shuffle_buffer": 4, "name": "mine", "logging": "none", "save_every": 1}
    settings |= {"model": str(BASE), "strategy": "last_layer", "dtype": "float32", "held_out": 0.0, "keep": 9}
    return FinetuneOptions(output=str(output), dataset=str(dataset), **{**settings, **changes})


def names(output: Path) -> list[str]:
    return [path.name for path in resume.checkpoints(output / "checkpoints")]


def digest(output: Path) -> str:
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


def losses_that_are_nan_from(batch: int, monkeypatch) -> None:
    real, count = TokenHead.loss, [0]

    def loss(head, model, inputs):
        result, answer = real(head, model, inputs)
        count[0] += model.training
        return result * (float("nan") if count[0] >= batch else 1), answer

    monkeypatch.setattr(TokenHead, "loss", loss)


# Diverged


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "full", "max_grad_norm": 0.0},
        {"strategy": "full", "precision": "bf16"},
        {"strategy": "lora", "rank": 4, "gradient_accumulation": 2},
        {"optimizer": "muon"},
    ],
    ids=lambda changes: "-".join(f"{value}" for value in changes.values()),
)
def test_weights_that_are_too_large_are_not_saved(changes, dataset, tmp_path, request):
    """The step that makes them has a finite loss and a finite gradient: the next would find out too late."""
    if changes.get("optimizer") == "muon":
        request.getfixturevalue("float32_muon")
    with pytest.raises(DivergedError, match=r"diverged at step 1: .*no checkpoint.*lower learning_rate \(1e\+30\)"):
        finetune(options(tmp_path / "run", dataset, learning_rate=1e30, **changes))
    assert {path.name for path in (tmp_path / "run").rglob("*")} == {"finetune.json", "checkpoints"}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_diverged_run_keeps_its_last_good_checkpoint(accumulated, dataset, tmp_path, monkeypatch):
    losses_that_are_nan_from(2 * accumulated + 1, monkeypatch)
    made = options(tmp_path / "run", dataset, steps=4, log_every=9, gradient_accumulation=accumulated)
    with pytest.raises(DivergedError, match=r"at step 3: the loss is nan.*checkpoint-2' .*max_grad_norm.*--dry-run"):
        finetune(made)
    assert names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]
    kept = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-2" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    assert not (tmp_path / "run" / "dataset_statistics.json").exists()
    monkeypatch.undo()
    finetune(made, resume=True)  # here the reason has gone
    assert names(tmp_path / "run")[-1] == "checkpoint-4"


def test_a_model_that_is_not_finite_does_not_learn(dataset, tmp_path, monkeypatch):
    losses_that_are_nan_from(0, monkeypatch)
    with pytest.raises(DivergedError, match="Before the first step the loss on held-out frames is nan"):
        finetune(options(tmp_path / "run", dataset, held_out=0.4))


def test_a_result_that_does_not_fit_its_type_is_not_written(dataset, tmp_path):
    base = OpenVLAForActionPrediction.from_pretrained(BASE)
    base.half().save_pretrained(tmp_path / "base")
    for file in MODEL_FILES[2:]:
        shutil.copy(ROOT / file, tmp_path / "base")
    made = options(tmp_path / "run", dataset, steps=1, model=str(tmp_path / "base"), dtype="auto", learning_rate=1e6)
    with pytest.raises(DivergedError, match=r"weights are too large for torch.float16, first of them \w+"):
        finetune(made)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_diverged_run_is_one_line_and_exit_code_1(dataset, tmp_path):
    given = f"finetune --model {BASE} --dataset {dataset} --output {tmp_path / 'run'} --strategy last_layer --steps 2"
    given += " --batch-size 1 --shuffle-buffer 4 --logging none --learning-rate 1e30 --held-out 0 --dtype float32"
    result = CliRunner().invoke(cli.app, given.split())
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith("error: The run diverged at step 2")


TWO = """
import json, sys
import torch
import yaml
from openvla.action_heads_openvla import TokenHead
from openvla.training import FinetuneOptions, finetune

torch.set_num_threads(1)
loss = TokenHead.loss

def of_one_rank(head, model, inputs):
    result, answer = loss(head, model, inputs)
    return result * (float("nan") if torch.distributed.get_rank() == 1 else 1), answer

TokenHead.loss = of_one_rank
finetune(FinetuneOptions(**json.loads(sys.argv[1])))
"""


def test_one_rank_that_diverges_stops_all(dataset, tmp_path):
    """Each stops itself: nothing ends the one when the other has failed, as torchrun would do."""
    for rank in processes.run_ranks(TWO, json.dumps(vars(options(tmp_path / "run", dataset))), cwd=tmp_path):
        assert rank.returncode == 1 and "DivergedError: The run diverged at step 1: the loss is" in rank.stderr
    assert {path.name for path in (tmp_path / "run").rglob("*")} == {"finetune.json", "checkpoints"}
    assert not list(tmp_path.rglob("*.lock"))


# Finished, and resumed


def test_a_finished_run_is_not_trained_further(dataset, tmp_path, capsys):
    made = options(tmp_path / "run", dataset)
    finetune(made)
    before = digest(tmp_path / "run")
    finetune(made, resume=True)
    assert digest(tmp_path / "run") == before and names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]
    assert "finished  at step 2" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-1")
    with pytest.raises(ValueError, match=r"checkpoint-2' is beyond steps=1: give --steps 2"):
        finetune(options(tmp_path / "run", dataset, steps=1), resume=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(FileExistsError, match="finished run without checkpoints"):
        finetune(made, resume=True)
    assert digest(tmp_path / "run") == before


def test_what_a_run_was_begun_with_has_to_be_the_same(dataset, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in MODEL_FILES:
        shutil.copyfile(BASE / file, base / file)
    longer = options(tmp_path / "run", dataset, steps=2, model=str(base))
    finetune(options(tmp_path / "run", dataset, steps=1, model=str(base)))
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"begun with other weights than '.*base' has now"):
        finetune(longer, resume=True)
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)

    demos(dataset, scale=5.0)
    statistics = r"statistics of the dataset 'mine' are others \(action, proprio|action\)"
    with pytest.raises(ValueError, match=f"files or episodes of the dataset 'mine' are others; the {statistics}"):
        finetune(longer, resume=True)
    started = tmp_path / "run" / "finetune.json"
    content = json.loads(started.read_text())
    old = {name: value for name, value in content.items() if not name.endswith(("digest", "digests"))}
    started.write_text(json.dumps(old))  # as before digests were kept
    with pytest.raises(ValueError, match=statistics):
        finetune(longer, resume=True)
    demos(dataset)
    finetune(longer, resume=True)
    assert names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]


def test_options_of_python_are_those_that_were_written_down(dataset, tmp_path):
    given = {"cameras": ("agentview_rgb",), "gripper_dims": (6,)}  # lists in a file
    finetune(options(tmp_path / "run", dataset, steps=1, **given))
    finetune(options(tmp_path / "run", dataset, **given), resume=True)
    assert names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]


def test_what_a_default_means_may_be_said_when_a_run_continues(dataset, tmp_path):
    said = {"alpha": 2, "head": "tokens", "action_chunk": 1, "camera_names": " primary", "prefix_training": 0}
    said |= {"eval_every": 1, "normalization": "bounds_q99", "learning_rate": 5e-4, "max_grad_norm": 1.0}
    silent = {"strategy": "lora", "rank": 2, "name": None}
    for first, then in ((silent, silent | said | {"name": "push_the_cup_demo"}), (silent | said, silent)):
        output = tmp_path / str(first is silent)
        finetune(options(output, dataset, steps=1, **first))
        with pytest.raises(
            ValueError, match="other options or data: alpha was 2, is 4; normalization was 'bounds_q99'"
        ):
            finetune(options(output, dataset, **{**then, "alpha": 4, "normalization": "bounds"}), resume=True)
        finetune(options(output, dataset, **then), resume=True)
        assert names(output) == ["checkpoint-1", "checkpoint-2"]


def test_a_run_that_continues_has_the_intervals_of_its_command(dataset, tmp_path):
    """Those of the checkpoint counted, and `--save-every 1` of a run that is often killed kept nothing."""
    run = tmp_path / "run"
    finetune(options(run, dataset, steps=2, save_every=2, log_every=2))
    finetune(options(run, dataset, steps=5, save_every=1, log_every=1), resume=True)
    assert names(run) == [f"checkpoint-{step}" for step in (2, 3, 4, 5)]
    log = json.loads((run / "checkpoints" / "checkpoint-5" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry][-3:] == [3, 4, 5]


def test_batches_that_do_not_fit_the_shared_memory(dataset, tmp_path, monkeypatch):
    """A process that found no room for one said so to nobody, and training waited for ever."""
    monkeypatch.setattr(resume, "SHARED", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=64e6 if path == tmp_path else 1e12))
    for more, said in (
        ({}, None),
        ({"workers": 0}, None),
        ({"gradient_accumulation": 64}, r"workers=2: .* up to 83 MB .* 64 MB"),
        ({"batch_size": 64}, r"workers=2: .* up to \d+ MB .* 64 MB"),
    ):
        run = options(tmp_path / f"run{len(more)}", dataset, **{"workers": 2, "steps": 1, **more})
        shape = SimpleNamespace(input_shape=(6, 224, 224))
        with pytest.raises(OSError, match=said) if said else nullcontext():
            resume.check_shared_memory(SimpleNamespace(camera_names=["primary"], vision_backbone=shape), run, False)
        if "batch_size" not in more:  # of a GPU, whose batches are copied
            resume.check_shared_memory(SimpleNamespace(camera_names=["primary"], vision_backbone=shape), run, True)
    with pytest.raises(OSError, match="docker run --shm-size 8g"):
        finetune(replace(run, batch_size=10_000))
    assert not (tmp_path / "run1").exists()


def test_weights_of_a_run_may_be_read_by_whoever_may_read_the_rest(dataset, tmp_path):
    run = tmp_path / "run"
    finetune(options(run, dataset, steps=1))
    for folder in (run, run / "checkpoints" / "checkpoint-1"):
        assert len({(folder / name).stat().st_mode for name in ("model.safetensors", "config.json")}) == 1


def test_options_of_adapters_do_not_hold_up_a_run_without_one(dataset, tmp_path):
    """Runs that were begun with them could neither be continued with them nor without."""
    finetune(options(tmp_path / "run", dataset, steps=1, rank=4))
    finetune(options(tmp_path / "run", dataset), resume=True)


def test_digests_of_data_outlive_the_cache_of_statistics(dataset, monkeypatch):
    sources = open_sources(dataset)
    before = begun.data_digests(sources)
    monkeypatch.setattr("openvla.data.survey.VERSION", 99)
    assert begun.data_digests(sources) == before


def test_a_run_of_a_version_that_looked_into_no_links(tmp_path):
    """Digests of LeRobot had no tables in folders that are links, and such a run was refused as one of other data."""
    folder, disk, run = write_lerobot(tmp_path / "set", "v2.1"), tmp_path / "disk", tmp_path / "run"
    (folder / "data/chunk-000").rename(disk)
    (folder / "data/chunk-000").symlink_to(disk)
    finetune(options(run, folder, steps=1))
    (source,) = open_sources(folder)
    seen = {name: path for name, path in source.everything[0].content_files().items() if "chunk-000" not in name}
    source.everything = (SimpleNamespace(content_files=lambda: seen, content_digest=source.dataset.content_digest),)
    before = {"mine": begun.data_digests([source])[source.name]}
    for kept in (run / "finetune.json", run / "checkpoints" / "checkpoint-1" / "finetune.json"):
        settings = json.loads(kept.read_text())
        assert before != settings["data_digests"]
        kept.write_text(json.dumps(settings | {"data_digests": before}))
    finetune(options(run, folder), resume=True)
    (folder / "meta/more.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="files or episodes of the dataset 'mine' are others"):
        finetune(options(run, folder, steps=3), resume=True)


def test_a_run_of_a_version_that_took_no_grippers_from_statistics(dataset, tmp_path):
    """It could not be continued, and nothing that one could give made it so."""
    finetune(options(tmp_path / "first", dataset, steps=1, gripper_dims="none"))
    mine = {"statistics": str(tmp_path / "first" / "dataset_statistics.json")}
    for end in ("repeat", "still"):
        run = tmp_path / end
        chunks = {"head": "l1_regression", "action_chunk": 2, "chunk_end": end}
        finetune(options(run, dataset, steps=1, **mine, **chunks))
        kept = run / "checkpoints" / "checkpoint-1" / "dataset_statistics.json"
        stored = json.loads(kept.read_text())
        (entry,) = stored.values()
        entry["action_spec"] |= {"grippers": [6], "relative": [True] * 6 + [False]}
        kept.write_text(json.dumps(stored))
        if end == "repeat":
            finetune(options(run, dataset, **mine, **chunks), resume=True)
    with pytest.raises(ValueError, match="statistics of the dataset '.*' are others .action_spec."):  # it decides ends
        finetune(options(run, dataset, **mine, **chunks), resume=True)


def test_a_run_of_a_version_that_lent_statistics_without_their_meaning(dataset, tmp_path):
    """It was refused for the unit that the other dataset of its mixture says, and nothing that one could give made it
    go on."""
    other, mixture, run = demos(tmp_path / "lift_the_cup_demo.hdf5", 2.0), tmp_path / "both.yaml", tmp_path / "run"
    mixture.write_text(
        f"shown: {{path: {dataset}, unit: metres, absolute_dims: '0'}}\ndriven: {{path: {other}, statistics: shown}}\n"
    )
    finetune(options(run, mixture, steps=1, name=None))
    kept = run / "checkpoints" / "checkpoint-1" / "dataset_statistics.json"
    stored = json.loads(kept.read_text())
    assert stored["driven"]["action_spec"].pop("unit") == "metres"
    stored["driven"]["action_spec"]["relative"][0] = True
    kept.write_text(json.dumps(stored))
    finetune(options(run, mixture, name=None), resume=True)
    stored["driven"]["action_spec"]["unit"] = "millimetres"
    (run / "checkpoints" / "checkpoint-2" / "dataset_statistics.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="statistics of the dataset 'driven' are others .action_spec."):
        finetune(options(run, mixture, steps=3, name=None), resume=True)


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_an_adapter_whose_base_has_changed_is_not_trained_further(dataset, tmp_path, strategy):
    """Merging refused it, training put it on whatever weights were there."""
    base, run = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    for file in MODEL_FILES:
        shutil.copyfile(BASE / file, base / file)
    finetune(options(run, dataset, steps=1, model=str(base), strategy="lora", rank=2))
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file(weights | {name: 1.5 * weights[name]}, base / "model.safetensors", metadata={"format": "pt"})
    more = options(tmp_path / "more", dataset, steps=1, model=str(run), strategy=strategy, rank=2)
    with pytest.raises(ValueError, match=r"not those the adapter was trained on .*openvla merge RUN OUT --base BASE"):
        finetune(more)


def test_an_object_whose_episodes_change_places(tmp_path):
    """As files do that are listed in the order of a disk: nothing of it stood in their statistics."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    actions = [np.column_stack([rng.uniform(-1, 1, (9, 6)), np.arange(9) < 5]) for _ in range(3)]
    made = [{"actions": part, "instruction": "push the cup", "images": {"front": image}} for part in actions]
    finetune(options(tmp_path / "run", "mine", steps=1), data=made)
    with pytest.raises(ValueError, match="files or episodes of the dataset 'mine' are others"):
        finetune(options(tmp_path / "run", "mine"), resume=True, data=made[::-1])
    older = tmp_path / "run" / "finetune.json"
    older.write_text(json.dumps(json.loads(older.read_text()) | {"data_digests": {"mine": None}}))
    (tmp_path / "run" / "checkpoints" / "checkpoint-1" / "finetune.json").unlink()
    finetune(options(tmp_path / "run", "mine"), resume=True, data=made)


def test_a_run_that_was_moved(dataset, tmp_path):
    """Its paths are relative to it: it was refused, with the same data and weights; others are refused as before."""
    mixture = tmp_path / "mine.yaml"
    mixture.write_text("push: {path: data/push_the_cup_demo.hdf5}\n")
    kinds = {"plain": (dataset, {}), "mixture": (mixture, {"name": None})}
    for kind, (data, more) in kinds.items():
        finetune(options(tmp_path / kind, data, steps=1, **more))
        moved = tmp_path / "disk" / "of" / "others" / kind
        moved.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / kind).rename(moved)
        finetune(options(moved, data, **more), resume=True)
        assert names(moved) == ["checkpoint-1", "checkpoint-2"]
    assert begun._moved("../data/a:1,../data/b:2", "a:1,b:2")
    assert not begun._moved("../data/a:1,../data/b:2", "../data/a:5,../data/b:2")
    other = dataset.with_name("others") / dataset.name
    other.parent.mkdir()
    shutil.copyfile(dataset, other)
    with h5py.File(other, "a") as file:  # rendered again, of which its digest says nothing
        del file["data/demo_0/obs/agentview_rgb"]
        file["data/demo_0/obs/agentview_rgb"] = np.zeros((9, 64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="dataset was '.*data/push_the_cup_demo.hdf5', is "):
        finetune(options(tmp_path / "disk/of/others/plain", other, steps=3), resume=True)
    demos(other, scale=5.0)
    with pytest.raises(ValueError, match="files or episodes of the dataset 'mine' are others"):
        finetune(options(tmp_path / "disk/of/others/plain", other, steps=3), resume=True)


def test_a_mixture_that_was_edited_is_not_continued(dataset, tmp_path):
    """Weights and cameras of its datasets stand in a file, whose name alone was compared."""
    demos(dataset.with_name("lift_the_cup_demo.hdf5"))
    mixture = tmp_path / "mine.yaml"
    text = (
        "push: {path: data/push_the_cup_demo.hdf5, weight: 1}\nlift: {path: data/lift_the_cup_demo.hdf5, weight: 2}\n"
    )
    mixture.write_text(text)
    finetune(options(tmp_path / "run", mixture, steps=1, name=None))
    mixture.write_text(text.replace("weight: 2", "weight: 0.5, camera: agentview_rgb"))
    said = (
        "camera of 'lift' in the mixture was None, is 'agentview_rgb'; weight of 'lift' in the mixture was 2.0, is 0.5"
    )
    with pytest.raises(ValueError, match=said):
        finetune(options(tmp_path / "run", mixture, name=None), resume=True)
    mixture.write_text(text)
    finetune(options(tmp_path / "run", mixture, name=None), resume=True)
    content = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert content["mixture"]["lift"] == {"path": "../data/lift_the_cup_demo.hdf5", "weight": 2.0}
    assert str(tmp_path) not in (tmp_path / "run" / "README.md").read_text()
    del content["mixture"]  # as older versions wrote it
    (tmp_path / "run" / "finetune.json").write_text(json.dumps(content))
    finetune(options(tmp_path / "run", mixture, name=None, steps=3), resume=True)


def test_statistics_may_stand_in_the_mixture(dataset, tmp_path):
    (shown,) = open_sources(dataset)
    mixture = tmp_path / "mine.yaml"
    mixture.write_text(yaml.safe_dump({"push": {"path": str(dataset), "statistics": shown.statistics}}))
    finetune(options(tmp_path / "run", mixture, name=None, steps=1))
    content = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert content["mixture"]["push"]["statistics"]["action"] == shown.statistics["action"]


def flip(path: Path, place: float) -> None:
    """One byte is another: all readers would take it."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x7F
    path.write_bytes(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    finetune(options(folder / "run", demos(folder / "push_the_cup_demo.hdf5"), strategy="lora", rank=2, steps=3))
    return folder / "run"


@pytest.mark.parametrize(
    "file, damage, said",
    [
        ("adapter_model.safetensors", lambda path: os.truncate(path, path.stat().st_size // 2), "cut off or damaged"),
        ("optimizer.pt", lambda path: os.truncate(path, path.stat().st_size // 2), "cut off or damaged"),
        ("scheduler.pt", lambda path: path.write_bytes(b""), "empty"),
        ("optimizer.pt", lambda path: flip(path, 0.5), "cut off or damaged"),
        ("rng_state.pth", lambda path: flip(path, 0.5), "cut off or damaged"),
        ("adapter_model.safetensors", lambda path: flip(path, 0.9), "is damaged, or of another run"),
        ("trainer_state.json", lambda path: path.write_text('{"epoch": '), "not valid JSON"),
        ("trainer_state.json", lambda path: path.write_text('{"global_step": 2}'), "is of step 2"),
        ("rng_state.pth", Path.unlink, "has no rng_state"),
        ("adapter_config.json", Path.unlink, "has no adapter_config.json"),
        ("dataset_statistics.json", Path.unlink, "has no dataset_statistics.json"),
        (
            "adapter_model.safetensors",
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
            "Git LFS pointer",
        ),
    ],
)
def test_a_damaged_checkpoint_names_the_older_good_one(file, damage, said, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "checkpoint-3" / file)
    good = r"checkpoint-2' is the newest good one: remove '.*checkpoint-3', and --resume"
    with pytest.raises(ValueError, match=f"newest checkpoint cannot be continued: .*{said}.*{good}"):
        resume.checkpoint_to_resume(tmp_path / "run", steps=3)
    for older in ("checkpoint-1", "checkpoint-2"):
        (tmp_path / "run" / "checkpoints" / older / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"No older one is good: remove '.*-3' and '.*-2' and '.*-1'"):
        resume.checkpoint_to_resume(tmp_path / "run", steps=3)


def test_a_checkpoint_that_lacks_weights_is_not_continued(dataset, tmp_path):
    """The library warns, and these would go on from where the run began."""
    finetune(options(tmp_path / "run", dataset))
    file = tmp_path / "run" / "checkpoints" / "checkpoint-2" / "model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if ".up_proj." not in name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"checkpoint-2' has other weights than the model: missing .*up_proj.weight"):
        finetune(options(tmp_path / "run", dataset, steps=3), resume=True)


def test_a_language_model_that_is_stored_under_other_names_continues(dataset, tmp_path):
    """Checkpoints are read by names of modules: --resume took its weights for those of another model."""
    model = small_model("gpt_neox")
    model.save_pretrained(tmp_path / "model")
    model.processor.save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "strategy": "full", "steps": 2}
    finetune(options(tmp_path / "once", dataset, **settings))
    finetune(options(tmp_path / "twice", dataset, **{**settings, "steps": 1}))
    finetune(options(tmp_path / "twice", dataset, **settings), resume=True)
    assert digest(tmp_path / "once") == digest(tmp_path / "twice")
    checkpoint = OpenVLAForActionPrediction.from_pretrained(tmp_path / "twice" / "checkpoints" / "checkpoint-2")
    result = OpenVLAForActionPrediction.from_pretrained(tmp_path / "twice")
    for name, weight in result.state_dict().items():
        assert torch.equal(weight, checkpoint.state_dict()[name]), name


def test_a_checkpoint_of_another_run_is_not_continued(dataset, tmp_path):
    """Its weights have the same shapes; even --dry-run says it, and which options are others."""
    for seed in (0, 1):
        finetune(options(tmp_path / f"run{seed}", dataset, seed=seed))
    ours, theirs = (tmp_path / f"run{seed}" / "checkpoints" / "checkpoint-2" for seed in (0, 1))
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    longer = options(tmp_path / "run0", dataset, steps=3)
    for go_on in (lambda: finetune(longer, resume=True), lambda: plan_run(longer, resume=True)):
        with pytest.raises(
            ValueError, match=r"-2' is of another run, whose (output|seed) was .*-1' is the newest good"
        ):
            go_on()
    shutil.rmtree(ours)
    with pytest.raises(ValueError, match=r"begun with other options or data: seed was 0, is 5"):
        plan_run(replace(longer, seed=5), resume=True)
    assert plan_run(longer, resume=True).startswith(f"continues from '{ours.with_name('checkpoint-1')}'")
    assert plan_run(replace(longer, steps=1), resume=True).startswith("finished  at step 1: only the result of ")


@pytest.mark.parametrize(
    "change", [{"data_digests": []}, {"mixture": {"mine": 1}}, {"rank": [1]}, {"rank": None}], ids=str
)
def test_what_no_run_writes_down(change, tmp_path):
    """It was a traceback."""
    (tmp_path / "finetune.json").write_text(json.dumps(change))
    with pytest.raises(ValueError, match=f"says {next(iter(change))}=.*, which no run writes: the file was edited"):
        begun.read_begun(tmp_path)


@pytest.mark.parametrize("change", [1.5, 1.001])
def test_weights_that_do_not_learn_are_those_that_the_run_began_with(dataset, tmp_path, change):
    """The checkpoint's count, and whatever stood there was trained on."""
    finetune(options(tmp_path / "run", dataset))
    file = tmp_path / "run" / "checkpoints" / "checkpoint-2" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    save_file(weights | {name: change * weights[name]}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"holds another {name} than the model that the run was begun with"):
        finetune(options(tmp_path / "run", dataset, steps=3), resume=True)


def test_a_run_continues_with_another_numpy(dataset, tmp_path):
    """A part of its arrays has another name from numpy 2 on, by which the states of random numbers are read."""
    finetune(options(tmp_path / "run", dataset))
    file = tmp_path / "run" / "checkpoints" / "checkpoint-2" / "rng_state.pth"
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    called = [b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"]
    (pickled,) = (name for name in content if name.endswith("data.pkl"))
    own, other = called if called[0] in content[pickled] else called[::-1]
    assert own in content[pickled]
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data.replace(own, other) if name == pickled else data)
    finetune(options(tmp_path / "run", dataset, steps=3), resume=True)
    assert names(tmp_path / "run") == [f"checkpoint-{step}" for step in (1, 2, 3)]


# Killed


KILLED = """
import json, os, signal, sys
import torch
import yaml
from openvla import folders
from openvla.training import FinetuneOptions, checkpoints, finetune, trainer

torch.set_num_threads(1)
write, calls = checkpoints.write_checkpoint, []

def killed(model, folder, *rest, **options):
    write(model, folder, *rest, **options)
    calls.append(folder)
    if len(calls) == int(sys.argv[2]):
        weights = folder / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

trainer.write_checkpoint = killed
finetune(FinetuneOptions(**json.loads(sys.argv[1])), resume=True)
"""


@pytest.mark.parametrize("call, kept", [(1, ["checkpoint-1"]), (2, ["checkpoint-1", "checkpoint-2"])])
def test_killed_while_a_finished_run_is_continued(call, kept, dataset, tmp_path):
    """In the middle of its checkpoint or its result: the older result stays, and --resume makes the new one."""
    finetune(options(tmp_path / "run", dataset, steps=1))
    before, longer = digest(tmp_path / "run"), options(tmp_path / "run", dataset, steps=2)
    ran = processes.run(KILLED, json.dumps(vars(longer)), call)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert names(tmp_path / "run") == kept and digest(tmp_path / "run") == before
    assert list((tmp_path / "run").rglob(".unfinished"))
    finetune(longer, resume=True)
    assert digest(tmp_path / "run") != before and (tmp_path / "run" / "dataset_statistics.json").exists()
    assert not list(tmp_path.rglob(".*"))
    finetune(options(tmp_path / "other", dataset, steps=2))
    assert digest(tmp_path / "other") == digest(tmp_path / "run")


def test_an_interrupted_run_says_how_it_goes_on(dataset, tmp_path, capsys, monkeypatch):
    def interrupted(self):
        if self.state.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module.ActionTrainer, "_check_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(options(tmp_path / "run", dataset))
    assert f"stopped   --resume continues from {tmp_path / 'run/checkpoints/checkpoint-1'}" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        finetune(options(tmp_path / "early", dataset, save_every=3))
    assert "stopped   before the first checkpoint (--save-every 3): nothing is kept" in capsys.readouterr().out


# The output folder


def test_the_output_folder_is_looked_at_first(dataset, tmp_path, monkeypatch):
    """Before anything is read or made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    shutil.copytree(ROOT / "presets" / "openvla-7b", tmp_path / "model")
    for output, said in [
        ("file", "is a file: give a folder"),
        ("file/run", r"cannot be written \(Not a directory\)"),
        ("/proc/run", "cannot be written"),
        ("model", "holds a model but no finetune.json"),
        (BASE, "lies where the run would overwrite it"),
        ("data/run", "lies inside the dataset"),
    ]:
        with pytest.raises((ValueError, OSError), match=said):
            finetune(options(Path(output), dataset.parent))
    given = options(Path("run"), dataset, model="run/checkpoints/checkpoint-1")
    (tmp_path / "run" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(ValueError, match="would overwrite it"):
        finetune(given)
    with pytest.raises(ValueError, match=r"holds a model but no finetune.json.*checkpoint-1"):
        finetune(options(Path("run"), dataset))


def test_an_output_inside_a_dataset_however_that_is_named(dataset, tmp_path, monkeypatch):
    """By a mixture under a folder, by a YAML file with paths, by the folder of the datasets."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("one", "two"):
        shutil.copytree(dataset.parent, tmp_path / "sets" / name)
    (tmp_path / "here" / "m.yaml").write_text("a: {path: ../sets/two}\nb: {path: ../sets/gone, weight: 2}\n")
    for specification, root in (("two:1.0,gone:2", "sets"), ("here/m.yaml", None), ("two", "sets"), ("sets/two", None)):
        given = FinetuneOptions(
            output="sets/two/runs/x", dataset=specification, data_root=root, model=str(ROOT), logging="none"
        )
        with pytest.raises(ValueError, match=r"lies inside the dataset '.*sets/two'"):
            resume.check_output(given, resume=False)
        resume.check_output(replace(given, output="runs/x"), resume=False)


def test_files_of_the_user_in_an_output_folder(dataset, tmp_path):
    """What a run would replace is refused, what it would not stays."""
    run = tmp_path / "run"
    for name in ("README.md", "tokenizer.json", "curves.png"):
        run.mkdir()
        (run / name).write_text("mine")
        with pytest.raises(ValueError, match=f"holds files that a run replaces.*'.*{name}' stays"):
            resume.check_output(options(run, dataset), resume=False)
        shutil.rmtree(run)
    (run / ".unfinished").mkdir(parents=True)
    (run / ".unfinished" / "mine").touch()
    with pytest.raises(FileExistsError, match="was not made here"):
        resume.remove_leftovers(run)
    (run / "film.part").touch()
    (run / ".unfinished" / "mine").unlink()
    resume.remove_leftovers(run)
    assert [path.name for path in run.iterdir()] == ["film.part"]


def test_one_process_in_an_output_folder(dataset, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(BlockingIOError, match="Another process is writing"):
        finetune(options(tmp_path / "run", dataset))
    assert not (tmp_path / "run").exists()


def test_a_disk_without_room(dataset, tmp_path, monkeypatch, capsys):
    free = [10**6]
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    with pytest.raises(OSError, match=r"a checkpoint takes about 0.0\d+ GB.*0.001 GB are free.*make room"):
        finetune(options(tmp_path / "run", dataset, model=str(ROOT)))
    assert not (tmp_path / "run" / "finetune.json").exists()
    free[0] = 10**8
    finetune(options(tmp_path / "run", dataset, steps=1, model=str(ROOT)))
    assert "with keep=9 the 0.1 GB that are free will not do" in capsys.readouterr().out
