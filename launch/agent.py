"""The process in which torch's elastic agent runs; it starts the ranks of one machine and may start them again.

The agent has a thread of its own, since it would take over the signals of the main one, which serves the launcher
as `node` does: it hands out orders, passes on signals, tells how ranks have ended, and ends all that was started here
when the launcher is gone. What is known of a rank comes from itself: `agent_rank` says its pid as the first thing.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpkit import world
from ddpkit.errors import UserError
from ddpkit.orphans import adopt_orphans, on_parents_death

from .job import HELD_SIGNALS, STOP_SIGNALS, Terms
from .lines import Lines
from .memory import Watch
from .node import end_descendants, start_guard

if TYPE_CHECKING:
    from .meeting import Meeting
    from .torch_agent import TorchAgent

_LOOK_AT_PARENT_S = 1.0  # as in `node`
_LOOK_AT_RANKS_S = 0.5  # the agent's own look; ours is told by the kernel
_CLOSE_S = 4.0  # for other machines to hear of the end, and come to it too


def main(control_fd: str, settings: str, scratch: str) -> int:
    """Serve one launcher until it says to end, or is gone. ``scratch``: a directory to use and to remove."""
    control = socket.socket(fileno=int(control_fd))
    adopt_orphans()
    for number in STOP_SIGNALS:  # the launcher alone says what a stop means
        signal.signal(number, lambda *_: None)
    start_guard(control, scratch)
    with world.adopted({"TORCH_CPP_LOG_LEVEL": "FATAL"}):  # or the store's end is told at length, on the console
        importlib.import_module("torch.distributed.launcher.api")
    for name in ("meeting", "torch_agent"):
        importlib.import_module(f"{__package__}.{name}")
    on_parents_death(0)
    agent = _Agent(control, json.loads(settings), scratch)
    try:
        agent.serve()
    finally:
        end_descendants()
        shutil.rmtree(scratch, ignore_errors=True)  # if the launcher is not there to do so
    os._exit(0)  # the agent's thread may be anywhere, in a rendezvous that never comes about for one


class _Agent:
    def __init__(self, control: socket.socket, settings: dict[str, Any], scratch: str) -> None:
        self._control = control
        self._terms = Terms(**settings["terms"])
        self._endpoint: str | None = settings["endpoint"]
        self._join_s: int = settings["join_s"]
        self._meeting: Meeting | None = None
        self._scratch = scratch
        self._lines = Lines()
        self._sending = threading.Lock()
        self._parent = os.getppid()
        self._born, self._births = os.pipe()  # ranks say their names here
        self._birth_lines = Lines()
        self._orders = [os.pipe() for _ in range(self._terms.nproc)]
        self._waiting: dict[int, dict[str, int]] = {}
        self._ranks: dict[int, int] = {}  # local rank -> pid, of those that have their orders
        self._processes: dict[int, subprocess.Popen[bytes]] = {}  # by pid, of those whose end nobody waits for yet
        self._processes_come = threading.Condition()
        self._job: int | None = None
        self._memory = Watch()

    def serve(self) -> None:
        """Handle orders, and what ranks and the agent say, until the launcher wants no more."""
        threading.Thread(target=self._elastic, name="elastic-agent", daemon=True).start()
        while True:
            ready, _, _ = select.select([self._control.fileno(), self._born], [], [], _LOOK_AT_PARENT_S)
            if os.getppid() != self._parent:
                return
            self._memory.look(list(self._ranks.values()))
            if self._born in ready:
                self._take_births()
            if self._control.fileno() in ready and not self._take_orders():
                return

    def _elastic(self) -> None:
        from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

        from .meeting import open_meeting  # with torch, which is there by now

        # Its warnings and errors repeat what our own report says, without the cause.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        # Ranks inherit this: a stop that comes early waits until they can stop in order.
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
        try:
            self._meeting = open_meeting(self._terms, self._endpoint, self._join_s, self._tell)
            try:
                result = self._torch_agent(self._meeting).run()
            finally:
                self._meeting.shutdown()
            if result is None:
                self._tell(gave_up="the launchers of the other machines have come to their end")
            elif result.is_failed():
                self._tell(gave_up="the ranks ended before they had begun")
        except UserError as error:
            self._tell(refused=str(error))
        except RendezvousTimeoutError:
            terms = self._terms
            nodes = terms.min_nodes if terms.min_nodes == terms.max_nodes else f"{terms.min_nodes} or more"
            self._tell(
                gave_up=f"the launchers of {nodes} machines were to meet at {self._endpoint}, and not all have come "
                f"within {self._join_s} s: they were not started, or cannot reach it"
            )
        except Exception as error:  # noqa: BLE001 - whatever keeps the agents from meeting goes to the user
            self._tell(gave_up=f"torch's elastic agent gave up: {type(error).__name__}: {error}")

    def _torch_agent(self, meeting: Meeting) -> TorchAgent:
        from torch.distributed.elastic.agent.server.api import WorkerSpec
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.launcher.api import LaunchConfig

        from .torch_agent import TorchAgent

        terms = self._terms
        worlds = [nodes * terms.nproc for nodes in range(terms.min_nodes, terms.max_nodes + 1)]
        places = {"births": self._births, "orders": [reader for reader, _ in self._orders], "worlds": worlds}
        child = str(Path(__file__).with_name("child.py"))
        logs = DefaultLogsSpecs(log_dir=self._scratch)
        spec = WorkerSpec(
            role="default",
            local_world_size=terms.nproc,
            rdzv_handler=meeting,
            entrypoint=sys.executable,
            args=(child, "agent_rank", json.dumps(places)),
            max_restarts=terms.max_restarts,
            monitor_interval=_LOOK_AT_RANKS_S,
            local_addr="127.0.0.1" if terms.alone else None,
            # As torchrun binds ranks by default, to the processors near their GPUs.
            numa_options=LaunchConfig(terms.min_nodes, terms.max_nodes, terms.nproc, logs).numa_options,
        )
        return TorchAgent(spec, logs, self._take_processes)

    def _take_processes(self, processes: Iterable[subprocess.Popen[bytes]]) -> None:
        with self._processes_come:
            self._processes |= {process.pid: process for process in processes}
            self._processes_come.notify_all()

    def _take_births(self) -> None:
        for birth in map(json.loads, self._birth_lines.feed(os.read(self._born, 1 << 16))):
            self._waiting[birth["local_rank"]] = birth
        if len(self._waiting) == self._terms.nproc:
            assert self._meeting is not None  # it made them
            first = self._waiting[0]
            self._tell(
                round=self._meeting.rounds,
                first=first["rank"],
                world_size=first["world_size"],
                hosts=self._meeting.hosts,
                started={str(birth["rank"]): birth["pid"] for birth in self._waiting.values()},
            )

    def _take_orders(self) -> bool:
        try:
            data = self._control.recv(1 << 20)
        except ConnectionError:
            return False
        for order in map(json.loads, self._lines.feed(data)):
            if order["do"] == "start":
                self._start(order["job"], order["ranks"])
            elif order["do"] == "signal":
                self._signal(order["number"], order["ranks"])
            elif order["do"] == "attempt" and self._meeting is not None:
                self._meeting.publish_attempt(order["number"])
            elif order["do"] == "tell" and self._meeting is not None:
                self._meeting.publish_failure(order["round"], order["failure"])
            elif order["do"] == "end":
                if self._meeting is not None:
                    self._meeting.close_for_all(_CLOSE_S)
                return False
        return bool(data)

    def _start(self, job: dict[str, Any], orders: list[dict[str, Any]]) -> None:
        if self._job is not None:
            os.close(self._job)
        self._job = os.memfd_create("ddpkit-job")  # as large as what a call is given
        with os.fdopen(os.dup(self._job), "w") as file:
            json.dump(job, file)
        self._memory = Watch()
        self._ranks = {place: birth["pid"] for place, birth in self._waiting.items()}
        self._waiting = {}
        for place, pid in self._ranks.items():
            threading.Thread(target=self._await_end, args=(place, pid), daemon=True).start()
            line = json.dumps({"pid": pid, "job": self._job, "order": orders[place]})
            os.write(self._orders[place][1], line.encode() + b"\n")

    def _await_end(self, place: int, pid: int) -> None:
        with self._processes_come:
            self._processes_come.wait_for(lambda: pid in self._processes)
            process = self._processes.pop(pid)  # a later one may have the same number
        # By the object that the agent asks, too: of two that ask the kernel, one finds the status taken away.
        status = process.wait()
        when = time.monotonic()
        self._tell(ended=place, status=status, when=when, memory=vars(self._memory.last(pid)) if status else None)

    def _signal(self, number: int, places: list[int]) -> None:
        for place in places:
            with contextlib.suppress(ProcessLookupError, KeyError):
                os.kill(self._ranks[place], number)

    def _tell(self, **message: Any) -> None:
        with self._sending, contextlib.suppress(OSError):  # the launcher is gone; `serve` sees it
            self._control.sendall(json.dumps(message).encode() + b"\n")
