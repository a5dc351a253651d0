"""A directory for temporary files of the ranks: those that are killed remove nothing themselves.

Who uses it holds a lock on it, which the kernel drops with the last process that has it open. One that nobody holds
was left by a start all of whose processes were killed at once; the next one on this machine removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from ddpkit.checkpoint.claim import Place
from ddpkit.errors import UserError


def make() -> tuple[str, int]:
    """Make one; gives its path, and a descriptor that says it is in use: for all processes that use it.

    Raises:
        UserError: the disk is full, say.
    """
    _sweep(Path(tempfile.gettempdir()))
    try:
        while True:
            path = tempfile.mkdtemp(prefix=_prefix())
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue  # somebody who sweeps has been faster
            if _is_held(path, descriptor):
                return path, descriptor
            os.close(descriptor)
    except OSError as error:
        raise UserError(
            f"no directory for temporary files can be made: {error.strerror or error}. Make room, or set TMPDIR to "
            "another place."
        ) from error


def _is_held(path: str, descriptor: int) -> bool:
    """Lock it; False if somebody who sweeps has been faster."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: nothing there is ever swept
    return Path(path).exists()


def _prefix() -> str:
    """Of this machine alone: others may share the file system, but not the locks. Short, as names of sockets are."""
    return f"ddpk-{hashlib.sha256(Place.here().boot_id.encode()).hexdigest()[:3]}-"


def _sweep(folder: Path) -> None:
    for path in folder.glob(f"{_prefix()}*"):
        with contextlib.suppress(OSError):  # another user's, or in use, or gone meanwhile
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
            finally:
                os.close(descriptor)
