"""verify, export, eval and status on what runs have left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ddpkit
from tests import toy
from tests.resume import faults
from tests.resume.runs import cli, events, last_checkpoint, metrics, shell, start, tree, write


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("tools") / "run"
    assert start(tree(run_dir), 2) == "done"
    return run_dir


def files(run_dir: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in run_dir.rglob("*")}


def test_exports_load_into_the_plain_model(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(finished)
    for name in ("a.pt", "b.pt", "a.safetensors", "b.safetensors"):
        assert cli(capsys, "export", str(finished), str(tmp_path / name)).code == 0
    assert cli(capsys, "export", str(finished), str(tmp_path / "early.pt"), "--step", "12").code == 0
    plain = torch.load(tmp_path / "a.pt", weights_only=True)
    model = toy.model()
    assert list(plain) == list(model.state_dict())  # no prefix, BatchNorm's own keys, in the model's order
    model.load_state_dict(plain, strict=True)
    safe = load_file(tmp_path / "a.safetensors")
    early = torch.load(tmp_path / "early.pt", weights_only=True)
    assert safe.keys() == plain.keys()
    assert all(torch.equal(safe[name], plain[name]) and safe[name].dtype == plain[name].dtype for name in plain)
    assert not torch.equal(early["0.weight"], plain["0.weight"])
    # The bits depend on the model alone, not on the file's name.
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("a.pt", "a.safetensors", "b.pt", "b.safetensors", "early.pt")
    ]
    assert files(finished) == before


@pytest.mark.parametrize(
    ("out", "more", "complaint"),
    [
        ("model.bin", (), ".pt or .safetensors"),
        ("model", (), "ends in nothing"),
        ("missing/model.pt", (), "No such file or directory"),
        ("missing/model.safetensors", (), "No such file or directory"),
        ("model.pt", ("--step", "5"), "no checkpoint of step 5; there are: 18, 16, 12"),
    ],
)
def test_an_export_that_cannot_be_is_one_message(
    out: str, more: tuple[str, ...], complaint: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = cli(capsys, "export", str(finished), str(tmp_path / out), *more)
    assert refused.code == 2
    assert complaint in refused.err and len(refused.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_export_of_a_broken_checkpoint(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = shutil.copytree(finished, tmp_path / "run")
    os.truncate(last_checkpoint(run_dir) / "main.safetensors", 9)
    explicit = cli(capsys, "export", str(run_dir), str(tmp_path / "m.pt"), "--step", "18")
    assert explicit.code == 1 and "main.safetensors" in explicit.err
    assert not (tmp_path / "m.pt").exists()
    assert cli(capsys, "export", str(run_dir), str(tmp_path / "newest.pt")).code == 0
    assert cli(capsys, "export", str(run_dir), str(tmp_path / "before.pt"), "--step", "16").code == 0
    assert (tmp_path / "newest.pt").read_bytes() == (tmp_path / "before.pt").read_bytes()
    for checkpoint in (run_dir / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    assert cli(capsys, "export", str(run_dir), str(tmp_path / "none.pt")).code == 1
    assert cli(capsys, "export", str(tmp_path / "nowhere"), str(tmp_path / "none.pt")).code == 2


def test_verify_goes_over_every_checkpoint(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    intact = cli(capsys, "verify", str(finished))
    assert intact.code == 0
    assert intact.out.splitlines() == [f"step-{step:08d}: intact" for step in (18, 16, 12)]
    run_dir = shutil.copytree(finished, tmp_path / "run")
    oldest = run_dir / "checkpoints" / "step-00000012"
    (oldest / "own-00000.safetensors").unlink()
    broken = cli(capsys, "verify", str(run_dir))
    assert broken.code == 1
    assert broken.out.count("intact") == 2 and "own-00000.safetensors" in broken.out
    for path in (run_dir / "checkpoints").iterdir():
        path.rename(path.with_name(f"broken-{path.name}-1"))
    assert cli(capsys, "verify", str(run_dir)).code == 1
    assert cli(capsys, "verify", str(tmp_path / "nowhere")).code == 2
    assert cli(capsys, "verify", str(tmp_path)).code == 2


def test_eval_gives_the_recorded_numbers_and_writes_nothing(finished: Path) -> None:
    before = files(finished)
    recorded = [line for line in metrics(finished) if line["kind"] == "eval"]
    same = shell("eval", str(finished), "-o", "launch.nproc_per_node=2")
    assert same.code == 0, same.err
    found = json.loads(same.out)
    assert found["step"] == 18
    assert {name: found[name] for name in ("error", "within")} == {
        name: recorded[-1][name] for name in ("error", "within")
    }
    other = json.loads(shell("eval", str(finished), "--step", "12", "-o", "launch.nproc_per_node=3").out)
    assert other["step"] == 12
    (at_12,) = [line for line in recorded if line["step"] == 12]
    assert all(other[name] == pytest.approx(at_12[name], rel=1e-5) for name in ("error", "within"))
    assert files(finished) == before


def test_eval_that_cannot_be_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(capsys, "eval", str(tmp_path)).code == 2
    missing = shell("eval", str(finished), "--step", "5", "-o", "launch.nproc_per_node=1")
    assert missing.code == 2 and "no checkpoint of step 5; there are: 18, 16, 12" in missing.err
    assert missing.out == ""


def test_status_of_runs_that_are_not_running(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(capsys, "status", str(tmp_path / "nowhere")).code == 2
    found = json.loads(cli(capsys, "status", str(finished), "--json").out)
    assert (found["state"], found["step"], found["epoch"], found["samples"]) == ("finished", 18, 2, 144)
    assert found["checkpoints"] == {"18": "intact", "16": "intact", "12": "intact"}
    assert found["metrics"].keys() == {"train", "eval"}
    run_dir = shutil.copytree(finished, tmp_path / "run")
    os.truncate(last_checkpoint(run_dir) / "main.safetensors", 9)
    broken = json.loads(cli(capsys, "status", str(run_dir), "--json").out)
    assert broken["state"] != "finished" and broken["saved_step"] == 16
    assert "expected" in broken["checkpoints"]["18"]
    text = cli(capsys, "status", str(finished)).out
    assert "finished, step 18" in text and "checkpoint 18: intact" in text


def test_attempts_and_status_of_a_loop_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    for steps, state in ((2, "stopped"), (3, "finished")):
        with contextlib.suppress(ddpkit.StopRequested), ddpkit.runtime() as rt:
            model = rt.wrap(torch.nn.Linear(1, 1))
            run = rt.resume(run_dir, every_steps=1, model=model)
            for _ in range(steps):
                run.step()
            if state == "stopped":
                rt.stop.request("SIGTERM")
            run.step()
            run.finish()
        found = json.loads(cli(capsys, "status", str(run_dir), "--json").out)
        assert found["state"] == state
    assert found["saved_step"] == 7
    attempts = [(event["attempt"], event["event"]) for event in events(run_dir)]
    assert attempts[0] == (0, "started") and (0, "stopped") in attempts
    assert (1, "restored") in attempts and attempts[-1] == (1, "finished")


def test_a_run_on_slurm(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new/slurm").mkdir(parents=True)
    assert "submitted" in cli(capsys, "status", str(tmp_path / "new")).out
    run_dir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(last_checkpoint(run_dir))
    path = run_dir / "attempts/attempt-0.json"
    path.parent.mkdir(exist_ok=True)  # the run was one of `fit`, without a launcher
    ended = {
        "attempt": 0,
        "ranks": 2,
        "launcher": "slurm",
        "job": "17",
        "how": "stopped on request (SIGTERM)",
        "exit_code": 75,
    }
    path.write_text(json.dumps(ended | {"started": 1.0, "ended": 2.0, "requeued": "preempted"}))
    text = cli(capsys, "status", str(run_dir)).out
    assert "queued again, step 18" in text
    assert "slurm job 17: stopped on request (SIGTERM); queued again (preempted)" in text


def test_a_run_that_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    config = tree(run_dir, train__step="tests.resume.test_tools:failing_step")
    failed = shell("run", str(write(tmp_path / "c.yaml", config)))
    assert failed.code == 1
    assert "ValueError: the seventh pass" in failed.err
    found = json.loads(cli(capsys, "status", str(run_dir), "--json").out)
    assert (found["state"], found["saved_step"]) == ("failed", 4)
    assert found["attempts"][0]["exit_code"] == 1
    assert "the seventh pass" in found["attempts"][0]["how"]
    report = json.loads((run_dir / "failure.json").read_text())
    assert report["kind"] == "ValueError"
    last = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()][-1]
    assert last["event"] == "failed" and last["step"] == 6


def failing_step(model: torch.nn.Module, batch: object) -> object:
    if faults.watch().come_to("train") == 7:
        raise ValueError("the seventh pass")
    return toy.step(model, batch)


def test_a_relative_run_dir_and_one_that_cannot_be_written(tmp_path: Path) -> None:
    relative = os.path.relpath(tmp_path / "deep" / "run", Path(__file__).parents[2])
    config = write(tmp_path / "c.yaml", tree(tmp_path / "x", train__epochs=1) | {"run_dir": relative})
    assert shell("run", str(config)).code == 0
    assert last_checkpoint(tmp_path / "deep" / "run").name == "step-00000006"
    (tmp_path / "file").touch()
    for place in ("/proc/nowhere", str(tmp_path / "file"), str(tmp_path / "file" / "run")):
        refused = shell("run", str(config), "-o", f"run_dir={place}")
        assert refused.code == 2
        assert place in refused.err and "Traceback" not in refused.err
