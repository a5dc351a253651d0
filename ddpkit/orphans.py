"""No process outlives the one that started it: the kernel's parent-death signal."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel SIGKILL this process once its parent is gone; SIGKILL since that alone can't be blocked.

    The signal follows the *thread* that started this process, so start processes from threads that stay.

    Args:
        parent_pid: who started us. If it has died before this call, no signal would ever come: exit now.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    if os.getppid() != parent_pid:
        os._exit(1)
