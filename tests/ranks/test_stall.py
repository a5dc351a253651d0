"""A rank that waits for good finds out who will not come, and ends; one that waits for good reason goes on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ddpkit
from ddpkit.testing import RankDied, run_ranks


def dead_lock(told: Path) -> None:
    def tell(args: threading.ExceptHookArgs) -> None:
        (told / str(args.exc_type)).write_text(str(args.exc_value))

    threading.excepthook = tell
    lock = threading.Lock()
    with ddpkit.runtime(stall_timeout_s=2.0, timeout_s=60) as rt:
        for step in range(10):
            if rt.rank == 1 and step == 5:
                lock.acquire()
                lock.acquire()  # for ever
            dist.all_reduce(torch.ones(1))


def test_a_rank_that_will_not_come_is_named_with_its_stack(tmp_path: Path) -> None:
    with pytest.raises(RankDied, match="ended with exit code 1 and no answer"):
        run_ranks(dead_lock, 3, tmp_path)
    (report,) = tmp_path.iterdir()  # one rank tells for all
    assert "Stalled" in report.name
    text = report.read_text()
    assert text.startswith("no progress for ")
    assert "rank 1 (starting, 0 steps done) has done nothing" in text
    assert "in dead_lock\n    lock.acquire()  # for ever" in text
    assert "rank 0 waits for a collective (its number 6)" in text
    assert "rank 2 waits for a collective (its number 6)" in text


def work_alone() -> int:
    with ddpkit.runtime(stall_timeout_s=3.0, timeout_s=60) as rt:
        with rt.main_first():
            if rt.is_main:
                time.sleep(7)
        # No rank gets as far as a poll, but collectives are progress too.
        deadline = time.monotonic() + 7
        done = torch.zeros(1)
        while not done:
            done += time.monotonic() > deadline
            dist.all_reduce(done)
            time.sleep(0.3)
        time.sleep(5)  # all of them: nobody waits
    return int(done > 0)


@pytest.mark.slow
def test_ranks_that_wait_for_good_reason_go_on() -> None:
    assert run_ranks(work_alone, 2) == [1, 1]
