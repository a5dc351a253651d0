"""One submission at a time from a run directory: who submits has a file there that can be made only once.

To make a file that must not be there yet is one step for a network file system's server as well, whereas locks are
advice there; and whoever has made it sees what others have made in the same directory before. Whether its maker still
lives can be seen on the same machine only. Elsewhere its age decides, by the server's clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from ddpkit.checkpoint.claim import Place, Process, server_time

_NAME = ".submitting"
_OLD_S = 600.0  # nobody takes so long, with a snapshot of the code and a busy controller
_POLL_S = 0.1


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """Submit from the run directory ``home``, which is made if need be, after all others that do so now.

    What has been made is removed, if nothing comes of it. Raises OSError where the directory cannot be written.
    """
    made: set[Path] = set()
    folder = home / "slurm"
    said = False
    while not _make(folder, made):
        if (holder := _holder(folder / _NAME)) is not None:
            if not said:
                print(f"ddpkit: {holder} submits from {home}; waiting", file=sys.stderr, flush=True)  # noqa: T201 - the launcher's own words
                said = True
            time.sleep(_POLL_S)
    try:
        yield
    finally:
        (folder / _NAME).unlink(missing_ok=True)
        for directory in sorted(made, reverse=True):
            with contextlib.suppress(OSError):  # there is something in it
                directory.rmdir()


def _make(folder: Path, made: set[Path]) -> bool:
    """Make the file; False if there is one."""
    for directory in (*reversed(folder.parents), folder):
        if not directory.exists():
            with contextlib.suppress(FileExistsError):
                directory.mkdir()
                made.add(directory)
    try:
        with (folder / _NAME).open("x") as file:
            json.dump({"place": asdict(Place.here()), "process": asdict(Process.running(os.getpid()))}, file)
    except (FileExistsError, FileNotFoundError):  # the folder, too, may just have been removed
        return False
    return True


def _holder(path: Path) -> str | None:
    """Who has made the file; None if that is over. A dead one's file is removed."""
    try:
        age_s = server_time(path.parent) - path.stat().st_mtime
        place, process = _told(path)
        is_here = place == Place.here() and process is not None
        if (is_here and process is not None and not process.alive) or (not is_here and age_s > _OLD_S):
            aside = path.with_name(f"{_NAME}.{uuid.uuid4().hex}")
            path.rename(aside)  # of several who find it, one can
            aside.unlink()
            return None
    except FileNotFoundError:
        return None
    return f"process {process.pid} on {place.host}" if place and process else "somebody"


def _told(path: Path) -> tuple[Place | None, Process | None]:
    try:
        told = json.loads(path.read_bytes())
        return Place(**told["place"]), Process(**told["process"])
    except (ValueError, TypeError, KeyError):
        return None, None  # it is being written, or its writer was killed in between
