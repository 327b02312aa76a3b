"""What is known of a run before any weights are read: its data, its length, what it will learn, what it will take."""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..action_heads_openvla import HEADS, TokenHead, head_without_weights
from ..action_spec import action_names
from ..action_tokenizer import ActionTokenizer, check_same_action_dim
from ..cameras_openvla import view_of
from ..choices_openvla import check_choice
from ..configuration_openvla import HEADS_WITH_WEIGHTS, OpenVLAConfig
from ..data import Episode
from ..data.augment import ImageAugmentation
from ..data.collate import ActionCollator
from ..data.mixture import mixture_probabilities
from ..data.samples import model_cameras
from ..data.source import statistics_with_spec
from ..data.sources import Source, open_sources, source_options
from ..device import emulated
from ..extras import require
from ..hub import config_of
from ..options.training import FinetuneOptions
from ..processing_openvla import OpenVLAProcessor
from .checkpoints import starting_point, starting_processor
from .checks import (
    check_cameras,
    check_chunk,
    check_data,
    check_head,
    check_held_out,
    check_images,
    check_meaning,
    check_rates,
    check_relearned,
    check_same_statistics,
    check_shared,
    check_units_of_one_robot,
)


# Learning rates of the paper: adapters, and everything else.
LEARNING_RATES = {"lora": 5e-4, "qlora": 5e-4}
FULL_LEARNING_RATE = 2e-5
KINDS = 20  # sets of cameras of one dataset that are looked at, an episode each


def learning_rate(options: FinetuneOptions) -> float:
    """The one asked for, or that of the paper for the strategy."""
    if options.learning_rate is not None:
        return options.learning_rate
    return LEARNING_RATES.get(options.strategy, FULL_LEARNING_RATE)


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


def prepare(options: FinetuneOptions, processes: int = 1, data: Any = None) -> Run:
    """Open the data, compute or look up its statistics, read configuration and processor.

    Args:
        data: Demonstrations as a Python object (see `data.PythonDataset`); `options.dataset` is then only a name, of
            an object that has none.

    Raises:
        ValueError: If there is nothing to train on, the datasets do not fit together, one of a few episodes of each
            dataset has no image that can be decoded, or a prompt exceeds the model's context.
        FileNotFoundError: If the model or a dataset is not there.
    """
    base, adapter = starting_point(options.model)
    config = config_of(options.model)
    before = copy.deepcopy(config)
    if options.action_chunk is not None:
        config.action_chunk = options.action_chunk
    if options.camera_names is not None:
        config.camera_names = [name.strip() for name in options.camera_names.split(",")]
    config.constant_state = "zero"  # as `Source.frames` normalizes states, also where the model had OpenVLA-OFT's
    config.prefix_training = options.prefix_training or 0
    config.use_film |= options.film
    if options.head is not None:
        check_choice(
            "head",
            options.head,
            HEADS,
            "One of your own: import what puts it into HEADS first (openvla --import MODULE).",
        )
        config.action_head = options.head
        if options.head in HEADS_WITH_WEIGHTS and config.action_dim is None:
            config.action_dim = 1  # until the data says
    if options.prefix_training and not getattr(HEADS.get(config.action_head), "parallel", False):
        raise ValueError(
            f"prefix_training={options.prefix_training}: action_head='{config.action_head}' continues what it is given "
            "without that, leave it out."
        )
    check_head(before, config)
    if options.film and config.action_head == "tokens":
        raise ValueError("film=True: for heads that predict in one pass, and the head is 'tokens': give head as well.")
    config.check_fields()
    processor = starting_processor(base, adapter)
    processor.camera_names = list(config.camera_names)
    # The pixels of the original's training; who trained with random crops is shown the center (docs/training.md).
    # The JPEG round trip of OpenVLA-OFT is one of its evaluation: demonstrations were through it when recorded.
    crop, quality = ImageAugmentation.crop_area if options.image_aug else None, processor.image_processor.jpeg_quality
    processor = processor.with_pixels("lanczos3", crop, quality)
    sources = open_sources(
        options.dataset if data is None else data,
        data_root=options.data_root,
        progress=True,
        **{
            # A list has no name of its own.
            **({} if data is None or getattr(data, "name", None) else {"name": options.dataset}),
            **source_options(options),
            "action_chunk": config.action_chunk,
            "camera_names": config.camera_names,
            "sees_state": options.proprio or config.proprio_dim is not None,
            "chunk_end": options.chunk_end,
            "normalization": options.normalization or config.normalization,
        },
    )
    check_chunk(config.action_chunk, sources)
    relearned = check_relearned(before, config, sources)
    modes = {source.name: source.normalization for source in sources}  # not those of the model: it keeps no statistics
    config.normalization = {name: mode for name, mode in modes.items() if mode != "bounds_q99"}
    if options.proprio or config.proprio_dim is not None:
        config.proprio_dim = proprio_dim(options, sources, config)
    if config.action_head in HEADS_WITH_WEIGHTS:
        config.action_dim = sources[0].action_dim
        check_head(before, config)
    run = Run(options, sources, config, processor, processes, relearned)
    check_same_action_dim(run.statistics, list(run.statistics))
    run.mixed_views = [warning for source in sources for warning in check_samples(source)]
    for source in sources:
        check_instructions(source, run)
    return run


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


def proprio_dim(options: FinetuneOptions, sources: Sequence[Source], config: OpenVLAConfig) -> int:
    """Numbers of the state that the model will see.

    Raises:
        ValueError: If a dataset has no states, or others than the model sees.
    """
    dims = {source.name: source.state_dim for source in sources}
    expected = config.proprio_dim or next(iter(dims.values()))
    for name, dim in dims.items():
        if not dim or dim != expected:
            found = f"states of {dim} numbers" if dim else "no states (--state-key names them), or not in every episode"
            source = next(source for source in sources if source.name == name)
            first = next(iter(source.dataset), None)
            if not dim and options.statistics is not None:
                found += ", or the statistics given have none of them"
            elif not dim and first is not None and first.state is not None and not first.state.any():
                found = "states that are 0 in every step, from which nothing can be learned (--state-key names others)"
            way_out = "" if not dim else " (--state-key says which of them), or begin with a model without a state"
            raise ValueError(
                f"The model is to see the state, and '{name}' has {found}; expected {expected or 'some'}{way_out}."
            )
    return expected


def check_samples(source: Source, episodes: int = 8) -> list[str]:
    """Decode the first two images, one of the middle and the last of a few episodes of both splits, spread evenly, so
    that a run does not stop for them later; also of an episode with each set of cameras that there is, as one in many
    may be seen through another.

    Returns:
        A warning where a view is another camera in some of them than in others, by its name.

    Raises:
        ValueError: If an episode has no image of the camera, or one that cannot be decoded, or a film is missing.
    """
    seen: dict[tuple[str, ...], str] = {}
    for dataset in filter(None, (source.dataset, source.held_out)):
        dataset.check_files()
        kinds: dict[tuple[str, ...] | None, int] = {}
        for index in range(len(dataset)):
            kinds.setdefault(dataset.kind_of(index), index)
        spread = np.linspace(0, len(dataset) - 1, episodes).astype(int)
        picked = np.unique([*spread, *list(kinds.values())[:KINDS]])
        for episode in dataset.read(picked):
            frames = list(source.frames(episode))
            for step in sorted({*range(len(frames))} & {0, 1, len(frames) // 2, len(frames) - 1}):
                seen.setdefault(tuple(frames[step].images), episode.origin or repr(episode))
                for images in frames[step].images.values():
                    images[0]
    shown = [f"{', '.join(cameras)} ({origin})" for cameras, origin in list(seen.items())[:3]]
    return [
        f"{source.name}: what the model sees as {', '.join(source.camera_names)} has other names in some episodes: "
        f"{'; '.join(shown)}. Is it the same view? Else name one (--camera), and leave out episodes without it."
    ] * (len(seen) > 1)


def check_instructions(source: Source, run: Run) -> None:
    """Raise a `ValueError` for an instruction that makes no prompt, or one that does not fit into the model's context
    with image and answer."""
    texts, config, processor = source.survey.instructions, run.config, run.processor
    for text in texts:
        try:
            processor.format_prompt(text)
        except ValueError as error:
            raise ValueError(f"{source.name}: the instruction {text!r:.60} makes no prompt: {error}") from error
    limit = getattr(config.text_config, "max_position_embeddings", None)
    if not texts or limit is None:
        return
    longest = max(texts, key=lambda text: len(text.encode()))
    tokens = len(ActionCollator(processor, run.head).tokens(longest, np.zeros(run.shape))[0]) + num_patches(config)
    if tokens > limit:
        raise ValueError(
            f"{source.name}: its longest instruction makes a sequence of {tokens} tokens, and the model reads {limit}: "
            f"shorten '{longest[:60]}...'."
        )


def num_patches(config: OpenVLAConfig) -> int:
    """As `num_patches` of a model (image patches, and the state where it is seen), from the name of its first tower
    (`..._patch14_...`); 0 where it does not say."""
    given = (config.timm_model_kwargs or [{}])[0].get("patch_size")
    named = re.search(r"_patch(\d+)", config.timm_model_ids[0])
    size = given or (int(named[1]) if named else 0)
    state = config.proprio_dim is not None
    return len(config.camera_names) * (config.image_sizes[0] // size) ** 2 + state if size else 0


def check_libraries(options: FinetuneOptions) -> None:
    """Raise a `ModuleNotFoundError` that names what the strategy needs and is not installed."""
    needed = {"lora": ["peft"], "qlora": ["peft", "bitsandbytes"]}.get(options.strategy, [])
    require("accelerate", *needed, purpose=f"strategy '{options.strategy}'", preferred="train")


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


def computing_precision(options: FinetuneOptions) -> str:
    """`"bf16"` (autocast) or `"float32"`: what is asked for, or else what this machine can do."""
    if options.precision != "auto":
        return options.precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
