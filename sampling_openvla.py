"""How a token is drawn, as the options of `generate` say it; None of them is ignored silently."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from .choices_openvla import closest


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: from the `top_k` most probable, of these from the fewest that make up `top_p`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class Choice:
    """How a head chooses actions.

    constrained: Among action tokens only.
    sampling: None for the most probable tokens.
    generator: Of the noise that a diffusion begins with; None: torch's global one.
    draft: Guesses of the tokens of each sample, for heads that decode one after the other; None: none.
    distributions: Give `token_distributions` as well.
    """

    constrained: bool = True
    sampling: Sampling | None = None
    generator: torch.Generator | None = None
    draft: list[list[int]] | None = None
    distributions: bool = False


def check_generator(generator: Any, device: torch.device) -> None:
    """Raise a `ValueError` unless it is None, or a generator of the kind of `device`, where the model is."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, got {type(generator).__name__}.")
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"The generator is on {generator.device}, the model on {device}: torch.Generator('{device}').")


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
    "output_attentions": "model(**inputs, output_attentions=True) returns them",
    "output_hidden_states": "model(**inputs, output_hidden_states=True) returns them",
    "proprio": "state=... takes the state of the robot, in the units of the dataset and not normalized",
}
# Of `predict_action` of OpenVLA-OFT, where they are parts beside the model.
OFT_KEYWORDS = ("action_head", "noisy_action_projector", "proprio", "proprio_projector", "use_film")
INSTEAD |= {name: "leave it out, the model has its parts" for name in OFT_KEYWORDS if name not in INSTEAD}


def read_sampling(
    num_tokens: int,
    keywords: Iterable[str],
    device: torch.device,
    /,  # `options` may have these names as well
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
        num_tokens: Of an answer: those of all steps of a chunk.
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
    known = _known_options()
    for name, value in options.items():
        value = value.item() if isinstance(value, np.generic) else value
        if name not in known:
            raise ValueError(f"predict_action does not know {name}={value!r:.100}.{closest(name, {*keywords, *known})}")
        if name in ("max_new_tokens", "min_new_tokens") and not (
            value is None or isinstance(value, int) and value == num_tokens
        ):
            raise ValueError(
                f"{name}={value!r:.100}: an action of these statistics has {num_tokens} tokens, leave it out."
            )
        if name.startswith("_") or name in (*WITHOUT_EFFECT, "max_new_tokens", "min_new_tokens"):
            continue
        neutral = 1 if name in NEUTRAL_AT_ONE else 0
        if value is not None and not (isinstance(value, (bool, int, float)) and value == neutral):
            raise ValueError(f"{name}={value!r:.100} cannot be used here: {INSTEAD.get(name, 'leave it out')}.")

    check_flags(do_sample=sampling["do_sample"])
    # Without sampling a temperature of 0 says what is done anyway.
    least = 1e-30 if sampling["do_sample"] else 0
    real = (int, float, np.integer, np.floating)
    _check_number("temperature", sampling["temperature"], real, least, 1e30, "a number above 0")
    # As `generate` has it, a top_k of 0 is none.
    _check_number("top_k", sampling["top_k"], (int, np.integer), 0, math.inf, "an integer of at least 0")
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
    check_generator(generator, device)
    temperature = 1.0 if sampling["temperature"] is None else float(sampling["temperature"])
    return Sampling(temperature, sampling["top_k"] or None, sampling["top_p"], generator)


@cache
def _known_options() -> frozenset[str]:
    return frozenset((*vars(GenerationConfig()), *GENERATE_KEYWORDS, *OFT_KEYWORDS))


def check_flags(**flags: Any) -> None:
    """Raise a `ValueError` unless each is True, False or None."""
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_, type(None))):
            raise ValueError(f"{name}={value!r:.100} must be True or False.")


def _check_number(name: str, value: Any, kind: Any, low: float, high: float, expected: str) -> None:
    if value is None:
        return
    if not isinstance(value, kind) or isinstance(value, (bool, np.bool_)) or not low <= value <= high:
        hint = "; for the most probable action use do_sample=False" if name == "temperature" else ""
        raise ValueError(f"{name}={value!r:.100} must be {expected}{hint}.")


__all__ = ["Choice", "Sampling", "check_flags", "check_generator", "read_sampling"]
