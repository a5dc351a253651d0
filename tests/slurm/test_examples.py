"""The examples for Slurm on a real cluster: preempted and back, an array, an allocation, a batch script."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from examples import digits
from tests.resume.runs import ROOT, events, metrics
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import wait_for_end

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SHORT = ("-o", "launch.slurm.partition=low", "-o", "train.epochs=2", "-o", "launch.timeout_s=120")


def paced_step(model: Any, batch: Any) -> Any:
    """The quick start's step; the first start of a job never gets to its end."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        time.sleep(1)
    return digits.train_step(model, batch)


def test_the_examples_for_slurm(cluster: Cluster) -> None:
    cwd = cluster.work / "examples-for-slurm"
    cwd.mkdir()
    for name in ("examples", "configs", "tests"):
        os.symlink(ROOT / name, cwd / name)
    path = os.pathsep.join([str(Path(sys.executable).parent), cluster.env["PATH"]])
    env = cluster.env | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=150
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # Preempted in the middle, it saves, comes back by itself, and ends.
    step = ("-o", f"train.step={__name__}:paced_step")
    job = int(run("ddpkit", "run", "examples/slurm/preemptible.yaml", *SHORT, *step))
    run_dir = cwd / "runs/preemptible"

    def has_started() -> bool:
        return (run_dir / "events.jsonl").exists() and events(run_dir, "started") != []

    cluster.wait_until(has_started, "the run starts", 120)
    other = cluster.submit("#!/bin/sh\nexit 0\n", "--partition=high", "--nodes=4", "--exclusive")
    cluster.wait_for(other, "COMPLETED", timeout=120)
    cluster.wait_for_restart(job, timeout=120)
    ended = wait_for_end(cluster, job, timeout=120)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), ended.output.read_text()
    assert [event["reason"] for event in events(run_dir, "requeued")] == ["preempted"]
    assert metrics(run_dir)[-1]["step"] == 44

    # A script in an allocation, one in a batch job, and an array that is followed to its end.
    run("salloc", "--nodes=2", "--ntasks-per-node=1", "sh", "examples/slurm/interactive.sh", "-o", "train.epochs=2")
    assert metrics(cwd / "runs/interactive")[-1]["step"] == 44
    batch = int(run("sbatch", "--parsable", "examples/slurm/minimal.sbatch"))
    run("sh", "examples/slurm/sweep.sh", *SHORT, "-o", "launch.nnodes=1", "--wait")
    ends = [metrics(path.parent)[-1]["step"] for path in (cwd / "runs/sweep").glob("*/metrics.jsonl")]
    assert ends == [44] * 6
    assert wait_for_end(cluster, batch).state == "COMPLETED"
    assert (cwd / "runs/minimal/checkpoints/step-00000128").is_dir()
