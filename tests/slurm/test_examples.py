"""The examples on a real cluster: those for Slurm preempted and back, as array, allocation and batch script; the others
as jobs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from examples import digits
from examples.finetune.pretrain import pretrain
from tests.examples.test_launchers import CONFIGS, SCRIPTS
from tests.examples.test_launchers import SHORT as TWO_STEPS
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


@dataclass(frozen=True)
class Clone:
    """A directory on the login node that has the examples as the repository's root has them."""

    cluster: Cluster
    cwd: Path

    @classmethod
    def made(cls, cluster: Cluster, name: str) -> Clone:
        cwd = cluster.work / name
        cwd.mkdir()
        for each in ("examples", "configs", "tests"):
            os.symlink(ROOT / each, cwd / each)
        return cls(cluster, cwd)

    def run(self, *command: str) -> str:
        """A command to its end, which has to be a good one; what it prints."""
        path = os.pathsep.join([str(Path(sys.executable).parent), self.cluster.env["PATH"]])
        done = subprocess.run(
            command,
            cwd=self.cwd,
            env=self.cluster.env | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def test_the_examples_for_slurm(cluster: Cluster) -> None:
    clone = Clone.made(cluster, "examples-for-slurm")
    run, cwd = clone.run, clone.cwd

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


def test_the_other_examples_as_jobs(cluster: Cluster) -> None:
    """All at once: a job for each, on one node with two ranks, as a reader would submit it."""
    clone = Clone.made(cluster, "other-examples")
    pretrain(clone.cwd / "runs/pretrained.pth", epochs=1)
    slurm = ("--launcher", "slurm", "-o", "launch.slurm.partition=low")
    jobs = []
    for example, smaller in CONFIGS.items():
        options = [part for each in (*TWO_STEPS, *smaller, "launch.nproc_per_node=2") for part in ("-o", each)]
        jobs.append(clone.run("ddpkit", "run", f"examples/{example}/config.yaml", *slurm, *options))
    for example in SCRIPTS:
        jobs.append(clone.run("ddpkit", "launch", *slurm, "--nproc-per-node", "2", f"examples/{example}"))
    for job in jobs:
        ended = wait_for_end(cluster, int(job), timeout=300)
        assert ended.state == "COMPLETED", ended.output.read_text()
    for example in CONFIGS:
        assert metrics(clone.cwd / "runs" / example)[-1]["step"] == 2, example
    for run_dir, steps in (("minimal", SCRIPTS["minimal.py"]), ("signals", SCRIPTS["before_after/after.py"])):
        assert (clone.cwd / f"runs/{run_dir}/checkpoints/step-{steps:08}/manifest.json").exists()
