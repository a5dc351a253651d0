"""No process outlives the one that started it: the kernel's parent-death signal, and ending what has been left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
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


def end_session(session: int) -> None:
    """SIGKILL every process of a session; this one last, should it be of it."""
    me = os.getpid()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != me:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if os.getsid(int(entry.name)) == session:
                    os.kill(int(entry.name), signal.SIGKILL)
    if os.getsid(0) == session:
        os.kill(me, signal.SIGKILL)
