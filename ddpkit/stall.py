"""Beside each rank, a thread that notices when nothing gets done any more, and answers roll-calls.

A rank that waits for others and has got nothing done for ``stall_timeout_s`` calls the roll. Where some wait and some
will not come, the run cannot go on. The main thread is stuck then, in C++ that nothing interrupts; so this thread ends
the process, and its launcher does the rest.

Who has been asked to stop is not given so long: after two minutes in which nothing gets done the roll is called, also
by a single process, of itself.
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
from ddpkit.stop import StopVote
from ddpkit.world import World

log = logging.getLogger("ddpkit")

_LOOK_S = 0.5
_GAP_S = 5.0  # between two looks: the process was stopped, or the whole job suspended
_LATER = 1.5
_STOPPING_S = 120.0  # as the time without anything done that is too long, from when a stop has been asked for
_FOLLOW_S = 5.0  # for a rank to end by itself once the run is known to be stalled
_STALLED = "rollcall/stalled"
_SEEN = "rollcall/seen"


class StallWatch:
    """Watches this rank's progress and answers for it, from entering the context to leaving it.

    Args:
        world: who this rank is.
        connect: opens a store connection for the thread's own use.
        heartbeat: what the main thread is doing.
        timeout_s: seconds without anything done that are too long.
        stop: knows of stops that have been asked for.
    """

    def __init__(
        self, world: World, connect: Callable[[], Store], heartbeat: Heartbeat, timeout_s: float, stop: StopVote
    ) -> None:
        self._world = world
        self._connect = connect
        self._heartbeat = heartbeat
        self._timeout_s = timeout_s
        self._stop = stop
        self._is_alone = world.world_size == 1
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None
        self._done: object = None
        self._done_at = time.monotonic()
        self._looked_at = self._done_at
        self._patience_s = timeout_s
        self._stopping_since: float | None = None
        self._stopping_patience_s = self._stopping_timeout_s = min(timeout_s, _STOPPING_S)
        self._answered = 0

    def __enter__(self) -> StallWatch:
        store = self._connect()
        rollcall.sign_on(store, self._world.rank)
        self._thread = threading.Thread(target=self._watch, args=(store,), name="ddpkit-stall", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        if self._is_alone:
            self._stop.wake()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, store: Store) -> None:
        with contextlib.suppress(dist.DistError):  # the store has gone: the run is over, one way or another
            while not self._pause():
                still_s = self._still_s()
                self._answer(store)
                if store.check([_STALLED]):
                    self._follow(store)
                elif self._is_due(still_s) and (verdict := self._call_roll(store, still_s)) is not None:
                    self._act(store, verdict, still_s)

    def _pause(self) -> bool:
        """Wait until the next look; True if there is to be none."""
        if not self._is_alone:
            return self._leaving.wait(_LOOK_S)
        self._stop.listen(_LOOK_S)
        return self._leaving.is_set()

    def _is_due(self, still_s: float, factor: float = 1.0) -> bool:
        """Whether that is too long, or so many times too long."""
        is_stalling = still_s >= factor * self._patience_s and not self._is_alone  # which waits for nobody
        is_overdue = min(still_s, self._stopping_s()) >= factor * self._stopping_patience_s
        return is_stalling or is_overdue

    def _stopping_s(self) -> float:
        """Seconds since a stop was asked for."""
        if self._stopping_since is None:
            if not self._stop.is_known:
                return 0.0
            self._stopping_since = time.monotonic()
        return time.monotonic() - self._stopping_since

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
            self._stopping_patience_s = max(self._stopping_patience_s, 2 * self._stopping_s())

    def _call_roll(self, store: Store, still_s: float) -> Verdict | None:
        """What the others say; None if it is not for this rank to ask."""
        is_waiting = rollcall.place(self._heartbeat).waits_for is not None
        # Rank zero also where it does not wait: somebody is to say so when no rank gets anything done. But later: if
        # others wait for it, they are to ask.
        later = 1.0 if self._is_alone else _LATER
        if not is_waiting and not (self._world.is_main and self._is_due(still_s, later)):
            return None
        is_stopping = self._stop.is_known
        call, is_own = rollcall.ask(store, self._world.rank, self._answered)
        self._answer(store)
        if not is_own:
            return None
        answers = rollcall.gather(store, call, self._world.world_size)
        verdict = rollcall.judge(
            answers,
            lambda rank: rollcall.silence(store, rank),
            self._stopping_timeout_s if is_stopping else self._timeout_s,
            is_stopping,
        )
        return verdict if is_waiting or is_stopping or not verdict.is_stalled else None

    def _act(self, store: Store, verdict: Verdict, still_s: float) -> None:
        if self._leaving.is_set() or self._still_s() < still_s:
            return  # it goes on, after all
        is_stopping = self._stop.is_known
        text = f"no progress for {still_s:.0f} s ({'asked to stop' if is_stopping else 'launch.stall_timeout_s'})"
        if not verdict.is_stalled:
            log.warning("%s; as long as nobody waits, this may be a step that takes long:\n%s", text, verdict.text)
            return
        late = next(((rank, host) for rank in verdict.late if (host := rollcall.host_of(store, rank))), None)
        found = "" if late is None or late[0] == self._world.rank else f", as rank {self._world.rank} has found"
        error = Stalled(f"{text}{found}:\n{verdict.text}", late)
        tell_failure(PrefixStore(AGREEMENTS, store), self._world.rank, f"{type(error).__name__}: {error}")
        store.set(_STALLED, str(self._world.rank))
        if not self._world.agent_store and self._world.is_main:
            self._await_followers(store)
        end_process(error)

    def _await_followers(self, store: Store) -> None:
        """Wait until the others have seen it, which a stopped one never does: the store ends with this process."""
        until = time.monotonic() + _FOLLOW_S
        while store.add(_SEEN, 0) < self._world.world_size - 1 and time.monotonic() < until:
            time.sleep(0.1)

    def _follow(self, store: Store) -> None:
        """End this rank too, where nobody else does, and give its main thread the time to do so by itself."""
        by = store.get(_STALLED).decode()
        store.add(_SEEN, 1)
        if not self._leaving.wait(_FOLLOW_S):
            end_process(Stalled(f"rank {by} has found that the run is stalled, and this rank with it"))
