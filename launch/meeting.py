"""Where torch's elastic agents meet: its own rendezvous, and in its store what their launchers tell each other.

Each round of the rendezvous is an attempt of the whole group. The agent of the group's first machine publishes the
attempt's number; every agent publishes its ranks' failures, numbered by the store in the order in which they come.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store  # where torch.distributed has them from, with types
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend, create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from ddpkit import rendezvous
from ddpkit.agree import Ranks
from ddpkit.errors import UserError
from ddpkit.world import World

from .job import Terms

_JOIN_S = 900  # for the agents of all machines to come, as torchrun waits
_LAST_CALL_S = 15  # with a range of machines: for more of them, once there are enough
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

    _round: _Round | None = None

    def get_backend(self) -> str:
        """The name by which the agent finds it."""
        return NAME

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other agents; they are told of each other's terms before a rank starts.

        Raises:
            UserError: the terms differ.
        """
        if self._round is not None:
            self._round.over.set()
        info = super().next_rendezvous()
        self.rounds += 1
        self._round = _Round(info, self.terms, partial(self.tell, round=self.rounds))
        self._round.compare_terms()
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
            self._round.store.set("attempt", str(number))

    def publish_failure(self, failure: dict[str, Any]) -> None:
        """Tell all launchers, this one too, of a rank's failure."""
        if (there := self._round) is not None and there.nodes > 1:
            there.store.set(f"failure/{there.store.add('failures', 1)}", json.dumps(failure))

    def close_for_all(self, timeout_s: float) -> None:
        """Let the agents of other machines know that this group does not start again."""
        thread = threading.Thread(target=self.shutdown, daemon=True)  # the store may be out of reach
        thread.start()
        thread.join(timeout_s)


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

    def compare_terms(self) -> None:
        one = World(rank=self._rank, world_size=self.nodes, local_rank=0, local_world_size=1)
        told = Ranks(one, self.store).exchange("terms", [socket.gethostname(), vars(self._terms)], _ROLL_S)
        terms = [(host, Terms(**each)) for host, each in told]
        if len({each for _, each in terms}) > 1:
            raise UserError(
                "the launchers of this group were started differently: "
                + "; ".join(f"{host}: {each.describe()}" for host, each in terms)
                + ". Give all of them the same."
            )

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
            self._regroups = True
            self._tell(regroups=True)
            return self.store.add("regroups", 1) >= self.nodes
        return self.store.add("regroups", 0) >= self.nodes


def open_meeting(terms: Terms, endpoint: str | None, tell: Callable[..., None]) -> Meeting:
    """Make the rendezvous of one agent.

    Args:
        terms: what this launcher was started with.
        endpoint: ``host:port`` of one of the machines; unused where there is only one.
        tell: called with what the launcher has to know, from other threads too.
    """
    if terms.alone:
        store: Store = rendezvous.serve(rendezvous.listen())  # on the loopback; torch would listen everywhere
        backend = C10dRendezvousBackend(store, NAME)
    else:
        parameters = RendezvousParameters("c10d", endpoint or "", NAME, terms.min_nodes, terms.max_nodes)
        backend, store = create_backend(parameters)
    meeting = Meeting.from_backend(
        NAME,
        store,
        backend,
        terms.min_nodes,
        terms.max_nodes,
        "127.0.0.1" if terms.alone else None,
        RendezvousTimeout(join=timedelta(seconds=_JOIN_S), last_call=timedelta(seconds=_LAST_CALL_S)),
        keep_alive_interval=_KEEP_ALIVE_S,
    )
    assert isinstance(meeting, Meeting)
    meeting.terms, meeting.tell = terms, tell
    return meeting
