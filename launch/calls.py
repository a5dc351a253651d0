"""Functions on ranks, called from Python: notebooks, tests, scripts of one's own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import cloudpickle

from ddpkit import world
from ddpkit.errors import DdpkitError

from .attempts import report_failure
from .job import Failure, Job
from .output import Output
from .supervise import Node

T = TypeVar("T")


class RankError(DdpkitError):
    """A rank failed in a way that has no exception to raise again: a kill, or a type that cannot be pickled."""


def local(
    fn: Callable[..., T],
    *args: Any,
    nproc_per_node: int = 2,
    start_method: Literal["warm", "spawn"] = "warm",
    tee_all: bool = False,
    **kwargs: Any,
) -> list[T]:
    """Call ``fn(*args, **kwargs)`` on ranks of this machine.

    Args:
        fn: any function, also one of a notebook; it travels by cloudpickle.
        args: positional arguments.
        nproc_per_node: ranks.
        start_method: "warm" forks them from a process that has imported torch; "spawn" starts each anew.
        tee_all: show the output of all ranks, not only rank zero's.
        kwargs: keyword arguments.

    Returns:
        What each rank returned, by rank.

    Raises:
        BaseException: what the first rank to fail raised, of its own type, with the report as a note in its cause.
        RankError: that rank was killed, or its exception cannot be pickled.
    """
    env = world.thread_and_network_defaults(world.environment(), nproc_per_node, len(os.sched_getaffinity(0)))
    job = Job("call", call=cloudpickle.dumps((fn, args, kwargs)), search_path=tuple(sys.path))
    with Node(nproc_per_node, start_method, env) as node:
        outcome = node.run(job, 0, Output(None, tee_all))
    if outcome.failures:
        _raise(outcome.failures)
    return list(outcome.results)


def _raise(failures: tuple[Failure, ...]) -> None:
    report = RankError(report_failure(failures, None))
    if not failures[0].exception:
        raise report
    try:
        error = cloudpickle.loads(failures[0].exception)
    except Exception:  # noqa: BLE001 - an __init__ of the type's own that wants other arguments is enough
        raise report from None
    raise error from report
