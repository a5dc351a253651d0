"""Ranks as their launcher sees them: what is said of their ends, of those that leave, and of those that do not."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from launch.job import BEGUN, DONE, STOPPED, Failure, Memory, RankOrder
from launch.memory import PERHAPS_THE_KERNEL, WORKER_DIED
from launch.patience import Patience, unfinished
from launch.ranks import Rank
from launch.requests import Requests
from launch.supervise import Node


def _rank(*reached: str) -> Rank:
    rank = Rank(1, RankOrder(1, {}, "", 0, 0, 0, 0), {})
    for each in reached:
        assert not rank.hear(json.dumps({"reached": each}).encode() + b"\n")
    return rank


def _ended(status: int, *reached: str, is_run: bool) -> Rank:
    rank = _rank(*reached)
    rank.end({"status": status, "when": 7.0, "memory": None}, is_run)
    return rank


@pytest.mark.parametrize(
    ("status", "reached", "words"),
    [
        (0, (BEGUN, DONE), None),
        (75, (BEGUN, STOPPED), None),
        (0, (BEGUN,), "left with exit code 0 before the run was done"),
        (75, (BEGUN,), "left with exit code 75 before the run was done"),
        (3, (BEGUN,), "exit code 3"),
    ],
)
def test_a_rank_of_a_run_leaves_when_it_is_done_or_stopped(
    status: int, reached: tuple[str, ...], words: str | None
) -> None:
    rank = _ended(status, *reached, is_run=True)
    assert rank.has_failed == (words is not None)
    assert words is None or rank.failure_of_its_end().message == words


@pytest.mark.parametrize("status", [0, 75])
def test_a_rank_of_a_script_may_leave(status: int) -> None:
    rank = _ended(status, is_run=False)
    assert not rank.has_failed and rank.has_left and not rank.has_stopped
    left = rank.failure_of_leaving()
    assert left.message == f"left with exit code {status} while others were still at work"
    assert left.when < 7.0  # its end is seen after that of those who lose their connection by it
    rank.hear(b'{"leaves": 5.0, "code": %d}\n' % status)
    assert rank.failure_of_leaving().when == 5.0
    assert not _rank().has_left


@pytest.mark.parametrize("status", [0, 75])
def test_a_rank_that_was_ended_while_its_interpreter_came_to_its_end_has_left(status: int) -> None:
    rank = _rank()
    rank.hear(b'{"leaves": 5.0, "code": %d}\n' % status)
    rank.was_ended = True
    rank.end({"status": -signal.SIGKILL, "when": 7.0, "memory": None}, is_run=False)
    assert rank.has_left and not rank.has_failed
    left = rank.failure_of_leaving()
    assert (left.message, left.when) == (f"left with exit code {status} while others were still at work", 5.0)
    rank.begin()
    rank.end({"status": -signal.SIGKILL, "when": 9.0, "memory": None}, is_run=False)
    assert rank.has_failed  # the next attempt's has said nothing


def test_a_worker_s_death_is_explained_also_where_its_rank_was_ended_on_its_way_out() -> None:
    told = "the loader worker with pid 7 was ended by SIGKILL (killed from outside: by a person or another process"
    rank = _rank()
    rank.failure = Failure(1, "here", 6.0, 1, kind=WORKER_DIED, message=f"{told}{PERHAPS_THE_KERNEL})")
    rank.was_ended = True
    memory = Memory(5 << 20, 1, 9 << 20, 14 << 20, 20 << 20, "this machine's memory", 0.4, ran_out=True)
    rank.end({"status": -signal.SIGKILL, "when": 7.0, "memory": vars(memory)}, is_run=False)
    message = Node(2, "warm", {})._failure_of(rank).message
    assert "was ended by SIGKILL: the kernel ended it because memory ran out. 0.4 s before" in message


STACKS = """\
Thread 0x1 (most recent call first):
  File "/lib/threading.py", line 331 in wait

Current thread 0x2 (most recent call first):
  File "{innermost}", line 12 in {name}
{imports}  File "/ddpkit/launch/rank.py", line 70 in run
"""
IMPORTS = """\
  File "/home/own/slow.py", line 3 in <module>
  File "<frozen importlib._bootstrap>", line 241 in _call_with_frames_removed
  File "/ddpkit/references.py", line 9 in resolve
"""


@pytest.mark.parametrize(
    ("stacks", "reached", "words"),
    [
        (("/home/own/slow.py", "read", IMPORTS), (), "still starting, importing, at /home/own/slow.py, line 3"),
        (("/home/own/slow.py", "read", IMPORTS), (BEGUN,), "it was importing, at /home/own/slow.py, line 3"),
        (("/home/own/steps.py", "step", ""), (BEGUN,), "stuck, or its step or save took too long"),
        (None, (), "it did not say where it is; it had hardly started, or it is stopped"),
        (None, (BEGUN,), "stuck, or its step or save took too long"),
    ],
)
def test_what_is_said_of_a_rank_that_does_not_stop(
    stacks: tuple[str, str, str] | None, reached: tuple[str, ...], words: str
) -> None:
    rank = _rank(*reached)
    if stacks is not None:
        rank.stacks = STACKS.format(innermost=stacks[0], name=stacks[1], imports=stacks[2]).encode()
    failure = unfinished(rank, "asked to stop (preempted), and did not in time")
    assert failure.message == f"asked to stop (preempted), and did not in time: {words}"
    assert failure.exit_code == -signal.SIGKILL and failure.traceback == rank.stacks.decode()


def test_a_rank_that_waits_for_those_that_do_not_stop_is_not_the_cause() -> None:
    rank = _rank(BEGUN)
    rank.stacks = STACKS.format(innermost="/torch/distributed/c10d.py", name="all_reduce", imports="").encode()
    assert unfinished(rank, "why").is_consequence


def test_the_time_that_is_left_is_asked_for_once() -> None:
    patience, asked = Patience(), []

    def ask(name: str) -> tuple[str, float]:
        asked.append(name)
        return "preempted", -1.0

    patience.time_left = ask
    assert patience.over() is None
    patience.asked("SIGTERM")
    patience.asked("SIGTERM")
    while (why := patience.over()) is None:
        pass
    assert why == "asked to stop (preempted), and did not in time"
    assert asked == ["SIGTERM"] and patience.over() is None


def test_asking_again_is_meant_where_a_person_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("launch.requests.time.monotonic", lambda: now)

    def taken(requests: Requests, *numbers: int) -> list[Any]:
        for number in numbers:
            requests.add(number)
        return list(requests.take())

    requests = Requests()
    assert taken(requests) == []
    assert taken(requests, signal.SIGTERM, signal.SIGTERM) == [(signal.SIGTERM, False)] * 2  # a cluster manager
    assert (requests.first, requests.insisted) == ("SIGTERM", False)
    now += 3.0
    assert taken(requests, signal.SIGTERM) == [(signal.SIGTERM, True)] and requests.insisted
    requests.close()
    requests = Requests()
    assert taken(requests, signal.SIGTERM, signal.SIGINT) == [(signal.SIGTERM, False), (signal.SIGINT, True)]
    assert requests.first == "SIGINT"
    requests.close()
    requests = Requests()
    requests.insistent = frozenset()
    assert taken(requests, signal.SIGINT, signal.SIGINT) == [(signal.SIGINT, False)] * 2
    requests.close()
