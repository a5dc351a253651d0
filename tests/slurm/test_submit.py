"""Submitting to a real cluster, and following what was submitted. What the job does is played, but at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import calls
from launch.following import Watch, ask
from launch.submission import Submission
from tests.launch.shell import Shell, finish, wait_for
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slow

LONG_S = 100.0

# Instead of the job's own program: what the variable PLAY says, in the task with rank zero.
PLAYED = """\
import json, os, sys, time
from pathlib import Path
folder, index = Path(sys.argv[2]), os.environ.get("SLURM_ARRAY_TASK_ID")
suffix = "" if index is None else f"-{index}"
plan = json.loads((folder / f"plan{suffix}.json").read_text())
def end(code):
    tree = {"exit_code": code, "failures": [], "results": [], "report": None}
    new = folder / f"new{suffix}"
    new.write_text(json.dumps(tree))
    new.replace(folder / f"outcome{suffix}.json")
    sys.exit(0)  # what the outcome says counts
def until(name):
    while not Path(name).exists():
        time.sleep(0.1)
if os.environ["SLURM_PROCID"] == "0":
    exec(os.environ["PLAY"])
"""
DRIVER = """\
import sys
from pathlib import Path
from launch import cli, sbatch
sbatch._CHILD = Path({played!r})
sys.exit(cli.main(sys.argv[1:]))
"""


class Site(Shell):
    """A directory on the cluster's login node."""

    cluster: Cluster

    def env(self, **variables: str) -> dict[str, str]:
        slurm = {name: self.cluster.env[name] for name in ("SLURM_CONF", "PATH")}
        return super().env(**slurm | variables)

    def played(self, *command: str, play: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start the command line, with jobs that do what ``play`` says."""
        options["env"] = options.get("env", {}) | {"PLAY": textwrap.dedent(play)}
        return self.start(*command, prefix=(sys.executable, str(self.cwd / "driver.py")), **options)

    def play(self, *command: str, play: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return finish(self.played(*command, play=play, **options), LONG_S)


@pytest.fixture
def site(tmp_path: Path, cluster: Cluster) -> Iterator[Site]:
    made = Site(tmp_path)
    made.cluster = cluster
    played = made.script("played.py", PLAYED)
    made.script("driver.py", DRIVER.format(played=str(played)))
    made.config()
    try:
        yield made
    finally:
        for child in made.children:
            child.kill()
            child.communicate()


RUN = ("run", "config.yaml", "--launcher", "slurm")


def test_what_a_dry_run_prints_is_what_slurm_gets(cluster: Cluster, site: Site) -> None:
    shape = (
        "-o",
        "launch.nnodes=2",
        "-o",
        "launch.start_method=spawn",
        "-o",
        "launch.slurm={timeout_min: 1, name: a b}",
    )
    # As on a machine without Slurm.
    told = site.play(*RUN, *shape, "--dry-run", play="", env={"PATH": "/nowhere", "SLURM_CONF": "/nowhere"})
    assert told.returncode == 0, told.stderr
    assert not (site.cwd / "run").exists()
    done = site.play(*RUN, *shape, play="print(os.environ['SLURM_NTASKS'], os.environ['SLURM_CPUS_PER_TASK']); end(0)")
    assert done.returncode == 0, done.stderr
    job = int(done.stdout)  # and nothing else
    has = cluster.run("scontrol", "write", "batch_script", str(job), "-").stdout
    assert told.stdout.partition("---\nlauncher: slurm\n")[2].partition("---\n")[2].strip() == has.strip()
    assert "#SBATCH --signal=USR2@15\n" in has and "#SBATCH --requeue\n" in has
    ended = cluster.wait_for(job, "COMPLETED")
    assert len(ended.nodes) == 2
    assert ended.output.read_text() == "4 1\n"
    assert ended.output.parent == site.cwd / "run/slurm/submission-0"


def test_a_job_submitted_from_inside_another_inherits_nothing_of_it(cluster: Cluster, site: Site) -> None:
    # Names that the task itself has are there with its own values.
    foreign = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}
    foreign |= {"TORCHELASTIC_RUN_ID": "x", "OMPI_COMM_WORLD_RANK": "3", "PMI_RANK": "3", "SLURM_NTASKS_PER_CORE": "7"}
    stays = {"SBATCH_ACCOUNT": "mine", "SLURM_CONF": cluster.env["SLURM_CONF"], "OMP_NUM_THREADS": "3"}
    play = "Path('env.json').write_text(json.dumps(dict(os.environ))); end(0)"
    argv = [*RUN, "--wait", "-o", "launch.slurm.timeout_min=2"]
    for starter in (("srun", "-N1", "-n1", "--time=9"), ("salloc", "-N2", "--ntasks-per-node=2", "--time=9")):
        (site.cwd / "env.json").unlink(missing_ok=True)
        prefix = (*starter, sys.executable, str(site.cwd / "driver.py"))
        env = foreign | stays | {"SBATCH_TIMELIMIT": "33", "PLAY": play}
        done = finish(site.start(*argv, prefix=prefix, env=env), LONG_S)
        assert done.returncode == 0, done.stderr
        found = json.loads((site.cwd / "env.json").read_text())
        left = {name: found[name] for name in foreign if name in found}
        assert left == ({"PMI_RANK": "0"} if "PMI_RANK" in left else {}), starter  # srun's own
        assert {name: found[name] for name in stays} == stays
        assert found["SLURM_JOB_ID"] == done.stdout.strip() and found["SLURM_NNODES"] == found["SLURM_NTASKS"] == "1"
        shown = cluster.run("scontrol", "show", "job", done.stdout.strip()).stdout
        assert "TimeLimit=00:02:00" in shown and "Account=mine" in shown


def test_following_a_job_through_a_requeue_shows_all_that_it_writes(cluster: Cluster, site: Site) -> None:
    play = """
        start = os.environ.get("SLURM_RESTART_COUNT", "0")
        print(f"start {start}", flush=True)
        print(f"error {start}", file=sys.stderr, flush=True)
        if start == "0":
            Path("begun").touch()
            time.sleep(1000)
        print("é" * 100000, flush=True)
        end(75)
    """
    shown = site.cwd / "shown"
    # Whose nodes it has to wait for, until the first look has seen it waiting.
    blocker = cluster.submit("#!/bin/bash\nexec sleep 1000\n", "--nodes=4", "--exclusive")
    cluster.wait_for(blocker, "RUNNING")
    with shown.open("wb") as file:
        child = site.played(*RUN, "--wait", "-o", "launch.nnodes=2", play=play, stderr=file)
    assert child.stdout is not None
    number = int(child.stdout.readline())
    wait_for(lambda: "waits to start" in shown.read_text(), "it says that it waits")
    cluster.run("scancel", str(blocker))
    wait_for((site.cwd / "begun").exists, "the job runs")
    cluster.run("scontrol", "requeue", str(number))
    wait_for(lambda: "is requeued" in shown.read_text(), "it says so")
    cluster.wait_for_restart(number)
    assert finish(child, LONG_S).returncode == 75
    lines = shown.read_text().splitlines()
    said = [line.partition(" (")[0] for line in lines if line.startswith("ddpkit: job")]
    again = f"ddpkit: job {number} is requeued, and waits to start again"
    assert [line for line in dict.fromkeys(said) if "to start" in line] == [
        f"ddpkit: job {number} waits to start",
        again,
    ]
    assert said[-1] == f"ddpkit: job {number}: stopped on request, state saved; submit it again to continue"
    for line in ("start 0", "error 0", "start 1", "error 1", "é" * 100000):
        assert lines.count(line) == 1, line


def test_ctrl_c_ends_the_following_alone_and_the_same_command_takes_it_up(cluster: Cluster, site: Site) -> None:
    play = "print('begun', flush=True); until('go'); end(0)"
    child = site.played(*RUN, "--wait", play=play)
    log = site.cwd / "run/slurm/submission-0"
    wait_for(lambda: any("begun" in path.read_text() for path in log.glob("*.out")), "the job runs")
    child.send_signal(signal.SIGINT)
    left = finish(child)
    assert left.returncode == 130 and f"scancel {left.stdout.strip()}" in left.stderr, left.stderr
    assert cluster.job(int(left.stdout)).state == "RUNNING"

    other = site.play(*RUN, "--wait", "-o", "train.epochs=2", play=play)
    assert other.returncode == 2 and f"is in use by job {left.stdout.strip()}" in other.stderr
    child = site.played(*RUN, "--wait", play=play)
    assert child.stdout is not None
    assert child.stdout.readline().decode() == left.stdout
    (site.cwd / "go").touch()
    done = finish(child, LONG_S)
    assert done.returncode == 0, done.stderr
    assert "begun" in done.stderr and "was submitted for this and has not ended" in done.stderr
    assert len(list((site.cwd / "run/slurm").iterdir())) == 1


def test_a_sweep_is_one_array_of_jobs(cluster: Cluster, site: Site) -> None:
    play = """
        seed = plan["job"]["config"]["seed"]
        Path(f"at-{seed}").touch()
        print("seed", seed, flush=True)
        end({1: 0, 2: 75, 3: 0}[seed])
    """
    given = ("--sweep", "seed=[1,2,3]", "-o", "launch.slurm.array_parallelism=2")
    done = site.play(*RUN, *given, "--wait", play=play)
    assert done.returncode == 75, done.stderr
    job = done.stdout.strip()
    assert f"ArrayJobId={job} " in cluster.run("scontrol", "show", "job", "--oneliner", job).stdout
    for index, seed in enumerate((1, 2, 3)):
        assert f"[seed={seed}] seed {seed}\n" in done.stderr
        word = "stopped on request" if seed == 2 else "done"
        assert f"[seed={seed}] ddpkit: job {job}_{index}: {word}" in done.stderr
    assert sorted(path.name for path in site.cwd.glob("at-*")) == ["at-1", "at-2", "at-3"]


def test_slurms_refusals(site: Site) -> None:
    for option, words in (
        ("launch.slurm.partition=nowhere", "invalid partition specified: nowhere"),
        ("launch.slurm.nodelist=n9", "Invalid node name specified"),
        ("launch.slurm.mem_gb=4000", "Memory specification can not be satisfied"),
    ):
        done = site.play(*RUN, "-o", option, play="")
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.startswith("ddpkit: sbatch refused the job: ") and words in done.stderr
        assert "Traceback" not in done.stderr and not (site.cwd / "run").exists()


def test_a_job_cancelled_before_it_began(cluster: Cluster, site: Site) -> None:
    shown = site.cwd / "shown"
    with shown.open("wb") as file:
        hold = ("-o", "launch.slurm.additional_parameters={hold: true}")
        child = site.played(*RUN, "--wait", *hold, play="end(0)", stderr=file)
    assert child.stdout is not None
    number = child.stdout.readline().decode().strip()
    wait_for(lambda: "waits to start (JobHeldUser)" in shown.read_text(), "it says why it waits")
    cluster.run("scancel", number)
    assert finish(child, LONG_S).returncode == 75
    assert f"job {number} was cancelled before it began" in shown.read_text()


def test_a_job_that_slurm_has_forgotten(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in site.cluster.env.items():
        monkeypatch.setenv(name, value)
    submission = Submission("999999", site.cwd)
    assert ask(submission) == {}
    ended = Watch(submission, late_s=0).look(None, 0.0)
    assert ended is not None and ended.exit_code == 1 and "no longer knows job 999999" in (ended.report or "")


# ---------------------------------------------------------------------- not played


def test_a_run_by_a_snapshot_of_its_code(cluster: Cluster, site: Site) -> None:
    """The job takes the code as it was when it was submitted, from module and file; its directory stays the same."""
    site.script("pack/__init__.py", "")
    site.script("pack/made.py", "from tests.toy import dataset\nprint('as submitted', flush=True)\n")
    site.script("steps.py", "from tests.toy import step, eval_step\n")
    site.config(
        model={"factory": "tests.toy:model"},
        data={
            "train": {"factory": "pack.made:dataset"},
            "eval": {"factory": "pack.made:dataset"},
            "global_batch_size": 16,
        },
        train={"step": "steps.py:step", "eval_step": "steps.py:eval_step", "epochs": 1},
    )
    for command in (["init", "-q"], ["add", "pack", "steps.py"]):
        subprocess.run(["git", *command], cwd=site.cwd, check=True)
    options = ("-o", "launch.snapshot=true", "-o", "launch.nnodes=2")
    child = site.start(*RUN, *options, "--wait", "-o", "launch.slurm.additional_parameters={hold: true}")
    found = wait_for(lambda: list((site.cwd / "run/slurm").glob("submission-0/*_submission.sh")))
    for path in ("pack/made.py", "steps.py"):
        site.script(path, "raise ImportError('changed since')\n")
    cluster.run("scontrol", "release", found[0].name.partition("_")[0])
    done = finish(child, LONG_S)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("as submitted") == 1
    assert "steps.py:step" in (site.cwd / "run/config.yaml").read_text()
    assert "code/steps.py" not in (site.cwd / "run/config.yaml").read_text()
    status = json.loads(site.run("status", "run", "--json").stdout)
    assert status["state"] == "finished" and status["attempts"][0]["ranks"] == 4


def test_a_sweep_to_the_end_of_all_its_runs(site: Site) -> None:
    done = finish(site.start(*RUN, "--sweep", "seed=[1, 2]", "--wait"), LONG_S)
    assert done.returncode == 0, done.stderr
    for seed in (1, 2):
        assert json.loads(site.run("status", f"run/seed={seed}", "--json").stdout)["state"] == "finished"
    again = finish(site.start(*RUN, "--sweep", "seed=[1, 2]", "--wait"))
    assert (again.returncode, again.stdout) == (0, "") and again.stderr.count("is finished") == 2


def which(add: int, fails: bool = False) -> tuple[int, str]:
    """A rank's number and node."""
    rank = int(os.environ["RANK"])
    if fails and rank == 2:
        raise KeyError("of rank 2")
    return rank + add, os.environ["SLURMD_NODENAME"]


def test_a_function_on_two_nodes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in site.env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(site.cwd)
    good = calls.slurm(which, 10, nodes=2, nproc_per_node=2, timeout_min=5)
    bad = calls.slurm(which, 10, nodes=2, nproc_per_node=2, kwargs={"fails": True})
    long = calls.slurm(os.system, "sleep 1000", nproc_per_node=1, additional_parameters={"hold": True})
    assert long.state == "PENDING" and not long.done()
    results = good.results()
    assert [number for number, _ in results] == [10, 11, 12, 13]
    assert results[0][1] == results[1][1] != results[2][1] == results[3][1]
    assert good.result() == results[0] and good.exception() is None and good.state == "COMPLETED"
    with pytest.raises(KeyError, match="of rank 2") as raised:
        bad.result()
    assert "rank 2" in str(raised.value.__cause__) and bad.state == "FAILED"
    long.cancel()
    assert isinstance(long.exception(), calls.RankError) and long.done()
