"""A disk that fills up: older checkpoints stay, the run goes on as long as that makes sense, and says what it needs."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ddpkit.checkpoint import listing
from tests.resume import faults
from tests.resume.runs import Tree, assert_same_end, cli, events, shell, start, tree, until, write

DISK = 1 << 20  # bytes; a checkpoint of these runs has about 240 kB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs")
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr!r}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def big(run_dir: Path, **checkpoint: int) -> Tree:
    args = {"width": 128, "batchnorm": False}
    saving = {"every_steps": 2, "keep": 3, "max_failures": 3} | checkpoint
    return tree(run_dir, model__args=args, checkpoint=saving, log_every=1)


def test_it_goes_on_with_a_warning_and_fails_after_some_failures(disk: Path, tmp_path: Path) -> None:
    config = big(disk / "run", keep=9)
    refused = shell("run", str(write(tmp_path / "c.yaml", config)))
    assert refused.code == 1
    saved, failed = events(disk / "run", "saved"), events(disk / "run", "save_failed")
    steps = [event["step"] for event in saved]
    assert len(steps) >= 2
    assert [event["step"] for event in failed] == [steps[-1] + 2, steps[-1] + 4, steps[-1] + 6]
    # Two warnings, then the failure itself; each with the bytes.
    said = re.findall(r"No space left on device; (\d+) bytes needed, (\d+) free", refused.err)
    assert len(said) >= 3
    assert all(0 <= int(free) < DISK for _, free in said)
    assert "The run goes on; older checkpoints are kept (1 failed in a row)" in refused.err
    assert [each.problem for each in listing.listing(disk / "run")] == [None] * len(steps)
    assert [path.name for path in (disk / "run" / "checkpoints").iterdir() if path.name.startswith(".")] == []

    # Room is made, and the same command ends as if there had always been enough.
    subprocess.run(["mount", "-o", f"remount,size={16 * DISK}", str(disk)], check=True)
    assert start(big(tmp_path / "reference"), 2) == "done"
    assert start(config, 2, attempt=1) == "done"
    assert_same_end(disk / "run", tmp_path / "reference")


def test_room_that_comes_in_time_is_enough(disk: Path) -> None:
    """Two checkpoints fit beside the ballast; it goes before the third failure in a row."""
    (disk / "ballast").write_bytes(b"\0" * (DISK // 2))
    config = big(disk / "run", keep=3) | {"log_every": 3}
    config["train"]["step"] = "tests.resume.test_full_disk:clearing_step"
    assert start(config, 2, {"TOY_DISK": str(disk)}) == "done"
    assert [event["step"] for event in events(disk / "run", "save_failed")] == [6, 8]
    assert [event["step"] for event in events(disk / "run", "saved")] == [2, 4, 10, 12, 14, 16, 18]


def clearing_step(model: nn.Module, batch: Any) -> Any:
    """Removes the ballast in the tenth pass, before the next save, when two have failed; they are written beside it."""
    if faults.watch().visits["train"] == 9:
        disk = Path(os.environ["TOY_DISK"])
        until(lambda: len(events(disk / "run", "save_failed")) == 2)
        (disk / "ballast").unlink(missing_ok=True)
    return faults.step(model, batch)


def test_an_end_that_cannot_be_saved_is_no_end(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = big(disk / "run", every_steps=8, keep=9, max_failures=9)
    with (disk / "ballast").open("wb") as ballast:
        ballast.write(b"\0" * (DISK // 2))
    end = start(config, 2, errors=True)
    assert end.startswith("SaveFailed") and "free" in end
    assert cli(capsys, "run", str(write(tmp_path / "c.yaml", config)), "--dry-run").code == 0
    (disk / "ballast").unlink()
    subprocess.run(["mount", "-o", f"remount,size={16 * DISK}", str(disk)], check=True)
    assert start(config, 2, attempt=1) == "done"
    assert events(disk / "run", "finished")


def test_records_on_a_full_disk_do_not_end_a_run(disk: Path, tmp_path: Path) -> None:
    """Checkpoints lie elsewhere and can be written; metrics, events and logs cannot."""
    run_dir = disk / "run"
    run_dir.mkdir()
    (tmp_path / "checkpoints").mkdir()
    (run_dir / "checkpoints").symlink_to(tmp_path / "checkpoints")
    config = tree(run_dir, log_every=1, train__step="tests.resume.test_full_disk:filling_step")
    ended = shell("run", str(write(tmp_path / "c.yaml", config)), env={"TOY_DISK": str(disk)})
    assert ended.code == 0, ended.err
    assert ended.err.count("metrics.jsonl: cannot be written") == 1
    assert listing.intact_newest(run_dir) is not None


def filling_step(model: nn.Module, batch: Any) -> Any:
    """Fills the disk before the first step."""
    path = Path(os.environ["TOY_DISK"]) / f"ballast-{os.getpid()}"
    if not path.exists():
        with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * 4096) == 4096:
                pass
    return faults.step(model, batch)
