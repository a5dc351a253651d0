"""From a signal on any rank to one decision of all: stop after the same unit of work.

Ranks work in lockstep over numbered units (fetching a batch, an optimizer step, a pass of an evaluation) and call
`poll` before each. Asking every rank at every unit would put a collective on the hot path, so a unit costs one
uncontended lock, and the agreement happens only once somebody wants to stop:

1. A signal handler only sets a flag. A thread beside each rank sees the flag and says so in the store.
2. Each rank's thread sees that word there and answers with the unit which its rank has begun. From then on its rank
   begins no further unit without knowing the decision.
3. Rank zero's thread publishes the largest answer: the last unit. Every rank finishes exactly that one, since none
   has begun a later one, and none waits inside a unit for a rank that has already stopped.

The answers come from threads, so a main thread inside a collective (the GIL is free there) holds up nothing. Python
runs signal handlers between two lines of the main thread only, which may be minutes away; so the thread reads from a
pipe which signals have come, where the C level writes them at once.

A unit in which no rank has any part in another's work after its beginning (waiting for a batch) may be left before it
is finished, once it is known to be the last: `look` tells.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store  # where torch.distributed has it from, with its type

from ddpkit.errors import DdpkitError
from ddpkit.heartbeat import Heartbeat
from ddpkit.world import World

_LOOK_S = 0.2  # how often the thread looks for the others' requests; a stop waits for the current unit anyway
_RANKS = 512  # more of them look less often, so that the store answers as many questions a second
_ANSWER_S = 0.01  # how often it looks for the others' answers: they come within one look of theirs
_REASON, _LAST = "stop/reason", "stop/last"


class Requests:
    """What asks this process to stop: signals, for as long as the context lasts, and whoever calls `ask`.

    Outside the main thread, where Python allows no handlers, signals are left alone.

    Args:
        signals: those that ask for a stop.
    """

    def __init__(self, signals: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self.reason: str | None = None
        self.since = 0.0
        """When that was, on the monotonic clock."""
        self._signals = frozenset(signals)
        self._before: dict[signal.Signals, Any] = {}
        self._handled = False
        self._read, self._write = -1, -1

    def __enter__(self) -> Requests:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in self._signals}
            found = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            if found != -1:  # an event loop's: it stays, and signals are seen when the main thread runs Python again
                signal.set_wakeup_fd(found)
            # What a forked child alone is sent (by `terminate`) must not count as sent to this rank. Its handlers stay,
            # and do nothing there: a cluster manager signals every process, and a user's loader workers are to live.
            os.register_at_fork(after_in_child=_StopListening(self))
            # A launcher may have blocked them until now; those that came meanwhile arrive here.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_listening()
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._on_signal:
                # A cluster's warning may come when the work is done, and by default it would end what is left of it.
                is_warning = number not in (signal.SIGTERM, signal.SIGINT) and handler == signal.SIG_DFL
                signal.signal(number, signal.SIG_IGN if is_warning else handler)
        self._before = {}
        read, write = self._read, self._write
        self._read = self._write = -1
        os.close(write)
        os.close(read)

    def ask(self, reason: str) -> None:
        """Ask for a stop. Safe in a signal handler and from any thread; the first reason stays."""
        if self.reason is None:
            self.since = time.monotonic()
            self.reason = reason
            self.wake()

    def wake(self) -> None:
        """End a `wait` in another thread."""
        with contextlib.suppress(OSError):  # full of earlier ones, or closed
            os.write(self._write, b"\0")

    def wait(self, seconds: float) -> None:
        """Return when a signal has come or somebody has asked, or after ``seconds``. For one thread."""
        ready, _, _ = select.select([self._read], [], [], seconds)
        if ready:
            for number in os.read(self._read, 4096):
                if number in self._signals:
                    self.ask(signal.Signals(number).name)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # A second Ctrl-C in one process (no launcher beside it to do so) ends at once.
        if number == signal.SIGINT and self._handled:
            raise KeyboardInterrupt
        self._handled = True
        self.ask(signal.Signals(number).name)

    def _stop_listening(self) -> None:
        if self._before and (current := signal.set_wakeup_fd(-1)) not in (self._write, -1):
            signal.set_wakeup_fd(current)


class _StopListening:
    """What forked children do first. Such a function stays for good, so it holds on to nothing."""

    def __init__(self, requests: Requests) -> None:
        self._requests = weakref.ref(requests)

    def __call__(self) -> None:
        if (requests := self._requests()) is not None:
            requests._stop_listening()


class StopVote:
    """Watches for stop requests on all ranks, from entering the context to leaving it.

    Args:
        world: who this rank is.
        requests: what asks this rank to stop; entered already.
        connect: opens a store connection for the thread's own use (a client must not be shared between threads).
        heartbeat: told of every unit.
    """

    def __init__(
        self, world: World, requests: Requests, connect: Callable[[], Store], heartbeat: Heartbeat | None = None
    ) -> None:
        self._world = world
        self._requests = requests
        self._connect = connect
        self._heartbeat = heartbeat or Heartbeat()
        self._lock = threading.Lock()
        self._begun = 0
        self._answered = False
        self._reason = ""
        self._since = 0.0
        self._last: int | None = None
        self._decided = threading.Event()
        self._store: Store | None = None
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StopVote:
        if self._world.world_size > 1:
            self._store = self._connect()
            self._thread = threading.Thread(target=self._watch, name="ddpkit-stop", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self._requests.wake()
        if self._thread is not None:
            self._thread.join()

    def request(self, reason: str) -> None:
        """Ask all ranks to stop. Safe in a signal handler and from any thread; the first reason stays."""
        self._requests.ask(reason)

    @property
    def is_requested(self) -> bool:
        """Whether this rank itself has been asked to stop."""
        return self._requests.reason is not None

    @property
    def is_known(self) -> bool:
        """Whether a stop has been asked for, here or, as far as this rank knows, elsewhere."""
        return self.is_requested or self._answered

    def listen(self, seconds: float) -> None:
        """In a single process, which has no thread here: return when it is asked to stop, woken, or after a time."""
        self._requests.wait(seconds)

    def wake(self) -> None:
        """End a `listen` in another thread."""
        self._requests.wake()

    @property
    def latency_s(self) -> float:
        """Seconds since the first request that this rank knows of, its own or another's. After `poll` has told."""
        since = self._since if self._store is not None else self._requests.since
        return time.monotonic() - since

    def poll(self) -> str | None:
        """Call before each unit of work, on every rank alike.

        Returns:
            None to go on with the unit; otherwise why to stop now, the same on all ranks at the same unit.
        """
        self._heartbeat.beat()
        if self._store is None:
            return self._requests.reason
        with self._lock:
            if not self._answered:
                self._begun += 1
                return None
        if not self._decided.is_set():
            # Only a rank that is gone keeps the answers from coming, and then its launcher ends this one too.
            with self._heartbeat.waiting("the vote on a stop"):
                self._decided.wait()
        if self._last is None:
            raise DdpkitError("the ranks could not agree on a stop: the rendezvous store has gone")
        if self._begun >= self._last:
            return self._reason
        self._begun += 1
        return None

    def look(self) -> str | None:
        """Whether to leave the present unit unfinished: then why. Only where no other rank needs this one's part.

        That is so if nothing of the unit that is still to come, before the next `poll`, involves other ranks.
        """
        if self._store is None:
            return self._requests.reason
        if self._decided.is_set() and self._last is not None and self._begun >= self._last:
            return self._reason
        return None

    def _watch(self) -> None:
        store = self._store
        assert store is not None
        look_s = _LOOK_S * max(1.0, self._world.world_size / _RANKS)
        try:
            while not self._leaving.is_set():
                self._requests.wait(look_s)
                if (reason := self._requests.reason) is not None:
                    age_s = time.monotonic() - self._requests.since  # the clocks of two machines cannot be compared
                    store.compare_set(_REASON, "", json.dumps([reason, age_s]))
                if store.check([_REASON]):
                    self._answer(store)
                    return
        except dist.DistError:
            pass  # the store has gone: the run is over, one way or another
        finally:
            self._decided.set()

    def _answer(self, store: Store) -> None:
        reason, age_s = json.loads(store.get(_REASON))
        with self._lock:
            self._reason, self._since, self._answered = reason, time.monotonic() - age_s, True
            begun = self._begun
        store.set(f"stop/begun/{self._world.rank}", str(begun))
        if self._world.is_main:
            keys = [f"stop/begun/{rank}" for rank in range(self._world.world_size)]
            if not self._there(store, keys):
                return
            store.set(_LAST, str(max(int(value) for value in store.multi_get(keys))))
        if self._there(store, [_LAST]):
            self._last = int(store.get(_LAST))

    def _there(self, store: Store, keys: list[str]) -> bool:
        """Wait for ``keys``; False if this rank leaves first, as others may have before the word came to them."""
        while not store.check(keys):
            if self._leaving.wait(_ANSWER_S):
                return False
        return True
