"""A script of one's own on a real cluster: tasks of srun are ranks, everything else is one process."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, ddpkit
with ddpkit.runtime(timeout_s=60) as rt:
    job = rt.ranks.exchange("job", rt.world.job)
    if rt.is_main:
        print(json.dumps([rt.world_size, rt.world.nnodes, rt.mean(float(rt.rank)), len(set(job))]), flush=True)
    else:
        rt.mean(float(rt.rank))
"""


def _srun(cluster: Cluster, *options: str, command: str = "srun") -> Any:
    cluster.env["PYTHONPATH"] = str(ROOT)
    done = cluster.run(command, *options, sys.executable, "-c", SCRIPT, timeout=90)
    return json.loads(done.stdout)


def test_steps_on_one_and_on_several_nodes(cluster: Cluster) -> None:
    assert _srun(cluster, "-N1", "-n2") == [2, 1, 0.5, 1]
    assert _srun(cluster, "-N2", "--ntasks-per-node=2") == [4, 2, 1.5, 1]


def test_two_steps_at_once_on_the_same_nodes(cluster: Cluster) -> None:
    found: list[Any] = []
    options = ("-N2", "--ntasks-per-node=1")
    threads = [threading.Thread(target=lambda: found.append(_srun(cluster, *options))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[2, 2, 0.5, 1]] * 2


def test_an_allocation_without_srun_is_one_process(cluster: Cluster) -> None:
    assert _srun(cluster, "-N2", "--ntasks-per-node=2", command="salloc") == [1, 1, 0.0, 1]
