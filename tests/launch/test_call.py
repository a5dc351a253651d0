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
    """Pickles, and cannot be unpickled as usual: its ``__init__`` wants other arguments than ``args`` holds."""

    def __init__(self, code: int, *, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


class Homesick(Exception):
    """Exists on ranks only."""

    def __new__(cls, *args: Any) -> Homesick:
        if "RANK" not in os.environ:
            raise RuntimeError("not here")
        return super().__new__(cls, *args)


def _rank() -> int:
    return int(os.environ["RANK"])


def _fail(kind: str) -> Any:
    if _rank() == 0:
        return time.sleep(30 if kind == "own" else 0)
    if kind == "own":
        raise OwnError("of rank 1", 7)
    if kind == "awkward":
        raise Awkward(3, text="of rank 1")
    if kind == "homesick":
        raise Homesick("of rank 1")
    if kind == "group" and sys.version_info >= (3, 11):
        raise ExceptionGroup("several", [OwnError("one"), Awkward(4, text="two")])  # noqa: F821 - it is there by now
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "text":
        sys.exit("words at the end")
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


@pytest.mark.slow
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
        ("awkward", Awkward, "Awkward: 3: of rank 1"),
        ("unpicklable", OwnError, "OwnError: holds a lock"),
        ("homesick", RankError, "Homesick: of rank 1"),
        # Nobody has pressed Ctrl-C here, and nobody here wants to leave.
        ("interrupt", RankError, "KeyboardInterrupt"),
        ("text", RankError, "words at the end"),
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
    if isinstance(caught.value, Awkward):
        assert (caught.value.code, str(caught.value)) == (3, "3: of rank 1")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="groups of exceptions came with Python 3.11")
def test_a_group_of_exceptions_keeps_its_types() -> None:
    with pytest.raises(Exception, match="several") as caught:
        launch.local(_fail, "group", nproc_per_node=2, start_method="spawn")
    assert [type(each) for each in caught.value.exceptions] == [OwnError, Awkward]  # type: ignore[attr-defined]  # as above


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


@pytest.mark.slow
def test_functions_and_types_of_main_and_an_interrupt(shell: Shell) -> None:
    script = shell.script("notebook.py", NOTEBOOK)
    child = shell.start(script, prefix=(sys.executable,))
    wait_for(lambda: all((shell.cwd / f"here-{rank}").exists() for rank in (0, 1)) or child.poll() is not None)
    child.send_signal(2)
    done = finish(child)
    assert done.stdout == "[12.0, 12.0]\ncaught here RankError\nready\ninterrupted\n", done.stderr
    assert done.returncode == 0
