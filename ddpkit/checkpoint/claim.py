"""Who may write into a run directory: a file that names the writer, a heartbeat, a fence. Imports no torch.

File locks are advice on network file systems, so nothing rests on one alone: a claim is a file that is
replaced whole, and its holder reads it again (`Claim.check`) before it commits anything.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ddpkit.errors import Superseded, UserError

NAME = "claim.json"
_LOCK_NAME = ".claim.lock"

_BEAT_S = 10.0
_SILENT_S = 60.0  # a holder on another host counts as dead after so long without a heartbeat
_LOCK_WAIT_S = 5.0  # a lock held longer than this (by a stopped process, a sick lock server) is ignored
_POLL_S = 0.1


@dataclass(frozen=True)
class Process:
    """A process of this host: its pid, and against reuse of that its start, in clock ticks since boot."""

    pid: int
    start: int

    @classmethod
    def running(cls, pid: int) -> Process:
        """The process that has this pid now; one that is gone already is never `alive`."""
        return cls(pid, _start_of(pid) or -1)

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return _start_of(self.pid) == self.start


@dataclass(frozen=True)
class Place:
    """Where pids mean the same processes: one boot of a host, one pid namespace (containers have theirs)."""

    host: str
    boot_id: str
    pid_namespace: str

    @classmethod
    def here(cls) -> Place:
        """That of this process."""
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(socket.gethostname(), boot_id, str(Path("/proc/self/ns/pid").readlink()))


@dataclass(frozen=True)
class Claimant:
    """Who asks for a run directory.

    launcher: the process whose death ends this one. job_id: the same over the restarts of a job, whose
    ``restart_count`` grows.
    """

    place: Place
    process: Process
    launcher: Process | None = None
    job_id: str | None = None
    restart_count: int = 0

    @classmethod
    def here(cls, launcher_pid: int | None = None, job_id: str | None = None, restart_count: int = 0) -> Claimant:
        """This process."""
        launcher = None if launcher_pid is None else Process.running(launcher_pid)
        return cls(Place.here(), Process.running(os.getpid()), launcher, job_id, restart_count)


@dataclass(frozen=True)
class Holder:
    """What a claim file says: who holds the run directory, under which token, since when (for people)."""

    token: str
    claimant: Claimant
    started_at: str


class _Verdict(enum.Enum):
    FREE = enum.auto()
    GOING_DOWN = enum.auto()  # its launcher is dead; it will follow
    HELD = enum.auto()
    HELD_BY_LATER_RESTART = enum.auto()


class Claim:
    """A run directory held by this process, from `acquire`: beats inside the context, releases at its end.

    A thread touches the file every 10 seconds, for those on other hosts, who cannot see whether this process
    lives.
    """

    def __init__(self, run_dir: Path, token: str) -> None:
        self._run_dir = run_dir
        self._path = run_dir / NAME
        self.token = token
        # Held open: a beat then reaches our own file even when another one has taken its name.
        self._descriptor = os.open(self._path, os.O_RDONLY)
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._keep_beating, name="ddpkit-claim", daemon=True)

    def __enter__(self) -> Claim:
        self._beats.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def check(self) -> None:
        """The fence: raise Superseded unless the claim file is still ours; OSError if it cannot be read."""
        try:
            found = _read(self._path)
        except FileNotFoundError:
            raise Superseded(f"{self._path} is gone: this run may not write to {self._run_dir} any more") from None
        if found is None or found.token != self.token:
            by = "something unreadable" if found is None else _who(found)
            raise Superseded(f"{self._run_dir} was taken over by {by}; this run may not write to it any more")

    def beat(self) -> None:
        """Touch the claim file, by the file server's clock."""
        os.utime(self._descriptor)

    def release(self) -> None:
        """Stop the heartbeat and remove the claim file if it is still ours. A second call does nothing."""
        if self._over.is_set():
            return
        self._over.set()
        if self._beats.is_alive():
            self._beats.join()
        # The whole run directory may be gone; somebody else's claim stays.
        with contextlib.suppress(OSError, Superseded), _locked(self._run_dir):
            self.check()
            self._path.unlink()
        os.close(self._descriptor)

    def _keep_beating(self) -> None:
        while not self._over.wait(_BEAT_S):
            with contextlib.suppress(OSError):  # replaced, or a file server that is away: `check` judges
                self.beat()


def acquire(run_dir: Path, me: Claimant, wait_s: float = 15.0) -> Claim:
    """Take the run directory (made if missing) for ``me``; use the result as a context manager.

    A dead holder on this host does not block; one whose launcher has died is waited for, ``wait_s`` seconds;
    one on another host (or in another container) blocks until 60 s after its last heartbeat. A higher restart
    count of the same job takes over at once, a lower one never does. A claim file that cannot be read is
    judged by its age, like that of another host.
    Raises UserError naming the holder, or when the directory cannot be written; Superseded for a lower
    restart count.
    """
    deadline = time.monotonic() + wait_s
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        while True:
            with _locked(run_dir):
                found, verdict, silent_s = _judged(run_dir, me)
                if verdict is _Verdict.FREE:
                    return _take(run_dir, me)
            if verdict is not _Verdict.GOING_DOWN or time.monotonic() > deadline:
                raise _refusal(run_dir, found, verdict, silent_s)
            time.sleep(_POLL_S)
    except OSError as error:
        raise UserError(
            f"{run_dir}: cannot be written: {error.strerror}; make it writable or choose another run_dir"
        ) from error


def holder(run_dir: Path, me: Claimant) -> Holder | None:
    """Who would refuse ``me`` the run directory now; None if nobody, or somebody going down. Read-only.

    The age of another host's heartbeat is taken by this host's clock, as nothing may be written: `acquire`
    decides.
    """
    try:
        found = _read(run_dir / NAME)
        silent_s = time.time() - (run_dir / NAME).stat().st_mtime
    except OSError:
        return None  # no claim, or nothing that could be read: `acquire` says so
    refused = _verdict(found, me, silent_s) in (_Verdict.HELD, _Verdict.HELD_BY_LATER_RESTART)
    return found if refused else None


def _judged(run_dir: Path, me: Claimant) -> tuple[Holder | None, _Verdict, float]:
    """The claim as found, what it means for ``me``, and the seconds since its last heartbeat."""
    try:
        found = _read(run_dir / NAME)
        silent_s = server_time(run_dir) - (run_dir / NAME).stat().st_mtime
    except FileNotFoundError:
        return None, _Verdict.FREE, 0.0
    return found, _verdict(found, me, silent_s), silent_s


def _verdict(found: Holder | None, me: Claimant, silent_s: float) -> _Verdict:
    if found is None:
        return _Verdict.FREE if silent_s > _SILENT_S else _Verdict.HELD
    other = found.claimant
    if me.job_id is not None and other.job_id == me.job_id and other.restart_count != me.restart_count:
        earlier = other.restart_count < me.restart_count
        return _Verdict.FREE if earlier else _Verdict.HELD_BY_LATER_RESTART
    if other.place != me.place:
        return _Verdict.FREE if silent_s > _SILENT_S else _Verdict.HELD
    if not other.process.alive:
        return _Verdict.FREE
    if other.launcher is not None and not other.launcher.alive:
        return _Verdict.GOING_DOWN
    return _Verdict.HELD


def _take(run_dir: Path, me: Claimant) -> Claim:
    token = uuid.uuid4().hex
    started_at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    content = json.dumps(asdict(Holder(token, me, started_at)), indent=1) + "\n"
    temporary = run_dir / f".{NAME}.{token}.tmp"
    try:
        with temporary.open("x") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(run_dir / NAME)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    claim = Claim(run_dir, token)
    try:
        claim.check()  # where locks do nothing, somebody else may have replaced it already
    except Superseded:
        claim.release()
        raise
    return claim


def _refusal(run_dir: Path, found: Holder | None, verdict: _Verdict, silent_s: float) -> UserError | Superseded:
    path = run_dir / NAME
    if found is None:
        return UserError(
            f"{path} is not a claim that ddpkit can read, and was written {max(silent_s, 0):.0f} s ago; "
            f"if no run is using {run_dir}, remove that file"
        )
    who = _who(found)
    if verdict is _Verdict.HELD_BY_LATER_RESTART:
        return Superseded(
            f"{run_dir} belongs to {who}, a later restart of this same job; this one may not write to it "
            f"(if that job only has the same number, remove {path})"
        )
    if verdict is _Verdict.GOING_DOWN:
        return UserError(
            f"{run_dir} is still in use by {who}, whose launcher has died but which has not ended; "
            f"end it (kill {found.claimant.process.pid}) and try again"
        )
    advice = "wait for it or stop it, or choose another run_dir"
    if found.claimant.place != Place.here():
        advice += (
            f"; its last sign of life was {max(silent_s, 0):.0f} s ago, and {_SILENT_S:.0f} s without one "
            "free the directory: if it is dead, try again then"
        )
    return UserError(f"{run_dir} is in use by {who}: {advice}")


def _who(found: Holder) -> str:
    claimant = found.claimant
    job = "" if claimant.job_id is None else f", job {claimant.job_id} restart {claimant.restart_count}"
    return f"process {claimant.process.pid} on host {claimant.place.host}{job} (since {found.started_at})"


def _read(path: Path) -> Holder | None:
    """The claim in a file; None if it is not one. Raises OSError, FileNotFoundError among them."""
    try:
        return _holder_from(json.loads(path.read_bytes()))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _holder_from(document: Any) -> Holder:
    """The reverse of asdict(Holder). Raises TypeError, KeyError or ValueError for anything else."""
    claimant = document["claimant"]
    launcher = claimant["launcher"]
    return Holder(
        token=str(document["token"]),
        started_at=str(document["started_at"]),
        claimant=Claimant(
            place=Place(**claimant["place"]),
            process=_process_from(claimant["process"]),
            launcher=None if launcher is None else _process_from(launcher),
            job_id=claimant["job_id"],
            restart_count=int(claimant["restart_count"]),
        ),
    )


def _process_from(document: Any) -> Process:
    return Process(int(document["pid"]), int(document["start"]))


def _start_of(pid: int) -> int | None:
    """When a process started, in ticks since boot; None if there is none, or only its zombie.

    Not psutil's create_time: that adds the boot time, which moves when the clock is set.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and parentheses
    return None if state in "ZX" else int(fields[18])


def server_time(folder: Path) -> float:
    """Now, by the clock that stamps the files of ``folder``: a file server's may differ from this host's."""
    probe = folder / f".{NAME}.{uuid.uuid4().hex}.tmp"
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Judge and replace one at a time, where locks work; where they do not, go on: `Claim.check` protects."""
    descriptor = os.open(run_dir / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while not _try_lock(descriptor) and time.monotonic() < deadline:
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Whether to go on: the lock is ours, or this file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
