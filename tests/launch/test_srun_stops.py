"""Ranks that Slurm has started, without a Slurm: the variables of a step, and an scontrol of the test's own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import Counter
from typing import Any

import psutil
import pytest

from tests.launch.shell import Shell, finish, wait_for
from tests.resume.runs import events

pytestmark = pytest.mark.slow

SCONTROL = """#!/bin/sh
echo "$*" >> {asked}
[ "$1" != show ] || cat {state}
"""
RUNNING = "JobId=7 JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1 PreemptTime=None EndTime=Unknown\n"


class Step:
    """A step of two tasks, each `ddpkit run --launcher inline`."""

    def __init__(self, shell: Shell, **config: Any) -> None:
        self.shell = shell
        self.asked, self.state = shell.cwd / "asked", shell.cwd / "state"
        self.asked.touch()
        self.state.write_text(RUNNING)
        scontrol = shell.script("bin/scontrol", SCONTROL.format(asked=self.asked, state=self.state))
        scontrol.chmod(0o755)
        (shell.cwd / "ledger").mkdir()
        shell.config(**config)

    def start(self, restarts: int = 0, **variables: str) -> list[Any]:
        job = (
            variables
            | {
                "PATH": f"{self.shell.cwd / 'bin'}{os.pathsep}{os.environ['PATH']}",
                "TOY_LEDGER": str(self.shell.cwd / "ledger"),
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURM_CLUSTER_NAME": str(self.shell.cwd),  # the ranks meet by it: no other test's
            }
            | ({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {})
        )
        command = ("run", "config.yaml", "--launcher", "inline")
        return [
            self.shell.start(*command, env=job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
            for rank in range(2)
        ]

    def signal_all(self, number: int) -> None:
        """As Slurm does: every process of the step."""
        for process in self.shell.survivors():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has stopped already
                process.send_signal(number)

    def events(self, name: str) -> list[dict[str, Any]]:
        return events(self.shell.cwd / "run", name)

    def asked_for(self, verb: str) -> int:
        return sum(line.startswith(verb) for line in self.asked.read_text().splitlines())

    def steps(self) -> int:
        metrics = self.shell.cwd / "run/metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def _config(dataset: str = "tests.toy:dataset", workers: int = 1, **train: Any) -> dict[str, Any]:
    return {
        "data": {
            "train": {"factory": dataset, "args": {"delay_s": 0.002}},
            "global_batch_size": 16,
            "loader": {"num_workers": workers},
        },
        "train": {"step": "tests.toy:ledger_step", "epochs": 40} | train,
        "log_every": 1,
        "checkpoint": {"every_steps": 2},
        "launch": {"backend": "gloo"},
    }


def _codes(ranks: list[Any]) -> list[int]:
    done = [finish(rank) for rank in ranks]
    assert all("Traceback" not in each.stderr for each in done), done
    return [each.returncode for each in done]


def _saw_each_sample_once_an_epoch(step: Step, epochs: int) -> bool:
    lines = [path.read_text() for path in (step.shell.cwd / "ledger").iterdir()]
    return Counter(" ".join(lines).split()) == {str(index): epochs for index in range(96)}


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_the_warning_to_every_process_of_the_step_is_one_stop(shell: Shell, start: str) -> None:
    step = Step(shell, **_config("tests.toy:spawning_dataset" if start == "spawn" else "tests.toy:dataset"))
    ranks = step.start()
    if start == "fork":
        wait_for(lambda: step.steps() > 5, "steps")
    else:  # in the middle of the imports of the workers: each rank has one, and a resource tracker
        wait_for(lambda: all(len(psutil.Process(rank.pid).children()) >= 2 for rank in ranks), "workers", within_s=60)
    step.signal_all(signal.SIGUSR2)
    step.signal_all(signal.SIGTERM)
    assert _codes(ranks) == [75, 75]
    [stopped] = step.events("stopped")
    assert stopped["reason"] in ("SIGUSR2", "SIGTERM")
    # Time limit or not: SIGTERM alone could be anybody's.
    assert step.asked_for("requeue 7") == (stopped["reason"] == "SIGUSR2")
    assert _codes(step.start(restarts=1)) == [0, 0]
    assert _saw_each_sample_once_an_epoch(step, epochs=40)


def test_a_job_that_is_warned_comes_back_until_it_gets_nowhere(shell: Shell) -> None:
    step = Step(shell, **_config(workers=0, step="tests.toy:slow_step", epochs=200))
    (shell.cwd / "run").mkdir()
    for times, codes in ((2, [75, 75]), (3, [1, 1])):
        # As if it had come back so often, from further on than it now gets.
        event = {"event": "requeued", "attempt": 0, "step": 10**6, "reason": "time limit"}
        (shell.cwd / "run/events.jsonl").write_text(times * (json.dumps(event) + "\n"))
        ranks = step.start()
        wait_for(lambda: step.events("saved" if times == 2 else "restored"), "the run")  # noqa: B023 - called at once
        ranks[1].send_signal(signal.SIGUSR2)
        done = [finish(rank) for rank in ranks]
        assert [each.returncode for each in done] == codes, done
    assert step.asked_for("requeue 7") == 1
    assert "job 7 does not come back (time limit): it has done so 3 times in a row" in done[0].stderr
    assert [event["step"] for event in step.events("requeued")] == [10**6] * 3


def test_a_stop_that_is_nobody_s_but_the_user_s_is_no_requeue(shell: Shell) -> None:
    step = Step(shell, **_config(workers=0, epochs=200))
    ranks = step.start()
    wait_for(lambda: step.steps() > 1, "steps")
    step.state.write_text(RUNNING.replace("RUNNING", "COMPLETING"))  # scancel
    step.signal_all(signal.SIGTERM)
    assert _codes(ranks) == [75, 75]
    assert step.asked_for("show job") >= 1 and step.asked_for("requeue") == 0
    assert list((shell.cwd / "run/checkpoints").glob("step-*"))


def test_a_job_with_a_stuck_rank_comes_back_from_its_last_checkpoint(shell: Shell) -> None:
    step = Step(shell, **_config(workers=0, step="tests.toy:slow_step", epochs=200))
    ends = time.time() + 50
    step.state.write_text(RUNNING.replace("Unknown", time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(ends))))
    ranks = step.start(SLURM_JOB_END_TIME=str(int(ends)))
    wait_for(lambda: step.steps() > 2 and step.events("saved"), "a save")
    ranks[1].send_signal(signal.SIGSTOP)
    wait_for(lambda: step.asked_for("requeue 7"), "the requeue", within_s=90)
    [requeued] = step.events("requeued")
    # Not the newest event: a save that the rank was stopped in may be complete without anybody having told of it.
    newest = max(int(path.name.partition("-")[2]) for path in (shell.cwd / "run/checkpoints").glob("step-*"))
    assert requeued["reason"] == "time limit" and requeued["step"] == newest > 0
    for rank in ranks:
        rank.kill()
    first, _ = (finish(rank) for rank in ranks)
    assert "rank 1 gives no answer: it is stopped (SIGSTOP)" in first.stderr
    assert step.events("stopped") == []
