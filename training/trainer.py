"""The library's Trainer for actions: one stream on all ranks, metrics of actions, checkpoints that appear whole."""

import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from ..data import Episode
from ..data.collate import ActionCollator
from ..data.samples import FrameSamples
from ..data.stream import Batches, MixtureStream
from .checkpoints import write_checkpoint
from .loss import action_loss, with_logits_to_keep
from .metrics import ActionMetrics


UNFINISHED = ".unfinished"
SHOWN = {"loss": "loss", "action_accuracy": "accuracy", "action_l1": "L1"}


def attention_kernel(arguments: TrainingArguments) -> AbstractContextManager:
    """Plain matrix products where a CPU computes in bfloat16: they take half the time of its fused attention there."""
    return sdpa_kernel(SDPBackend.MATH) if arguments.use_cpu and arguments.bf16 else nullcontext()


class ProgressBar(ProgressCallback):
    """Loss, token accuracy and normalized L1 beside the bar; a line for each evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs:
            return
        if "eval_loss" in logs:
            held_out = ", ".join(f"{text} {logs['eval_' + name]:.4f}" for name, text in SHOWN.items())
            self.training_bar.write(f"step {state.global_step}, held out: {held_out}")
        elif "loss" in logs:
            shown = {text: f"{logs[name]:.4f}" for name, text in SHOWN.items() if name in logs}
            if {f"l1/{axis}" for axis in "xyz"} <= logs.keys():  # in units of the dataset
                shown["L1 xyz"] = f"{sum(logs[f'l1/{axis}'] for axis in 'xyz') / 3:.4g}"
            self.training_bar.set_postfix(shown)


class ActionTrainer(Trainer):
    """Trains on a `MixtureStream`, whose frames DataLoader workers decode; evaluates on held-out frames.

    The loss is the mean over action tokens and `</s>`; only their logits are computed.

    Args:
        stream: This rank's samples.
        samples, eval_samples: How frames become samples in training and evaluation.
        collator: Makes batches.
        held_out: Frames to evaluate on, the same on all ranks, which share them out.
        statistics: `{dataset: statistics}`, written beside every checkpoint; the scale of the L1 in units.
        metrics: Of actions, one for training and one for evaluation.
        frames: Training frames, which make an epoch.
        card: Text of the model card beside every checkpoint.
    """

    def __init__(
        self,
        *,
        stream: MixtureStream,
        samples: FrameSamples,
        eval_samples: FrameSamples,
        collator: ActionCollator,
        held_out: Sequence[Episode],
        statistics: dict[str, Any],
        metrics: tuple[ActionMetrics, ActionMetrics],
        frames: int,
        card: str,
        **kwargs: Any,
    ):
        config = kwargs["model"].config
        before = {name: value for name, value in vars(config).items() if name == "use_cache"}
        super().__init__(train_dataset=samples, eval_dataset=list(held_out) or None, **kwargs)
        # The library writes its own choice for training there, and checkpoints would keep it.
        vars(config).pop("use_cache", None)
        vars(config).update(before)
        self.stream, self.eval_samples, self.collator, self.held_out = stream, eval_samples, collator, list(held_out)
        self.statistics, self.frames, self.card = statistics, frames, card
        self.train_metrics, self.eval_metrics = metrics
        self.last_metrics: dict[str, float] = {}
        # The loss is the mean of its own batch: accumulated batches are averaged by the Trainer, not by the model.
        self.model_accepts_loss_kwargs = False
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressBar())
        # The launcher may have chosen bf16 as well: the accelerator knows, the arguments do not. accelerate would
        # average gradients in bfloat16 too.
        if self.is_fsdp_enabled and self.accelerator.mixed_precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy

    # Data -------------------------------------------------------------------------------------------------------------

    def _collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        scales = [action_scale(self.statistics[sample["dataset"]]["action"]) for sample in samples]
        return {**with_logits_to_keep(self.collator(samples)), "action_scale": torch.stack(scales)}

    def get_train_dataloader(self) -> DataLoader:
        """Not handed to accelerate: the stream knows its rank and where a resumed run goes on."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=Batches(self.stream, self.args.per_device_train_batch_size),
            collate_fn=self._collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=not self.args.use_cpu,
            generator=torch.Generator().manual_seed(0),  # its draws would move the global one, which dropout uses
        )

    def _held_out_batches(self):
        """Of this rank; every rank has as many, because sharded models compute together."""
        rank, ranks, size = self.args.process_index, self.args.world_size, self.args.per_device_eval_batch_size
        count = max(1, len(self.held_out) // ranks)
        mine = [self.held_out[(rank + ranks * turn) % len(self.held_out)] for turn in range(count)]
        for start in range(0, count, size):
            yield self._collate([self.eval_samples[start, frame] for frame in mine[start : start + size]])

    # Loss and metrics -------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        scale = inputs.pop("action_scale")
        with attention_kernel(self.args):
            loss, logits, labels = action_loss(model, inputs)
        metrics = self.train_metrics if model.training else self.eval_metrics
        metrics.update(loss, logits.detach(), labels, scale)
        return (loss, {"logits": logits}) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Loss, accuracy and L1 of the held-out frames, under `eval_...` in the log."""
        model = self.model_wrapped
        model.eval()
        for batch in self._held_out_batches():
            with torch.no_grad(), self.compute_loss_context_manager():
                self.compute_loss(model, self._prepare_inputs(batch))
        model.train()
        found = {f"{metric_key_prefix}_{name}": value for name, value in self.eval_metrics.compute().items()}
        self.log(found)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        samples = self.state.global_step * self.args.train_batch_size * self.args.world_size
        self.state.epoch = round(samples * self.args.gradient_accumulation_steps / self.frames, 4)
        if "loss" in logs and "eval_loss" not in logs:
            # The Trainer's own loss stays: it is that of all ranks as well.
            self.last_metrics = self.train_metrics.compute()
            logs = {**self.last_metrics, **logs}
        super().log(logs, *args, **kwargs)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Published layout, processor, statistics and card. Nothing is pickled (the library adds its arguments so)."""
        if self.args.should_save:
            write_checkpoint(
                self.accelerator.unwrap_model(self.model, keep_torch_compile=False),
                Path(output_dir or self.args.output_dir),
                self.collator.processor,
                self.statistics,
                self.card,
                state_dict,
            )

    def save_result(self, folder: Path, dtype: torch.dtype | None) -> None:
        """The trained model in `folder`, gathered from all ranks; weights of a whole model in `dtype` unless None."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        state = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if not self.args.should_save:
            return
        if hasattr(model, "peft_config"):
            dtype = None  # adapters are small, and stay exact
        if dtype is not None:
            state = {name: value.to("cpu", dtype) for name, value in (state or model.state_dict()).items()}
        write_checkpoint(model, folder, self.collator.processor, self.statistics, self.card, state, dtype)

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / UNFINISHED)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint is written under another name and renamed when it is whole; only then older ones go."""
        folder = Path(self.args.output_dir)
        finished = folder / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk speaks through all three
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            last = last_checkpoint(folder)
            remedy = (
                f"The last good one is '{last}': make room, then go on with --resume." if last else "There is none."
            )
            raise OSError(
                f"The checkpoint of step {self.state.global_step} could not be written: {error}. {remedy}"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(finished, ignore_errors=True)  # of a run that was stopped and repeats this step
            os.replace(folder / UNFINISHED / finished.name, finished)
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            for old in checkpoints(folder)[: -self.args.save_total_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


def action_scale(stats: dict[str, Any]) -> torch.Tensor:
    """(A,) float64: units of the dataset in one unit of normalized action."""
    half = (torch.tensor(stats["q99"], dtype=torch.float64) - torch.tensor(stats["q01"], dtype=torch.float64)) / 2
    return torch.where(torch.tensor(stats.get("mask", [True] * len(half))), half, 1.0)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest step first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_checkpoint(folder: Path) -> Path | None:
    found = checkpoints(folder)
    return found[-1] if found else None
