"""After any end nothing is left: no process, no shared memory, no semaphore, no socket, no temporary file."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch.shell import Shell, finish, wait_for

# Rank 0 has a bit of everything, and rank 1 fails if it is to. All that has a name is noted in a file.
HOARD = """
import multiprocessing, os, signal, subprocess, sys, time
from multiprocessing import shared_memory
import torch
from torch.utils.data import DataLoader, Dataset

class Data(Dataset):
    def __len__(self): return 1000
    def __getitem__(self, item): return torch.zeros(1000) + item

def daemon():
    # A daemon by the book: two forks, and a session of its own in between.
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", "1000"])
        os._exit(0)

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1})
    open("pid-" + os.environ["RANK"], "w").write(str(os.getpid()))
    if os.environ["RANK"] == "1":
        while not os.path.exists("ready"): time.sleep(0.01)
        if sys.argv[1] == "raise": raise ValueError("the cause")
        if sys.argv[1] == "done": sys.exit()
        time.sleep(1000)
    names = []
    context = multiprocessing.get_context("spawn")
    lock = context.Lock()
    names.append("sem." + lock._semlock.name[1:])
    segment = shared_memory.SharedMemory(create=True, size=1000)
    names.append(segment.name)
    torch.multiprocessing.set_sharing_strategy("file_system")
    tensor = torch.zeros(1000).share_memory_()
    names.append(tensor.untyped_storage()._share_filename_cpu_()[1].decode()[1:])
    torch.multiprocessing.set_sharing_strategy("file_descriptor")
    forked = iter(DataLoader(Data(), num_workers=1))
    spawned = iter(DataLoader(Data(), num_workers=1, multiprocessing_context=context))
    next(forked), next(spawned)
    if sys.argv[1] != "done":
        daemon()
    open("names", "w").write("\\n".join(names))
    os.rename("names", "ready")
    if sys.argv[1] == "done":
        segment.unlink()
        sys.exit()
    time.sleep(1000)
"""


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory with a short name, as sockets need it."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as made:
        yield Path(made)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "torchrun"])
@pytest.mark.parametrize("end", ["done", "raise", "kill ranks", "kill node", "kill launcher", "kill both"])
def test_nothing_is_left(shell: Shell, temporary: Path, launcher: str, end: str) -> None:
    shell.script("hoard.py", HOARD)
    child = shell.start(
        *("launch", "--launcher", launcher, "--nproc-per-node", "2", "--run-dir", "kept", "hoard.py", end),
        env={"TMPDIR": str(temporary)},
    )
    ready = shell.cwd / "ready"
    wait_for(lambda: ready.exists() or child.poll() is not None, "the ranks", within_s=60)
    names = ready.read_text().split()
    assert len(names) == 3
    if end.startswith("kill"):
        assert all(os.path.exists(f"/dev/shm/{name}") for name in names)
        for pid in _victims(child.pid, end, shell.cwd):
            os.kill(pid, signal.SIGKILL)
    done = finish(child)
    if end in ("done", "raise", "kill ranks"):
        assert done.returncode == (0 if end == "done" else 1), done.stderr
    shell.assert_nothing_left()
    assert not [name for name in names if os.path.exists(f"/dev/shm/{name}")]
    # A cache of torch's is meant to stay.
    assert not [path for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]


@pytest.mark.slow
def test_workers_of_ranks_that_somebody_else_started_leave_no_sockets(shell: Shell, temporary: Path) -> None:
    shell.config()
    inline = (
        "run",
        "config.yaml",
        "--launcher",
        "inline",
        "-o",
        "data.loader.num_workers=2",
        "-o",
        "launch.nproc_per_node=1",
    )
    done = shell.run(*inline, env={"TMPDIR": str(temporary)})
    assert done.returncode == 0, done.stderr
    assert not list(temporary.glob("pymp-*"))


def _victims(launcher: int, end: str, folder: Path) -> list[int]:
    [node] = psutil.Process(launcher).children()
    ranks = [int((folder / f"pid-{rank}").read_text()) for rank in (0, 1)]
    return {
        "kill launcher": [launcher],
        "kill node": [node.pid],
        "kill both": [launcher, node.pid],
        "kill ranks": ranks,
    }[end]
