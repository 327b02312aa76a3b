"""What `predict_action` is given, checked before any compute, and how it chooses a token.

Shapes: `batch` samples, `length` prompt tokens.
"""

import math
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from .choices_openvla import closest


# Inputs ---------------------------------------------------------------------------------------------------------------


# Pixels in [0, 1], normalized by any mean and a standard deviation of at least 0.05, stay within.
LARGEST_PIXEL = 20.0


def as_tensor(name: str, values: Any) -> torch.Tensor:
    """A tensor of a tensor, an array or (nested) lists of numbers; a `ValueError` names `name` for all else."""
    if isinstance(values, torch.Tensor):
        if values.layout != torch.strided or values.is_meta or values.is_quantized:
            raise ValueError(
                f"{name} must be a dense tensor that holds values, got {values.layout} on {values.device}."
            )
        return values
    try:
        if isinstance(values, (list, tuple)) and any(isinstance(row, torch.Tensor) for row in values):
            return torch.stack([as_tensor(name, row) for row in values])
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name} must have rows of one length: pad them, or give a tensor ({error}).") from error
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ValueError(f"{name} must be a tensor, an array or lists of numbers, got {type(values).__name__}.")
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def prompt_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pad_token_id: int | None) -> list[list]:
    """Token ids of each prompt, (batch, length), without its padding.

    Without a mask, `pad_token_id` at the start and the end of a row is padding.

    Raises:
        ValueError: If ids are no integers, the mask is not of zeros and ones, shapes do not fit, or a prompt is empty.
    """
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids must be (batch, length) with at least one prompt and token, got {tuple(input_ids.shape)}."
        )
    if input_ids.dtype == torch.bool or input_ids.is_floating_point() or input_ids.is_complex():
        raise ValueError(f"input_ids must be integers, got {input_ids.dtype}: give what the tokenizer returned.")
    if attention_mask is None:
        prompts = [_without_padding(row, pad_token_id) for row in input_ids.tolist()]
    else:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} does not fit input_ids {tuple(input_ids.shape)}."
            )
        masks = attention_mask.tolist()
        if any(value not in (0, 1) for mask in masks for value in mask):
            raise ValueError("attention_mask must be 1 where there is a token and 0 where there is padding.")
        prompts = [[token for token, real in zip(*row) if real] for row in zip(input_ids.tolist(), masks)]
    if not all(prompts):
        raise ValueError("A prompt of the batch is empty: its attention_mask is all zero, or it is all padding.")
    return prompts


def _without_padding(row: list, pad_token_id: int | None) -> list:
    start, end = 0, len(row)
    while start < end and row[start] == pad_token_id:
        start += 1
    while start < end and row[end - 1] == pad_token_id:
        end -= 1
    return row[start:end]


def largest_pixel(pixel_values: torch.Tensor) -> float:
    """The largest absolute value, 0 without any; a `ValueError` if one is NaN or infinite."""
    if not pixel_values.numel():
        return 0.0
    largest = float(pixel_values.float().abs().amax())  # NaN if one value is
    if not math.isfinite(largest):
        raise ValueError("pixel_values contain NaN or infinite values: the camera frame is broken, do not act on it.")
    return largest


def check_pixel_values(pixel_values: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise a `ValueError` unless they are normalized floats of `shape`."""
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values are {pixel_values.dtype}, expected normalized floats: make them with the processor, or give "
            "the raw image, predict_action(image, instruction)."
        )
    if tuple(pixel_values.shape) != shape:
        raise ValueError(f"pixel_values have shape {tuple(pixel_values.shape)}, expected {shape}.")
    largest = largest_pixel(pixel_values)
    if largest > LARGEST_PIXEL:
        raise ValueError(
            f"pixel_values reach {largest:g}; normalized pixels stay within {LARGEST_PIXEL:g}: make them with the "
            "processor, or give the raw image, predict_action(image, instruction)."
        )


# Options --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: from the `top_k` most probable, of these from the fewest that make up `top_p`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None


# Options of `generate` that change no action here, whatever their value.
WITHOUT_EFFECT = ("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "transformers_version")
# Those that `generate` takes beside the fields of its configuration.
GENERATE_KEYWORDS = (
    "assistant_model", "custom_generate", "logits_processor", "negative_prompt_ids", "prefix_allowed_tokens_fn",
    "stopping_criteria", "streamer", "synced_gpus",
)  # fmt: skip
# Options that ask for nothing at 1; all others do so at 0, False and None.
NEUTRAL_AT_ONE = (
    "encoder_repetition_penalty", "guidance_scale", "length_penalty", "num_beam_groups", "num_beams",
    "num_return_sequences", "repetition_penalty", "typical_p",
)  # fmt: skip
INSTEAD = {
    "max_length": "an action has as many tokens as its statistics have dimensions, leave it out",
    "num_beams": "every token is the most probable one; for other actions use do_sample=True",
    "num_return_sequences": "for several actions give the image and the instruction several times, with do_sample=True",
    "output_scores": "return_dict=True returns the probability of each token",
    "output_logits": "return_dict=True returns the probability of each token",
    "return_dict_in_generate": "return_dict=True returns tokens, probabilities and entropies",
}


def read_sampling(
    action_dim: int,
    keywords: Iterable[str],
    device: torch.device,
    *,
    do_sample: Any = None,
    temperature: Any = None,
    top_k: Any = None,
    top_p: Any = None,
    generator: Any = None,
    generation_config: Any = None,
    **options: Any,
) -> Sampling | None:
    """Options of `generate`, as scripts written against the original pass them; None for the most probable tokens.

    Args:
        keywords: Those of `predict_action`, for the hint at a misspelt one.
        device: Of the model, which a generator has to be on.
        generation_config: Its fields are taken where no keyword says otherwise.

    Raises:
        ValueError: If an option is unknown, or would have to change how an action is decoded. None is ignored silently.
    """
    sampling = {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    if generation_config is not None:
        if not isinstance(generation_config, GenerationConfig):
            raise ValueError(
                f"generation_config must be a transformers.GenerationConfig, got {type(generation_config).__name__}."
            )
        for name, value in generation_config.to_diff_dict().items():
            if name not in sampling:
                options.setdefault(name, value)
            elif sampling[name] is None:
                sampling[name] = value
    known = {*vars(GenerationConfig()), *GENERATE_KEYWORDS}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"predict_action does not know {name}={value!r:.100}.{closest(name, {*keywords, *known})}")
        if name in ("max_new_tokens", "min_new_tokens") and not (
            value is None or isinstance(value, int) and value == action_dim
        ):
            raise ValueError(
                f"{name}={value!r:.100}: an action of these statistics has {action_dim} tokens, leave it out."
            )
        if name.startswith("_") or name in (*WITHOUT_EFFECT, "max_new_tokens", "min_new_tokens"):
            continue
        neutral = 1 if name in NEUTRAL_AT_ONE else 0
        if value is not None and not (isinstance(value, (bool, int, float)) and value == neutral):
            raise ValueError(f"{name}={value!r:.100} cannot be used here: {INSTEAD.get(name, 'leave it out')}.")

    check_flag("do_sample", sampling["do_sample"])
    # Without sampling a temperature of 0 says what is done anyway.
    least = 1e-30 if sampling["do_sample"] else 0
    real = (int, float, np.integer, np.floating)
    _check_number("temperature", sampling["temperature"], real, least, 1e30, "a number above 0")
    _check_number("top_k", sampling["top_k"], (int, np.integer), 1, math.inf, "an integer of at least 1")
    _check_number("top_p", sampling["top_p"], real, least, 1, "above 0 and at most 1")
    if not sampling["do_sample"]:
        asked = {name: value for name, value in sampling.items() if name != "do_sample" and value not in (None, 0, 1)}
        if asked:
            warnings.warn(
                f"{', '.join(f'{name}={value!r}' for name, value in asked.items())} without do_sample=True: the most "
                "probable action is returned.",
                stacklevel=3,
            )
        return None
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, got {type(generator).__name__}.")
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"The generator is on {generator.device}, the model on {device}: torch.Generator('{device}').")
    temperature = 1.0 if sampling["temperature"] is None else float(sampling["temperature"])
    return Sampling(temperature, sampling["top_k"], sampling["top_p"], generator)


def check_flag(name: str, value: Any) -> None:
    """Raise a `ValueError` unless it is True, False or None."""
    if not isinstance(value, (bool, np.bool_, type(None))):
        raise ValueError(f"{name}={value!r:.100} must be True or False.")


def _check_number(name: str, value: Any, kind: Any, low: float, high: float, expected: str) -> None:
    if value is None:
        return
    if not isinstance(value, kind) or isinstance(value, (bool, np.bool_)) or not low <= value <= high:
        hint = "; for the most probable action use do_sample=False" if name == "temperature" else ""
        raise ValueError(f"{name}={value!r:.100} must be {expected}{hint}.")


# Tokens ---------------------------------------------------------------------------------------------------------------


def choose_token(logits: torch.Tensor, sampling: Sampling | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index of the chosen token, its probability and the entropy (nats) of the distribution, each (batch, 1).

    Args:
        logits: (batch, number of tokens) float32, finite.
        sampling: None for the most probable token.
    """
    if sampling is not None:
        # Differences to the largest logit: no temperature makes them overflow.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
        if sampling.top_k is not None:
            least = logits.topk(min(int(sampling.top_k), logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if sampling.top_p is not None:
            ordered, order = logits.sort(dim=-1, descending=True)
            before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
            logits = logits.masked_fill(
                (before >= sampling.top_p).scatter(1, order, before >= sampling.top_p), -torch.inf
            )
    log_probabilities = logits.log_softmax(dim=-1)
    distribution = log_probabilities.exp()
    if sampling is None:
        chosen = logits.argmax(dim=-1, keepdim=True)
    else:
        chosen = torch.multinomial(distribution, num_samples=1, generator=sampling.generator)
    # 0 * -inf is 0 here: a token that cannot come adds nothing to the entropy.
    entropy = -(distribution * log_probabilities.clamp(min=-1e4)).sum(dim=-1, keepdim=True)
    return chosen, distribution.gather(1, chosen), entropy


def check_finite(probabilities: np.ndarray, dtype: torch.dtype) -> None:
    """Raise a `ValueError` if the model computed NaN or infinity: a NaN among `probabilities` (batch, tokens)."""
    broken = np.flatnonzero(~np.isfinite(probabilities).all(axis=1)).tolist()
    if broken:
        cause = "the weights are damaged (a diverged training, a broken download)"
        if dtype == torch.float16:
            cause = f"float16 overflowed (load the model with dtype=torch.bfloat16 or float32), or {cause}"
        raise ValueError(
            f"The model computed NaN or infinite values for sample {', '.join(map(str, broken))} of "
            f"{len(probabilities)}, so there is no action: {cause}."
        )


# Dropout --------------------------------------------------------------------------------------------------------------


@dataclass
class _Predictions:
    """Predictions that a model is busy with, and its modules that are in train mode otherwise."""

    running: int = 0
    modules: list[nn.Module] = field(default_factory=list)


_PREDICTIONS: WeakKeyDictionary[nn.Module, _Predictions] = WeakKeyDictionary()
_SWITCH = threading.Lock()


def every_module(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, shared ones more than once: `modules()` in a quarter of the time, for what is looked at
    in every prediction."""
    found, waiting = [], [model]
    while waiting:
        module = waiting.pop()
        found.append(module)
        if module._modules:
            waiting += [part for part in module._modules.values() if part is not None]
    return found


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradient checkpointing, also in train mode, which comes back when the last of the threads
    that predict with the model has finished."""
    with _SWITCH:
        predictions = _PREDICTIONS.setdefault(model, _Predictions())
        predictions.running += 1
        training = [module for module in every_module(model) if module.training]
        predictions.modules += training
        for module in training:
            module.training = False
    try:
        yield
    finally:
        with _SWITCH:
            predictions.running -= 1
            if not predictions.running:
                for module in predictions.modules:
                    module.training = True
                predictions.modules = []


@contextmanager
def one_type(model: nn.Module) -> Iterator[None]:
    """A `ValueError` instead of torch's error where parts of a model that were cast apart do not compute together."""
    try:
        yield
    except RuntimeError as error:
        types = {str(parameter.dtype) for parameter in model.parameters() if parameter.is_floating_point()}
        if len(types) < 2 or not ("dtype" in str(error) or "scalar type" in str(error)):
            raise
        raise ValueError(
            f"The weights of the model are of several types, {', '.join(sorted(types))}, whose parts do not compute "
            f"together ({error}): cast all of them, model.to(torch.bfloat16)."
        ) from error


__all__ = [
    "Sampling",
    "as_tensor",
    "check_finite",
    "check_flag",
    "check_pixel_values",
    "choose_token",
    "evaluation_mode",
    "largest_pixel",
    "one_type",
    "prompt_rows",
    "read_sampling",
]
