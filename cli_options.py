"""From a dataclass of options to a verb of the command line."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from .options.fields import choices, headings, read_pairs


class Verb(TyperCommand):
    """A verb whose --help has its options under headings, those that have to be given first."""

    def format_options(self, ctx, formatter):
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Needed": []}
        for item in self.get_params(ctx):
            if (record := item.get_help_record(ctx)) is None:
                continue
            if item.param_type_name == "argument":
                sections["Arguments"].append(record)
            elif item.required:
                sections["Needed"].append(record)
            else:
                sections.setdefault(getattr(item, "rich_help_panel", None) or "Options", []).append(record)
        sections["Options"] = sections.pop("Options")  # --help among them: last
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def options_of(kind: type) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Turn a function of a dataclass of options into a verb that has one option for each field, as `options.fields`
    describes them."""

    def decorate(function: Callable[[Any], None]) -> Callable[..., None]:
        items = fields(kind)
        of = {item.name: item for item in items}
        shown = [_parameter(of[name], heading) for name, heading in headings(kind).items()]
        parameters = sorted(shown, key=lambda parameter: parameter.default is not parameter.empty)

        def verb(**given: Any) -> None:
            for item in items:
                value = given[item.name]
                if item.metadata.get("pairs"):
                    given[item.name] = read_pairs(value or [], item.metadata["flag"])
                elif isinstance(value, str):
                    _check_given(item, value)
                    spelled = {str(choice): choice for choice in choices(item.type)}
                    given[item.name] = Path(value) if _is_path(item) else spelled.get(value, value)
            options = kind(**given)
            execute_root()
            function(options)

        verb.__name__, verb.__doc__ = function.__name__, function.__doc__
        verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return verb

    return decorate


def _is_path(item: Any) -> bool:
    return Path in (item.type, *get_args(item.type))


def _check_given(item: Any, value: str) -> None:
    """Raise a `ValueError` for a value that is empty, as a variable of the shell that is not set: a path would be the
    working directory, others be taken for the default. Also for one that Python could not read, told that all text is
    ASCII: libraries take it for a damaged file."""
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(
            f"{item.name}={ascii(value)}: there are characters that the encoding of this terminal ({encoding}) does "
            "not have: export PYTHONUTF8=1, or LC_ALL=C.UTF-8."
        )
    if value.strip() or value == item.default or item.name == "instruction":  # which is read, in words of its own
        return
    otherwise = "" if item.default is MISSING else ", or leave it out"
    raise ValueError(f"{item.name}={value!r}: the value is empty (a variable of the shell?): give one{otherwise}.")


def _parameter(item: Any, heading: str | None) -> inspect.Parameter:
    about = item.metadata
    kind = list[str] | None if about.get("pairs") else item.type
    known = choices(kind)  # texts here: `check_options` refuses others, with the nearest of them
    if known:
        kind = str | None if type(None) in get_args(kind) else str
    if kind != list[str]:  # which is given several times; other lists and mappings by commas
        kind = str | None if {str, Path} & set(get_args(kind)) else str if kind is Path else kind
    default = None if item.default is MISSING else str(item.default) if isinstance(item.default, Path) else item.default
    flags = [about["flag"]] if about.get("flag") else []
    shown = about.get("shown") or default is not None
    if about.get("argument"):
        info = typer.Argument(help=about["help"])
    else:
        metavar = f"<{'|'.join(map(str, known))}>" if known else about.get("metavar")
        metavar = "NAME=VALUE" if about.get("pairs") else "<path>" if _is_path(item) else metavar
        info = typer.Option(*flags, help=about["help"], show_default=shown, metavar=metavar, rich_help_panel=heading)
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
