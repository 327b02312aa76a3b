"""The robot's side of `openvla serve`, without torch: `Guard`, which keeps an arm safe when the network is not.

What actions mean is read by the file of the package `openvla` (`action_spec.py`), which its wheel holds too.
"""

from pathlib import Path


if not Path(__file__).with_name("action_spec.py").exists():  # a checkout, at whose root the shared files stand
    __path__.append(str(Path(__file__).resolve().parents[3]))

from .action_spec import ActionSpec
from .audit import Audit, digest
from .guard import Command, Guard, NoAction, State
from .limits import Limits
from .transport import Ask, Reply, ThreadTransport, Transport


__version__ = "0.1.0"
__all__ = [
    "ActionSpec",
    "Ask",
    "Audit",
    "Command",
    "Guard",
    "Limits",
    "NoAction",
    "Reply",
    "State",
    "ThreadTransport",
    "Transport",
    "digest",
]
