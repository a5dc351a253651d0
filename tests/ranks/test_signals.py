"""Signals that ask for a stop: seen wherever the main thread is, and by nobody whom they do not concern."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ddpkit
from ddpkit.errors import StopRequested
from ddpkit.stop import Requests
from ddpkit.testing import run_ranks
from ddpkit.world import Allocation, World
from tests.launch.shell import wait_for


def _sleeps(pid: int) -> bool:
    """Whether the process's main thread waits for something."""
    return Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def signal_to_a_rank_in_a_collective() -> tuple[int, str | None]:
    with ddpkit.runtime(timeout_s=60) as rt:
        pids = rt.ranks.exchange("pids", os.getpid())
        done = 0
        while (reason := rt.stop.poll()) is None:
            if rt.is_main and done == 3:  # a long step: rank 1 waits for this one's part
                wait_for(lambda: _sleeps(pids[1]), "rank 1 in the collective")
                time.sleep(0.1)
                os.kill(pids[1], signal.SIGTERM)
                # Nothing moves rank 1's main thread before this rank comes to the collective.
                wait_for(lambda: rt.store.check(["stop/last"]), "the decision", within_s=15)
            dist.all_reduce(torch.ones(1))
            done += 1
        return done, reason


def test_a_rank_deep_in_a_collective_sees_its_signal() -> None:
    assert run_ranks(signal_to_a_rank_in_a_collective, 2) == [(4, "SIGTERM")] * 2


def signal_to_a_child() -> list[bool]:
    with ddpkit.runtime(timeout_s=60) as rt:
        (born, bear), (told, tell) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.write(bear, b"!")
            os.read(told, 1)  # the signal comes meanwhile, and is survived
            os._exit(3)
        os.read(born, 1)
        os.kill(child, signal.SIGTERM)
        os.write(tell, b"!")
        _, status = os.waitpid(child, 0)
        rt.barrier("signalled")
        return [os.waitstatus_to_exitcode(status) == 3, rt.stop.is_requested]


def test_a_forked_child_s_signal_is_not_its_rank_s() -> None:
    assert run_ranks(signal_to_a_child, 2) == [[True, False]] * 2


def test_an_event_loop_keeps_its_signals() -> None:
    async def script() -> list[str]:
        seen: list[str] = []
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, seen.append, "USR1")
        with ddpkit.runtime() as rt:
            os.kill(os.getpid(), signal.SIGUSR1)
            deadline = time.monotonic() + 10
            while not seen and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append(str(rt.stop.poll()))
        os.kill(os.getpid(), signal.SIGUSR1)
        while len(seen) < 3 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return seen

    assert asyncio.run(script()) == ["USR1", "SIGTERM", "USR1"]


def test_signals_are_left_as_they_were_found() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.getsignal(signal.SIGTERM)
    found = signal.set_wakeup_fd(write)
    try:
        with Requests():
            assert signal.getsignal(signal.SIGTERM) != before
        assert signal.getsignal(signal.SIGTERM) == before
        assert signal.set_wakeup_fd(-1) == write
        with Requests():
            assert signal.set_wakeup_fd(write) not in (-1, write)  # a script sets one of its own, for good
        assert signal.set_wakeup_fd(-1) == write
    finally:
        signal.set_wakeup_fd(found)
        os.close(read)
        os.close(write)


def test_the_warning_signal_is_a_request_under_slurm_alone() -> None:
    job = Allocation("7", 0, None, ends_at=time.time() + 3600)
    inside = World(allocation=job, has_launcher=True)
    with ddpkit.runtime(world=inside) as rt:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert rt.stop.poll() == "SIGUSR2"
    os.kill(os.getpid(), signal.SIGUSR2)  # it comes late: the work is done, and what is left of the script goes on
    with ddpkit.runtime(world=inside, warning_signal="HUP") as rt:
        os.kill(os.getpid(), signal.SIGHUP)
        assert rt.stop.poll() == "SIGHUP"
    caught: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: caught.append(number))
    try:
        with ddpkit.runtime() as rt:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert rt.stop.poll() is None and caught == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)
    with pytest.raises(ddpkit.UserError, match="warning_signal='KILL'; choose USR1, USR2 or HUP"):
        ddpkit.runtime(warning_signal="KILL")


def stop_in_main_first() -> str:
    with ddpkit.runtime(timeout_s=60) as rt:
        pids = rt.ranks.exchange("pids", os.getpid())
        try:
            with rt.main_first():
                assert rt.is_main, "rank zero has stopped in between"
                os.kill(pids[1], signal.SIGTERM)  # while it waits for this block
                wait_for(lambda: rt.store.check(["stop/last"]), "the decision", within_s=15)
        except StopRequested as stop:
            return f"stopped in main_first: {stop.reason}"
        return "went on"


def test_ranks_agree_on_a_stop_while_one_waits_for_rank_zero() -> None:
    assert run_ranks(stop_in_main_first, 3) == ["stopped in main_first: SIGTERM"] * 3


def stop_before_the_group() -> str:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # as a launcher's rank is born
    if os.environ["RANK"] == "1":
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # to the thread that blocks it
    try:
        with ddpkit.runtime(timeout_s=60) as rt:
            while True:
                rt.stop_before_the_run()
                dist.all_reduce(torch.ones(1))
    except StopRequested as stop:
        return stop.reason


def test_a_stop_that_comes_before_the_group_is_one_of_all_ranks() -> None:
    assert run_ranks(stop_before_the_group, 2) == ["SIGTERM"] * 2
