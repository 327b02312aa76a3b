"""From a dataclass of options to a verb of the command line."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Annotated, Any, get_args

import typer

from .options.fields import read_pairs


def options_of(kind: type) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Turn a function of a dataclass of options into a verb that has one option for each field, as `options.fields`
    describes them."""

    def decorate(function: Callable[[Any], None]) -> Callable[..., None]:
        items = fields(kind)
        parameters = sorted(map(_parameter, items), key=lambda parameter: parameter.default is not parameter.empty)

        def verb(**given: Any) -> None:
            for item in items:
                if item.metadata.get("pairs"):
                    given[item.name] = read_pairs(given[item.name] or [], item.metadata["flag"])
            options = kind(**given)
            execute_root()
            function(options)

        verb.__name__, verb.__doc__ = function.__name__, function.__doc__
        verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return verb

    return decorate


def _parameter(item: Any) -> inspect.Parameter:
    about = item.metadata
    kind = list[str] | None if about.get("pairs") else item.type
    if kind != list[str]:  # which is given several times; other lists and mappings by commas
        kind = str | None if str in get_args(kind) else kind
    default = None if item.default is MISSING else item.default
    flags = [about["flag"]] if about.get("flag") else []
    shown = about.get("shown") or default is not None
    if about.get("argument"):
        info = typer.Argument(help=about["help"])
    else:
        metavar = "NAME=VALUE" if about.get("pairs") else about.get("metavar")
        info = typer.Option(*flags, help=about["help"], show_default=shown, metavar=metavar)
    needed = item.default is MISSING and item.default_factory is MISSING
    return inspect.Parameter(
        item.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if needed else default,
        annotation=Annotated[kind, info],
    )


def execute_root() -> None:
    """Execute the root of the package, where `openvla_light` has put it off."""
    sys.modules[str(__package__)].__all__  # noqa: B018 - to ask for a name is enough


def options_in(verb: Any) -> dict[str, str]:
    """{name in Python: option of the command line} of a verb; empty without one."""
    parameters = verb.params if verb is not None else []
    return {item.name: item.opts[0] for item in parameters if item.param_type_name == "option"}
