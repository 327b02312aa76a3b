"""Strategies with heads: they learn what they should, and what is loaded again predicts as what was trained."""

import pickle
import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_parallel_heads import DATA, IMAGES, WORDS, state_of

from openvla import OpenVLAForActionPrediction
from openvla.action_heads_openvla import HEADS
from openvla.parts_openvla import is_added
from openvla.training import STRATEGIES, FinetuneOptions, finetune, qlora_quantization, run


pytest.importorskip("accelerate", reason="training needs the [train] extra")
pytest.importorskip("peft", reason="training needs the [train] extra")

CHUNK = 4
LANGUAGE, ENDS = "language_model.", ("model.embed_tokens", "model.layers.1", "model.norm", "lm_head")
LAST = tuple(LANGUAGE + name for name in ENDS)
# What learns beside the parts below
LEARNS = {
    "full": ("",),
    "last_layer": LAST,
    "frozen_vision": ("projector.", LANGUAGE),
    "sandwich": ("vision_backbone.", "projector.", *LAST),
    "lora": (),
    "qlora": (),
}
# Parts that no published model has: they learn whatever the strategy
PARTS = {
    "tokens": {"proprio_projector."},
    "parallel_tokens": {"proprio_projector.", "vision_backbone."},
    "l1_regression": {"proprio_projector.", "vision_backbone.", "action_head."},
    "diffusion": {"proprio_projector.", "vision_backbone.", "action_head.", "noisy_action_projector."},
}


def options(output: Path, base: Path, head: str, **changes) -> FinetuneOptions:
    made = {"model": str(base), "dataset": str(DATA), "output": str(output), "head": head, "action_chunk": CHUNK}
    made |= {"steps": 2, "batch_size": 2, "rank": 2, "shuffle_buffer": 4, "name": "mine", "logging": "none"}
    made |= {"eval_every": 0, "dtype": "float32", "proprio": True, "film": head != "tokens", "learning_rate": 1e-2}
    return FinetuneOptions(**{**made, "held_out": 0.0, "image_aug": False, **changes})


def act(model, state) -> np.ndarray:
    torch.manual_seed(5)  # of the noise that a diffusion begins with
    model.action_head.num_inference_steps = 5
    return model.predict_action(IMAGES, WORDS, state=[state] * 2)


class Watched(run.ActionTrainer):
    """Keeps the weights from before the first step, and what the trained model says before it is saved."""

    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    actions: np.ndarray

    def train(self, *args, **kwargs):
        Watched.before = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        return super().train(*args, **kwargs)

    def save_result(self, folder, dtype):
        Watched.after = dict(self.model.named_parameters())
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        model.eval().processor = self.collator.processor
        Watched.actions = act(model, state_of(model))
        super().save_result(folder, dtype)


# Every head with all weights and with adapters; every strategy with diffusion, which has all the parts. What each
# learns with tokens alone: test_strategies.py
COMBINED = [
    (strategy, head) for strategy in LEARNS for head in PARTS if strategy in ("full", "lora") or head == "diffusion"
]


@pytest.mark.parametrize(("strategy", "head"), COMBINED)
def test_strategies_with_heads(strategy, head, small_policy, tmp_path, monkeypatch):
    if head == "diffusion":
        pytest.importorskip("diffusers", reason="needs the [oft] extra")
    loading = {}
    if strategy == "qlora":
        pytest.importorskip("bitsandbytes", reason="qlora needs the [quant] extra")
        # In bfloat16 a loaded adapter is rounded to it as well.
        quantization = loading["quantization_config"] = qlora_quantization(torch.float32)
        monkeypatch.setattr(run, "qlora_quantization", lambda: quantization)
    monkeypatch.setattr(run, "ActionTrainer", Watched)
    finetune(options(tmp_path / "run", small_policy, head, strategy=strategy))

    before, after = Watched.before, Watched.after
    names = {name.removeprefix("base_model.model."): name for name in after}
    changed = {name for name, key in names.items() if not torch.equal(before[key], after[key])}
    parts = {name for name in names if is_added(name) and ".blocks.1." not in name}  # the last block is not run
    assert {part for part in PARTS[head] if any(name.startswith(part) for name in parts)} == PARTS[head]
    assert parts <= changed
    allowed = {name for name in names if name.startswith(LEARNS[strategy]) or "lora_" in name}
    assert changed <= parts | allowed
    learned = [name for name in LEARNS[strategy] if name != "language_model.lm_head" or "tokens" in head]
    assert all(any(name.startswith(prefix) for name in changed) for prefix in learned)
    assert any("lora_" in name for name in changed) == ("lora" in strategy)

    model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "run", **loading)
    assert (model.config.action_head, model.config.proprio_dim) == (head, 8)
    found = act(model, state_of(model))
    assert found.shape == (2, CHUNK, 7)
    # On a CPU with AVX-512 for bfloat16 bitsandbytes packs weights when they first run without gradients, and its
    # products round otherwise from then on.
    np.testing.assert_allclose(found, Watched.actions, atol=5e-3 if strategy == "qlora" else 1e-6)


def test_every_strategy_and_head_is_tested():
    assert STRATEGIES.keys() == LEARNS.keys() and PARTS.keys() <= HEADS.keys()


def test_a_full_run_with_a_head_continues(small_policy, tmp_path):
    """Stopped after the first of two steps, the second of which draws noise and prefixes: the same weights."""
    pytest.importorskip("diffusers", reason="needs the [oft] extra")
    changes = {"strategy": "full", "save_every": 1, "keep": 2, "prefix_training": 3, "camera_names": "primary"}
    made = options(tmp_path / "run", small_policy, "diffusion", **changes)
    finetune(made)
    shutil.copytree(tmp_path / "run", tmp_path / "without_a_stop")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    for name in ("model.safetensors", "dataset_statistics.json"):
        (tmp_path / "run" / name).unlink()
    finetune(made, resume=True)
    found, expected = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "run", tmp_path / "without_a_stop")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected.keys() | found.keys())


def test_activations_are_computed_again_in_bfloat16(small_policy, tmp_path):
    """By the kernels of the forward pass, also on a CPU, where training chooses its own."""
    changes = {"strategy": "full", "gradient_checkpointing": True, "precision": "bf16", "dtype": "auto"}
    finetune(options(tmp_path / "run", small_policy, "l1_regression", **changes, steps=1))
    assert (tmp_path / "run" / "model.safetensors").is_file()


class TwoCameras:
    """Demonstrations of two cameras and a state, as a Python object."""

    name = "mine"

    def __len__(self):
        return 2

    def __getitem__(self, index):
        images = {camera: [np.full((32, 32, 3), 10 * step + shift, np.uint8) for step in range(10)]
                  for camera, shift in (("front", 0), ("wrist", 100))}  # fmt: skip
        actions, state = np.random.default_rng(index).uniform(-1, 1, (2, 10, 7))
        return {"actions": actions, "state": state, "instruction": "lift the lid", "images": images}


def test_workers_that_are_spawned_make_the_same_batches(small_policy, tmp_path, monkeypatch):
    """Where processes are not forked (macOS, Windows) a worker receives a copy of what makes its batches: not of the
    trainer, which cannot be copied and holds the model."""
    copies = []

    class Copies(run.ActionTrainer):
        def get_train_dataloader(self):
            loader = super().get_train_dataloader()
            frames = next(iter(loader.batch_sampler))
            passed_on = ForkingPickler.dumps((loader.dataset, loader.collate_fn))
            for samples, collate in ((loader.dataset, loader.collate_fn), pickle.loads(passed_on)):
                copies.append(collate([samples[frame] for frame in frames]))
            return loader

    monkeypatch.setattr(run, "ActionTrainer", Copies)
    changes = {"camera_names": "primary,wrist", "image_aug": True, "strategy": "last_layer", "steps": 1}
    changes["action_chunk"] = 8  # past the end of an episode
    finetune(options(tmp_path / "run", small_policy, "l1_regression", **changes), data=TwoCameras())
    own, copy = copies
    assert {"proprio", "actions", "action_is_pad", "pixel_values"} <= own.keys() == copy.keys()
    assert own["pixel_values"].shape[1] == 12 and own["actions"].shape == (2, 8, 7)
    assert all(torch.equal(own[key], copy[key]) for key in own if torch.is_tensor(own[key]))
