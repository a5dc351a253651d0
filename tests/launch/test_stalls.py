"""A rank that is stopped or dead-locked while the others wait: named, with what it is at, and ended."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from tests.launch.shell import Shell, finish, wait_for
from tests.ports import free_port

STEPS = """
import os, signal, sys, threading, time, torch, ddpkit
what, attempt = sys.argv[1], os.environ["TORCHELASTIC_RESTART_COUNT"]
lock = threading.Lock()

def get_stuck():
    lock.acquire()
    lock.acquire()  # for ever

# The imports of ranks that no launcher has started may be further apart than what is a stall.
open(f"here-{os.environ['RANK']}", "w").close()
while not all(os.path.exists(f"here-{rank}") for rank in range(int(os.environ["WORLD_SIZE"]))):
    time.sleep(0.01)
with ddpkit.runtime(stall_timeout_s=10 if what == "alone" else 3, timeout_s=300) as rt:
    if what == "slow":
        with rt.main_first():
            if rt.is_main:
                time.sleep(9)
    model = rt.wrap(torch.nn.Linear(2, 1))
    for step in range(8):
        if step == 4 and rt.rank == 1 and attempt == "0":
            if what == "lock":
                get_stuck()
            if what == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if what == "alone":
                time.sleep(5)
        model(torch.ones(1, 2)).sum().backward()
    print("done", rt.rank, flush=True)
"""


def _start(shell: Shell, what: str, *options: str) -> Any:
    shell.script("steps.py", STEPS)
    return shell.start("launch", *options, "--nproc-per-node", "3", "--run-dir", "kept", "steps.py", what)


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_ended(shell: Shell) -> None:
    done = finish(_start(shell, "stop"))
    assert done.returncode == 1
    assert "no progress for" in done.stderr and "(launch.stall_timeout_s)" in done.stderr
    assert "rank 1 gives no answer: it is stopped (SIGSTOP)" in done.stderr
    assert "rank 0 waits for a collective" in done.stderr and "rank 2 waits for a collective" in done.stderr
    assert f"ddpkit: rank 1 on {socket.gethostname()} failed: Stalled" in done.stderr
    failure = json.loads((shell.cwd / "kept/failure.json").read_text())
    assert (
        (failure["rank"], failure["kind"]) == (1, "Stalled")
        and failure["log"].endswith("rank-1.log")
        and "Traceback" not in done.stderr
    )


@pytest.mark.slow
def test_a_dead_lock_is_shown_with_its_stack(shell: Shell) -> None:
    done = finish(_start(shell, "lock"))
    assert done.returncode == 1
    assert "rank 1 (starting, 0 steps done) has done nothing" in done.stderr
    assert 'rank 1, Python stack:\n  File "' + str(shell.cwd / "steps.py") in done.stderr
    assert "in get_stuck" in done.stderr and "lock.acquire()  # for ever" in done.stderr
    assert "rank 0, Python stack" not in done.stderr


STUCK = """
import sys, threading, torch, ddpkit, ddpkit.stall
ddpkit.stall._STOPPING_S = 3.0
lock = threading.Lock()

def get_stuck(rank):
    lock.acquire()
    open(f"here-{rank}", "w").close()
    lock.acquire()  # for ever

with ddpkit.runtime(stall_timeout_s=1) as rt:
    if rt.rank in map(int, sys.argv[1:]):
        get_stuck(rt.rank)
    torch.distributed.all_reduce(torch.ones(1))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stuck", [("1",), ("0", "1"), ("0",)], ids=["one of two", "both", "alone"])
def test_one_signal_ends_a_script_that_is_stuck(shell: Shell, stuck: tuple[str, ...]) -> None:
    shell.script("stuck.py", STUCK)
    ranks = "1" if stuck == ("0",) else "2"
    # Which counts instead of what the script says itself.
    options = ("-o", "launch.stall_timeout_s=500", "--nproc-per-node", ranks, "--run-dir", "kept")
    child = shell.start("launch", *options, "stuck.py", *stuck)
    wait_for(lambda: all((shell.cwd / f"here-{rank}").exists() for rank in stuck), "the dead lock")
    child.terminate()
    done = finish(child)
    assert done.returncode == 1
    assert re.search(r"failed: Stalled: no progress for \d+ s \(asked to stop\)", done.stderr)
    for rank in stuck:
        assert f"rank {rank}, Python stack:" in done.stderr
    assert done.stderr.count("lock.acquire()  # for ever") >= 1 and "of no effect" not in done.stderr


@pytest.mark.slow
def test_a_stall_is_restarted_as_any_failure_is(shell: Shell) -> None:
    done = finish(_start(shell, "stop", "-o", "launch.max_restarts=1"))
    assert done.returncode == 0, done.stderr
    assert "rank 1 gives no answer: it is stopped" in done.stderr and "restarting all ranks" in done.stderr
    assert done.stdout.count("done") >= 1


@pytest.mark.slow
@pytest.mark.parametrize("what", ["slow", "alone"])
def test_work_that_others_wait_for_is_no_stall(shell: Shell, what: str) -> None:
    done = finish(_start(shell, what))
    assert done.returncode == 0, done.stderr
    assert "Stalled" not in done.stderr


@pytest.mark.slow
def test_without_a_launcher_a_dead_locked_rank_ends_too(shell: Shell) -> None:
    # As under srun, where nobody ends the others: rank 0 serves the store, and finds the stall.
    shell.script("steps.py", STEPS)
    world = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    ranks = []
    for rank in ("0", "1"):
        env = world | {"RANK": rank, "LOCAL_RANK": rank}
        ranks.append(shell.start("steps.py", "lock", prefix=(sys.executable,), env=env))
    first, second = (finish(rank) for rank in ranks)
    assert (first.returncode, second.returncode) == (1, 1)
    assert "ddpkit.errors.Stalled: no progress for" in first.stderr and "in get_stuck" in first.stderr
    assert "rank 0 has found that the run is stalled" in second.stderr


@pytest.mark.slow
def test_a_suspended_job_goes_on_as_if_nothing_had_happened(shell: Shell) -> None:
    shell.config(
        launch={"nproc_per_node": 2, "stall_timeout_s": 5.0},
        train={"step": "tests.toy:slow_step", "eval_step": "tests.toy:eval_step", "epochs": 60},
    )
    child = shell.start("run", "config.yaml", stderr=subprocess.STDOUT)
    wait_for(lambda: (shell.cwd / "run/metrics.jsonl").exists(), "steps")
    launcher = psutil.Process(child.pid)
    family = [launcher, *launcher.children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGSTOP)
    wait_for(lambda: all(process.status() == psutil.STATUS_STOPPED for process in family), "the suspension")
    time.sleep(8)  # longer than any rank may do nothing
    for process in family:
        process.send_signal(signal.SIGCONT)
    done = finish(child)
    assert done.returncode == 0, done.stdout
    assert "no progress" not in done.stdout
