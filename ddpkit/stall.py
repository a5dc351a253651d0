"""Beside each rank, a thread that notices when nothing gets done any more, and answers roll-calls.

A rank that waits for others and has got nothing done for ``stall_timeout_s`` calls the roll. Where some wait and some
will not come, the run cannot go on. The main thread is stuck then, in C++ that nothing interrupts; so this thread ends
the process, and its launcher does the rest.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store  # where torch.distributed has them from, with types

from ddpkit import rollcall
from ddpkit.agree import AGREEMENTS, tell_failure
from ddpkit.errors import Stalled
from ddpkit.gathering import end_process
from ddpkit.heartbeat import Heartbeat
from ddpkit.rollcall import Verdict
from ddpkit.world import World

log = logging.getLogger("ddpkit")

_LOOK_S = 0.5
_GAP_S = 5.0  # between two looks: the process was stopped, or the whole job suspended
_LATER = 1.5
_FOLLOW_S = 5.0  # for a rank to end by itself once the run is known to be stalled
_STALLED = "rollcall/stalled"


class StallWatch:
    """Watches this rank's progress and answers for it, from entering the context to leaving it.

    Args:
        world: who this rank is.
        connect: opens a store connection for the thread's own use.
        heartbeat: what the main thread is doing.
        timeout_s: seconds without anything done that are too long.
    """

    def __init__(self, world: World, connect: Callable[[], Store], heartbeat: Heartbeat, timeout_s: float) -> None:
        self._world = world
        self._connect = connect
        self._heartbeat = heartbeat
        self._timeout_s = timeout_s
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None
        self._done: object = None
        self._done_at = time.monotonic()
        self._looked_at = self._done_at
        self._patience_s = timeout_s
        self._answered = 0

    def __enter__(self) -> StallWatch:
        if self._world.world_size > 1:  # a single process waits for nobody
            store = self._connect()
            rollcall.sign_on(store, self._world.rank)
            self._thread = threading.Thread(target=self._watch, args=(store,), name="ddpkit-stall", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, store: Store) -> None:
        with contextlib.suppress(dist.DistError):  # the store has gone: the run is over, one way or another
            while not self._leaving.wait(_LOOK_S):
                still_s = self._still_s()
                self._answer(store)
                if store.check([_STALLED]):
                    self._follow(store)
                elif still_s >= self._patience_s and (verdict := self._call_roll(store, still_s)) is not None:
                    self._act(store, verdict, still_s)

    def _still_s(self) -> float:
        """Seconds since the main thread has got anything done; time in which this thread was stopped too is none."""
        now, done = time.monotonic(), (self._heartbeat.beats, rollcall.position())
        if now - self._looked_at > _GAP_S:
            self._done_at += now - self._looked_at
        if done != self._done:
            self._done, self._done_at, self._patience_s = done, now, self._timeout_s
        self._looked_at = now
        return now - self._done_at

    def _answer(self, store: Store) -> None:
        newest = rollcall.asked(store)
        if newest > self._answered:
            place = rollcall.place(self._heartbeat)
            # Afterwards: what the main thread has begun just now must not look as old as what it was at before.
            still_s = self._still_s()
            place = replace(place, still_s=still_s)
            for call in range(self._answered + 1, newest + 1):
                rollcall.answer(store, call, self._world.rank, place)
            self._answered = newest
            # Whatever comes of it: the same is not asked again and again.
            self._patience_s = max(self._patience_s, 2 * still_s)

    def _call_roll(self, store: Store, still_s: float) -> Verdict | None:
        """What the others say; None if it is not for this rank to ask."""
        is_waiting = rollcall.place(self._heartbeat).waits_for is not None
        # Rank zero also where it does not wait: somebody is to say so when no rank gets anything done. But later: if
        # others wait for it, they are to ask.
        if not is_waiting and not (self._world.is_main and still_s >= _LATER * self._patience_s):
            return None
        call, is_own = rollcall.ask(store, self._world.rank)
        self._answer(store)
        if not is_own:
            return None
        answers = rollcall.gather(store, call, self._world.world_size)
        verdict = rollcall.judge(answers, lambda rank: rollcall.silence(store, rank), self._timeout_s)
        return verdict if is_waiting or not verdict.is_stalled else None

    def _act(self, store: Store, verdict: Verdict, still_s: float) -> None:
        if self._leaving.is_set() or self._still_s() < still_s:
            return  # it goes on, after all
        text = f"no progress for {still_s:.0f} s (launch.stall_timeout_s)"
        if not verdict.is_stalled:
            log.warning("%s; as long as nobody waits, this may be a step that takes long:\n%s", text, verdict.text)
            return
        error = Stalled(f"{text}:\n{verdict.text}")
        tell_failure(PrefixStore(AGREEMENTS, store), self._world.rank, f"{type(error).__name__}: {error}")
        store.set(_STALLED, str(self._world.rank))
        if not self._world.agent_store and self._world.is_main:
            time.sleep(2 * _LOOK_S)  # for the others to see it: the store ends with this process
        end_process(error)

    def _follow(self, store: Store) -> None:
        """End this rank too, where nobody else does, and give its main thread the time to do so by itself."""
        by = store.get(_STALLED).decode()
        if not self._leaving.wait(_FOLLOW_S):
            end_process(Stalled(f"rank {by} has found that the run is stalled, and this rank with it"))
