"""Ranks within a test: call a function on several of them, get what they return.

The one module of this package that starts processes. They come from a fork server that has imported torch once, so
that all calls but the first start in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, TypeVar

import cloudpickle

from ddpkit import rendezvous
from ddpkit.errors import DdpkitError
from ddpkit.orphans import die_with_parent
from ddpkit.world import World, adopt

T = TypeVar("T")

_LINGER_S = 2.0  # after the first failure, for an earlier one to arrive


class RankDied(DdpkitError):
    """A rank ended without an answer, or did not answer in time."""


@dataclass(frozen=True)
class _Answer:
    rank: int
    when: float
    result: bytes = b""
    error: bytes = b""


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
    failures = sorted((answer for answer in answers if answer.error), key=lambda answer: answer.when)
    if failures:
        raise cloudpickle.loads(failures[0].error)
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
    die_with_parent(os.getppid())  # the fork server, which ends with the test's process
    adopt({"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | world.to_env())
    try:
        fn, args, kwargs = cloudpickle.loads(payload)
        answer = _Answer(world.rank, time.monotonic(), result=cloudpickle.dumps(fn(*args, **kwargs)))
    except BaseException as error:  # noqa: BLE001 - whatever it is goes to the caller
        answer = _Answer(world.rank, time.monotonic(), error=_pickled(error))
    pipe.send(answer)


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
                answers[rank] = _Answer(rank, time.monotonic(), error=cloudpickle.dumps(died))
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
    except Exception:  # noqa: BLE001 - any user type may refuse, in any way
        pickled = cloudpickle.dumps(RankDied(f"{type(error).__name__}: {error}"))
    return pickled
