"""The library's Trainer for actions: one stream on all ranks, metrics of actions, checkpoints that appear complete."""

import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback, TrainerCallback
from transformers.utils import logging

from ..data import Episode
from ..data.collate import ActionCollator
from ..data.samples import FrameSamples
from ..data.stream import Batches, MixtureStream
from ..folders import WORK, move_into, share_weights, working_folder
from ..processor_files_openvla import STARTED
from ..quantized_linear_openvla import all_finite
from .checkpoints import write_checkpoint
from .checks import DivergedError
from .metrics import ActionMetrics
from .resume import UNFINISHED, checkpoints, last_checkpoint
from .schedule import step_decay


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
            known = {text: logs[f"eval_{name}"] for name, text in SHOWN.items() if f"eval_{name}" in logs}
            held_out = ", ".join(f"{text} {value:.4f}" for text, value in known.items())
            self.training_bar.write(f"step {state.global_step}, held out: {held_out}")
        elif "loss" in logs:
            shown = {text: f"{logs[name]:.4f}" for name, text in SHOWN.items() if name in logs}
            if {f"l1/{axis}" for axis in "xyz"} <= logs.keys():  # in units of the dataset
                shown["L1 xyz"] = f"{sum(logs[f'l1/{axis}'] for axis in 'xyz') / 3:.4g}"
            self.training_bar.set_postfix(shown)


class Curves(TensorBoardCallback):
    """TensorBoard's curves, without the library's text of all arguments: it holds paths of this machine."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.tb_writer is None:
            runs = Path(args.output_dir) / "runs" / time.strftime("%Y-%m-%d_%H-%M-%S")
            self.logging_dir: str | None = self.logging_dir or str(runs)
            self._init_summary_writer(args)


class Intervals(TrainerCallback):
    """Steps between checkpoints, evaluations and lines of the log, as this command has them: the library takes those of
    the checkpoint that a run continues from."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)


class TrainingBatches:
    """Samples to a batch of a step. By itself, because a worker process that is spawned receives a copy of it."""

    def __init__(self, collator: ActionCollator, scales: dict[str, torch.Tensor]):
        self.collator, self.scales = collator, scales

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        scales, head = torch.stack([self.scales[sample["dataset"]] for sample in samples]), self.collator.head
        batch = head.prepare(self.collator(samples))
        return {**batch, "action_scale": scales, "num_learned": head.num_learned(batch)}


class ActionTrainer(Trainer):
    """Trains on a `MixtureStream`, whose frames DataLoader workers decode; evaluates on held-out frames.

    The loss is the mean over action tokens and `</s>`, or numbers, of all batches of an update on all ranks; only their
    logits are computed.

    Args:
        stream: This rank's samples.
        samples, eval_samples: How frames become samples in training and evaluation.
        collator: Makes batches.
        held_out: Frames to evaluate on, the same on all ranks, which share them out.
        statistics: `{dataset: statistics}`, written beside every checkpoint.
        scales: `{dataset: (A,)}` units in one unit of normalized action, of the L1 in units.
        shape: (K, A) of the actions of a sample.
        names: Of the A numbers, in the log.
        frames: Training frames, which make an epoch.
        decay_after: Updates after which the learning rate is a tenth; None: the schedule of the arguments.
        done: Steps that a resumed run has made before; where they are all, `train` makes none.
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
        scales: dict[str, torch.Tensor],
        shape: tuple[int, int],
        names: Sequence[str],
        frames: int,
        decay_after: int | None,
        done: int,
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
        self.statistics, self.frames, self.done, self.card = statistics, frames, done, card
        self.batches = TrainingBatches(collator, scales)
        self._last_batch: dict[str, Any] = {}
        self.decay_after = decay_after
        self.head, self.shape, self.names = collator.head, shape, names
        self.train_metrics, self.eval_metrics = ActionMetrics(shape[1]), ActionMetrics(shape[1])
        self.last_metrics: dict[str, float] = {}
        # Accumulated batches are averaged by the Trainer, not by the model; what each counts, see `compute_loss`.
        self.model_accepts_loss_kwargs = False
        # Once: transformers 5.4 has accelerate do it a second time, and clips gradients that are N times too small.
        self.accelerator.gradient_accumulation_steps = 1
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressBar())
        if self.pop_callback(TensorBoardCallback) is not None:
            self.add_callback(Curves())
        self.add_callback(Intervals())
        # The launcher may have chosen bf16 as well: the accelerator knows, the arguments do not. accelerate would
        # average gradients in bfloat16 too.
        if self.is_fsdp_enabled and self.accelerator.mixed_precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy

    # Data -------------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Not handed to accelerate: the stream knows its rank and where a resumed run continues."""
        left = (self.args.max_steps - self.done) * self.args.gradient_accumulation_steps
        return DataLoader(
            self.train_dataset,
            batch_sampler=Batches(self.stream, self.args.per_device_train_batch_size, left),
            collate_fn=self.batches,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=not self.args.use_cpu,
            generator=torch.Generator().manual_seed(0),  # its draws would move the global one, which dropout uses
        )

    def _held_out_batches(self):
        """Of this rank; every rank has as many, because sharded models compute together: where the frames do not share
        out evenly, the last batch of some ranks is one that others count."""
        rank, ranks, size = self.args.process_index, self.args.world_size, self.args.per_device_eval_batch_size
        mine, each = self.held_out[rank::ranks], len(self.held_out) // ranks
        for start in range(0, each, size):
            yield self.batches([self.eval_samples[start, frame] for frame in mine[start : min(start + size, each)]])
        if len(self.held_out) % ranks:
            last = (mine[each:] or self.held_out)[0]
            yield {**self.batches([self.eval_samples[each, last]]), "counts": len(mine) > each}

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.decay_after is None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup_steps = self.args.get_warmup_steps(num_training_steps)
        self.lr_scheduler: Any = step_decay(optimizer or self.optimizer, warmup_steps, self.decay_after)
        return self.lr_scheduler

    # Loss and metrics -------------------------------------------------------------------------------------------------

    def training_step(self, *args, **kwargs):
        with attention_kernel(self.args):  # also in the backward pass, where activations are computed again
            return super().training_step(*args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        """The batches of an update, and of how many terms the loss of one is the mean on average, on all ranks."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if self.shape[0] == 1 or not batches:  # only steps of chunks are left out
            return batches, None
        drawn = [self.head.draw(batch) for batch in batches]
        batches = [{**batch, "num_learned": self.head.num_learned(batch)} for batch in drawn]
        terms = torch.tensor([batch["num_learned"] for batch in batches], device=self.args.device)
        # Of an update of few samples all that is recorded may be decided already: nothing is learned, 0 of 0 terms.
        return batches, self.accelerator.gather(terms).float().mean().clamp(min=1e-6)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """That of a batch, which counts by what is learned of it: the average over the batches of an update is then the
        loss of one large batch, however it is shared out.

        Args:
            num_items_in_batch: Of `get_batch_samples`.
        """
        inputs = dict(inputs)
        scale, terms, counts = inputs.pop("action_scale"), inputs.pop("num_learned"), inputs.pop("counts", True)
        with attention_kernel(self.args):
            loss, answer = self.head.loss(model, inputs)
        if model.training:
            self._last_batch = inputs
        metrics = self.train_metrics if model.training else self.eval_metrics
        with torch.no_grad():
            compared = self.head.compare(**answer, shape=self.shape)
            metrics.update(loss, compared, scale, inputs.get("action_is_pad"), terms, counts)
        if num_items_in_batch is not None:
            loss = loss * (terms / num_items_in_batch)
        return (loss, answer) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Loss, accuracy and L1 of the held-out frames, under `eval_...` in the log."""
        model = self.model_wrapped
        model.eval()
        for batch in self._held_out_batches():
            with torch.no_grad(), self.compute_loss_context_manager():
                self.compute_loss(model, self._prepare_inputs(batch))
        model.train()
        computed = self.eval_metrics.compute(self.names)
        if not math.isfinite(loss := computed.get("loss", 0.0)):
            raise self._diverged(f"the loss on held-out frames is {loss}")
        found = {f"{metric_key_prefix}_{name}": value for name, value in computed.items()}
        self.log(found)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        samples = self.state.global_step * self.args.train_batch_size * self.args.world_size
        self.state.epoch = round(samples * self.args.gradient_accumulation_steps / self.frames, 4)
        if "loss" in logs and "eval_loss" not in logs:
            # The Trainer's own loss stays: it is that of all ranks as well.
            self.last_metrics = self.train_metrics.compute(self.names)
            logs = {**self.last_metrics, **logs}
        super().log(logs, *args, **kwargs)

    def train(self, *args, **kwargs):
        verbosity = logging.get_verbosity()
        if self.done == self.args.max_steps:
            logging.set_verbosity_error()  # the library warns of a run without a step
        try:
            return super().train(*args, **kwargs)
        finally:
            logging.set_verbosity(verbosity)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressBar) and callback.training_bar is not None:
                    callback.training_bar.close()  # an error gets a line of its own

    # Divergence -------------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        """After every step. One wait for the device, in place of the library's two for each batch, with which
        `logging_nan_inf_filter` leaves out losses that are not finite."""
        loss, norm = float(tr_loss), 0.0 if grad_norm is None else float(grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._diverged(f"the loss is {loss}, the norm of the gradient {norm}")
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _check_weights(self) -> None:
        """Before they are saved: what learns and the states of the optimizer are finite, and so is the loss that the
        weights give the last batch; the step after would find that out too late."""
        model = self.model_wrapped
        learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*learns, *(value for value in states if isinstance(value, torch.Tensor) and value.ndim > 0)]
        local = [value.to_local() if isinstance(value, DTensor) else value for value in tensors]
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager(), attention_kernel(self.args):
            loss, _ = self.head.loss(model, self._last_batch)
            good = torch.stack([*map(all_finite, local), torch.isfinite(loss)]).all()
        model.train()
        if not self.accelerator.gather(good.int().reshape(1)).all():
            raise self._diverged("after its update the weights or the loss that they give are not finite")

    def _diverged(self, what: str) -> DivergedError:
        step, last = self.state.global_step, last_checkpoint(Path(self.args.output_dir))
        if step == 0:
            return DivergedError(f"Before the first step {what}: the weights of the model or the data are not finite.")
        kept = (
            f"The last good checkpoint is '{last}' (--model takes it)" if last else "There is no checkpoint before it"
        )
        clip = self.args.max_grad_norm
        norm = f"a smaller max_grad_norm ({clip:g})" if clip else "max_grad_norm=1 (0: gradients are not clipped)"
        return DivergedError(
            f"The run diverged at step {step}: {what}. {kept}. In another output folder try a lower learning_rate "
            f"({self.args.learning_rate:g}), {norm} or warmup_steps, and look for outliers in the data, of which "
            "--dry-run warns."
        )

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
                resumable=True,
            )

    def save_result(self, folder: Path, dtype: torch.dtype | None) -> None:
        """The trained model in `folder`, gathered from all ranks; weights of a complete model in `dtype` unless None.
        It is written beside its place and moved there when it is complete."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        state = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if not self.args.should_save:
            return
        if hasattr(model, "peft_config"):
            dtype = None  # adapters are small, and stay exact
        if dtype is not None:
            state = {name: value.to("cpu", dtype) for name, value in (state or model.state_dict()).items()}
            large = [name for name, value in state.items() if not all_finite(value)]
            if large:
                raise self._diverged(f"{len(large)} weights are too large for {dtype}, first of them {large[0]}")
        with self._explained("The result"), working_folder(folder / UNFINISHED) as work:
            write_checkpoint(model, work, self.collator.processor, self.statistics, self.card, state, dtype)
            share_weights(work)
            move_into(work, folder)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Where it cannot be written, the error says how to continue."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk speaks through all three
            last = last_checkpoint(Path(self.args.output_dir))
            cause = "make room"
            if self.accelerator.num_processes > 1 and isinstance(error, RuntimeError):
                cause = "see whether another process has ended (its own error is above), or make room"
            remedy = (
                f"The last good one is '{last}': {cause}, then continue with --resume." if last else "There is none."
            )
            raise OSError(f"{what} could not be written: {error}. {remedy}") from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """What a checkpoint lacks would go on from where the run began; the library only warns of it."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        lacking = set(load_result.missing_keys)
        loaded = {id(parameter) for name, parameter in parameters.items() if name not in lacking}
        lacking = {name for name in lacking if id(parameters.get(name)) not in loaded}  # one with the embeddings
        strange = load_result.unexpected_keys
        if lacking or strange:
            missing, others = (", ".join(sorted(names)[:3]) or "none" for names in (lacking, strange))
            raise ValueError(
                f"'{last_checkpoint(Path(self.args.output_dir))}' has other weights than the model: missing {missing}, "
                f"not of the model {others}. Was it saved by another version? Remove it, and --resume goes on from the "
                "one before it."
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """They hold an array of numpy, a part of which has another name from numpy 2 on: runs continue across that."""
        rebuild: Any = np.empty(0).__reduce__()[0]
        names = [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")]
        with torch.serialization.safe_globals([(rebuild, name) for name in names]):
            super()._load_rng_state(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / UNFINISHED / WORK)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint is written under another name and renamed when it is complete; only then older ones go."""
        self._check_weights()
        folder = Path(self.args.output_dir)
        finished = folder / f"checkpoint-{self.state.global_step}"
        own = working_folder(folder / UNFINISHED) if self.args.should_save else nullcontext()
        with self._explained(f"The checkpoint of step {self.state.global_step}"), own:
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                shutil.rmtree(finished, ignore_errors=True)  # of a run that was stopped and repeats this step
                complete = Path(self._get_output_dir(trial)) / finished.name
                shutil.copyfile(folder.parent / STARTED, complete / STARTED)  # which run it is of
                share_weights(complete.parent)
                os.replace(complete, finished)
                for old in checkpoints(folder)[: -self.args.save_total_limit]:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
