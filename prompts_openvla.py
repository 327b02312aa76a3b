"""From an instruction to a prompt: one text for what people see as one instruction, in training and prediction alike.

The standard library alone.
"""

import re
import unicodedata
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any


# What the published checkpoints were trained with. v01 is built on Vicuna and kept its chat form.
PROMPT_TEMPLATES = {
    "openvla": "In: What action should the robot take to {instruction}?\nOut:",
    "openvla-v01": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: What action should the robot take to {instruction}? ASSISTANT:"
    ),
}
# The question in all of these, by itself as well a prompt that may be handed over as the instruction.
QUESTION = "What action should the robot take to {instruction}?"
# Families of language models whose tokenizers begin a prompt with the token that starts a sequence (BOS).
BEGIN_WITH_BOS = ("llama", "mistral")
# Characters without a picture of their own (Unicode's Default_Ignorable_Code_Point, and marks of annotations).
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# Control characters, and the empty pattern of Braille, which is no blank to Python.
_BLANK = re.compile("[\x00-\x1f\x7f-\x9f\u2800]")


def plain_text(text: str) -> str:
    """`text` in lower case and as people see it, so that what looks the same is the same: characters composed (NFC),
    full and half width as ordinary ones, invisible characters left out, control characters taken as blanks, words
    separated by one blank. Ordinary text changes in case and blanks alone."""
    if not text.isascii():
        text = "".join(
            unicodedata.normalize("NFKC", character)
            if unicodedata.decomposition(character).startswith(("<wide>", "<narrow>"))
            else character
            for character in _INVISIBLE.sub("", text)
        )
        text = unicodedata.normalize("NFC", text).lower()
        text = unicodedata.normalize("NFC", text)
    return " ".join(_BLANK.sub(" ", text).split()).lower()


# What prompts end in; an instruction that was cut out of one too long still does.
_ENDS = tuple(plain_text(template.partition("{instruction}")[2]) for template in PROMPT_TEMPLATES.values())


@lru_cache(maxsize=1024)  # datasets repeat their instructions at every step
def has_words(text: str) -> bool:
    """Whether a text says anything: there is a letter, a digit or a symbol that people see."""
    return any(unicodedata.category(character)[0] in "LNS" and character != "\ufffd" for character in plain_text(text))


def read_instruction(instruction: Any, prompt_template: str | None = None) -> str:
    """What to do, as a model is told in training and prediction alike: `plain_text`.

    Of a complete prompt (one of `PROMPT_TEMPLATES`, or `prompt_template`, in any case and with any blanks) the
    instruction in it.

    Raises:
        ValueError: If it is no string, empty, not valid Unicode, or holds an incomplete prompt.
    """
    if not isinstance(instruction, str):
        raise ValueError(f"An instruction is a string, got {type(instruction).__name__}: {instruction!r:.200}.")
    check_unicode(instruction)
    text = plain_text(instruction.replace("\\n", " "))  # a shell hands over a line break as two letters
    templates = {*PROMPT_TEMPLATES.values(), QUESTION}
    if prompt_template is not None and len(prompt_template) > 40:  # a short one may begin as an instruction does
        templates.add(prompt_template)
    found: str | None = text
    while found is not None:
        text = found
        inside = (_inside(text, template) for template in templates)
        found = next((held for held in inside if held is not None), None)
    if "action should the robot take to" in text or text.endswith(_ENDS):
        raise ValueError(
            f"The instruction holds a part of a prompt: {instruction!r:.200}. Give the instruction alone, for example "
            "'open the drawer', or the complete prompt."
        )
    if not has_words(text):
        raise ValueError("The instruction is empty: say what the robot shall do, for example 'open the drawer'.")
    return text


def make_prompt(instruction: Any, template: str, special_tokens: Sequence[str] = ()) -> str:
    """The prompt of an instruction, see `read_instruction`.

    Args:
        special_tokens: Of the tokenizer, if the template is made with some: see `special_tokens_of`.

    Raises:
        ValueError: As `read_instruction`, or if the instruction holds such a token as well.
    """
    text = read_instruction(instruction, template)
    if any(token in text for token in special_tokens):
        raise ValueError(
            f"The instruction {text!r:.200} holds a special token, and so does the prompt form: leave it out."
        )
    return template.replace("{instruction}", text)


def special_tokens_of(template: str, known: Sequence[str]) -> list[str]:
    """All special tokens that are `known`, if the prompt form is made with some: its prompts cannot be read as text
    alone."""
    return list(known) if any(token in template for token in known) else []


def spell_action_tokens(ids: Sequence[int], actions: range, tokenizer: Any) -> list[int]:
    """Action tokens, which text may hold as ordinary characters, spelled in the tokens of their bytes.

    Args:
        actions: Ids of the action tokens.
        tokenizer: Of the library `tokenizers`.
    """
    spelled: list[int] = []
    for token_id in ids:
        if token_id not in actions:
            spelled.append(token_id)
            continue
        token = tokenizer.id_to_token(token_id)
        for pieces in ([f"<0x{byte:02X}>" for byte in token.encode()], list(token)):  # SentencePiece, byte-level BPE
            piece_ids = [tokenizer.token_to_id(piece) for piece in pieces]
            if None not in piece_ids and not any(piece_id in actions for piece_id in piece_ids):
                spelled += piece_ids
                break
        else:
            raise ValueError(f"The text holds {token!r}, which stands for a motion: say it in other words.")
    return spelled


def _inside(text: str, template: str) -> str | None:
    """What stands in the place of `{instruction}`, None if `text` is no such prompt."""
    before, _, after = map(plain_text, template.partition("{instruction}"))
    if len(text) < len(before) + len(after) or not (text.startswith(before) and text.endswith(after)):
        return None
    return text[len(before) : len(text) - len(after)].strip()


def check_unicode(text: str) -> None:
    """Raise a `ValueError` for a text that cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text {ascii(text):.200} is not valid Unicode: it was decoded wrongly (errors='surrogateescape'?)."
        ) from error


def end_with_empty(prompt: list[int], config: Any, num_patches: int, num_tokens: int) -> list[int]:
    """A prompt, without padding, that ends in the empty token `▁`, as in training.

    Args:
        config: `OpenVLAConfig` of the model, whose `empty_token_id` is known; None: there is none.
        num_tokens: That follow.

    Raises:
        ValueError: If the prompt says nothing, or is too long for the model.
    """
    empty, limit, text = config.empty_token_id, config.llm_max_length, config.text_config
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None:
        limit = min(limit, positions - num_patches - num_tokens)
    if set(prompt) <= {text.bos_token_id, empty}:
        raise ValueError("No instruction given: a prompt holds no token but the start of the sequence.")
    if len(prompt) + 1 > limit:
        raise ValueError(f"The prompt has {len(prompt)} tokens, the model takes {limit - 1}: shorten the instruction.")
    return prompt if empty in (None, prompt[-1]) else [*prompt, empty]


def check_prompt_ids(ids: list[int], config: Any, warn_without_bos: bool = False) -> None:
    """Raise a `ValueError` if the token ids of a prompt (without padding) are not those of a prompt alone: they hold
    action tokens or padding, end in the token that ends a sequence, or, of a language model whose prompts start with
    BOS, do not start with it or hold it twice.

    Args:
        config: `OpenVLAConfig` of the model.
        warn_without_bos: Only warn where a prompt, which may have been cut by its mask, does not hold BOS at all.
    """
    # Each field is read once: a configuration of transformers takes a microsecond for it.
    text, end, image, pad = config.text_config, config.action_vocab_size, config.image_token_id, config.pad_token_id
    first, empty, bos, ends = end - config.n_action_bins, config.empty_token_id, text.bos_token_id, text.eos_token_id
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    begins = bos if text.model_type in BEGIN_WITH_BOS else None
    actions = [token for token in ids if first <= token < end and token != image]
    last = next((token for token in reversed(ids) if token != empty), None)
    problem = None
    if actions:
        problem = f"holds {len(actions)} action token(s), for example {actions[0]}"
    elif last in ends and last != bos:
        problem = f"ends in the token that ends a sequence ({last})"
    elif pad in ids and pad not in (bos, *ends):
        problem = f"holds padding ({pad}) that no attention_mask hides"
    elif begins is not None and begins not in ids and warn_without_bos:
        warnings.warn(
            f"A prompt starts with {ids[:3]} and without the token that starts a sequence ({begins}): the image enters "
            "after its first word, which no training had. Make prompts with the processor of the model.",
            stacklevel=4,
        )
    elif begins is not None and (ids[0] != begins or ids.count(begins) > 1):
        problem = (
            f"starts with {ids[:3]} and holds the token that starts a sequence ({begins}) {ids.count(begins)} times"
        )
    if problem:
        raise ValueError(
            f"The prompt {problem}: a prompt starts with BOS where its language model knows one, once, and holds the "
            "words up to the answer. Make it with the processor of the model, processor(prompt, image)."
        )


__all__ = [
    "PROMPT_TEMPLATES",
    "check_prompt_ids",
    "end_with_empty",
    "has_words",
    "make_prompt",
    "plain_text",
    "read_instruction",
    "special_tokens_of",
    "spell_action_tokens",
]
