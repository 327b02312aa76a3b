"""Classes of a user's own: named MODULE:CLASS, looked at before work begins, and their options."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, get_args

from .choices_openvla import check_choice, closest


YES, NO = ("true", "yes", "1"), ("false", "no", "0")


def is_reference(name: str) -> bool:
    """Whether a name is MODULE:CLASS and no name of this package's."""
    return ":" in name


def load_module(name: str, what: str) -> ModuleType:
    """The module of that name; one of the working directory is found as well.

    Args:
        what: What it is for, for the messages.

    Raises:
        ValueError: If it cannot be imported.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{what}: {name!r} is no name of a module: of a file my_head.py give my_head.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a console script does not look
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"{what}: its module needs {error.name}, which is not installed.") from error
        raise ValueError(
            f"{what}: there is no module {name!r}. It has to be installed, or lie in the working directory "
            f"({os.getcwd()}) or on PYTHONPATH."
        ) from error
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"{what}: its module cannot be imported: {error}.") from error


def load_class(reference: str, what: str, methods: Iterable[str]) -> type:
    """The class that MODULE:CLASS names; modules of the working directory are found as well.

    Args:
        what: What it shall be, for the messages: "simulator", "reader".
        methods: That it has to have.

    Raises:
        ValueError: If the module cannot be imported, has no such class, or the class lacks a method.
    """
    module_name, _, class_name = reference.partition(":")
    if not module_name or not class_name.isidentifier():
        raise ValueError(f"{what} {reference!r}: expected MODULE:CLASS, such as my_package.my_module:MyClass.")
    module = load_module(module_name, f"{what} {reference!r}")
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise ValueError(
            f"{what} {reference!r}: {module_name} has no class {class_name}.{closest(class_name, classes)}"
        )
    missing = [name for name in methods if not callable(getattr(found, name, None))]
    if missing:
        raise ValueError(f"{what} {reference!r}: {class_name} has no {', '.join(missing)}; see docs/extending.md.")
    return found


def options_known(made: Any) -> dict[str, inspect.Parameter]:
    """The options of a class: parameters of its constructor that may be given by name."""
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {name: item for name, item in inspect.signature(made).parameters.items() if item.kind in by_name}


def read_options(made: Any, options: Mapping[str, Any], what: str, without: Iterable[str] = ()) -> dict[str, Any]:
    """Options for the constructor of a class. Texts, as the command line gives them, become what its annotations say:
    whole numbers, numbers, true or false.

    Args:
        what: Whose options they are, for the messages: "metaworld".
        without: Parameters that are no options: they are given otherwise.

    Raises:
        ValueError: If there is no such option (names the nearest and all that there are), or a text is none of these.
    """
    known = {name: item for name, item in options_known(made).items() if name not in without}
    for name in options:
        check_choice(f"option of {what}", name, known)
    return {name: _read(name, value, known[name].annotation, what) for name, value in options.items()}


def _read(name: str, value: Any, kind: Any, what: str) -> Any:
    if isinstance(kind, str):  # from __future__ import annotations
        kinds = set(re.findall(r"\w+", kind))
    else:
        kinds = {getattr(one, "__name__", str(one)) for one in (get_args(kind) or (kind,))}
    if not isinstance(value, str) or "str" in kinds or kind is inspect.Parameter.empty:
        return value
    for expected, read in (("bool", _flag), ("int", int), ("float", float)):
        if expected in kinds:
            try:
                return read(value)
            except ValueError as error:
                words = {"bool": "true or false", "int": "a whole number", "float": "a number"}[expected]
                raise ValueError(f"{what}: {name}={value!r} is not {words}.") from error
    return value


def _flag(text: str) -> bool:
    if text.lower() in YES + NO:
        return text.lower() in YES
    raise ValueError(text)
