"""Fine-tuning end to end: every strategy, every format, resume, merge; on the embedded policy, a few steps each."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from openvla import OpenVLAForActionPrediction
from openvla.training import STRATEGIES, FinetuneOptions, finetune, merge_adapter


pytest.importorskip("accelerate", reason="training needs the [train] extra")
pytest.importorskip("peft", reason="training needs the [train] extra")

ROOT = Path(__file__).resolve().parents[1]
DEMOS = Path(__file__).parent / "fixtures" / "demos"
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def options(output: Path, dataset: Path = DEMOS / "lerobot_image", **changes) -> FinetuneOptions:
    settings = {"steps": 3, "batch_size": 2, "rank": 4, "shuffle_buffer": 16, "name": "mine", **changes}
    return FinetuneOptions(model=str(ROOT), dataset=str(dataset), output=str(output), **settings)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if "lora" not in name])
def test_strategies_that_change_the_weights(strategy, tmp_path):
    finetune(options(tmp_path / "run", strategy=strategy))
    model = AutoModel.from_pretrained(str(tmp_path / "run"))
    assert set(model.norm_stats) == {"mine"}
    assert model.predict_action(IMAGE, "open the drawer").shape == (7,)
    before, after = load_file(ROOT / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert set(before) == set(after)
    assert any(not torch.equal(before[name].float(), after[name].float()) for name in before)


@pytest.mark.parametrize("strategy", ["lora", "qlora"])
def test_adapters_and_their_merge(strategy, tmp_path):
    if strategy == "qlora":
        pytest.importorskip("bitsandbytes", reason="qlora needs the [quant] extra")
    finetune(options(tmp_path / "run", strategy=strategy, dtype="float32"))
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)  # no whole embeddings beside them
    assert merge_adapter(tmp_path / "run", tmp_path / "merged") < 1e-4
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "merged")
    assert set(model.norm_stats) == {"mine"}
    assert model.predict_action(IMAGE, "open the drawer").shape == (7,)
    with pytest.raises(FileExistsError, match="not empty"):
        merge_adapter(tmp_path / "run", tmp_path / "merged")


@pytest.mark.parametrize("dataset", ["rlds/metaworld_demo", "hdf5"])
def test_other_formats(dataset, tmp_path):
    finetune(
        options(tmp_path / "run", DEMOS / dataset, steps=2, **({"split": "val"} if dataset.startswith("rlds") else {}))
    )
    stats = json.loads((tmp_path / "run" / "dataset_statistics.json").read_text())
    assert len(stats["mine"]["action"]["q01"]) == 7


def test_resume_ends_where_the_undisturbed_run_ends(tmp_path):
    settings = {"strategy": "last_layer", "steps": 4, "save_every": 2, "dtype": "float32", "learning_rate": 1e-3}
    finetune(options(tmp_path / "whole", **settings))
    broken = tmp_path / "broken" / "checkpoints"
    broken.mkdir(parents=True)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "checkpoint-2", broken / "checkpoint-2")
    finetune(options(tmp_path / "broken", **settings), resume=True)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    start = load_file(broken / "checkpoint-2" / "model.safetensors")
    assert any(not torch.equal(start[name], whole[name]) for name in whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


TWO_PROCESSES = """
import json, sys
import torch
from openvla.training import FinetuneOptions, finetune

torch.set_num_threads(1)
finetune(FinetuneOptions(**json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_two_processes_learn_what_one_does(strategy, tmp_path):
    """Two gloo processes of batch 2 against one of batch 4: the same losses."""
    settings = {"strategy": strategy, "dtype": "float32", "learning_rate": 1e-3, "save_every": 3}
    finetune(options(tmp_path / "one", batch_size=4, **settings))
    two = options(tmp_path / "two", batch_size=2, **settings)
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(tmp_path / "run.py"), json.dumps(vars(two))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    losses = []
    for name in ("one", "two"):
        state = json.loads((tmp_path / name / "checkpoints" / "checkpoint-3" / "trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    # Not the weights: Adam makes steps of full size out of gradients that are zero but for rounding (key biases).


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        finetune(options(tmp_path / "run", steps=0))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        finetune(options(tmp_path / "run", tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no adapter"):
        merge_adapter(tmp_path, tmp_path / "merged")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "dataset_statistics.json").write_text("{}")
    with pytest.raises(FileExistsError, match="finished run"):
        finetune(options(tmp_path / "done"))
