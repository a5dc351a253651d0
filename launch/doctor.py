"""What this environment is, why it is taken for that, and whether ranks can talk in it."""

from __future__ import annotations

import os
import platform
import socket
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version

import cloudpickle
import psutil

from ddpkit import world
from ddpkit.agree import RanksMissing
from ddpkit.config import Launch, node_range
from ddpkit.errors import EXIT_DONE, EXIT_FAILED, DdpkitError, UserError
from ddpkit.world import World

from .attempts import report_failure
from .elastic import ElasticNode
from .job import Job, Terms, unpickled
from .output import Output
from .plan import visible_gpus
from .supervise import Node

_JOIN_S = 15  # for the launchers of several machines
_LIMIT_S = 25.0  # for all that is to be found out, after the import of torch
_RANKS = 2  # for a start here, where nobody has said how many


def describe() -> str:
    """Versions, the machine, and each launcher that could have started this process."""
    env = world.environment()
    gpus = visible_gpus(env)
    memory = psutil.virtual_memory().total / 2**30
    lines = [
        f"versions: python {platform.python_version()}, "
        + ", ".join(f"{name} {_version(name)}" for name in ("ddpkit", "torch", "numpy")),
        f"machine: {socket.gethostname()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores for this process, "
        f"{memory:.1f} GiB of memory, {f'{gpus} GPU(s)' if gpus else 'no GPU'}",
        "who could have started this process, the first that is there deciding:",
        *(f"  {name}: {said}" for name, said in world.survey(env)),
    ]
    chosen = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS") if name in env]
    lines += [f"set: {name}={env[name]}" for name in (*chosen, "CUDA_VISIBLE_DEVICES") if name in env]
    return "\n".join(lines)


def examine(settings: Launch, launcher: str | None) -> int:
    """Say what was found, and have ranks talk: those of the present world, or two started for it.

    Args:
        settings: the launch section.
        launcher: the one that was asked for; None takes the present world if there is one, else starts ranks here.
    """
    try:
        here = World.from_env()
    except UserError:
        print(describe(), flush=True)  # noqa: T201 - what the command is for
        raise
    if here.is_main:
        print(describe(), flush=True)  # noqa: T201 - as above
    if (launcher is None and here.world_size > 1) or launcher == "inline":
        return _examine_here(here)
    nproc = _RANKS if settings.nproc_per_node == "auto" else settings.nproc_per_node
    cores = len(os.sched_getaffinity(0))
    fewest, most = node_range(settings.nnodes)
    env = world.thread_and_network_defaults(world.environment(), nproc, cores, most)
    ranks = str(nproc * most) if fewest == most else f"{nproc * fewest} to {nproc * most}"
    who = f"{ranks} ranks by launcher {settings.launcher}"
    if settings.launcher == "torchrun":
        terms = Terms(nproc, fewest, most, max_restarts=0)
        return _examine_started(ElasticNode(terms, env, settings.rdzv_endpoint, join_s=_JOIN_S), who)
    return _examine_started(Node(nproc, settings.start_method, env), who)


def _examine_here(here: World) -> int:
    if here.world_size == 1:
        print("one process: nobody to talk to", flush=True)  # noqa: T201 - the result
        return EXIT_DONE
    from ddpkit import talk  # torch, only now

    started = time.monotonic()
    limit = threading.Timer(_LIMIT_S, _give_up, (here,))
    limit.daemon = True
    limit.start()
    try:
        problems = talk.check(here)
    except RanksMissing as error:
        # Every rank that is there finds the same; the one that is not says what it sees itself.
        if here.is_main:
            _say([str(error)])
        return EXIT_FAILED
    except DdpkitError as error:
        _say([str(error)])
        return error.exit_code
    if here.is_main:
        _conclude(problems, f"{here.world_size} rank(s) of {here.source.partition(',')[0]}", started)
    return EXIT_FAILED if problems else EXIT_DONE


def _give_up(here: World) -> None:
    """Some of torch's waits have no end, such as one for a port on which something else listens."""
    where = here.master_addr if here.master_port is None else f"{here.master_addr}:{here.master_port}"
    _say(
        [
            f"rank {here.rank} on {here.host} still waits after {_LIMIT_S:g} s: something listens at {where}, and does "
            "not answer as rank 0 would. Set MASTER_PORT to a free port, the same on all ranks"
        ]
    )
    os._exit(EXIT_FAILED)


def _examine_started(node: Node, who: str) -> int:
    from ddpkit import talk

    job = Job("call", call=cloudpickle.dumps((talk.check, (), {})), search_path=tuple(sys.path))
    started = time.monotonic()
    with node:
        outcome = node.run(job, 0, Output(None, tee_all=False))
    if outcome.failures:
        _say([report_failure(outcome.failures, None)])
        return EXIT_FAILED
    if outcome.exit_code != EXIT_DONE:
        return outcome.exit_code
    problems: list[str] = unpickled(outcome.results[0])
    _conclude(problems, who, started)
    return EXIT_FAILED if problems else EXIT_DONE


def _conclude(problems: list[str], who: str, started: float) -> None:
    if problems:
        _say(problems)
    else:
        print(f"{who}: every pair can talk, and all together ({time.monotonic() - started:.1f} s)", flush=True)  # noqa: T201 - the result


def _say(problems: list[str]) -> None:
    print("\n".join(f"ddpkit: {problem}" for problem in problems), file=sys.stderr, flush=True)  # noqa: T201 - as above


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
