"""What ranks tell each other outside of tensors: exchanges, barriers, rank-zero sections, over the store.

The store and not the process group, for three reasons: a wait on it can say who is missing, it has a deadline of its
own (or none, while rank zero prepares data for an hour) instead of the training timeout, and no GPU takes part.
Values are JSON. Each use of a name is numbered, so that all ranks must make the same calls in the same order.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store  # where torch.distributed has them from, with types

from ddpkit import errors
from ddpkit.errors import DdpkitError
from ddpkit.heartbeat import Heartbeat
from ddpkit.world import World

log = logging.getLogger("ddpkit")

# A wait asks the store again and again, less and less often: the store's own blocking wait can only be given up by
# its timeout, which logs two warnings each time.
_FIRST_PAUSE_S = 0.0005
_LONGEST_PAUSE_S = 0.02  # for up to 64 ranks; more take longer, so that the store answers as many questions a second
_SAY_AFTER_S = 10.0  # a wait this long is reported, then at twice the time, and so on
_FAILED = "failed"
AGREEMENTS = "agree"
"""Where in the runtime's store `Ranks` keep theirs."""


class RankFailed(DdpkitError):
    """Another rank has failed, so this one ends too; the message carries that rank's cause."""


def is_consequence(error: BaseException) -> bool:
    """Whether this is what a rank sees when another one has gone: not a cause, but the end of a connection."""
    if isinstance(error, (RankFailed, dist.DistError)):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)  # which raises nothing more specific


class RanksMissing(DdpkitError):
    """Some ranks did not come to a barrier in time; the message names them."""


class Ranks:
    """The ranks of this run, as partners in agreements.

    Args:
        world: who this rank is.
        store: shared by all ranks; within the process if there is only one.
        heartbeat: told when this rank waits for others.
        thread: whose agreements these are, of a thread beside the main one (with a connection of its own): they are
            counted apart from the main thread's, whatever their names.
        leaving: once it is set, waits are given up.
    """

    def __init__(
        self,
        world: World,
        store: Store,
        heartbeat: Heartbeat | None = None,
        thread: str | None = None,
        leaving: threading.Event | None = None,
    ) -> None:
        self.rank = world.rank
        self.world_size = world.world_size
        self._local_world_size = world.local_world_size
        self._local_leader = world.rank - world.local_rank
        self._store = store if thread is None else PrefixStore(thread, store)
        self._failures = store  # of all threads: whoever waits hears of them
        self._heartbeat = heartbeat or Heartbeat()
        self._leaving = leaving or threading.Event()
        self._uses: dict[str, int] = defaultdict(int)

    def exchange(self, name: str, value: Any, timeout_s: float | None = None) -> list[Any]:
        """Give a JSON value, get every rank's, listed by rank. Collective.

        Args:
            name: what it is about; shown when somebody waits long.
            value: anything JSON can hold.
            timeout_s: seconds to wait for the others; None waits as long as nobody fails.

        Raises:
            RankFailed: another rank has said that it failed, or this one is leaving.
            RanksMissing: ranks did not come within ``timeout_s``.
        """
        values: list[Any] = self.conclude(name, value, lambda values: values, timeout_s)
        return values

    def conclude(
        self, name: str, value: Any, conclusion: Callable[[list[Any]], Any], timeout_s: float | None = None
    ) -> Any:
        """Give rank zero a JSON value, and get what it concludes from all of them; as `exchange`. Collective.

        What reaches each rank is as long as the conclusion, and not as long as there are ranks.

        Args:
            conclusion: called on rank zero, with the values by rank; it must not raise.
        """
        if self.world_size == 1:
            return json.loads(json.dumps(conclusion([json.loads(json.dumps(value))])))  # tuples become lists here too
        use = self._uses[name]
        self._uses[name] += 1
        place = f"{name}/{use}"
        own = f"{place}/{self.rank}"
        self._store.set(own, json.dumps(value))
        # Rank zero reads everyone's and publishes what follows: a few store operations a rank, however many ranks there
        # are, not one for each pair; what grows with them is the size of one question and of its answer.
        if self.rank == 0:
            keys = [f"{place}/{rank}" for rank in range(self.world_size)]
            self._await(keys, name, place, timeout_s)
            concluded = json.dumps(conclusion([json.loads(value) for value in self._store.multi_get(keys)]))
            self._store.set(f"{place}/all", concluded)
            if use:  # all are here, so all have read what was published before
                self._store.delete_key(f"{name}/{use - 1}/all")
        else:
            self._await([f"{place}/all"], name, place, timeout_s)
            concluded = self._store.get(f"{place}/all").decode()
        self._store.delete_key(own)  # rank zero has read it
        return json.loads(concluded)

    def decide(self, name: str, value: Any = None) -> Any:
        """Rank zero's value, on every rank; what the others pass is not looked at. Collective."""
        return self.conclude(name, value if self.rank == 0 else None, lambda values: values[0])

    def on_main(self, name: str, action: Callable[[], Any]) -> None:
        """Rank zero acts; if one of our own errors comes of it, all ranks raise it. Collective."""
        failure = None
        if self.rank == 0:
            try:
                action()
            except DdpkitError as error:
                failure = [type(error).__name__, str(error)]
        failure = self.decide(name, failure)
        if failure is not None:
            kind: type[DdpkitError] = getattr(errors, failure[0], DdpkitError)
            raise kind(failure[1])

    def barrier(self, name: str, timeout_s: float | None = None) -> None:
        """Wait until every rank is here. Collective.

        Raises:
            RanksMissing: after ``timeout_s`` seconds, naming the ranks that did not come.
            RankFailed: another rank has said that it failed.
        """
        self.conclude(f"barrier {name}", None, lambda _: None, timeout_s)

    @contextmanager
    def main_first(self, scope: str = "global") -> Iterator[None]:
        """Let rank zero run the block first, the others after it. Collective.

        The others wait for as long as rank zero works: no training timeout ends it. If rank zero raises, they raise
        `RankFailed` with its cause at once.

        Args:
            scope: "global" for one leader, "node" for one on each node.
        """
        if scope not in ("global", "node"):
            raise ValueError(f"scope={scope!r}: choose 'global' or 'node'")
        leader = self.leader(scope)
        use = self._uses["main_first"]
        self._uses["main_first"] += 1
        key = f"main_first/{use}/{leader}"
        if self.rank != leader:
            self._await([key], f"main_first (rank {leader} is at work)", key)
            cause = json.loads(self._store.get(key))
            followers = (self.world_size if scope == "global" else self._local_world_size) - 1
            if self._store.add(f"{key}/read", 1) == followers:  # the last one tidies up
                self._store.delete_key(key)
                self._store.delete_key(f"{key}/read")
            if cause:
                raise RankFailed(cause)
            yield
            return
        waiting = (self.world_size if scope == "global" else self._local_world_size) - 1
        # The console shows rank zero's words; those of the ranks that wait are in their logs.
        words = ("rank %d has been at work in main_first for %.0f s; %d ranks wait", self.rank, _SAY_AFTER_S, waiting)
        say = threading.Timer(_SAY_AFTER_S, log.warning, words)
        say.daemon = True
        if waiting:
            say.start()
        try:
            with self._heartbeat.during("main_first"):
                yield
        except BaseException as error:
            # The failure of another rank that it has met there is that one's, and the others may hear of it here first.
            own = f"rank {self.rank} failed in main_first: {type(error).__name__}: {error}"
            self._store.set(key, json.dumps(str(error) if isinstance(error, RankFailed) else own))
            raise
        finally:
            say.cancel()
        self._store.set(key, json.dumps(None))

    def leader(self, scope: str) -> int:
        """Which rank goes first, for this one: rank zero, or with "node" the first one of its node."""
        return 0 if scope == "global" else self._local_leader

    def tell_failure(self, cause: str) -> tuple[int, str]:
        """Let ranks that wait for an agreement know that this rank ends with an error. Not collective.

        Returns:
            The rank that failed first, and its cause; those after it are mostly its consequences.
        """
        if self.world_size == 1:
            return self.rank, cause
        return tell_failure(self._failures, self.rank, cause)

    def _await(self, keys: list[str], name: str, place: str, timeout_s: float | None = None) -> None:
        with self._heartbeat.waiting(name):
            self._ask_for(keys, name, place, timeout_s)

    def _ask_for(self, keys: list[str], name: str, place: str, timeout_s: float | None) -> None:
        started = time.monotonic()
        say_at = started + _SAY_AFTER_S
        pause, longest = _FIRST_PAUSE_S, _LONGEST_PAUSE_S * max(1.0, self.world_size / 64)
        while not self._store.check(keys):
            time.sleep(pause)
            if pause < longest:
                pause *= 2
                continue
            now = time.monotonic()
            # Not if it has come meanwhile: then all are to fail together of what they have agreed on.
            if self._failures.check([_FAILED]) and not self._store.check(keys):
                rank, cause = json.loads(self._failures.get(_FAILED))
                raise RankFailed(f"rank {rank} failed: {cause}")
            if self._leaving.is_set():
                raise RankFailed(f"rank {self.rank} is leaving, and does not wait for {name}")
            if timeout_s is not None and now - started > timeout_s:
                missing = self._missing(place)
                raise RanksMissing(
                    f"{name}: after {timeout_s:g} s these ranks have not come: {missing}; all others wait for them"
                )
            if now > say_at:
                say_at = now + (now - started)
                log.warning("rank %d waits for %s: %.0f s", self.rank, name, now - started)

    def _missing(self, place: str) -> list[int]:
        return [rank for rank in range(self.world_size) if not self._store.check([f"{place}/{rank}"])]


def tell_failure(store: Store, rank: int, cause: str) -> tuple[int, str]:
    """`Ranks.tell_failure` for a thread with a connection of its own."""
    told = json.loads(store.compare_set(_FAILED, "", json.dumps([rank, cause])))
    return told[0], told[1]
