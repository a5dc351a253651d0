"""What a submission to Slurm asks for, writes and says; on a machine without Slurm, or with one that is played."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from ddpkit import config as configs
from ddpkit import slurm, world
from ddpkit.checkpoint.claim import Place, Process
from ddpkit.errors import ConfigError, UserError
from ddpkit.slurm import JobState
from launch import calls, cli, following, leave, sbatch, snapshot, submission, submitting, sweep
from launch.carrying import carried
from launch.following import Watch
from launch.job import Failure, Job
from launch.plan import Plan
from launch.submission import Submission
from tests.launch.shell import ROOT, Shell, finish, wait_for

CHILD = ROOT / "launch/child.py"


def asked(*overrides: str) -> tuple[int, dict[str, Any]]:
    return sbatch.parameters(configs.load_launch(["launch.launcher=slurm", *overrides]))


# ---------------------------------------------------------------------- the script


def test_the_golden_script() -> None:
    overrides = ["launch.nnodes=2", "launch.nproc_per_node=4", "launch.cpus_per_rank=3", "launch.warning_signal=USR1"]
    options = "{timeout_min: 4, mem_gb: 1.5, slurm_partition: gpu, account: a b, setup: [module load x, '. e/bin/act']}"
    nproc, parameters = asked(*overrides, f"launch.slurm={options}")
    assert nproc == 4
    assert sbatch.text(parameters, Path("/runs/a b/s"), "digits", None) == (
        f"""#!/bin/bash

# Parameters
#SBATCH --account='a b'
#SBATCH --cpus-per-task=12
#SBATCH --error='/runs/a b/s/%j_0_log.err'
#SBATCH --job-name=digits
#SBATCH --mem=1536MB
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output='/runs/a b/s/%j_0_log.out'
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR1@60
#SBATCH --time=4

# setup
module load x
. e/bin/act

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '/runs/a b/s/%j_%t_log.out' --error '/runs/a b/s/%j_%t_log.err' --kill-on-bad-exit=1 """
        f"--open-mode=append --cpus-per-task=12 {sys.executable} {CHILD} task '/runs/a b/s' "
        f"|| exec {sys.executable} {CHILD} leave '/runs/a b/s' $?\n"
    )


def test_the_golden_script_of_an_array_with_a_task_for_each_rank() -> None:
    options = (
        "{gpus_per_node: a100:2, exclusive: true, array_parallelism: 2, name: mine, signal_delay_s: 7, "
        "stderr_to_stdout: true, srun_args: [--mpi=none], additional_parameters: {reservation: r}}"
    )
    nproc, parameters = asked("launch.start_method=spawn", f"launch.slurm={options}")
    assert nproc == 2
    assert sbatch.text(parameters, Path("/s"), "digits", 5) == (
        f"""#!/bin/bash

# Parameters
#SBATCH --array=0-4%2
#SBATCH --exclusive
#SBATCH --gpus-per-node=a100:2
#SBATCH --job-name=mine
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=/s/%A_%a_0_log.out
#SBATCH --requeue
#SBATCH --reservation=r
#SBATCH --signal=USR2@7

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /s/%A_%a_%t_log.out --kill-on-bad-exit=1 --open-mode=append --cpu-bind=none --mpi=none """
        f"{sys.executable} {CHILD} task /s || exec {sys.executable} {CHILD} leave /s $?\n"
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # one task a node has the cores of all its ranks; a task a rank those of one
        (("launch.nproc_per_node=4",), {"ntasks_per_node": 1, "cpus_per_task": 4}),
        (("launch.nproc_per_node=4", "launch.cpus_per_rank=2"), {"ntasks_per_node": 1, "cpus_per_task": 8}),
        (("launch.nproc_per_node=4", "launch.start_method=spawn"), {"ntasks_per_node": 4, "cpus_per_task": 1}),
        (("launch.slurm.gpus_per_node=3",), {"ntasks_per_node": 1, "cpus_per_task": 3, "gpus_per_node": 3}),
        (("launch.slurm.gres='craynetwork:1,gpu:a100:2'",), {"cpus_per_task": 2}),
        (("launch.nproc_without_gpu=5",), {"cpus_per_task": 5}),
        (("launch.slurm.gpus_per_node=3", "launch.backend=gloo", "launch.nproc_per_node=7"), {"cpus_per_task": 7}),
        (("launch.nproc_per_node=2", "launch.slurm.exclusive=true"), {"cpus_per_task": None}),
        (("launch.nproc_per_node=1", "launch.nnodes='2:2'"), {"nodes": 2}),
        # the warning: a quarter of the limit, between 15 s and 90 s
        (("launch.nproc_per_node=1", "launch.slurm.timeout_min=1"), {"time": 1, "signal_delay_s": 15}),
        (("launch.nproc_per_node=1", "launch.slurm.time=2"), {"time": 2, "signal_delay_s": 30}),
        (("launch.nproc_per_node=1", "launch.slurm.timeout_min=600"), {"signal_delay_s": 90}),
        (("launch.nproc_per_node=1",), {"time": None, "wckey": None, "signal_delay_s": 90}),
        (("launch.nproc_per_node=1", "launch.slurm={time: 1, signal_delay_s: 40}"), {"signal_delay_s": 40}),
        (("launch.nproc_per_node=1", "launch.slurm={wckey: w, exclusive: false, qos: null}"), {"wckey": "w"}),
    ],
)
def test_what_is_asked_for(overrides: tuple[str, ...], expected: dict[str, Any]) -> None:
    _, parameters = asked(*overrides)
    assert {key: parameters.get(key) for key in expected} == expected
    assert parameters["additional_parameters"]["signal"] == f"USR2@{parameters['signal_delay_s']}"
    cpus = parameters["cpus_per_task"]
    assert parameters["srun_args"][2:] == [f"--cpus-per-task={cpus}" if cpus else "--cpu-bind=none"]
    text = sbatch.text(parameters, Path("/s"), "x", None)
    assert "None" not in text and "False" not in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("launch.slurm.partiton=x",), "launch.slurm.partiton: unknown key; did you mean 'partition'?"),
        (("launch.slurm.slurm_tiem=3",), "launch.slurm.slurm_tiem: unknown key; did you mean 'time'?"),
        (("launch.slurm.num_gpus=3",), "launch.slurm.num_gpus: unknown key"),
        (("launch.slurm.folder=x",), "launch.slurm.folder: unknown key"),
        (("launch.slurm.timeout_min=1.5",), "launch.slurm.timeout_min: expected a whole number, got 1.5 (float)"),
        (("launch.slurm.timeout_min=true",), "launch.slurm.timeout_min: expected a whole number, got true (bool)"),
        (("launch.slurm.time='1:00:00'",), "launch.slurm.time: expected a whole number, got '1:00:00' (str)"),
        (("launch.slurm.partition=[a]",), "launch.slurm.partition: expected a string, got a list"),
        (("launch.slurm.setup=x",), "launch.slurm.setup: expected a list of strings, got 'x' (str)"),
        (("launch.slurm.srun_args=x",), "launch.slurm.srun_args: expected a list of strings, got 'x' (str)"),
        (("launch.slurm.exclusive=3",), "launch.slurm.exclusive: expected true or false or a string, got 3 (int)"),
        (("launch.slurm.additional_parameters=3",), "launch.slurm.additional_parameters: expected a mapping, got 3"),
        (("launch.slurm={time: 3, slurm_time: 4}",), "launch.slurm.slurm_time: time says the same"),
        (("launch.slurm={timeout_min: 3, time: 4}",), "launch.slurm.time: timeout_min says the same"),
        (("launch.slurm.nodes=2",), "launch.slurm.nodes: give launch.nnodes"),
        (("launch.slurm.tasks_per_node=2",), "launch.slurm.tasks_per_node: give launch.nproc_per_node"),
        (("launch.slurm.slurm_cpus_per_task=2",), "launch.slurm.slurm_cpus_per_task: give launch.cpus_per_rank"),
        (("launch.slurm.cpus_per_gpu=2",), "launch.slurm.cpus_per_gpu: give launch.cpus_per_rank"),
        (("launch.slurm.gpus_per_task=2",), "launch.slurm.gpus_per_task: give gpus_per_node"),
        (("launch.slurm.use_srun=false",), "launch.slurm.use_srun: leave it out"),
        (("launch.slurm.additional_parameters={signal: x}",), "launch.slurm.additional_parameters.signal: give launch"),
        (("launch.slurm.additional_parameters={no_requeue: true}",), "launch.slurm.additional_parameters.no_requeue: "),
        (("launch.slurm={signal_delay_s: 60, time: 1}",), "launch.slurm.signal_delay_s: 60 s is not between 1 s and"),
        (("launch.slurm.gpus_per_node=a100",), "launch.slurm: 'a100' is no number of GPUs"),
        (("launch.nproc_per_node=auto",), "launch.nproc_per_node: auto cannot look at the nodes"),
        (
            ("launch.nproc_per_node=4", "launch.slurm.gpus_per_node=2"),
            "launch.nproc_per_node: 4 ranks, but launch.slurm",
        ),
        (("launch.backend=nccl",), "launch.backend: nccl needs GPUs; give launch.slurm.gpus_per_node"),
        (("launch.rdzv_endpoint=h:1", "launch.nnodes=2"), "launch.rdzv_endpoint: h:1 is for launch.launcher=torchrun"),
    ],
)
def test_refusals(overrides: tuple[str, ...], words: str) -> None:
    given = overrides if any("nproc" in each for each in overrides) else ("launch.nproc_per_node=1", *overrides)
    with pytest.raises(UserError) as refused:
        asked(*given)
    assert str(refused.value).startswith(words)


def test_variables_of_another_place_are_not_for_a_job() -> None:
    env = dict.fromkeys(
        (
            *("SLURM_JOB_ID", "SLURM_NTASKS", "SLURMD_NODENAME", "SRUN_DEBUG", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
            *("LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PMI_RANK"),
            *("OMPI_COMM_WORLD_RANK", "PMI2_X", "PMIX_NAMESPACE", "SUBMITIT_EXECUTOR", "MPI_LOCALRANKID"),
            *("SBATCH_TIMELIMIT", "SBATCH_SIGNAL", "SBATCH_NO_REQUEUE", "SBATCH_OPEN_MODE"),
        ),
        "1",
    )
    stays = ("PATH", "SLURM_CONF", "SBATCH_ACCOUNT", "SBATCH_QOS", "OMP_NUM_THREADS", "RANKING", "MYRANK", "LOCALE")
    stated = sbatch.stated(
        sbatch.text(asked("launch.nproc_per_node=1", "launch.slurm.time=3")[1], Path("/s"), "x", None)
    )
    assert world.not_for_a_job(env | dict.fromkeys(stays, "1"), stated) == sorted(env)
    assert "SBATCH_TIMELIMIT" not in world.not_for_a_job(env, [])


def test_the_page_on_slurm_shows_what_is_taken() -> None:
    page = (ROOT / "docs/slurm.md").read_text()
    section = YAML(typ="safe").load(page.partition("```yaml\n")[2].partition("```")[0])["launch"]
    nproc, parameters = sbatch.parameters(configs.launch_section(section))
    assert (nproc, parameters["cpus_per_task"], parameters["time"]) == (4, 32, 240)
    assert set(section) - {"slurm"} <= set(configs.Launch.model_fields)
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("    ddpkit ")]
    assert len(commands) == 5
    for command in commands:
        cli._parser().parse_args(command)


# ---------------------------------------------------------------------- the command, beside a Slurm that is played


class Play:
    """Commands called sbatch, srun and scontrol, which note what they are given and answer as they are told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "programs"
        self.programs.mkdir(parents=True)
        self.program("srun", "exit 1")
        self.program("sbatch", f"env > {folder}/env; cp $1 {folder}/script; echo Submitted batch job 7")
        self.says(*self.states("PENDING Reason=Priority"))

    def program(self, name: str, commands: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{commands}\n")
        path.chmod(0o755)

    def states(self, *fields: str) -> list[str]:
        return [f"JobId=7 JobState={each} Requeue=1 BatchFlag=1" for each in fields]

    def says(self, *answers: str, last: str = "") -> None:
        """What scontrol says, one answer after the other, the last one again and again; commands to run before that."""
        for number, answer in enumerate(answers):
            (self.folder / f"answer-{number}").write_text(answer + "\n")
        self.program(
            "scontrol",
            f"cd {self.folder}; n=$(cat asked 2>/dev/null || echo 0); echo $((n + 1)) > asked\n"
            f"[ $n -lt {len(answers)} ] || n={len(answers) - 1}\n"
            "case $(cat answer-$n) in forgotten) echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1;;\n"
            "away) echo 'Unable to contact slurm controller' >&2; exit 1;; esac\n"
            f"[ $n -lt {len(answers) - 1} ] || {{ {last or ':'}; }}; cat answer-$n",
        )

    @property
    def submitted(self) -> str:
        return (self.folder / "script").read_text()


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    made = Play(tmp_path / "slurm")
    (tmp_path / "work").mkdir()
    Shell(tmp_path / "work").config()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PATH", f"{made.programs}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "argv", ["ddpkit", "run", "config.yaml"])
    monkeypatch.setattr(following, "POLL_S", 0.01)
    monkeypatch.setattr(following, "ASK_S", 0.05)
    return made


Capture = pytest.CaptureFixture[str]


def run(*arguments: str) -> int:
    return cli.main(["run", "config.yaml", "--launcher", "slurm", *arguments])


def test_a_submission_leaves_a_plan_and_says_the_jobs_number(play: Play, capsys: Capture) -> None:
    os.environ["RANK"] = "3"
    try:
        assert run("-o", "launch.nnodes=2") == 0
    finally:
        del os.environ["RANK"]
    out, err = capsys.readouterr()
    assert out == "7\n"
    folder = Path.cwd() / "run/slurm/submission-0"
    assert f"submitted job 7 from {folder}" in err and "scancel 7" in err and f"tail -F {folder}/7*.out" in err
    assert (folder / "7_submission.sh").read_text() == play.submitted
    assert "RANK=3" not in (play.folder / "env").read_text()

    plan = Plan.from_json(json.loads((folder / "plan.json").read_text()))
    assert (plan.launcher, plan.nproc, plan.nnodes, plan.start_method) == ("slurm", 2, 2, "warm")
    assert (plan.run_dir, plan.warning_signal, plan.env, plan.max_idle_requeues) == (Path("run"), "USR2", {}, 3)
    assert plan.job.kind == "run" and plan.job.search_path == (str(Path.cwd()),) and plan.job.options == {}
    assert configs.from_tree(plan.job.config).data.global_batch_size == 16
    assert plan.job.call == b""  # nothing is pickled


def test_a_dry_run_prints_the_script_that_is_submitted(play: Play, capsys: Capture) -> None:
    assert run("-o", "launch.slurm.partition=gpu", "--dry-run") == 0
    told = capsys.readouterr().out
    assert not Path("run").exists() and not (play.folder / "script").exists()
    assert run("-o", "launch.slurm.partition=gpu") == 0
    config, plan, script = told.split("---\n")
    assert script.rstrip("\n") == play.submitted.rstrip("\n") and "--partition=gpu" in script
    assert "launcher: slurm\nranks: 2\n" in plan and "global_batch_size: 16" in config
    # With one submission there, the next one has another folder.
    capsys.readouterr()
    assert run("--dry-run") == 0
    assert "submission-1/" in capsys.readouterr().out


def test_without_slurm(play: Play, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(play.folder))
    assert run() == 2
    out, err = capsys.readouterr()
    assert out == "" and "sbatch and srun and scontrol cannot be found on PATH" in err and err.count("\n") == 1
    assert run("--dry-run") == 0
    assert not Path("run").exists()


def test_what_sbatch_refuses_leaves_nothing(play: Play, capsys: Capture) -> None:
    play.program("sbatch", "echo 'sbatch: error: invalid partition specified: gqu' >&2; exit 1")
    assert run("-o", "launch.slurm.partition=gqu") == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "ddpkit: sbatch refused the job: sbatch: error: invalid partition specified: gqu\n"
    assert not Path("run").exists()
    os.makedirs("run/slurm/submission-4")  # of somebody else
    assert run("-o", "launch.slurm.partition=gqu") == 2
    assert sorted(os.listdir("run/slurm")) == ["submission-4"]


def test_a_directory_that_slurm_would_read_otherwise(play: Play, capsys: Capture) -> None:
    assert run("-o", "run_dir=runs/100%") == 2
    assert "run_dir: " in capsys.readouterr().err
    assert not Path("runs").exists()


def test_what_is_submitted_already_is_not_submitted_again(play: Play, capsys: Capture) -> None:
    assert run() == 0
    capsys.readouterr()
    play.program("sbatch", "echo Submitted batch job 8")
    assert run() == 0
    out, err = capsys.readouterr()
    assert out == "7\n" and "job 7 was submitted for this and has not ended" in err
    assert run("-o", "train.epochs=2") == 2
    assert "run_dir: run is in use by job 7" in capsys.readouterr().err
    play.says(*play.states("TIMEOUT"))
    assert run("-o", "train.epochs=2") == 0
    assert capsys.readouterr().out == "8\n"
    play.says("forgotten")
    assert run("-o", "train.epochs=2") == 0
    assert len(os.listdir("run/slurm")) == 3


def test_two_submissions_in_one_moment_are_one_job(play: Play) -> None:
    log = play.folder / "calls"
    play.program("sbatch", f"echo >> {log}; while [ ! -e {play.folder}/go ]; do sleep 0.02; done; echo batch job 7")
    shell = Shell(Path.cwd())
    first = shell.start("run", "config.yaml", "--launcher", "slurm")
    wait_for(log.exists, "the submission")
    with Path("said").open("wb") as said:
        second = shell.start("run", "config.yaml", "--launcher", "slurm", stderr=said)
    wait_for(lambda: f"ddpkit: process {first.pid} on " in Path("said").read_text(), "the other one waits")
    (play.folder / "go").touch()
    for done in (finish(first), finish(second)):
        assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
    assert "job 7 was submitted for this and has not ended" in Path("said").read_text()
    assert len(log.read_text()) == 1 and os.listdir("run/slurm") == ["submission-0"]


@pytest.mark.parametrize(
    ("pid", "host", "old", "waits"),
    [(2**22 + 1, None, False, False), (1, None, True, True), (1, "other", False, True), (1, "other", True, False)],
)
def test_who_submits_is_waited_for_while_it_may_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pid: int, host: str | None, old: bool, waits: bool
) -> None:
    monkeypatch.setattr(submitting, "_POLL_S", 0.0)
    file = tmp_path / "slurm/.submitting"
    file.parent.mkdir()
    place = asdict(Place.here()) | ({} if host is None else {"host": host})
    file.write_text(json.dumps({"place": place, "process": asdict(Process.running(pid))}))
    if old:
        os.utime(file, (0, 0))
    waited = []

    def ends(seconds: float) -> None:
        waited.append(seconds)
        file.unlink()

    monkeypatch.setattr(time, "sleep", ends)
    with submitting.alone(tmp_path):
        assert json.loads(file.read_text())["process"]["pid"] == os.getpid()
    assert bool(waited) == waits and os.listdir(file.parent) == []


def test_refusals_come_before_the_submission(play: Play, capsys: Capture) -> None:
    assert run("-o", "model.factory=tests.toy:modle") == 2
    os.mkdir("run")
    (Path("run") / "config.yaml").write_text(Path("config.yaml").read_text().replace("16", "32"))
    assert run() == 2
    assert "data.global_batch_size: 32 -> 16" in capsys.readouterr().err
    assert not (play.folder / "script").exists() and os.listdir("run") == ["config.yaml"]


@pytest.mark.parametrize(
    ("status", "fields", "has_outcome", "reason"),
    [
        (1, "RUNNING PreemptTime=2026-01-01T00:00:00", False, "preempted"),  # in the setup lines: no step is made
        (143, "RUNNING PreemptTime=2026-01-01T00:00:00", False, "preempted"),  # before a launcher could hold it back
        (137, "RUNNING", False, "step lost"),  # srun, or the first launcher
        (143, "RUNNING", False, None),  # a person's signal
        (137, "COMPLETING", False, None),  # scancel
        (1, "RUNNING", False, None),  # it cannot begin at all
        (1, "RUNNING PreemptTime=2026-01-01T00:00:00", True, None),  # a failure, told of
    ],
)
def test_a_job_whose_step_ends_without_a_word(
    play: Play, monkeypatch: pytest.MonkeyPatch, status: int, fields: str, has_outcome: bool, reason: str | None
) -> None:
    assert run() == 0
    folder = Path("run/slurm/submission-0").absolute()
    if has_outcome:
        (folder / "outcome.json").write_text("{}")
    play.says(*play.states(fields))
    asked = play.folder / "requeued"
    play.program("scontrol", f"[ $1 = requeue ] && echo $2 > {asked} || cat {play.folder}/answer-0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert leave.main(str(folder), str(status)) == status
    assert asked.exists() == (reason is not None)
    if reason is not None:
        (line,) = Path("run/events.jsonl").read_text().splitlines()
        assert (json.loads(line)["event"], json.loads(line)["reason"]) == ("requeued", reason)


def test_a_script_gets_a_directory(play: Play, capsys: Capture) -> None:
    Path("train.py").write_text("")
    command = ["launch", "--launcher", "slurm", "--nproc-per-node", "2"]
    for number in (0, 1):
        assert cli.main([*command, "train.py", "--lr", "1"]) == 0
        out, err = capsys.readouterr()
        assert out == "7\n" and f"--run-dir was not given; it is runs/train-{number}" in err
        assert f"--job-name=train-{number}\n" in play.submitted
    assert cli.main([*command, "--run-dir", "mine", "-m", "json.tool"]) == 0
    plan = Plan.from_json(json.loads(Path("mine/slurm/submission-0/plan.json").read_text()))
    assert (plan.job.kind, plan.job.target, plan.run_dir) == ("module", "json.tool", Path("mine"))


# ---------------------------------------------------------------------- following it


def outcome(folder: Path, **changes: Any) -> None:
    tree = {"exit_code": 0, "failures": [], "results": [], "report": None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "outcome.json").write_text(json.dumps(tree | changes))


def test_following_a_job_through_a_requeue(play: Play, capsys: Capture) -> None:
    folder = Path.cwd() / "run/slurm/submission-0"
    play.says(
        *play.states("PENDING Reason=Priority Restarts=0", "RUNNING NodeList=n[1-2] Restarts=0"),
        "away",
        *play.states("COMPLETING Restarts=1", "PENDING Reason=BeginTime Restarts=1", "RUNNING NodeList=n3 Restarts=1"),
        *play.states("COMPLETED Restarts=1"),
        last=f"""echo '{{"exit_code": 75, "failures": [], "results": [], "report": null}}' > {folder}/outcome.json""",
    )
    play.program(
        "sbatch",
        f"echo step 1 > {folder}/7_0_log.out; echo oh > {folder}/7_0_log.err; echo no > {folder}/7_1_log.out\n"
        "echo Submitted batch job 7",
    )
    assert run("--wait") == 75
    out, err = capsys.readouterr()
    assert out == "7\n"
    said = [line for line in err.splitlines() if line.startswith("ddpkit: job") or line in ("step 1", "oh", "no")]
    assert sorted(said[:-1], key=lambda line: line.startswith("ddpkit")) == [
        "step 1",
        "oh",
        "ddpkit: job 7 waits to start (Priority)",
        "ddpkit: job 7 runs on n[1-2]",
        "ddpkit: job 7 is requeued, and waits to start again (BeginTime)",
        "ddpkit: job 7 runs again on n3",
    ]
    assert said[-1] == "ddpkit: job 7: stopped on request, state saved; submit it again to continue"
    assert err.count("still trying") == 1


def test_a_requeue_between_two_looks_is_told_of(play: Play, capsys: Capture) -> None:
    folder = Path.cwd() / "run/slurm/submission-0"
    play.says(
        *play.states("RUNNING NodeList=n1 Restarts=0", "RUNNING NodeList=n3 Restarts=1", "COMPLETED Restarts=1"),
        last=f"""echo '{{"exit_code": 0, "failures": [], "results": [], "report": null}}' > {folder}/outcome.json""",
    )
    assert run("--wait") == 0
    assert "ddpkit: job 7 is requeued, and runs again on n3\n" in capsys.readouterr().err


STATE = JobState("RUNNING", "None", 0, True, False, None)


@pytest.mark.parametrize(
    ("state", "exit_code", "words"),
    [
        (None, 1, "Slurm no longer knows job 7"),
        (replace(STATE, state="FAILED", reason="NonZeroExitCode", exit_code=2), 2, "ended as FAILED (NonZeroExitCode)"),
        (replace(STATE, state="FAILED", exit_code=139), 1, "job 7 ended as FAILED and left no word"),
        (replace(STATE, state="NODE_FAIL"), 1, "job 7 ended as NODE_FAIL"),
        (replace(STATE, state="CANCELLED", nodes="n1"), 1, "job 7 ended as CANCELLED"),
        (replace(STATE, state="COMPLETED"), 0, ""),
    ],
)
def test_a_job_that_leaves_no_word(tmp_path: Path, state: JobState | None, exit_code: int, words: str) -> None:
    watch = Watch(Submission("7", tmp_path), late_s=20)
    assert watch.look(STATE, 0.0) is None
    assert watch.look(state, 100.0) is None  # the file may be late, the requeue too
    assert watch.look(state, 119.0) is None
    ended = watch.look(state, 120.0)
    assert ended is not None and ended.exit_code == exit_code and words in (ended.report or "")
    # Had it come back meanwhile, the time would begin again.
    watch = Watch(Submission("7", tmp_path), late_s=20)
    assert [watch.look(each, now) for each, now in ((state, 100.0), (STATE, 110.0), (state, 130.0))] == [None] * 3


def test_a_jobs_own_word_counts(tmp_path: Path) -> None:
    failure = Failure(1, "n2", 0.0, 1, "ValueError", "x")
    outcome(tmp_path, exit_code=1, failures=[failure.to_json()], report="rank 1 failed")
    watch = Watch(Submission("7", tmp_path))
    assert watch.look(STATE, 0.0) is None  # a word of the attempt before, or too early
    for state in (replace(STATE, state="COMPLETING"), replace(STATE, state="FAILED"), None):
        ended = watch.look(state, 0.0)
        assert ended is not None and (ended.exit_code, ended.failures) == (1, (failure,))


@pytest.mark.parametrize(("restarts", "words"), [(0, "before it began"), (1, "while it waited to start again")])
def test_cancelled_in_the_queue(tmp_path: Path, restarts: int, words: str) -> None:
    ended = Watch(Submission("7", tmp_path)).look(replace(STATE, state="CANCELLED", restarts=restarts), 0.0)
    assert ended is not None and ended.exit_code == 75 and words in (ended.report or "")


def test_ctrl_c_leaves_the_job(play: Play, capsys: Capture) -> None:
    play.says(*play.states("PENDING Reason=Priority") * 2, last=f"kill -INT {os.getpid()}")
    before = signal.getsignal(signal.SIGINT)
    assert run("--wait") == 130
    assert signal.getsignal(signal.SIGINT) is before
    err = capsys.readouterr().err
    assert "no longer following; job 7 goes on" in err and "scancel 7" in err


def test_text_that_is_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "log"
    whole = "é ü\n→ x".encode()
    plain, marked = following._Tail(path, ""), following._Tail(path, "[a] ")
    assert plain.read(is_over=False) == ""
    seen = ["", ""]
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        for place, tail in enumerate((plain, marked)):
            seen[place] += tail.read(is_over=end == len(whole))
    assert seen == ["é ü\n→ x", "[a] é ü\n[a] → x\n"]


def test_what_slurm_says_of_an_array(play: Play) -> None:
    lines = [
        "JobId=18 ArrayJobId=18 ArrayTaskId=2-3,5%2 ArrayTaskThrottle=2 JobState=PENDING Reason=Dependency Restarts=0",
        "JobId=20 ArrayJobId=18 ArrayTaskId=1 ArrayTaskThrottle=2 JobState=RUNNING NodeList=n1 Restarts=2",
        "JobId=19 ArrayJobId=18 ArrayTaskId=0 ArrayTaskThrottle=2 JobState=FAILED NodeList=n1 ExitCode=75:0",
    ]
    play.says("\n".join(lines))
    found = slurm.job_states("18")
    assert {index: state.state for index, state in found.items()} == {
        2: "PENDING", 3: "PENDING", 5: "PENDING", 1: "RUNNING", 0: "FAILED",
    }  # fmt: skip
    assert (found[1].nodes, found[1].restarts, found[0].exit_code, found[0].has_ended) == ("n1", 2, 75, True)
    play.says("JobId=18 JobState=PENDING Reason=Priority")
    assert [*slurm.job_states("18")] == [None]
    play.says("forgotten")
    with pytest.raises(slurm.JobForgotten):
        slurm.job_state("18")


# ---------------------------------------------------------------------- sweeps


def test_the_runs_of_a_sweep(tmp_path: Path) -> None:
    path = Shell(tmp_path).config()
    load: Callable[[list[str]], configs.Config] = lambda overrides: configs.load(path, overrides)  # noqa: E731 - the type
    found = sweep.runs(["optimizer.args.lr=[1e-3, 0.1]", "seed=[1, 2]"], load)
    assert [config.run_dir for config in found] == [
        f"run/optimizer.args.lr={lr},seed={seed}" for lr in ("0.001", "0.1") for seed in (1, 2)
    ]
    assert [(config.optimizer.args["lr"], config.seed) for config in found] == [
        (0.001, 1), (0.001, 2), (0.1, 1), (0.1, 2),
    ]  # fmt: skip
    odd = ["a/b", "a b", "%j", "..", "x" * 300, {"k": [1]}, None, "1", 1, "ä"]
    names = [Path(config.run_dir).name for config in sweep.runs([f"model.args.x={json.dumps(odd)}"], load)]
    assert len(set(names)) == len(odd)
    assert all(len(name) < 200 and not set(name) & set("/% \n\\") for name in names)
    values = [config.model.args["x"] for config in sweep.runs([f"model.args.x={json.dumps(odd)}"], load)]
    assert values == odd


@pytest.mark.parametrize(
    ("sweeps", "words"),
    [
        (["seed"], "--sweep seed: expected key.path=[value, value]"),
        (["seed=3"], "--sweep seed=3: expected key.path=[value, value]"),
        (["seed=[]"], "--sweep seed=[]: expected key.path=[value, value]"),
        (["seed=[1, 1]"], "--sweep seed=[1, 1]: a value is there twice"),
        (["seed=[1]", "seed=[2]"], "--sweep seed: given twice"),
        (["launch.nnodes=[1, 2]"], "--sweep launch.nnodes: the runs of a sweep are one array of jobs, all alike"),
        (["run_dir=[a, b]"], "--sweep run_dir: the runs"),
        (["sede=[1]"], "-o sede=1: sede: unknown key"),
        (["seed=[1, x]"], "-o seed=x: seed: expected an integer"),
    ],
)
def test_no_sweeps(tmp_path: Path, sweeps: list[str], words: str) -> None:
    path = Shell(tmp_path).config()
    with pytest.raises(ConfigError) as refused:
        sweep.runs(sweeps, lambda overrides: configs.load(path, overrides))
    assert str(refused.value).startswith(words)


def test_a_sweep_is_one_array(play: Play, capsys: Capture) -> None:
    given = (
        "--sweep",
        "optimizer.args.lr=[0.1, 0.2]",
        "--sweep",
        "seed=[1, 2]",
        "-o",
        "launch.slurm.array_parallelism=3",
    )
    assert run(*given, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "run 0: run/optimizer.args.lr=0.1,seed=1\n" in told and "run 3: run/optimizer.args.lr=0.2,seed=2\n" in told
    assert run(*given) == 0
    assert capsys.readouterr().out == "7\n"
    assert told.split("---\n")[-1].rstrip("\n") == play.submitted.rstrip("\n")
    assert "#SBATCH --array=0-3%3\n" in play.submitted and "%A_%a_%t_log.out" in play.submitted
    folder = Path("run/slurm/submission-0")
    plans = [Plan.from_json(json.loads((folder / f"plan-{index}.json").read_text())) for index in range(4)]
    assert [plan.run_dir for plan in plans] == [Path(plan.job.config["run_dir"]) for plan in plans]
    assert [plan.job.config["seed"] for plan in plans] == [1, 2, 1, 2]
    # Again, while it is there: nothing new. And each of its configs is checked before any is submitted.
    play.says("JobId=7 ArrayJobId=7 ArrayTaskId=0-3%3 JobState=PENDING Reason=Priority")
    assert run(*given) == 0
    assert os.listdir("run/slurm") == ["submission-0"]
    capsys.readouterr()
    assert run("--sweep", "data.global_batch_size=[16, 1]") == 2
    assert "data.global_batch_size: 1 samples cannot be split over 2 ranks" in capsys.readouterr().err
    assert cli.main(["run", "config.yaml", "--sweep", "seed=[1, 2]"]) == 2
    assert "--sweep: an array of runs is for --launcher slurm" in capsys.readouterr().err


def test_a_sweep_is_followed_to_the_end_of_all(play: Play, capsys: Capture) -> None:
    folder = Path.cwd() / "run/slurm/submission-0"
    play.says(
        "JobId=7 ArrayJobId=7 ArrayTaskId=0 JobState=COMPLETED\nJobId=8 ArrayJobId=7 ArrayTaskId=1 JobState=FAILED"
    )
    ends = "\n".join(
        f"""printf 'line\\nlast' > {folder}/7_{index}_0_log.out; echo '{{"exit_code": {code}, "failures": [], """
        f""""results": [], "report": null}}' > {folder}/outcome-{index}.json"""
        for index, code in ((0, 75), (1, 1))
    )
    play.program("sbatch", f"{ends}\necho Submitted batch job 7")
    assert run("--sweep", "seed=[1, 2]", "--wait") == 1
    err = capsys.readouterr().err.splitlines()
    for number in (1, 2):
        assert [line for line in err if line.startswith(f"[seed={number}] l")] == [
            f"[seed={number}] line",
            f"[seed={number}] last",
        ]
    assert "[seed=2] ddpkit: job 7_1: exit code 1" in err


# ---------------------------------------------------------------------- snapshots


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a package, a script and a config, worked in from a folder of it."""
    root = tmp_path / "repository"
    files = {
        "work/pack/__init__.py": "",
        "work/pack/made.py": "def model(): ...\n",
        "work/train.py": "",
        "work/gone.py": "",
        "other/file.py": "def step(): ...\n",
        "other/new.py": "def step(): ...\n",
        "data.bin": "x",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "work/link.py").symlink_to("train.py")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-c", "init.defaultBranch=main"]
    for command in (["init", "-q"], ["add", "work", "other/file.py"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    (root / "work/train.py").write_text("changed")
    (root / "work/gone.py").unlink()
    monkeypatch.chdir(root / "work")
    return root


def plan_for(job: Job) -> Plan:
    return Plan("slurm", 1, 1, None, "warm", "auto", 0, 3, "USR2", {}, {}, job, Path("run"), False, (), snapshot=True)


def test_a_snapshot_has_what_git_knows_as_it_is_now(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    job = Job("script", target="train.py", search_path=(str(repository / "work"),))
    (taken,) = snapshot.take([plan_for(job)], copy)
    found = sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if not path.is_dir())
    assert found == ["other/file.py", "work/link.py", "work/pack/__init__.py", "work/pack/made.py", "work/train.py"]
    assert (copy / "work/train.py").read_text() == "changed" and (copy / "work/link.py").is_symlink()
    assert (taken.job.target, taken.job.search_path) == (str(copy / "work/train.py"), (str(copy / "work"),))


def test_a_config_refers_to_the_copy_and_is_recorded_as_it_was(repository: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "model": {"factory": "pack.made:model", "args": {"inner": {"ref": "../other/file.py:step"}}},
        "train": {"step": "../other/file.py:step", "max_steps": 1},
        "data": {"train": {"factory": "pack.made:model"}, "global_batch_size": 1},
    }
    Shell(tmp_path).config(**changes)
    config = configs.load(tmp_path / "config.yaml")
    job = Job("run", configs.to_tree(config), search_path=(str(repository / "work"),))
    (taken,) = snapshot.take([plan_for(job)], tmp_path / "copy")
    moved = configs.from_tree(taken.job.config)
    assert moved.train.step == f"{tmp_path}/copy/other/file.py:step"
    assert moved.model.args["inner"] == {"ref": moved.train.step}
    assert moved.model.factory == "pack.made:model" and moved.run_dir == "run"
    assert taken.job.options["config"] == configs.dump(config)
    assert submission.covers.__doc__ and submission._essence(taken) == submission._essence(plan_for(job))


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (Job("script", target="../other/new.py"), "../other/new.py is not among the files that git knows"),
        (Job("script", target="/usr/bin/env"), "/usr/bin/env is not among the files that git knows"),
        (Job("module", target="late.main"), "the module late is not among the files that git knows"),
    ],
)
def test_what_git_does_not_know_is_refused(repository: Path, tmp_path: Path, job: Job, words: str) -> None:
    (repository / "work/late").mkdir()
    (repository / "work/late/main.py").write_text("")
    with pytest.raises(UserError, match=f"launch.snapshot: {words}"):
        snapshot.take([plan_for(replace(job, search_path=(str(repository / "work"),)))], tmp_path / "copy")


@pytest.mark.parametrize("step", ["late:step", "../other/new.py:step"])
def test_a_config_that_git_does_not_know(repository: Path, tmp_path: Path, step: str) -> None:
    (repository / "work/late.py").write_text("def step(): ...\n")
    Shell(tmp_path).config(
        train={"step": step, "max_steps": 1}, data={"train": {"factory": "pack.made:model"}, "global_batch_size": 1}
    )
    job = Job("run", configs.to_tree(configs.load(tmp_path / "config.yaml")), search_path=(str(repository / "work"),))
    with pytest.raises(UserError, match=r"(?s)launch.snapshot: .*train\.step: ") as refused:
        snapshot.take([plan_for(job)], tmp_path / "copy")
    assert "git" in str(refused.value)


def test_no_repository_no_snapshot(play: Play, capsys: Capture) -> None:
    assert run("-o", "launch.snapshot=true") == 2
    assert "is in no git repository" in capsys.readouterr().err
    assert not Path("run").exists()


# ---------------------------------------------------------------------- functions


def add(first: int, second: int = 1) -> int:
    return first + second


class Odd(Exception):
    """Of a user's."""


def test_a_function_as_a_job(play: Play) -> None:
    import base64

    import cloudpickle

    job = calls.slurm(add, 3, nodes=2, nproc_per_node=2, kwargs={"second": 4}, partition="gpu", timeout_min=3)
    assert (job.job_id, job.folder) == ("7", Path.cwd() / "runs/add-0/slurm/submission-0")
    assert "--partition=gpu" in play.submitted and "--time=3" in play.submitted and "--nodes=2" in play.submitted
    plan = Plan.from_json(json.loads((job.folder / "plan.json").read_text()))
    function, args, kwargs = cloudpickle.loads(plan.job.call)
    assert function(*args, **kwargs) == 7 and (plan.nproc, plan.nnodes) == (2, 2)
    assert (job.done(), job.state, job.stdout(), job.stderr()) == (False, "PENDING", None, None)
    (job.folder / "7_0_log.out").write_text("hello\n")
    results = [base64.b64encode(cloudpickle.dumps(value)).decode() for value in (7, 8)]
    outcome(job.folder, results=[*results, ""])
    assert (job.result(), job.results(), job.exception(), job.stdout()) == (7, [7, 8, None], None, "hello\n")
    assert job.state == "COMPLETED"


def test_the_error_of_a_function_as_a_job(play: Play) -> None:
    job = calls.slurm(add, 3, nproc_per_node=1, folder="here")
    assert job.folder == Path.cwd() / "here/slurm/submission-0"
    failure = Failure(1, "n2", 0.0, 1, "Odd", "mine", exception=carried(Odd("mine")))
    outcome(job.folder, exit_code=1, failures=[failure.to_json()], report="rank 1 on n2 failed: Odd: mine")
    with pytest.raises(Odd, match="mine") as raised:
        job.result()
    assert isinstance(raised.value.__cause__, calls.RankError) and "rank 1 on n2" in str(raised.value.__cause__)
    assert isinstance(job.exception(), Odd) and job.state == "FAILED"
    outcome(job.folder, exit_code=75)
    other = calls.slurm(add, 3, nproc_per_node=1)
    outcome(other.folder, exit_code=75)
    with pytest.raises(calls.RankError, match="exit code 75 and returned nothing"):
        other.results()


def test_options_of_a_function_as_a_job_are_checked(play: Play) -> None:
    with pytest.raises(UserError, match=r"launch.slurm.partiton: unknown key; did you mean 'partition'"):
        calls.slurm(add, 3, nproc_per_node=1, partiton="x")
    with pytest.raises(UserError, match=r"launch.slurm.second: unknown key"):
        calls.slurm(add, 3, nproc_per_node=1, second=4)
    with pytest.raises(UserError, match=r"launch.nnodes: expected an integer"):
        calls.slurm(add, 3, nodes="2", nproc_per_node=1)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(UserError, match=r"launch.slurm.partition: .* is no YAML value"):
        calls.slurm(add, 3, nproc_per_node=1, partition=Path("x"))
    assert not Path("runs").exists() and shutil.which("sbatch") == str(play.programs / "sbatch")
