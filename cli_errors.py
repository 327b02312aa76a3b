"""What a user's mistake looks like on the command line: one line on stderr and an exit code."""

import contextlib
import errno
import os
import warnings
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from .cli_options import options_in
from .extras import ignore_library_warnings, remedy
from .options.fields import respelled
from .plugins import load_module


USER_ERRORS = (ValueError, KeyError, OSError)  # FileNotFoundError and a model that is not there are OSErrors
FAILED, REFUSED = 1, 2  # exit codes; an exception may bring its own as `exit_code`
EXTRAS = {
    "finetune": "train",
    "merge": "train",
    "record": "sim",
    "evaluate": "sim",
    "demo": "sim",
    "serve": "serve",
}  # all a verb needs
WAYS_OUT = {  # of errors of the operating system that say no more than what happened
    errno.ENOSPC: "make room, or give a place on another disk",
    errno.EDQUOT: "make room, or give a place on another disk",
    errno.EACCES: "give another place, or change its permissions",
    errno.EPERM: "give another place, or change its permissions",
    errno.EROFS: "give another place",
    errno.ENOTDIR: "a part of that path is a file, give another place",
    errno.EISDIR: "that is a folder, give a file",
    errno.ENAMETOOLONG: "give a shorter name",
}


def reason(error: BaseException) -> str:
    """What a user error says; of one that comes bare from the operating system also the file, and a way out."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    if isinstance(error, OSError) and error.strerror and str(error).startswith("[Errno"):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # of a copy the second file, not the one that is read
        file = error.filename2 if full and error.filename2 is not None else error.filename
        where = f"'{os.fsdecode(file)}': " if file is not None else ""
        way_out = WAYS_OUT.get(error.errno or 0)
        return f"{where}{error.strerror}{f': {way_out}' if way_out else ''}."
    return str(error)


class Group(TyperGroup):
    """Verbs whose user errors, and libraries that an extra would bring, are one line on stderr and an exit code."""

    def invoke(self, ctx):
        try:
            for name in ctx.params.get("imports") or ():
                load_module(name, f"--import {name}")
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of a pipe has gone, which click handles
        except USER_ERRORS as error:
            if ctx.params.get("traceback"):
                raise
            names = options_in(self.get_command(ctx, ctx.invoked_subcommand or ""))
            typer.echo(f"error: {respelled(' '.join(reason(error).split()), names)}", err=True)
            raise typer.Exit(getattr(error, "exit_code", REFUSED)) from error
        except ModuleNotFoundError as error:
            verb = ctx.invoked_subcommand
            missing = remedy(error.name, EXTRAS.get(verb or ""))
            if missing is None or ctx.params.get("traceback"):
                raise  # no extra brings it: a fault of the installation, or of this package
            told = str(error) if "pip install 'openvla[" in str(error) else f"openvla {verb} needs {missing}"
            typer.echo(f"error: {told}", err=True)
            raise typer.Exit(REFUSED) from error


@contextlib.contextmanager
def continued() -> Iterator[None]:
    """Where Ctrl-C stops a verb that continues when it is given again, it says so."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped: the same command continues.", err=True)
        raise


def show_warnings_as_lines(group: Any) -> None:
    """From now on a warning is one line on stderr, which names options as they are given on the command line."""
    verbs = getattr(group, "commands", {}).values()
    names = {name: option for verb in verbs for name, option in options_in(verb).items()}

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        typer.echo(f"warning: {respelled(' '.join(str(message).split()), names)}", err=True)

    setattr(warnings, "showwarning", show)  # noqa: B010 - mypy does not take it otherwise
    ignore_library_warnings()
