"""The process that starts the ranks of one node, and that their ends are told to.

It imports torch once and forks the ranks (``warm``), or starts each anew (``spawn``). What it imports is torch and
ddpkit, nothing of the user's; it runs no tensor operation (children of a process that ran a parallel one deadlock) and
touches no device, not even to ask whether there is one. A child of its own serves the rendezvous store of each
attempt (on the first node), so that no rank owns it.

It is also the guardian: when the launcher is gone, by whatever signal, its end of the control socket closes, and all
that was started here is ended. Ranks die with this process in turn (the kernel sees to it), and the store's process
then ends what the ranks had started.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import psutil

from ddpkit import rendezvous, world
from ddpkit.orphans import TIDY_S, adopt_orphans, die_with_parent, end_marked, on_parents_death, tidies_up

from . import rank as rank_process
from . import warm
from .job import HELD_SIGNALS, STOP_SIGNALS, Job, RankOrder
from .lines import Lines
from .memory import Watch

_LOOK_AT_PARENT_S = 1.0  # a forked child of the launcher may hold the control socket open


def main(control_fd: str, start_method: str, scratch: str) -> NoReturn:
    """Serve one launcher until it says to end, or is gone. ``scratch``: a directory to remove at the end."""
    control = socket.socket(fileno=int(control_fd))
    # Orphans of ranks (loader workers of plain scripts) come to this process, which can then end them.
    adopt_orphans()
    # Cluster managers signal every process of a job; the launcher alone says what a stop means. Handlers and not
    # SIG_IGN, which a rank that is started anew would inherit through exec.
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    if start_method == "warm":
        # Nothing looks at the control socket during the import, and there is nothing yet to clean up.
        on_parents_death(signal.SIGKILL)
        if _is_over(control):  # the launcher was gone before that signal was asked for
            _leave()
        warm.import_torch()
        on_parents_death(0)
    me = os.getpid()
    node = _Node(control, start_method, scratch)
    try:
        node.serve()
    finally:
        if os.getpid() == me:  # forked ranks leave through here too, with children that may outlive their script
            end_descendants()
            shutil.rmtree(scratch, ignore_errors=True)  # if the launcher is not there to do so
    _leave()


def _is_over(control: socket.socket) -> bool:
    ready, _, _ = select.select([control], [], [], 0)
    return bool(ready) and not control.recv(1, socket.MSG_PEEK)


def _leave() -> NoReturn:
    """End a process that has run no code but ours and torch's, and has nothing left to do.

    Not by the interpreter's own end, which takes apart all that has been imported, for a quarter of a second in which
    the launcher waits.
    """
    os._exit(0)


class _Node:
    def __init__(self, control: socket.socket, start_method: str, scratch: str) -> None:
        self._control = control
        self._listener: socket.socket | None = None
        self._start_method = start_method
        self._scratch = scratch
        self._lines = Lines()
        self._ranks: dict[int, int] = {}  # pid -> its place among the orders
        self._memory = Watch()
        self._parent = os.getppid()

    def serve(self) -> None:
        """Handle orders and ends of children until the launcher wants no more."""
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(woken, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, so that the wake-up is written
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._tell(ready=True)
        while True:
            ready, _, _ = select.select([self._control.fileno(), woken], [], [], _LOOK_AT_PARENT_S)
            if os.getppid() != self._parent:
                return
            if woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(woken, 4096)
            self._reap()
            self._memory.look(self._ranks)
            if self._control.fileno() in ready and not self._orders():
                return

    def _orders(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, 1 << 20, 1)
        if not data:
            return False
        for descriptor in descriptors:  # for the store of the attempt that is about to start
            self._listener = socket.socket(fileno=descriptor)
        for order in map(json.loads, self._lines.feed(data)):
            if order["do"] == "start":
                self._start(Job.from_json(order["job"]), [RankOrder(**each) for each in order["ranks"]])
            elif order["do"] == "signal":
                self._signal(order["number"], order["ranks"])
            elif order["do"] == "end":
                return False
        return True

    def _start(self, job: Job, orders: list[RankOrder]) -> None:
        end_descendants()  # of an attempt before: its store, whose keys mislead plain scripts, and what ranks have left
        if self._start_method == "warm" and job.kind in ("run", "eval"):
            warm.import_worker()
        start_guard(self._control, self._scratch, self._listener)
        if self._listener is not None:  # it was sent ahead
            self._listener.close()
            self._listener = None
        self._memory = Watch()
        for place, order in enumerate(orders):
            # A rank holds only its own ends: a pipe is at its end when those who write to it are gone.
            others = [fd for other in orders if other != order for fd in other.descriptors]
            if self._start_method == "warm":
                pid = _fork(partial(rank_process.run, job, order), self._control, others)
            else:
                pid = _spawn(job, order)
            self._ranks[pid] = place
        self._tell(started={str(orders[place].rank): pid for pid, place in self._ranks.items()})

    def _signal(self, number: int, places: list[int]) -> None:
        for pid, place in self._ranks.items():
            if place in places:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if (place := self._ranks.pop(pid, None)) is not None:
                self._tell(
                    ended=place,
                    status=os.waitstatus_to_exitcode(status),
                    when=time.monotonic(),
                    memory=vars(self._memory.last(pid)) if status else None,
                )

    def _tell(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # the launcher is gone; the next turn of the loop sees it
            self._control.sendall(json.dumps(message).encode() + b"\n")


def start_guard(control: socket.socket, scratch: str, listener: socket.socket | None = None) -> None:
    """Start a child that outlives this process by a moment; see `_guard`."""
    _fork(partial(_guard, listener, scratch), control, [])


def _guard(listener: socket.socket | None, scratch: str) -> NoReturn:
    """End what the ranks have started when the node process is gone; serve their store, if that falls to this node."""
    node = os.getppid()
    on_parents_death(signal.SIGTERM)  # blocked in this process, as in a new rank: only the wait below takes it
    kept = rendezvous.serve(listener) if listener is not None else None
    while os.getppid() == node:
        signal.sigwait(STOP_SIGNALS)
    del kept
    shutil.rmtree(scratch, ignore_errors=True)
    end_marked(node, scratch)  # the node process led this session
    _leave()


def _fork(body: Callable[[], int], control: socket.socket, others: list[int]) -> int:
    """Fork a child that runs ``body`` and ends with its result; returns the child's pid.

    The child closes its copies of ``control`` and of the descriptors ``others``. The socket by its object: were the
    descriptor closed behind its back, the object's own end would close whatever had taken that number meanwhile.
    """
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    # A rank is born with the signals blocked: one that comes early waits until the rank can stop in order.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # or all ranks would draw the same; Python's own does so by itself
    die_with_parent(parent)
    control.close()
    for descriptor in others:
        os.close(descriptor)
    # Through the interpreter's own exit, not os._exit: atexit functions and threads end as in any script.
    sys.exit(body())


def _spawn(job: Job, order: RankOrder) -> int:
    descriptor = os.memfd_create("ddpkit-order")
    with os.fdopen(os.dup(descriptor), "w") as file:
        json.dump({"job": job.to_json(), "order": vars(order)}, file)
    os.lseek(descriptor, 0, os.SEEK_SET)
    parent = os.getpid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)  # as in `_fork`; it lasts through exec
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("child.py")), "rank", str(descriptor)],
        pass_fds=[descriptor, *order.descriptors],
        env=world.environment() | order.env,
        preexec_fn=lambda: die_with_parent(parent),
    )
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(descriptor)
    process.returncode = 0  # reaped by waitpid above, not by subprocess
    return process.pid


def end_descendants() -> None:
    """SIGKILL all that descends from this process, and again what comes to it as orphans meanwhile."""
    me = psutil.Process()
    deadline = time.monotonic() + TIDY_S
    while children := me.children(recursive=True):
        for child in children:
            if tidies_up(child.pid) and time.monotonic() < deadline:
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        for child in me.children():
            with contextlib.suppress(psutil.Error, ChildProcessError):
                child.wait(timeout=1)
