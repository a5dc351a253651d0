from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddpkit.checkpoint import claim
from ddpkit.checkpoint.claim import Claim, Claimant, Place, Process, acquire, holder
from ddpkit.errors import Superseded, UserError

ELSEWHERE = Place("node9", "another-boot", "pid:[1]")


def elsewhere(**fields: Any) -> Claimant:
    return Claimant(ELSEWHERE, Process(1, 1), **fields)


def age(run_dir: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(run_dir / claim.NAME, (then, then))


def take_and_forget(run_dir: Path, claimant: Claimant) -> Claim:
    """A claim whose holder does not beat, as one on another host that was killed."""
    return acquire(run_dir, claimant)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "100"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def claimant_of(process: subprocess.Popen[bytes], **fields: Any) -> Claimant:
    return Claimant(Place.here(), Process.running(process.pid), **fields)


def test_a_claim_is_a_readable_file_that_goes_with_its_holder(tmp_path: Path) -> None:
    me = Claimant.here(launcher_pid=os.getppid(), job_id="17", restart_count=2)
    with acquire(tmp_path / "new" / "run", me) as mine:
        mine.check()
        document = json.loads((tmp_path / "new" / "run" / claim.NAME).read_text())
        assert document["claimant"]["process"]["pid"] == os.getpid()
        assert document["claimant"]["job_id"] == "17"
        found = holder(tmp_path / "new" / "run", replace(me, job_id="18"))
        assert found is not None and found.claimant == me and found.token == mine.token
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == [".claim.lock"]
    mine.release()  # again: nothing happens
    assert not any(thread.name == "ddpkit-claim" for thread in threading.enumerate())


def test_a_living_holder_refuses_at_once_and_is_named(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    acquire(tmp_path, claimant_of(sleeper, job_id="41"))
    with pytest.raises(UserError) as error:
        acquire(tmp_path, Claimant.here(), wait_s=1000)
    message = str(error.value)
    for text in (str(tmp_path), f"process {sleeper.pid}", Place.here().host, "since 20", "job 41", "stop it"):
        assert text in message
    assert holder(tmp_path, Claimant.here()) is not None


def test_a_thread_of_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with acquire(tmp_path, Claimant.here()), pytest.raises(UserError, match=f"process {os.getpid()} "):
        acquire(tmp_path, Claimant.here())


def test_a_killed_holder_does_not_block_and_neither_does_its_zombie(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    acquire(tmp_path, claimant_of(sleeper))
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
    assert holder(tmp_path, Claimant.here()) is None
    with acquire(tmp_path, Claimant.here(), wait_s=0) as mine:
        mine.check()


def test_a_stopped_holder_still_holds(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    acquire(tmp_path, claimant_of(sleeper))
    sleeper.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError):
        acquire(tmp_path, Claimant.here())


def test_another_process_with_the_same_pid_does_not_block(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    reused = claimant_of(sleeper)
    acquire(tmp_path, replace(reused, process=replace(reused.process, start=reused.process.start - 1)))
    acquire(tmp_path, Claimant.here(), wait_s=0).release()


def test_a_process_name_with_parentheses_is_read_right(tmp_path: Path) -> None:
    odd = tmp_path / "a) S (b"
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([odd, "100"]) as process:
        try:
            found = Process.running(process.pid)
            seen = [found.alive]
        finally:
            process.kill()
    seen += [found.alive, Process.running(process.pid).alive]
    assert seen == [True, False, False]
    assert found.start > 0


def test_one_whose_launcher_died_is_waited_for(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    going_down = claimant_of(sleeper, launcher=Process(1, -1))
    acquire(tmp_path, going_down)
    assert holder(tmp_path, Claimant.here()) is None
    with pytest.raises(UserError, match=f"launcher has died.*kill {sleeper.pid}"):
        acquire(tmp_path, Claimant.here(), wait_s=0.2)
    timer = threading.Timer(0.3, sleeper.kill)
    timer.start()
    with acquire(tmp_path, Claimant.here(), wait_s=30):
        pass
    timer.join()


def test_another_host_blocks_until_it_has_been_silent_for_a_minute(tmp_path: Path) -> None:
    theirs = take_and_forget(tmp_path, elsewhere())
    age(tmp_path, 50)
    with pytest.raises(UserError, match=r"host node9 .*last sign of life was 5\d s ago"):
        acquire(tmp_path, Claimant.here(), wait_s=1000)
    assert holder(tmp_path, Claimant.here()) is not None
    theirs.beat()
    assert time.time() - (tmp_path / claim.NAME).stat().st_mtime < 40
    age(tmp_path, 61)
    assert holder(tmp_path, Claimant.here()) is None
    with acquire(tmp_path, Claimant.here()) as mine:
        mine.check()
        with pytest.raises(Superseded, match=str(os.getpid())):
            theirs.check()


def test_the_age_of_a_claim_is_taken_by_the_file_servers_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_and_forget(tmp_path, elsewhere())
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)  # this host's clock is an hour ahead
    with pytest.raises(UserError, match="node9"):
        acquire(tmp_path, Claimant.here())


def test_another_container_on_this_host_is_another_place(tmp_path: Path) -> None:
    # Its pids mean nothing here: that this one is dead must not free the claim.
    acquire(tmp_path, Claimant(replace(Place.here(), pid_namespace="pid:[1]"), Process(2**30, 1)))
    with pytest.raises(UserError, match="last sign of life"):
        acquire(tmp_path, Claimant.here())


def test_a_later_restart_of_the_job_takes_over_at_once_and_an_earlier_one_never(tmp_path: Path) -> None:
    first = take_and_forget(tmp_path, elsewhere(job_id="17", restart_count=0))
    again = Claimant.here(job_id="17", restart_count=1)
    assert holder(tmp_path, again) is None
    with acquire(tmp_path, again, wait_s=0) as second:
        with pytest.raises(Superseded, match="job 17 restart 1"):
            first.check()
        age(tmp_path, 1000)
        with pytest.raises(Superseded, match="later restart"):
            acquire(tmp_path, elsewhere(job_id="17", restart_count=0))
        with pytest.raises(UserError):
            acquire(tmp_path, Claimant.here(job_id="17", restart_count=1))
        with pytest.raises(UserError):
            acquire(tmp_path, Claimant.here(job_id="18", restart_count=5))
        second.check()
        first.release()  # leaves what is not its own
        second.check()


def test_the_fence_notices_a_claim_that_is_gone_or_damaged(tmp_path: Path) -> None:
    with acquire(tmp_path, Claimant.here()) as mine:
        (tmp_path / claim.NAME).write_text("garbage")
        with pytest.raises(Superseded, match="unreadable"):
            mine.check()
        (tmp_path / claim.NAME).unlink()
        with pytest.raises(Superseded, match="is gone"):
            mine.check()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"token": 1}', '{"claimant": 3}', "[" * 99_999])
def test_a_claim_file_that_cannot_be_read_counts_by_its_age(content: str, tmp_path: Path) -> None:
    (tmp_path / claim.NAME).write_text(content)
    with pytest.raises(UserError, match=r"claim\.json is not a claim.*remove that file"):
        acquire(tmp_path, Claimant.here())
    age(tmp_path, 61)
    acquire(tmp_path, Claimant.here()).release()


def test_the_heartbeat_reaches_our_own_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_BEAT_S", 0.01)
    path = tmp_path / claim.NAME
    with acquire(tmp_path, Claimant.here()):
        age(tmp_path, 1000)
        deadline = time.monotonic() + 20
        while time.time() - path.stat().st_mtime > 500:
            assert time.monotonic() < deadline, "no heartbeat came"
            time.sleep(0.01)
        other = tmp_path / "other"
        other.write_bytes(path.read_bytes())
        os.utime(other, (1, 1))
        other.replace(path)
        time.sleep(0.1)  # several beats
        assert path.stat().st_mtime == 1


def test_a_run_dir_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/run")):
        with pytest.raises(UserError, match="cannot be written"):
            acquire(path, Claimant.here())
        assert holder(path, Claimant.here()) is None


def test_a_run_dir_that_vanishes_does_not_hurt_the_way_out(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with acquire(run_dir, Claimant.here()):
        for path in run_dir.iterdir():
            path.unlink()
        run_dir.rmdir()


def test_without_working_locks_the_loser_of_a_race_is_fenced_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_try_lock", lambda descriptor: True)
    meeting = threading.Barrier(4, timeout=30)
    real = claim._judged

    def judged_together(run_dir: Path, me: Claimant) -> Any:
        found = real(run_dir, me)
        meeting.wait()  # all have seen no claim
        return found

    monkeypatch.setattr(claim, "_judged", judged_together)

    def one(_: int) -> Claim | None:
        try:
            return acquire(tmp_path, Claimant.here())
        except Superseded:
            return None

    with ThreadPoolExecutor(4) as pool:
        claims = [found for found in pool.map(one, range(4)) if found]

    def passes(found: Claim) -> bool:
        try:
            found.check()
        except Superseded:
            return False
        return True

    assert sum(passes(found) for found in claims) == 1


RACE = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    from ddpkit.checkpoint.claim import Claimant, acquire
    from ddpkit.errors import UserError

    start, go = os.pipe()
    told, tell = os.pipe()
    end, stay = os.pipe()
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            os.close(go), os.close(stay)
            os.read(start, 1)
            try:
                claim = acquire(Path(sys.argv[1]), Claimant.here(), wait_s=0)
            except UserError:
                os.write(tell, b"n")
                os._exit(0)
            os.write(tell, b"y")
            os.read(end, 1)  # holds it until all have tried
            os._exit(0)
        children.append(pid)
    os.close(go)
    answers = b"".join(os.read(told, 1) for _ in children)
    os.close(stay)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
    print(answers.count(b"y"))
    """
)


def test_of_eight_processes_at_once_exactly_one_gets_it(tmp_path: Path) -> None:
    for attempt in range(5):
        command = [sys.executable, "-c", RACE, str(tmp_path)]  # the later ones find a dead holder's claim
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.stdout == "1\n", (attempt, done.stdout, done.stderr)
