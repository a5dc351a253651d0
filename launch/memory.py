"""How much memory ranks hold, and whether the kernel has ended one of them because it ran out.

The kernel says nothing to the victim's parent: it sees a SIGKILL like any other. But it counts such kills for each
control group (cgroup), before it sends the signal, and a look at the ranks about once a second says how much they held.
A look reads two small files for each process, about 30 us.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import defaultdict, deque
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from .job import Failure, Memory

WORKER_DIED = "LoaderWorkerDied"
"""The kind of failure that the death of a loader worker is."""

PERHAPS_THE_KERNEL = ", or by the kernel when memory ran out"
"""What is said of a SIGKILL as long as this has not been ruled out."""

RAN_OUT = "the kernel ended it because memory ran out"

_LOOK_EVERY_S = 0.9  # when asked about once a second
_RECENT_LOOKS = 30  # a rank may learn of its worker's death only when its step is over
_NO_LIMIT = 1 << 60  # cgroup v1 writes "none" as the largest number of whole pages
_KEPT_LOOKS = 5
_MORE, _MOST = 100, 1000  # of a thousandth of the memory each, counted on top of what the process holds
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Group:
    """A memory cgroup: its name in the hierarchy, its directory, and which of the two kinds of files are in there."""

    name: str
    directory: Path
    version: int

    def kills(self) -> int | None:
        """How many of its processes the kernel has ended because memory ran out; None if it does not count them."""
        return _number_after(self.directory / ("memory.events" if self.version == 2 else "memory.oom_control"))

    def limit(self) -> int | None:
        """Its own limit in bytes, if it has one."""
        try:
            name = "memory.max" if self.version == 2 else "memory.limit_in_bytes"
            value = int((self.directory / name).read_text())
        except (OSError, ValueError):  # the topmost has no such file, and "max" is no number
            return None
        return value if value < _NO_LIMIT else None


def own_groups(proc: Path = Path("/proc")) -> list[Group]:
    """The memory cgroup of this process and those around it, the innermost first; none if that cannot be seen.

    Args:
        proc: the proc file system.
    """
    try:
        memberships = [line.split(":", 2) for line in (proc / "self/cgroup").read_text().splitlines()]
        mounts = (proc / "self/mountinfo").read_text().splitlines()
    except OSError:
        return []
    # Where both kinds are mounted, the memory is with the one that names it.
    of_memory = next((path for _, controllers, path in memberships if "memory" in controllers.split(",")), None)
    version = 2 if of_memory is None else 1
    own = of_memory or next((path for _, controllers, path in memberships if not controllers), "/")
    for mount in mounts:
        seen, _, system = mount.partition(" - ")
        kind, _, options = system.split(" ", 2)
        if kind == ("cgroup2" if version == 2 else "cgroup") and (version == 2 or "memory" in options.split(",")):
            root, point = seen.split()[3:5]
            return _up(own, root, Path(point), version)
    return []


def _up(path: str, root: str, point: Path, version: int) -> list[Group]:
    # A container sees a part of the hierarchy, mounted as if it were all of it.
    inside = os.path.relpath(path, root)
    parts = () if inside.startswith("..") else Path(inside).parts
    names = [Path("/", *parts[:length]) for length in range(len(parts), -1, -1)]
    return [Group(str(name), point / name.relative_to("/"), version) for name in names]


@dataclass(frozen=True)
class _Held:
    when: float
    own: int = 0
    children: int = 0
    by_children: int = 0

    @property
    def total(self) -> int:
        return self.own + self.by_children


class Watch:
    """The memory of the ranks that one process has started, all in its own cgroup."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        groups = own_groups(proc)
        self._group = next((group for group in groups if group.kills() is not None), None)
        self._limit, self._limit_of = _smallest(groups, psutil.virtual_memory().total)
        self._held: dict[int, deque[_Held]] = defaultdict(lambda: deque(maxlen=_KEPT_LOOKS))
        self._looked = 0.0
        self._kills: deque[int | None] = deque([self._count()], maxlen=_RECENT_LOOKS)

    def look(self, ranks: Collection[int]) -> None:
        """See what these processes hold, unless that has just been done."""
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        self._kills.append(self._count())
        for rank in ranks:
            below = self._descendants(rank)
            self._held[rank].append(_Held(now, self._resident(rank), len(below), sum(map(self._resident, below))))

    def last(self, rank: int) -> Memory:
        """What process ``rank``, which has just ended, held when it held most, of the last few looks."""
        now = time.monotonic()
        # The very last one may have come when a worker, or the rank itself, was already gone.
        held = max(self._held.pop(rank, ()), key=lambda each: each.total, default=_Held(now))
        return Memory(
            held=held.own,
            children=held.children,
            held_by_children=held.by_children,
            held_by_all=held.total + sum(looks[-1].total for looks in self._held.values()),
            limit=self._limit,
            limit_of=self._limit_of,
            seen_s_before=round(now - held.when, 1),
            ran_out=self.ran_out(),
        )

    def ran_out(self) -> bool | None:
        """Whether the kernel has ended a process here lately because memory had run out; None if it does not tell."""
        kills, before = self._count(), self._kills[0]
        return None if kills is None or before is None else kills > before

    def _count(self) -> int | None:
        # Without a cgroup, all kills of the machine, of which somebody else's may be one.
        return self._group.kills() if self._group else _number_after(self._proc / "vmstat")

    def _resident(self, pid: int) -> int:
        try:
            return int((self._proc / f"{pid}/statm").read_text().split()[1]) * _PAGE
        except (OSError, IndexError):
            return 0

    def _descendants(self, pid: int) -> list[int]:
        # Those that its main thread has started, as loader workers are: asking each thread would cost more.
        found = []
        with contextlib.suppress(OSError):
            for child in (self._proc / f"{pid}/task/{pid}/children").read_text().split():
                found += [int(child), *self._descendants(int(child))]
        return found


def be_killed_first(proc: Path = Path("/proc")) -> None:
    """Have the kernel choose this process, and those it starts, before the ones that watch over it and report."""
    file = proc / "self/oom_score_adj"
    with contextlib.suppress(OSError, ValueError):
        file.write_text(str(min(int(file.read_text()) + _MORE, _MOST)))


def _smallest(groups: list[Group], machine: int) -> tuple[int, str]:
    limit, whose = machine, "this machine's memory"
    for group in groups:
        of_group = group.limit()
        if of_group is not None and of_group < limit:
            limit, whose = of_group, f"the limit of cgroup {group.name}"
    return limit, whose


def _number_after(file: Path) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def judge(failure: Failure, memory: Memory | None) -> Failure:
    """Put into words what memory had to do with a failure.

    Args:
        failure: of a rank that was not ended by its own launcher.
        memory: what it held; None if nobody looked.
    """
    if memory is None:
        return failure
    failure = replace(failure, memory=memory)
    killed = failure.exit_code == -signal.SIGKILL and not failure.kind
    if not killed and not (failure.kind == WORKER_DIED and "SIGKILL" in failure.message):
        return failure
    if memory.ran_out:
        text = f"{failure.message.partition(' (')[0]}: {RAN_OUT}. {describe(memory)}. "
        text += (
            "Give the job more memory, or use less: fewer ranks or loader workers on a node, a smaller "
            "data.loader.prefetch_factor, smaller batches"
        )
        return replace(failure, message=text)
    if memory.ran_out is not None:  # one of the guesses is ruled out
        failure = replace(failure, message=failure.message.replace(PERHAPS_THE_KERNEL, ""))
    return replace(failure, message=f"{failure.message}. {describe(memory)}") if memory.held else failure


def describe(memory: Memory) -> str:
    """The numbers as a sentence."""
    if not memory.held:
        return f"Nobody had looked at what it held; {memory.limit_of} is {_size(memory.limit)}"
    children = (
        f" and its {memory.children} child process(es) {_size(memory.held_by_children)}" if memory.children else ""
    )
    return (
        f"{memory.seen_s_before:g} s before its end the rank held {_size(memory.held)}{children}, all ranks there "
        f"{_size(memory.held_by_all)} (what they share counted in each); {memory.limit_of} is {_size(memory.limit)}"
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 10 * 2**30 else f"{count / 2**20:.0f} MiB"
