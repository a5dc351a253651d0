"""Functions on ranks, called from Python: notebooks, tests, scripts of one's own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import cloudpickle

from ddpkit import config as configs
from ddpkit import world
from ddpkit.errors import DdpkitError, UserError

from .attempts import report_failure
from .carrying import brought
from .elastic import ElasticNode
from .job import Failure, Job, Terms, unpickled
from .output import Output
from .supervise import Node

if TYPE_CHECKING:
    from .handle import SlurmJob

T = TypeVar("T")


class RankError(DdpkitError):
    """A rank failed in a way that has no exception to raise again: a kill, an exit, or a type that cannot travel."""


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
        Exception: what the first rank to fail raised, of its own type, with the report as its cause.
        RankError: that rank was killed or left by itself, or its exception cannot travel.
    """
    env = world.thread_and_network_defaults(world.environment(), nproc_per_node, len(os.sched_getaffinity(0)))
    return _call(fn, args, kwargs, Node(nproc_per_node, start_method, env), 0, tee_all)


def torchrun(
    fn: Callable[..., T],
    *args: Any,
    nproc_per_node: int = 2,
    nnodes: int | str = 1,
    rdzv_endpoint: str | None = None,
    max_restarts: int = 0,
    tee_all: bool = False,
    **kwargs: Any,
) -> list[T]:
    """Call ``fn(*args, **kwargs)`` on ranks that torch's elastic agent starts, on each of several machines alike.

    Args:
        fn: any function, also one of a notebook; it travels by cloudpickle, to the ranks of this machine.
        args: positional arguments.
        nproc_per_node: ranks on each machine.
        nnodes: machines, or a range of them such as "2:4"; the same call is made on each of them.
        rdzv_endpoint: ``host:port`` of one of them, where they meet; not needed on one machine.
        max_restarts: how often the agent starts all ranks again after a failure.
        tee_all: show the output of all ranks of this machine, not only the first one's.
        kwargs: keyword arguments.

    Returns:
        What each rank of this machine returned, by rank.

    Raises:
        UserError: several machines and no endpoint, or another number of ranks met than was asked for.
        Exception: what the first rank to fail raised, of its own type, with the report as its cause.
        RankError: that rank was killed or left by itself, or its exception cannot travel.
    """
    fewest, most = configs.node_range(configs.launch_section({"launcher": "torchrun", "nnodes": nnodes}).nnodes)
    if most > 1 and rdzv_endpoint is None:
        raise UserError(f"rdzv_endpoint: {nnodes} machines need a place to meet; give host:port of one of them")
    cores = len(os.sched_getaffinity(0))
    env = world.thread_and_network_defaults(world.environment(), nproc_per_node, cores, most)
    node = ElasticNode(Terms(nproc_per_node, fewest, most, max_restarts), env, rdzv_endpoint)
    return _call(fn, args, kwargs, node, max_restarts, tee_all)


def slurm(
    fn: Callable[..., T],
    *args: Any,
    nodes: int = 1,
    nproc_per_node: int | Literal["auto"] = "auto",
    folder: str | os.PathLike[str] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    start_method: Literal["warm", "spawn"] = "warm",
    cpus_per_rank: int | None = None,
    tee_all: bool = False,
    **options: Any,
) -> SlurmJob[T]:
    """Submit ``fn(*args, **kwargs)`` as a Slurm job, on ranks on its nodes; returns at once.

    Args:
        fn: any function, also one of a notebook; it travels by cloudpickle.
        args: positional arguments.
        nodes: how many.
        nproc_per_node: ranks on each of them; "auto": as many as ``gpus_per_node`` says.
        folder: for the plan, the logs and the results, where all nodes see it; by default a new one in ``runs``.
        kwargs: keyword arguments of ``fn``; all others that are given here are options.
        start_method: "warm" forks a node's ranks from a process that has imported torch; "spawn" gives each a task.
        cpus_per_rank: cores for each rank; one by default, unless the job has whole nodes.
        tee_all: log the output of all ranks, not only rank zero's, where `SlurmJob.stdout` finds it.
        options: of the submission, by submitit's names: ``partition="gpu"``, ``timeout_min=60``, ``setup=[...]``.

    Raises:
        UserError: an unknown option, no Slurm on this machine, or it refuses the job.
    """
    from . import plan, submission  # with submitit, which nothing else here needs
    from .handle import SlurmJob

    section: dict[str, Any] = {
        "launcher": "slurm",
        "nnodes": nodes,
        "nproc_per_node": nproc_per_node,
        "start_method": start_method,
    }
    settings = configs.launch_section(section | {"cpus_per_rank": cpus_per_rank, "slurm": options})
    job = Job("call", call=cloudpickle.dumps((fn, args, dict(kwargs or {}))), search_path=tuple(sys.path))
    name = getattr(fn, "__name__", "call")
    home = submission.new_home(name) if folder is None else Path(folder).expanduser()
    made = plan.make(settings, job, run_dir=home, tee_all=tee_all, command=("launch.slurm", name))
    return SlurmJob(submission.submit((made,), home))


def _call(
    fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any], node: Node, max_restarts: int, tee_all: bool
) -> list[T]:
    job = Job("call", call=cloudpickle.dumps((fn, args, kwargs)), search_path=tuple(sys.path))
    with node:
        for restart_count in range(max_restarts + 1):
            outcome = node.run(job, restart_count, Output(None, tee_all))
            if not outcome.failures:
                break
    if outcome.failures:
        _raise(outcome.failures)
    return [unpickled(result) for result in outcome.results]


def _raise(failures: tuple[Failure, ...]) -> None:
    raise exception_of(failures, report_failure(failures, None, "tee_all=True shows each rank's output"))


def exception_of(failures: tuple[Failure, ...], report: str) -> BaseException:
    """What the first rank to fail raised, with the report as its cause; a `RankError` where that cannot be had."""
    told = RankError(report)
    if not failures or not failures[0].exception:
        return told
    try:
        error: BaseException = brought(failures[0].exception)
    except Exception:  # noqa: BLE001 - it did come back where it was raised; here its type may find it cannot
        return told
    error.__cause__ = told
    return error
