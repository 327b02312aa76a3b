"""Fields of dataclasses that the command line shows: a default and a help text, written once."""

import re
from collections.abc import Mapping
from dataclasses import field, fields
from numbers import Real
from typing import Any, Literal, get_args, get_origin


def option(default: Any, text: str) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": text})


def check_options(options: Any, least: Mapping[str, float]) -> None:
    """Raise a `ValueError` for a value of a dataclass that none of its choices is, or no number where one is expected.

    Args:
        least: Smallest value of numbers, by field; NaN and infinity are refused as well.
    """
    for item in fields(options):
        value = getattr(options, item.name)
        if get_origin(item.type) is Literal and value not in get_args(item.type):
            raise ValueError(f"{item.name}={value!r} is unknown. Known: {', '.join(get_args(item.type))}.")
        if item.name not in least or value is None and type(None) in get_args(item.type):
            continue
        whole = item.type is int or int in get_args(item.type)
        number = isinstance(value, Real) and not isinstance(value, bool) and (not whole or float(value).is_integer())
        if not number or not least[item.name] <= value < float("inf"):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{item.name}={value!r}: it must be {kind} of at least {least[item.name]}.")


def respelled(text: str, names: Mapping[str, str], form: str = "{name} {value}") -> str:
    """A message in the spelling of the door through which an option came. Messages name options as Python does:
    `held_out=2`, `language_key=...`, `tolerance_s`, and may add the command line's in brackets.

    Args:
        names: {name in Python: name at this door}.
        form: How name and value stand together there; of true and false the name alone, or `--no-...`.
    """
    if not names:
        return text
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    value = r"""'[^']*'|"[^"]*"|\[[^]]*\]|\.\.\.|-?[\w.+]*\w"""
    before, after = r"(?<![\w./'\"-])", r"(?![\w/'\":=-]|\.\w)"

    def new(match: re.Match[str]) -> str:
        name, given = names[match["name"]], match["value"]
        if name.startswith("--") and given in ("True", "False"):
            return name if given == "True" else f"--no-{name[2:]}"
        return form.format(name=name, value=given) if given and given != "..." else name

    kept = r"\2" if any(name.startswith("--") for name in names.values()) else r"\1"
    text = re.sub(rf"({before}(?:{known})(?:=(?:{value}))?) \((--[a-z][^()]*)\)", kept, text)
    text = re.sub(rf"{before}(?P<name>{known})=(?P<value>{value})?", new, text)
    bare = "|".join(name for name in names if "_" in name)  # others are words of the language as well
    return re.sub(rf"{before}(?P<name>{bare})(?P<value>){after}", new, text) if bare else text


def required(text: str) -> Any:
    """A field without a default."""
    return field(metadata={"help": text})


# Options of the readers of demonstrations, which every verb that opens data has.
READER_HELP = {
    "cameras": "Cameras to read, by their keys in the data, joined by commas. Default: all in colour.",
    "action_key": "What the action is, where it is not called action: a key, or several joined by commas that are put "
    "side by side; none among them is a column of zeros.",
    "state_key": "What the state of the robot is: keys as for the action; none alone: no state.",
    "language_key": "Where the instruction stands: a column, a path such as episode_metadata/language_instruction, or "
    "an attribute of an HDF5 file.",
    "rotate_images": "Turn images of HDF5 files by 180 degrees. Default: those of LIBERO, by their attributes.",
    "tolerance_s": "Seconds that time stamps of LeRobot may differ from frame_index / fps. Default: 0.0001.",
}
