"""Ctrl-C, SIGTERM, and SIGKILL of anything: what the user is told, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch.shell import HANG_S, Shell, finish, interrupt_group, wait_for

SPAWN = ("-o", "launch.start_method=spawn")

WAITING = """
import os, signal, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
subprocess.Popen(["setsid", "sleep", "1000"])
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)
for name in sys.argv[1:]:
    signal.signal(getattr(signal, name), signal.SIG_IGN)
open(f"here-{os.environ['RANK']}", "w").close()
time.sleep(1000)
"""

LONG: dict[str, Any] = {
    "data": {
        "train": {"factory": "tests.toy:dataset", "args": {"length": 4096}},
        "global_batch_size": 16,
        "loader": {"num_workers": 1},
    },
    "train": {"step": "tests.toy:slow_step", "epochs": 50},
}


def _all_here(shell: Shell, ranks: int = 2) -> bool:
    return all((shell.cwd / f"here-{rank}").exists() for rank in range(ranks))


def _start_waiting(shell: Shell, *arguments: str, options: tuple[str, ...] = SPAWN, **how: Any) -> Any:
    shell.script("waiting.py", WAITING)
    command = ("launch", *options, "--nproc-per-node", "2", "--run-dir", "kept", "waiting.py", *arguments)
    child = shell.start(*command, **how)
    wait_for(lambda: _all_here(shell), "the ranks")
    return child


@pytest.mark.parametrize(
    ("number", "code", "options"),
    [
        (signal.SIGINT, 130, ()),
        (signal.SIGINT, 130, SPAWN),
        (signal.SIGTERM, 1, SPAWN),
    ],
    ids=["int-warm", "int-spawn", "term-spawn"],
)
def test_a_plain_script_ends_by_the_signal_as_under_python(
    shell: Shell, number: int, code: int, options: tuple[str, ...]
) -> None:
    child = _start_waiting(shell, options=options, start_new_session=True)
    os.killpg(child.pid, number)  # as a terminal does
    done = finish(child)
    assert done.returncode == code
    assert done.stderr == f"ddpkit: ended by {signal.Signals(number).name}\n"
    attempt = json.loads((shell.cwd / "kept/attempts/attempt-0.json").read_text())
    assert (attempt["exit_code"], attempt["how"]) == (code, f"ended by {signal.Signals(number).name}")


def test_a_second_interrupt_ends_ranks_that_take_no_notice(shell: Shell) -> None:
    child = _start_waiting(shell, "SIGINT", "SIGTERM", start_new_session=True)
    wait_for(lambda: _has_ended_after(child, interrupt_group), "the end")
    done = finish(child)
    assert (done.returncode, done.stderr) == (130, "ddpkit: ended by SIGINT\n")


def test_asking_again_ends_ranks_that_ignore_a_termination(shell: Shell) -> None:
    child = _start_waiting(shell, "SIGINT", "SIGTERM", start_new_session=True)
    wait_for(lambda: _has_ended_after(child, lambda running: running.terminate()), "the end")
    done = finish(child)
    assert (done.returncode, done.stderr) == (1, "ddpkit: ended by SIGTERM\n")


def _has_ended_after(child: Any, action: Callable[[Any], None]) -> bool:
    if child.poll() is None:
        action(child)
    return child.poll() is not None


def test_an_interrupt_ends_a_script_whose_other_rank_is_deep_in_a_collective(shell: Shell) -> None:
    shell.script(
        "deep.py",
        "import os, time, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "open(f'here-{dist.get_rank()}', 'w').close()\n"
        "if dist.get_rank() == 0: time.sleep(1000)\n"
        "dist.all_reduce(torch.ones(1))\n",
    )
    child = shell.start("launch", "--nproc-per-node", "2", "deep.py")
    wait_for(lambda: _all_here(shell), "the ranks")
    child.send_signal(signal.SIGINT)
    done = finish(child)
    assert (done.returncode, done.stderr) == (130, "ddpkit: ended by SIGINT\n")


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM], ids=["int", "term"]
)
def test_a_signal_to_every_process_is_one_stop(shell: Shell, number: int) -> None:
    # A cluster manager signals all processes of a job, the one that starts the ranks and loader workers included.
    shell.config(**LONG)
    child = shell.start("run", "config.yaml")
    wait_for(lambda: _steps(shell) > 2, "steps")
    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    listening = {
        each.laddr.ip
        for process in family
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN
    }
    assert listening and listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    for process in family:
        if number == signal.SIGTERM or process.pid == child.pid:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has stopped already
                process.send_signal(number)
    done = finish(child)
    assert done.returncode == {signal.SIGINT: 130, signal.SIGTERM: 75}[signal.Signals(number)], done.stderr
    said = f"ddpkit: stopped on request ({signal.Signals(number).name}), state saved; run it again to continue\n"
    assert said in done.stderr and "Traceback" not in done.stderr
    assert list((shell.cwd / "run/checkpoints").glob("step-*"))


def _steps(shell: Shell) -> int:
    metrics = shell.cwd / "run/metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
@pytest.mark.parametrize("moment", ["imports", pytest.param("node", marks=pytest.mark.slow)])
def test_a_stop_during_the_start(shell: Shell, number: int, moment: str) -> None:
    shell.config(**LONG)
    child = shell.start("run", "config.yaml")
    if moment == "imports":  # of the launcher itself: signal as soon as Python handles signals at all
        wait_for(lambda: _handles(child.pid, signal.SIGTERM), "the handler")
    else:
        wait_for(lambda: psutil.Process(child.pid).children(), "the node process")
    child.send_signal(number)
    done = finish(child)
    assert done.returncode == {signal.SIGINT: 130, signal.SIGTERM: 75}[signal.Signals(number)], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("options", [(), pytest.param(SPAWN, marks=pytest.mark.slow)], ids=["warm", "spawn"])
def test_a_stop_while_ranks_import_is_not_waited_for(shell: Shell, options: tuple[str, ...]) -> None:
    # As a short grace on a busy machine: nothing has begun that could be lost.
    shell.script("slow.py", "import os, time\nopen('here-' + os.environ['RANK'], 'w').close()\ntime.sleep(1000)\n")
    shell.script("slow_step.py", "import slow\ndef step(model, batch): ...\n")
    shell.config(train={"step": "slow_step:step", "epochs": 1}, data=LONG["data"])
    child = shell.start("run", "config.yaml", *options)
    wait_for(lambda: _all_here(shell), "the imports")
    child.terminate()
    done = finish(child)
    said = "ddpkit: stopped on request (SIGTERM), before there was anything to save; run it again to continue\n"
    assert (done.returncode, done.stderr) == (75, said)


LOST = """
import os, signal, sys
import ddpkit.__main__ as command

begin = command._main


class Dropped:
    def __del__(self):  # what is raised here, Python drops
        os.kill(os.getpid(), {number})
        sum(range(10_000))


def with_signal():
    Dropped()
    print("lost, and noted:", signal.getsignal({number}).received, flush=True)
    return begin()


command._main = with_signal
sys.argv = ["ddpkit", "run", "config.yaml"]
command.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_stop_whose_exception_was_lost(shell: Shell, number: int) -> None:
    shell.config(**LONG)
    done = shell.run("-c", LOST.format(number=int(number)), prefix=(sys.executable,))
    assert done.returncode == {signal.SIGINT: 130, signal.SIGTERM: 75}[signal.Signals(number)], done.stderr
    assert done.stdout == "lost, and noted: True\n"
    assert done.stderr.startswith("ddpkit: ") and done.stderr.count("\n") == 1, done.stderr  # no word of Python's


def _handles(pid: int, number: int) -> bool:
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_a_second_interrupt_during_the_start_does_not_wait_for_torch(shell: Shell) -> None:
    shell.config(**LONG)
    child = shell.start("run", "config.yaml", start_new_session=True)
    wait_for(lambda: psutil.Process(child.pid).children(), "the node process")
    wait_for(lambda: _has_ended_after(child, interrupt_group), "the end")
    assert child.returncode == 130


def _tree(child: Any) -> tuple[psutil.Process, psutil.Process]:
    launcher = psutil.Process(child.pid)
    [node] = launcher.children()
    return launcher, node


@pytest.mark.parametrize("victims", ["launcher", "node", "both", "ranks"])
def test_sigkill_leaves_nothing(shell: Shell, victims: str) -> None:
    child = _start_waiting(shell, "SIGTERM", "SIGINT")
    launcher, node = _tree(child)
    ranks = [process for process in node.children() if "rank" in process.cmdline()]
    assert len(ranks) == 2
    chosen = {"launcher": [launcher], "node": [node], "both": [launcher, node], "ranks": ranks}[victims]
    for process in chosen:
        process.kill()
    code = child.wait(HANG_S)
    shell.assert_nothing_left()
    assert code == (-9 if launcher in chosen else 1)
    err = (child.stderr.read() if child.stderr else b"").decode()
    if victims == "node":
        assert "the process that starts the ranks" in err and "SIGKILL" in err
    if victims == "ranks":
        assert err.count("failed: SIGKILL") == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["trap", "nohup"])
def test_sigkill_of_a_launcher_in_the_background_leaves_nothing(shell: Shell, how: str) -> None:
    shell.config(**LONG)
    command = f"{sys.executable} -m ddpkit run config.yaml"
    shells = {"trap": f"trap '' INT; {command} & echo $!; wait", "nohup": f"nohup {command} & echo $!; wait"}
    child = shell.start(prefix=("bash", "-c", shells[how]))
    assert child.stdout is not None
    launcher = psutil.Process(int(child.stdout.readline()))
    wait_for(lambda: _steps(shell) > 0, "steps")
    assert len(launcher.children(recursive=True)) >= 6  # the node process, the store, two ranks, two loader workers
    launcher.kill()
    finish(child)
    shell.assert_nothing_left()


@pytest.mark.slow
def test_sigkill_of_the_launcher_during_the_start_leaves_nothing(shell: Shell) -> None:
    shell.config(**LONG)
    child = shell.start("run", "config.yaml")
    wait_for(lambda: psutil.Process(child.pid).children(), "the node process")
    child.kill()
    finish(child)
    shell.assert_nothing_left()


def test_a_script_that_never_stops_writing_can_be_interrupted(shell: Shell) -> None:
    shell.script("chatty.py", "open('here-0', 'w').close()\nwhile True: print('x' * 1000)\n")
    child = shell.start("launch", *SPAWN, "--nproc-per-node", "1", "chatty.py", stdout=subprocess.DEVNULL)
    wait_for(lambda: _all_here(shell, 1), "the rank")
    child.send_signal(signal.SIGINT)
    assert finish(child).returncode == 130


@pytest.mark.slow
def test_a_signal_after_the_work_is_done_does_not_make_it_a_failure(shell: Shell) -> None:
    late = (
        "import atexit, os, signal\nfrom tests.toy import step\natexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
    )
    shell.script("late.py", late)
    done = shell.run("run", shell.config(train={"step": "late:step", "eval_step": "tests.toy:eval_step", "epochs": 1}))
    assert done.returncode == 0, done.stderr
