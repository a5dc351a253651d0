"""A script of one's own that srun has started, preempted and run into its time limit: it comes back by itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.resume.runs import events
from tests.slurm.cluster import Cluster, tail

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STEPS = 240
SCRIPT = f"""
import os, time, torch, ddpkit

dataset = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randn(64, 1), torch.arange(64))
restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
with ddpkit.runtime(seed=0, timeout_s=60) as rt:
    model = rt.wrap(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = rt.loader(dataset, global_batch_size=8, num_workers=1)
    run = rt.resume("RUN", every_steps=None, model=model, optimizer=optimizer, loader=loader)
    ledger = open(f"LEDGER-{{restarts}}-{{rt.rank}}", "w")
    for epoch in run.epochs({STEPS} // 8):
        for inputs, targets, indices in loader:
            if restarts == "0":
                time.sleep(0.5)  # the first start never gets to the end
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            run.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            print(*(f"{{epoch}}:{{int(index)}}" for index in indices), file=ledger, flush=True)
            run.step(loss=loss)
"""


class Job:
    """A batch job whose only step is the script, on two nodes."""

    def __init__(self, cluster: Cluster, name: str, *options: str) -> None:
        self._cluster = cluster
        cluster.env["PYTHONPATH"] = str(ROOT)
        self.run_dir = cluster.work / name
        self._ledger = cluster.work / f"{name}-ledger"
        text = SCRIPT.replace("RUN", str(self.run_dir)).replace("LEDGER", str(self._ledger))
        (cluster.work / f"{name}.py").write_text(text)
        command = f"#!/bin/bash\nsrun --unbuffered {sys.executable} {name}.py\n"
        spread = ("--nodes=2", "--ntasks-per-node=1", "--exclusive", "--requeue", "--open-mode=append")
        self.id = cluster.submit(command, *spread, *options)

    def events(self, name: str) -> list[dict[str, Any]]:
        return events(self.run_dir, name) if (self.run_dir / "events.jsonl").exists() else []

    def comes_back_and_ends(self, timeout: float) -> None:
        """Wait for one restart and the end; every sample was used once in each epoch, over both starts."""
        again = self._cluster.wait_for_restart(self.id, timeout=timeout)
        ended = self._cluster.wait_for(self.id, "COMPLETED", restarts=1, timeout=120)
        assert ended.restarts == 1, tail(again.output)
        assert len(self.events("requeued")) == len(self.events("stopped")) == len(self.events("finished")) == 1
        assert self.events("requeued")[0]["step"] == self.events("restored")[0]["step"] > 0
        used = " ".join(path.read_text() for path in self._cluster.work.glob(f"{self._ledger.name}-*")).split()
        assert sorted(used) == sorted(f"{epoch}:{index}" for epoch in range(STEPS // 8) for index in range(64))


def test_the_end_of_the_allocation_is_seen_coming(cluster: Cluster) -> None:
    job = Job(cluster, "limited", "--time=1")
    job.comes_back_and_ends(timeout=120)
    [stopped] = job.events("stopped")
    assert stopped["reason"].startswith("the allocation ends at ")
    assert job.events("requeued")[0]["reason"] == "time limit"


def test_a_preempted_job_saves_and_comes_back(cluster: Cluster) -> None:
    job = Job(cluster, "preempted", "--partition=low")
    cluster.wait_until(lambda: job.events("started") != [], "the run has started")
    job_log = cluster.job(job.id).output
    cluster.wait_until(lambda: any(cluster.work.glob("preempted-ledger-0-0")), tail(job_log))
    other = cluster.submit("#!/bin/bash\nsleep 1\n", "--partition=high", "--nodes=4", "--exclusive")
    cluster.wait_for(other, "COMPLETED")
    job.comes_back_and_ends(timeout=120)
    [stopped] = job.events("stopped")
    assert stopped["reason"] == "SIGTERM"
    assert job.events("requeued")[0]["reason"] == "preempted"


def test_scancel_is_the_end(cluster: Cluster) -> None:
    job = Job(cluster, "cancelled")
    cluster.wait_until(lambda: any(cluster.work.glob("cancelled-ledger-0-0")), "steps")
    cluster.run("scancel", str(job.id))
    cluster.wait_for(job.id, "CANCELLED")
    assert len(job.events("stopped")) == 1 and job.events("requeued") == []
    assert list(job.run_dir.glob("checkpoints/step-*"))
