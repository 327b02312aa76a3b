"""The robot's side of `openvla serve`, without torch: clients for both protocols, and `Guard`, which keeps an arm safe
when the network is not.

What is on the wire and what actions mean is read by the files of the package `openvla` (`serving/wire.py`,
`action_spec.py`), which its wheel holds too.
"""

from pathlib import Path


if not Path(__file__).with_name("wire.py").exists():  # a checkout, where the shared files stand
    _root = Path(__file__).resolve().parents[3]
    __path__ += [str(_root), str(_root / "serving")]

from .action_spec import ActionSpec
from .async_client import AsyncClient, connect_async
from .audit import Audit, digest
from .client import Client, connect
from .command import Command, NoAction, State
from .errors import BadAnswer, NoAnswer, NotReached, Refused
from .guard import Guard
from .limits import Limits
from .messages import Answer, Dataset, ServerInfo
from .transport import Ask, Reply, ThreadTransport, Transport


__version__ = "0.1.0"
__all__ = [
    "ActionSpec",
    "Answer",
    "Ask",
    "AsyncClient",
    "Audit",
    "BadAnswer",
    "Client",
    "Command",
    "Dataset",
    "Guard",
    "Limits",
    "NoAction",
    "NoAnswer",
    "NotReached",
    "Refused",
    "Reply",
    "ServerInfo",
    "State",
    "ThreadTransport",
    "Transport",
    "connect",
    "connect_async",
    "digest",
]
