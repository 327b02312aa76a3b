"""What a fine-tuning run is made of: the options of `openvla finetune`, with the texts that its --help shows."""

import importlib.util
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..extras import remedy
from ..options import READER_HELP, check_options, option, required


class DivergedError(ValueError):
    """The loss, the gradient or the weights of a run are not finite: it has stopped."""

    exit_code = 1  # of the command line


@dataclass
class FinetuneOptions:
    """A run; the defaults are those of the original's LoRA fine-tuning (batch 16, 5e-4 constant, rank 32)."""

    dataset: str = required(
        "Folder or file of demonstrations (RLDS, LeRobot, HDF5); or a mixture: its Open-X name, "
        "'name:weight,name:weight', or a YAML file."
    )
    output: str = required("Folder for the result.")
    model: str = required(
        "Model to start from: a folder or a Hub id; or an earlier run: lora and qlora let its adapter continue "
        "learning (same rank), the others add it to its base first."
    )
    strategy: Literal["full", "last_layer", "frozen_vision", "sandwich", "lora", "qlora"] = option(
        "lora", "Which parameters learn (table 1 of the paper); qlora: lora on a 4-bit base."
    )
    steps: int = option(1000, "Updates of the weights, in all.")
    batch_size: int = option(16, "Samples of one batch on one device.")
    gradient_accumulation: int = option(
        1, "Batches of one update, where one that is large enough does not fit the memory."
    )
    # Learning
    learning_rate: float | None = option(
        None, "Learning rate, after the warmup. Default: 5e-4 for lora and qlora, else 2e-5."
    )
    schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", "Course of the learning rate after the warmup; linear and cosine fall to 0."
    )
    warmup_steps: int = option(0, "Steps in which the learning rate rises from 0 to its value.")
    weight_decay: float = option(0.0, "Weight decay of the optimizer.")
    optimizer: Literal["adamw", "muon"] = option(
        "adamw",
        "Rule of the updates. muon, for training from scratch: those of matrices are orthogonalized, others are "
        "AdamW's.",
    )
    max_grad_norm: float = option(1.0, "Norm that gradients are clipped to; 0: they are not.")
    rank: int = option(32, "Inner dimension of an adapter (lora, qlora).")
    alpha: int | None = option(None, "Scale of an adapter is alpha / rank. Default: min(rank, 16).")
    action_chunk: int | None = option(
        None, "Steps that one prediction is for; their tokens follow one another. Default: as the model has it, 1."
    )
    dropout: float = option(0.0, "Share of an adapter's inputs that is dropped at random (lora, qlora): 0 to below 1.")
    # Data
    data_root: str | None = option(None, "Folder in which the datasets of a mixture lie under their names.")
    format: str | None = option(None, "Format of the data: rlds, lerobot or hdf5. Default: recognised.")
    split: str = option("train", "Split to train on, or in RLDS a part of one: train[:100], train[:50%].")
    held_out: float = option(
        0.05, "Share of the episodes kept back for evaluation where there is no val split: 0.05 is 5%, 0 none."
    )
    camera: str | None = option(
        None, "Which of the cameras that are read the model sees through. Default: the first that is not on the wrist."
    )
    cameras: str | None = option(None, READER_HELP["cameras"])
    action_key: str | None = option(None, READER_HELP["action_key"])
    state_key: str | None = option(None, READER_HELP["state_key"])
    language_key: str | None = option(None, READER_HELP["language_key"])
    rotate_images: bool | None = option(None, READER_HELP["rotate_images"])
    tolerance_s: float | None = option(None, READER_HELP["tolerance_s"])
    name: str | None = option(
        None, "Name of the dataset in the result, which predict asks for as --unnorm-key. Default: its own."
    )
    gripper: Literal["open-is-1", "open-is-0", "open-is-plus-1", "open-is-minus-1"] = option(
        "open-is-1",
        "What the recorded gripper means: open-is-1 or open-is-0 where it goes from 0 to 1, open-is-plus-1 or "
        "open-is-minus-1 (LIBERO's HDF5) where it goes from -1 to 1. The model's convention is 1 open.",
    )
    gripper_dims: str | None = option(
        None,
        "Dimensions that are grippers, counted from 0: 6, or 6,13 of two arms, or none. Default: those with such a "
        "name, else the last where it looks like one.",
    )
    mask: str | None = option(
        None,
        "Which dimensions of an action are scaled by q01 and q99, 1 or 0 for each: 1,1,1,1,1,1,0. Default: all but "
        "grippers in [0, 1].",
    )
    standardize: str = option(
        "auto", "auto: RLDS datasets of Open-X, Bridge, DROID and LIBERO by their names; none; or such a name."
    )
    statistics: str | None = option(None, "A dataset_statistics.json to use instead of the data's own.")
    keep_unlabeled: bool = option(
        False, "Train also on steps without an instruction, with an empty one; else they are left out."
    )
    filters: str = option("", "Steps to leave out, joined by commas: no-ops, zero-actions.")
    on_error: Literal["raise", "skip"] = option("raise", "What to do with a damaged record; skip warns and counts.")
    image_aug: bool = option(True, "Vary crop, brightness, contrast, saturation and hue of the images at random.")
    shuffle_buffer: int = option(
        5000, "Frames held in memory, from which samples are drawn in random order; images stay encoded."
    )
    workers: int = option(0, "Processes that decode images; 0: the training process does it.")
    # Precision, memory, speed
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "Type of the weights in memory; auto: float32 where they learn, else as stored."
    )
    precision: Literal["auto", "bf16", "float32"] = option(
        "auto", "Type of the computation; auto: bf16 autocast on a GPU that has it, else float32."
    )
    gradient_checkpointing: bool = option(
        False, "Compute activations a second time for the gradient instead of keeping them: less memory, slower."
    )
    compile: bool = option(False, "Compile the model with torch.compile.")
    fsdp: bool = option(False, "Shard weights, gradients and optimizer over the processes (FSDP2).")
    # Watching
    eval_every: int | None = option(
        None, "Steps between evaluations on held-out frames. Default: as --save-every; 0: none."
    )
    eval_samples: int = option(256, "Held-out frames of one evaluation, spread evenly.")
    save_every: int = option(500, "Steps between checkpoints.")
    keep: int = option(2, "Checkpoints to keep, the newest; earlier ones are removed.")
    logging: Literal["none", "tensorboard", "wandb"] = option(
        "tensorboard", "What keeps the log of losses and accuracies; tensorboard: tensorboard --logdir OUTPUT shows it."
    )
    log_every: int = option(10, "Steps between lines of the log, at most a tenth of --steps.")
    seed: int = option(0, "Seed of the order of samples, of augmentation and of new weights.")

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that make no run, and for a log that nothing here can write."""
        limits = {"steps": 1, "batch_size": 1, "gradient_accumulation": 1, "save_every": 1, "keep": 1, "log_every": 1}
        limits |= {"warmup_steps": 0, "shuffle_buffer": 0, "workers": 0, "eval_samples": 0, "rank": 1, "seed": 0}
        limits |= {"learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0, "alpha": 1, "eval_every": 0}
        check_options(self, limits | {"held_out": 0, "dropout": 0, "action_chunk": 1})
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: expected a part of the inputs, from 0 to below 1.")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: expected a part of the episodes, from 0 to below 1.")
        if self.optimizer == "muon" and self.fsdp:
            raise ValueError("optimizer='muon' takes whole matrices, and fsdp=True shards them: leave one of them out.")
        if self.logging != "none" and importlib.util.find_spec(self.logging) is None:
            missing = remedy(self.logging) or f"{self.logging}: pip install {self.logging}."
            raise ValueError(f"logging={self.logging!r} needs {missing} Or give 'none'.")


# What a resumed run may change: where, how fast, how shared out, but not what the weights become.
FREE_ON_RESUME = {"output", "steps", "keep", "logging", "log_every", "workers", "compile", "save_every"}
GLOBAL_BATCH = {"batch_size", "gradient_accumulation"}  # their product with the number of processes counts


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Options of a resumed run that do not agree with those it was started with; both with `global_batch`."""
    names = {item.name for item in fields(FinetuneOptions)} - FREE_ON_RESUME - GLOBAL_BATCH | {"global_batch"}
    if now["schedule"] != "constant":
        names.add("steps")  # the learning rate depends on them
    return [
        f"{name} was {before[name]!r}, is {now[name]!r}"
        for name in sorted(names)
        if name in before and before[name] != now[name]
    ]
