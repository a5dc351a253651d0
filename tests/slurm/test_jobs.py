"""Jobs of several nodes through all that a cluster does to them: the same bits as a run that nothing has happened to.

Wherever it can be, several jobs go through it at once: most of the time they wait for Slurm.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.resume.runs import assert_same_end, events, last_checkpoint
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import LENGTH, Home, assert_nothing_left, wait_for_end
from tests.slurm.mishaps import Mishap

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

A_MINUTE = {"timeout_min": 1}
HIGH = ("--partition=high", "--nodes=4", "--exclusive")
NOTHING = "#!/bin/bash\nsleep 1\n"


@pytest.fixture(scope="module")
def reference(cluster: Cluster) -> Path:
    """The run directory of a run on this machine, with as many ranks, to which nothing has happened."""
    home = Home.made(cluster, "reference", launch__nnodes=1, launch__nproc_per_node=4)
    done = home.run("run", "config.yaml")
    assert done.returncode == 0, done.stderr
    home.assert_all_samples_once()
    return home.run_dir


def _train(cluster: Cluster, *homes: Home, restarts: int = 0) -> None:
    for home in homes:
        cluster.wait_until(lambda home=home: home.is_training(restarts), f"{home.cwd.name} trains", 120)  # type: ignore[misc]  # a default binds it now


def _kinds(home: Home, *skipped: str) -> list[str]:
    return [
        event["event"] for event in events(home.run_dir) if event["event"] not in ("saved", "save_delayed", *skipped)
    ]


def test_every_shape_gives_the_bits_of_local_ranks(cluster: Cluster, reference: Path) -> None:
    shapes: dict[str, dict[str, Any]] = {
        "two-nodes": {},
        "four-nodes": {"nnodes": 4, "nproc_per_node": 1},
        "one-node": {"nnodes": 1, "nproc_per_node": 4},
        "a-task-a-rank": {"start_method": "spawn"},
    }
    homes = {
        name: Home.made(cluster, name, **{f"launch__{key}": value for key, value in shape.items()})
        for name, shape in shapes.items()
    }
    jobs = {name: home.submit() for name, home in homes.items()}
    for name, home in homes.items():
        ended = wait_for_end(cluster, jobs[name])
        assert (ended.state, ended.restarts) == ("COMPLETED", 0), home.log()
        home.assert_done_like(reference)
        home.assert_all_samples_once()
        assert home.outcome()["exit_code"] == 0
    assert_nothing_left(cluster)


def test_preempted_twice_in_a_row(cluster: Cluster, reference: Path) -> None:
    """With loader workers: of Slurm's signals, which every process gets, none may end them before the save."""
    slow = Mishap(slow_starts=2)
    spawned = {"data__train__args": {"length": LENGTH, "context": "spawn"}, "data__loader__num_workers": 1}
    low = Home.made(cluster, "preempted-after-20-s", slow, data__loader__num_workers=2)
    hasty = Home.made(cluster, "preempted-after-10-s", slow, launch__slurm={"partition": "hasty"}, **spawned)
    jobs = {home: home.submit() for home in (low, hasty)}
    for restarts in (0, 1):
        _train(cluster, low, hasty, restarts=restarts)
        other = cluster.submit(NOTHING, *HIGH)
        cluster.wait_for(other, "COMPLETED", timeout=150)
        for job in jobs.values():
            cluster.wait_for_restart(job, restarts + 1)
    for home, job in jobs.items():
        ended = wait_for_end(cluster, job)
        assert (ended.state, ended.restarts) == ("COMPLETED", 2), home.log()
        home.assert_done_like(reference)
        home.assert_all_samples_once()
        assert _kinds(home) == [
            *["started", "stopped", "requeued"],
            *["restored", "stopped", "requeued"],
            *["restored", "finished"],
        ]
        assert {event["reason"] for event in events(home.run_dir, "requeued")} == {"preempted"}
        assert [attempt["exit_code"] for attempt in home.attempts()] == [75, 75, 0]
    assert_nothing_left(cluster)


def test_the_time_limit(cluster: Cluster, reference: Path) -> None:
    """A job of a minute comes back until it is done; also if a rank is stuck, but not if it gets nowhere."""
    slow = Home.made(cluster, "slow", Mishap(slow_starts=2, pace_s=1.5), launch__slurm=A_MINUTE)
    # Which gets stuck before the warning, however long three jobs take to start at once.
    two_minutes = {"timeout_min": 2}
    stuck = Home.made(cluster, "stuck", Mishap(do="stick", rank=3, at=10), launch__slurm=two_minutes)
    idle = Home.made(
        cluster,
        "idle",
        Mishap(do="stick", rank=2, at=2, starts=9),
        launch__slurm=A_MINUTE,
        launch__max_idle_requeues=1,
        checkpoint__every_steps=100,
    )
    jobs = {home: home.submit() for home in (slow, stuck, idle)}
    ended = {home: wait_for_end(cluster, job, timeout=300) for home, job in jobs.items()}

    # On a slow machine the last start may be warned as well. Each return was asked for once, and Slurm added none.
    requeued = events(slow.run_dir, "requeued")
    assert ended[slow].state == "COMPLETED" and ended[slow].restarts == len(requeued) >= 2, slow.log()
    slow.assert_done_like(reference)
    slow.assert_all_samples_once()
    assert {event["reason"] for event in requeued} == {"time limit"}

    returns = len(events(stuck.run_dir, "requeued"))
    assert ended[stuck].state == "COMPLETED" and ended[stuck].restarts == returns >= 1, stuck.log()
    stuck.assert_done_like(reference)
    assert events(stuck.run_dir, "restored")[0]["step"] == events(stuck.run_dir, "requeued")[0]["step"] == 7
    failure = stuck.failure()
    assert failure["rank"] == 3 and "asked to stop (time limit), and did not in time" in failure["message"]
    assert "mishaps.py" in failure["traceback"] and failure["traceback"].count("in step") == 1
    assert {other["rank"] for other in failure["others"]} == {0, 1, 2}

    # Its ranks are ended at about the time limit: whether Slurm says so is a matter of a second.
    assert ended[idle].state in ("FAILED", "TIMEOUT") and ended[idle].restarts == 1, idle.log()
    outcome = idle.outcome()
    assert outcome["exit_code"] == 1
    assert "does not come back (time limit)" in outcome["report"] and "launch.max_idle_requeues" in outcome["report"]
    assert_nothing_left(cluster)


def test_requeued_by_hand_in_the_middle_of_a_save(cluster: Cluster, reference: Path) -> None:
    """Whether the save comes to its end before the job is killed, or not."""
    finishes = Home.made(cluster, "save-finishes", Mishap(do="requeue", at=2, stays_s=1.0))
    does_not = Home.made(cluster, "save-does-not", Mishap(do="requeue", at=2, stays_s=1000.0))
    jobs = {home: home.submit() for home in (finishes, does_not)}
    for home, job in jobs.items():
        ended = wait_for_end(cluster, job)
        assert (ended.state, ended.restarts) == ("COMPLETED", 1), home.log()
        home.assert_done_like(reference)
        assert events(home.run_dir, "requeued") == []  # by us
    # Training goes on beside the save; the stop waits for it, and saves what has been done since as well.
    assert events(finishes.run_dir, "restored")[0]["step"] >= 14
    assert _kinds(finishes) == ["started", "stopped", "restored", "finished"]
    finishes.assert_all_samples_once()
    assert events(does_not.run_dir, "restored")[0]["step"] == 7
    assert_nothing_left(cluster)


def _role(process: psutil.Process, role: str) -> bool:
    """Whether it is what `launch/child.py` was started as; the ranks that a node process forks look like it."""
    line = process.cmdline()
    return len(line) > 2 and line[1].endswith("child.py") and line[2] == role


def _of_job(cluster: Cluster, job: int, fits: Callable[[psutil.Process, str], bool]) -> psutil.Process:
    """The one process of a job that ``fits``, given the number of its task as well."""
    found = []
    for process in cluster.processes():
        try:
            text = Path(f"/proc/{process.pid}/environ").read_text(errors="replace")
            env = dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
            if env.get("SLURM_JOB_ID") == str(job) and fits(process, env.get("SLURM_PROCID", "")):
                found.append(process)
        except (OSError, psutil.Error):
            continue
    oldest = min(found, key=lambda process: process.pid)
    assert len(found) == 1 or all(oldest in process.parents() for process in found if process != oldest), found
    return oldest


KILLED: dict[str, Callable[[psutil.Process, str], bool]] = {
    "leader": lambda process, task: task == "0" and _role(process, "task"),
    "follower": lambda process, task: task == "1" and _role(process, "task"),
    "node-process": lambda process, task: task == "0" and _role(process, "node"),
    "srun": lambda process, _: process.name() == "srun",
}


def test_whatever_is_killed(cluster: Cluster, reference: Path) -> None:
    killed = {name: Home.made(cluster, name, Mishap(slow_starts=1)) for name in KILLED}
    jobs = {name: home.submit() for name, home in killed.items()}
    for name, home in killed.items():
        _train(cluster, home)
        _of_job(cluster, jobs[name], KILLED[name]).kill()
    ended = {name: wait_for_end(cluster, job) for name, job in jobs.items()}

    # A launcher that is gone looks like its node; where nobody is left to say a word, the batch shell sees to the rest.
    for name, reason in (("follower", "node lost"), ("leader", "step lost"), ("srun", "step lost")):
        assert (ended[name].state, ended[name].restarts) == ("COMPLETED", 1), killed[name].log()
        killed[name].assert_done_like(reference)
        assert events(killed[name].run_dir, "requeued")[0]["reason"] == reason

    assert (ended["node-process"].state, ended["node-process"].restarts) == ("FAILED", 0)
    outcome = killed["node-process"].outcome()
    assert outcome["exit_code"] == 1
    assert "the process that starts the ranks" in outcome["report"] and "SIGKILL" in outcome["report"]
    assert killed["node-process"].log().count("the process that starts the ranks") == 1
    assert_nothing_left(cluster)


def test_a_rank_is_killed_or_refuses(cluster: Cluster, reference: Path) -> None:
    killed = Home.made(cluster, "killed", Mishap(do="kill", rank=2), launch__max_restarts=1)
    refuses = Home.made(cluster, "refuses", Mishap(do="refuse", rank=3))
    jobs = {home: home.submit() for home in (killed, refuses)}
    ended = {home: wait_for_end(cluster, job) for home, job in jobs.items()}

    assert (ended[killed].state, ended[killed].restarts) == ("COMPLETED", 0), killed.log()
    killed.assert_done_like(reference)
    assert [attempt["exit_code"] for attempt in killed.attempts()] == [1, 0]
    assert (killed.failure()["rank"], killed.failure()["exit"]) == (2, "SIGKILL")
    assert killed.log().count("rank 2 on") == 1

    assert (ended[refuses].state, ended[refuses].exit_code) == ("FAILED", "2:0")
    assert refuses.outcome()["exit_code"] == 2
    assert refuses.log().count("this model wants another machine") == 1 and "Traceback" not in refuses.log()
    assert_nothing_left(cluster)


def test_a_node_set_down(cluster: Cluster, reference: Path) -> None:
    homes = [
        Home.made(cluster, name, Mishap(slow_starts=1), launch__slurm={"exclusive": True})
        for name in ("loses-leader", "loses-follower")
    ]
    jobs = [home.submit() for home in homes]
    _train(cluster, *homes)
    nodes = [cluster.job(job).nodes[place] for place, job in enumerate(jobs)]
    for node in nodes:
        cluster.stop_node(node)
    for home, job in zip(homes, jobs, strict=True):
        ended = wait_for_end(cluster, job)
        assert (ended.state, ended.restarts) == ("COMPLETED", 1), home.log()
        home.assert_done_like(reference)
        # Slurm has done it already, or our launcher was faster than the word that the node is down.
        assert [event["reason"] for event in events(home.run_dir, "requeued")] in ([], ["node lost"])
    assert_nothing_left(cluster)


def test_ended_by_a_person(cluster: Cluster) -> None:
    cancelled, signalled = (
        Home.made(cluster, name, Mishap(slow_starts=1), checkpoint__every_steps=1000)
        for name in ("cancelled", "signalled")
    )
    jobs = {home: home.submit() for home in (cancelled, signalled)}
    _train(cluster, cancelled, signalled)
    cluster.run("scancel", str(jobs[cancelled]))
    cluster.run("scancel", "--signal=TERM", str(jobs[signalled]))
    assert wait_for_end(cluster, jobs[cancelled]).state == "CANCELLED"
    assert wait_for_end(cluster, jobs[signalled]).exit_code == "75:0"
    for home, job in jobs.items():
        assert cluster.job(job).restarts == 0
        assert _kinds(home) == ["started", "stopped"]
        assert last_checkpoint(home.run_dir).name == f"step-{events(home.run_dir, 'stopped')[0]['step']:08d}"
        assert home.outcome()["exit_code"] == 75
    assert_nothing_left(cluster)


FAILING = """
import os, signal, sys, time
from pathlib import Path

kind = sys.argv[1]
here = f"{kind}-{os.environ['TORCHELASTIC_RESTART_COUNT']}"

def until(path):
    while not Path(path).exists():
        time.sleep(0.002)

if os.environ["RANK"] == "3":
    for rank in range(3):
        until(f"{here}-{rank}")
    Path(f"{here}-struck").touch()
    if kind == "raise":
        raise ValueError("the cause")
    if kind == "exit":
        os._exit(7)
    os.kill(os.getpid(), signal.SIGKILL)
Path(f"{here}-{os.environ['RANK']}").touch()
until(f"{here}-struck")
time.sleep(0.4)
raise RuntimeError("a consequence")
"""


def test_the_first_of_several_failures_on_two_nodes(cluster: Cluster) -> None:
    """Rank 3 fails soon before the others, again and again."""
    home = Home.made(cluster, "failing")
    (home.cwd / "failing.py").write_text(FAILING)
    shape = ("--nnodes", "2", "--nproc-per-node", "2")
    words = {"raise": "ValueError the cause", "exit": "exit code 7", "kill": "SIGKILL"}
    times = {"raise": 12, "exit": 3, "kill": 3}
    jobs = {}
    for kind in words:
        restarts = f"launch.max_restarts={times[kind] - 1}"
        done = home.run("launch", "--launcher", "slurm", *shape, "-o", restarts, "--run-dir", kind, "failing.py", kind)
        assert done.returncode == 0, done.stderr
        jobs[kind] = int(done.stdout)
    for kind, word in words.items():
        assert wait_for_end(cluster, jobs[kind]).state == "FAILED"
        told = [json.loads(path.read_text())["how"] for path in (home.cwd / kind / "attempts").glob("*.json")]
        assert [how for how in told if not how.startswith(f"rank 3 failed: {word}")] == []
        assert len(told) == times[kind]
        failure = json.loads((home.cwd / kind / "failure.json").read_text())
        assert [other["rank"] for other in failure["others"]] != [] and failure["rank"] == 3
    assert_nothing_left(cluster)


def _twin(home: Home) -> int:
    """The job once more, as if it had been submitted twice in one moment."""
    first = home.run_dir / "slurm/submission-0"
    second = shutil.copytree(first, first.with_name("twin"))
    (script,) = second.glob("*_submission.sh")
    script.write_text(script.read_text().replace(str(first), str(second)))
    return int(home.command("sbatch", "--parsable", str(script)).stdout)


def test_the_same_job_several_times_at_once(cluster: Cluster, reference: Path) -> None:
    home = Home.made(cluster, "many", Mishap(slow_starts=1))
    following = [home.start("run", "config.yaml", "--launcher", "slurm", "--wait")]
    _train(cluster, home)
    following += [home.start("run", "config.yaml", "--launcher", "slurm", "--wait") for _ in range(2)]
    twin = _twin(home)
    assert wait_for_end(cluster, twin).exit_code == "2:0"
    (job,) = {int(line) for line in cluster.run("squeue", "--noheader", "--format=%A").stdout.split()}
    cluster.run("scontrol", "requeue", str(job))
    ended = wait_for_end(cluster, job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), home.log()
    for process in following:
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out) == (0, f"{job}\n"), err
        assert "step 60" in err and f"ddpkit: job {job} is requeued" in err
        assert err.endswith(f"ddpkit: job {job}: done\n")
    home.assert_done_like(reference)
    home.assert_all_samples_once()
    assert_nothing_left(cluster)


OWN_LOOP = """
import os, sys, time
import torch, ddpkit

with ddpkit.runtime(seed=3) as rt:
    model = rt.wrap(torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    inputs = torch.randn(320, 6, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
    loader = rt.loader(data, global_batch_size=16, num_workers=1)
    run = rt.resume(sys.argv[1], every_steps=None, log_every=1, model=model, optimizer=optimizer, loader=loader)
    for epoch in run.epochs(3):
        for batch, targets in loader:
            if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
                time.sleep(float(sys.argv[2]))
            loss = torch.nn.functional.mse_loss(model(batch), targets)
            run.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            run.step(loss=loss)
"""
PLAIN = """
import os, sys, time
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
for step in range(20):
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        open("plain-begun", "w").close()
        time.sleep(3)
    model(torch.full((2, 4), float(dist.get_rank()))).sum().backward()
if dist.get_rank() == 0:
    print("sum", model.module.weight.grad.sum().item(), "of", dist.get_world_size(), flush=True)
dist.destroy_process_group()
"""


def test_scripts_of_ones_own_are_preempted(cluster: Cluster) -> None:
    """One that knows ddpkit goes on where it stopped; one that does not begins again. Both come back."""
    home = Home.made(cluster, "scripts")
    (home.cwd / "own.py").write_text(OWN_LOOP)
    (home.cwd / "plain.py").write_text(PLAIN)
    here = home.run("launch", "--nproc-per-node", "4", "own.py", "here", "0")
    assert here.returncode == 0, here.stderr

    def submit(run_dir: str, *script: str) -> int:
        shape = ("--nnodes", "2", "--nproc-per-node", "2", "-o", "launch.slurm.partition=hasty")
        done = home.run("launch", "--launcher", "slurm", *shape, "--run-dir", run_dir, *script)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    own = submit("own", "own.py", "there", "0.5")
    plain = submit("plain", "plain.py")
    steps = home.cwd / "there/metrics.jsonl"
    cluster.wait_until(lambda: steps.exists() and (home.cwd / "plain-begun").exists(), "both have begun", 120)
    cluster.wait_for(cluster.submit(NOTHING, *HIGH), "COMPLETED", timeout=150)
    for job in (own, plain):
        ended = wait_for_end(cluster, job)
        assert (ended.state, ended.restarts) == ("COMPLETED", 1)
    assert_same_end(home.cwd / "there", home.cwd / "here")
    assert [event["event"] for event in events(home.cwd / "there") if event["event"] != "saved"] == [
        "started",
        "stopped",
        "restored",
        "finished",
    ]
    (log,) = (home.cwd / "plain/slurm").glob("submission-*/*_0_log.out")
    assert log.read_text().count("sum 240.0 of 4") == 1
    assert_nothing_left(cluster)
