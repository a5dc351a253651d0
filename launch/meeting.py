"""Where torch's elastic agents meet: its own rendezvous, and in its store what their launchers tell each other.

Each round of the rendezvous is an attempt of the whole group. The agent of the group's first machine publishes the
attempt's number; every agent publishes its ranks' failures, numbered by the store in the order in which they come.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store  # where torch.distributed has them from, with types
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend, create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from ddpkit import rendezvous
from ddpkit.agree import Ranks
from ddpkit.errors import UserError
from ddpkit.world import World

from .job import Terms

_LAST_CALL_S = 15  # with a range of machines: for more of them, once there are enough
_CONNECT_S = 60  # for the launcher on the endpoint's machine to be there
_KEEP_ALIVE_S = 2  # a machine that has said nothing three times in a row is gone
_ROLL_S = 60.0  # all have just joined
_LISTEN_EVERY_S = 0.2
NAME = "ddpkit"
"""Of the backend, and of the rendezvous, on all machines."""


class Meeting(DynamicRendezvousHandler):
    """torch's rendezvous, observed. Made by `open_meeting`."""

    terms: Terms
    tell: Callable[..., None]

    rounds = 0
    """How many there have been, with the present one."""

    hosts: tuple[str, ...] = ()
    """The machines of this round, in the order of their ranks."""

    _round: _Round | None = None
    _earlier: dict[int, _Round]

    def get_backend(self) -> str:
        """A name for it, which the agent notes."""
        return NAME

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other agents; they are told of each other's terms before a rank starts.

        Raises:
            UserError: the terms differ.
        """
        if self._round is not None:
            self._round.leave()
            # The one before is listened to for a while: who was slower tells of its failures only now.
            for ended in self._earlier.values():
                ended.over.set()
            self._earlier = {self.rounds: self._round}
        info = super().next_rendezvous()
        self.rounds += 1
        self._round = _Round(info, self.terms, partial(self.tell, round=self.rounds))
        self.hosts = self._round.compare_terms()
        if info.world_size > 1:
            self._round.listen()
        return info

    def num_nodes_waiting(self) -> int:
        """How many machines want to join, as soon as all agents know of it.

        The ranks of an agent that knew it sooner would look like failed ones to the others.
        """
        waiting = super().num_nodes_waiting()
        if not waiting or self._round is None:
            return 0
        return waiting if self._round.all_regroup() else 0

    def publish_attempt(self, number: int) -> None:
        """Tell the other launchers the number of this attempt."""
        if self._round is not None:
            with contextlib.suppress(RuntimeError):  # the store is gone; what comes of that, the ranks will say
                self._round.store.set("attempt", str(number))

    def publish_failure(self, number: int, failure: dict[str, Any]) -> None:
        """Tell all launchers, this one too, of a rank's failure in the round of that number."""
        there = self._round if number == self.rounds else self._earlier.get(number)
        if there is not None and there.nodes > 1:
            with contextlib.suppress(RuntimeError):  # as above
                there.store.set(f"failure/{there.store.add('failures', 1)}", json.dumps(failure))

    def close_for_all(self, timeout_s: float) -> None:
        """Let the agents of other machines know that this group does not start again, and wait for them.

        One of the agents serves the store. What the others have not heard when it leaves, they never will.
        """
        thread = threading.Thread(target=self._end, args=(timeout_s,), daemon=True)  # it may be out of reach
        thread.start()
        thread.join(timeout_s)

    def _end(self, timeout_s: float) -> None:
        with contextlib.suppress(Exception):  # torch's own errors, of many kinds: it is the end in any case
            self.shutdown()
            if self._round is not None and self._round.nodes > 1:
                self._round.part(timeout_s)


class _Round:
    """One group of machines, from the rendezvous to the next one."""

    def __init__(self, info: RendezvousInfo, terms: Terms, tell: Callable[..., None]) -> None:
        self.nodes = info.world_size
        self.store: Store = PrefixStore("ddpkit", info.store)  # of this round alone
        self.over = threading.Event()
        self._rank = info.rank
        self._terms = terms
        self._tell = tell
        self._regroups = False

    def compare_terms(self) -> tuple[str, ...]:
        """Give the names of all machines, whose launchers were started alike."""
        one = World(rank=self._rank, world_size=self.nodes, local_rank=0, local_world_size=1)
        told = Ranks(one, self.store).exchange("terms", [socket.gethostname(), vars(self._terms)], _ROLL_S)
        terms = [(host, Terms(**each)) for host, each in told]
        if len({each for _, each in terms}) > 1:
            raise UserError(
                "the launchers of this group were started differently: "
                + "; ".join(f"{host}: {each.describe()}" for host, each in terms)
                + ". Give all of them the same."
            )
        return tuple(host for host, _ in terms)

    def listen(self) -> None:
        threading.Thread(target=self._listen, name="ddpkit-meeting", daemon=True).start()

    def _listen(self) -> None:
        knows_attempt, known = self._rank == 0, 0
        try:
            while not self.over.wait(_LISTEN_EVERY_S):
                if not knows_attempt and self.store.check(["attempt"]):
                    knows_attempt = True
                    self._tell(attempt=int(self.store.get("attempt")))
                while known < self.store.add("failures", 0):
                    known += 1
                    self._tell(order=known, failure=json.loads(self.store.get(f"failure/{known}")))
        except RuntimeError:  # torch's errors are: the store is gone, with its machine
            return

    def all_regroup(self) -> bool:
        """Say that this round is to end for the next one; True once all agents have said so."""
        if not self._regroups:
            self._tell(regroups=True)
        return self._count_regrouping() >= self.nodes

    def leave(self) -> None:
        """Be on the way to the next round."""
        self._count_regrouping()

    def _count_regrouping(self) -> int:
        mine, self._regroups = not self._regroups, True
        return self.store.add("regroups", int(mine))

    def part(self, timeout_s: float) -> None:
        """Wait until the launchers of all machines have come to the end, too."""
        deadline = time.monotonic() + timeout_s
        count = self.store.add("parted", 1)
        while count < self.nodes and time.monotonic() < deadline:
            time.sleep(_LISTEN_EVERY_S)
            count = self.store.add("parted", 0)


def open_meeting(terms: Terms, endpoint: str | None, join_s: int, tell: Callable[..., None]) -> Meeting:
    """Make the rendezvous of one agent.

    Args:
        terms: what this launcher was started with.
        endpoint: ``host:port`` of one of the machines; unused where there is only one.
        join_s: seconds for the agents of all machines to come.
        tell: called with what the launcher has to know, from other threads too.

    Raises:
        UserError: the endpoint's name leads nowhere, or nothing of ours is there.
    """
    if terms.alone:
        store: Store = rendezvous.serve(rendezvous.listen())  # on the loopback; torch would listen everywhere
        backend = C10dRendezvousBackend(store, NAME)
    else:
        backend, store = _join_store(terms, endpoint or "", min(join_s, _CONNECT_S))
    meeting = Meeting.from_backend(
        NAME,
        store,
        backend,
        terms.min_nodes,
        terms.max_nodes,
        "127.0.0.1" if terms.alone else None,
        RendezvousTimeout(join=timedelta(seconds=join_s), last_call=timedelta(seconds=_LAST_CALL_S)),
        keep_alive_interval=_KEEP_ALIVE_S,
    )
    assert isinstance(meeting, Meeting)
    meeting.terms, meeting.tell, meeting._earlier = terms, tell, {}
    return meeting


def _join_store(terms: Terms, endpoint: str, timeout_s: int) -> tuple[C10dRendezvousBackend, Store]:
    host = endpoint.rpartition(":")[0] or endpoint
    try:
        socket.getaddrinfo(host.strip("[]"), None)  # torch would ask again and again
    except OSError as error:
        raise UserError(
            f"launch.rdzv_endpoint: {endpoint}: that machine's name leads nowhere ({error.strerror}); give its address"
        ) from error
    parameters = RendezvousParameters(
        "c10d", endpoint, NAME, terms.min_nodes, terms.max_nodes, read_timeout=str(timeout_s)
    )
    try:
        return create_backend(parameters)
    except RendezvousConnectionError as error:
        raise UserError(
            f"launch.rdzv_endpoint: {endpoint} cannot be reached from {socket.gethostname()} within {timeout_s} s: "
            f"{error.__cause__ or error}. The launcher on that machine has not been started, or something between them "
            "blocks the way."
        ) from error
