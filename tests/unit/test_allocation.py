"""When a stop is asked for because the allocation ends, by a clock of the test's own."""

from __future__ import annotations

import time

import pytest

from ddpkit.allocation import End
from ddpkit.heartbeat import Heartbeat
from ddpkit.slurm import JobState, SlurmFailed
from ddpkit.world import Allocation, allocation


class Controller:
    """Slurm, with a clock; ``ends_at`` None: it does not answer."""

    def __init__(self, ends_at: float | None) -> None:
        self.ends_at = ends_at
        self.now = 0.0
        self.looks: list[float] = []

    def ask(self, job_id: str) -> JobState:
        assert job_id == "7"
        self.looks.append(self.now)
        if self.ends_at is None:
            raise SlurmFailed("no answer")
        return JobState("RUNNING", "None", 0, True, False, self.ends_at)

    def end(self, told: float | None = None) -> End:
        return End(Allocation("7", 0, None, told), self.ask, lambda: self.now)

    def first_stop(self, end: End, until: float = 2000, save_s: float = 0.0, step_s: float = 0.0) -> float | None:
        """The second at which a look every second first asks for a stop."""
        while self.now < until:
            if end.why_now(save_s, step_s) is not None:
                return self.now
            self.now += 1
        return None


def test_the_stop_leaves_time_for_two_saves_and_a_step() -> None:
    controller = Controller(1000)
    assert controller.first_stop(controller.end(told=1000)) == 991
    controller = Controller(1000)
    assert controller.first_stop(controller.end(told=1000), save_s=30, step_s=5.5) == 925
    assert controller.looks == [925]  # nobody was asked before


def test_a_save_that_is_under_way_may_take_as_long_as_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    heartbeat = Heartbeat()
    heartbeat.saved(30.0)
    assert heartbeat.save_left_s == 0
    heartbeat.saving_since = now
    now += 10
    assert heartbeat.save_left_s == 20
    now += 100
    assert heartbeat.save_left_s == 0


def test_without_the_variable_slurm_is_asked_once_and_again_at_the_end() -> None:
    controller = Controller(1000)
    assert controller.first_stop(controller.end()) == 991
    assert controller.looks == [0, 991]


def test_a_job_that_was_extended_goes_on() -> None:
    controller = Controller(1500)
    assert controller.first_stop(controller.end(told=1000)) == 1491
    assert controller.looks == [991, 1491]


def test_one_look_in_a_minute_is_enough() -> None:
    controller = Controller(1005)
    end = controller.end(told=1000)
    assert controller.first_stop(end) == 996
    assert controller.looks == [991]


def test_where_slurm_does_not_answer_what_is_known_has_to_do() -> None:
    controller = Controller(None)
    assert controller.first_stop(controller.end(told=1000)) == 991
    controller = Controller(None)
    assert controller.first_stop(controller.end()) is None
    assert controller.looks == [0]


def test_the_reason_says_when() -> None:
    controller = Controller(1000)
    controller.now = 995
    expected = time.strftime("%H:%M:%S", time.localtime(1000))
    assert controller.end(told=1000).why_now(0, 0) == f"the allocation ends at {expected}"


def test_slurm_s_variable_is_read_with_the_others() -> None:
    found = allocation({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1700000000"})
    assert found is not None and found.ends_at == pytest.approx(1.7e9)
