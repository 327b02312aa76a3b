"""What `predict_action` is given: from raw images and instructions, or tensors, to prompts and pixels that are checked.

Everything that can be wrong with them is said before the robot waits for an answer. Shapes: `batch` samples, `length`
prompt tokens.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from .action_tokenizer import check_state_given, normalize_actions, normalize_state
from .configuration_openvla import OpenVLAConfig
from .frames_openvla import read_samples
from .pixels_openvla import check_largest_pixel
from .processing_openvla import OpenVLAProcessor
from .prompts_openvla import check_prompt_ids, end_with_empty


@dataclass
class ModelInputs:
    """What a head predicts from, checked.

    prompts: Token ids of each sample, without padding.
    pixel_values: (batch, cameras * 3 * towers, height, width).
    proprio: (batch, proprio_dim) normalized state, of a model that sees it.
    committed: (batch, n, A) normalized actions, the first n steps of each chunk, which are decided already.
    """

    prompts: list[list[int]]
    pixel_values: torch.Tensor
    proprio: torch.Tensor | None = None
    committed: np.ndarray | None = None


def as_tensor(name: str, values: Any) -> torch.Tensor:
    """A tensor of a tensor, an array or (nested) lists of numbers; a `ValueError` names `name` for all else."""
    if isinstance(values, torch.Tensor):
        values = values.detach()
        if values.layout != torch.strided or values.is_meta or values.is_quantized:
            raise ValueError(
                f"{name} must be a dense tensor that holds values, got {values.layout} on {values.device}."
            )
        return values
    if np.ma.is_masked(values) or isinstance(values, (list, tuple)) and any(map(np.ma.is_masked, values)):
        raise ValueError(f"{name} is masked in part: what lies under a mask is nothing that is known. Give numbers.")
    try:
        if isinstance(values, (list, tuple)) and any(isinstance(row, torch.Tensor) for row in values):
            return torch.stack([as_tensor(name, row) for row in values])
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        remedy = "pad them, or give a tensor" if name == "input_ids" else "give others in another call"
        raise ValueError(f"{name} must have rows of one length: {remedy} ({error}).") from error
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ValueError(f"{name} must be a tensor, an array or lists of numbers, got {type(values).__name__}.")
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def check_are_tensors(unknown: Mapping[str, Any] = MappingProxyType({}), /, **inputs: Any) -> None:
    """Raise a `ValueError` if one of the inputs of `forward` and `generate` is no tensor, or ids are no integers.

    Args:
        unknown: What `forward` hands on to the language model: an image among it, which would not be seen, is an error.
    """
    for name, value in unknown.items():
        if isinstance(value, torch.Tensor) and value.ndim > 3:
            raise ValueError(f"{name} of shape {tuple(value.shape)}: images are given as pixel_values.")
    for name, value in inputs.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{name} must be a tensor, got {type(value).__name__}: give what the processor returns, "
                "processor(prompt, image); of a raw image predict_action(image, instruction) makes an action."
            )
        if name == "input_ids" and value is not None and (value.is_floating_point() or value.is_complex()):
            raise ValueError(f"input_ids must be integers, got {value.dtype}: give what the tokenizer returned.")


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
    largest = 0.0
    if pixel_values.numel():  # nothing is written but two numbers, both NaN if one value is
        low, high = torch.stack(pixel_values.float().aminmax()).tolist()
        largest = max(-low, high)
    check_largest_pixel(largest, limit=math.inf)
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
    check_largest_pixel(largest_pixel(pixel_values))


# Raw images and instructions, to the tensors of a processor -----------------------------------------------------------


def process_raw(processor: OpenVLAProcessor, image: Any, instruction: Any) -> tuple[bool, Any]:
    """Whether it was a single sample, and its model inputs; see `predict_action`."""
    single, images, instructions = read_samples(image, instruction)
    return single, processor(processor.format_prompt(instructions), images, return_tensors="pt")


def read_unnorm_keys(unnorm_key: Any, batch: int) -> list[Any]:
    """The dataset of each sample, of one for all or one for each."""
    unnorm_key = unnorm_key.tolist() if isinstance(unnorm_key, np.ndarray) else unnorm_key
    keys = list(unnorm_key) if isinstance(unnorm_key, (list, tuple)) else [unnorm_key] * batch
    if len(keys) != batch:
        raise ValueError(f"{len(keys)} unnorm_keys for {batch} sample(s): give one, or one for each.")
    return keys


def read_state(
    state: Any,
    config: OpenVLAConfig,
    norm_stats: Mapping[str, Any] | None,
    unnorm_keys: Sequence[str],
    modes: Sequence[str],
    constant: str = "zero",
) -> torch.Tensor | None:
    """(batch, proprio_dim) float32, the state of the robot as a model sees it: normalized as actions are; None for a
    model that sees none.

    Args:
        state: (S,) of one sample or (batch, S), in the units of the dataset.
        config: Of the model: `proprio_dim`.
        unnorm_keys, modes: Dataset of each sample, and what its numbers are normalized by, see `normalize_actions`.
        constant: `constant_state` of the model.

    Raises:
        ValueError: If it is missing, not wanted, not finite or of another shape, or its statistics are not known.
    """
    proprio_dim = config.proprio_dim
    check_state_given(state, proprio_dim)
    if proprio_dim is None:
        return None
    rows = as_tensor("state", state).to(torch.float64)
    rows = rows[None] if rows.ndim == 1 else rows
    if tuple(rows.shape) != (len(unnorm_keys), proprio_dim) or not bool(rows.isfinite().all()):
        broken = "" if bool(rows.isfinite().all()) else " and holds NaN or infinity"
        raise ValueError(
            f"state has shape {tuple(rows.shape)}{broken}, expected finite numbers ({len(unnorm_keys)}, {proprio_dim})."
        )
    entries = zip(rows.cpu().numpy(), unnorm_keys, modes)
    normalized = [normalize_state(row, norm_stats or {}, key, mode, constant) for row, key, mode in entries]
    return torch.from_numpy(np.stack(normalized)).float()


# Prompts --------------------------------------------------------------------------------------------------------------


def check_prompts(
    input_ids: torch.Tensor, attention_mask: Any, config: OpenVLAConfig, num_patches: int
) -> list[list[int]]:
    """Token ids of each prompt without padding; a `ValueError` for what the model was not trained on.

    Args:
        input_ids: (batch, length).
        attention_mask: (batch, length), as a tensor, array or lists; None: padding is found by its id.
    """
    pad = None if config.pad_token_id == config.text_config.bos_token_id else config.pad_token_id
    if attention_mask is not None:
        attention_mask = as_tensor("attention_mask", attention_mask)
    prompts = prompt_rows(input_ids, attention_mask, pad)
    ids, vocabulary = [token for prompt in prompts for token in prompt], config.text_config.vocab_size
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise ValueError(
            f"input_ids range from {min(ids)} to {max(ids)}, the model knows 0 to {vocabulary - 1}: was the prompt "
            "made with another model's processor?"
        )
    placeholders = {prompt.count(config.image_token_id) for prompt in prompts}
    if placeholders not in ({0}, {num_patches}):
        raise ValueError(
            f"Prompts hold {sorted(placeholders)} image placeholders (id {config.image_token_id}): give each none, "
            f"or {num_patches}."
        )
    for prompt in prompts:
        check_prompt_ids(prompt, config, warn_without_bos=True)
    return prompts


def end_prompts(
    prompts: list[list[int]],
    config: OpenVLAConfig,
    num_patches: int,
    num_tokens: int,
    answers: Sequence[Sequence[int]] = (),
) -> list[list[int]]:
    """Prompts that end in the empty token `▁`, as in training, and what is answered already.

    Args:
        config: Its `empty_token_id` is known; None: there is none.
        num_tokens: That follow.
        answers: Tokens of each sample that stand after its prompt already.

    Raises:
        ValueError: If a prompt says nothing, or is too long for the model.
    """
    ended = [end_with_empty(prompt, config, num_patches, num_tokens) for prompt in prompts]
    return [[*row, *answer] for row, answer in zip(ended, answers, strict=True)] if answers else ended


def pad_rows(
    rows: list[list[int]], config: OpenVLAConfig, right: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, list[int]]:
    """Rows of token ids padded to one length: (batch, length), their attention mask (None where no row is padded), and
    how many tokens each row lacked."""
    length, pad = max(map(len, rows)), config.pad_token_id or 0
    missing = [length - len(row) for row in rows]

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        filled = [[fill] * count for count in missing]
        values = [row + more if right else more + row for row, more in zip(rows, filled)]
        return torch.tensor(values, device="cpu")  # whatever torch.set_default_device says

    mask = padded([[1] * len(row) for row in rows], 0) if any(missing) else None
    return padded(rows, pad), mask, missing


def place_actions(
    prompts: list[list[int]],
    config: OpenVLAConfig,
    num_patches: int,
    num_actions: int,
    decided: Sequence[Sequence[int]] = (),
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Plain prompts with placeholders for `num_actions` numbers and the end after them: for a head that predicts in one
    pass.

    Args:
        prompts: Placeholders of patches in them are left out.
        num_patches: And what else is put between their tokens.
        decided: Tokens of the first numbers of each sample, where they are known.

    Returns:
        Token ids (batch, length) padded on the right, their attention mask (None where no row is padded), and the index
        (batch,) of the first placeholder.
    """
    end = end_token_id(config)
    plain = [[token for token in prompt if token != config.image_token_id] for prompt in prompts]
    decided = decided or [[]] * len(prompts)
    answers = [[*tokens, *[end] * (num_actions + 1 - len(tokens))] for tokens in decided]
    rows = end_prompts(plain, config, num_patches, num_actions + 1, answers)
    input_ids, mask, _ = pad_rows(rows, config, right=True)
    return input_ids, mask, torch.tensor([len(row) - num_actions - 1 for row in rows], device="cpu")


@dataclass
class PromptLayout:
    """Prompts as the language model reads them, on the host.

    input_ids: (batch, length) with placeholders where patches stand, rows padded on the left.
    attention_mask: (batch, length), 0 marks padding; None without any.
    patches: (batch, num_patches) int64, positions of the placeholders.
    first_patch: Position of the first, where they are side by side and at the same place in every row; None elsewhere.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    patches: np.ndarray
    first_patch: int | None = None


def place_patches(
    prompts: list[list[int]],
    config: OpenVLAConfig,
    num_patches: int,
    num_tokens: int,
    answers: Sequence[Sequence[int]] = (),
) -> PromptLayout:
    """Prompts of `end_prompts` with their placeholders: after the first token, or where they stand already."""
    rows, image = end_prompts(prompts, config, num_patches, num_tokens, answers), config.image_token_id
    if image in prompts[0]:
        input_ids, mask, _ = pad_rows(rows, config)
        places = [np.flatnonzero(row == image)[:num_patches] for row in input_ids.numpy()]
        return PromptLayout(input_ids, mask, np.stack(places))
    input_ids, mask, missing = pad_rows([[row[0], *[image] * num_patches, *row[1:]] for row in rows], config)
    first = 1 + np.array(missing)[:, None]
    return PromptLayout(input_ids, mask, first + np.arange(num_patches), 1 if mask is None else None)


def read_committed(
    committed: Any,
    shape: tuple[int, int],
    norm_stats: Mapping[str, Any],
    unnorm_keys: Sequence[str],
    modes: Sequence[str],
    learned: int | None,
) -> np.ndarray | None:
    """(batch, n, A) normalized actions that are decided already; None without any.

    Args:
        committed: (n, A) of one sample or (batch, n, A), in the units of the dataset; n below K.
        shape: (K, A) of a prediction.
        unnorm_keys, modes: As in `read_state`.
        learned: Steps that the head learned to be given, at most; more are a warning. None: it takes any number.

    Raises:
        ValueError: If they are not finite, or of another shape.
    """
    if committed is None:
        return None
    rows = as_tensor("committed", committed).to(torch.float64).cpu().numpy()
    rows = rows[None] if rows.ndim == 2 else rows
    fits = rows.ndim == 3 and len(rows) == len(unnorm_keys) and rows.shape[2] == shape[1] and rows.shape[1] < shape[0]
    if not fits or not np.isfinite(rows).all():
        broken = "" if np.isfinite(rows).all() else " and holds NaN or infinity"
        raise ValueError(
            f"committed has shape {np.shape(committed)}{broken}, expected finite actions ({len(unnorm_keys)}, n, "
            f"{shape[1]}), the first n of the {shape[0]} steps of a prediction, n below {shape[0]}."
        )
    if not rows.shape[1]:
        return None
    if learned is not None and rows.shape[1] > learned:
        warnings.warn(
            f"{rows.shape[1]} steps are committed, and this model learned to continue "
            f"{f'at most {learned}' if learned else 'none'} (config.prefix_training={learned}): what follows may not "
            "fit them. Train with --prefix-training, or use chunks without a prefix (--chunking switch).",
            stacklevel=3,
        )
    keys = zip(rows, unnorm_keys, modes)
    return np.stack([normalize_actions(row, norm_stats[key]["action"], mode) for row, key, mode in keys])


def read_draft(draft: Any, batch: int, config: OpenVLAConfig) -> list[list[int]] | None:
    """Token ids of each sample that are guessed, as many as there are; None where no sample has a draft.

    Args:
        draft: Integers of any shape for one sample; for a batch a sequence of such, None where there are none.

    Raises:
        ValueError: If they are no token ids of the model, or of another number of samples.
    """
    if draft is None:
        return None
    rows = [draft] if batch == 1 and not (isinstance(draft, (list, tuple)) and len(draft) == 1) else draft
    if not (isinstance(rows, (list, tuple)) or getattr(rows, "ndim", False)) or len(rows) != batch:
        size = f" of {len(draft)}" if hasattr(draft, "__len__") and getattr(draft, "ndim", True) else ""
        raise ValueError(
            f"draft is a {type(draft).__name__}{size}, expected token ids for each of the {batch} samples, None for "
            "one without any."
        )
    if all(row is None for row in rows):
        return None
    guesses: list[list[int]] = []
    for row in rows:
        tokens = as_tensor("draft", [] if row is None else row).flatten()
        if tokens.numel() and (tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex()):
            raise ValueError(f"draft holds {tokens.dtype}, expected token ids: `token_ids` of an earlier prediction.")
        ids, vocabulary = [int(token) for token in tokens.tolist()], config.text_config.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ValueError(
                f"draft ranges from {min(ids)} to {max(ids)}, the model knows token ids from 0 to {vocabulary - 1}."
            )
        guesses.append(ids)
    return guesses


def end_token_id(config: OpenVLAConfig) -> int:
    """The token that ends a sequence; a `ValueError` if the configuration does not say."""
    end = config.text_config.eos_token_id
    end = end[0] if isinstance(end, (list, tuple)) and end else end
    if not isinstance(end, int):
        raise ValueError(
            f"text_config.eos_token_id={end!r}: a head that predicts in one pass ends its sequence with it."
        )
    return end


__all__ = [
    "ModelInputs",
    "PromptLayout",
    "as_tensor",
    "check_are_tensors",
    "check_pixel_values",
    "check_prompts",
    "end_prompts",
    "end_token_id",
    "largest_pixel",
    "pad_rows",
    "place_actions",
    "place_patches",
    "process_raw",
    "read_committed",
    "read_draft",
    "prompt_rows",
    "read_state",
    "read_unnorm_keys",
]
