"""From a signal on any rank to one decision of all: stop after the same step.

Ranks work in lockstep over numbered units (an optimizer step, a pass of an evaluation) and call `poll` before each.
Asking every rank at every unit would put a collective on the hot path, so a unit costs one uncontended lock, and the
agreement happens only once somebody wants to stop:

1. A signal handler only sets a flag. A thread beside each rank sees the flag and says so in the store.
2. Each rank's thread sees that word there and answers with the unit which its rank has begun. From then on its rank
   begins no further unit without knowing the decision.
3. Rank zero's thread publishes the largest answer: the last unit. Every rank finishes exactly that one, since none
   has begun a later one, and none waits inside a unit for a rank that has already stopped.

The answers come from threads, so a main thread inside a collective (the GIL is free there) holds up nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store  # where torch.distributed has it from, with its type

from ddpkit import rollcall
from ddpkit.errors import DdpkitError
from ddpkit.world import World

_LOOK_S = 0.2  # how often the thread looks; a stop waits for the current unit anyway
_ANSWER_S = 0.01  # how often it looks for the others' answers: they come within one look of theirs
_REASON, _LAST = "stop/reason", "stop/last"


class StopVote:
    """Watches for stop requests on all ranks, from entering the context to leaving it.

    Args:
        world: who this rank is.
        connect: opens a store connection for the thread's own use (a client must not be shared between threads).
    """

    def __init__(self, world: World, connect: Callable[[], Store]) -> None:
        self._world = world
        self._connect = connect
        self._requested: str | None = None
        self._lock = threading.Lock()
        self._begun = 0
        self._answered = False
        self._reason = ""
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
        if self._thread is not None:
            self._thread.join()

    def request(self, reason: str) -> None:
        """Ask all ranks to stop. Safe in a signal handler; the first reason stays."""
        self._requested = self._requested or reason

    @property
    def is_requested(self) -> bool:
        """Whether this rank itself has been asked to stop."""
        return self._requested is not None

    def poll(self) -> str | None:
        """Call before each unit of work, on every rank alike.

        Returns:
            None to go on with the unit; otherwise why to stop now, the same on all ranks at the same unit.
        """
        if self._store is None:
            return self._requested
        with self._lock:
            if not self._answered:
                self._begun += 1
                return None
        # Only a rank that is gone keeps the answers from coming, and then its launcher ends this one too.
        self._decided.wait()
        if self._last is None:
            raise DdpkitError("the ranks could not agree on a stop: the rendezvous store has gone")
        if self._begun >= self._last:
            return self._reason
        self._begun += 1
        return None

    def _watch(self) -> None:
        store = self._store
        assert store is not None
        try:
            asked = False
            while not self._leaving.wait(_LOOK_S):
                if self._requested is not None:
                    store.compare_set(_REASON, "", self._requested)
                asked = asked or rollcall.answer(store, self._world.rank)
                if store.check([_REASON]):
                    self._answer(store)
                    return
        except dist.DistError:
            pass  # the store has gone: the run is over, one way or another
        finally:
            self._decided.set()

    def _answer(self, store: Store) -> None:
        reason = store.get(_REASON).decode()
        with self._lock:
            self._reason, self._answered = reason, True
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


class stop_on_signals:
    """Turn SIGTERM and SIGINT into a stop request for as long as the context lasts.

    Outside the main thread, where Python allows no handlers, it changes nothing.
    """

    def __init__(self, vote: StopVote, signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self._vote = vote
        self._signals = signals
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in self._signals}
            # A launcher may have blocked them until now; those that came meanwhile arrive here.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # A second Ctrl-C in one process (no launcher beside it to do so) ends at once.
        if number == signal.SIGINT and self._vote.is_requested:
            raise KeyboardInterrupt
        self._vote.request(signal.Signals(number).name)
