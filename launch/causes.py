"""Whose fault it was, and in which words: from the exception in a rank to the order of all ranks' failures.

Machinery that passes an exception on wraps it: torch's DataLoader turns what a worker raised into the text of another
exception, and tells of a worker's death from wherever the rank happens to be. What is said here is what the user's own
code raised, or how the worker ended.
"""

from __future__ import annotations

import re
import signal
import sysconfig
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

from .job import Failure
from .memory import PERHAPS_THE_KERNEL, WORKER_DIED

ENDED_BY_US = "ended by the launcher, as it did not end by itself"
WAITED = "ended by the launcher while it waited for others"
LEFT_EARLY = "left with exit code {code} while others were still at work"
LEFT_RUN = "left with exit code {code} before the run was done"

_CONSEQUENCE_KINDS = {
    "RankFailed",
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    # These say that others are late, and one of those may fail itself in the next moment.
    "CollectiveTimeout",
    "RanksMissing",
    "Stalled",
}
_CONSEQUENCE_TEXTS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Timed out waiting",
    "NCCL error",
    "ncclRemoteError",
    "gloo",
)
_WRAPPED = re.compile(r"Caught (\w+) in (.+?)\.\nOriginal (Traceback .*)", re.DOTALL)
_DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", re.DOTALL)
_FRAME = re.compile(r'  File "(.*)", line \d+')
_LOADER = "/torch/utils/data/dataloader.py"
_OWN = tuple(f"{Path(__file__).parents[1]}/{package}/" for package in ("ddpkit", "launch"))  # from a checkout, too
_LOST = (ConnectionError, EOFError)
_DYING_S = 1.0  # a process's connections are closed a moment before its parent can see its end


@dataclass(frozen=True)
class Cause:
    """What an exception says: its type, its text, where it was raised, and whether another rank is behind it."""

    kind: str
    message: str
    traceback: str
    is_consequence: bool


def cause_of(error: BaseException) -> Cause:
    """What to say of the exception that a rank ends with."""
    chain = list(_chain(error))
    is_consequence = any(is_consequence_like(type(each).__name__, str(each)) for each in chain)
    if isinstance(error, RuntimeError) and (deaths := [found for each in chain if (found := _DEATH.match(str(each)))]):
        # Of several that tell of the same death, the innermost knows how the worker ended.
        text = _of_worker(deaths[-1], {worker.pid: worker.exitcode for worker in _workers(chain)})
        return Cause(WORKER_DIED, text, _where_users_code_was(error), is_consequence)
    if any(map(_is_lost_connection, chain)) and (dead := _first_to_die(_workers(chain))) is not None:
        text = f"the loader worker with pid {dead.pid} {_ended(dead.exitcode)}"
        return Cause(WORKER_DIED, text, _where_users_code_was(error), is_consequence)
    if found := _WRAPPED.match(str(error)):
        kind, place, text = found.groups()
        text = _without_machinery(text)
        return Cause(kind, f"{_said(kind, text)} (in {place})", f"In {place}:\n{text}", is_consequence)
    text = "".join(traceback.format_exception(error))
    return Cause(type(error).__name__, str(error), text, is_consequence)


def is_consequence_like(kind: str, message: str) -> bool:
    """Whether a rank sees this when another one has gone or does not come."""
    return kind in _CONSEQUENCE_KINDS or (
        kind == "RuntimeError" and any(text in message for text in _CONSEQUENCE_TEXTS)
    )


def order_by_cause(failures: list[Failure]) -> tuple[Failure, ...]:
    """The cause first: the earliest failure that is not what a rank sees when another one has gone.

    Of a stall it is the rank that the others wait for that has failed, not the one that has noticed, nor those that it
    has told.
    """

    def place(failure: Failure) -> tuple[bool, bool, float]:
        is_behind = follows(failure)
        return is_behind, is_behind and failure.late is None, failure.when

    ordered = sorted(failures, key=place)
    if not ordered or ordered[0].late is None:
        return tuple(ordered)
    rank, host = ordered[0].late
    return (replace(ordered[0], rank=rank, host=host), *(each for each in ordered[1:] if each.rank != rank))


def follows(failure: Failure) -> bool:
    """Whether another failure is behind this one."""
    return failure.is_consequence or failure.message == ENDED_BY_US


def waits(stacks: str) -> bool:
    """Whether the main thread, which faulthandler shows last, waits inside torch or ddpkit, and not in user's code."""
    innermost = stacks.rpartition("(most recent call first):")[2].strip().partition("\n")[0]
    return "/torch/" in innermost or "/ddpkit/agree.py" in innermost


def explain(status: int) -> str:
    """An exit status in words; negative ones are signals."""
    if status >= 0:
        return f"exit code {status}"
    if -status not in set(signal.Signals):  # a real-time one
        return f"signal {-status}"
    name = signal.Signals(-status).name
    meaning = {
        "SIGKILL": f"killed from outside: by a person or another process{PERHAPS_THE_KERNEL}",
        "SIGSEGV": "a crash in native code",
        "SIGABRT": "native code gave up",
        "SIGBUS": "a memory access that failed; often /dev/shm or a mapped file's disk is full",
        "SIGILL": "an instruction that this processor does not have",
        "SIGFPE": "an arithmetic error in native code",
    }.get(name)
    return f"{name} ({meaning})" if meaning else name


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether somebody was not there any more; not where a worker has come across that, and has lived to tell of it."""
    return isinstance(error, _LOST) and " in DataLoader worker process " not in str(error)


def _workers(chain: list[BaseException]) -> list[BaseProcess]:
    """The workers of the DataLoaders that the exceptions have passed on their way."""
    found: dict[int, BaseProcess] = {}
    for error in chain:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename.endswith(_LOADER):
                workers = getattr(frame.f_locals.get("self"), "_workers", ())
                found |= {id(worker): worker for worker in workers}
    return list(found.values())


def _first_to_die(workers: list[BaseProcess]) -> BaseProcess | None:
    """One that has ended in error, or is about to: all that has been seen of it is that it is not there any more."""
    deadline = time.monotonic() + _DYING_S
    while workers:
        dead = [worker for worker in workers if worker.exitcode]
        if dead or time.monotonic() > deadline:
            # SIGTERM is what torch itself ends the others with.
            return min(dead, key=lambda worker: worker.exitcode == -signal.SIGTERM, default=None)
        time.sleep(0.01)
    return None


def _ended(exit_code: int | None) -> str:
    if not exit_code:
        return "ended without a word"
    return f"was ended by {explain(exit_code)}" if exit_code < 0 else f"ended its process with exit code {exit_code}"


def _of_worker(death: re.Match[str], exit_codes: dict[int | None, int | None]) -> str:
    pids, how = death.groups()
    if found := re.match(r"is killed by signal: (.*?)\. ", how):
        number = next((each for each in signal.Signals if signal.strsignal(each) == found[1]), None)
        end = f"was ended by {found[1]}" if number is None else _ended(-number)
    elif found := re.search(r"with exit code (\d+)", how):
        end = _ended(int(found[1]))
    else:  # torch has asked whether they live, and not how they have ended
        end = _ended(next((exit_codes[int(pid)] for pid in pids.split(",") if int(pid) in exit_codes), None))
    return f"the loader worker with pid {pids} {end}"


def _said(kind: str, text: str) -> str:
    """The exception's own words, from the end of its traceback."""
    last = None
    for last in re.finditer(rf"^(?:[\w.]+\.)?{re.escape(kind)}(?:: (.*))?$", text, re.MULTILINE):  # noqa: B007
        pass
    return (last[1] or kind) if last else kind


def _without_machinery(text: str) -> str:
    """A traceback's text without the frames of the DataLoader's worker."""
    kept: list[str] = []
    is_machinery = False
    for line in text.splitlines():
        if frame := _FRAME.match(line):
            is_machinery = "/torch/utils/data/_utils/" in frame[1]
        elif not line.startswith("    "):
            is_machinery = False
        if not is_machinery:
            kept.append(line)
    return "\n".join(kept).rstrip() + "\n"


def _where_users_code_was(error: BaseException) -> str:
    """The traceback down to the last line that belongs to no library, ddpkit itself included.

    Of the exception behind this one, where torch told of the death when the script had ended because of it.
    """
    for each in _chain(error):
        frames = traceback.extract_tb(each.__traceback__)
        while frames and _is_library(frames[-1].filename):
            frames.pop()
        if frames:
            return "".join(["Traceback (most recent call last):\n", *frames.format()])
    return ""


def _is_library(file: str) -> bool:
    # Those of an environment may lie in another one, on which it is built.
    is_installed = "/site-packages/" in file or "/dist-packages/" in file
    return is_installed or file.startswith((sysconfig.get_path("stdlib") + "/", *_OWN, "<"))
