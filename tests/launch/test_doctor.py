"""``ddpkit doctor``: what it says of an environment, and of ranks that cannot talk."""

from __future__ import annotations

import os
import re
import socketserver
import sys
import threading
import time
from typing import Any

import pytest

from ddpkit import talk
from ddpkit.agree import RanksMissing
from ddpkit.testing import run_ranks
from tests.launch.shell import Shell, finish


@pytest.mark.parametrize("launcher", ["local", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_ranks_that_can_talk(shell: Shell, launcher: str) -> None:
    done = shell.run("doctor", "--launcher", launcher)
    assert done.returncode == 0, done.stderr
    assert re.match(r"versions: python 3\.\d+\.\d+, ddpkit \S+, torch 2\.\S+, numpy ", done.stdout)
    assert re.search(r"^machine: \S+, \d+ of \d+ cores for this process", done.stdout, re.MULTILINE)
    assert "  a Slurm step: not there\n  so it is: one process: no launcher has set anything\n" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"2 ranks by launcher {launcher}: every pair can talk, and all together (")


def test_the_present_world(shell: Shell) -> None:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    children = []
    for rank in (0, 1):
        env = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in zip(names, (rank, 2) * 2, strict=True)}
        children.append(shell.start("doctor", env=env | {"PMIX_NAMESPACE": shell.mark, "SLURM_JOB_ID": "7"}))
    first, second = (finish(child) for child in children)
    assert (first.returncode, second.returncode, second.stdout) == (0, 0, ""), first.stderr + second.stderr
    assert "  Open MPI: decides: rank 0 of 2, local rank 0 of 2 (Open MPI, by OMPI_COMM_WORLD_RANK=0, " in first.stdout
    assert "2 rank(s) of Open MPI: every pair can talk, and all together" in first.stdout


@pytest.mark.slow
def test_variables_that_are_half_set(shell: Shell) -> None:
    done = shell.run("doctor", "--launcher", "inline", env={"PMI_RANK": "1", "RANK": "0", "WORLD_SIZE": "1"})
    assert "RANK and WORLD_SIZE: decides: rank 0 of 1" in done.stdout and "MPICH: broken: " in done.stdout
    assert done.stdout.endswith("one process: nobody to talk to\n")
    done = shell.run("doctor", env={"PMI_RANK": "1"})
    assert done.returncode == 2
    assert done.stderr.startswith("ddpkit: the environment sets PMI_RANK=1 but not PMI_SIZE")
    assert "  MPICH: broken: the environment sets PMI_RANK=1 but not PMI_SIZE" in done.stdout


class _Proxy(socketserver.BaseRequestHandler):
    """Speaks to whoever comes, of something else."""

    def handle(self) -> None:
        self.request.recv(1)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "port", "words"),
    [
        ("127.0.0.1", "9", r" within 0.5 s: Connection refused. Nobody listens there: rank 0 has not started"),
        ("no-such-machine.invalid", "9", r": that name leads nowhere \(.*\). Set MASTER_ADDR to an address"),
        ("127.0.0.1", "other", r": what listens there is no store of torch's, but something else"),
    ],
    ids=["nobody", "no name", "something else"],
)
def test_a_rank_zero_that_cannot_be_reached(shell: Shell, address: str, port: str, words: str) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Proxy) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        number = str(other.server_address[1]) if port == "other" else port
        env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": number}
        code = f"from ddpkit import talk; talk._MEET_S = 0.5; {_CLI}"
        # As the command line sees to it, before torch is imported.
        done = shell.run(prefix=(sys.executable, "-c", code), env=env | {"TORCH_CPP_LOG_LEVEL": "FATAL"})
        other.shutdown()
    assert done.returncode == 1
    where = re.escape(f"{address}:{number}")
    assert re.match(rf"ddpkit: rank 1 on \S+ cannot reach rank 0 at {where}{words}", done.stderr), done.stderr
    assert done.stderr.count("\n") == 1


_CLI = "import sys; sys.argv = ['ddpkit', 'doctor']; from ddpkit.__main__ import main; main()"


@pytest.mark.slow
def test_other_oddities_are_one_message(shell: Shell) -> None:
    done = shell.run("doctor", env={"GLOO_SOCKET_IFNAME": "nope0"})
    assert done.returncode == 1
    assert re.fullmatch(
        r"ddpkit: GLOO_SOCKET_IFNAME=nope0: \S+ has no network interface nope0; it has .*\n", done.stderr
    )
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Proxy) as other:
        port = str(other.server_address[1])
        env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = shell.run("doctor", env=env)
    assert done.returncode == 2
    assert re.fullmatch(rf"ddpkit: MASTER_PORT={port} on 127.0.0.1 is taken by another process: .*\n", done.stderr)
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    done = shell.run("doctor", env=step | {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "RANK": "0", "WORLD_SIZE": "1"})
    assert done.returncode == 2 and "  a Slurm step: there too: rank 1 of 2" in done.stdout
    assert re.fullmatch(r"ddpkit: RANK=0 and WORLD_SIZE=1 contradict SLURM_PROCID=1 and .*\n", done.stderr)


class _Silent(socketserver.BaseRequestHandler):
    """Takes what comes, and says nothing."""

    def handle(self) -> None:
        while self.request.recv(4096):
            pass


@pytest.mark.slow
def test_something_that_listens_and_says_nothing(shell: Shell) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Silent) as other:
        other.daemon_threads = True
        threading.Thread(target=other.serve_forever, daemon=True).start()
        port = str(other.server_address[1])
        env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        code = "import launch.doctor, sys; launch.doctor._LIMIT_S = 1.0; from launch import cli; cli.main(['doctor'])"
        done = shell.run("-c", code, prefix=(sys.executable,), env=env | {"TORCH_CPP_LOG_LEVEL": "FATAL"})
        other.shutdown()
    assert done.returncode == 1
    assert re.fullmatch(rf"ddpkit: rank 1 on \S+ still waits after 1 s: .* at 127.0.0.1:{port}, .*\n", done.stderr)


def _deaf() -> Any:
    """Rank 2 tells the others an address on which it cannot be reached."""
    talk._CONNECT_S = 0.5
    if os.environ["RANK"] == "2":
        listening = talk._listening
        talk._listening = lambda address: listening("127.0.0.2")  # and says 127.0.0.1
    return talk.check()


def test_the_pairs_that_cannot_talk_are_named() -> None:
    first, *others = run_ranks(_deaf, 3)
    assert others == [first, first]
    assert len(first) == 2
    for rank, line in zip((0, 1), first, strict=True):
        assert re.match(rf"rank {rank} on \S+ cannot connect to rank 2 on \S+ at 127.0.0.1: Connection refused", line)


def _absent() -> Any:
    talk._MEET_S = 0.5
    if os.environ["RANK"] == "1":
        time.sleep(60)
    return talk.check()


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(RanksMissing, match=r"the roll-call: after 0.5 s these ranks have not come: \[1\]"):
        run_ranks(_absent, 2)
