"""Fine-tuning end to end on the embedded policy, a few steps each: strategies, formats, resume, processes, warnings."""

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import processes
import pytest
import timm.optim
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.action_heads_openvla import ParallelTokenHead
from openvla.data import open_dataset
from openvla.data.collate import ActionCollator
from openvla.training import STRATEGIES, FinetuneOptions, finetune, merge_adapter, plan_run
from openvla.training import trainer as trainer_module
from openvla.training.muon import make_muon
from openvla.training.plan import estimate


pytest.importorskip("accelerate", reason="training needs the [train] extra")
pytest.importorskip("peft", reason="training needs the [train] extra")

ROOT = Path(__file__).resolve().parents[1]
DEMOS = Path(__file__).parent / "fixtures" / "demos"
FORMATS = {"lerobot": "lerobot_image", "rlds": "rlds/metaworld_demo", "hdf5": "hdf5"}
SPLITS = {"rlds": "val"}  # the others have one split only
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
BASE = ROOT  # until `small_base`: what is trained where a test names no model
pytestmark = pytest.mark.usefixtures("small_base")


def options(output: Path, dataset: Path | str = DEMOS / "lerobot_image", **changes) -> FinetuneOptions:
    settings = {"steps": 3, "batch_size": 2, "rank": 4, "shuffle_buffer": 16, "name": "mine", "logging": "none"}
    settings |= {"model": str(BASE), "dataset": str(dataset), "output": str(output)}
    return FinetuneOptions(**{**settings, **changes})


def log(output: Path, step: int | None = None) -> list[dict]:
    """Entries of the log of a run, from its last checkpoint or that of `step`."""
    folders = sorted((output / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    folder = folders[-1] if step is None else output / "checkpoints" / f"checkpoint-{step}"
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def six_episodes(tmp_path_factory) -> Path:
    """Short demonstrations, of which one is held out."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("six") / "push_the_cup_demo.hdf5"
    with h5py.File(path, "w") as file:
        for number in range(6):
            group = file.create_group(f"data/demo_{number}")
            group["actions"] = np.column_stack([rng.uniform(-1, 1, (9, 6)), np.arange(9) < 5])
            group["obs/agentview_rgb"] = rng.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    return path


def losses(output: Path, key: str = "loss") -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in log(output) if key in entry}


# Every strategy, every format: a strategy sees samples, which the readers give of each format alike


@pytest.mark.parametrize(
    "strategy, dataset", [*((strategy, "lerobot") for strategy in STRATEGIES), ("full", "rlds"), ("lora", "hdf5")]
)
def test_strategies_on_formats(strategy, dataset, small_policy, tmp_path):
    if strategy == "qlora":
        pytest.importorskip("bitsandbytes", reason="qlora needs the [quant] extra")
    folder = tmp_path / "run"
    split = SPLITS.get(dataset, "train")
    made = {"split": split, "strategy": strategy, "steps": 2, "dtype": "float32"}
    finetune(options(folder, DEMOS / FORMATS[dataset], **made))
    if strategy in ("lora", "qlora"):
        adapter = load_file(folder / "adapter_model.safetensors")
        assert all("lora_" in name for name in adapter)  # no whole embeddings beside them
        assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)  # it has learned
        assert merge_adapter(folder, tmp_path / "merged") < 1e-4
        folder = tmp_path / "merged"
    before, after = load_file(small_policy / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    assert any(not torch.equal(before[name].float(), after[name].float()) for name in before)
    model = AutoModel.from_pretrained(str(folder))
    assert set(model.norm_stats) == {"mine"}
    assert model.predict_action(IMAGE, "open the drawer").shape == (7,)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "# run" in card and re.search(r"^\| learning_rate \| [\d.e-]+ \|$", card, re.M) and "| None |" not in card


def test_an_existing_folder_is_not_merged_into(tmp_path):
    finetune(options(tmp_path / "run", strategy="lora", steps=1))
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="not empty"):
        merge_adapter(tmp_path / "run", tmp_path / "merged")


def test_weights_that_learn_are_float32_and_saved_as_they_were(tmp_path):
    """Small updates vanish in bfloat16; the published files are bfloat16."""
    base = OpenVLAForActionPrediction.from_pretrained(BASE, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "dataset_statistics.json"):
        (tmp_path / "base" / file).write_bytes((ROOT / file).read_bytes())
    finetune(options(tmp_path / "run", model=str(tmp_path / "base"), strategy="last_layer", steps=1, save_every=1))
    kept = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-1" / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    assert {t.dtype for t in load_file(tmp_path / "run" / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModel.from_pretrained(str(tmp_path / "run"), dtype="auto").dtype == torch.bfloat16
    assert "use_cache" not in json.loads((tmp_path / "run" / "config.json").read_text())  # the library's, for training


# Data


def test_a_mixture_and_its_statistics(tmp_path):
    (tmp_path / "mixture.yaml").write_text(
        f"drawer: {{path: {DEMOS / 'lerobot_image'}, weight: 2.0}}\n"
        f"libero: {{path: {DEMOS / 'hdf5'}, weight: 1.0, camera: agentview_rgb}}\n"
    )
    finetune(options(tmp_path / "run", tmp_path / "mixture.yaml", name=None, steps=2, save_every=2, strategy="lora"))
    statistics = json.loads((tmp_path / "run" / "dataset_statistics.json").read_text())
    assert set(statistics) == {"drawer", "libero"}
    assert statistics["drawer"]["num_transitions"] == len(open_dataset(DEMOS / "lerobot_image")[0])
    assert {"action_l1", "l1/x", "l1_normalized/gripper"} <= set(log(tmp_path / "run")[-1])


class Recorded:
    """Demonstrations as a Python object, images as they come."""

    name = "recorded"

    def __len__(self):
        return 2

    def __getitem__(self, index):
        frames = [np.full((32, 32, 3), 10 * step, np.uint8) for step in range(4)]
        return {"actions": np.eye(4, 7) - 0.5, "instruction": "lift the lid", "images": {"front": frames}}


def test_a_python_object(tmp_path):
    finetune(options(tmp_path / "run", "recorded", name=None, workers=1), data=Recorded())
    assert set(json.loads((tmp_path / "run" / "dataset_statistics.json").read_text())) == {"recorded"}


def test_held_out_episodes_are_evaluated(six_episodes, tmp_path, curves):
    finetune(options(tmp_path / "run", six_episodes, eval_every=1, eval_samples=8, steps=2, save_every=2))
    found = losses(tmp_path / "run", "eval_action_l1")
    assert set(found) == {0, 1, 2} and all(0 < value < 2 for value in found.values())
    assert (tmp_path / "run" / "curves.png").stat().st_size > 5000


def test_how_a_batch_is_computed_changes_nothing(tmp_path):
    same = {"strategy": "last_layer", "dtype": "float32", "learning_rate": 1e-3, "save_every": 2, "log_every": 1}
    same |= {"steps": 2}
    finetune(options(tmp_path / "plain", batch_size=4, **same))
    finetune(options(tmp_path / "workers", batch_size=4, workers=2, **same))
    finetune(options(tmp_path / "accumulated", batch_size=2, gradient_accumulation=2, **same))
    finetune(options(tmp_path / "checkpointed", batch_size=4, gradient_checkpointing=True, **same))
    finetune(options(tmp_path / "bf16", batch_size=4, precision="bf16", **same))
    expected = losses(tmp_path / "plain")
    assert len(expected) == 2
    assert losses(tmp_path / "workers") == expected
    assert losses(tmp_path / "accumulated") == pytest.approx(expected, abs=1e-4)
    assert losses(tmp_path / "checkpointed") == pytest.approx(expected, abs=1e-4)
    halved = losses(tmp_path / "bf16")
    assert halved == pytest.approx(expected, rel=0.05) and halved != expected


@pytest.mark.parametrize(
    ("head", "prefix"),  # a token head continues what it is given without having learned it
    [("tokens", 0), ("parallel_tokens", 0), ("parallel_tokens", 5), ("l1_regression", 0), ("l1_regression", 5)],
)
def test_batches_of_an_update_count_by_what_is_learned_of_them(head, prefix, six_episodes, tmp_path):
    """At ends of episodes chunks are shorter, and some begin with steps that are given: each batch counted alike, so
    that their steps weighed up to K times as much as others."""
    same = {"strategy": "last_layer", "dtype": "float32", "learning_rate": 1e-3, "save_every": 2, "log_every": 1}
    same |= {"steps": 2, "head": head, "action_chunk": 6, "max_grad_norm": 0.0, "eval_samples": 5}
    same |= {"prefix_training": prefix}
    found = []
    for batch_size, gradient_accumulation in ((4, 1), (1, 4)):
        made = {"batch_size": batch_size, "gradient_accumulation": gradient_accumulation}
        finetune(options(tmp_path / str(batch_size), six_episodes, **same, **made))
        found.append([losses(tmp_path / str(batch_size), key) for key in ("loss", "grad_norm", "eval_loss")])
    for one, several in zip(*found):
        assert one and several == pytest.approx(one, rel=1e-4)


def test_an_update_of_which_all_is_decided_already_learns_nothing(six_episodes, tmp_path, monkeypatch):
    """At the end of an episode one step is recorded, and it may be one of those that are given: with batches of one
    sample the run ended as diverged."""
    draw = ParallelTokenHead.draw
    all_of_it = {"committed": torch.full((1, 1), 2)}
    monkeypatch.setattr(ParallelTokenHead, "draw", lambda head, batch: draw(head, batch) | all_of_it)
    same = {"strategy": "last_layer", "dtype": "float32", "batch_size": 1, "log_every": 1, "eval_every": 0}
    same |= {"head": "l1_regression", "action_chunk": 2, "prefix_training": 1}
    finetune(options(tmp_path / "run", six_episodes, **same))
    assert set(losses(tmp_path / "run").values()) == {0.0}


# Stopped and resumed


SCRIPT = """
import json, sys
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from openvla.training import FinetuneOptions, finetune, run, trainer

torch.set_num_threads(1)
run.plot_curves = lambda runs, path: False
jobs = [FinetuneOptions(**job) for job in json.loads(sys.argv[1])]
if jobs[0].optimizer == "muon":  # as the fixture float32_muon
    from functools import partial
    from timm.optim import muon
    muon.zeropower_via_newtonschulz = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
if jobs[0].fsdp:
    made = run.training_arguments

    def as_on_accelerators(*arguments):
        # accelerate shards on accelerators only, and falls back to DDP on CPUs silently
        made_arguments = made(*arguments)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return made_arguments

    class Sharded(trainer.ActionTrainer):
        def save_result(self, *arguments):
            assert type(self.model).__name__.startswith("FSDP"), type(self.model)
            super().save_result(*arguments)

    run.training_arguments, run.ActionTrainer = as_on_accelerators, Sharded
for options in jobs:
    finetune(options, resume=bool(int(sys.argv[2])))
"""


@pytest.mark.parametrize("strategy, optimizer", [("lora", "adamw"), ("last_layer", "muon")])
def test_killed_and_resumed_as_if_nothing_had_happened(strategy, optimizer, tmp_path, request):
    """kill -9 between checkpoints; optimizer, schedule, data position and dropout go on as they were."""
    same = {"steps": 8, "save_every": 2, "log_every": 1, "strategy": strategy, "dtype": "float32"}
    same |= {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 2, "dropout": 0.3, "keep": 9}
    same |= {"optimizer": optimizer}
    if optimizer == "muon":
        request.getfixturevalue("float32_muon")
    finetune(options(tmp_path / "whole", **same))
    run = options(tmp_path / "killed", **same)
    running = processes.start(SCRIPT, json.dumps([vars(run)]), 0)
    try:
        while not (tmp_path / "killed" / "checkpoints" / "checkpoint-2").exists():
            assert running.running()
            time.sleep(0.01)
    finally:
        running.kill()
    assert not (tmp_path / "killed" / "dataset_statistics.json").exists()
    finetune(run, resume=True)
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert set(expected) == set(range(1, 9)) and found == pytest.approx(expected, abs=1e-6)
    rates = losses(tmp_path / "whole", "learning_rate")
    assert losses(tmp_path / "killed", "learning_rate") == rates and len(set(rates.values())) > 4


def test_a_run_is_not_resumed_with_other_options(tmp_path):
    finetune(options(tmp_path / "run", steps=2, save_every=1))
    with pytest.raises(FileExistsError, match="finished run: continue it with --resume"):
        finetune(options(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"learning_rate was 0.0005, is 1.0; rank was 4, is 8"):
        finetune(options(tmp_path / "run", learning_rate=1.0, rank=8), resume=True)
    with pytest.raises(
        ValueError, match=r"global_batch \(batch_size x gradient_accumulation x processes\) was 2, is 8"
    ):
        finetune(options(tmp_path / "run", gradient_accumulation=4), resume=True)
    finetune(options(tmp_path / "run", steps=3, save_every=1), resume=True)  # longer is fine
    assert set(losses(tmp_path / "run")) == {1, 2, 3}


def test_a_process_that_has_ended_is_no_full_disk(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{}")
    rank = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)), accelerator=SimpleNamespace(num_processes=2))
    with pytest.raises(
        OSError, match="Connection closed by peer.*checkpoint-4': see whether another process has ended"
    ):
        with trainer_module.ActionTrainer._explained(rank, "The checkpoint of step 8"):
            raise RuntimeError("Connection closed by peer")


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    write, calls = trainer_module.write_checkpoint, []

    def full_disk(model, folder, *rest, **options):
        calls.append(folder)
        if len(calls) == 2:
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(model, folder, *rest, **options)

    monkeypatch.setattr(trainer_module, "write_checkpoint", full_disk)
    run = options(tmp_path / "run", strategy="last_layer", steps=3, save_every=1)
    with pytest.raises(OSError, match=r"step 2 could not be written: .*No space left.*checkpoint-1.*--resume"):
        finetune(run)
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.glob("[.c]*")] == ["checkpoint-1"]
    model = AutoModel.from_pretrained(str(folder / "checkpoint-1"))  # with statistics and processor
    assert model.predict_action(IMAGE, "open the drawer", unnorm_key="mine").shape == (7,)
    assert {"README.md", "dataset_statistics.json", "tokenizer.json"} <= {
        p.name for p in (folder / "checkpoint-1").iterdir()
    }
    finetune(run, resume=True)
    assert set(losses(tmp_path / "run")) == {1, 2, 3}


# Several processes


# Of the second step the batch is for weights that the first has changed, the evaluation for those that both have.
STEPS_OF_BOTH = {"dtype": "float32", "learning_rate": 1e-3, "save_every": 2, "log_every": 1, "steps": 2, "keep": 9}
STEPS_OF_BOTH |= {"eval_every": 2, "eval_samples": 4}  # one batch of one process, and one of each of two
HEAD = {"head": "l1_regression", "action_chunk": 4, "film": True}  # ends of chunks are left out
RUNS_OF_BOTH = {
    "full": {**STEPS_OF_BOTH, "strategy": "full", "save_every": 1},
    "lora": {**STEPS_OF_BOTH, "strategy": "lora"},
    "head": {**STEPS_OF_BOTH, "strategy": "lora", **HEAD},
}


@pytest.fixture(scope="module")
def one_process(six_episodes, tmp_path_factory) -> Path:
    """Runs of one process and batch 4."""
    folder = tmp_path_factory.mktemp("one")
    for name, changes in RUNS_OF_BOTH.items():
        finetune(options(folder / name, six_episodes, batch_size=4, **changes))
    return folder


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(fsdp, one_process, six_episodes, tmp_path):
    """Two gloo processes of batch 2 against one of batch 4, plain (DDP) or sharded (FSDP2), the latter stopped and
    resumed: the same losses, in training and evaluation, and a plain checkpoint in the published layout; also with a
    head that has weights of its own, beside an adapter (which sharded ones have only so: a second a run)."""
    if fsdp and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("torch 2.6 runs FSDP2 on accelerators only")
    two = {
        name: options(tmp_path / "two" / name, six_episodes, batch_size=2, fsdp=fsdp, **changes)
        for name, changes in RUNS_OF_BOTH.items()
        if name != "lora" or not fsdp
    }

    def launch(*made: FinetuneOptions, resume: bool):
        before, ranks = set((tmp_path / "two").rglob("*")), []
        for attempt in range(2):
            try:
                ranks = processes.run_ranks(
                    SCRIPT, json.dumps([*map(vars, made)]), int(resume), cwd=tmp_path, timeout=600
                )
                if not any(rank.returncode < 0 for rank in ranks):
                    break
            except TimeoutError:
                pass
            # gloo, seen with torch 2.15: it stalls inside an all-gather (once in a dozen runs on a crowded machine), or
            # a rank dies there of its heap (SIGABRT, "malloc(): unaligned tcache chunk detected"; seen once).
            assert attempt == 0, ranks
            for path in sorted(set((tmp_path / "two").rglob("*")) - before, reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr[-5000:] + ranks[1].stderr[-5000:]

    launch(*two.values(), resume=False)
    if fsdp:
        shutil.rmtree(tmp_path / "two" / "full" / "checkpoints" / "checkpoint-2")
        launch(two["full"], resume=True)
    for name in two:
        for key in ("loss", "action_l1", "eval_loss"):
            expected = losses(one_process / name, key)
            assert expected and losses(tmp_path / "two" / name, key) == pytest.approx(expected, abs=1e-4), key
        # Not the weights: Adam makes steps of full size out of gradients that are zero but for rounding (key biases).
        files = ["model.safetensors" if name == "full" else "adapter_model.safetensors"]
        files += ["added_parts.safetensors"] if name == "head" else []
        for file in files:
            one, other = (load_file(folder / name / file) for folder in (one_process, tmp_path / "two"))
            assert {key: t.shape for key, t in one.items()} == {key: t.shape for key, t in other.items()}
        for folder in (tmp_path / "two" / name, tmp_path / "two" / name / "checkpoints" / "checkpoint-2"):
            assert OpenVLAForActionPrediction.from_pretrained(folder).norm_stats.keys() == {"mine"}


# What is said


def test_the_plan(tmp_path, monkeypatch):
    counted = []

    def once(config, strategy, **given):
        counted.append((strategy, given, estimate(config, strategy, **given)))
        return counted[-1][2]

    monkeypatch.setattr("openvla.training.plan.estimate", once)
    changes = {"steps": 30, "batch_size": 4, "gradient_accumulation": 2, "precision": "float32"}
    made = options(tmp_path / "run", model=str(ROOT), **changes)
    text = plan_run(made)
    assert "mine: 1 episode, 95 steps" in text and "30 steps x 8" in text and "= 240, 2.53 epochs" in text
    assert "droll, dpitch, dyaw, gripper never change" in text
    longest = len(ActionCollator(OpenVLAProcessor.from_pretrained(ROOT)).tokens("open the drawer", np.zeros(7))[0])
    ((strategy, given, expected),) = counted
    told = {"batch_size": 4, "precision": "float32", "text_tokens": longest, "shape": (1, 7), "rank": 4}
    assert strategy == "lora" and told.items() <= given.items()
    assert text.endswith(expected.describe()) and "trains    0.2M of 7.8M parameters" in text
    shared = plan_run(replace(made, model=str(BASE), strategy="full", fsdp=True, dtype="bfloat16"), processes=8)
    assert "memory" in shared and "of one device in pure-bf16: " in shared and ", communication " in shared
    assert not (tmp_path / "run").exists()


def test_the_plan_refuses_an_output_as_the_run_would(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: give a folder"):
        plan_run(options(tmp_path / "file"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finetune.json").touch()
    with pytest.raises(FileExistsError, match="holds an unfinished run"):
        plan_run(options(tmp_path / "run"))
    uncounted = SimpleNamespace(describe=lambda: "")  # what it needs: test_the_plan
    with monkeypatch.context() as patch:
        patch.setattr("openvla.training.plan.estimate", lambda *_, **__: uncounted)
        patch.setattr("openvla.training.dry_run.check_begun", lambda *_: None)
        assert "samples" in plan_run(options(tmp_path / "run"), resume=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(ModuleNotFoundError, match="bitsandbytes, which is not installed"):
        plan_run(options(tmp_path / "new", strategy="qlora"))


def test_what_is_not_learned_is_said(tmp_path, capsys):
    """Nor is an evaluation that was asked for and has no frames: of a single episode none is held out."""
    finetune(options(tmp_path / "run", strategy="last_layer", steps=1, eval_every=1))
    said = capsys.readouterr().out
    assert "the training actions are not learned yet" in said
    assert "nothing is evaluated: no episode is held out (--held-out)" in said


def test_muon_orthogonalizes_matrices_and_leaves_the_rest_to_adamw(muon):
    """Embeddings, the output layer, vectors and tokens are AdamW's; patches, attention and MLPs are Muon's."""
    model = OpenVLAForActionPrediction.from_pretrained(ROOT, dtype=torch.float32)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = make_muon(model, learning_rate=0.01, weight_decay=0.0)
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim in (2, 4)}
    matrices -= {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    muons = {names[id(p)] for group in optimizer.param_groups if not group.get("use_fallback") for p in group["params"]}
    assert {name for name in muons if dict(model.named_parameters())[name].ndim > 1} == matrices
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)

    weight = model.projector.fc2.weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight) * torch.linspace(1, 0.05, len(weight))[:, None]
    optimizer.step()
    stretch, steep = torch.linalg.svdvals(before - weight.detach()), torch.linalg.svdvals(weight.grad)
    assert stretch.max() < 3 * stretch.min() and steep.max() > 10 * steep.min()


def test_muon_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(timm.optim, "list_optimizers", lambda: ["adamw"], raising=False)
    with pytest.raises(ValueError, match="not in timm"):
        make_muon(torch.nn.Linear(2, 2), learning_rate=0.01, weight_decay=0.0)
    with pytest.raises(ValueError, match="fsdp"):
        options(Path("unused"), optimizer="muon", fsdp=True)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="steps=0"):
        options(tmp_path / "run", steps=0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        finetune(options(tmp_path / "run", tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no adapter"):
        merge_adapter(tmp_path, tmp_path / "merged")
