from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import ddpkit
from ddpkit.testing import RankDied, RankTraceback, run_ranks


def who(offset: int, *, factor: int = 1) -> tuple[int, str | None, str | None, int, int]:
    return (
        int(os.environ["RANK"]) * factor + offset,
        os.environ.get("WORLD_SIZE"),
        os.environ.get("LOCAL_RANK"),
        torch.get_num_threads(),
        os.getpid(),
    )


def test_results_come_by_rank_from_processes_of_their_own() -> None:
    found = run_ranks(who, 3, 10, factor=2)
    assert [each[:4] for each in found] == [(10, "3", "0", 1), (12, "3", "1", 1), (14, "3", "2", 1)]
    assert len({os.getpid(), *(each[4] for each in found)}) == 4
    assert not any(psutil.pid_exists(each[4]) for each in found)


def test_closures_will_do() -> None:
    offset = 5
    assert run_ranks(lambda: offset + int(os.environ["RANK"]), 2) == [5, 6]


class Picky(Exception):
    """Pickled well, and loaded badly."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def fail_after(others_mark: Path) -> None:
    if os.environ["RANK"] == "0":
        while not others_mark.exists():
            time.sleep(0.01)
        time.sleep(0.5)  # the other one is about to raise
    else:
        others_mark.touch()
    raise KeyError(os.environ["RANK"])


def fail(how: str) -> None:
    if how == "picky":
        raise Picky(1, 2)
    if how == "exit" and os.environ["RANK"] == "1":
        os._exit(7)
    with ddpkit.runtime(timeout_s=600) as rt:
        rt.barrier("never")
        if how == "kill" and rt.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        rt.mean(1.0)
        rt.barrier("there")


def test_the_first_failure_is_raised_with_its_type_and_place(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="1") as caught:
        run_ranks(fail_after, 2, tmp_path / "mark")
    assert isinstance(caught.value.__cause__, RankTraceback)
    assert "on rank 1" in str(caught.value.__cause__) and "in fail_after" in str(caught.value.__cause__)


def test_an_exception_that_cannot_be_passed_on_is_named() -> None:
    with pytest.raises(RankDied, match="Picky: 1 and 2"):
        run_ranks(fail, 1, "picky")


@pytest.mark.parametrize(("how", "code"), [("exit", 7), ("kill", -9)])
def test_a_rank_that_dies_is_named_not_those_that_miss_it(how: str, code: int) -> None:
    with pytest.raises(RankDied, match=f"rank 1 ended with exit code {code}"):
        run_ranks(fail, 2, how, timeout_s=20)


def wait_for_ever(pids: Path) -> None:
    (pids / str(os.getpid())).touch()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(60)


def test_ranks_that_do_not_answer_are_ended(tmp_path: Path) -> None:
    with pytest.raises(RankDied, match=r"ranks \[0, 1\] did not answer in time"):
        run_ranks(wait_for_ever, 2, tmp_path, timeout_s=3)
    assert not any(psutil.pid_exists(int(path.name)) for path in tmp_path.iterdir())


def _lives(pid: int) -> bool:
    """Not where it has ended, and nobody has asked how."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_ranks_end_with_the_test_that_started_them(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from ddpkit.testing import run_ranks\n"
        "from test_testing import wait_for_ever\n"
        "if __name__ == '__main__': run_ranks(wait_for_ever, 2, Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parent) as process:
        try:
            deadline = time.monotonic() + 100
            while len(list(tmp_path.iterdir())) < 2:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
        finally:
            process.kill()
    deadline = time.monotonic() + 15
    while any(_lives(int(path.name)) for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
