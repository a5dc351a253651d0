"""Watch over ranks on several nodes: each node's launcher watches its own, one leads, the others follow.

The leader is a `Node` for which the others' ranks count like its own; so a group on many nodes starts, fails, stops
and restarts by the same rules, and is reported once, as a group on one.
"""

from __future__ import annotations

import math
import selectors
import signal
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any

from ddpkit import orphans, rendezvous
from ddpkit.errors import UserError

from .hub import Peer
from .job import Failure, Job
from .output import Output
from .ranks import Outcome, Place, Rank
from .supervise import LaunchFailed, Node

_GATHER_S = 600.0  # for the launchers of all nodes to come: prologs and slow file systems hold some up
_LOOK_S = 1.0  # for the leader at a time; between two looks a stop is seen
_PART_S = orphans.TIDY_S + 3.0  # for the followers to end their node processes, which tidy up


@dataclass(frozen=True)
class Membership:
    """One launcher among those of a job.

    Attributes:
        place: which one, counted from zero, the leader.
        count: how many there are.
        meeting: a name that they have in common, and no others.
        token: shows that they have the same plan.
        gpus: that its ranks can see; None where they use none.
    """

    place: int
    count: int
    meeting: str
    token: str
    gpus: int | None


@dataclass
class _Follower:
    host: str
    gpus: int | None
    ranks: range
    peer: Peer
    ended: bool = False
    lost: bool = False
    loss: Failure | None = None
    failures: dict[int, Failure] = field(default_factory=dict)
    left: list[Failure] = field(default_factory=list)
    stopped: bool = False
    results: list[str] = field(default_factory=list)
    behind_s: float = math.inf
    """What is to be added to times on its clock: no more than what any of its messages seemed to take. In one attempt,
    as clocks drift; most messages come when there are failures to put in order."""

    def begin(self) -> None:
        """Forget the attempt before."""
        self.ended, self.failures, self.left, self.stopped, self.results = False, {}, [], False, []
        self.behind_s = math.inf

    def here(self, failures: Iterable[Failure]) -> list[Failure]:
        """Its failures, in this machine's time."""
        return [replace(failure, when=failure.when + self.behind_s) for failure in failures]


class LeadingNode(Node):
    """The launcher with rank zero. Its followers connect while its own node process starts.

    Args:
        nproc: ranks to start here.
        start_method: "warm" or "spawn".
        env: variables for every rank besides those that say who it is.
        place: where these ranks lie among all.
        me: this launcher among the others.
        listener: where followers come to; None if there are none.
    """

    def __init__(
        self,
        nproc: int,
        start_method: str,
        env: Mapping[str, str],
        place: Place,
        me: Membership,
        listener: socket.socket | None,
    ) -> None:
        super().__init__(nproc, start_method, env, place)
        self._me = me
        self._listener = listener
        self._followers: dict[int, _Follower] = {}

    def __enter__(self) -> LeadingNode:
        super().__enter__()
        if self._listener is not None:
            self._watch(self._listener, self._welcome)
        return self

    def finish(self) -> None:
        """Let the followers go, and wait until they have gone: the end of this task ends the job."""
        deadline = time.monotonic() + _PART_S
        for follower in self._followers.values():
            follower.peer.send(do="finish")
        for follower in self._followers.values():
            while not follower.lost and (left_s := deadline - time.monotonic()) > 0:
                follower.peer.connection.settimeout(left_s)
                follower.lost = follower.peer.receive() is None

    # -- meeting ---------------------------------------------------------------------------------------------------

    def _welcome(self) -> None:
        assert self._listener is not None  # it is watched
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # it has gone again
        peer = Peer(connection)
        self._watch(connection, partial(self._hear_stranger, peer))

    def _hear_stranger(self, peer: Peer) -> None:
        messages = self._messages(peer)
        if not messages:
            return
        first, *others = messages
        if "token" not in first or first["place"] in self._followers:
            self._forget(peer)
            return
        if first["token"] != self._me.token:
            raise UserError(
                f"task {first['place']} on {first['host']} has found another plan in the submission's folder "
                f"than the first task on {socket.gethostname()}: the nodes do not see the same files; submit it "
                "from a directory that they share"
            )
        follower = _Follower(first["host"], first["gpus"], range(*first["ranks"]), peer)
        self._followers[first["place"]] = follower
        self._selector.modify(peer.connection, selectors.EVENT_READ, partial(self._hear_follower, follower))
        self._take_from(follower, others)  # said before this one was listened to, such as that it is to stop

    def _messages(self, peer: Peer) -> list[dict[str, Any]] | None:
        messages = peer.receive()
        if messages is None:
            self._forget(peer)
        return messages

    def _forget(self, peer: Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.close()

    def _gather(self) -> None:
        """Wait for all followers; a stop that is asked for meanwhile ends it: nothing has begun."""
        deadline = time.monotonic() + _GATHER_S
        while len(self._followers) < self._me.count - 1 and not self._lost:
            self._handle_events(1.0)
            if self.ends_now:
                return
            if time.monotonic() > deadline:
                missing = [place for place in range(1, self._me.count) if place not in self._followers]
                raise LaunchFailed(
                    f"{len(missing)} of {self._me.count} tasks have not come within {_GATHER_S:g} s: "
                    f"{', '.join(map(str, missing))}. They have not started (a prolog, a file system that is slow), or "
                    "cannot reach this one; `srun ddpkit doctor` on these nodes says which."
                )
        self._check_gpus()

    def _check_gpus(self) -> None:
        if self._me.gpus is None:
            return
        found = {socket.gethostname(): self._me.gpus} | {each.host: each.gpus for each in self._followers.values()}
        if len({self._me.gpus, *(each.gpus for each in self._followers.values())}) > 1:
            raise UserError(
                "the nodes of this job have different numbers of GPUs: "
                + ", ".join(f"{host} {gpus}" for host, gpus in found.items())
                + ". Every node needs the same number of ranks, one for each GPU; ask for nodes of one kind "
                "(launch.slurm: constraint, gres or gpus_per_node)."
            )

    # -- one attempt -----------------------------------------------------------------------------------------------

    def _start(self, job: Job, restart_count: int) -> None:
        if len(self._followers) < self._me.count - 1:
            self._gather()
        if self.ends_now or self._lost:
            return
        if lost := [follower.host for follower in self._followers.values() if follower.lost]:
            raise LaunchFailed(f"{', '.join(lost)} cannot be reached any more: nothing can be started there")
        ports = rendezvous.candidates(f"{self._me.meeting} store {restart_count}")
        with rendezvous.listen_on_any(self._place.master_addr, ports) as listener:
            port = listener.getsockname()[1]
            for follower in self._followers.values():
                follower.begin()
                follower.peer.send(do="start", attempt=job.options["attempt"], restart_count=restart_count, port=port)
            self._start_ranks(job, restart_count, port, listener)

    def _hear_follower(self, follower: _Follower) -> None:
        messages = self._messages(follower.peer)
        if messages is None:
            follower.lost = True
            if not follower.ended:
                self._lose(follower)
            return
        self._take_from(follower, messages)

    def _take_from(self, follower: _Follower, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            follower.behind_s = min(follower.behind_s, time.monotonic() - message["now"])
            for tree in message.get("failures", ()):
                failure = Failure.from_json(tree)
                follower.failures[failure.rank] = failure
            if "results" in message:
                follower.left = [Failure.from_json(tree) for tree in message["left"]]
                follower.stopped, follower.results = message["stopped"], message["results"]
                follower.ended = True
            if "requested" in message:
                self.requests.add(message["requested"])
            if "problem" in message:
                self._problem, self._lost = f"{follower.host}: {message['problem']}", True

    def _lose(self, follower: _Follower) -> None:
        first, last = follower.ranks[0], follower.ranks[-1]
        ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
        if first not in follower.failures:
            follower.loss = Failure(
                first,
                follower.host,
                time.monotonic(),
                1,
                message=f"its node, with {ranks}, cannot be reached any more: it is down, or cut off, or its launcher "
                "was killed there",
            )
        follower.ended = True

    def _outcome(self) -> Outcome:
        has_lost_node = any(follower.lost for follower in self._followers.values())
        return replace(super()._outcome(), has_lost_node=has_lost_node)

    def _all_ended(self) -> bool:
        return super()._all_ended() and all(follower.ended for follower in self._followers.values())

    def _some_failed(self) -> bool:
        return super()._some_failed() or any(
            follower.failures or follower.loss for follower in self._followers.values()
        )

    def _failures(self) -> list[Failure]:
        theirs = [
            failure for follower in self._followers.values() for failure in follower.here(follower.failures.values())
        ]
        losses = [follower.loss for follower in self._followers.values() if follower.loss is not None]
        return [*super()._failures(), *theirs, *losses]

    def _left(self) -> list[Failure]:
        theirs = [failure for follower in self._followers.values() for failure in follower.here(follower.left)]
        return [*super()._left(), *theirs]

    def _some_stopped(self) -> bool:
        return super()._some_stopped() or any(follower.stopped for follower in self._followers.values())

    def _results(self) -> tuple[str, ...]:
        by_rank = sorted(self._followers.values(), key=lambda follower: follower.ranks.start)
        return (*super()._results(), *(result for follower in by_rank for result in follower.results))

    def _signal_all(self, number: int) -> None:
        super()._signal_all(number)
        for follower in self._followers.values():
            if not follower.ended:
                follower.peer.send(do="signal", number=int(number))

    def give_up(self, why: str) -> None:
        """End the ranks of all nodes that have not ended by themselves, as `Node.give_up` does."""
        super().give_up(why)
        for follower in self._followers.values():
            if not follower.ended:
                follower.peer.send(do="give_up", why=why)


class FollowingNode(Node):
    """The launcher of another node; does what the leader says.

    Args:
        nproc: ranks to start here.
        start_method: "warm" or "spawn".
        env: variables for every rank besides those that say who it is.
        place: where these ranks lie among all.
        me: this launcher among the others.
    """

    def __init__(self, nproc: int, start_method: str, env: Mapping[str, str], place: Place, me: Membership) -> None:
        super().__init__(nproc, start_method, env, place)
        self.requests.insistent = frozenset()  # the leader knows what a signal means
        self._me = me
        self._orders: list[dict[str, Any]] = []
        self._is_over = False
        self._port = 0
        self._peer: Peer | None = None

    def __enter__(self) -> FollowingNode:
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, LaunchFailed):
            self._tell(problem=str(error))
        super().__exit__(kind, error, trace)

    def join(self) -> None:
        """Find the leader, and say who this is; what the node process begins meanwhile goes on.

        Raises:
            LaunchFailed: it was not found in time, or this one was asked to stop meanwhile.
        """
        self._peer = Peer(self._connected())
        self._watch(self._peer.connection, self._hear_leader)
        first = self._place.first
        self._peer.send(
            token=self._me.token,
            place=self._me.place,
            host=socket.gethostname(),
            gpus=self._me.gpus,
            ranks=[first, first + self._nproc],
        )

    def _connected(self) -> socket.socket:
        address = self._place.master_addr
        deadline = time.monotonic() + _GATHER_S
        while True:
            try:
                port = rendezvous.find(address, self._me.meeting, _LOOK_S)
                return socket.create_connection((address, port), timeout=_LOOK_S)
            except (rendezvous.NoMeeting, OSError) as error:  # it may come and go in between
                if self.requests.has_new:
                    raise LaunchFailed("asked to stop before rank 0's launcher was found") from error
                if time.monotonic() > deadline:
                    raise LaunchFailed(f"rank 0's launcher was not found within {_GATHER_S:g} s: {error}") from error

    def await_order(self) -> dict[str, Any] | None:
        """Wait for the leader to start an attempt, and give its order; None if all is over.

        Raises:
            LaunchFailed: the leader is gone, or the node process here.
        """
        while not (self._orders or self._is_over):
            if self._lost:
                self._outcome()  # raises, with what happened
            self._handle_events(1.0)
        return None if self._is_over else self._orders.pop(0)  # one that came just before is over, too

    def attempt(self, job: Job, order: dict[str, Any], output: Output) -> None:
        """Run this node's ranks once, and tell the leader how they ended."""
        self._port = order["port"]
        self.run(job, order["restart_count"], output)
        self._tell(
            failures=[failure.to_json() for failure in self._failures()],
            left=[failure.to_json() for failure in self._left()],
            stopped=self._some_stopped(),
            results=list(self._results()),
        )

    def _start(self, job: Job, restart_count: int) -> None:
        self._start_ranks(job, restart_count, self._port, None)

    def _hear_leader(self) -> None:
        assert self._peer is not None  # it is heard
        messages = self._peer.receive()
        if messages is None:
            self._selector.unregister(self._peer.connection)
            self._problem = (
                f"rank 0's launcher at {self._place.master_addr} cannot be reached any more; the ranks on "
                f"{socket.gethostname()} were ended with it"
            )
            self._lost = True
            return
        for message in messages:
            if message["do"] == "signal":
                if message["number"] == signal.SIGKILL:
                    self._end_ranks()
                else:
                    self._signal_all(message["number"])
            elif message["do"] == "give_up":
                self.give_up(message["why"])
            elif message["do"] == "finish":
                self._is_over = True
                self._end_ranks()  # there are some if the leader cannot go on
            else:
                self._orders.append(message)

    def _tell_failure(self, rank: Rank) -> None:
        self._tell(failures=[self._failure_of(rank).to_json()])

    def _take_request(self, number: int) -> None:
        self._tell(requested=int(number))

    def _have_begun(self) -> bool:
        return True  # the leader knows

    def _tell(self, **message: Any) -> None:
        if self._peer is not None:
            self._peer.send(now=time.monotonic(), **message)
