"""Memory: what cgroups of both kinds say, what ranks held, and how that reads in a report."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch import memory
from launch.causes import explain
from launch.job import Failure, Memory
from launch.memory import WORKER_DIED, Watch, judge, own_groups

GIB = 2**30


def _proc(at: Path, membership: str, mounts: str) -> Path:
    """A proc file system with this process in some cgroup."""
    (at / "self").mkdir(parents=True)
    (at / "self/cgroup").write_text(membership)
    (at / "self/mountinfo").write_text(mounts.format(at=at))
    (at / "vmstat").write_text("nr_free_pages 5\noom_kill 3\n")
    return at


def _v2(at: Path) -> Path:
    """Slurm's hierarchy; a limit on the step's parent, none on the step; the root has no files of this kind."""
    proc = _proc(
        at,
        "0::/system.slice/slurm/job_7/step_0\n",
        "24 1 0:22 / /proc rw - proc proc rw\n30 23 0:26 / {at}/cg rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n",
    )
    step = at / "cg/system.slice/slurm/job_7/step_0"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    (step / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n")
    (step.parent / "memory.max").write_text(f"{2 * GIB}\n")
    (step.parent / "memory.events").write_text("low 0\noom_kill 9\n")
    (step.parents[1] / "memory.max").write_text(f"{4 * GIB}\n")
    return proc


def _v1(at: Path) -> Path:
    """A container that sees its own part of the hierarchy; version 2 is mounted too, without the memory."""
    proc = _proc(
        at,
        "4:memory:/docker/abc/inner\n1:cpu,cpuacct:/docker/abc\n0::/docker/abc\n",
        "31 23 0:29 / {at}/u rw - cgroup2 cgroup2 rw\n"
        "32 31 0:29 /docker/abc {at}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
        "35 31 0:32 /docker/abc {at}/mem rw,relatime - cgroup cgroup rw,memory\n",
    )
    (at / "mem/inner").mkdir(parents=True)
    for group, limit, kills in (("mem/inner", 9223372036854771712, 5), ("mem", GIB, 0)):
        (at / group / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (at / group / "memory.oom_control").write_text(f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")
    return proc


def test_the_innermost_group_counts_and_the_smallest_limit_holds(tmp_path: Path) -> None:
    groups = own_groups(_v2(tmp_path / "two"))
    assert [group.name for group in groups][:2] == ["/system.slice/slurm/job_7/step_0", "/system.slice/slurm/job_7"]
    assert groups[-1].name == "/" and len(groups) == 5
    assert [group.kills() for group in groups] == [1, 9, None, None, None]
    assert [group.limit() for group in groups] == [None, 2 * GIB, 4 * GIB, None, None]
    groups = own_groups(_v1(tmp_path / "one"))
    assert [(group.name, group.kills(), group.limit()) for group in groups] == [("/inner", 5, None), ("/", 0, GIB)]


def test_no_cgroups(tmp_path: Path) -> None:
    assert own_groups(tmp_path) == []
    proc = _proc(tmp_path, "", "24 1 0:22 / /proc rw - proc proc rw\n")
    assert own_groups(proc) == []
    watch = Watch(proc)  # goes by the whole machine's counter
    last = watch.last(1)
    assert (last.ran_out, last.limit, last.limit_of) == (
        False,
        psutil.virtual_memory().total,
        "this machine's memory",
    )
    (proc / "vmstat").write_text("oom_kill 4\n")
    assert watch.ran_out() is True
    (proc / "vmstat").unlink()
    assert watch.ran_out() is None


def _process(proc: Path, pid: int, pages: int, children: str = "") -> None:
    (proc / f"{pid}/task/{pid}").mkdir(parents=True, exist_ok=True)
    (proc / f"{pid}/statm").write_text(f"99999 {pages} 5 1 0 1 0\n")
    (proc / f"{pid}/task/{pid}/children").write_text(children)


@pytest.mark.parametrize("kind", [_v1, _v2])
def test_what_a_rank_held_when_it_held_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    proc = kind(tmp_path)
    monkeypatch.setattr(memory, "_LOOK_EVERY_S", 0.0)
    watch = Watch(proc)
    _process(proc, 10, 100, "11 12 ")
    _process(proc, 11, 1000, "13")
    _process(proc, 12, 2000)
    _process(proc, 13, 5)
    _process(proc, 20, 300)
    watch.look([10, 20])
    (proc / "10/task/10/children").write_text("")  # its workers have been ended; it has not noticed yet
    watch.look([10, 20])
    last = watch.last(10)
    assert (last.held, last.children, last.held_by_children) == (100 * page, 3, 3005 * page)
    assert last.held_by_all == 3405 * page
    assert last.ran_out is False
    assert last.limit == (GIB if kind is _v1 else 2 * GIB)
    assert last.limit_of == (
        "the limit of cgroup /" if kind is _v1 else "the limit of cgroup /system.slice/slurm/job_7"
    )
    events = next(path for path in tmp_path.rglob("memory.[oe]*") if path.parent.name in ("inner", "step_0"))
    events.write_text(
        events.read_text().replace("oom_kill 1\n", "oom_kill 2\n").replace("oom_kill 5\n", "oom_kill 6\n")
    )
    assert watch.last(20).ran_out is True
    assert watch.last(30).held == 0  # nobody had looked


def test_an_old_kill_is_no_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_LOOK_EVERY_S", 0.0)
    proc = _proc(tmp_path, "", "")
    watch = Watch(proc)
    watch.look([])
    (proc / "vmstat").write_text("oom_kill 4\n")
    watch.look([])
    assert watch.ran_out() is True
    for _ in range(memory._RECENT_LOOKS):
        watch.look([])
    assert watch.ran_out() is False


HELD = Memory(3 * GIB, 2, 20 * GIB, 60 * GIB, 64 * GIB, "the limit of cgroup /job_7", 0.4, ran_out=True)
KILLED = Failure(3, "h", 1.0, -signal.SIGKILL, message=explain(-signal.SIGKILL))


def test_out_of_memory_in_words() -> None:
    text = judge(KILLED, HELD).message
    assert text.startswith(
        "SIGKILL: the kernel ended it because memory ran out. 0.4 s before its end the rank held 3072 MiB and its 2 "
        "child process(es) 20.0 GiB, all ranks there 60.0 GiB (what they share counted in each); the limit of cgroup "
        "/job_7 is 64.0 GiB. Give the job more memory, or use less"
    )
    unseen = judge(KILLED, replace(HELD, held=0)).message
    assert "Nobody had looked at what it held; the limit of cgroup /job_7 is 64.0 GiB" in unseen


def test_a_kill_without_that_evidence() -> None:
    text = judge(KILLED, replace(HELD, ran_out=False, children=0)).message
    assert text.startswith(
        "SIGKILL (killed from outside: by a person or another process). 0.4 s before its end the rank"
    )
    assert "held 3072 MiB, all ranks there" in text and "kernel" not in text
    assert "or by the kernel when memory ran out). 0.4 s" in judge(KILLED, replace(HELD, ran_out=None)).message
    assert judge(KILLED, None) == KILLED


def test_only_kills_are_judged() -> None:
    raised = Failure(3, "h", 1.0, 1, "ValueError", "of the user's own")
    assert judge(raised, HELD).message == raised.message
    assert judge(raised, HELD).memory == HELD  # kept all the same
    crashed = Failure(3, "h", 1.0, -signal.SIGSEGV, message=explain(-signal.SIGSEGV))
    assert judge(crashed, HELD).message == crashed.message
    worker = Failure(3, "h", 1.0, 1, WORKER_DIED, f"the loader worker with pid 5 was ended by {explain(-9)}")
    assert judge(worker, HELD).message.startswith(
        "the loader worker with pid 5 was ended by SIGKILL: the kernel ended it because memory ran out. 0.4 s before"
    )
    assert judge(
        replace(worker, message="the loader worker with pid 5 ended its process with exit code 3"), HELD
    ).message.endswith("code 3")


def test_a_failure_survives_the_way_to_the_launcher() -> None:
    failure = replace(KILLED, memory=HELD, last_lines=("one", "two"), exception=b"\x00x")
    assert Failure.from_json(failure.to_json()) == failure
