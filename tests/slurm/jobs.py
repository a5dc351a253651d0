"""Runs that are submitted to the tests' cluster as a user would, and what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.resume.runs import ROOT, Tree, assert_same_end, events, metrics
from tests.slurm.cluster import Cluster, Job, alive
from tests.slurm.mishaps import Mishap

LENGTH, EPOCHS = 320, 3
STEPS = EPOCHS * LENGTH // 16
DAEMONS = frozenset(("munged", "slurmctld", "slurmscriptd", "slurmd"))


def config(**changes: Any) -> Tree:
    """Of 60 steps on 4 ranks, by default 2 on each of 2 nodes; ``changes`` by key path, dots written as ``__``."""
    made: Tree = {
        "run_dir": "run",
        "launch": {"nnodes": 2, "nproc_per_node": 2, "timeout_s": 120.0, "slurm": {}},
        "model": {"factory": "tests.slurm.mishaps:model"},
        "data": {
            "train": {"factory": "tests.slurm.mishaps:dataset", "args": {"length": LENGTH}},
            "eval": {"factory": "tests.slurm.mishaps:dataset", "args": {"length": 11}},
            "global_batch_size": 16,
        },
        "optimizer": {"factory": "torch.optim:AdamW", "args": {"lr": 0.01}},
        "scheduler": {"factory": "torch.optim.lr_scheduler:CosineAnnealingLR", "args": {"T_max": STEPS}},
        "train": {
            "step": "tests.slurm.mishaps:step",
            "eval_step": "tests.toy:eval_step",
            "epochs": EPOCHS,
        },
        "checkpoint": {"every_steps": 7},
        "log_every": 2,
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        place = made
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return made


Process = subprocess.Popen[str]


@dataclass(frozen=True, eq=False)
class Home:
    """A directory that runs are submitted from.

    Attributes:
        cluster: to which.
        cwd: the directory, with a config and a folder for the ledger in it.
        env: for ``ddpkit``; jobs inherit it.
    """

    cluster: Cluster
    cwd: Path
    env: dict[str, str]

    @classmethod
    def made(cls, cluster: Cluster, name: str, mishap: Mishap | None = None, **changes: Any) -> Home:
        cwd = cluster.work / name
        (cwd / "ledger").mkdir(parents=True)
        (cwd / "config.yaml").write_text(json.dumps(config(**changes)))
        env = {
            "PYTHONPATH": str(ROOT),
            "TOY_LEDGER": str(cwd / "ledger"),
            "JOB_MISHAP": json.dumps(asdict(mishap or Mishap())),
            "OMP_NUM_THREADS": "1",
        }
        return cls(cluster, cwd, cluster.env | env)

    @property
    def run_dir(self) -> Path:
        return self.cwd / "run"

    def start(self, *arguments: str, prefix: tuple[str, ...] = (sys.executable, "-m", "ddpkit")) -> Process:
        """``ddpkit ARGUMENTS``, or another command."""
        return subprocess.Popen(
            [*prefix, *arguments],
            cwd=self.cwd,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``ddpkit ARGUMENTS`` to its end."""
        return _finish(self.start(*arguments))

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Another command to its end."""
        return _finish(self.start(*words, prefix=()))

    def submit(self, *options: str) -> int:
        """Submit the run; the job's number is all that is on standard output."""
        done = self.run("run", "config.yaml", "--launcher", "slurm", *options)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    # -- what has become of it -------------------------------------------------------------------------------------

    def attempts(self) -> list[Tree]:
        return [json.loads(path.read_text()) for path in sorted((self.run_dir / "attempts").glob("attempt-*.json"))]

    def outcome(self) -> Tree:
        (path,) = (self.run_dir / "slurm").glob("submission-*/outcome.json")
        return dict(json.loads(path.read_text()))

    def failure(self) -> Tree:
        return dict(json.loads((self.run_dir / "failure.json").read_text()))

    def log(self) -> str:
        return "".join(
            f"== {path}\n{path.read_text(errors='replace')}"
            for path in sorted((self.run_dir / "slurm").glob("submission-*/*_log.*"))
        )

    def is_training(self, restarts: int = 0, steps: int = 2) -> bool:
        """Whether the start of the job after so many restarts has come that far beyond its first step."""
        try:
            begun = [
                (event["step"], event["attempt"])
                for event in events(self.run_dir)
                if event["event"] in ("started", "restored")
            ]
            numbers = [each["attempt"] for each in self.attempts() if each.get("restart_count") == restarts]
            first = next((step for step, attempt in begun if attempt in numbers), None)
            return first is not None and metrics(self.run_dir)[-1]["step"] >= first + steps
        except (OSError, ValueError, IndexError):
            return False  # half written

    def seen(self) -> Counter[int]:
        """How often each sample was used, also in steps that were done again."""
        texts = [path.read_text() for path in (self.cwd / "ledger").iterdir()]
        return Counter(int(index) for text in texts for index in text.split())

    def assert_all_samples_once(self) -> None:
        assert self.seen() == dict.fromkeys(range(LENGTH), EPOCHS)

    def assert_done_like(self, reference: Path) -> None:
        assert_same_end(self.run_dir, reference)


def _finish(process: Process) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=100)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for_end(cluster: Cluster, job_id: int, timeout: float = 200) -> Job:
    """Wait until a job has ended for good; if it is requeued meanwhile, have Slurm start it sooner than it would."""
    ended: list[Job] = []
    hastened: set[int] = set()

    def look() -> bool:
        job = cluster.job(job_id)
        if job.state == "PENDING" and job.restarts and job.reason == "BeginTime" and job.restarts not in hastened:
            hastened.add(job.restarts)
            cluster.start_soon(job_id)
        if job.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
            ended.append(job)
        return bool(ended)

    try:
        cluster.wait_until(look, f"job {job_id} ends", timeout)
    except TimeoutError as error:
        raise TimeoutError(f"{cluster.job(job_id)}: {error}") from error
    return ended[0]


def assert_nothing_left(cluster: Cluster, within: float = 30) -> None:
    """No process of any job runs any more; slurmstepd may take a moment."""

    def left() -> list[psutil.Process]:
        found = []
        for process in cluster.processes():
            try:
                if process.name() not in DAEMONS and alive(process):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    try:
        cluster.wait_until(lambda: not left(), "nothing is left", within)
    except TimeoutError:
        told = [f"{process.pid} {' '.join(process.cmdline())}" for process in left()]
        raise AssertionError(f"left behind: {told}") from None
