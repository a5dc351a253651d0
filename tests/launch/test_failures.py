"""One rank fails: the others end within seconds, and one report names the rank, the host and the cause."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from tests.launch.shell import Shell

SPAWN = ("-o", "launch.start_method=spawn")
HOST = socket.gethostname()

# Rank 1 fails in the way that is asked for; rank 0 ends well, or never.
WAYS = """
import ctypes, os, signal, sys, time

class OwnError(Exception):
    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")

def nested():
    try:
        {}["missing"]
    except KeyError as error:
        raise OwnError(7, "deep in the script") from error

ways = {
    "exception": nested,
    "exit-code": lambda: sys.exit(3),
    "exit-text": lambda: sys.exit("words of the script"),
    "os-exit": lambda: os._exit(7),
    "sigkill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sigsegv": lambda: ctypes.string_at(0),
    "real-time": lambda: os.kill(os.getpid(), 41),
}
if os.environ["RANK"] == "1":
    print("before the end", flush=True)
    ways[sys.argv[1]]()
if sys.argv[1] in ("exception", "sigkill"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("exception", "OwnError: 7: deep in the script"),
        ("exit-code", "exit code 3"),
        ("exit-text", "words of the script"),
        ("os-exit", "exit code 7"),
        ("sigkill", "SIGKILL (killed from outside"),
        ("sigsegv", "SIGSEGV (a crash in native code)"),
        ("real-time", "signal 41"),
    ],
)
def test_the_report_names_rank_host_and_cause(shell: Shell, way: str, words: str) -> None:
    shell.script("ways.py", WAYS)
    done = shell.run("launch", *SPAWN, "--nproc-per-node", "2", "--run-dir", "kept", "ways.py", way)
    assert done.returncode == 1
    assert done.stderr.count(f"rank 1 on {HOST} failed: ") == 1
    assert words in done.stderr
    assert done.stdout == ""  # rank zero has said nothing
    log = shell.cwd / "kept/logs/attempt-0/rank-1.log"
    assert "before the end" in log.read_text()
    assert "kept/logs/attempt-0/rank-1.log" in done.stderr
    kept = json.loads((shell.cwd / "kept/failure.json").read_text())
    assert (kept["rank"], kept["host"], kept["attempt"]) == (1, HOST, 0)
    if way in ("exit-code", "os-exit", "sigkill", "sigsegv"):  # nothing else says why
        assert done.stderr.count("\n  | before the end\n") == 1 and "before the end" in kept["last_lines"]
    if way == "sigsegv":
        assert 'ctypes/__init__.py", line ' in done.stderr and 'ways.py", line ' in done.stderr
        assert "launch/rank.py" not in done.stderr
    if way in ("exception", "sigkill"):
        assert "then rank 0: ended by the launcher" in done.stderr
    attempt = json.loads((shell.cwd / "kept/attempts/attempt-0.json").read_text())
    assert attempt["exit_code"] == 1 and attempt["ended"] >= attempt["started"] and "rank 1" in attempt["how"]
    if way == "exception":
        assert done.stderr.count("Traceback (most recent call last)") == 2  # its own and its cause's, once each
        assert done.stderr.count("KeyError: 'missing'") == 1
        assert "launch/rank.py" not in done.stderr and "runpy" not in done.stderr
        assert "KeyError: 'missing'" in kept["traceback"]
        assert "KeyError: 'missing'" in log.read_text()


def test_a_script_that_does_not_compile(shell: Shell) -> None:
    shell.script("broken.py", "x = 1\nif x\n    print(x)\n")
    done = shell.run("launch", *SPAWN, "--nproc-per-node", "1", "--run-dir", "kept", "broken.py")
    assert done.returncode == 1
    assert 'broken.py", line 2' in done.stderr and "SyntaxError" in done.stderr
    assert "launch/rank.py" not in done.stderr


BLOCKED = """
import os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
dist.barrier()

def end_slowly():  # as an interpreter on a busy machine: its connections are gone long before it is
    for name in os.listdir("/proc/self/fd"):
        if "socket:" in os.path.realpath(f"/proc/self/fd/{name}"):
            os.close(int(name))
    time.sleep(60)

if rank == int(sys.argv[1]):
    exec(sys.argv[2])
dist.all_reduce(torch.ones(1))  # the others wait here for the one that fails
"""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise ValueError('the cause')", "ValueError: the cause"),
        ("os.kill(os.getpid(), 9)", "SIGKILL"),
        ("sys.exit(4)", "exit code 4"),
        ("os._exit(0)", "left with exit code 0 while others were still at work"),
        pytest.param("sys.exit(0)", "left with exit code 0 while others were still at work", marks=pytest.mark.slow),
        pytest.param("sys.exit(75)", "left with exit code 75 while others were still at work", marks=pytest.mark.slow),
        (
            "import atexit; atexit.register(end_slowly); sys.exit(75)",
            "left with exit code 75 while others were still at work",
        ),
    ],
    ids=["exception", "kill", "exit", "left", "left-late", "left-75", "left-slowly"],
)
def test_the_cause_and_not_its_consequence_in_a_collective(shell: Shell, code: str, words: str) -> None:
    shell.script("blocked.py", BLOCKED)
    done = shell.run("launch", "--nproc-per-node", "3", "--run-dir", "kept", "blocked.py", "2", code)
    assert done.returncode == 1
    assert done.stderr.count("failed: ") == 1 and f"rank 2 on {HOST} failed: " in done.stderr
    assert words in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") == (1 if "raise" in code else 0)
    others = json.loads((shell.cwd / "kept/failure.json").read_text())["others"]
    assert {other["rank"] for other in others} == {0, 1}


def test_leaving_early_is_no_failure_where_nobody_misses_the_rank(shell: Shell) -> None:
    shell.script("early.py", "import os, time\nif os.environ['RANK'] == '0': time.sleep(0.5)\n")
    done = shell.run("launch", *SPAWN, "-o", "launch.stall_timeout_s=5", "--nproc-per-node", "2", "early.py")
    # And that script has no use for what it was given.
    said = "ddpkit: launch.stall_timeout_s: of no effect, as no rank has entered ddpkit.runtime()\n"
    assert (done.returncode, done.stderr) == (0, said)


def test_a_scripts_own_exit_code_75_is_not_taken_for_a_stop(shell: Shell) -> None:
    shell.script("own.py", "import sys\nsys.exit(75)\n")
    done = shell.run("launch", *SPAWN, "--nproc-per-node", "1", "--run-dir", "kept", "own.py")
    assert (done.returncode, done.stderr) == (75, "ddpkit: the script left by itself, with exit code 75\n")
    assert not (shell.cwd / "kept/failure.json").exists()


# Rank 3 fails, and the others soon after: later than it may take to go on by a line. They agree on the moment by files
# that they leave and look for.
SOON = """
import ctypes, os, signal, sys, time
rank, way = os.environ["RANK"], sys.argv[1]
if way == "gloo":
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
open(f"here-{rank}", "w").close()
while not all(os.path.exists(f"here-{other}") for other in range(4)): time.sleep(0.001)
if rank == "3":
    open("raising", "w").close()
    if way == "abort": ctypes.CDLL(None).abort()
    if way == "exit": sys.exit(3)
    if way == "kill": os.kill(os.getpid(), 9)
    if way == "os-exit": os._exit(3)
elif way == "gloo":
    dist.all_reduce(torch.ones(1))
else:
    while not os.path.exists("raising"): time.sleep(0.001)
    time.sleep(1.0)
raise RuntimeError(f"of rank {rank}")
"""
FIRST_OF_FOUR = {
    "raise": "of rank 3",
    "gloo": "of rank 3",
    "abort": "SIGABRT (native code gave up)",
    "exit": "exit code 3",
    "kill": "SIGKILL (killed from outside",
    "os-exit": "exit code 3",
}


def _first_of_four(shell: Shell, way: str, options: tuple[str, ...]) -> Any:
    shell.script("soon.py", SOON)
    for path in (*shell.cwd.glob("here-*"), *shell.cwd.glob("raising")):
        path.unlink()
    done = shell.run("launch", *options, "--nproc-per-node", "4", "--run-dir", "kept", "soon.py", way)
    assert done.returncode == 1
    kept = json.loads((shell.cwd / "kept/failure.json").read_text())
    assert kept["message"].startswith(FIRST_OF_FOUR[way]), kept
    assert done.stderr.count("Traceback (most recent call last)") == (way in ("raise", "gloo"))
    assert "gloo/transport" not in done.stderr  # what the others have to say of it is short
    return kept["rank"]


def test_the_first_of_several_failures_is_named(shell: Shell) -> None:
    assert [_first_of_four(shell, way, SPAWN) for way in ("raise", "exit", "abort")] == [3] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "ways"),
    [
        (SPAWN, ("raise", "abort", "exit", "kill", "os-exit", "raise") * 2),
        ((), ("raise", "gloo", "abort", "exit", "kill", "os-exit")),
        (("--launcher", "torchrun"), ("raise", "gloo", "abort", "exit", "kill", "os-exit")),
    ],
    ids=["spawn", "warm", "torchrun"],
)
def test_the_first_of_several_failures_is_named_each_time(
    shell: Shell, options: tuple[str, ...], ways: tuple[str, ...]
) -> None:
    assert [_first_of_four(shell, way, options) for way in ways] == [3] * len(ways)


ONCE = """
import os, sys, multiprocessing, time
import torch, torch.distributed as dist

if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"]
    dist.barrier()
    print("attempt", count, flush=True)
    open(f"said-{rank}", "w").close()
    if rank == 1 and count == "0":
        while not os.path.exists("said-0"): time.sleep(0.01)
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
        worker.start()
        open("worker", "w").write(str(worker.pid))
        os.kill(os.getpid(), 9)
    total = torch.ones(1)
    dist.all_reduce(total)
    if count == "1" and rank == 1:
        print("left over:", os.path.exists(f"/proc/{open('worker').read()}"))
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("options", [(), pytest.param(SPAWN, marks=pytest.mark.slow)], ids=["warm", "spawn"])
def test_a_restart_begins_anew_and_alone(shell: Shell, options: tuple[str, ...]) -> None:
    shell.script("once.py", ONCE)
    restarts = ("-o", "launch.max_restarts=2")
    done = shell.run("launch", *options, *restarts, "--nproc-per-node", "2", "--run-dir", "kept", "once.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "attempt 0\nattempt 1\n"
    assert "left over: False" in (shell.cwd / "kept/logs/attempt-1/rank-1.log").read_text()
    codes = [
        json.loads((shell.cwd / f"kept/attempts/attempt-{number}.json").read_text())["exit_code"] for number in (0, 1)
    ]
    assert codes == [1, 0]


def test_restarts_are_counted(shell: Shell) -> None:
    shell.script("always.py", "import os; print('here', flush=True); os._exit(9)")
    done = shell.run(
        "launch", *SPAWN, "-o", "launch.max_restarts=2", "--nproc-per-node", "1", "--run-dir", "kept", "always.py"
    )
    assert (done.returncode, done.stdout) == (1, "here\n" * 3)
    assert done.stderr.count("restarting all ranks") == 2


def test_the_users_own_input_error_in_a_script_is_one_message(shell: Shell) -> None:
    shell.script("wrong.py", "import ddpkit.errors\nraise ddpkit.errors.UserError('--lr is missing; give one')\n")
    done = shell.run("launch", *SPAWN, "--nproc-per-node", "2", "wrong.py")
    assert (done.returncode, done.stderr) == (2, "ddpkit: --lr is missing; give one\n")
