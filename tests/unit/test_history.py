"""Where a run stands, where its time went and when it ends, of made-up run directories."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddpkit.checkpoint import listing, manifest
from ddpkit.checkpoint.manifest import FORMAT, Manifest
from ddpkit.errors import UserError
from launch import accounting, history, telling
from launch.status import Status, read_status, to_json
from tests.histories import START, History
from tests.launch.shell import ROOT


def checkpoint(run_dir: Path, step: int, **progress: Any) -> None:
    path = listing.checkpoints_directory(run_dir) / listing.step_name(step)
    path.mkdir(parents=True)
    made = Manifest(FORMAT, step, 2, {"step": step, "epoch": 0, "evaluated": -1, **progress}, None, (None, None), ())
    (path / manifest.NAME).write_bytes(manifest.to_bytes(made))


@pytest.fixture
def past(tmp_path: Path) -> History:
    """Killed at step 57, on at step 50, stopped at 100: its lines are of the steps that survive."""
    made = History(tmp_path)
    made.attempt(0, 0, 16, how="rank 1 was killed", exit_code=1)
    made.event("started", 0, 4, step=0, world_size=2)
    made.attempt(1, 26, 40, how="stopped on request (SIGTERM)", exit_code=75)
    made.event("restored", 1, 28, step=50, world_size=2)
    for step in range(10, 60, 10):
        made.train(step, at=4 + step * 0.1)
    for step in range(60, 110, 10):
        made.train(step, at=28 + (step - 50) * 0.2, step_s=0.2)
    made.evaluate(100, at=39.5, seconds=1.5)
    made.event("stopped", 1, 40, step=100, reason="SIGTERM")
    checkpoint(tmp_path, 100)
    return made


def parts(status: Status) -> list[float]:
    account = status.account
    assert account is not None
    assert sum(seconds for _, seconds in telling.parts(account)) == pytest.approx(account.wall_s)
    return [round(seconds, 3) for _, seconds in telling.parts(account)]


def test_goodput_is_the_time_in_steps_that_survive_over_all_time(past: History) -> None:
    status = read_status(past.write())
    assert status.state == "stopped"
    assert status.account is not None and status.account.wall_s == 40
    # 50 steps of 0.1 s, 50 of 0.2 s; 4 + 2 s to start; 10 s between; what is left was redone, or is an end.
    assert parts(status) == [15.0, 1.5, 0.5, 6.0, 10.0, 7.0]
    assert status.goodput == pytest.approx(15 / 40)
    assert status.slowest_phase == "forward_backward_s"
    assert [(each["from_step"], each.get("to_step")) for each in status.attempts] == [(0, None), (50, 100)]
    text = telling.describe(status)
    assert "goodput: 38%; of 40 s since the first start:" in text
    assert "slowest phase: forward and backward passes (" in text
    assert "attempt 0: 2 ranks, local: rank 1 was killed (from step 0, 16 s)" in text
    assert "attempt 1: 2 ranks, local: stopped on request (SIGTERM) (from step 50 to 100, 14 s)" in text
    assert "checkpoint 100: intact" in text


@pytest.mark.parametrize(("saved", "steps_s"), [(100, 15.0), (73, 5 + 23 * 0.2), (50, 5.0), (7, 0.7), (None, 0.0)])
def test_steps_after_the_checkpoint_at_which_it_would_go_on_do_not_count(
    past: History, saved: int | None, steps_s: float
) -> None:
    """The steps between a line and the checkpoint do, as long as those of the line after it took."""
    (past.run_dir / "checkpoints").rename(past.run_dir / "before")
    if saved is not None:
        checkpoint(past.run_dir, saved)
    account = read_status(past.write()).account
    assert account is not None and account.steps_s == pytest.approx(steps_s)


def test_while_it_runs_all_that_is_recorded_counts_and_time_goes_on(
    past: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "now", lambda: START + 60)
    past.attempt(1, 26, host=socket.gethostname(), pid=os.getpid())
    past.train(110, at=42, step_s=0.2)
    past.train(120, at=44, step_s=0.2)
    status = read_status(past.write())
    assert (status.state, status.step) == ("starting", 120)  # nobody holds a claim here
    assert parts(status) == [19.0, 1.5, 0.5, 6.0, 10.0, 23.0]
    # 880 steps at the pace of this attempt, from the line of 60 on to that of 120, evaluation included.
    assert status.eta_s == pytest.approx(880 * (44 - 30) / 60 - 16)
    assert (status.max_steps, status.total_steps, status.recorded_at) == (None, 1000, START + 44)
    assert "[###---------------------------] 12 %" in telling.describe(status)


def test_queued_again_it_waits_and_the_wait_counts(past: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "now", lambda: START + 140)
    fields = {"launcher": "slurm", "job": "17", "how": "stopped on request (SIGUSR2)", "exit_code": 75}
    past.attempt(1, 26, 40, requeued="preempted", **fields)
    past.event("requeued", 1, 40, step=100, reason="preempted")
    status = read_status(past.write())
    assert (status.state, status.job) == ("queued again", "17")
    assert parts(status) == [15.0, 1.5, 0.5, 6.0, 110.0, 7.0]
    text = telling.describe(status)
    assert (
        ": queued again, step 100 of 1000, epoch 1, 3200 samples, waits for Slurm job 17\n" in text
        and "queued again (preempted)" in text
    )
    assert "to the end" not in text  # nobody knows how long it waits


def test_the_job_that_it_waits_for(past: History) -> None:
    folder = past.write() / "slurm/submission-0"
    folder.mkdir(parents=True)
    script = folder / "31_submission.sh"
    script.touch()
    status = read_status(past.run_dir)
    assert (status.state, status.job) == ("submitted", "31")
    os.utime(script, (START + 20, START + 20))  # the one whose attempts these are
    assert read_status(past.run_dir).state == "stopped"
    os.utime(script, (START + 50, START + 50))
    assert read_status(past.run_dir).state == "submitted"
    (folder / "outcome.json").touch()
    assert read_status(past.run_dir).state == "stopped"


def test_a_loop_of_ones_own_that_others_have_started_has_its_events_alone(tmp_path: Path) -> None:
    made = History(tmp_path)
    made.event("started", 0, 0, step=0, world_size=4)
    made.event("saved", 0, 7, step=60)
    made.event("failed", 0, 8, step=64, cause="ValueError: no")
    made.event("restored", 1, 10, step=60, world_size=2)
    for step in range(10, 110, 10):
        made.train(step, at=step / 5)
    status = read_status(made.write())
    assert status.state == "interrupted"
    assert [each.get("how") for each in status.attempts] == ["ValueError: no", None]
    text = telling.describe(status)
    assert "attempt 0: 4 ranks: ValueError: no (from step 0 to 64, 8 s)" in text
    assert "attempt 1: 2 ranks: no end was noted (from step 60)" in text
    made.event("finished", 1, 20, step=100)
    checkpoint(tmp_path, 100)
    assert read_status(made.write()).state == "finished"


def test_half_written_and_empty_directories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run in it"):
        read_status(tmp_path)
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts/attempt-0.json").touch()
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "st')
    with pytest.raises(UserError, match="there is no run in it"):
        read_status(tmp_path)
    (tmp_path / "events.jsonl").write_text('{"event": "started", "attempt": 0}\n[3]\n{"event": 4}\n{"event": "sto')
    status = read_status(tmp_path)
    assert (status.state, status.step, status.eta_s, status.goodput) == ("interrupted", 0, None, None)
    (tmp_path / "config.yaml").write_text("run_dir: [")
    (tmp_path / "failure.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 3, "time": {}}\n{"kind": 3}\n{"kind": "train", "step": 4, "time": 5}\nnull\n'
    )
    status = read_status(tmp_path)
    assert status.step == 3 and "config.yaml cannot be read" in telling.describe(status)
    assert json.loads(to_json(status))["notes"] == status.notes


def test_of_a_long_file_only_the_end_is_read(past: History) -> None:
    path = past.write() / "metrics.jsonl"
    with path.open("rb+") as file:
        lines = file.read()
        file.seek(1 << 40)  # a hole, which takes neither room nor time unless somebody reads it
        file.write(b"\n" + lines)
    assert read_status(past.run_dir).goodput == pytest.approx(15 / 40)


def test_as_much_of_the_file_is_read_as_the_checkpoint_is_old(tmp_path: Path) -> None:
    made = History(tmp_path)
    made.event("started", 0, 0, step=0, world_size=2)
    for step in range(1, 2001):
        made.train(step, at=step * 0.1, steps=1)
    checkpoint(tmp_path, 9)
    made.write()
    assert len(history.newest_lines(tmp_path / "metrics.jsonl")) < 1000
    account = read_status(tmp_path).account
    assert account is not None and account.steps_s == pytest.approx(0.9)


def test_nothing_that_a_run_has_written_reaches_the_terminal_as_a_command(past: History) -> None:
    past.attempt(1, 26, 40, how="\x1b]0;mine\x07\rfine\nnext \udc80 \u202e", exit_code=1)
    (past.run_dir / "failure.json").write_text(json.dumps({"rank": 0, "host": "\x1b[2J", "message": "\x9bX"}))
    text = telling.describe(read_status(past.write()))
    assert "attempt 1: 2 ranks, local: ?]0;mine? fine next ? ? (" in text and "on ?[2J: ?X" in text
    assert all(char.isprintable() for line in text.split("\n") for char in line)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0421, "0.0421 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (18120, "5 h 2 min"),
        (86400 * 40 + 7300, "40 d 2 h"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert telling.duration(seconds) == words


def test_many_attempts_are_counted_and_the_newest_shown(tmp_path: Path) -> None:
    made = History(tmp_path)
    for number in range(40):
        made.attempt(number, number * 10, number * 10 + 5, how="stopped", exit_code=75, requeued="preempted")
    text = telling.describe(read_status(made.write()))
    assert "40 attempts, 40 of them queued again by Slurm; the newest:" in text
    assert text.count("\nattempt ") == 10 and "attempt 39:" in text


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    """``ddpkit status RUN_DIR --json | head``, of more than a pipe holds."""
    made = History(tmp_path)
    for number in range(300):
        made.attempt(number, number, number + 1, how="x" * 500, exit_code=0)
    made.write()
    command = [sys.executable, "-m", "ddpkit", "status", str(tmp_path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"{\n"
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (0, b"")


def test_the_page_names_every_key(tmp_path: Path) -> None:
    table = (ROOT / "docs/watching.md").read_text().partition("| key |")[2].partition("## Goodput")[0]
    keys = {
        key for row in table.splitlines() for key in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row else "")
    }
    assert keys | {"run_dir", "ended_early"} == set(Status.__dataclass_fields__)


def test_a_pace_of_one_line_and_of_none() -> None:
    line = {"kind": "train", "step": 10, "time": {"unix": 5.0, "step_s": 0.25}}
    assert accounting.pace([line], since=None) == 0.25
    assert accounting.pace([line], since=9.0) == 0.25  # of the attempt before
    assert accounting.pace([{**line, "kind": "eval"}], since=None) is None
