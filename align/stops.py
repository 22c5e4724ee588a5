"""Stops that a signal asks for, and the time that a piece of work may take.

SIGTERM, SIGINT and SIGUSR1 ask for the same: finish the step at hand and save. What is not done within a grace time is
abandoned: `Stopped` is raised in the main thread, but only within `cut()`, around work that changes nothing that is
kept. Several processes abandon a step together: see `align.launch.World`.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, Literal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AGAIN = 0.2
"""Seconds until an alarm that could not be raised, or that something swallowed, rings again."""

Region = Literal["cut", "meetings", "whole"]


@contextlib.contextmanager
def heard(act: Callable[[int, FrameType | None], Any], numbers: Iterable[int] = SIGNALS) -> Iterator[None]:
    """Have `act` called at these signals within the block. Other threads than the main one hear none."""
    before: dict[int, Any] = {}
    try:
        for number in numbers if _main_thread() else ():
            before[number] = signal.signal(number, act)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupting() -> contextlib.AbstractContextManager[None]:
    """Let SIGTERM and SIGUSR1 interrupt the block as Ctrl-C does, where nothing else heeds them."""
    asked = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    return heard(signal.default_int_handler, asked)


@contextlib.contextmanager
def ending(server: Any) -> Iterator[None]:
    """Let signals, however often they come, end a uvicorn server in order: requests under way are answered first."""

    def end(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    server.capture_signals = contextlib.nullcontext
    with heard(end):
        yield


class Stopped(KeyboardInterrupt):
    """A stop is due: what is at hand is abandoned. Who does not know of stops takes it for an interruption.

    Args:
        agreed: all processes have abandoned it.
    """

    def __init__(self, *, agreed: bool = False) -> None:
        super().__init__("a stop is due")
        self.agreed = agreed


class Overdue(Exception):
    """Work within `time_limit` was not done in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not done within {seconds:g} s")
        self.seconds = seconds


class _Alarms:
    """The interval timer of the process, as there is only one: what rings when, and what may be interrupted now."""

    def __init__(self) -> None:
        self.pending: list[tuple[float, Callable[[], None]]] = []
        self.regions: list[Region] = []
        self._before: Any = None
        self._timer = (0.0, 0.0)  # of whoever used it before, as a test's time limit: its seconds left, and when

    def add(self, at: float, ring: Callable[[], None]) -> tuple[float, Callable[[], None]]:
        if not self.pending:
            self._before = signal.signal(signal.SIGALRM, self._ring)
            self._timer = (signal.getitimer(signal.ITIMER_REAL)[0], time.monotonic())
        entry = (at, ring)
        self.pending.append(entry)
        self._arm()
        return entry

    def remove(self, entry: tuple[float, Callable[[], None]]) -> None:
        self.pending = [other for other in self.pending if other is not entry]
        self._arm()
        if not self.pending:
            signal.signal(signal.SIGALRM, self._before)
            if self._timer[0]:
                left = self._timer[0] - (time.monotonic() - self._timer[1])
                signal.setitimer(signal.ITIMER_REAL, max(left, AGAIN))

    def _arm(self) -> None:
        left = min((at for at, _ in self.pending), default=math.inf) - time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.0 if math.isinf(left) else max(left, AGAIN))

    def _ring(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        try:
            for at, ring in reversed(self.pending):
                if now >= at:
                    ring()
        finally:
            self._arm()


_ALARMS = _Alarms()


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def region(kind: Region) -> Iterator[None]:
    """Say what a due stop may do within the block, inner blocks before outer ones.

    "cut": raise `Stopped` anywhere in it. "meetings": only where all processes meet. "whole": nothing, which is also
    what holds outside of all blocks.
    """
    if not _main_thread():
        yield
        return
    depth = len(_ALARMS.regions)
    try:
        _ALARMS.regions.append(kind)  # within try: a stop may be raised as soon as this is done
        yield
    finally:
        del _ALARMS.regions[depth:]


def cut() -> contextlib.AbstractContextManager[None]:
    """Let a due stop interrupt the block, which changes nothing that is kept."""
    return region("cut")


def whole() -> contextlib.AbstractContextManager[None]:
    """Let no stop interrupt the block."""
    return region("whole")


class Stop:
    """What this process was asked, from entering to leaving; only the main thread can be asked.

    Args:
        grace: seconds from being asked until what is at hand is abandoned.
    """

    current: Stop | None = None

    def __init__(self, grace: float) -> None:
        self.grace, self.asked, self.at = grace, "", math.inf
        self._alarm: Any = None
        self._left = contextlib.ExitStack()

    def __enter__(self) -> Stop:
        if _main_thread():
            self._left.enter_context(heard(self._ask))
            self._left.callback(setattr, Stop, "current", Stop.current)
            Stop.current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.close()
        if self._alarm is not None:
            _ALARMS.remove(self._alarm)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked == "SIGINT" and number == signal.SIGINT:  # launchers repeat a SIGTERM; a person repeats ^C
            raise KeyboardInterrupt
        if not self.asked:
            self.at = time.monotonic() + self.grace
            self._alarm = _ALARMS.add(self.at, self._ring)
        self.asked = signal.Signals(number).name

    def _ring(self) -> None:
        if _ALARMS.regions and _ALARMS.regions[-1] == "cut":
            raise Stopped


def due() -> bool:
    """Whether what is at hand is to be abandoned at a meeting, as it may be here."""
    stop = Stop.current
    here = bool(_ALARMS.regions) and _ALARMS.regions[-1] != "whole"
    return here and stop is not None and time.monotonic() >= stop.at


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Interrupt the block after some seconds. Other threads than the main one cannot be interrupted, nor can a call
    that does not come back to Python.

    Raises:
        Overdue: it was not done.
    """
    if seconds is None or not _main_thread():
        yield
        return

    def ring() -> None:
        raise Overdue(seconds)

    alarm = _ALARMS.add(time.monotonic() + seconds, ring)
    try:
        yield
    finally:
        try:
            _ALARMS.remove(alarm)
        except Overdue:  # it rang just now
            _ALARMS.remove(alarm)
            raise
