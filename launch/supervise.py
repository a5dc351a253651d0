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
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from ddpkit import orphans, rendezvous, world
from ddpkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER, DdpkitError, UserError
from ddpkit.world import World

from .attempts import AttemptFile
from .causes import ENDED_BY_US, WAITED, explain, order_by_cause, waits
from .job import STACK_SIGNAL, STOP_SIGNALS, Failure, Job, Memory, RankOrder
from .lines import Lines
from .memory import RAN_OUT, WORKER_DIED, Watch, judge
from .output import Output

_LINGER_S = 2.0  # after the first failure, for the others to report theirs; then they are ended
_DYING_S = 0.3  # the kernel frees a process's memory, and then tells of its end: later than others tell of theirs
_SAME_REQUEST_S = 2.0  # a second SIGTERM within this time counts as the first
_STACKS_S = 1.0  # for ranks to write where they are, before they are ended
_ASK_AGAIN_S = 2.0  # how much time there is left, of one who could not say
_END_S = 5.0  # for the node process to end everything and itself
_END_NOW_S = 0.5  # the same after a second Ctrl-C; it may be deep in an import
_PIECE = 1 << 20  # bytes read at a time: all that a pipe holds


class LaunchFailed(DdpkitError):
    """The ranks could not be started or watched."""


@dataclass(frozen=True)
class Outcome:
    """How a group of ranks ended.

    Attributes:
        exit_code: by ddpkit's rules, of the group as a whole.
        failures: of all ranks that failed, the cause first.
        results: what each rank's call returned, by rank ("call" jobs); in base64, by cloudpickle.
        stopped_by: the name of the signal that asked for the end, if one did.
        is_saved: the ranks have agreed on the stop, and saved their state.
        has_lost_node: another node cannot be reached any more.
        regroups: the ranks start again because nodes have come or gone.
    """

    exit_code: int
    failures: tuple[Failure, ...] = ()
    results: tuple[str, ...] = ()
    stopped_by: str | None = None
    is_saved: bool = False
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
    """A rank as its launcher sees it."""

    rank: int
    order: RankOrder
    readers: dict[str, int]
    ended: int | None = None
    when: float = 0.0
    report: Lines = field(default_factory=Lines)
    failure: Failure | None = None
    memory: Memory | None = None
    result: str = ""
    stacks: bytes = b""
    was_ended: bool = False

    def begin(self) -> None:
        """Forget the attempt before."""
        self.ended, self.report, self.failure, self.result = None, Lines(), None, ""
        self.stacks, self.was_ended = b"", False


class Node:
    """A node process with its ranks, from entering the context to leaving it; then nothing of it is left.

    Args:
        nproc: ranks to start, all on this machine.
        start_method: "warm" or "spawn".
        env: variables for every rank besides those that say who it is.
        place: where these ranks lie among all; by default they are all.

    Attributes:
        insistent: which of the stop signals end the ranks at once when they are repeated.
        time_left: asked in a thread, when the ranks are asked to stop (given the signal's name): why, and how many
            seconds they have at most; None if there is no end. Asked again if it raises a DdpkitError.
        ends_now: a repeated signal has ended the ranks.
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
        self._requested: str | None = None
        self._requested_at = 0.0
        self._requests: list[int] = []
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._ranks: list[Rank] = []
        self._lost = False
        self._problem: str | None = None
        self._memory = Watch()
        self._output = Output(None, tee_all=False)
        self._give_up_at: tuple[str, float] | None = None
        self._giving_up: tuple[str, float] | None = None
        self.insistent = frozenset(STOP_SIGNALS)
        self.time_left: Callable[[str], tuple[str, float] | None] | None = None
        self.ends_now = False
        self.pids: dict[int, int] = {}

    def __enter__(self) -> Node:
        self._control, theirs = socket.socketpair()
        self._scratch = _scratch()
        self._ranks = [_with_pipes(self._place.first + index, self._scratch) for index in range(self._nproc)]
        ends = [fd for rank in self._ranks for fd in rank.order.descriptors]
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("child.py")),
                *self._role(theirs.fileno()),
            ],
            pass_fds=[theirs.fileno(), *ends],
            env=world.environment() | self._env | {orphans.MARK: self._scratch},
            # A session of its own: the terminal's Ctrl-C reaches this process alone, which passes it on once.
            start_new_session=True,
        )
        theirs.close()
        for fd in ends:
            os.close(fd)
        self._watch(self._control, self._hear)
        self._watch(self._woken, self._pass_on)
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
        os.close(self._woken)
        os.close(self._wake)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _role(self, control: int) -> list[str]:
        """What the child process is to be: its arguments."""
        return ["node", str(control), self._start_method, self._scratch]

    def request(self, number: int) -> None:
        """Pass a stop signal on to every rank; a second one (Ctrl-C at once, SIGTERM after 2 s) ends them.

        Safe in a signal handler.
        """
        self._requests.append(number)
        with contextlib.suppress(BlockingIOError):  # it is full of earlier ones
            os.write(self._wake, b"!")

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
        self._output, self._giving_up = output, None
        for rank in self._ranks:
            rank.begin()
        with contextlib.suppress(ConnectionError):  # the node process has died; the loop below is told
            self._start(job, restart_count)
        for rank in self._ranks:
            output.log(rank.rank, b"")  # also of a rank that will never say a word
        if self._requested is not None:  # before a restart
            self._signal_all(getattr(signal, self._requested))
        deadline: float | None = None
        while not (self._all_ended() or self._lost or self.ends_now):
            self._handle_events(timeout_s=0.2 if deadline or self._giving_up else 1.0)
            self._give_up_when_due()
            if deadline is None and self._some_failed():
                deadline = time.monotonic() + _LINGER_S
            if deadline is not None and time.monotonic() > deadline:
                # One that lingers after its error delays its neighbours as long; one in a collective never ends.
                self._end_ranks()
        for rank in self._ranks:
            for name in rank.readers:
                self._read(rank, name)
        output.flush()
        return self._outcome()

    def give_up(self, why: str) -> None:
        """End the ranks that have not ended by themselves: as failed because of ``why``, with their stacks."""
        if self._giving_up is None:
            self._giving_up = (why, time.monotonic() + _STACKS_S)
            self._signal_own(STACK_SIGNAL)

    def _find_end(self, name: str) -> None:
        assert self.time_left is not None  # it is asked
        while True:
            try:
                found = self.time_left(name)
                break
            except DdpkitError:
                time.sleep(_ASK_AGAIN_S)
        if found is not None:
            self._give_up_at = (found[0], time.monotonic() + found[1])

    def _give_up_when_due(self) -> None:
        if self._give_up_at is not None and time.monotonic() > self._give_up_at[1]:
            why, self._give_up_at = self._give_up_at[0], None
            self.give_up(f"asked to stop ({why}), and did not in time: stuck, or its step or save took too long")
        if self._giving_up is None or time.monotonic() < self._giving_up[1]:
            return
        for rank in self._ranks:
            if rank.ended is None and rank.failure is None:
                stacks = rank.stacks.decode(errors="replace")
                is_waiting = waits(stacks)
                why = WAITED if is_waiting else self._giving_up[0]
                failure = self._failure(rank, -signal.SIGKILL, why, stacks)
                rank.failure = replace(failure, is_consequence=is_waiting)
                self._tell_failure(rank)
        self._end_ranks()

    def _end_ranks(self) -> None:
        self._signal_all(signal.SIGKILL)
        for rank in self._ranks:
            rank.was_ended = rank.was_ended or rank.ended is None

    def _watch(self, source: int | socket.socket, react: Callable[[], None]) -> None:
        if isinstance(source, int):
            os.set_blocking(source, False)
        self._selector.register(source, selectors.EVENT_READ, react)

    def _handle_events(self, timeout_s: float | None) -> None:
        for key, _ in self._selector.select(timeout_s):
            key.data()

    def _all_ended(self) -> bool:
        return all(rank.ended is not None for rank in self._ranks)

    def _some_failed(self) -> bool:
        return any(_failed(rank) for rank in self._ranks)

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
        if self.ends_now:
            code = EXIT_INTERRUPTED if self._requested == "SIGINT" else EXIT_FAILED
            return Outcome(code, stopped_by=self._requested)
        if self._problem is not None:
            raise LaunchFailed(self._problem)
        if self._lost:
            status = self._process.wait(_END_S)
            how = f"SIGKILL, {RAN_OUT}," if status == -signal.SIGKILL and self._memory.ran_out() else explain(status)
            raise LaunchFailed(
                f"the process that starts the ranks (pid {self._process.pid}) ended with {how} before "
                "they did; they were ended with it. Run it again to continue."
            )
        failures = order_by_cause(self._failures())
        interrupted = self._requested == "SIGINT"
        if failures:
            if self._requested is not None and _died_of(failures[0], self._requested):
                failures = ()  # a plain script, which ends by the signal as it would without us
            code = EXIT_USER if failures and failures[0].is_users_input else EXIT_FAILED
            return Outcome(EXIT_INTERRUPTED if interrupted else code, failures, stopped_by=self._requested)
        if self._some_stopped():
            code = EXIT_INTERRUPTED if interrupted else EXIT_STOPPED
            return Outcome(code, stopped_by=self._requested, is_saved=True)
        return Outcome(EXIT_DONE, (), self._results(), self._requested)

    def _failures(self) -> list[Failure]:
        return [self._failure_of(rank) for rank in self._ranks if _failed(rank)]

    def _some_stopped(self) -> bool:
        return any(rank.ended == EXIT_STOPPED for rank in self._ranks)

    def _results(self) -> tuple[str, ...]:
        return tuple(rank.result for rank in self._ranks)

    def _failure_of(self, rank: Rank) -> Failure:
        failure = rank.failure
        if failure is None:
            assert rank.ended is not None  # or there would be no failure to tell of
            if rank.was_ended:
                return self._failure(rank, rank.ended, ENDED_BY_US)
            failure = self._failure(rank, rank.ended, explain(rank.ended))
            # So end those who find that another one is gone, or who are ended because of it.
            if rank.ended not in (-signal.SIGABRT, -signal.SIGTERM):
                failure = replace(failure, when=failure.when - _DYING_S)
        if failure.kind == WORKER_DIED or not (failure.kind or failure.traceback):  # no words of the user's but these
            failure = replace(failure, last_lines=self._output.unseen(rank.rank))
        return failure if rank.was_ended else judge(failure, rank.memory)

    def _failure(self, rank: Rank, exit_code: int, message: str, traceback: str = "") -> Failure:
        when = rank.when or time.monotonic()
        return Failure(rank.rank, socket.gethostname(), when, exit_code, message=message, traceback=traceback)

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
        os.read(self._woken, 4096)
        while self._requests:
            number = self._requests.pop(0)
            again_s = time.monotonic() - self._requested_at
            # A cluster manager may send SIGTERM twice at once; a person, or a script, that asks again means it.
            insists = number in self.insistent and (number == signal.SIGINT or again_s > _SAME_REQUEST_S)
            self.ends_now = self._requested is not None and insists
            if self.ends_now:
                self._requested = signal.Signals(number).name
                return
            if self._requested is None:
                self._requested, self._requested_at = signal.Signals(number).name, time.monotonic()
                if self.time_left is not None:  # it may take long: not in the loop
                    threading.Thread(target=self._find_end, args=(self._requested,), daemon=True).start()
            self._signal_all(number)

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
            self.pids = {int(rank): pid for rank, pid in message["started"].items()}
        elif "ended" in message:
            rank = self._ranks[message["ended"]]
            rank.ended, rank.when = message["status"], message["when"]
            rank.memory = Memory(**message["memory"]) if message["memory"] else None
            if _failed(rank):
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
        for message in map(json.loads, rank.report.feed(data)):
            if "failure" in message:
                rank.failure = Failure.from_json(message["failure"])
                # Not printed by the rank: the console shows the report, with the traceback once.
                self._output.log(rank.rank, rank.failure.traceback.encode())
                self._tell_failure(rank)
            else:
                rank.result = message["result"]

    def _signal_all(self, number: int) -> None:
        """Also of the ranks that others watch over."""
        self._signal_own(number)

    def _signal_own(self, number: int) -> None:
        alive = [place for place, rank in enumerate(self._ranks) if rank.ended is None]
        with contextlib.suppress(OSError):
            self._send(do="signal", number=int(number), ranks=alive)

    def _send(self, **message: Any) -> None:
        self._control.sendall(json.dumps(message).encode() + b"\n")


def signal_number(name: str) -> signal.Signals:
    """The signal called ``name``, without SIG."""
    return signal.Signals[f"SIG{name}"]


@contextlib.contextmanager
def holding_back(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Let signals wait for `passing_on_signals`. Those that come too late for it are dropped at the end.

    What is started meanwhile never gets them, unless it asks.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        while signals and signal.sigtimedwait(signals, 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def passing_on_signals(node: Node, signals: tuple[signal.Signals, ...] = STOP_SIGNALS) -> Iterator[None]:
    """Pass stop signals on to the ranks for as long as the context lasts; for command lines."""
    # Also where SIGINT was ignored on start (a script's background job): then it stays so.
    before = {number: signal.getsignal(number) for number in signals}
    for number in signals:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, lambda received, _frame: node.request(received))
        if getattr(before[number], "received", False):  # while there was nobody to pass it on to, and it got lost
            node.request(number)
    held = signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for number, handler in before.items():
            # After a second Ctrl-C the clean-up that follows is not for a third one to garble.
            signal.signal(number, signal.SIG_IGN if node.ends_now else handler)


def _failed(rank: Rank) -> bool:
    return rank.failure is not None or rank.ended not in (None, EXIT_DONE, EXIT_STOPPED)


def _died_of(failure: Failure, name: str) -> bool:
    return failure.exit_code == -getattr(signal, name) or (name == "SIGINT" and failure.kind == "KeyboardInterrupt")


def _scratch() -> str:
    """A directory for temporary files of the ranks: those that are killed remove nothing themselves."""
    try:
        return tempfile.mkdtemp(prefix="ddpk-")  # no longer than multiprocessing's own: sockets have short names
    except OSError as error:
        raise UserError(
            f"no directory for temporary files can be made: {error.strerror or error}. Make room, or set TMPDIR to "
            "another place."
        ) from error


def _with_pipes(rank: int, scratch: str) -> Rank:
    pipes = {name: os.pipe() for name in RankOrder.PIPES}
    writers = {name: pipe[1] for name, pipe in pipes.items()}
    return Rank(rank, RankOrder(rank, {}, scratch, **writers), {name: pipe[0] for name, pipe in pipes.items()})
