"""Ranks within a test: call a function on several of them, get what they return.

The one module of this package that starts processes. They come from a fork server that has imported torch once, so
that all calls but the first start in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import cloudpickle
import torch

from ddpkit import rendezvous
from ddpkit.agree import is_consequence
from ddpkit.errors import DdpkitError
from ddpkit.orphans import die_with_parent
from ddpkit.world import World, adopt

T = TypeVar("T")

_LINGER_S = 2.0  # after the first failure, for an earlier one to arrive


class RankDied(DdpkitError):
    """A rank ended without an answer, or did not answer in time."""


class RankTraceback(Exception):
    """Where in the rank it happened: the cause of what `run_ranks` raises."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class _Answer:
    rank: int
    when: float
    result: bytes = b""
    error: bytes = b""
    traceback: str = ""
    is_consequence: bool = False


def run_ranks(fn: Callable[..., T], nproc: int, *args: Any, timeout_s: float = 60.0, **kwargs: Any) -> list[T]:
    """Call ``fn(*args, **kwargs)`` on ``nproc`` ranks of this machine, on the CPU with gloo if they form a group.

    Args:
        fn: what each rank does; it enters `ddpkit.runtime` itself if it wants a group.
        nproc: ranks.
        args: positional arguments.
        timeout_s: seconds after which the ranks are killed.
        kwargs: keyword arguments.

    Returns:
        What each rank returned, by rank.

    Raises:
        BaseException: what the first rank to fail raised, of its own type.
        RankDied: a rank was killed, or the time is over.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ddpkit.session", "torch._dynamo"])
    payload = cloudpickle.dumps((fn, args, kwargs))
    store = rendezvous.serve(listener := rendezvous.listen())
    port = store.port
    del listener
    worlds = [World(rank, nproc, rank, nproc, "127.0.0.1", port, agent_store=True) for rank in range(nproc)]
    with _started(context, payload, worlds) as (processes, pipes):
        answers = _answers(processes, pipes, time.monotonic() + timeout_s)
    del store
    failures = [answer for answer in answers if answer.error]
    if failures:
        first = min(failures, key=lambda answer: (answer.is_consequence, answer.when))
        raise cloudpickle.loads(first.error) from RankTraceback(first.traceback)
    return [cloudpickle.loads(answer.result) for answer in answers]


@contextmanager
def _started(
    context: multiprocessing.context.ForkServerContext, payload: bytes, worlds: list[World]
) -> Iterator[tuple[list[ForkServerProcess], list[Connection]]]:
    processes, pipes = [], []
    for world in worlds:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(payload, world, theirs), daemon=False)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        yield processes, pipes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        for pipe in pipes:
            pipe.close()


def _rank(payload: bytes, world: World, pipe: Connection) -> None:
    die_with_parent(os.getppid())  # the fork server
    # It does not end with the test's process: each of its children holds the pipe by which it would notice.
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    # A fork server's children would take theirs (loader workers) from it too: siblings, that outlive a killed rank.
    multiprocessing.set_start_method("fork", force=True)
    adopt({"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | world.to_env())
    # The fork server has read that variable already, and more threads than cores spin while they wait for each other.
    torch.set_num_threads(1)
    try:
        fn, args, kwargs = cloudpickle.loads(payload)
        answer = _Answer(world.rank, time.monotonic(), result=cloudpickle.dumps(fn(*args, **kwargs)))
    except BaseException as error:  # noqa: BLE001 - whatever it is goes to the caller
        when, text = time.monotonic(), f"on rank {world.rank}:\n{traceback.format_exc()}"
        answer = _Answer(world.rank, when, b"", _pickled(error), text, is_consequence(error))
    pipe.send(answer)


def _end_with(parent: BaseProcess | None) -> None:
    assert parent is not None  # it started us
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _answers(processes: list[ForkServerProcess], pipes: list[Connection], deadline: float) -> list[_Answer]:
    """Every rank's answer; once one has failed, those that are there."""
    answers: dict[int, _Answer] = {}
    open_pipes = dict(zip(pipes, range(len(pipes)), strict=True))
    failed = False
    while open_pipes:
        for pipe in wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic())):
            assert isinstance(pipe, Connection)  # only those were asked for
            rank = open_pipes.pop(pipe)
            try:
                answers[rank] = pipe.recv()
            except EOFError:
                processes[rank].join(1)
                died = RankDied(f"rank {rank} ended with exit code {processes[rank].exitcode} and no answer")
                answers[rank] = _Answer(rank, time.monotonic(), error=cloudpickle.dumps(died), traceback=str(died))
            if answers[rank].error and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + _LINGER_S)
        if open_pipes and time.monotonic() >= deadline:
            if not failed:
                raise RankDied(f"ranks {sorted(open_pipes.values())} did not answer in time")
            break
    return [answers[rank] for rank in sorted(answers)]


def _pickled(error: BaseException) -> bytes:
    try:
        pickled: bytes = cloudpickle.dumps(error)
        cloudpickle.loads(pickled)  # an exception with arguments of its own is often pickled well and loaded badly
    except Exception:  # noqa: BLE001 - any user type may refuse, in any way
        pickled = cloudpickle.dumps(RankDied(f"{type(error).__name__}: {error}"))
    return pickled
