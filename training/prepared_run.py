"""What is known of a run before any weights are read: its data, its length, what it will learn, what may be lost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..action_heads_openvla import TokenHead, head_without_weights
from ..action_spec import action_names
from ..action_tokenizer import ActionTokenizer
from ..cameras_openvla import view_of
from ..configuration_openvla import OpenVLAConfig
from ..data import Episode
from ..data.mixture import mixture_probabilities
from ..data.samples import model_cameras
from ..data.source import statistics_with_spec
from ..data.sources import Source
from ..device import emulated
from ..options.training import FinetuneOptions
from ..processing_openvla import OpenVLAProcessor
from .checks import (
    check_cameras,
    check_data,
    check_held_out,
    check_images,
    check_meaning,
    check_rates,
    check_same_statistics,
    check_shared,
    check_units_of_one_robot,
)


# Learning rates of the paper: adapters, and everything else.
LEARNING_RATES = {"lora": 5e-4, "qlora": 5e-4}
FULL_LEARNING_RATE = 2e-5


def learning_rate(options: FinetuneOptions) -> float:
    """The one asked for, or that of the paper for the strategy."""
    if options.learning_rate is not None:
        return options.learning_rate
    return LEARNING_RATES.get(options.strategy, FULL_LEARNING_RATE)


def computing_precision(options: FinetuneOptions) -> str:
    """`"bf16"` (autocast) or `"float32"`: what is asked for, or else what this machine can do."""
    if options.precision != "auto":
        return options.precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


@dataclass
class Run:
    """Data and configuration of a run: what is known before any weights are read."""

    options: FinetuneOptions
    sources: list[Source]
    config: OpenVLAConfig
    processor: OpenVLAProcessor
    processes: int = 1
    relearned: Sequence[str] = ()  # what the model predicted otherwise
    mixed_views: Sequence[str] = ()  # where one view is several cameras

    @property
    def statistics(self) -> dict[str, Any]:
        return {source.name: statistics_with_spec(source) for source in self.sources}

    @cached_property
    def mixture(self) -> tuple[np.ndarray, int]:
        """How likely each dataset is drawn, and the frames of an epoch."""
        sizes = [source.num_transitions for source in self.sources]
        return mixture_probabilities([source.weight for source in self.sources], sizes)

    @cached_property
    def head(self) -> TokenHead:
        """How actions come out of the model."""
        head = head_without_weights(self.config, ActionTokenizer(self.processor.tokenizer, self.config.n_action_bins))
        if head.parallel:
            head.action_dim, head.prefix_training = self.shape[1], self.config.prefix_training
        return head

    @property
    def shape(self) -> tuple[int, int]:
        """(K, A) of the actions of a sample."""
        return self.config.action_chunk, self.sources[0].action_dim

    @property
    def action_names(self) -> list[str]:
        """Of the numbers of an action, for logs: as recorded, where all datasets agree; a pose, in changes or not, has
        the usual names."""
        usual, recorded = action_names(self.shape[1]), {tuple(source.names) for source in self.sources}
        names = list(recorded.pop()) if len(recorded) == 1 else usual
        return usual if [name.removeprefix("d") for name in names] == usual else names

    @property
    def global_batch(self) -> int:
        return self.options.batch_size * self.options.gradient_accumulation * self.processes

    @cached_property
    def warnings(self) -> list[str]:
        """Where quality may be lost."""
        found = [
            *self.relearned,
            *self.mixed_views,
            *(warning for source in self.sources for warning in check_data(source)),
        ]
        for source in self.sources:
            names = self.config.camera_names
            found += check_cameras(source.name, scene_camera(source, names), names, source.camera is not None)
            found += check_held_out(source)
            before = (self.config.norm_stats or {}).get(source.name)
            if before:
                found += check_same_statistics(source.name, before["action"], source.statistics["action"], source.names)
        found += check_meaning(self.sources) + check_rates(self.sources) + check_shared(self.sources)
        found += check_units_of_one_robot(self.sources, self.config.proprio_dim is not None)
        if not torch.cuda.is_available() and (reason := emulated("cpu", torch.bfloat16)):
            found += [f"--precision bf16: {reason}."] if computing_precision(self.options) == "bf16" else []
            found += [f"--optimizer muon: {reason}, as it does."] if self.options.optimizer == "muon" else []
        if self.options.strategy == "qlora":
            found.append(
                "--strategy qlora: the log is of the base in 4 bits, on which the adapter learns; loaded or merged it "
                "acts on the base as stored, and its actions are others. Measure these (openvla evaluate), or let it "
                "act on 4 bits as well (--quantization bnb-nf4)."
            )
        if learning_rate(self.options) == 0:
            found.append(
                "--learning-rate 0: nothing is learned, and the result acts as the model that it began with, in the "
                "units of this data."
            )
        if (warmup := self.options.warmup_steps) >= self.options.steps:
            found.append(
                f"--warmup-steps {warmup} of --steps {self.options.steps}: the learning rate rises in all of "
                f"them and does not come to {learning_rate(self.options):g}."
            )
        return found + check_images(self.processor, self.config) + check_dtype(self.options)

    def describe(self) -> str:
        """What is trained on, in a few lines."""
        options, (probabilities, epoch) = self.options, self.mixture
        lines = []
        for source, share in zip(self.sources, probabilities):
            report = source.report().replace("\n", f"\n{' ' * 10}")
            lines.append(f"data      {report}; drawn {share:.1%}" if len(self.sources) > 1 else f"data      {report}")
            lines.append(f"actions   {source.meaning}")
        seen = options.steps * self.global_batch
        lines += [
            f"predicts  {self.describe_model()}",
            f"samples   {options.steps} steps x {self.global_batch} ({options.batch_size} per device, "
            f"{options.gradient_accumulation} accumulated, {self.processes} processes) = {seen}, "
            f"{seen / epoch:.2f} epochs",
            f"learning  {options.strategy}, {options.optimizer} {learning_rate(options):g} {self.describe_schedule()}, "
            f"warmup {options.warmup_steps}, weight decay {options.weight_decay:g}, "
            f"{f'clipped at {options.max_grad_norm:g}' if options.max_grad_norm else 'not clipped'}, "
            f"image augmentation {'on' if options.image_aug else 'off'}",
        ]
        return "\n".join(lines + [f"warning   {warning}" for warning in self.warnings])

    def describe_model(self) -> str:
        config, chunk = self.config, self.config.action_chunk
        ends = ", ".join(sorted({source.chunk_end for source in self.sources}))
        steps = f"chunks of {chunk} (past the end of an episode: {ends})" if chunk > 1 else "single actions"
        state = "" if config.proprio_dim is None else f", a state of {config.proprio_dim}"
        film = ", FiLM" if config.use_film else ""
        return f"{steps} with {config.action_head} from {', '.join(config.camera_names)}{state}{film}"

    def describe_schedule(self) -> str:
        after, steps = self.options.decay_after, self.options.steps
        if after is None:
            return str(self.options.schedule)
        return f"step (a tenth after {after}{', which is not reached' if after >= steps else ''})"


def check_dtype(options: FinetuneOptions) -> list[str]:
    """Whether weights that learn are kept in a type that loses most updates of theirs (adapters are float32 always)."""
    if options.dtype not in ("bfloat16", "float16") or options.strategy in LEARNING_RATES:
        return []
    rate, smallest = learning_rate(options), torch.finfo(getattr(torch, options.dtype)).eps / 2
    return [
        f"--dtype {options.dtype}: what learns is kept in it, where an update of the learning rate ({rate:g}) is lost "
        f"in weights above {rate / smallest:.1g}, and a smaller one in more of them. Leave --dtype out: then they are "
        "float32, and computed with in bfloat16 all the same (--precision bf16)."
    ]


def scene_camera(source: Source, camera_names: Sequence[str]) -> str | None:
    """The camera of a dataset that a model sees under a name of the scene; None where it has no such name."""
    scene = next((number for number, view in enumerate(camera_names) if view_of(view) == "primary"), None)
    first = next(iter(source.dataset), None)
    if scene is None or first is None:
        return None
    return model_cameras(first, source.camera_names, source.camera)[scene]


def held_out_frames(run: Run) -> list[Episode]:
    """Frames to evaluate on, spread evenly over the held-out episodes and from their beginning to their end, images
    still encoded."""
    picked: list[Episode] = []
    for source, share in zip(run.sources, run.mixture[0]):
        wanted = math.ceil(run.options.eval_samples * share)
        if source.held_out is None or wanted == 0:
            continue
        episodes = np.unique(np.linspace(0, len(source.held_out) - 1, wanted).astype(int))
        each = math.ceil(wanted / len(episodes))
        found: list[Episode] = []
        for number, episode in enumerate(source.held_out.read(episodes)):
            frames = list(source.frames(episode))
            # Where there is one frame of each, they are not all first ones: multiples of the golden ratio fill (0, 1).
            places = (np.arange(each) + (0.5 + 0.618034 * number) % 1) / each
            found += [frames[step] for step in np.unique((places * len(frames)).astype(int)) if frames]
        kept = np.linspace(0, len(found) - 1, min(wanted, len(found))).round().astype(int)
        picked += [found[place] for place in kept]
    return picked
