"""Environments in processes of their own: they run side by side, and one that breaks breaks nothing else."""

import contextlib
import multiprocessing
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ..observation import Observation
from .environment import Environment, check_expert, check_form, check_observation, check_step, standstill


class EnvironmentFailure(RuntimeError):
    """What an environment died of, in the words of its own process."""


class Checked:
    """Answers of an environment, looked at where they come from: what is none ends one episode, and no evaluation."""

    def __init__(self, environment: Environment):
        self._environment = environment
        self._first: dict[tuple[Any, ...], Observation] = {}  # of each task and variation
        self._case: tuple[Any, ...] = ()

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "standstill":
            return standstill(self._environment)
        found = getattr(self._environment, method)(*arguments)
        if method == "reset":
            self._case, found = arguments[1:], check_observation(found)
            check_form(found, self._first.setdefault(self._case, found), method)
        elif method == "step":
            found = check_step(found)
            check_form(found[0], self._first.get(self._case, found[0]), method)
        elif method == "expert_action":
            found = check_expert(self._environment, found)
        return found


def _serve(make: Callable[[], Environment], connection: Connection) -> None:
    """Answer (method, arguments) with (True, result) or (False, what went wrong), until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all: this one ends, and the one that asked says so
    environment, calls = None, None
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            method, arguments = connection.recv()
            try:
                if environment is None or calls is None:
                    environment = make()
                    calls = Checked(environment)
                answer = (True, calls.call(method, *arguments))
            except Exception as error:  # whatever it is belongs to the process that asked
                answer = (False, "".join(traceback.format_exception_only(error)).strip())
            try:
                connection.send(answer)
            except (TypeError, AttributeError, pickle.PicklingError) as error:  # a result that cannot be sent
                connection.send((False, f"{type(error).__name__}: {error}"))
    if environment is not None:
        environment.close()


def _preload() -> list[str]:
    """What the server of the processes imports, once for all: what environments need, neither torch nor transformers. A
    script other than our command is executed again by each process, and may import all of the package there."""
    main: Any = sys.modules["__main__"]
    spec, function = getattr(main, "__spec__", None), getattr(main, "main", None)
    again = not spec.name.endswith("__main__") if spec is not None else hasattr(main, "__file__")
    ours = getattr(function, "__module__", None) == "openvla_console"
    return ["openvla" if again and not ours else "openvla_light", __name__]


class EnvironmentProcess:
    """An environment behind a pipe: `ask` now, `answer` later.

    Args:
        make: Makes the environment; has to be picklable.
        timeout: Seconds after which an answer counts as a failure.
    """

    def __init__(self, make: Callable[[], Environment], timeout: float = 120.0):
        self.make, self.timeout = make, timeout
        self._process: Any = None
        self._connection: Any = None

    def ask(self, method: str, *arguments: Any) -> None:
        """Call a method of the environment; starts the process where there is none.

        Raises:
            EnvironmentFailure: If the process died.
        """
        if self._process is None:
            # Forked from a clean server: no threads, devices or graphics of this process, and nothing imported twice.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(_preload())
            connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(self.make, theirs), daemon=True)
            process.start()  # one that cannot start (a script without `if __name__ == "__main__"`) is none to stop
            theirs.close()
            self._process, self._connection = process, connection
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise self._died() from error

    def answer(self) -> Any:
        """What the last `ask` gave.

        Raises:
            EnvironmentFailure: If the method raised, the process died or took too long. The process is stopped then;
                the next `ask` starts another.
        """
        try:
            if not self._connection.poll(self.timeout):
                raise EnvironmentFailure(f"no answer in {self.timeout:g} s")
            done, result = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        except EnvironmentFailure:
            self.stop()
            raise
        if not done:
            self.stop()
            raise EnvironmentFailure(result)
        return result

    def _died(self) -> EnvironmentFailure:
        self._process.join(timeout=1)
        code = self._process.exitcode
        self.stop()
        return EnvironmentFailure(f"the process of the environment died (exit code {code})")

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._connection.close()
            self._process.join(timeout=1)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process = self._connection = None
