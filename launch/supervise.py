"""Watch over the ranks of one node: pass on output and signals, find the first failure, leave nothing behind.

The launcher's side of `node`. One thread, one selector: everything that happens is an event with an order.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import cloudpickle

from ddpkit import rendezvous, world
from ddpkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER, DdpkitError
from ddpkit.world import World

from .job import Failure, Job, RankOrder
from .output import Output

_LINGER_S = 2.0  # after the first failure, for the others to report theirs; then they are ended
_END_S = 5.0  # for the node process to end everything and itself


class LaunchFailed(DdpkitError):
    """The ranks could not be started or watched."""


@dataclass(frozen=True)
class Outcome:
    """How a group of ranks ended.

    Attributes:
        exit_code: by ddpkit's rules, of the group as a whole.
        failures: of all ranks that failed, the cause first.
        results: what each rank's call returned, by rank ("call" jobs).
        stopped_by: the name of the signal that asked for the end, if one did.
    """

    exit_code: int
    failures: tuple[Failure, ...] = ()
    results: tuple[Any, ...] = ()
    stopped_by: str | None = None


@dataclass
class _Rank:
    rank: int
    order: RankOrder
    readers: dict[str, int]
    ended: int | None = None
    when: float = 0.0
    report: bytes = b""
    failure: Failure | None = None
    result: Any = None
    pending: list[str] = field(default_factory=list)


class Node:
    """A node process with its ranks, from entering the context to leaving it; then nothing of it is left.

    Args:
        nproc: ranks to start, all on this machine.
        start_method: "warm" or "spawn".
        env: variables for every rank besides those that say who it is.
        tick: called about once a second while ranks run.
    """

    def __init__(
        self, nproc: int, start_method: str, env: Mapping[str, str], tick: Callable[[], None] | None = None
    ) -> None:
        self._nproc = nproc
        self._start_method = start_method
        self._env = dict(env)
        self._tick = tick
        self._selector = selectors.DefaultSelector()
        self._pending = b""
        self._requested: str | None = None
        self._requests: list[int] = []
        self._woken, self._wake = os.pipe()
        self._ranks: list[_Rank] = []
        self._lost = False
        self.pids: dict[int, int] = {}

    def __enter__(self) -> Node:
        listener = rendezvous.listen()
        self._port = listener.getsockname()[1]
        self._control, theirs = socket.socketpair()
        self._ranks = [_with_pipes(rank) for rank in range(self._nproc)]
        ends = [fd for rank in self._ranks for fd in (rank.order.stdout, rank.order.stderr, rank.order.report)]
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("child.py")),
                "node",
                *(str(theirs.fileno()), str(listener.fileno()), self._start_method),
            ],
            pass_fds=[theirs.fileno(), listener.fileno(), *ends],
            env=world.environment() | self._env,
            stdin=subprocess.DEVNULL,
            # A session of its own: the terminal's Ctrl-C reaches this process alone, which passes it on once.
            start_new_session=True,
        )
        theirs.close()
        listener.close()
        for fd in ends:
            os.close(fd)
        self._selector.register(self._control, selectors.EVENT_READ, None)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        for rank in self._ranks:
            for name, fd in rank.readers.items():
                os.set_blocking(fd, False)
                self._selector.register(fd, selectors.EVENT_READ, (rank, name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._send(do="end")
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _end_session(self._process.pid)
        self._selector.close()
        self._control.close()
        for rank in self._ranks:
            for fd in rank.readers.values():
                os.close(fd)
        os.close(self._woken)
        os.close(self._wake)

    def request(self, number: int) -> None:
        """Pass a stop signal on to every rank; a second Ctrl-C ends them at once. Safe in a signal handler."""
        self._requests.append(number)
        os.write(self._wake, b"!")

    def run(self, job: Job, restart_count: int, output: Output) -> Outcome:
        """Start the ranks, and return when the last one has ended."""
        for rank in self._ranks:
            rank.ended, rank.report, rank.failure, rank.result = None, b"", None, None
        orders = [vars(rank.order) | {"env": self._rank_env(rank.rank, restart_count)} for rank in self._ranks]
        self._send(do="start", job=job.to_json(), ranks=orders)
        if self._requested is not None:  # before a restart
            self._signal_all(getattr(signal, self._requested))
        deadline: float | None = None
        while any(rank.ended is None for rank in self._ranks) and not self._lost:
            for key, _ in self._selector.select(timeout=0.2 if deadline else 1.0):
                if key.fileobj is self._control:
                    self._hear()
                elif key.data is None:
                    self._pass_on()
                else:
                    rank, name = key.data
                    self._read(rank, name, output)
            if self._tick is not None:
                self._tick()
            if deadline is None and any(_failed(rank) for rank in self._ranks):
                deadline = time.monotonic() + _LINGER_S
            if deadline is not None and time.monotonic() > deadline:
                # One that lingers after its error delays its neighbours as long; one in a collective never ends.
                self._signal_all(signal.SIGKILL)
        for rank in self._ranks:
            for name in rank.readers:
                self._read(rank, name, output)
        output.flush()
        return self._outcome()

    def _outcome(self) -> Outcome:
        if self._lost:
            status = self._process.wait(_END_S)
            raise LaunchFailed(
                f"the process that starts the ranks (pid {self._process.pid}) ended with {explain(status)} before "
                "they did; they were ended with it. Run it again to continue."
            )
        failures = order_by_cause([self._failure_of(rank) for rank in self._ranks if _failed(rank)])
        codes = {rank.ended for rank in self._ranks}
        interrupted = self._requested == "SIGINT"
        if EXIT_STOPPED in codes and not failures:
            code = EXIT_INTERRUPTED if interrupted else EXIT_STOPPED
        elif failures and self._requested is not None and all(_died_of(rank, self._requested) for rank in self._ranks):
            # A plain script, which ends by the signal as it would without us.
            return Outcome(EXIT_INTERRUPTED if interrupted else EXIT_FAILED, failures, stopped_by=self._requested)
        elif failures:
            code = EXIT_USER if failures[0].is_users_input else EXIT_FAILED
        else:
            code = EXIT_DONE
        return Outcome(code, failures, tuple(rank.result for rank in self._ranks), self._requested)

    def _failure_of(self, rank: _Rank) -> Failure:
        assert rank.ended is not None  # all have
        if rank.failure is not None:
            return rank.failure
        return Failure(rank.rank, socket.gethostname(), rank.when, rank.ended, message=explain(rank.ended))

    def _rank_env(self, rank: int, restart_count: int) -> dict[str, str]:
        one = World(
            rank=rank,
            world_size=self._nproc,
            local_rank=rank,
            local_world_size=self._nproc,
            master_addr="127.0.0.1",
            master_port=self._port,
            agent_store=True,
            restart_count=restart_count,
        )
        return self._env | one.to_env()

    def _pass_on(self) -> None:
        os.read(self._woken, 4096)
        while self._requests:
            number = self._requests.pop(0)
            if self._requested is not None and number == signal.SIGINT:
                number = signal.SIGKILL
            else:
                self._requested = self._requested or signal.Signals(number).name
            self._signal_all(number)

    def _hear(self) -> None:
        try:
            data = self._control.recv(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            self._lost = True
            return
        *lines, self._pending = (self._pending + data).split(b"\n")
        for message in map(json.loads, lines):
            if "started" in message:
                self.pids = {int(rank): pid for rank, pid in message["started"].items()}
            elif "ended" in message:
                rank = self._ranks[message["ended"]]
                rank.ended, rank.when = message["status"], message["when"]

    def _read(self, rank: _Rank, name: str, output: Output) -> None:
        while True:
            try:
                data = os.read(rank.readers[name], 1 << 16)
            except BlockingIOError:
                return
            if not data:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(rank.readers[name])
                return
            if name == "report":
                self._take_report(rank, data, output)
            else:
                output.write(rank.rank, name, data)

    def _take_report(self, rank: _Rank, data: bytes, output: Output) -> None:
        *lines, rank.report = (rank.report + data).split(b"\n")
        for message in map(json.loads, lines):
            if "failure" in message:
                rank.failure = Failure.from_json(message["failure"])
                # Not printed by the rank: the console shows the report, with the traceback once.
                output.log(rank.rank, rank.failure.traceback.encode())
            else:
                rank.result = cloudpickle.loads(base64.b64decode(message["result"]))

    def _signal_all(self, number: int) -> None:
        alive = [rank.rank for rank in self._ranks if rank.ended is None]
        with contextlib.suppress(OSError):
            self._send(do="signal", number=int(number), ranks=alive)

    def _send(self, **message: Any) -> None:
        self._control.sendall(json.dumps(message).encode() + b"\n")


@contextlib.contextmanager
def passing_on_signals(node: Node) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to the ranks for as long as the context lasts; for command lines."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    # Also where SIGINT was ignored on start (a script's background job): then it stays so.
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, lambda received, _frame: node.request(received))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def order_by_cause(failures: list[Failure]) -> tuple[Failure, ...]:
    """The cause first: the earliest failure that is not what a rank sees when another one has gone."""
    return tuple(sorted(failures, key=lambda failure: (_is_consequence(failure), failure.when)))


_CONSEQUENCES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Timed out waiting",
    "NCCL error",
    "ncclRemoteError",
    "gloo",
)


def _is_consequence(failure: Failure) -> bool:
    if failure.kind in ("RankFailed", "DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    return failure.kind == "RuntimeError" and any(sign in failure.message for sign in _CONSEQUENCES)


def explain(status: int) -> str:
    """An exit status in words; negative ones are signals."""
    if status >= 0:
        return f"exit code {status}"
    name = signal.Signals(-status).name
    meaning = {
        "SIGKILL": "killed from outside: by an administrator, another process, or the kernel when memory ran out",
        "SIGSEGV": "a crash in native code",
        "SIGABRT": "native code gave up",
        "SIGBUS": "a memory access that failed; often /dev/shm or a mapped file's disk is full",
        "SIGILL": "an instruction that this processor does not have",
        "SIGFPE": "an arithmetic error in native code",
    }.get(name)
    return f"{name} ({meaning})" if meaning else name


def _failed(rank: _Rank) -> bool:
    return rank.failure is not None or rank.ended not in (None, EXIT_DONE, EXIT_STOPPED)


def _died_of(rank: _Rank, name: str) -> bool:
    ended_by = rank.failure.kind if rank.failure is not None else ""
    return rank.ended in (EXIT_DONE, -getattr(signal, name)) or (name == "SIGINT" and ended_by == "KeyboardInterrupt")


def _with_pipes(rank: int) -> _Rank:
    pipes = {name: os.pipe() for name in ("stdout", "stderr", "report")}
    writers = {name: pipe[1] for name, pipe in pipes.items()}
    return _Rank(rank, RankOrder(rank, {}, **writers), {name: pipe[0] for name, pipe in pipes.items()})


def _end_session(session: int) -> None:
    """SIGKILL what is left of the node process's session, should that process itself have been killed."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if os.getsid(int(entry.name)) == session:
                    os.kill(int(entry.name), signal.SIGKILL)
