"""Fields of a verb's dataclass: default, help text, limits, and whether a run that continues may change them."""

import inspect
import math
import operator
import os
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from ..choices_openvla import closest


# Limits of a number: their words, and when a value keeps to them.
LIMITS: dict[str, tuple[str, Any]] = {
    "least": ("of at least", operator.ge),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
}


def option(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    neutral: bool = False,
    listed: bool = False,
    flag: str | None = None,
    shown: str | None = None,
    heading: str | None = None,
) -> Any:
    """A field with its help text.

    Args:
        least, above, below: Limits of a number; NaN and infinity are refused where there is one.
        neutral: Changes nothing in the result (where it is written, how fast): a run that continues may change it.
        listed: A text of numbers with commas between them; Python may give a number or a list.
        flag: Name on the command line, where it is not that of the field; one that begins with "--" has no "--no-".
        shown: What --help says in place of the default.
        heading: What --help calls this option and those below it in its class, up to the next heading.
    """
    about = {"help": text, "least": least, "above": above, "below": below, "neutral": neutral, "listed": listed}
    return field(default=default, metadata=about | {"flag": flag, "shown": shown, "heading": heading})


def required(text: str, *, argument: bool = False, neutral: bool = False, metavar: str | None = None) -> Any:
    """A field without a default; one of a list is given on the command line once for each of its entries.

    Args:
        argument: On the command line it is given by its place, without a name.
        metavar: How --help writes the value.
    """
    return field(metadata={"help": text, "argument": argument, "neutral": neutral, "metavar": metavar})


def pairs(text: str, *, flag: str, heading: str | None = None) -> Any:
    """A field of further options, `{name: value}`; on the command line `flag name=value`, any number of times."""
    return field(default_factory=dict, metadata={"help": text, "flag": flag, "pairs": True, "heading": heading})


@dataclass(kw_only=True)
class Options:
    """What the options of all verbs share."""

    def __post_init__(self) -> None:
        check_options(self)

    def content(self) -> dict[str, Any]:
        """The options that decide the result."""
        return {name: getattr(self, name) for name in decisive(type(self))}

    def without(self, *names: str) -> dict[str, Any]:
        """All options but these."""
        return {name: value for name, value in vars(self).items() if name not in names}


def decisive(kind: type) -> dict[str, Any]:
    """{field that decides the result: its default} of a dataclass of options; None for one without a default."""
    return {item.name: default_of(item) for item in fields(kind) if not item.metadata.get("neutral")}


def headings(kind: type) -> dict[str, str | None]:
    """{field: its heading} of a dataclass of options, as --help orders them: its own fields, then inherited ones."""
    found: dict[str, str | None] = {}
    for base in kind.__mro__:
        heading = None
        for name in inspect.get_annotations(base):
            item = vars(base)["__dataclass_fields__"][name]
            heading = item.metadata.get("heading") or heading
            found.setdefault(name, heading)
    return found


def default_of(item: Any) -> Any:
    if item.default_factory is not MISSING:
        return item.default_factory()
    return None if item.default is MISSING else item.default


def choices(kind: Any) -> tuple[Any, ...]:
    """Values of a `Literal`, or of a `Literal | None`; none of any other type."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return next(filter(None, map(choices, get_args(kind))), ())
    return ()


def check_options(options: Any) -> None:
    """Raise a `ValueError` for a value of a dataclass that none of its choices is, or no number within its limits."""
    for item in fields(options):
        value = getattr(options, item.name)
        if value is None and type(None) in get_args(item.type):
            continue
        known = choices(item.type)
        if known and value not in known:
            raise ValueError(
                f"{item.name}={value!r:.100} is unknown.{closest(str(value), known)} "
                f"Known: {', '.join(map(str, known))}."
            )
        if item.metadata.get("pairs") and not isinstance(value, Mapping):
            raise ValueError(f"{item.name}={value!r}: expected a mapping of names to values.")
        kinds = _kinds(item)
        _check_kind(item, value, kinds)
        if kinds == {str} and isinstance(value, os.PathLike):  # as they are stored, and compared when a run continues
            setattr(options, item.name, os.fspath(value))
        elif kinds == {Path} and isinstance(value, str):
            setattr(options, item.name, Path(value))
        _expand_home(options, item)
        if _check_limits(item, value):  # numbers of numpy, which JSON does not have, and 10.0 of a YAML file
            exact = int(value) if _is_whole(item) or isinstance(value, Integral) else float(value)
            if type(value) is not type(exact):
                setattr(options, item.name, exact)


def _kinds(item: Any) -> set[Any]:
    """The types that a field may have, but None."""
    several = get_origin(item.type) in (Union, types.UnionType)
    return set(get_args(item.type)) - {type(None)} if several else {item.type}


def _check_kind(item: Any, value: Any, kinds: set[Any]) -> None:
    """Raise a `ValueError` for what is no text or path, or neither true nor false: "false" would count as true."""
    text = (str, os.PathLike, int, list, tuple) if item.metadata.get("listed") else (str, os.PathLike)
    if kinds <= {str, Path} and not isinstance(value, text):
        raise ValueError(f"{item.name}={value!r:.100}: expected a text.")
    if kinds == {bool} and not isinstance(value, bool):
        raise ValueError(f"{item.name}={value!r:.100}: expected true or false.")


def _expand_home(options: Any, item: Any) -> None:
    """Put the home folder in place of `~` in a path, as a shell does, but not in --output=~/x; a `ValueError` for the
    home of nobody here, which would end in the middle of work."""
    value = getattr(options, item.name)
    if not isinstance(value, (str, Path)) or not (home := str(value).partition("/")[0]).startswith("~"):
        return
    try:
        Path(home).expanduser()
        if "/" in str(value):
            setattr(options, item.name, type(value)(os.path.expanduser(value)))
    except RuntimeError as error:
        if " " not in home:  # words
            raise ValueError(
                f"{item.name}='{value}': there is no home folder '{home}' here. A folder of this name: './{value}'."
            ) from error


def _is_whole(item: Any) -> bool:
    return int in (item.type, *get_args(item.type)) and float not in (item.type, *get_args(item.type))


def _check_limits(item: Any, value: Any) -> bool:
    """Whether there are limits, which it keeps to; a `ValueError` where it does not."""
    limits = {limit: item.metadata[limit] for limit in LIMITS if item.metadata.get(limit) is not None}
    if not limits:
        return False
    integer, number = _is_whole(item), isinstance(value, Real) and not isinstance(value, bool)
    try:
        number = number and math.isfinite(value) and (not integer or float(value).is_integer())
    except OverflowError:  # of 10**400
        number = False
    if number and all(LIMITS[limit][1](value, bound) for limit, bound in limits.items()):
        return True
    expected = " and ".join(f"{LIMITS[limit][0]} {bound:g}" for limit, bound in limits.items())
    raise ValueError(f"{item.name}={value!r}: it must be {'a whole' if integer else 'a'} number {expected}.")


def read_pairs(given: list[str], flag: str) -> dict[str, str]:
    """`["name=value", ...]` of a command line as a mapping; a `ValueError` for anything else, or a name given twice."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"{flag} {text}: expected NAME=VALUE.")
        if name.strip() in found:
            raise ValueError(f"{flag} {text}: '{name.strip()}' is given twice.")
        found[name.strip()] = value
    return found


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

    shells = any(name.startswith("--") for name in names.values())  # else of a file

    def new(match: re.Match[str]) -> str:
        name, given = names[match["name"]], match["value"]
        if name.startswith("--") and given in ("True", "False"):
            return name if given == "True" else f"--no-{name[2:]}"
        if given and given != "...":
            return form.format(name=name, value=given)
        return name if shells else f"'{name}'"  # in quotes it stays what it is called in the file

    kept = r"\2" if shells else r"\1"
    text = re.sub(rf"({before}(?:{known})(?:=(?:{value}))?) \((--[a-z][^()]*)\)", kept, text)
    text = re.sub(rf"{before}(?P<name>{known})=(?P<value>{value})?", new, text)
    bare = "|".join(name for name in names if "_" in name)  # others are words of the language as well
    return re.sub(rf"{before}(?P<name>{bare})(?P<value>){after}", new, text) if bare else text
