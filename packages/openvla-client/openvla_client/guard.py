"""The guard of a control loop: an action for each step in time, and a safe one where there is none."""

import datetime
import itertools
import math
import secrets
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from .action_spec import ActionSpec
from .audit import digest as content_digest
from .checks import is_number, numbers, seconds, whole
from .command import Command, NoAction, State, held
from .forks import call_in_forks
from .limits import Limits
from .messages import decode
from .plan import EPSILON, Early, Plan, Stale
from .sleep import Sleep
from .transport import Ask, Transport, called


class Guard:
    """Asks for actions and gives one for each step of a control loop, none of them stale or executed twice.

    Call `step` once in each control period; `reset` and `reconnected` may come from other threads and from signals. The
    state is by the age of the newest observation that was answered:

    - OK: at most `max_age` (plus the steps between two requests).
    - DEGRADED: older, or nothing is answered yet. Of a chunk the actions that are due are still executed.
    - STALLED: `stalled_after` seconds after the last action of the answer was due. The fallback is executed.
    - DEAD: `dead_after` seconds after it, or after so long a pause of the loop. Nothing acts before `reset`, whatever
      is answered.

    Args:
        transport: A function observation -> actions, (A,), (K, A) or an object with `.actions`, called in a thread of
            its own (give it a timeout); or a `Transport`.
        spec: What the numbers of an action mean; None: unknown.
        hz: Steps in a second. Default: that of `spec`; another is a warning, as the robot moves so much faster.
        max_age: Seconds. An action acts from `max_age` before to `max_age` after it is due; action i of an answer is
            due i periods after its observation was seen. Default: two control periods.
        wait: Seconds that `step` waits for the answer to its own observation. Default: half a control period; 0 where
            the server takes longer than that anyway.
        ask_every: Ask so many steps after the last time, or at once where no action is left; more than 1 for open-loop
            chunks.
        execute: Of each answer only the first so many actions count. Default: all.
        commit: So many actions are sent with each request, as those that are executed while the server thinks: it
            answers with how they go on. As many steps as an answer takes, fewer than an answer has; for models that
            learned it. They are those of the last answer, as `limits` will have them, and where none is left, before
            the first answer too, what the fallback "hold" executes: a robot that stood still is then not taken for one
            that moved. Fewer are sent where that is not certain before (`Limits.ahead`; nothing to hold is known; an
            observation of more than a period ago). One observation is asked at a time: an answer in between would
            change what is executed. One that is not answered is waited for until `stalled_after` seconds after the last
            action was due. A `transport` has to send them: `client.guard(commit=n)`, or one of your own that reads
            `Ask.committed`.
        stalled_after, dead_after: Seconds, see above. Defaults: five control periods (at least `max_age`), 5 seconds
            (at least twice `stalled_after`).
        fallback: "hold": no motion where an action is a change, the last target where it is a place, grippers as they
            are. "raise": `NoAction`. Default: "hold" where `spec` is known.
        limits: What an action may be at most.
        audit: Takes one mapping for each step, such as `Audit(path).write`; must neither block nor raise.
        clock: Seconds of this machine that only go forward.
        slept: Seconds that the clock did not count since the last call, as the computer slept. After sleep nothing that
            was asked or seen before acts. Default: of `time.monotonic` on Linux, see `Sleep`; 0 elsewhere.
        digest: Names an observation in the audit.

    Raises:
        ValueError: If the arguments do not fit each other.
    """

    REPLIES = 64  # that one step looks at

    def __init__(
        self,
        transport: Transport | Callable[[Any], Any],
        spec: ActionSpec | None = None,
        hz: float | None = None,
        *,
        max_age: float | None = None,
        wait: float | None = None,
        ask_every: int = 1,
        execute: int | None = None,
        commit: int = 0,
        stalled_after: float | None = None,
        dead_after: float | None = None,
        fallback: str | None = None,
        limits: Limits | None = None,
        audit: Callable[[Mapping[str, Any]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        digest: Callable[[Any], str] = content_digest,
        slept: Callable[[], float] | None = None,
    ):
        if not (spec is None or isinstance(spec, ActionSpec)):
            raise ValueError(f"spec={spec!r:.100}: expected an ActionSpec, such as client.info.datasets[KEY].spec.")
        if not (limits is None or isinstance(limits, Limits)):
            raise ValueError(f"limits={limits!r:.100}: expected Limits(step={{...}}, place={{...}}).")
        for name, function in (("audit", audit), ("clock", clock), ("digest", digest), ("slept", slept)):
            if not callable(function) and not (function is None and name in ("audit", "slept")):
                write = f", such as {name}.write" if hasattr(function, "write") else ""
                raise ValueError(f"{name}={function!r:.100}: expected a function{write}.")
        hz = spec.hz if hz is None and spec is not None else hz
        if not is_number(hz) or not 0 < hz < math.inf:
            unknown = " What the actions mean (spec) has no rate: give that of the recordings." * (hz is None)
            raise ValueError(f"hz={hz!r:.100}: expected the steps of the control loop in a second, above 0.{unknown}")
        if spec is not None and spec.hz is not None and not math.isclose(hz, spec.hz):
            warnings.warn(
                f"hz={hz:g}: these actions are {spec.hz:g} a second, by their contract. At {hz:g} a robot moves "
                f"{hz / spec.hz:.3g} times as fast. Leave hz out, or give a spec with the hz that the model learned.",
                stacklevel=2,
            )
        self.period = 1.0 / float(hz)
        self.max_age = seconds("max_age", 2 * self.period if max_age is None else max_age)
        self.wait = seconds("wait", self.period / 2 if wait is None else wait)
        usual = max(5 * self.period, self.max_age)
        self.stalled_after = seconds("stalled_after", usual if stalled_after is None else stalled_after, self.max_age)
        usual = max(5.0, 2 * self.stalled_after)
        self.dead_after = seconds("dead_after", usual if dead_after is None else dead_after, self.stalled_after)
        self.fallback = ("raise" if spec is None else "hold") if fallback is None else fallback
        if self.fallback not in ("hold", "raise"):
            raise ValueError(f"fallback={fallback!r}: expected 'hold' or 'raise'.")
        if spec is None and (self.fallback == "hold" or limits is not None):
            raise ValueError("fallback='hold' and limits need spec: what the numbers of an action mean.")
        ask_every, commit = whole("ask_every", ask_every, 1), whole("commit", commit, 0)
        execute = None if execute is None else whole("execute", execute, 1)
        if execute is not None and commit >= execute:
            raise ValueError(f"commit={commit}, execute={execute}: nothing of an answer would be new; execute more.")
        if spec is not None and limits is not None:
            limits.check(spec)
        self.spec, self.limits, self.ask_every, self.commit = spec, limits, ask_every, commit
        self._names = () if spec is None else spec.names
        if spec is not None and not commit and (far := {*spec.places} - {*(limits or Limits()).step}):
            warnings.warn(
                f"{', '.join(name for name in spec.names if name in far)}: places without a limit of their step. The "
                "first that acts of an answer that is late may be many steps away, and the robot goes there in one. "
                "Give limits=Limits(step={name: the most of one step}); math.inf where its controller goes slowly.",
                stacklevel=2,
            )
        if not (isinstance(transport, Transport) or callable(transport)):
            raise ValueError(
                f"transport: a {type(transport).__name__}, expected a function, or submit, poll, close, connection."
            )
        if commit and not isinstance(transport, Transport):
            raise ValueError(
                f"commit={commit}: a function is given observations alone. Take client.guard(commit={commit}), or give "
                "a Transport that sends Ask.committed."
            )
        if not isinstance(transport, Transport):
            transport = called(transport)
            weakref.finalize(self, transport.close).atexit = False  # or its thread, which holds it, never ends
        self._transport = transport
        self._connection = self._transport.connection
        self._audit, self._clock, self._digest = audit, clock, digest
        self._slept = slept or (Sleep().since_last if clock is time.monotonic else lambda: 0.0)
        self._plan = Plan(self.period, self.max_age, None if spec is None else spec.action_dim, execute)
        self._ids = itertools.count()
        self._lock = threading.RLock()  # a signal may come in a step
        self._in_step, self._changes = False, list[Callable[[], None]]()  # those that came in it
        self._before = 0.0  # the last time that was read
        self._seen_at = -math.inf  # of what was asked last, in whatever episode: its motion may be executed
        self._since: tuple[float, int] | None = None  # time and step of the newest observation that was answered
        self._step, self._closed = 0, False
        self.reset()
        call_in_forks(self._forked)

    @property
    def epoch(self) -> int:
        """Higher after each `reset` and `reconnected`; answers to what was asked before never act."""
        return self._plan.epoch

    def reset(self, start: Sequence[float] | np.ndarray | None = None, *, wake: bool = True) -> None:
        """An episode begins, or an operator has looked at a DEAD robot.

        Args:
            start: (A,) the action that keeps the robot where it is and its grippers as they are: what the fallback
                holds before anything is executed. Without it the fallback is `NoAction` until then, where an action
                has places or grippers.
            wake: False where a program begins the next episode and nobody looks: DEAD stays DEAD, and the silence
                so far counts, also that of a loop that has not come to its next step yet.
        """
        dims = self._plan.dims
        held = numbers(start, "start", dims, names=self._names)

        def begin() -> None:
            if wake:
                self._plan.begin()
                self.state = State.DEGRADED
                self._since = None
            else:
                self._plan.clear()
                self.state = State.DEGRADED if self.state is State.OK else self.state
                self._since = None if self._since is None else (self._since[0], self._since[1] - self._step)
            self._last, self._stopped = held, False
            self._step, self._asked_at = 0, -self.ask_every

        self._between_steps(begin)

    def reconnected(self) -> None:
        """The connection is another one: what was answered over the one before does not act any more. The episode
        continues, and so does the age of the newest observation that was answered. A transport that counts its
        connections says so by itself."""
        self._between_steps(self._plan.clear)

    def _between_steps(self, change: Callable[[], None]) -> None:
        """At once; where this very thread is in a step, as a signal may be, behind it. Nothing acts in that step."""
        with self._lock:
            if self._in_step:
                self._changes.append(change)
            else:
                change()

    def _forked(self) -> None:
        """What was asked and answered before acts in the other process. A thread of that one may be in a step."""
        self._lock, self._in_step, self._changes = threading.RLock(), False, []
        self._plan.epoch = secrets.randbits(32)  # of no other guard
        self._plan.clear()

    def close(self) -> None:
        """Nothing is asked and no answer acts any more, also in a step that waits: the fallback is executed. May come
        from other threads and from signals, and waits for nothing."""
        self._closed = True
        self._transport.close()

    # A step -----------------------------------------------------------------------------------------------------------

    def step(
        self,
        observation: Any,
        *,
        seen_at: float | None = None,
        position: Sequence[float] | np.ndarray | None = None,
    ) -> Command:
        """What to execute now; returns after at most `wait` seconds.

        Args:
            observation: For the transport; not to be changed afterwards.
            seen_at: When it was seen, by `clock`. Default: now. What was not seen later than what was asked before is
                not asked: its motion would be executed twice.
            position: (A,) where the robot stands, in the units of the actions, NaN where that is unknown: for limits.

        Raises:
            NoAction: If there is no action, and the fallback is "raise" or not known yet.
            ValueError: If an argument has another shape. Nothing was asked, and it counts as no step.
        """
        here = numbers(position, "position", self._plan.dims, finite=False, names=self._names)
        if seen_at is not None and not is_number(seen_at):
            raise ValueError(f"seen_at={seen_at!r:.100}: expected seconds of the guard's clock.")
        seen_at = None if seen_at is None else float(seen_at)
        with self._lock:
            if self._in_step:
                raise RuntimeError("step() within a step, as from a signal: one loop calls it, one after the other.")
            self._in_step = True
            try:
                command, step = self._stepped(observation, seen_at, here)
            finally:
                self._in_step = False
                while self._changes:
                    self._changes.pop(0)()
        if command.action is None:
            raise NoAction(f"No action at step {step}, {command.state}: {command.reason}.", command)
        return command

    def _stepped(self, observation: Any, seen_at: float | None, here: np.ndarray | None) -> tuple[Command, int]:
        step, epoch = self._step, self.epoch
        self._step += 1
        self._see_connection()
        now = self._now(step)
        new, seen_at = seen_at is None or not seen_at <= self._seen_at, now if seen_at is None else seen_at
        arrived: list[dict[str, Any]] = []
        self._collect(arrived)
        # Before anything is asked: after a long silence not even an answer at once moves a robot.
        self.state = self._next_state(self._age(step, now))
        asked = self._ask(step, now, seen_at, observation, here) if new else None
        seen = None if self._audit is None else self._named(observation)  # while the answer is on its way
        if asked is not None:
            passed, wait = max(0.0, self._clock() - now), self.wait
            wait = wait if asked.committed is None else self._wait_committed(now, seen_at)
            self._collect(arrived, asked.id, wait - passed)
        self._see_connection()
        now = self._now(step)
        command = self._decide(step, now, here)
        if command.source != "answer" and self.epoch != epoch:
            command = replace(command, reason="another connection, a clock that went back, or sleep: a new epoch")
        elif command.source != "answer" and not self._usable(seen_at, now):
            command = replace(command, reason=f"seen_at={seen_at} is not a time of the guard's clock, {now}")
        elif command.source != "answer" and not new:
            command = replace(command, reason=f"nothing new was seen: {command.reason}")
        refused = [reply["refused"] for reply in arrived if reply["refused"]]
        if command.source != "answer" and refused:  # a robot that stands still shall say why
            command = replace(command, reason=f"{command.reason} ({refused[-1]})")
        if self._audit is not None:
            asked_id = None if asked is None else asked.id
            request = {"seen": seen, "seen_at": seen_at, "asked": asked_id, "arrived": arrived}
            at = datetime.datetime.now(datetime.UTC).isoformat()  # for people; nothing is decided by it
            self._audit({"at": at, "clock": now, "epoch": self.epoch, "step": step, **request, **command.record()})
        self._stopped = command.action is None
        if command.action is not None:
            self._last = command.action.copy()
        return command, step

    def _named(self, observation: Any) -> str:
        """For the audit: an image that cannot be read (a file that was closed) must not end the control loop."""
        try:
            return self._digest(observation)
        except Exception as error:  # of whatever was given
            return f"unreadable: {type(error).__name__}: {error}"[:200]

    def _see_connection(self) -> None:
        if (connection := self._transport.connection) != self._connection:
            self._connection = connection
            self._plan.clear()

    def _now(self, step: int) -> float:
        """The clock. Where it goes back or the computer slept, nothing that was timed before can be trusted."""
        now, slept = float(self._clock()), self._slept()
        if not math.isfinite(now):
            raise ValueError(f"The clock says {now}: expected seconds.")
        if now < self._before:
            self._plan.set_back(now)
            self._seen_at = -math.inf
        if self._since is None:  # of an episode that begins now; the age of what was answered before is forgotten
            self._since = (now, step)
        elif slept:
            self._plan.clear()
            self._since = (min(self._since[0], now) - slept, self._since[1])
        elif now < self._before:
            self._plan.clear()
            self._since = (now, self._since[1])
        elif now - self._before > self.dead_after + EPSILON:  # what is left of a long chunk wakes nobody either
            self.state = State.DEAD
        if slept:  # what was seen before looks young by the clock: only what is seen from now on is asked
            self._seen_at = now
        self._before = now
        return now

    def _ask(self, step: int, now: float, seen_at: float, observation: Any, here: np.ndarray | None) -> Ask | None:
        if self._closed or self.state is State.DEAD or not self._usable(seen_at, now):
            return None
        if step < self._asked_at + self.ask_every:
            with suppress(Stale):
                self._plan.next(step, now)
                return None
        # The answer to what was asked before would change what is executed: nothing could be committed.
        if self.commit and self._plan.awaits(step, now, self.stalled_after + self._plan.covered):
            return None
        self._asked_at, self._seen_at = step, seen_at
        committed = self._committed(step, now, seen_at, here)
        asked = Ask(self.epoch, next(self._ids), step, observation, committed)
        self._plan.asked(asked, seen_at, alone=self.commit > 0)
        with suppress(Exception):  # whoever sends it says what is wrong with it
            decode(observation)
        self._transport.submit(asked)
        return asked

    def _wait_committed(self, now: float, seen_at: float) -> float:
        """Seconds for which the answer to what was seen at `seen_at` has its action 0 in this step, where what is
        committed begins; at most `wait`. Later that one would be left out. Below 0: it has it in none."""
        return min(self.wait, seen_at + self.period - now)

    def _committed(self, step: int, now: float, seen_at: float, here: np.ndarray | None) -> np.ndarray | None:
        """(n, A) what is executed in this step and those after it, whatever is answered; None where that is nothing, or
        not certain. All of an answer is never committed: it would say nothing new."""
        wait = self._wait_committed(now, seen_at)
        if wait < -EPSILON:
            return None
        newest = self._plan.newest
        count = self.commit if newest is None else min(self.commit, len(newest.actions) - 1)
        try:
            ahead = self._plan.ahead(step, now)
            # It is decided once the answer was waited for: what is too old then, or missed, is not executed.
            if len(self._plan.ahead(step, now + max(0.0, wait))) != len(ahead):
                return None
        except Early:
            return None
        ahead = ahead[:count]
        certain = ahead
        if self.limits is not None and self.spec is not None:
            certain = self.limits.ahead(ahead, self.spec, self._target(here), here)
        if self.fallback == "hold" and self.spec is not None and len(certain) == len(ahead) < count:
            hold = held(self.spec, certain[-1] if len(certain) else self._last)
            if hold is not None:
                certain = np.concatenate([certain.reshape(-1, len(hold)), [hold] * (count - len(certain))])
        return certain if len(certain) else None

    def _target(self, here: np.ndarray | None) -> np.ndarray | None:
        """(A,) from which the step of a place is measured: what was executed last. An arm that stopped by its own means
        stands elsewhere, and that target would pull it back: where it stands, as far as that is known."""
        if not self._stopped or self._last is None or here is None:
            return self._last
        return np.where(np.isfinite(here), here, self._last)

    def _usable(self, seen_at: float, now: float) -> bool:
        """A time to come, or one long ago, is of another clock."""
        return now - self.dead_after <= seen_at <= now

    def _collect(self, arrived: list[dict[str, Any]], until: int | None = None, wait: float = 0.0) -> None:
        """Take replies: what is there, or for at most `wait` seconds up to the one with the id `until`."""
        begin, left = self._clock(), max(0.0, wait)
        for _ in range(self.REPLIES):
            reply = self._transport.poll(left)
            if reply is None:
                return
            refused = self._plan.accept(reply)
            arrived.append({"epoch": reply.epoch, "id": reply.id, "refused": refused})
            if not refused and (newest := self._plan.newest) is not None:
                self._since = (newest.time, newest.step)
            if until is not None:
                passed = self._clock() - begin
                if reply.id == until or passed < 0:  # it went back: nobody knows how long this took
                    return
                left = max(0.0, wait - passed)

    def _decide(self, step: int, now: float, position: np.ndarray | None) -> Command:
        age = self._age(step, now)
        self.state = self._next_state(age)
        if self.state is State.DEAD:
            return self._fall_back(age, "too long without an answer, nothing acts before reset()")
        if self._closed:
            return self._fall_back(age, "this guard is closed")
        if self._changes:
            return self._fall_back(age, "reset() or reconnected() came in this step")
        try:
            newest, index = self._plan.take(step, now)
        except Stale as stale:
            return self._fall_back(age, str(stale))
        answered, reason = newest.actions[index], ""
        action, limited = answered, list[str]()
        if self.limits is not None and self.spec is not None:
            try:
                action, limited = self.limits.apply(answered, self.spec, self._target(position), position)
                if limited and self.limits.refuse:
                    reason = f"beyond the limits of {', '.join(limited)}"
            except ValueError as error:
                reason = str(error)
        if reason:
            return replace(self._fall_back(age, reason), id=newest.id, index=index, answered=answered.copy())
        return Command(
            action.copy(), "answer", self.state, age, newest.id, index, answered.copy(), limited=tuple(limited)
        )

    def _age(self, step: int, now: float) -> float:
        """By the clock or by steps, whichever is more."""
        assert self._since is not None
        return max(now - self._since[0], (step - self._since[1]) * self.period)

    def _next_state(self, age: float) -> State:
        overdue = age - self._plan.moves - EPSILON
        if self.state is State.DEAD or overdue > self.dead_after:
            return State.DEAD
        if overdue > self.stalled_after:
            return State.STALLED
        fresh = age <= self.max_age + (self.ask_every - 1) * self.period + EPSILON
        return State.OK if fresh and self._plan.newest is not None else State.DEGRADED

    def _fall_back(self, age: float, reason: str) -> Command:
        if self.fallback == "hold" and self.spec is not None:
            if (action := held(self.spec, self._last)) is not None:
                return Command(action, "hold", self.state, age, reason=reason)
            reason += " (and nothing was executed that could be held: reset(start=...) says it)"
        return Command(None, "none", self.state, age, reason=reason)
