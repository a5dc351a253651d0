"""The launchers of several nodes, on this one: tasks with the variables of a Slurm step, and an scontrol of the test's.

Ranks are spawned and import no torch: what is looked at here is who leads, who follows, and what they tell each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

import launch
from ddpkit import config as configs
from ddpkit import rendezvous
from ddpkit.errors import UserError
from launch import members, plan
from launch.job import Failure, Job
from launch.members import LeadingNode, Membership
from launch.output import Output
from launch.ranks import Outcome, Place
from launch.supervise import LaunchFailed
from tests.launch.shell import Shell, finish, wait_for

CHILD = Path(launch.__file__).with_name("child.py")
SCONTROL = """#!/bin/sh
echo "$*" >> asked
echo "JobId=7 JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1 PreemptTime=None EndTime=Unknown"
"""
WAITS = "open('here-' + os.environ['RANK'], 'w'); time.sleep(1000)"


class Tasks:
    """Two nodes with a task and a rank each, that run a script."""

    def __init__(self, shell: Shell, script: str) -> None:
        self.shell = shell
        shell.script("bin/scontrol", SCONTROL).chmod(0o755)
        shell.script("script.py", f"import os, sys, time\n{script}\n")
        self.submit("submission")

    def submit(self, folder: str, **changes: Any) -> None:
        """Write a plan, as `launch.submission` does."""
        section: dict[str, Any] = {"launcher": "slurm", "nnodes": 2, "nproc_per_node": 1, "start_method": "spawn"}
        job = Job("script", target="script.py", search_path=(str(self.shell.cwd),))
        settings = configs.launch_section(section | {"backend": "gloo"} | changes)
        made = plan.make(settings, job, run_dir=Path("run"), tee_all=False, command=("ddpkit",))
        self.shell.script(f"{folder}/plan.json", json.dumps(made.to_json()))

    def start(self, place: int, folder: str = "submission") -> subprocess.Popen[bytes]:
        step = {
            "PATH": f"{self.shell.cwd / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "MASTER_ADDR": "127.0.0.1",
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
            "SLURM_CLUSTER_NAME": str(self.shell.cwd),  # the tasks meet by it: no other test's
            "SLURM_PROCID": str(place),
            "SLURM_LOCALID": "0",
        }
        return self.shell.start("task", folder, prefix=(sys.executable, str(CHILD)), env=step)

    def both(self) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
        return self.start(0), self.start(1)

    def wait_for_ranks(self) -> None:
        wait_for(lambda: all((self.shell.cwd / f"here-{rank}").exists() for rank in range(2)), "the ranks")

    def outcome(self) -> dict[str, Any]:
        return dict(json.loads((self.shell.cwd / "submission/outcome.json").read_text()))


def test_a_failure_on_another_node_is_one_report_of_the_leaders(shell: Shell) -> None:
    tasks = Tasks(shell, "if os.environ['RANK'] == '1': raise KeyError('of rank 1')\ntime.sleep(1000)")
    leader, follower = tasks.both()
    led, followed = finish(leader), finish(follower)
    assert (led.returncode, followed.returncode) == (1, 0)
    assert followed.stderr == ""
    assert led.stderr.count("rank 1 on") == led.stderr.count("Traceback") == 1
    assert "KeyError: 'of rank 1'" in led.stderr and "then rank 0: ended by the launcher" in led.stderr
    outcome = tasks.outcome()
    assert outcome["exit_code"] == 1 and outcome["failures"][0]["rank"] == 1
    assert "KeyError" in (shell.cwd / "run/logs/attempt-0/rank-1.log").read_text()


def _holds(process: subprocess.Popen[bytes], number: int) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    held = int(next(line for line in status.splitlines() if line.startswith("SigBlk:")).split()[1], 16)
    return bool(held & 1 << (number - 1))


def test_a_stop_signal_as_early_as_can_be_does_not_end_a_task_without_a_word(shell: Shell) -> None:
    """A job that is preempted while its tasks start would otherwise have failed for Slurm, and not come back."""
    tasks = Tasks(shell, WAITS)
    leader, follower = tasks.both()
    for task in (leader, follower):
        wait_for(lambda task=task: _holds(task, signal.SIGTERM), "it holds them back")  # type: ignore[misc]  # a default binds it now
        task.send_signal(signal.SIGTERM)
    led, followed = finish(leader), finish(follower)
    assert led.returncode == 1 and followed.returncode in (0, 1), followed.stderr  # it may not have found the leader
    assert led.stderr.endswith("ddpkit: ended by SIGTERM\n")
    assert tasks.outcome()["exit_code"] == 1
    assert "requeue" not in (shell.cwd / "asked").read_text()  # Slurm says that the job goes on: a person's signal


def _node_process(task: subprocess.Popen[bytes]) -> psutil.Process:
    (node,) = psutil.Process(task.pid).children()
    return node


def test_a_node_process_of_a_follower_that_is_killed_is_named(shell: Shell) -> None:
    tasks = Tasks(shell, WAITS)
    leader, follower = tasks.both()
    tasks.wait_for_ranks()
    node = _node_process(follower)
    node.kill()
    led, followed = finish(leader), finish(follower)
    assert (led.returncode, followed.returncode) == (1, 1)
    words = f"{socket.gethostname()}: the process that starts the ranks (pid {node.pid}) ended with SIGKILL"
    assert led.stderr.startswith(f"ddpkit: {words}")
    assert tasks.outcome()["report"].startswith(words)


def test_a_leader_that_is_killed_takes_the_others_along(shell: Shell) -> None:
    tasks = Tasks(shell, WAITS)
    leader, follower = tasks.both()
    tasks.wait_for_ranks()
    leader.kill()
    assert finish(leader).returncode == -signal.SIGKILL
    followed = finish(follower)
    assert followed.returncode == 1 and "rank 0's launcher at 127.0.0.1 cannot be reached" in followed.stderr


@pytest.mark.slow
def test_tasks_that_see_different_plans(shell: Shell) -> None:
    tasks = Tasks(shell, WAITS)
    tasks.submit("older", max_restarts=1)
    leader, follower = tasks.start(0), tasks.start(1, "older")
    led = finish(leader)
    assert led.returncode == 2 and "has found another plan in the submission's folder" in led.stderr
    assert finish(follower).returncode == 1


# ---------------------------------------------------------------------- the leader alone, and what it is told


MEETING = f"launchers of a test of process {os.getpid()}"


@contextlib.contextmanager
def _leader(gpus: int | None = None, count: int = 2) -> Iterator[LeadingNode]:
    """With one rank of its own."""
    with rendezvous.meeting_point("127.0.0.1", MEETING) as listener:
        me = Membership(place=0, count=count, meeting=MEETING, token="the plan", gpus=gpus)
        node = LeadingNode(1, "spawn", {}, Place(0, count, 0, 1), me, listener)
        with node:
            yield node


def _ends(node: LeadingNode, begun: Path | None = None) -> Outcome:
    """With nothing to do for its own rank, but to leave a file that it was there."""
    work: Any = (lambda: None, (), {}) if begun is None else (Path.touch, (begun,), {})
    job = Job("call", call=cloudpickle.dumps(work), options={"attempt": 0})
    return node.run(job, 0, Output(None, tee_all=False))


class Follower:
    """What the leader knows of one."""

    def __init__(
        self, place: int, gpus: int | None = None, ahead_s: float = 0.0, host: str = "other", **at_once: Any
    ) -> None:
        port = rendezvous.find("127.0.0.1", MEETING, 10)
        self._connection = socket.create_connection(("127.0.0.1", port))
        self._ahead_s = ahead_s
        self._rank = place
        hello = {"token": "the plan", "place": place, "host": host, "gpus": gpus, "ranks": [place, place + 1]}
        self._send(hello, *([{"now": time.monotonic(), **at_once}] if at_once else []))

    def send(self, **message: Any) -> None:
        self._send(message)

    def _send(self, *messages: dict[str, Any]) -> None:
        self._connection.sendall(b"".join(json.dumps(message).encode() + b"\n" for message in messages))

    def fails(self, begun: Path, when: float, took_s: float, is_consequence: bool = False) -> None:
        """Once it is started: tell of a failure in a message that has been under way for so long, and of the end."""
        self._await_start(begun)
        words = f"of {self._rank}"
        failure = Failure(self._rank, "other", when + self._ahead_s, 1, message=words, is_consequence=is_consequence)
        self.send(now=time.monotonic() + self._ahead_s - took_s, failures=[failure.to_json()])
        self.send(now=time.monotonic() + self._ahead_s, left=[], stopped=False, results=[""])

    def _await_start(self, begun: Path) -> None:
        """Wait for it here and, for its rank, at the leader, which would otherwise end that one with the failed."""
        assert b'"start"' in self._connection.recv(4096)
        wait_for(begun.exists, "the work of the leader's rank")

    def leaves(self, begun: Path, when: float) -> None:
        """Once it is started: tell of the end of a rank that has no complaint."""
        self._await_start(begun)
        left = Failure(self._rank, "other", when + self._ahead_s, 0, message=f"{self._rank} left")
        self.send(now=time.monotonic() + self._ahead_s, left=[left.to_json()], stopped=False, results=[""])


def test_nodes_with_different_numbers_of_gpus() -> None:
    with _leader(gpus=4) as node:
        follower = Follower(1, gpus=2, host="small")
        with pytest.raises(UserError, match=f"different numbers of GPUs: {socket.gethostname()} 4, small 2. Every"):
            _ends(node)
    del follower


def test_a_task_that_is_to_stop_as_soon_as_it_has_come() -> None:
    with _leader() as node:
        follower = Follower(1, requested=int(signal.SIGTERM))
        outcome = _ends(node)
    assert (outcome.stopped_by, outcome.failures) == ("SIGTERM", ())
    del follower


def test_a_task_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_GATHER_S", 3.0)
    with _leader(count=3) as node:
        follower = Follower(1)
        with pytest.raises(LaunchFailed, match=r"1 of 3 tasks have not come within 3 s: 2\. .*srun ddpkit doctor"):
            _ends(node)
    del follower


def test_failures_are_put_in_order_by_clocks_that_know_nothing_of_each_other(tmp_path: Path) -> None:
    with _leader(count=3) as node:
        followers = Follower(1, ahead_s=5000.0), Follower(2, ahead_s=-3000.0)
        began = time.monotonic()
        threads = [
            threading.Thread(target=follower.fails, args=(tmp_path / "begun", when, took_s))
            for follower, when, took_s in zip(followers, (began - 50.0, began - 60.0), (0.0, 300.0), strict=True)
        ]
        for thread in threads:
            thread.start()
        outcome = _ends(node, tmp_path / "begun")
        for thread in threads:
            thread.join()
    assert [failure.rank for failure in outcome.failures] == [2, 1]
    assert outcome.failures[0].when == pytest.approx(began - 60.0, abs=9.0)


@pytest.mark.parametrize("left_before_s", [20.0, 5.0])
def test_a_rank_elsewhere_that_left_is_the_cause_if_others_fail_by_that_afterwards(
    tmp_path: Path, left_before_s: float
) -> None:
    begun = tmp_path / "begun"
    with _leader(count=3) as node:
        one, other = Follower(1, ahead_s=5000.0), Follower(2, ahead_s=-3000.0)
        began = time.monotonic()
        threads = [
            threading.Thread(target=one.fails, args=(begun, began - 10.0, 0.0, True)),
            threading.Thread(target=other.leaves, args=(begun, began - left_before_s)),
        ]
        for thread in threads:
            thread.start()
        outcome = _ends(node, begun)
        for thread in threads:
            thread.join()
    left_first = left_before_s > 10.0
    assert [failure.rank for failure in outcome.failures] == ([2, 1] if left_first else [1])
