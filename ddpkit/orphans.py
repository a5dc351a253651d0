"""No process outlives the one that started it: the kernel's parent-death signal, and ending what has been left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel SIGKILL this process once its parent is gone; SIGKILL since that alone can't be blocked.

    The signal follows the *thread* that started this process, so start processes from threads that stay.

    Args:
        parent_pid: who started us. If it has died before this call, no signal would ever come: exit now.
    """
    on_parents_death(signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def on_parents_death(number: int) -> None:
    """Have the kernel send this process a signal when the thread that started it ends; 0 takes that back."""
    _prctl(_PR_SET_PDEATHSIG, int(number))


def adopt_orphans() -> None:
    """Have descendants whose parent dies become children of this process, which can then end them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


MARK = "DDPKIT_NODE"
"""A variable of a node process, which all that is started there inherits; daemons with a session of their own too."""


def end_marked(session: int, mark: str) -> None:
    """SIGKILL every process of a session, and all whose environment has this `MARK`.

    This process last, should it be of the session.
    """
    me = os.getpid()
    deadline = time.monotonic() + TIDY_S
    while True:
        is_late = time.monotonic() > deadline
        waited_for = 0
        for pid in _members(session, mark):
            if pid == me:
                continue
            if tidies_up(pid) and not is_late:
                waited_for += 1
                continue
            with contextlib.suppress(OSError):  # it has ended meanwhile
                os.kill(pid, signal.SIGKILL)
        if not waited_for:
            break
        time.sleep(0.02)
    if os.getsid(0) == session:
        os.kill(me, signal.SIGKILL)


def _members(session: int, mark: str) -> Iterator[int]:
    variable = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile, or it is somebody else's
                if os.getsid(int(entry.name)) == session or variable in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)


TIDY_S = 6.0
"""How long those that `tidies_up` are given, once the others have gone.

torch's waits 2 s for others to come, and a busy machine takes longer.
"""


def tidies_up(pid: int) -> bool:
    """Whether a process ends by itself when its users have gone, and removes what they have left in /dev/shm."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return any(name in command for name in (b"multiprocessing.resource_tracker", b"torch_shm_manager"))
