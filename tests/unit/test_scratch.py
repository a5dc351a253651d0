"""The ranks' directory for temporary files: removed by the next start, if nobody was left to do so."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from launch import scratch


def test_what_nobody_holds_any_more_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, held = scratch.make()
    second, also_held = scratch.make()
    assert Path(first).is_dir() and Path(second).is_dir() and first != second
    (Path(first) / "listener").touch()
    (tmp_path / "ddpk-000-other").mkdir()  # of another machine, on a file system that both see
    inherited = os.dup(held)  # as by the process that starts the ranks
    os.close(held)
    third, _ = scratch.make()
    assert Path(first).is_dir()
    os.close(inherited)  # with the last process that had it
    scratch.make()
    assert not Path(first).exists() and Path(second).is_dir() and Path(third).is_dir()
    assert (tmp_path / "ddpk-000-other").is_dir()
    os.close(also_held)


def test_one_that_is_swept_as_it_is_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lock, swept = fcntl.flock, list[str]()

    def late(descriptor: int, operation: int) -> None:
        if not swept:  # before the first lock is taken
            swept.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            os.rmdir(swept[0])
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    path, held = scratch.make()
    assert path != swept[0] and [str(each) for each in tmp_path.iterdir()] == [path]
    os.close(held)


def test_one_that_is_swept_before_it_is_opened_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made, mkdtemp = list[str](), tempfile.mkdtemp

    def swept_once(prefix: str) -> str:
        made.append(mkdtemp(prefix=prefix))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", swept_once)
    path, held = scratch.make()
    assert path == made[1] and [str(each) for each in tmp_path.iterdir()] == [path]
    os.close(held)
