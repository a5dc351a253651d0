"""Watch over the ranks of one node: pass on output and signals, find the first failure, leave nothing behind.

The launcher's side of `node`. One thread, one selector: everything that happens is an event with an order.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ddpkit import orphans, rendezvous, world
from ddpkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER, DdpkitError
from ddpkit.world import World

from . import scratch
from .attempts import AttemptFile
from .causes import explain, follows, order_by_cause
from .job import BEGUN, STACK_SIGNAL, Failure, Job
from .lines import Lines
from .memory import RAN_OUT, WORKER_DIED, Watch, judge
from .output import Output
from .patience import Patience, unfinished
from .ranks import Outcome, Place, Rank
from .requests import Requests

_LINGER_S = 2.0  # after the first failure, for the others to report theirs; then they are ended
_END_S = orphans.TIDY_S + 2.0  # for the node process to end everything, with time to tidy up, and itself
_END_NOW_S = 0.5  # the same after a second Ctrl-C; it may be deep in an import
_PIECE = 1 << 20  # bytes read at a time: all that a pipe holds


class _HasDescriptor(Protocol):
    def fileno(self) -> int: ...


class LaunchFailed(DdpkitError):
    """The ranks could not be started or watched."""


class Node:
    """A node process with its ranks, from entering the context to leaving it; then nothing of it is left.

    Args:
        nproc: ranks to start, all on this machine.
        start_method: "warm" or "spawn".
        env: variables for every rank besides those that say who it is.
        place: where these ranks lie among all; by default they are all.

    Attributes:
        requests: to stop. One that comes before anything has begun that could be lost ends the ranks at once.
        patience: with ranks that do not stop.
        is_run: the ranks do a run; see `Job.is_run`.
        ends_now: nobody waits for the ranks any more: a stop was asked for with insistence, or nothing had begun.
    """

    is_numbered_late = False
    """The number of an attempt is known only when the launchers of all nodes have met."""

    def __init__(self, nproc: int, start_method: str, env: Mapping[str, str], place: Place | None = None) -> None:
        self._nproc = nproc
        self._place = place or Place(0, nproc, 0, nproc)
        self._start_method = start_method
        self._env = dict(env)
        self._selector = selectors.DefaultSelector()
        self._lines = Lines()
        self._ranks: list[Rank] = []
        self._lost = False
        self._problem: str | None = None
        self._memory = Watch()
        self._output = Output(None, tee_all=False)
        self._are_started = False
        self.requests = Requests()
        self.patience = Patience()
        self.is_run = False
        self.ends_now = False

    def __enter__(self) -> Node:
        self._control, theirs = socket.socketpair()
        self._scratch, held = scratch.make()
        self._ranks = [Rank.with_pipes(self._place.first + index, self._scratch) for index in range(self._nproc)]
        ends = [fd for rank in self._ranks for fd in rank.order.descriptors]
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("child.py")),
                *self._role(theirs.fileno()),
            ],
            pass_fds=[theirs.fileno(), held, *ends],
            env=world.environment() | self._env | {orphans.MARK: self._scratch},
            # A session of its own: the terminal's Ctrl-C reaches this process alone, which passes it on once.
            start_new_session=True,
        )
        theirs.close()
        for fd in (held, *ends):
            os.close(fd)
        self._watch(self._control, self._hear)
        self._watch(self.requests, self._pass_on)
        for rank in self._ranks:
            for name, fd in rank.readers.items():
                os.set_blocking(fd, False)
                self._watch(fd, partial(self._read, rank, name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._send(do="end")
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(_END_NOW_S if self.ends_now else _END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        orphans.end_marked(
            self._process.pid, self._scratch
        )  # what is left, should that process have been killed itself
        self._selector.close()
        self._control.close()
        for rank in self._ranks:
            for fd in rank.readers.values():
                os.close(fd)
        self.requests.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _role(self, control: int) -> list[str]:
        """What the child process is to be: its arguments."""
        return ["node", str(control), self._start_method, self._scratch]

    def number(self, take: Callable[[int], AttemptFile], follow: Callable[[int], AttemptFile]) -> AttemptFile | Outcome:
        """Number the next attempt.

        Args:
            take: takes the next free number, given how many ranks there are.
            follow: joins an attempt that another node's launcher has numbered.

        Returns:
            The attempt, or how it all ended before there was one.
        """
        return take(self._place.world_size)

    def run(self, job: Job, restart_count: int, output: Output) -> Outcome:
        """Start the ranks, and return when the last one has ended."""
        self._output, self.is_run, self._are_started = output, job.is_run, False
        self.patience.begin()
        for rank in self._ranks:
            rank.begin()
        self._pass_on()  # what has come before
        if not self.ends_now:
            with contextlib.suppress(ConnectionError):  # the node process has died; the loop below is told
                self._start(job, restart_count)
            if self.requests.first is not None:  # from here; somebody else knows what that means
                self._signal_own(getattr(signal, self.requests.first))
        for rank in self._ranks:
            output.log(rank.rank, b"")  # also of a rank that will never say a word
        deadline: float | None = None
        while not (self._all_ended() or self._lost or self.ends_now):
            self._handle_events(timeout_s=0.2 if deadline or self.patience.given_up_for else 1.0)
            self._give_up_when_due()
            if deadline is None and self._some_failed():
                deadline = time.monotonic() + _LINGER_S
            # Ranks that have been given up are to say where they are, and have a moment for that.
            if deadline is not None and time.monotonic() > deadline and self.patience.given_up_for is None:
                # One that lingers after its error delays its neighbours as long; one in a collective never ends.
                self._end_ranks()
        for rank in self._ranks:
            for name in rank.readers:
                self._read(rank, name)
        output.flush()
        return self._outcome()

    def give_up(self, why: str) -> None:
        """End the ranks that have not ended by themselves: as failed because of ``why``, with their stacks."""
        if self.patience.given_up_for is None:
            self.patience.give_up(why)
            self._signal_own(STACK_SIGNAL)

    def _give_up_when_due(self) -> None:
        if (why := self.patience.over()) is not None:
            self.give_up(why)
        if self.patience.is_over:
            self._end_ranks()

    def _end_ranks(self) -> None:
        if (why := self.patience.given_up_for) is not None:
            for rank in self._ranks:
                if rank.ended is None and rank.failure is None:
                    rank.failure = unfinished(rank, why)
                    self._tell_failure(rank)
        self._signal_all(signal.SIGKILL)
        for rank in self._ranks:
            rank.was_ended = rank.was_ended or rank.ended is None

    def _watch(self, source: int | _HasDescriptor, react: Callable[[], None]) -> None:
        if isinstance(source, int):
            os.set_blocking(source, False)
        self._selector.register(source, selectors.EVENT_READ, react)

    def _handle_events(self, timeout_s: float | None) -> None:
        for key, _ in self._selector.select(timeout_s):
            key.data()

    def _all_ended(self) -> bool:
        return all(rank.ended is not None for rank in self._ranks)

    def _some_failed(self) -> bool:
        return any(rank.has_failed for rank in self._ranks)

    def _tell_failure(self, rank: Rank) -> None:
        """Called as soon as a rank has failed; for those who have to know at once."""

    def _start(self, job: Job, restart_count: int) -> None:
        with rendezvous.listen() as listener:  # held from here on: no other process can take the port
            self._start_ranks(job, restart_count, listener.getsockname()[1], listener)

    def _start_ranks(self, job: Job, restart_count: int, port: int, listener: socket.socket | None) -> None:
        """Have the node process start the ranks; given a listener, it serves their store there."""
        if listener is not None:
            socket.send_fds(self._control, [b'{"do": "listen"}\n'], [listener.fileno()])
        orders = [
            vars(rank.order) | {"env": self._rank_env(index, port, restart_count)}
            for index, rank in enumerate(self._ranks)
        ]
        self._send(do="start", job=job.to_json(), ranks=orders)

    def _outcome(self) -> Outcome:
        return replace(self._how_it_ended(), has_begun=any(BEGUN in rank.reached for rank in self._ranks))

    def _how_it_ended(self) -> Outcome:
        stopped_by, interrupted = self.requests.first, self.requests.first == "SIGINT"
        if self.ends_now:
            # Of a run that had not begun, all is there that ever was.
            is_saved = self.is_run and not self.requests.insisted
            code = EXIT_INTERRUPTED if interrupted else EXIT_STOPPED if is_saved else EXIT_FAILED
            return Outcome(code, stopped_by=stopped_by, is_saved=is_saved)
        if self._problem is not None:
            raise LaunchFailed(self._problem)
        if self._lost:
            raise self._loss()
        if failures := self._all_failures():
            if stopped_by is not None and _died_of(failures[0], stopped_by):
                failures = ()  # a plain script, which ends by the signal as it would without us
            code = EXIT_USER if failures and failures[0].is_users_input else EXIT_FAILED
            return Outcome(EXIT_INTERRUPTED if interrupted else code, failures, stopped_by=stopped_by)
        code = EXIT_INTERRUPTED if interrupted else EXIT_STOPPED
        if self._some_stopped():
            return Outcome(code, stopped_by=stopped_by, is_saved=True)
        if any(left.exit_code == EXIT_STOPPED for left in self._left()):  # a script's own word
            return Outcome(code, stopped_by=stopped_by)
        return Outcome(EXIT_DONE, (), self._results(), stopped_by)

    def _loss(self) -> LaunchFailed:
        status = self._process.wait(_END_S)
        how = f"SIGKILL, {RAN_OUT}," if status == -signal.SIGKILL and self._memory.ran_out() else explain(status)
        return LaunchFailed(
            f"the process that starts the ranks (pid {self._process.pid}) ended with {how} before "
            "they did; they were ended with it. Run it again to continue."
        )

    def _all_failures(self) -> tuple[Failure, ...]:
        """All there is to tell of, the cause first. If each is what ranks see when others go, somebody has gone."""
        failures = self._failures()
        if failures and all(map(follows, failures)):
            first = min(failure.when for failure in failures)
            failures += [failure for failure in self._left() if failure.when < first]
        return order_by_cause(failures)

    def _failures(self) -> list[Failure]:
        return [self._failure_of(rank) for rank in self._ranks if rank.has_failed]

    def _left(self) -> list[Failure]:
        """What is to be said of those that have left of their own accord, if they should not have done so yet."""
        return [rank.failure_of_leaving() for rank in self._ranks if rank.has_left]

    def _some_stopped(self) -> bool:
        return any(rank.has_stopped for rank in self._ranks)

    def _results(self) -> tuple[str, ...]:
        return tuple(rank.result for rank in self._ranks)

    def _failure_of(self, rank: Rank) -> Failure:
        failure = rank.failure_of_its_end()
        if rank.was_ended and rank.failure is None:
            return failure
        if failure.kind == WORKER_DIED or not (failure.kind or failure.traceback):  # no words of the user's but these
            failure = replace(failure, last_lines=self._output.unseen(rank.rank))
        # A rank that has told of its worker's death, and was ended on its way out, is no less to be explained.
        is_its_own_end = not rank.was_ended or failure.kind == WORKER_DIED
        return judge(failure, rank.memory) if is_its_own_end else failure

    def _rank_env(self, index: int, port: int, restart_count: int) -> dict[str, str]:
        place = self._place
        one = World(
            rank=place.first + index,
            world_size=place.world_size,
            local_rank=place.first_local + index,
            local_world_size=place.local_world_size,
            master_addr=place.master_addr,
            master_port=port,
            agent_store=True,
            restart_count=restart_count,
        )
        return self._env | one.to_env()

    def _pass_on(self) -> None:
        for number, insists in self.requests.take():
            self._take_request(number)
            if insists:
                self.ends_now = True
                return
            assert self.requests.first is not None  # this one, or another before it
            self.patience.asked(self.requests.first)
            self._signal_all(number)
        if self.requests.first is not None and not self._have_begun():
            self.ends_now = True

    def _take_request(self, number: int) -> None:
        """Called with each; for those who have to tell others of it."""

    def _have_begun(self) -> bool:
        """Whether there is anything that a stop can concern: ranks of a run that can agree on it, or a script."""
        return any(BEGUN in rank.reached for rank in self._ranks) if self.is_run else self._are_started

    def _hear(self) -> None:
        try:
            data = self._control.recv(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            self._lost = True
            return
        for message in map(json.loads, self._lines.feed(data)):
            self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        if "started" in message:
            self._are_started = True
        elif "ended" in message:
            rank = self._ranks[message["ended"]]
            self._read(rank, "report")  # what it has said comes by another way
            rank.end(message, self.is_run)
            if rank.has_failed:
                self._tell_failure(rank)
        elif "problem" in message:
            self._problem, self._lost = message["problem"], True

    def _read(self, rank: Rank, name: str) -> None:
        # Once, not until there is nothing: one that never stops writing must not hold up signals and failures.
        try:
            data = os.read(rank.readers[name], _PIECE)
        except BlockingIOError:
            return
        if not data:
            with contextlib.suppress(KeyError):
                self._selector.unregister(rank.readers[name])
        elif name == "report":
            self._take_report(rank, data)
        elif name == "stacks":
            rank.stacks += data
        else:
            self._output.write(rank.rank, name, data)

    def _take_report(self, rank: Rank, data: bytes) -> None:
        if rank.hear(data):
            assert rank.failure is not None  # it has told of one
            # Not printed by the rank: the console shows the report, with the traceback once.
            self._output.log(rank.rank, rank.failure.traceback.encode())
            self._tell_failure(rank)

    def _signal_all(self, number: int) -> None:
        """Also of the ranks that others watch over."""
        self._signal_own(number)

    def _signal_own(self, number: int) -> None:
        alive = [place for place, rank in enumerate(self._ranks) if rank.ended is None]
        with contextlib.suppress(OSError):
            self._send(do="signal", number=int(number), ranks=alive)

    def _send(self, **message: Any) -> None:
        self._control.sendall(json.dumps(message).encode() + b"\n")


def _died_of(failure: Failure, name: str) -> bool:
    return failure.exit_code == -getattr(signal, name) or (name == "SIGINT" and failure.kind == "KeyboardInterrupt")
