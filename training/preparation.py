"""From options to what is known of a run before any weights are read: `prepare` names the steps."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..action_heads_openvla import HEADS
from ..action_tokenizer import check_same_action_dim
from ..choices_openvla import check_choice
from ..configuration_openvla import HEADS_WITH_WEIGHTS, OpenVLAConfig
from ..data.augment import ImageAugmentation
from ..data.collate import ActionCollator
from ..data.sources import Source, open_sources, source_options
from ..extras import require
from ..hub import config_of
from ..options.training import FinetuneOptions
from ..processing_openvla import OpenVLAProcessor
from .checkpoints import starting_point, starting_processor
from .checks import check_chunk, check_head, check_relearned
from .prepared_run import Run


KINDS = 20  # sets of cameras of one dataset that are looked at, an episode each


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
    before = config_of(options.model)
    config = config_as_asked(before, options)
    processor = training_processor(base, adapter, config, options)
    sources = open_data(options, config, data)
    check_chunk(config.action_chunk, sources)
    relearned = check_relearned(before, config, sources)
    fit_to_data(config, options, sources)
    check_head(before, config)
    run = Run(options, sources, config, processor, processes, relearned)
    check_same_action_dim(run.statistics, list(run.statistics))
    run.mixed_views = [warning for source in sources for warning in check_samples(source)]
    for source in sources:
        check_instructions(source, run)
    return run


def config_as_asked(before: OpenVLAConfig, options: FinetuneOptions) -> OpenVLAConfig:
    """The configuration of the model with what the options change; what the data decides comes in `fit_to_data`.

    Raises:
        ValueError: If options do not fit together, or the model.
    """
    config = copy.deepcopy(before)
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
    return config


def training_processor(
    base: str, adapter: Path | None, config: OpenVLAConfig, options: FinetuneOptions
) -> OpenVLAProcessor:
    """That of the model, with the pixels of the original's training; who trained with random crops is shown the center
    (docs/training.md)."""
    processor = starting_processor(base, adapter)
    processor.camera_names = list(config.camera_names)
    crop = ImageAugmentation.crop_area if options.image_aug else None
    # The JPEG round trip of OpenVLA-OFT is one of its evaluation: demonstrations were through it when recorded.
    return processor.with_pixels("lanczos3", crop, processor.image_processor.jpeg_quality)


def open_data(options: FinetuneOptions, config: OpenVLAConfig, data: Any) -> list[Source]:
    """The datasets, as the model is to see them."""
    return open_sources(
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


def fit_to_data(config: OpenVLAConfig, options: FinetuneOptions, sources: Sequence[Source]) -> None:
    """Let the configuration say what the data decides: units, and how many numbers states and actions have."""
    modes = {source.name: source.normalization for source in sources}  # not those of the model: it keeps no statistics
    config.normalization = {name: mode for name, mode in modes.items() if mode != "bounds_q99"}
    if options.proprio or config.proprio_dim is not None:
        config.proprio_dim = proprio_dim(options, sources, config)
    if config.action_head in HEADS_WITH_WEIGHTS:
        config.action_dim = sources[0].action_dim


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
        ValueError: If an episode has no image of the camera, or one that cannot be decoded, or a video is missing; or
            if the filters leave frames of episodes that are held out alone, which a mixture may find out hours later.
    """
    seen: dict[tuple[str, ...], str] = {}
    if not any(True for episode in source.dataset for _ in source.frames(episode)):
        raise ValueError(
            f"{source.name}: nothing is left of the {len(source.dataset)} episodes to train on, only of those held "
            f"out. Relax a filter, or train on all with held_out=0 (--held-out 0). {source.report()}"
        )
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
            f"shorten '{longest[:60]}...', or give a smaller action_chunk (--chunk), of which "
            f"{run.head.num_tokens(run.shape)} are."
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
