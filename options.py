"""Fields of dataclasses that the command line shows: a default and a help text, written once."""

from dataclasses import field
from typing import Any


def option(default: Any, text: str) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": text})


def required(text: str) -> Any:
    """A field without a default."""
    return field(metadata={"help": text})
