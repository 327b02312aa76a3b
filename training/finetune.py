"""Fine-tuning on one's own demonstrations, with the library's Trainer."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments, set_seed

from ..action_tokenizer import ActionTokenizer
from ..data import Episode, EpisodeStream, frames, open_dataset
from ..data.augment import ImageAugmentation
from ..data.collate import IGNORE_INDEX, ActionCollator
from ..data.samples import FrameSamples
from ..data.statistics import collect, compute_statistics
from ..modeling_openvla import OpenVLAForActionPrediction
from ..processing_openvla import OpenVLAProcessor
from .strategies import apply_strategy, qlora_quantization, trainable_parameters


# Learning rates of the paper: adapters, and everything else.
LEARNING_RATES = {"lora": 5e-4, "qlora": 5e-4}
FULL_LEARNING_RATE = 2e-5


@dataclass
class FinetuneOptions:
    """What a run is made of; the defaults are those of the original's LoRA fine-tuning.

    steps counts updates of the weights, batch_size samples of one device. `name` is the `unnorm_key` of the result,
    `camera` the image the model sees (default: the first that is not on the wrist).
    """

    model: str
    dataset: str
    output: str
    strategy: str = "lora"
    steps: int = 1000
    batch_size: int = 16
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    rank: int = 32
    image_aug: bool = True
    gradient_checkpointing: bool = False
    camera: str | None = None
    name: str | None = None
    split: str = "train"
    save_every: int = 500
    shuffle_buffer: int = 5000
    workers: int = 0
    dtype: str = "auto"
    seed: int = 0
    logging: str = "none"


def action_metrics(logits: torch.Tensor, labels: torch.Tensor, tokenizer: ActionTokenizer) -> dict[str, float]:
    """Share of action tokens predicted, and the mean L1 between predicted and wanted normalized actions.

    Args:
        logits: (N, length, vocab_size) of the text, aligned with `labels`.
        labels: (N, length), -100 where nothing is wanted.
    """
    predicted, wanted = logits[:, :-1].argmax(dim=-1), labels[:, 1:]
    first, end = tokenizer.token_range
    is_action = (wanted != IGNORE_INDEX) & (wanted >= first) & (wanted < end)
    predicted, wanted = predicted[is_action], wanted[is_action]
    distance = (tokenizer.decode(predicted) - tokenizer.decode(wanted)).abs()
    return {
        "action_accuracy": (predicted == wanted).float().mean().item(),
        "action_l1": distance.mean().item(),
    }


class ActionTrainer(Trainer):
    """Logs action-token accuracy and normalized L1 beside the loss."""

    def __init__(self, *args, action_tokenizer: ActionTokenizer, num_patches: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.action_tokenizer, self.num_patches = action_tokenizer, num_patches
        # The loss is the mean of its own batch: accumulated batches are averaged by the Trainer, not by the model.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        text = output.logits[:, self.num_patches :].detach()
        self._metrics = action_metrics(text, inputs["labels"], self.action_tokenizer)
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and hasattr(self, "_metrics"):
            logs = {**logs, **self._metrics}
        super().log(logs, *args, **kwargs)


def finetune(options: FinetuneOptions, resume: bool = False) -> Path:
    """Train, and write a checkpoint that `OpenVLAForActionPrediction.from_pretrained` loads.

    For lora and qlora the output folder holds the adapter with the statistics and the processor beside it; see
    `merge_adapter`. Checkpoints of the run lie in `output/checkpoints`; `resume` goes on from the last.

    Raises:
        ValueError: If the dataset holds nothing to train on, or the options do not fit together.
        FileExistsError: If the output folder holds a finished run.
    """
    output = Path(options.output)
    if (output / "dataset_statistics.json").exists() and not resume:
        raise FileExistsError(f"'{output}' holds a finished run: choose another folder, or remove it.")
    if options.steps < 1 or options.batch_size < 1:
        raise ValueError(f"steps={options.steps} and batch_size={options.batch_size} must be at least 1.")
    set_seed(options.seed)  # adapters are made before the Trainer sets it
    dataset = open_dataset(options.dataset, split=options.split)
    stats = compute_statistics(*collect(dataset, progress=True))
    if not any(dataset[index].instruction.strip() for index in range(len(dataset))):
        raise ValueError(f"'{options.dataset}' has no episode with an instruction: nothing can be trained.")
    name = options.name or dataset.name

    processor = OpenVLAProcessor.from_pretrained(options.model)
    loading: dict[str, Any] = {"dtype": options.dtype}
    if options.strategy == "qlora":
        loading["quantization_config"] = qlora_quantization()
    model: Any = OpenVLAForActionPrediction.from_pretrained(options.model, **loading)
    model.norm_stats = {name: stats}
    model.config.use_cache = False
    num_patches, size = model.vision_backbone.num_patches, model.vision_backbone.image_size
    action_tokenizer = model.action_tokenizer
    adapter = {"rank": options.rank} if options.strategy in LEARNING_RATES else {}
    model = apply_strategy(model, options.strategy, **adapter)
    print(
        f"{name}: {stats['num_trajectories']} episodes, {stats['num_transitions']} frames; "
        f"{options.strategy}: {trainable_parameters(model) / 1e6:.1f}M parameters learn"
    )

    stream = EpisodeStream(
        dataset,
        shuffle=True,
        buffer_size=options.shuffle_buffer,
        expand=labeled_frames,
        repeat=True,
        seed=options.seed,
        rank=0,  # every rank reads one and the same stream; accelerate gives each its samples of a batch
        world_size=1,
    )
    samples = FrameSamples(
        stream,
        stats["action"],
        camera=options.camera,
        size=size,
        augmentation=ImageAugmentation() if options.image_aug else None,
        seed=options.seed,
    )
    default = LEARNING_RATES.get(options.strategy, FULL_LEARNING_RATE)
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate or default,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=options.gradient_checkpointing,
        logging_steps=max(1, min(10, options.steps // 10)),
        save_steps=options.save_every,
        save_total_limit=2,
        report_to=options.logging,
        dataloader_num_workers=options.workers,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        # Batches of ranks are padded to lengths of their own: they cannot be put together on one rank and dispatched.
        accelerator_config={"dispatch_batches": False},
        ddp_find_unused_parameters=True,  # the last block of a tower is not run
    )
    trainer = ActionTrainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=ActionCollator(processor, ActionTokenizer(processor.tokenizer, action_tokenizer.n_bins)),
        action_tokenizer=action_tokenizer,
        num_patches=num_patches,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    model.config.use_cache = True
    if trainer.is_world_process_zero():
        save(trainer.model, processor, {name: stats}, output, options)
    trainer.accelerator.wait_for_everyone()
    return output


def labeled_frames(episode: Episode):
    """The frames of an episode with an instruction; none of one without."""
    return frames(episode) if episode.instruction.strip() else iter(())


def save(model: Any, processor: OpenVLAProcessor, norm_stats: dict, output: Path, options: FinetuneOptions) -> None:
    """Weights (or adapter), processor, how it was made, and last the statistics, which mark the run as finished."""
    output.mkdir(parents=True, exist_ok=True)
    # Without this PEFT stores whole embeddings because the output layer has an adapter.
    model.save_pretrained(output, **({"save_embedding_layers": False} if hasattr(model, "peft_config") else {}))
    processor.save_pretrained(output)
    made = {**vars(options), "learning_rate": options.learning_rate}
    (output / "finetune.json").write_text(json.dumps(made, indent=2) + "\n")
    temporary = output / "dataset_statistics.json.part"
    temporary.write_text(json.dumps(norm_stats, indent=2) + "\n")
    os.replace(temporary, output / "dataset_statistics.json")


def merge_adapter(folder: str | Path, output: str | Path, dtype: str = "auto") -> float:
    """Add the adapter of a finished lora or qlora run to its base, and write one plain checkpoint.

    Returns:
        The largest difference between logits with the adapter and merged, relative to the largest logit.

    Raises:
        FileNotFoundError: If `folder` holds no adapter.
        FileExistsError: If `output` is not empty.
    """
    from peft import PeftConfig, PeftModel

    folder, output = Path(folder), Path(output)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"'{folder}' holds no adapter (adapter_config.json): is it the output of a lora run?")
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"'{output}' is not empty: choose another folder.")
    base = OpenVLAForActionPrediction.from_pretrained(
        PeftConfig.from_pretrained(folder).base_model_name_or_path, dtype=dtype
    )
    base.norm_stats = json.loads((folder / "dataset_statistics.json").read_text(encoding="utf-8"))
    processor = OpenVLAProcessor.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, folder).eval()
    height, width = base.vision_backbone.image_size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    inputs = processor(processor.format_prompt("pick up the cup"), image)
    with torch.inference_mode():
        before = model(**inputs).logits
        merged = model.merge_and_unload()
        after = merged(**inputs).logits
    difference = ((after - before).abs().max() / before.abs().max()).item()
    merged.save_pretrained(output)
    processor.save_pretrained(output)
    return difference
