"""Who is where: asked of all ranks when some of them wait too long, and what follows from the answers.

A collective's own error names no rank, and most of what gets stuck raises no error at all. So a rank that has waited
too long asks, a thread beside each rank answers for its main thread, whatever that one is doing, and only a process
that is stopped, or out of reach, stays silent.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store  # where torch.distributed has it from, with its type

from ddpkit.checkpoint.claim import Place, Process
from ddpkit.errors import DdpkitError
from ddpkit.heartbeat import Heartbeat

WAIT_S = 3.0  # for the answers; the threads look every half second
_ASKED = "rollcall/asked"
_BUSY_LOOKS, _BUSY_PAUSE_S = 10, 0.01
_FRAMES = 20  # of a stack, the innermost ones
# With the separator: the user's own folder may begin with the same letters.
_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS = tuple(str(Path(__file__).parents[1] / package) + os.sep for package in ("ddpkit", "launch"))
_PYTHON = sysconfig.get_path("stdlib") + os.sep
# Where Python calls into collectives, or into what waits for them: the backward pass does, under DDP and FSDP.
_COLLECTIVE = tuple(_TORCH + path for path in ("distributed" + os.sep, "nn/parallel" + os.sep, "autograd" + os.sep))
_EXEMPT = ("main_first", "restoring", "saving")  # where one rank works while the others wait, for as long as it takes


class CollectiveTimeout(DdpkitError):
    """Some ranks did not come to a collective in time; the message says where they are instead."""


@dataclass(frozen=True)
class Answer:
    """Where a rank is.

    Attributes:
        phase: see `Heartbeat`.
        step: optimizer steps finished.
        waits_for: what it waits for other ranks for; None if it does not, as far as it can tell.
        still_s: seconds since it has got anything done.
        collectives: how many of the process group's it has begun.
        at: the user's line that it is at.
        stack: its Python stack, the innermost frames.
        is_busy: its main thread computes.
    """

    phase: str
    step: int
    waits_for: str | None
    still_s: float
    collectives: int
    at: str
    stack: list[str] = field(default_factory=list)
    is_busy: bool = False


@dataclass(frozen=True)
class Verdict:
    """What follows from a roll-call: whether the run cannot go on, the words for it, and who is to blame."""

    is_stalled: bool
    text: str
    late: tuple[int, ...] = ()


# ---------------------------------------------------------------------- one rank


def place(heartbeat: Heartbeat) -> Answer:
    """Where this process's main thread is; for another thread to ask, which adds for how long."""
    main = threading.main_thread()
    frame = sys._current_frames().get(main.ident) if main.ident is not None else None
    if frame is None:
        return Answer(heartbeat.phase, heartbeat.step, None, 0.0, collectives(), "its end")
    innermost = frame.f_code.co_filename
    stack = traceback.extract_stack(frame)
    users = [number for number, each in enumerate(stack) if _is_users(each.filename)]
    at = stack[users[-1] if users else -1]
    shown = stack[users[0] :] if users else stack  # how a rank came to be says nothing about where it is
    waits_for, is_busy = heartbeat.waits_for, _is_busy(main)
    if waits_for is None and innermost.startswith(_COLLECTIVE) and not is_busy:
        waits_for = "a collective"
    return Answer(
        phase=heartbeat.phase,
        step=heartbeat.step,
        waits_for=waits_for,
        still_s=0.0,
        collectives=collectives(),
        at=f"{at.filename}:{at.lineno} in {at.name}: {at.line}",
        stack=[line.rstrip("\n") for line in traceback.format_list(shown[-_FRAMES:])],
        is_busy=is_busy,
    )


def _is_users(file: str) -> bool:
    is_library = file.startswith((_TORCH, *_OURS, "<"))
    return not is_library and (not file.startswith(_PYTHON) or "site-packages" in file)


def collectives() -> int:
    """How many collectives of the default group this rank has begun; 0 if there is none."""
    try:
        return _begun(dist.distributed_c10d._get_default_group())
    except ValueError:  # no group
        return 0


def position() -> object:
    """Something that changes whenever this rank begins a collective, of whatever group."""
    return [_begun(group) for group in list(dist.distributed_c10d._world.pg_map)]


def _begun(group: dist.ProcessGroup) -> int:
    try:
        # Private, and without another way to it; not declared either.
        count: int = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    except (RuntimeError, AttributeError):  # a backend that does not count, a group that is going
        return 0
    return count


def _is_busy(thread: threading.Thread) -> bool:
    """Whether a thread computes: the same frames stand on the stack of a backward pass that does.

    By its state, and not by the time that it gets: on a busy machine that is little.
    """
    runs = 0
    for _ in range(_BUSY_LOOKS):
        time.sleep(_BUSY_PAUSE_S)
        runs += _state(f"self/task/{thread.native_id}") == "R"
    return runs > _BUSY_LOOKS / 2


def _state(process: object) -> str | None:
    """The letter that the kernel has for what a process or thread does; None if it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


# ---------------------------------------------------------------------- all ranks, over the store


def sign_on(store: Store, rank: int) -> None:
    """Leave word of which process this rank is, for when it will not answer."""
    store.set(f"rollcall/process/{rank}", json.dumps([asdict(Place.here()), asdict(Process.running(os.getpid()))]))


def asked(store: Store) -> int:
    """The number of the newest roll-call; 0 if there was none."""
    return int(store.get(_ASKED).split()[0]) if store.check([_ASKED]) else 0


def answer(store: Store, call: int, rank: int, place: Answer) -> None:
    """Answer a roll-call."""
    store.set(f"rollcall/{call}/{rank}", json.dumps(asdict(place)))


def ask(store: Store, rank: int, answered: int | None = None) -> tuple[int, bool]:
    """Ask all ranks where they are.

    Args:
        store: of the roll-calls.
        rank: who asks.
        answered: this rank's newest answer, if it is not to ask while another's question waits for one: of two that
            ask at once, each would wait for the other's answer.

    Returns:
        The roll-call's number, and whether it is this rank's own, or another's.
    """
    newest = store.get(_ASKED).decode() if store.check([_ASKED]) else ""
    number = int(newest.partition(" ")[0] or 0)
    if answered is not None and number > answered:
        return number, False
    own = f"{number + 1} {rank}"
    standing = store.compare_set(_ASKED, newest, own).decode()
    return int(standing.split()[0]), standing == own


def gather(store: Store, call: int, world_size: int) -> dict[int, Answer | None]:
    """Every rank's answer; None from those that give none within `WAIT_S`."""
    keys = [f"rollcall/{call}/{rank}" for rank in range(world_size)]
    deadline = time.monotonic() + WAIT_S
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(0.05)
    found = [store.get(key) if store.check([key]) else None for key in keys]
    return {rank: Answer(**json.loads(said)) if said is not None else None for rank, said in enumerate(found)}


def silence(store: Store, rank: int) -> str:
    """Why a rank may give no answer: the state of its process, if that is on this machine."""
    if not store.check([f"rollcall/process/{rank}"]):
        return "has not come this far"
    where, process = json.loads(store.get(f"rollcall/process/{rank}"))
    of = f"process {process['pid']} on {where['host']}"
    if Place(**where) != Place.here():
        return f"gives no answer: stopped, or out of reach ({of})"
    if not Process(**process).alive:
        return f"has ended ({of})"
    if (state := _state(process["pid"])) is None:
        return f"has ended ({of})"
    meaning = {
        "T": "it is stopped (SIGSTOP)",
        "t": "it is stopped by a debugger",
        "D": "it is stuck in the kernel, on a disk or a file server",
        "R": "it runs, and does not let go of the interpreter",
    }.get(state, f"its state is {state}")
    return f"gives no answer: {meaning} ({of})"


def host_of(store: Store, rank: int) -> str | None:
    """The host of a rank that has signed on."""
    key = f"rollcall/process/{rank}"
    return str(json.loads(store.get(key))[0]["host"]) if store.check([key]) else None


def report(store: Store, rank: int, world_size: int) -> str:
    """Call the roll, and put the answers into words."""
    call, _ = ask(store, rank)
    return judge(gather(store, call, world_size), partial(silence, store), 0.0).text


def explain_timeout(
    store: Store, rank: int, world_size: int, heartbeat: Heartbeat, timeout_s: float
) -> CollectiveTimeout:
    """Call the roll for a collective that has just timed out on this rank's main thread."""
    with heartbeat.waiting("a collective"):
        own, _ = ask(store, rank)
        # Ranks time out one after the other; the first to do so asks for all, before anyone has left.
        call = int(store.compare_set("rollcall/timeout", "", str(own)))
        answers = gather(store, call, world_size)
    verdict = judge(answers, partial(silence, store), timeout_s)
    return CollectiveTimeout(
        f"a collective did not complete within {timeout_s:g} s (launch.timeout_s):\n{verdict.text}"
    )


# ---------------------------------------------------------------------- what it means


def judge(
    answers: Mapping[int, Answer | None], silence: Callable[[int], str], timeout_s: float, is_stopping: bool = False
) -> Verdict:
    """Say who is late, and whether that cannot go on.

    Args:
        answers: by rank.
        silence: what is known of a rank without an answer.
        timeout_s: seconds without anything done that are too long.
        is_stopping: all have been asked to stop. Then a rank that does nothing is stuck though no other one waits for
            it; and since the time is short, one that computes is not.
    """
    silent = [rank for rank, answer in answers.items() if answer is None]
    there = {rank: answer for rank, answer in answers.items() if answer is not None}
    waiting = {rank: answer for rank, answer in there.items() if _waits(answer, there, timeout_s)}
    late = {rank: answer for rank, answer in there.items() if rank not in waiting}
    # Half of it: the late ones began what they are at a little later than those that now wait for them.
    stuck = [
        rank
        for rank, each in late.items()
        if each.phase not in _EXEMPT and each.still_s >= timeout_s / 2 and not (is_stopping and each.is_busy)
    ]
    lines = [f"rank {rank} {silence(rank)}" for rank in silent]
    lines += [f"rank {rank} {_where(answer)}" for rank, answer in late.items()]
    if not waiting and not (is_stopping and stuck):
        return Verdict(False, "\n".join(["no rank waits for another:", *lines, *_stacks(late)]))
    waits = [f"rank {rank} waits for {_for(answer)}" for rank, answer in waiting.items()]
    if not late and not silent:
        head = "all ranks wait, for different things or in collectives that do not match: they have parted ways"
        return Verdict(True, "\n".join([f"{head}:", *waits]))
    is_stalled = bool(stuck or silent)
    stacks = _stacks({rank: late[rank] for rank in stuck}) if is_stalled else []
    return Verdict(is_stalled, "\n".join([*lines, *waits, *stacks]), tuple(sorted([*silent, *stuck])))


def _stacks(answers: Mapping[int, Answer]) -> list[str]:
    return [
        "\n".join([f"rank {rank}, Python stack:", *answer.stack]) for rank, answer in answers.items() if answer.stack
    ]


def _waits(answer: Answer, there: Mapping[int, Answer], timeout_s: float) -> bool:
    if answer.waits_for is not None:
        return True
    # On a GPU the main thread may be anywhere while its collective waits: it is ahead of others that have not come.
    return answer.still_s >= timeout_s / 2 and answer.collectives > min(each.collectives for each in there.values())


def _where(answer: Answer) -> str:
    return f"({answer.phase}, {answer.step} steps done) has done nothing for {answer.still_s:.0f} s, at {answer.at}"


def _for(answer: Answer) -> str:
    what = answer.waits_for or "a collective"
    number = f" (its number {answer.collectives})" if what == "a collective" else ""
    return f"{what}{number}, {answer.phase}, {answer.step} steps done, at {answer.at}"


def is_timeout(error: BaseException) -> bool:
    """Whether a collective has not completed in time, by gloo's words or NCCL's."""
    text = str(error).lower()
    return "timed out" in text or "collective operation timeout" in text
