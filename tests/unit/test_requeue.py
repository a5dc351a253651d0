"""Whether a Slurm job that has stopped comes back: by what Slurm says in each of the cases that were measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddpkit import requeue, slurm
from ddpkit.errors import NoProgress
from ddpkit.slurm import JobState, SlurmFailed
from ddpkit.world import Allocation

RUNNING = JobState("RUNNING", "None", restarts=1, is_requeueable=True, is_preempted=False, ends_at=2000.0)
IN_GRACE = replace(RUNNING, is_preempted=True)
SECOND_START = Allocation(job_id="7", restart_count=1, array_index=None)


@pytest.mark.parametrize(
    ("state", "signal_name", "expected"),
    [
        (IN_GRACE, "SIGTERM", "preempted"),
        (IN_GRACE, "SIGUSR2", "preempted"),  # preempt_send_user_signal
        (replace(IN_GRACE, state="COMPLETING"), "SIGTERM", "preempted"),  # PreemptMode=CANCEL
        (replace(IN_GRACE, state="COMPLETING", restarts=2), "SIGTERM", "already"),  # the grace time is over
        (RUNNING, "SIGUSR2", "time limit"),
        (RUNNING, None, "time limit"),
        (replace(RUNNING, state="SIGNALING"), "SIGUSR2", "time limit"),  # other nodes have not been told yet
        (replace(RUNNING, state="SIGNALING"), "SIGTERM", "asked"),
        (replace(RUNNING, state="COMPLETING", reason="TimeLimit"), "SIGTERM", "time limit"),
        (replace(RUNNING, state="TIMEOUT"), "SIGTERM", "time limit"),
        (replace(RUNNING, state="COMPLETING"), "SIGTERM", "cancelled"),
        (replace(RUNNING, state="CANCELLED"), "SIGUSR2", "cancelled"),
        (replace(RUNNING, state="COMPLETING"), None, "cancelled"),
        (replace(RUNNING, state="COMPLETING", restarts=2), "SIGTERM", "already"),  # scontrol requeue, a lost node
        (replace(RUNNING, state="PENDING", restarts=2), "SIGUSR2", "already"),
        (RUNNING, "SIGTERM", "asked"),  # scancel -s TERM
        (RUNNING, "SIGINT", "asked"),
        (RUNNING, requeue.LOST_NODE, "node lost"),
        (RUNNING, requeue.LOST_STEP, "step lost"),
        (IN_GRACE, requeue.LOST_STEP, "preempted"),
    ],
)
def test_why_a_job_stops(state: JobState, signal_name: str | None, expected: str) -> None:
    assert requeue.why(state, SECOND_START, signal_name, "USR2") == expected


def test_the_warning_signal_is_the_one_that_was_chosen() -> None:
    assert requeue.why(RUNNING, SECOND_START, "SIGHUP", "HUP") == "time limit"
    assert requeue.why(RUNNING, SECOND_START, "SIGUSR2", "HUP") == "asked"


class _Slurm:
    """Slurm's answers, and what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, state: JobState | None) -> None:
        self.asked: list[Any] = []
        self._state = state
        monkeypatch.setattr(slurm, "job_state", self._job_state)
        monkeypatch.setattr(slurm, "requeue", lambda job_id: self.asked.append(("requeue", job_id)))

    def _job_state(self, job_id: str) -> JobState:
        assert job_id == "7"
        if self._state is None:
            raise SlurmFailed("`scontrol show job`: no answer")
        return self._state

    def stop(self, step: int, run_dir: Path | None, signal_name: str | None = "SIGUSR2", restarts: int = 1) -> Any:
        """What a run does that was stopped and has saved ``step``."""

        def note(step: int, reason: str) -> None:
            self.asked.append(("note", step, reason))
            if run_dir is not None:
                with (run_dir / "events.jsonl").open("a") as file:
                    file.write(json.dumps({"event": "requeued", "step": step, "reason": reason}) + "\n")

        return requeue.ask(
            SECOND_START._replace(restart_count=restarts),
            signal_name=signal_name,
            warning_signal="USR2",
            run_dir=run_dir,
            step=step,
            max_idle=3,
            note=note,
        )


def test_it_is_written_down_before_slurm_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    controller = _Slurm(monkeypatch, RUNNING)
    assert controller.stop(5, tmp_path) == "time limit"
    assert controller.asked == [("note", 5, "time limit"), ("requeue", "7")]


@pytest.mark.parametrize(
    ("state", "signal_name", "said"),
    [
        (RUNNING, "SIGTERM", "asked"),
        (replace(RUNNING, state="COMPLETING"), "SIGTERM", "cancelled"),
        (replace(RUNNING, restarts=2), "SIGUSR2", "already"),
        (replace(IN_GRACE, is_requeueable=False), "SIGTERM", "preempted"),
        (None, "SIGTERM", None),
    ],
)
def test_what_slurm_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: JobState | None, signal_name: str, said: str | None
) -> None:
    controller = _Slurm(monkeypatch, state)
    assert controller.stop(5, tmp_path, signal_name) == said
    assert controller.asked == []


def test_a_job_that_gets_nowhere_stops_coming_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    controller = _Slurm(monkeypatch, RUNNING)
    for step in (2, 5, 5, 5):  # at 5 for the third time
        controller.stop(step, tmp_path)
    with pytest.raises(NoProgress, match=r"job 7 .* 3 times in a row \(launch.max_idle_requeues\).* step 5"):
        controller.stop(5, tmp_path)
    with pytest.raises(NoProgress):
        controller.stop(4, tmp_path)  # further back is no progress either
    asked = len(controller.asked)
    assert controller.stop(6, tmp_path) == "time limit"
    assert len(controller.asked) == asked + 2


def test_half_a_line_in_the_events_counts_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "requeued", "step": 5}\n\n[1]\n{"event": "requ\n')
    assert requeue.idle_requeues(tmp_path, 5) == 1
    assert requeue.idle_requeues(tmp_path, 6) == 0
    assert requeue.idle_requeues(tmp_path / "missing", 0) == 0


def test_before_there_is_a_run_directory_restarts_are_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = _Slurm(monkeypatch, RUNNING)
    assert controller.stop(0, None, restarts=2) == "time limit"
    controller = _Slurm(monkeypatch, replace(RUNNING, restarts=9))
    with pytest.raises(NoProgress):
        controller.stop(0, None, restarts=9)
    controller = _Slurm(monkeypatch, replace(IN_GRACE, restarts=9))
    assert controller.stop(0, None, "SIGTERM", restarts=9) == "preempted"
