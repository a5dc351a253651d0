"""A rank whose others do not come, started by nobody of ours: it ends when it is asked to, and says who is missing."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.shell import Shell, finish, wait_for
from tests.ports import free_port

SCRIPT = """
import ddpkit
with ddpkit.runtime(stall_timeout_s={stall_s}, timeout_s=120):
    print("together")
"""


def _alone(shell: Shell, rank: int, stall_s: float) -> subprocess.Popen[bytes]:
    """One rank of two, once it waits for the other."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    who = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    child = shell.start(
        shell.script("script.py", SCRIPT.format(stall_s=stall_s)),
        prefix=(sys.executable,),
        env={name: str(value) for name, value in who.items()} | meeting,
    )
    wait_for(lambda: _handles(child.pid, signal.SIGTERM), "the beginning of the wait")
    return child


def _handles(pid: int, number: signal.Signals) -> bool:
    found = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_signal_ends_a_rank_that_waits_for_the_others_to_start(shell: Shell, rank: int) -> None:
    child = _alone(shell, rank, stall_s=100)
    child.send_signal(signal.SIGTERM)
    done = finish(child)
    assert done.returncode == 75 and "together" not in done.stdout
    assert f"rank {rank} was stopped (SIGTERM) while it waited for other ranks to start" in done.stderr


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (0, r"have not come together for 2 s \(stall_timeout_s\): rank 1 did not come"),
        (1, r"have not come together for 2 s \(stall_timeout_s\): rank 0 cannot be reached at 127\.0\.0\.1:\d+"),
    ],
)
def test_a_rank_that_waits_too_long_says_who_is_missing(shell: Shell, rank: int, words: str) -> None:
    done = finish(_alone(shell, rank, stall_s=2))
    assert done.returncode == 1 and re.search(words, done.stderr), done.stderr
