"""Ranks as their launcher sees them: what they say, how they have ended, and what comes of it for the group."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from dataclasses import dataclass, field, replace
from typing import Any

from ddpkit.errors import EXIT_DONE, EXIT_STOPPED

from .causes import ENDED_BY_US, LEFT_EARLY, LEFT_RUN, explain
from .job import DONE, STOPPED, Failure, Memory, RankOrder
from .lines import Lines

_DYING_S = 0.3  # the kernel frees a process's memory, and then tells of its end: later than others tell of theirs


@dataclass(frozen=True)
class Outcome:
    """How a group of ranks ended.

    Attributes:
        exit_code: by ddpkit's rules, of the group as a whole.
        failures: of all ranks that failed, the cause first.
        results: what each rank's call returned, by rank ("call" jobs); in base64, by cloudpickle.
        stopped_by: the name of the signal that asked for the end, if one did.
        is_saved: the ranks have agreed on the stop, and saved their state; or nothing had begun that could be lost.
        has_begun: some rank here has entered a runtime of ddpkit's.
        has_lost_node: another node cannot be reached any more.
        regroups: the ranks start again because nodes have come or gone.
    """

    exit_code: int
    failures: tuple[Failure, ...] = ()
    results: tuple[str, ...] = ()
    stopped_by: str | None = None
    is_saved: bool = False
    has_begun: bool = False
    has_lost_node: bool = False
    regroups: bool = False


@dataclass(frozen=True)
class Place:
    """Where the ranks of one launcher lie among all.

    Attributes:
        first: the first one's rank.
        world_size: ranks of all launchers.
        first_local: the first one's local rank; not 0 where a node has several launchers.
        local_world_size: ranks on this node.
        master_addr: where the rendezvous store is served.
    """

    first: int
    world_size: int
    first_local: int
    local_world_size: int
    master_addr: str = "127.0.0.1"


@dataclass
class Rank:
    """One of the ranks that a launcher has started.

    Attributes:
        order: what it is given.
        readers: the ends of its pipes, by `RankOrder.PIPES`.
        ended: its exit status, once it has one; negative for a signal.
        when: that was, on this machine's monotonic clock.
        reached: the milestones of its job that it has told of.
        left_at: when it began to leave, if it has told of that; its end, by which others notice, takes longer.
        leaves_with: the exit status with which it does.
        failure: what it has said of its own, or somebody had to say for it.
        memory: what it held before its end.
        result: of a "call".
        stacks: where its threads were when it was asked.
        was_ended: by this launcher.
    """

    rank: int
    order: RankOrder
    readers: dict[str, int]
    ended: int | None = None
    when: float = 0.0
    reached: set[str] = field(default_factory=set)
    left_at: float | None = None
    leaves_with: int | None = None
    failure: Failure | None = None
    memory: Memory | None = None
    result: str = ""
    stacks: bytes = b""
    was_ended: bool = False
    _report: Lines = field(default_factory=Lines)

    @classmethod
    def with_pipes(cls, rank: int, scratch: str) -> Rank:
        """One that is to be started."""
        pipes = {name: os.pipe() for name in RankOrder.PIPES}
        writers = {name: pipe[1] for name, pipe in pipes.items()}
        return cls(rank, RankOrder(rank, {}, scratch, **writers), {name: pipe[0] for name, pipe in pipes.items()})

    def begin(self) -> None:
        """Forget the attempt before."""
        self.ended, self.reached, self.failure, self.result, self._report = None, set(), None, "", Lines()
        self.left_at, self.leaves_with, self.stacks, self.was_ended = None, None, b"", False
        self.when, self.memory = 0.0, None

    def hear(self, data: bytes) -> bool:
        """Take what it has reported; says whether it has told of a failure."""
        failed = False
        for message in map(json.loads, self._report.feed(data)):
            if "failure" in message:
                self.failure, failed = Failure.from_json(message["failure"]), True
            elif "reached" in message:
                self.reached.add(message["reached"])
            elif "leaves" in message:
                self.left_at, self.leaves_with = message["leaves"], message["code"]
            else:
                self.result = message["result"]
        return failed

    def end(self, message: dict[str, Any], is_run: bool) -> None:
        """Take how it has ended. A rank of a run may not leave before its work is done, or all have agreed to stop."""
        status: int = message["status"]
        if self.was_ended and self.leaves_with is not None:
            status = self.leaves_with  # it had left; what was cut off is the end of its interpreter
        self.ended, self.when = status, message["when"]
        self.memory = Memory(**message["memory"]) if message["memory"] else None
        if is_run and self.has_left and DONE not in self.reached:
            self.failure = self.failed(status, LEFT_RUN.format(code=status))

    @property
    def has_failed(self) -> bool:
        """Whether it has ended badly, or is about to."""
        return self.failure is not None or self.ended not in (None, EXIT_DONE, EXIT_STOPPED)

    @property
    def has_stopped(self) -> bool:
        """Whether it has ended by an agreed stop."""
        return self.ended == EXIT_STOPPED and STOPPED in self.reached

    @property
    def has_left(self) -> bool:
        """Whether it has ended by itself and without complaint, for whatever reason it had."""
        return not self.has_failed and self.ended is not None and not self.has_stopped

    def failure_of_leaving(self) -> Failure:
        """What is to be said of it if it should not have left."""
        assert self.ended is not None  # it has left
        failure = self.failed(self.ended, LEFT_EARLY.format(code=self.ended))
        return replace(failure, when=failure.when - _DYING_S if self.left_at is None else self.left_at)

    def failure_of_its_end(self) -> Failure:
        """How it failed: in its own words, or by what was seen of its end."""
        if self.failure is not None:
            return self.failure
        assert self.ended is not None  # or there would be no failure to tell of
        if self.was_ended:
            return self.failed(self.ended, ENDED_BY_US)
        failure = self.failed(self.ended, explain(self.ended))
        # So end those who find that another one is gone, or who are ended because of it.
        is_first = self.ended not in (-signal.SIGABRT, -signal.SIGTERM)
        return replace(failure, when=failure.when - _DYING_S) if is_first else failure

    def failed(self, exit_code: int, message: str, traceback: str = "") -> Failure:
        """A failure of this rank, for which it has no words itself."""
        when = self.when or time.monotonic()
        return Failure(self.rank, socket.gethostname(), when, exit_code, message=message, traceback=traceback)
