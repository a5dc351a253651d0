"""Beside a rank that waits for the others to come: a stop, or too long a wait, ends it.

Until the group has formed there is nobody to agree with, and the main thread waits in C++ that nothing interrupts. Nor
is there anything to save. So this thread ends the process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from ddpkit.errors import EXIT_FAILED, EXIT_STOPPED, DdpkitError, Stalled
from ddpkit.stop import Requests
from ddpkit.world import World

log = logging.getLogger("ddpkit")

_LOOK_S = 0.2
_AGREE_S = 3.0  # for the group to form after all: then the stop is one of all ranks, as everywhere
_ASK_S = 5.0  # for the store to say who has come


class GatheringWatch:
    """Watches over the wait for the other ranks, from entering the context to leaving it.

    Args:
        world: who this rank is.
        requests: what asks this rank to stop; entered already.
        missing: asks the store which ranks have not come, over a connection of its own; given the seconds it may take.
        timeout_s: seconds without the others that are too long.
        come_back: called before a stop ends this process; sees to a Slurm job's return.
    """

    def __init__(
        self,
        world: World,
        requests: Requests,
        missing: Callable[[float], list[int]],
        timeout_s: float,
        come_back: Callable[[str], None],
    ) -> None:
        self._world = world
        self._requests = requests
        self._missing = missing
        self._timeout_s = timeout_s
        self._come_back = come_back
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ddpkit-gathering", daemon=True)

    def __enter__(self) -> GatheringWatch:
        if self._world.world_size > 1:  # a single process waits for nobody
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self._requests.wake()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        began = time.monotonic()
        while not self._leaving.is_set():
            self._requests.wait(_LOOK_S)
            now, reason = time.monotonic(), self._requests.reason
            if reason is not None and now > self._requests.since + _AGREE_S:
                self._stop(reason)
            elif now > began + self._timeout_s:
                self._fail()

    def _stop(self, reason: str) -> None:
        if self._leaving.is_set():
            return
        log.warning(
            "rank %d was stopped (%s) while it waited for other ranks to start; nothing had begun",
            self._world.rank,
            reason,
        )
        try:
            self._come_back(reason)
        except DdpkitError as error:  # it has come back too often, say
            end_process(error)
        _leave(EXIT_STOPPED)

    def _fail(self) -> None:
        found = self._found()
        if not self._leaving.is_set():
            end_process(
                Stalled(f"the ranks have not come together for {self._timeout_s:g} s (stall_timeout_s): {found}")
            )

    def _found(self) -> str:
        said: list[str] = []
        # In a thread of its own: torch's client waits for ever on a port that belongs to something else.
        asking = threading.Thread(target=lambda: said.append(self._ask()), name="ddpkit-asking", daemon=True)
        asking.start()
        asking.join(2 * _ASK_S)
        return said[0] if said else f"what listens at {self._master()} is not a store of torch's"

    def _ask(self) -> str:
        try:
            if self._world.master_port is not None:  # torch's client would try for twice as long, and not quietly
                socket.create_connection((self._world.master_addr or "", self._world.master_port), _ASK_S).close()
            missing = self._missing(_ASK_S)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is why rank zero cannot be asked
            why = next(iter(str(error).splitlines()), type(error).__name__)
            return f"rank 0 cannot be reached at {self._master()}. Was it started? Is the way to it open? ({why})"
        if not missing:
            return "all have come, and some have not gone on from there; look for a process that is stopped"
        return f"rank {', '.join(map(str, missing))} did not come. Was it started, and what has it said?"

    def _master(self) -> str:
        port = self._world.master_port
        return f"{self._world.master_addr}{'' if port is None else f':{port}'}"


def end_process(error: DdpkitError) -> None:
    """End this process with an error from a thread beside a main thread that nothing wakes. Does not return."""
    # By this hook launchers hear of it; by itself it prints the error.
    threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, None)))
    _leave(EXIT_FAILED)


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
