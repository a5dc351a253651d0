"""``--launcher torchrun``, ``launch.torchrun``, and ranks that an external ``torchrun`` has started."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import pytest

import launch
from launch.calls import RankError
from tests.launch.shell import HANG_S, Shell, finish, wait_for
from tests.ports import free_port

Done: TypeAlias = "subprocess.CompletedProcess[str]"

TORCHRUN = ("--launcher", "torchrun", "--nproc-per-node", "2")

ONCE = """
import os, time, torch, torch.distributed as dist

dist.init_process_group("gloo")
rank, count = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"]
dist.barrier()
print("attempt", count, flush=True)
open(f"said-{rank}", "w").close()
if rank == 1 and count == "0":
    while not os.path.exists("said-0"): time.sleep(0.01)
    os.kill(os.getpid(), 9)
dist.all_reduce(torch.ones(1))
dist.destroy_process_group()
"""

LONG: dict[str, Any] = {
    "launch": {"launcher": "torchrun", "nproc_per_node": 2},
    "data": {
        "train": {"factory": "tests.toy:dataset", "args": {"length": 4096}},
        "global_batch_size": 16,
        "loader": {"num_workers": 1},
    },
    "train": {"step": "tests.toy:slow_step", "epochs": 50},
}


class OwnError(Exception):
    """Its type is raised again in the caller."""


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_restart_with_gloo_on_one_node(shell: Shell) -> None:
    shell.script("once.py", ONCE)
    done = shell.run("launch", *TORCHRUN, "-o", "launch.max_restarts=1", "--run-dir", "kept", "once.py")
    assert (done.returncode, done.stdout) == (0, "attempt 0\nattempt 1\n"), done.stderr
    assert done.stderr.count(f"rank 1 on {socket.gethostname()} failed: SIGKILL") == 1
    attempts = [_json(shell.cwd / f"kept/attempts/attempt-{number}.json") for number in (0, 1)]
    assert [attempt["exit_code"] for attempt in attempts] == [1, 0]
    assert (attempts[1]["launcher"], attempts[1]["ranks"]) == ("torchrun", 2)
    assert (shell.cwd / "kept/logs/attempt-1/rank-1.log").read_text() == "attempt 1\n"


def test_a_failure_is_reported_once(shell: Shell) -> None:
    shell.script(
        "fail.py",
        "import os, time\nif os.environ['RANK'] == '1': raise ValueError('the cause')\ntime.sleep(1000)\n",
    )
    done = shell.run("launch", *TORCHRUN, "--run-dir", "kept", "fail.py")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("rank 1 on ") == 1 and "ValueError: the cause" in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "torch/distributed" not in done.stderr and "launch/rank.py" not in done.stderr
    assert (_json(shell.cwd / "kept/failure.json")["rank"], len(list((shell.cwd / "kept/logs").iterdir()))) == (1, 1)


@pytest.mark.slow
def test_restarts_are_counted_and_input_errors_are_final(shell: Shell) -> None:
    # The agent ends rank zero as soon as it sees that the other one has failed.
    always = "import os, time\nif os.environ['RANK'] == '1': time.sleep(1000)\nprint('here', flush=True)\nos._exit(9)\n"
    shell.script("always.py", always)
    done = shell.run("launch", *TORCHRUN, "-o", "launch.max_restarts=2", "always.py")
    assert (done.returncode, done.stdout) == (1, "here\n" * 3)
    assert done.stderr.count("restarting all ranks") == 2
    shell.script("wrong.py", "import ddpkit.errors\nraise ddpkit.errors.UserError('--lr is missing; give one')\n")
    done = shell.run("launch", *TORCHRUN, "-o", "launch.max_restarts=2", "wrong.py")
    assert (done.returncode, done.stderr) == (2, "ddpkit: --lr is missing; give one\n")


def _steps(shell: Shell) -> int:
    metrics = shell.cwd / "run/metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
    ids=["term", "int"],
)
def test_an_agreed_stop(shell: Shell, number: int, code: int) -> None:
    shell.config(**LONG | {"launch": {"launcher": "torchrun", "nproc_per_node": 2, "max_restarts": 1}})
    child = shell.start("run", "config.yaml")
    wait_for(lambda: _steps(shell) > 0 or child.poll() is not None, "steps")
    child.send_signal(number)
    done = finish(child)
    assert done.returncode == code, done.stderr
    assert f"stopped on request ({signal.Signals(number).name}), state saved" in done.stderr
    assert "Traceback" not in done.stderr and "restarting" not in done.stderr
    assert list((shell.cwd / "run/checkpoints").glob("step-*"))


SLOW_TO_LEAVE = """
import atexit, time, torch, ddpkit

with ddpkit.runtime(seed=0) as rt:
    # For longer than the agent needs to see that the other one has gone.
    atexit.register(time.sleep, 3.0 * rt.rank)
    model = rt.wrap(torch.nn.Linear(4, 1))
    loader = rt.loader(torch.utils.data.TensorDataset(torch.ones(4096, 4)), global_batch_size=4)
    run = rt.resume("run", model=model, loader=loader, log_every=1)
    for _ in run.epochs(100):
        for (inputs,) in loader:
            time.sleep(0.02)
            run.step(loss=model(inputs).sum())
"""


@pytest.mark.slow
def test_ranks_that_leave_a_stop_one_after_the_other(shell: Shell) -> None:
    shell.script("own.py", SLOW_TO_LEAVE)
    child = shell.start("launch", "--launcher", "torchrun", "--nproc-per-node", "3", "own.py")
    wait_for(lambda: _steps(shell) > 0 or child.poll() is not None, "steps")
    child.send_signal(signal.SIGTERM)
    done = finish(child)
    assert done.returncode == 75, done.stderr
    assert "state saved" in done.stderr and "failed" not in done.stderr
    assert list((shell.cwd / "run/checkpoints").glob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["launcher", "agent"])
def test_sigkill_leaves_nothing(shell: Shell, victim: str) -> None:
    shell.config(**LONG)
    child = shell.start("run", "config.yaml")
    wait_for(lambda: _steps(shell) > 0 or child.poll() is not None, "steps")
    launcher = psutil.Process(child.pid)
    [agent] = launcher.children()
    assert len(launcher.children(recursive=True)) >= 5  # the agent, two ranks, two loader workers
    (launcher if victim == "launcher" else agent).kill()
    done = finish(child)
    assert done.returncode == (-9 if victim == "launcher" else 1)
    shell.assert_nothing_left()


def test_the_command_line_imports_no_torch(shell: Shell) -> None:
    shell.config(**LONG)
    code = (
        "import sys, importlib; sys.argv = ['ddpkit', 'run', 'config.yaml', '--dry-run']\n"
        "import ddpkit.__main__ as main\n"
        "try: main.main()\n"
        "except SystemExit as leaving: print(leaving.code, 'torch' in sys.modules)\n"
    )
    done = shell.run(prefix=(sys.executable, "-c", code))
    assert done.stdout.endswith("0 False\n"), done.stderr
    assert "launcher: torchrun\nranks: 2\n" in done.stdout


@pytest.mark.parametrize(
    ("options", "env", "words"),
    [
        (("-o", "launch.nnodes=2"), {}, "launch.rdzv_endpoint: 2 machines need a place to meet"),
        (("-o", "launch.rdzv_endpoint=h:1"), {}, "launch.rdzv_endpoint: h:1 is for launch.launcher=torchrun with"),
        (("--launcher", "local", "-o", "launch.nnodes=2"), {}, "launch.nnodes: 2 machines, but the local launcher"),
        (
            ("--launcher", "local", "-o", "launch.nnodes=1:2"),
            {},
            "launch.nnodes: 1:2 is a range, and machines can come",
        ),
        (("-o", "launch.nnodes=2:1"), {}, "launch.nnodes: expected an integer of at least 1 or a range such as '2:4'"),
        (("-o", "launch.nnodes=2:4"), {}, "launch.rdzv_endpoint: 2:4 machines need a place to meet"),
        ((), {"PMI_RANK": "1", "PMI_SIZE": "2"}, "the environment sets PMI_RANK=1 but not MPI_LOCALRANKID"),
        (
            (),
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            "launch.launcher: this process is rank 1 of 2 already (MPICH",
        ),
    ],
)
def test_refusals(shell: Shell, options: tuple[str, ...], env: dict[str, str], words: str) -> None:
    shell.config(launch={"launcher": "torchrun", "nproc_per_node": 2})
    done = shell.run("run", "config.yaml", *options, env=env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert words in done.stderr


def _on_ranks(x: int) -> Any:
    import torch
    import torch.distributed as dist

    rank, count = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo")
    total = torch.tensor(float(x + rank))
    dist.all_reduce(total)
    dist.destroy_process_group()
    if x == 0 or count < x - 4:
        raise OwnError("of rank", rank)
    return total.item(), count


@pytest.mark.slow
def test_a_function_on_ranks() -> None:
    assert launch.torchrun(_on_ranks, 5, nproc_per_node=2, max_restarts=1) == [(11.0, 1)] * 2


@pytest.mark.slow
def test_a_function_that_fails_keeps_its_type() -> None:
    with pytest.raises(OwnError, match="of rank") as caught:
        launch.torchrun(_on_ranks, 0, nproc_per_node=1)
    assert isinstance(caught.value.__cause__, RankError)


# ---------------------------------------------------------------------- several machines: several launchers


def _launchers(shell: Shell, *arguments: str, ranks: tuple[int, ...] = (2, 2), nnodes: str = "2") -> list[Done]:
    """One launcher for each machine, all on this one, on the same run directory; how they end."""
    meet = ("--nnodes", nnodes, "-o", f"launch.rdzv_endpoint=127.0.0.1:{free_port()}", "--run-dir", "kept")
    command = ("launch", "--launcher", "torchrun", *meet)
    children = [shell.start(*command, "--nproc-per-node", str(nproc), *arguments) for nproc in ranks]
    return [finish(child) for child in children]


@pytest.mark.slow
def test_two_launchers_are_one_world_and_restart_together(shell: Shell) -> None:
    shell.script("once.py", ONCE)
    ends = _launchers(shell, "-o", "launch.max_restarts=1", "once.py", ranks=(1, 1))
    assert [end.returncode for end in ends] == [0, 0], [end.stderr for end in ends]
    # Each attempt has one number, one file, and the logs of all ranks.
    assert _attempts(shell.cwd / "kept") == [(2, 1), (2, 0)]
    logs = {str(path.relative_to(shell.cwd / "kept/logs")) for path in shell.cwd.glob("kept/logs/*/*")}
    assert logs == {f"attempt-{attempt}/rank-{rank}.log" for attempt in (0, 1) for rank in (0, 1)}
    assert [end.stderr.count("rank 1 on ") for end in ends] == [1, 1]


def _attempts(run_dir: Path) -> list[tuple[int, int]]:
    told = [_json(path) for path in sorted((run_dir / "attempts").iterdir())]
    return [(attempt["ranks"], attempt["exit_code"]) for attempt in told]


FAIL = """
import os, sys, time
rank = os.environ["RANK"]
if sys.argv[1] == "input" and rank == "1":
    import ddpkit.errors
    raise ddpkit.errors.UserError("--lr is missing; give one")
if sys.argv[1] == "soon":
    open(f"here-{rank}", "w").close()
    while not all(os.path.exists(f"here-{other}") for other in range(4)): time.sleep(0.001)
    if rank != "3":
        while not os.path.exists("raising"): time.sleep(0.001)
        time.sleep(1.0)  # later than it may take rank 3 to go on by a line
    open("raising", "w").close()
    raise RuntimeError(f"of rank {rank}")
time.sleep(1000)
"""


@pytest.mark.slow
def test_the_first_failing_rank_of_all_machines_is_named_on_each(shell: Shell) -> None:
    shell.script("fail.py", FAIL)
    for _ in range(3):
        for path in (*shell.cwd.glob("here-*"), *shell.cwd.glob("raising")):
            path.unlink()
        for end in _launchers(shell, "fail.py", "soon"):
            assert end.returncode == 1 and end.stderr.startswith("ddpkit: rank 3 on "), end.stderr
            assert end.stderr.count("Traceback") == 1
        kept = _json(shell.cwd / "kept/failure.json")
        # One that fails when this launcher has gone already is not waited for.
        assert kept["rank"] == 3 and {0, 1} <= {other["rank"] for other in kept["others"]} <= {0, 1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("restarts", ["0", "2"])
def test_wrong_input_on_one_machine_ends_all(shell: Shell, restarts: str) -> None:
    shell.script("fail.py", FAIL)
    for end in _launchers(shell, "-o", f"launch.max_restarts={restarts}", "fail.py", "input"):
        # Where it is heard of late, the agents have begun to start all ranks again.
        told = set(end.stderr.splitlines()) - {"ddpkit: nodes have come or gone: starting all ranks anew"}
        assert (end.returncode, told) == (2, {"ddpkit: --lr is missing; give one"}), end.stderr


@pytest.mark.slow
def test_machines_that_were_started_differently(shell: Shell) -> None:
    shell.script("fail.py", FAIL)
    for end in _launchers(shell, "fail.py", "soon", ranks=(1, 2)):
        assert (end.returncode, end.stdout, end.stderr.count("\n")) == (2, "", 1), end.stderr
        assert "the launchers of this group were started differently: " in end.stderr
        assert "nproc_per_node 1, nnodes 2" in end.stderr and "nproc_per_node 2, nnodes 2" in end.stderr
    assert not list(shell.cwd.glob("here-*"))


UNTIL_THEY_HAVE_GONE = """
import os, time
from tests.toy import step as quick_step

def step(model, batch):
    if not os.path.exists("run/logs/attempt-2"):
        time.sleep(0.2)  # there is time for a second machine to come
    return quick_step(model, batch)
"""


@pytest.mark.slow
def test_machines_come_and_go(shell: Shell) -> None:
    meet = {"nnodes": "1:2", "rdzv_endpoint": f"127.0.0.1:{free_port()}", "max_restarts": 1}
    sections = LONG | {"launch": {"launcher": "torchrun", "nproc_per_node": 1} | meet}
    shell.script("steps.py", UNTIL_THEY_HAVE_GONE)
    shell.config(**sections | {"train": {"step": "steps:step", "max_steps": 600}})
    first = shell.start("run", "config.yaml")
    wait_for(lambda: _steps(shell) > 0 or first.poll() is not None, "steps of one machine", HANG_S)
    second = shell.start("run", "config.yaml")
    # The ranks agree on a stop, save, and go on as two.
    wait_for(
        lambda: (shell.cwd / "run/logs/attempt-1").exists() or first.poll() is not None, "the second machine", HANG_S
    )
    before = _steps(shell)
    wait_for(lambda: _steps(shell) > before + 1 or first.poll() is not None, "steps of two machines", HANG_S)
    second.kill()
    done = finish(first)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("nodes have come or gone: starting all ranks anew") == 1
    assert done.stderr.count("nothing has been heard of rank ") == 1
    assert _attempts(shell.cwd / "run") == [(1, 75), (2, 1), (1, 0)]
    steps = [line["step"] for line in _values(shell.cwd / "run") if line["kind"] == "train"]
    assert steps == list(range(10, 601, 10))


# ---------------------------------------------------------------------- an external torchrun


def _external(*arguments: str) -> tuple[str, ...]:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return (*torchrun, "--no-python", sys.executable, "-m", "ddpkit", *arguments)


def _values(run_dir: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


@pytest.mark.slow
def test_inline_ranks_of_an_external_torchrun(shell: Shell) -> None:
    shell.config()
    inline = ("run", "config.yaml", "--launcher", "inline")
    # Sums differ by the number of threads, and torchrun gives each rank one.
    one = {"OMP_NUM_THREADS": "1"}
    done = shell.run(prefix=_external(*inline, "-o", "train.epochs=2"), env=one)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (shell.cwd / "run/attempts").iterdir()] == ["attempt-0.json"]
    assert _json(shell.cwd / "run/attempts/attempt-0.json")["ranks"] == 2
    # Half of it, and the other half under our own launcher: the same bits.
    half = shell.run(prefix=_external(*inline, "-o", "train.epochs=1", "-o", "run_dir=other"), env=one)
    assert half.returncode == 0, half.stderr
    ours = ("run", "config.yaml", "-o", "train.epochs=2", "-o", "run_dir=other", "--launcher", "torchrun")
    done = shell.run(*ours, env=one)
    assert done.returncode == 0, done.stderr
    assert _values(shell.cwd / "other") == _values(shell.cwd / "run")
