"""Checkpoints that are not what was written: set aside with a warning, never loaded, never a silent fresh start."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.resume.runs import assert_same_end, cli, events, last_checkpoint, shell, start, tree, write


def flip_a_bit(checkpoint: Path) -> None:
    chance = random.Random(0)
    path = checkpoint / "replicated-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "main.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "own-00001.safetensors").unlink()


def spoil_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(b"\x80\x04garbage")


def lose_all(checkpoint: Path) -> None:
    for path in checkpoint.iterdir():
        path.unlink()


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch /tmp/ddpkit-pickle-was-executed",)


def plant_a_pickle(checkpoint: Path) -> None:
    for path in checkpoint.iterdir():
        if path.suffix == ".safetensors":
            path.write_bytes(pickle.dumps(Bomb()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that has ended; its run_dir is only right for copies."""
    run_dir = tmp_path_factory.mktemp("broken") / "run"
    assert start(tree(run_dir), 2) == "done"
    return run_dir


DAMAGES = (flip_a_bit, truncate, lose_a_file, spoil_the_manifest, lose_all, plant_a_pickle)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_newest_is_set_aside_and_its_steps_are_done_again(
    damage: Callable[[Path], None], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(finished, tmp_path / "run")
    newest = last_checkpoint(run_dir)
    damage(newest)
    assert cli(capsys, "verify", str(run_dir)).code == 1
    assert start(tree(run_dir), 2, attempt=1) == "done"
    (event,) = events(run_dir, "set_aside")
    assert event["step"] == 18 and str(run_dir) in event["problem"]
    assert events(run_dir, "restored")[-1]["step"] == 16
    assert (run_dir / "checkpoints" / "broken-step-00000018-1").is_dir()
    assert_same_end(run_dir, finished)
    verified = cli(capsys, "verify", str(run_dir))
    assert verified.code == 0 and "broken-step-00000018-1: broken, set aside" in verified.out
    assert not Path("/tmp/ddpkit-pickle-was-executed").exists()


def test_the_warning_reaches_the_shell_and_all_broken_is_an_error_every_time(finished: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(finished, tmp_path / "run")
    config = str(write(tmp_path / "c.yaml", tree(run_dir)))
    flip_a_bit(last_checkpoint(run_dir))
    assert (went_on := shell("run", config)).code == 0
    assert "checkpoint of step 18 is broken and was set aside" in went_on.err
    assert "replicated-00001.safetensors" in went_on.err
    for checkpoint in (run_dir / "checkpoints").glob("step-*"):
        truncate(checkpoint)
    for _ in range(2):
        refused = shell("run", config)
        assert refused.code == 1
        for step in (12, 16, 18):
            assert f"step-{step:08d}/main.safetensors" in refused.err
        assert "set aside earlier" in refused.err
        assert "Traceback" not in refused.err
        assert refused.err.count("step-00000012/main.safetensors") == 1  # one message, not one for each rank
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("step-*")) == [
        f"step-{step:08d}" for step in (12, 16, 18)
    ]


@pytest.mark.slow
def test_any_flipped_bit_is_noticed_and_undone(finished: Path, tmp_path: Path) -> None:
    chance = random.Random(7)
    for number in range(25):
        run_dir = shutil.copytree(finished, tmp_path / str(number))
        path = chance.choice(sorted(last_checkpoint(run_dir).iterdir()))
        content = bytearray(path.read_bytes())
        if chance.random() < 0.3:
            del content[chance.randrange(len(content)) :]
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        assert start(tree(run_dir), 2, attempt=1) == "done"
        assert len(events(run_dir, "set_aside")) == 1
        assert_same_end(run_dir, finished)
