"""The kernel ends a rank, or its loader worker, because memory ran out: in a real cgroup with a limit."""

from __future__ import annotations

import contextlib
import json
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.memory import own_groups
from tests.launch.shell import Shell, wait_for

MIB = 2**20
LIMIT = 900 * MIB

GREEDY = """
import os, sys, time, torch
from torch.utils.data import DataLoader, Dataset

def eat():
    held = [b"x" * 2**26]
    time.sleep(3)  # what is held is looked at about once a second, and this is to be seen
    while True:
        held.append(b"x" * 2**23)
        time.sleep(0.01)

class Data(Dataset):
    def __len__(self): return 8
    def __getitem__(self, item): return eat()

if os.environ["RANK"] == "1":
    if sys.argv[1] == "rank":
        eat()
    for _ in DataLoader(Data(), num_workers=1):
        pass
time.sleep(1000)
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory cgroup with a limit of its own; afterwards it is gone."""
    groups = own_groups()
    if not groups:
        pytest.skip("needs a memory cgroup, and no cgroup file system with one is mounted")
    made = groups[-1].directory / f"ddpkit-{uuid.uuid4().hex[:8]}"
    try:
        made.mkdir()
        (made / ("memory.max" if groups[0].version == 2 else "memory.limit_in_bytes")).write_text(str(LIMIT))
        for name in ("memory.swap.max", "memory.memsw.limit_in_bytes"):  # or it would go to the disk instead
            with contextlib.suppress(OSError):
                (made / name).write_text("0" if "max" in name else str(LIMIT))
    except OSError as error:
        with contextlib.suppress(OSError):
            made.rmdir()
        pytest.skip(f"needs a memory cgroup with a limit, and none can be made in {made.parent}: {error}")
    try:
        yield made
    finally:
        wait_for(lambda: not (made / "cgroup.procs").read_text(), "the end of all processes in the cgroup")
        made.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "worker"])
@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_a_kill_for_lack_of_memory_is_recognised(shell: Shell, group: Path, launcher: str, victim: str) -> None:
    shell.script("greedy.py", GREEDY)
    enter = ("sh", "-c", 'echo $$ > "$0"/cgroup.procs; exec "$@"', str(group), sys.executable, "-m", "ddpkit")
    done = shell.run(
        *("launch", "--launcher", launcher, "--nproc-per-node", "2", "--run-dir", "kept", "greedy.py", victim),
        prefix=enter,
    )
    assert done.returncode == 1
    kept = json.loads((shell.cwd / "kept/failure.json").read_text())
    assert kept["rank"] == 1
    how = "SIGKILL" if victim == "rank" else r"was ended by SIGKILL"
    assert f"{how}: the kernel ended it because memory ran out. " in kept["message"]
    assert kept["message"] in done.stderr and done.stderr.count("memory ran out") == 1
    assert f"the limit of cgroup /{group.name} is 900 MiB" in kept["message"]
    memory = kept["memory"]
    assert memory["ran_out"] is True and memory["limit"] == LIMIT
    eaten = memory["held"] if victim == "rank" else memory["held_by_children"]
    assert 64 * MIB < eaten <= LIMIT, memory
    if victim == "worker":
        assert memory["children"] == 1


@pytest.mark.slow
def test_a_kill_while_there_is_enough_memory_is_not_taken_for_one(shell: Shell, group: Path) -> None:
    shell.script("killed.py", "import os; os.kill(os.getpid(), 9)")
    enter = ("sh", "-c", 'echo $$ > "$0"/cgroup.procs; exec "$@"', str(group), sys.executable, "-m", "ddpkit")
    done = shell.run("launch", "-o", "launch.start_method=spawn", "--nproc-per-node", "1", "killed.py", prefix=enter)
    assert "rank 0 on" in done.stderr and "SIGKILL (killed from outside: by a person or another process)" in done.stderr
