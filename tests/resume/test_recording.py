"""What is recorded, selected and called in a run: the same whether it is killed on the way or not."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ddpkit
from ddpkit.callbacks import Callback
from ddpkit.run import Run
from ddpkit.testing import run_ranks
from launch import commands
from tests import toy
from tests.resume.faults import Fault, pending, plan
from tests.resume.runs import (
    Tree,
    assert_same_end,
    cli,
    events,
    last_checkpoint,
    metrics,
    shell,
    start,
    tree,
    write,
)


class Counting(Callback):
    """Notes the moments of rank one (they are on every rank), and counts steps, across restarts."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def write(self, run: Run, *words: Any) -> None:
        if run.rt.rank == 1:
            with self.file.open("a") as file:
                file.write(" ".join(map(str, (run.progress.step, *words))) + "\n")

    def on_start(self, run: Run) -> None:
        self.write(run, "start", self.steps)

    def on_epoch_start(self, run: Run) -> None:
        self.write(run, "epoch", run.progress.epoch)

    def on_step_end(self, run: Run) -> None:
        self.steps += 1
        assert self.steps == run.progress.step
        total = torch.tensor([float(run.rt.rank)])
        torch.distributed.all_reduce(total)  # each moment is on every rank
        run.note(ranks=float(total), mine=10.0 * run.rt.rank)

    def on_record(self, run: Run, kind: str, values: Mapping[str, float], clock: Mapping[str, float]) -> None:
        self.write(run, kind, *values)

    def on_evaluation_end(self, run: Run, values: Mapping[str, float]) -> None:
        self.write(run, "evaluated")

    def on_epoch_end(self, run: Run) -> None:
        self.write(run, "done", run.progress.epoch)

    def on_save(self, run: Run) -> None:
        self.write(run, "save")

    def on_end(self, run: Run, reason: str | None) -> None:
        self.write(run, "end", reason)


def config(run_dir: Path, **changes: Any) -> Tree:
    """Every evaluation is no better by ten than the first: the run ends with the fourth, of ten."""
    return tree(
        run_dir,
        train__epochs=10,
        train__early_stopping={"metric": "error", "patience": 3, "min_delta": 10.0},
        train__callbacks=[
            {"factory": "tests.resume.test_recording:Counting", "args": {"file": f"{run_dir}.txt"}},
            {"factory": "ddpkit.capturing:LayerOutputs", "args": {"layers": ["0"]}},
        ],
        train__profile={"steps": [2, 3], "ranks": [1]},
        model={
            "factory": "tests.resume.faults:model",
            "init": [{"factory": "torch.nn.init:zeros_", "params": ["0.bias"]}],
            "summary": {"graph": True},
        },
        checkpoint={"every_steps": 4, "keep": 1, "best": {"metric": "error"}},
        trackers=["tensorboard"],
        **changes,
    )


def tensorboard(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run_dir / "tensorboard"))
    shown.Reload()
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def assert_shown(run_dir: Path) -> None:
    """Each line once, with its values."""
    shown = tensorboard(run_dir)
    expected: dict[str, list[tuple[int, Any]]] = {}
    for line in metrics(run_dir):
        for name in line.keys() - {"kind", "step", "epoch", "samples"}:
            point = (line["step"], pytest.approx(line[name], rel=1e-6))
            expected.setdefault(f"{line['kind']}/{name}", []).append(point)
    for tag, points in expected.items():
        assert shown[tag] == points
    assert {"time/step_s", "time/data_s", "progress/samples"} <= shown.keys()


def test_a_killed_run_records_selects_and_ends_as_one_that_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert start(config(whole), 2) == "done"
    env = plan(tmp_path / "faults", Fault("train", 17, whom="group"))
    assert start(config(run_dir), 2, env) == "killed"
    assert start(config(run_dir), 2, env, attempt=1) == "done"
    assert not pending(tmp_path / "faults")
    assert_same_end(run_dir, whole)

    # Ended early, for good, unless more patience is asked for.
    progress = json.loads((last_checkpoint(run_dir) / "manifest.json").read_text())["progress"]
    assert (progress["step"], progress["epoch"], progress["stopping"]["waits"]) == (24, 4, 3)
    path = write(tmp_path / "c.yaml", config(run_dir))
    again = cli(capsys, "run", str(path))
    assert again.code == 0 and "is finished: step 24 (error was not better than" in again.err
    assert events(run_dir, "finished")[-1]["reason"].startswith("error was not better than")

    # The best one is kept beside the newest, and nothing else.
    errors = {line["step"]: line["error"] for line in metrics(run_dir) if line["kind"] == "eval"}
    best = min(errors, key=lambda step: errors[step])
    assert list(errors) == [6, 12, 18, 24]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in sorted({best, 24})
    ]
    exported = cli(capsys, "export", str(run_dir), str(tmp_path / "best.safetensors"), "--best")
    assert exported.code == 0 and f"that of step {best}: error" in exported.err
    assert cli(capsys, "export", str(run_dir), str(tmp_path / "same.safetensors"), "--step", str(best)).code == 0
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("best", "same"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    told = cli(capsys, "status", str(run_dir)).out
    assert "finished" in told and "ended early: error was not better" in told
    assert f"best checkpoint: {best} (error {errors[best]:.6g})" in told

    # TensorBoard shows each line once, although some steps were done twice.
    assert_shown(whole)
    assert_shown(run_dir)
    trained = [line for line in metrics(run_dir) if line["kind"] == "train"]
    assert [line["step"] for line in trained] == list(range(3, 25, 3))
    assert all((line["ranks"], line["mine"]) == (1.0, 5.0) and line["0.std"] > 0 for line in trained)
    clocks = [json.loads(line)["time"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = {"data_s", "forward_backward_s", "optimizer_s", "communication_s", "host_mb", "step_s", "samples_per_s"}
    assert all(names <= clock.keys() for clock in clocks if "eval_s" not in clock)

    # Each moment, on every rank; the restart goes on at a checkpoint.
    moments = Path(f"{whole}.txt").read_text().splitlines()
    assert [line.partition(" train ")[0] for line in moments[:9]] == [
        "0 start 0",
        "0 epoch 0",
        "3",
        "4 save",
        "6",
        "6 eval error within",
        "6 evaluated",
        "6 done 0",
        "6 save",
    ]
    assert moments[-1].startswith("24 end error was not better")
    starts = [line for line in Path(f"{run_dir}.txt").read_text().splitlines() if " start " in line]
    assert starts == ["0 start 0", f"{starts[1].split()[0]} start {starts[1].split()[0]}"]

    # A trace of rank one's steps, and the model.
    assert [path.name for path in (run_dir / "profile").iterdir()] == ["steps-2-3-rank-1.json"]
    trace = json.loads((run_dir / "profile" / "steps-2-3-rank-1.json").read_text())
    steps = [event for event in trace["traceEvents"] if event.get("name") == "Optimizer.step#AdamW.step"]
    assert len(steps) == 2
    assert any(event.get("name") == "ddpkit: fetch" for event in trace["traceEvents"])
    assert "SyncBatchNorm" in (run_dir / "model.txt").read_text()
    assert "0.weight (16, 6)" in (run_dir / "model.dot").read_text()


class Ending(Callback):
    """Ends the run in its second epoch, on rank one's word alone; or stops it, or fails."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_step_end(self, run: Run) -> None:
        if run.progress.step == 8 and run.rt.rank == 1:
            if self.how == "fail":
                raise ValueError("I cannot")
            (run.end if self.how == "end" else run.ask_to_stop)("I have seen enough")


def ending(run_dir: Path, how: str) -> Tree:
    callback = {"factory": "tests.resume.test_recording:Ending", "args": {"how": how}}
    return tree(run_dir, train__callbacks=[callback], train__eval_step=None, data__eval=None)


@pytest.mark.slow
def test_a_callback_ends_or_stops_the_run_of_all_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(ending(tmp_path / "end", "end"), 2) == "done"
    assert events(tmp_path / "end", "finished")[0]["step"] == 12  # the end of the epoch
    again = cli(capsys, "run", str(write(tmp_path / "c.yaml", ending(tmp_path / "end", "end"))))
    assert again.code == 0 and "is finished: step 12 (I have seen enough)" in again.err
    assert start(ending(tmp_path / "stop", "stop"), 2) == "I have seen enough"
    assert events(tmp_path / "stop", "stopped")[0]["step"] >= 8
    assert start(ending(tmp_path / "stop", "stop"), 2, attempt=1) == "done"
    assert events(tmp_path / "stop", "finished")[0]["step"] == 18


@pytest.mark.slow
def test_from_the_shell_a_bar_is_shown_and_a_failing_callback_named(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", tree(tmp_path / "run", train__epochs=1))
    quiet = shell("run", str(path), "-o", "train.epochs=2", "-o", "progress_bar=true")
    assert quiet.code == 0
    assert "12/12" in quiet.err and "step/s" in quiet.err and "samples_per_s" in quiet.err
    assert "train  epoch" not in quiet.err and "eval  epoch 1  step 12" in quiet.err
    failed = shell("run", str(write(tmp_path / "f.yaml", ending(tmp_path / "failed", "fail"))))
    assert failed.code == 1
    assert "callback tests.resume.test_recording.Ending, on_step_end: ValueError: I cannot" in failed.err
    assert "rank 1" in failed.err


def test_a_tracker_that_cannot_be_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpkit.services._is_installed", lambda package: False)
    path = write(tmp_path / "c.yaml", tree(tmp_path / "run"))
    for given, said in (("[wandb]", "pip install wandb"), ("[wandbb]", "did you mean 'wandb'?")):
        refused = cli(capsys, "run", str(path), "-o", f"trackers={given}")
        assert refused.code == 2 and said in refused.err
    assert not (tmp_path / "run").exists()


def test_a_terminal_is_told_to_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, os.fdopen(ours, "rb"):
        monkeypatch.setattr(sys, "stderr", terminal)
        assert commands._terminal().keys() == {"terminal"}
    monkeypatch.undo()
    assert commands._terminal() == {}  # pytest's, which is none


class Sent:
    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def log(self, values: dict[str, float], step: int) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps([step, sorted(values)]) + "\n")


def own_loop(run_dir: Path, epochs: int = 9, patience: int = 2) -> list[int]:
    """Evaluates in the middle of each epoch; the steps at which it did."""
    evaluated = []
    with ddpkit.runtime(seed=3) as rt:
        model = rt.wrap(toy.model(dropout=0.0))
        loader = rt.loader(toy.dataset(length=32), global_batch_size=8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # nothing gets better
        run = rt.resume(
            run_dir,
            model=model,
            optimizer=optimizer,
            loader=loader,
            every_steps=None,
            keep=1,
            best=ddpkit.Best("error"),
            early_stopping=ddpkit.EarlyStopping("within", patience, mode="max"),
            trackers=[Sent(f"{run_dir}.txt")],
            log_every=2,
        )
        for _ in run.epochs(epochs):
            for batch in loader:
                run.backward(toy.step(model, batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
                run.step()
                if run.progress.step % 4 == 2:
                    values = rt.evaluate(model, toy.dataset(11, augment=False), toy.eval_step, batch_size=4)
                    run.record("eval", {"error": values["error"] + run.progress.epoch, "within": values["within"]})
                    evaluated.append(run.progress.step)
        assert run.ended_early is not None
    return evaluated


def test_a_loop_of_ones_own_selects_and_ends_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert run_ranks(own_loop, 2, run_dir) == [[2, 6, 10]] * 2
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000012"]  # the best, in the middle of an epoch, and the end
    assert run_ranks(own_loop, 2, run_dir) == [[], []]
    assert run_ranks(own_loop, 2, run_dir, patience=3) == [[14], [14]]
    assert cli(capsys, "export", str(run_dir), str(tmp_path / "x.pt"), "--best").err.count("of step 2: error") == 1
    sent = [json.loads(line) for line in Path(f"{run_dir}.txt").read_text().splitlines()]
    assert [step for step, names in sent if "eval/error" in names] == [2, 6, 10, 14]
