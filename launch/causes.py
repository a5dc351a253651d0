"""Whose fault it was, and in which words: from the exception in a rank to the order of all ranks' failures.

Machinery that passes an exception on wraps it: torch's DataLoader turns what a worker raised into the text of another
exception, and tells of a worker's death from wherever the rank happens to be. What is said here is what the user's own
code raised, or how the worker ended.
"""

from __future__ import annotations

import re
import signal
import sysconfig
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .job import Failure
from .memory import PERHAPS_THE_KERNEL, WORKER_DIED

ENDED_BY_US = "ended by the launcher, as it did not end by itself"
WAITED = "ended by the launcher while it waited for others"

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
        return Cause(WORKER_DIED, _of_worker(deaths[-1]), _where_users_code_was(error), is_consequence)
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
    """The cause first: the earliest failure that is not what a rank sees when another one has gone."""
    return tuple(sorted(failures, key=lambda failure: (follows(failure), failure.when)))


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


def _of_worker(death: re.Match[str]) -> str:
    pids, how = death.groups()
    if found := re.match(r"is killed by signal: (.*?)\. ", how):
        number = next((each for each in signal.Signals if signal.strsignal(each) == found[1]), None)
        end = f"was ended by {found[1] if number is None else explain(-number)}"
    elif found := re.search(r"with exit code (\d+)", how):
        end = f"ended its process with exit code {found[1]}"
    else:
        end = "ended without a word"
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
    """The traceback down to the last line that belongs to no library."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = tuple(str(Path(sysconfig.get_path(name))) for name in ("stdlib", "purelib", "platlib"))
    while frames and frames[-1].filename.startswith((*libraries, "<")):
        frames.pop()
    return "".join(["Traceback (most recent call last):\n", *frames.format()]) if frames else ""
