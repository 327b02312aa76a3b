"""What is measured: a model, and the requests that it answers."""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..action_heads_openvla import head_without_weights
from ..action_tokenizer import resolve_unnorm_key
from ..data.filters import keep_labeled
from ..data.samples import model_cameras
from ..data.sources import open_sources
from ..device import torch_device
from ..hub import model_folder
from ..image_processing_openvla import OpenVLAImageProcessor
from ..modeling_openvla import OpenVLAForActionPrediction
from ..options.benchmark import BenchOptions
from ..policy import QUANTIZATIONS, load_model
from ..presets import ROOT, load_preset_config, load_preset_statistics
from ..quantization_openvla import NEVER_QUANTIZED, NOT_QUANTIZED, OpenVLAQuantizationConfig, quantize_linears


KEY = "bridge_orig"  # units of a preset
INSTRUCTIONS = ("pick up the coffee mug", "open the top drawer", "put the spoon on the towel", "close the microwave")
PROMPT_TOKENS = 20  # of a preset, which has no tokenizer
MOST_BYTES = 2**33  # of the random images of a measurement, which are made before it and kept


@dataclass(frozen=True)
class Frame:
    """One request. `begins`: an episode does, so that nothing before it is a draft."""

    images: dict[str, np.ndarray]  # camera -> (H, W, 3) uint8
    instruction: str
    state: np.ndarray | None  # (S,) of a model that sees it
    begins: bool


def numbers(name: str, text: str) -> list[int]:
    """Whole numbers with commas between them; a `ValueError` for anything else."""
    found = [int(number) if number.strip().isdecimal() else 0 for number in text.split(",")]
    if not all(found):
        raise ValueError(f"{name}='{text}': expected whole numbers of at least 1 with commas between them.")
    return found


def open_subject(options: BenchOptions) -> tuple[Any, str]:
    """The model, ready to predict, and the dataset in whose units."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch_device(options.device)
    if options.preset is not None:
        dtype = torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype)
        model = random_model(options.preset, device, dtype, **options.preset_fields)
        if options.quantization is not None:
            if "bits" not in QUANTIZATIONS[options.quantization]:
                raise ValueError(f"quantization='{options.quantization}': of a preset int8, int4 or fp8.")
            kept = list(NEVER_QUANTIZED if options.towers else NOT_QUANTIZED)
            quantize_linears(model, OpenVLAQuantizationConfig(QUANTIZATIONS[options.quantization]["bits"], kept))
    else:
        variant = {"action_head": options.action_head, "action_chunk": options.action_chunk}
        model = load_model(
            str(model_folder(options.model)),
            device=device, dtype=options.dtype, quantization=options.quantization,
            **{name: value for name, value in variant.items() if value is not None},
        )  # fmt: skip
    return model, resolve_unnorm_key(model.norm_stats, options.unnorm_key)


def random_model(preset: str, device: str, dtype: torch.dtype, **fields: Any) -> OpenVLAForActionPrediction:
    """A published configuration, with `fields` changed, and random weights, made on the device itself."""
    config = load_preset_config(preset)
    for name, value in {"action_dim": 7, **fields}.items():
        if not hasattr(config, name):
            raise ValueError(f"--field {name}: the configuration has no such field.")
        setattr(config, name, _value(value) if isinstance(value, str) else value)
    config.check_fields()
    head_without_weights(config)  # one that is unknown is refused before 7B parameters are made
    config.norm_stats = {KEY: load_preset_statistics("openvla-7b")[KEY]}
    if config.proprio_dim:
        config.norm_stats[KEY]["proprio"] = {"q01": [-1.0] * config.proprio_dim, "q99": [1.0] * config.proprio_dim}
    config.empty_token_id = 29871
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return OpenVLAForActionPrediction(config).eval()
    finally:
        torch.set_default_dtype(before)


def _value(text: str) -> Any:
    """A number, true, false, null or a list as JSON writes them; any other text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


class PresetInputs:
    """In place of a processor: pixels are made as ever, words are random tokens."""

    def __init__(self, preset: str, model: Any):
        self.image_processor = OpenVLAImageProcessor.from_pretrained(ROOT / preset)
        self.model = model

    def __call__(self, frames: list[Frame]) -> dict[str, torch.Tensor]:
        config, cameras = self.model.config, self.model.camera_names
        images = [frame.images[camera] for frame in frames for camera in cameras]
        pixels = self.image_processor(images, return_tensors="pt")["pixel_values"]
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(3, 30000, (len(frames), PROMPT_TOKENS), generator=generator)
        input_ids[:, 0] = config.text_config.bos_token_id
        pixels = pixels.unflatten(0, (len(frames), len(cameras))).flatten(1, 2)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixels}


def frames_of(options: BenchOptions, model: Any, key: str, count: int) -> list[Frame]:
    """Frames of demonstrations, or random images, no two of them equal.

    Raises:
        ValueError: If the dataset holds no frame.
    """
    state = None if model.config.proprio_dim is None else np.zeros(model.config.proprio_dim)  # costs what others cost
    if options.dataset is not None:
        found = list(islice(_recorded(options, model, key, state), count))
        if not found:
            raise ValueError(f"'{options.dataset}' holds no frame.")
        if any(frame.state is state is not None for frame in found):
            warnings.warn(
                f"The model sees {model.config.proprio_dim} numbers of a state, and frames of '{options.dataset}' have "
                "none of as many: it is shown zeros, and its actions are those.",
                stacklevel=2,
            )
        return found
    generator, (height, width) = np.random.default_rng(0), _size(options.size)
    if (needed := count * len(model.camera_names) * height * width * 3) > MOST_BYTES:
        raise ValueError(
            f"size='{options.size}': {count} random images take {needed / 2**30:.3g} GiB, at most "
            f"{MOST_BYTES / 2**30:g} are kept: give smaller or fewer ones."
        )
    frames = []
    for number in range(count):
        images = {
            camera: generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for camera in model.camera_names
        }
        frames.append(Frame(images, INSTRUCTIONS[number % len(INSTRUCTIONS)], state, begins=True))
    return frames


def prepare(options: BenchOptions, model: Any, key: str, frames: list[Frame], sizes: Sequence[int] = (1,)) -> dict:
    """Get a model ready for so many frames at once, and what a report says of its graphs; {} on a CPU."""
    longest = PROMPT_TOKENS
    if not options.preset:
        processor = model.processor
        prompts = [processor.format_prompt(frame.instruction) for frame in frames]
        longest = max(len(processor.tokenizer(prompt)["input_ids"]) for prompt in prompts)
    done = model.prepare_for_inference(sizes, (longest + 1,), unnorm_key=key, compile=options.compile)
    if model.device.type != "cuda":
        return {}
    return {
        "graphs": done.graphs,
        "compiled": done.compiled,
        "not_prepared": done.reason,
        "prepared_seconds": done.seconds,
    }


def _size(text: str) -> list[int]:
    found = numbers("size", text)
    if len(found) != 2:
        raise ValueError(f"size='{text}': expected height and width, such as 1080,1920.")
    return found


def _recorded(options: BenchOptions, model: Any, key: str, state: np.ndarray | None) -> Iterator[Frame]:
    """Frames in their order, episode by episode."""
    statistics = {"action": model.norm_stats[key]["action"]}
    names = model.camera_names
    (source,) = open_sources(str(options.dataset), split=options.split, statistics=statistics, camera_names=names)
    for episode in source.dataset:
        cameras, begins = model_cameras(episode, source.camera_names, source.camera), True
        for step in np.flatnonzero(keep_labeled(episode)):
            frame = episode[step : step + 1]
            images = {name: frame.images[camera][0] for name, camera in zip(names, cameras, strict=True)}
            recorded = state is not None and frame.state is not None and frame.state[0].shape == state.shape
            seen = frame.state[0] if recorded and frame.state is not None else state
            yield Frame(images, frame.instruction, seen, begins)
            begins = False
