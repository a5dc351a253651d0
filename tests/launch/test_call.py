"""``launch.local(fn)``: functions on ranks, called from Python."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import pytest

import launch
from launch.calls import RankError
from tests.launch.shell import Shell, finish, wait_for


class OwnError(Exception):
    """Its type is raised again in the caller."""


class Awkward(Exception):
    """Pickles, and cannot be unpickled: its ``__init__`` wants two arguments, and args holds one."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")


def _rank() -> int:
    return int(os.environ["RANK"])


def _fail(kind: str) -> Any:
    if _rank() == 0:
        return time.sleep(30 if kind == "own" else 0)
    if kind == "own":
        raise OwnError("of rank 1", 7)
    if kind == "awkward":
        raise Awkward(3, "of rank 1")
    if kind == "unpicklable":
        error = OwnError("holds a lock")
        error.lock = threading.Lock()  # type: ignore[attr-defined]  # the point of it
        raise error
    if kind == "result":
        return threading.Lock()
    if kind == "exit":
        sys.exit(5)
    os._exit(6)


def test_results_come_in_order_of_ranks_whatever_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    captured = {"offset": 100}

    def closure(size: int, *, factor: int) -> Any:
        print("said by rank", _rank())
        return _rank() + captured["offset"], bytes([factor]) * size, lambda x: x * factor

    results = launch.local(closure, 50 << 20, nproc_per_node=3, factor=7)  # 50 MiB from each rank, and 50 more
    assert [result[0] for result in results] == [100, 101, 102]
    assert all(len(result[1]) == 50 << 20 and result[1][-1] == 7 for result in results)
    assert results[1][2](6) == 42
    assert capfd.readouterr().out == "said by rank 0\n"


def test_large_arguments_and_a_thread_as_the_caller(capsys: pytest.CaptureFixture[str]) -> None:
    results: list[int] = []
    given = b"x" * (30 << 20)

    def call() -> None:
        results.extend(launch.local(lambda data: print("ü") or len(data), given, nproc_per_node=1))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)
    assert results == [30 << 20]
    assert capsys.readouterr().out == "ü\n"  # also where stdout has no descriptor


@pytest.mark.parametrize(
    ("kind", "raised", "words"),
    [
        ("own", OwnError, "OwnError: ('of rank 1', 7)"),
        ("awkward", RankError, "Awkward: 3: of rank 1"),
        ("unpicklable", RankError, "OwnError: holds a lock"),
        ("result", TypeError, "cannot pickle"),
        ("exit", RankError, "exit code 5"),
        ("kill", RankError, "exit code 6"),
    ],
)
def test_failures_keep_their_type_where_they_can(kind: str, raised: type[Exception], words: str) -> None:
    with pytest.raises(raised) as caught:
        launch.local(_fail, kind, nproc_per_node=2, start_method="spawn")
    report = caught.value if raised is RankError else caught.value.__cause__
    assert isinstance(report, RankError)
    assert str(report).startswith("rank 1 on ") and words in str(report)
    if kind == "own":
        assert caught.value.args == ("of rank 1", 7)
        assert str(report).count("Traceback (most recent call last)") == 1 and "_fail" in str(report)


NOTEBOOK = """
import os, threading, _thread, time
import launch

class Mine(Exception): pass
scale = 3

def work(x):
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.tensor(float(x))
    dist.all_reduce(total)
    if x == 0:
        raise Mine("here")
    return total.item() * scale

if __name__ == "__main__":
    print(launch.local(work, 2))
    try:
        launch.local(work, 0)
    except Mine as error:
        print("caught", error, type(error.__cause__).__name__)
    print("ready", flush=True)
    try:
        launch.local(lambda: (open(f"here-{os.environ['RANK']}", "w").close(), time.sleep(1000)))
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_functions_and_types_of_main_and_an_interrupt(shell: Shell) -> None:
    script = shell.script("notebook.py", NOTEBOOK)
    child = shell.start(script, prefix=(sys.executable,))
    wait_for(lambda: all((shell.cwd / f"here-{rank}").exists() for rank in (0, 1)) or child.poll() is not None)
    child.send_signal(2)
    done = finish(child)
    assert done.stdout == "[12.0, 12.0]\ncaught here RankError\nready\ninterrupted\n", done.stderr
    assert done.returncode == 0
