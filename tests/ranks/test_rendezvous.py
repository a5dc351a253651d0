"""Ranks that nobody has told a port find each other, and nobody else."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import pytest

import ddpkit
from ddpkit import rendezvous
from ddpkit.errors import UserError
from ddpkit.testing import run_ranks
from ddpkit.world import World
from tests.ports import free_port


def _mpi(job: str, rank: int, size: int, local_rank: int, local_size: int) -> dict[str, str]:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    values = (rank, size, local_rank, local_size)
    env = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in zip(names, values, strict=True)}
    return env | {"PMIX_NAMESPACE": job, "MASTER_ADDR": "127.0.0.1"}


def _two_jobs(ports: list[int]) -> Any:
    """Four processes are two jobs of two ranks that want the same ports."""
    rendezvous.candidates = lambda job: ports  # in this process alone
    rendezvous._PROBE_S = 0.5
    me = int(os.environ["RANK"])
    job, rank = divmod(me, 2)
    if rank == job:
        time.sleep(1)  # in one job rank 0 comes late, in the other rank 1
    with ddpkit.runtime(world=World.from_env(_mpi(f"job {job}", rank, 2, rank, 2)), timeout_s=30) as rt:
        together = rt.mean(float(me))
        return rt.ranks.exchange("who", me), together


def test_two_jobs_with_the_same_ports_do_not_meet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        free = [rendezvous.listen() for _ in range(6)]
        ports = [silent.getsockname()[1], *(each.getsockname()[1] for each in free)]
        for each in free:
            each.close()
        told = run_ranks(_two_jobs, 4, ports)
    assert told == [([0, 1], 0.5)] * 2 + [([2, 3], 2.5)] * 2


def _uneven(sizes: list[tuple[int, int, int]]) -> None:
    rank, local_rank, local_size = sizes[int(os.environ["RANK"])]
    with ddpkit.runtime(world=World.from_env(_mpi("uneven", rank, 4, local_rank, local_size)), timeout_s=20):
        pass


def test_other_numbers_of_ranks_on_other_nodes_are_an_error() -> None:
    with pytest.raises(UserError, match=r"on another node: every node needs the same number of ranks.*Open MPI, by"):
        run_ranks(_uneven, 4, [(0, 0, 2), (1, 1, 2), (2, 0, 1), (3, 0, 1)])


def test_no_rank_zero() -> None:
    world = World.from_env(_mpi("nobody", 1, 2, 1, 2))
    with pytest.raises(rendezvous.NoMeeting, match=r"rank 0 of openmpi nobody was not found at 127.0.0.1 within 0.3 s"):
        rendezvous.connect(world, 0.3)


def test_ports_by_job() -> None:
    assert rendezvous.candidates("a") == rendezvous.candidates("a")
    drawn = [rendezvous.candidates(f"slurm c/{job}/{step}/") for job in range(50) for step in range(3)]
    assert all(10_000 <= port < 32_768 for ports in drawn for port in ports)
    assert all(len(ports) >= 12 for ports in drawn)
    assert len({tuple(ports) for ports in drawn}) == len(drawn)


def _three_times(port: int | None) -> list[float]:
    rank = int(os.environ["RANK"])
    env = _mpi("again", rank, 3, rank, 3) | ({"MASTER_PORT": str(port)} if port else {})
    means = []
    for _ in range(3):
        with ddpkit.runtime(world=World.from_env(env), timeout_s=20) as rt:
            means.append(rt.mean(float(rank)))
    return means


@pytest.mark.parametrize("chosen", [False, True], ids=["derived", "chosen"])
def test_a_store_of_rank_zeros_is_gone_before_the_next_runtime(chosen: bool) -> None:
    assert run_ranks(_three_times, 3, free_port() if chosen else None) == [[1.0] * 3] * 3
