"""Stop signals of this process, on their way from its handlers to the loop that watches over the ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from .job import STOP_SIGNALS

_SAME_REQUEST_S = 2.0  # a second SIGTERM within this time counts as the first


class Requests:
    """What has been asked for, and what is meant by asking again.

    Attributes:
        first: the name of the signal that asked first; None if nobody has. Of the one that insisted, if one did.
        insistent: which of the signals end the ranks at once when they are repeated.
        insisted: one has been.
    """

    def __init__(self) -> None:
        self.first: str | None = None
        self.insisted = False
        self.insistent = frozenset(STOP_SIGNALS)
        self._asked_at = 0.0
        self._new: list[int] = []
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wake, False)

    def fileno(self) -> int:
        """Readable when there is something to `take`."""
        return self._woken

    def add(self, number: int) -> None:
        """Take a signal. Safe in its handler."""
        self._new.append(number)
        with contextlib.suppress(BlockingIOError):  # it is full of earlier ones
            os.write(self._wake, b"!")

    @property
    def has_new(self) -> bool:
        """Whether there is something to `take`."""
        return bool(self._new)

    def take(self) -> Iterator[tuple[int, bool]]:
        """Give each signal that has come since, and whether it insists on an end at once."""
        with contextlib.suppress(BlockingIOError):  # nothing has come
            os.read(self._woken, 4096)
        while self._new:
            number = self._new.pop(0)
            again_s = time.monotonic() - self._asked_at
            # A cluster manager may send SIGTERM twice at once; a person, or a script, that asks again means it.
            means_it = number in self.insistent and (number == signal.SIGINT or again_s > _SAME_REQUEST_S)
            insists = self.first is not None and means_it
            self.insisted = self.insisted or insists
            if self.first is None or insists:
                self.first, self._asked_at = signal.Signals(number).name, time.monotonic()
            yield number, insists

    def close(self) -> None:
        """Of what comes afterwards nobody hears."""
        os.close(self._woken)
        os.close(self._wake)


def signal_number(name: str) -> signal.Signals:
    """The signal called ``name``, without SIG."""
    return signal.Signals[f"SIG{name}"]


@contextlib.contextmanager
def holding_back(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Let signals wait for `passing_on_signals`. Those that come too late for it are dropped at the end.

    What is started meanwhile never gets them, unless it asks.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        while signals and signal.sigtimedwait(signals, 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def passing_on_signals(requests: Requests, signals: tuple[signal.Signals, ...] = STOP_SIGNALS) -> Iterator[None]:
    """Take stop signals for as long as the context lasts; for command lines."""
    # Also where SIGINT was ignored on start (a script's background job): then it stays so.
    before = {number: signal.getsignal(number) for number in signals}
    for number in signals:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, lambda received, _frame: requests.add(received))
        if getattr(before[number], "received", False):  # while there was nobody to pass it on to, and it got lost
            requests.add(number)
    held = signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for number, handler in before.items():
            # After a second Ctrl-C the clean-up that follows is not for a third one to garble.
            signal.signal(number, signal.SIG_IGN if requests.insisted else handler)
