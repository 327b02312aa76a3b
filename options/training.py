"""Options of `openvla finetune` and `openvla merge`."""

import importlib.util
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..extras import remedy
from .datasets import Cameras, DatasetOptions
from .fields import Options, default_of, option, required
from .prediction import EMBEDDED_POLICY


# Options that are not given, by recipe. What OpenVLA and OpenVLA-OFT have in common is not here: rank, alpha, dropout
# and learning rate of adapters.
RECIPES: dict[str, dict[str, Any]] = {
    "openvla": {"chunk_end": "repeat", "schedule": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0},
    "oft": {
        "head": "l1_regression",
        "action_chunk": 8,
        "chunk_end": "drop",
        "schedule": "step",
        "weight_decay": 0.01,
        "max_grad_norm": 0.0,
    },
}
ADAPTER_STRATEGIES = ("lora", "qlora")
OF_ADAPTERS = ("rank", "alpha", "dropout")  # options that say nothing with other strategies
DECAY_AFTER = 100_000  # of 150,005 steps, in OpenVLA-OFT's runs on LIBERO


@dataclass(kw_only=True)
class FinetuneOptions(DatasetOptions):
    """A run; the defaults are those of the original's LoRA fine-tuning (batch 16, 5e-4 constant, rank 32).

    What `recipe` decides is None until the options are made, and then has its value: what is saved does not depend on
    what a recipe is in a later version.
    """

    output: str = required("Folder for the result.", neutral=True)
    model: str = option(
        EMBEDDED_POLICY,
        "Model to start from: a folder or a Hub id; or an earlier run: lora and qlora let its adapter continue "
        "learning (same rank), the others add it to its base first.",
        shown="the policy that comes with the package",
        heading="Model and strategy",
    )
    strategy: Literal["full", "last_layer", "frozen_vision", "sandwich", "lora", "qlora"] = option(
        "lora", "Which parameters learn (table 1 of the paper); qlora: lora on a 4-bit base."
    )
    recipe: Literal["openvla", "oft"] = option(
        "openvla",
        "Training that the defaults come from. oft is that of OpenVLA-OFT: --head l1_regression --chunk 8 --chunk-end "
        "drop --schedule step --weight-decay 0.01 --max-grad-norm 0; options that are given override these. --cameras, "
        "--state and --film depend on the data: give them beside it.",
        neutral=True,  # its values are compared
    )
    steps: int = option(1000, "Updates of the weights, in all.", least=1, neutral=True, heading="Optimization")
    batch_size: int = option(16, "Samples of one batch on one device.", least=1, neutral=True)
    gradient_accumulation: int = option(
        1, "Batches of one update, where one that is large enough does not fit the memory.", least=1, neutral=True
    )
    head: str | None = option(
        None,
        "How actions come out of the model: tokens, one after the other; or all in one pass, as in OpenVLA-OFT: "
        "parallel_tokens, l1_regression, diffusion. Default: as the model has it, tokens.",
        heading="What the model is to be",
    )
    action_chunk: int | None = option(
        None, "Steps that one prediction is for. Default: as the model has it, 1.", least=1, flag="--chunk"
    )
    chunk_end: Literal["still", "repeat", "drop"] | None = option(
        None,
        "What a chunk of several steps holds past the end of its episode: repeat, the last action again, not learned; "
        "drop, there are no such chunks, as in OpenVLA-OFT; still, no motion, learned like all else: a model that "
        "continues what is executed (--chunking prefix) learns from it to stand for ever.",
        shown="repeat; drop with --recipe oft",
    )
    camera_names: str | None = option(
        None,
        "What the model sees, joined by commas: primary, or primary,wrist. Default: as the model has it, primary.",
        flag="--cameras",
    )
    proprio: bool = option(False, "Let the model see the state of the robot beside the images.", flag="--state")
    film: bool = option(
        False,
        "Let the words of the prompt scale and shift the features of the vision towers (FiLM); for heads that predict "
        "in one pass.",
        flag="--film",
    )
    prefix_training: int | None = option(
        None,
        "Let a head that predicts in one pass learn to continue: in each sample the first steps, up to this many, are "
        "given and not learned. For real-time control with --chunking prefix, where they are executed meanwhile.",
        least=0,
    )
    learning_rate: float | None = option(
        None,
        "Learning rate, after the warmup. Default: 5e-4 for lora and qlora, else 2e-5.",
        least=0,
        heading="Optimization",
    )
    schedule: Literal["constant", "linear", "cosine", "step"] | None = option(
        None,
        "Schedule of the learning rate after the warmup; linear and cosine fall to 0; step: a tenth after "
        "--decay-after steps.",
        shown="constant; step with --recipe oft",
    )
    warmup_steps: int = option(0, "Steps in which the learning rate rises from 0 to its value.", least=0)
    decay_after: int | None = option(
        None,
        "Steps after which the learning rate of --schedule step is a tenth. Default: 100000, of OpenVLA-OFT's 150005.",
        least=1,
    )
    weight_decay: float | None = option(
        None, "Weight decay of the optimizer.", least=0, shown="0.0; 0.01 with --recipe oft"
    )
    optimizer: Literal["adamw", "muon"] = option(
        "adamw",
        "Rule of the updates. muon, for training from scratch: those of matrices are orthogonalized, others are "
        "AdamW's.",
    )
    max_grad_norm: float | None = option(
        None, "Norm that gradients are clipped to; 0: they are not.", least=0, shown="1.0; 0.0 with --recipe oft"
    )
    rank: int = option(32, "Inner dimension of an adapter (lora, qlora).", least=1, heading="Adapter")
    alpha: int | None = option(None, "Scale of an adapter is alpha / rank. Default: min(rank, 16).", least=1)
    dropout: float = option(
        0.0, "Share of an adapter's inputs that is dropped at random (lora, qlora): 0 to below 1.", least=0, below=1
    )
    held_out: float = option(
        0.05,
        "Share of the episodes kept back for evaluation where there is no val split: 0.05 is 5%, 0 none.",
        least=0,
        below=1,
        heading="Samples",
    )
    cameras: Cameras = option(
        None,
        "Cameras to read, by their keys in the data, joined by commas. Default: all in colour.",
        flag="--read-cameras",
        heading="Data",
    )
    camera: str | None = option(
        None,
        "Which of the cameras that are read the model sees through. Default: the first that is not on the wrist.",
        heading="Samples",
    )
    statistics: str | None = option(None, "A dataset_statistics.json to use instead of the data's own.")
    normalization: Literal["bounds_q99", "bounds"] | None = option(
        None,
        "What -1 and 1 stand for in actions and states: bounds_q99, q01 and q99 of the data; bounds, its min and max. "
        "Default: as the model has it for a dataset of this name, bounds_q99.",
    )
    keep_unlabeled: bool = option(
        False, "Train also on steps without an instruction, with an empty one; else they are left out."
    )
    image_aug: bool = option(True, "Vary crop, brightness, contrast, saturation and hue of the images at random.")
    shuffle_buffer: int = option(
        5000, "Frames held in memory, from which samples are drawn in random order; images stay encoded.", least=0
    )
    workers: int = option(0, "Processes that decode images; 0: the training process does it.", least=0, neutral=True)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto",
        "Type of the weights in memory; auto: float32 where they learn, else as stored.",
        heading="Precision, memory, speed",
    )
    precision: Literal["auto", "bf16", "float32"] = option(
        "auto", "Type of the computation; auto: bf16 autocast on a GPU that has it, else float32."
    )
    gradient_checkpointing: bool = option(
        False, "Compute activations a second time for the gradient instead of keeping them: less memory, slower."
    )
    compile: bool = option(False, "Compile the model with torch.compile.", neutral=True)
    fsdp: bool = option(False, "Shard weights, gradients and optimizer over the processes (FSDP2).")
    eval_every: int | None = option(
        None,
        "Steps between evaluations on held-out frames. Default: as --save-every; 0: none.",
        least=0,
        heading="Evaluation, checkpoints, log",
    )
    eval_samples: int = option(256, "Held-out frames of one evaluation, spread evenly.", least=0)
    save_every: int = option(500, "Steps between checkpoints.", least=1, neutral=True)
    keep: int = option(2, "Checkpoints to keep, the newest; earlier ones are removed.", least=1, neutral=True)
    logging: Literal["none", "tensorboard", "wandb"] = option(
        "tensorboard",
        "What keeps the log of losses and accuracies; tensorboard: tensorboard --logdir OUTPUT shows it.",
        neutral=True,
    )
    log_every: int = option(10, "Steps between lines of the log, at most a tenth of --steps.", least=1, neutral=True)
    seed: int = option(
        0,
        "Seed of the order of samples, of augmentation and of new weights.",
        least=0,
        below=2**32,
        heading="Optimization",
    )

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that make no run, and for a log that nothing here can write."""
        recipe = RECIPES.get(self.recipe, {}) if isinstance(self.recipe, str) else {}  # others are refused below
        for name, value in recipe.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.schedule == "step" and self.decay_after is None:
            self.decay_after = DECAY_AFTER
        super().__post_init__()
        if self.decay_after is not None and self.schedule != "step":
            raise ValueError(
                f"decay_after={self.decay_after}: schedule='{self.schedule}' has no such step, give schedule='step'."
            )
        if self.optimizer == "muon" and self.fsdp:
            raise ValueError("optimizer='muon' takes complete matrices, and fsdp=True shards them: leave one out.")
        if self.logging != "none" and importlib.util.find_spec(self.logging) is None:
            missing = remedy(self.logging) or f"{self.logging}: pip install {self.logging}."
            raise ValueError(f"logging={self.logging!r} needs {missing} Or give 'none'.")


@dataclass(kw_only=True)
class FinetuneVerb(FinetuneOptions):
    """The run of `openvla finetune`, and what is done around it."""

    resume: bool = option(
        False,
        "Continue from the last checkpoint in OUTPUT, or begin where there is none. Options, data and weights have to "
        "be the same. A finished run only writes its result again.",
        flag="--resume",
        heading="Run",
    )
    merge: Path | None = option(
        None, "Folder to write the adapter added to its base to, at the end (lora, qlora); see merge."
    )
    dry_run: bool = option(False, "Print the plan (samples, parameters, memory, warnings) and stop.", flag="--dry-run")

    def __post_init__(self) -> None:
        """Raises ValueError for an option that has no effect beside another, and where there is nothing to merge, or no
        place for it."""
        super().__post_init__()
        given = {item.name for item in fields(self) if getattr(self, item.name) != default_of(item)}
        if self.strategy not in ADAPTER_STRATEGIES and (of_adapters := given & {*OF_ADAPTERS}):
            name = min(of_adapters)
            raise ValueError(
                f"{name}={getattr(self, name)}: strategy='{self.strategy}' has no adapter, leave it out, or give "
                "strategy='lora' or 'qlora'."
            )
        if self.eval_every == 0 and "eval_samples" in given:
            raise ValueError(
                f"eval_samples={self.eval_samples}: nothing is evaluated with eval_every=0, leave one of them out."
            )
        if self.merge is None:
            return
        if self.strategy not in ADAPTER_STRATEGIES:
            raise ValueError(f"merge='{self.merge}': strategy '{self.strategy}' has no adapter to merge.")
        if self.merge.expanduser().resolve() == Path(self.output).expanduser().resolve():
            raise ValueError(f"merge='{self.merge}' is the output of the run: give another folder.")

    @property
    def run(self) -> FinetuneOptions:
        """The options of the run alone, as they are saved."""
        return FinetuneOptions(**{item.name: getattr(self, item.name) for item in fields(FinetuneOptions)})


@dataclass(kw_only=True)
class MergeOptions(Options):
    """An adapter, added to its base."""

    run: Path = required("OUTPUT of finetune with lora or qlora.", argument=True)
    out: Path = required("Folder to write.", argument=True)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "Type of the written weights; auto: as the base is stored."
    )
    base: str | None = option(None, "Base of the adapter: a folder or a Hub id.", shown="where it was in training")
