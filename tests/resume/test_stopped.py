"""Stops that all ranks agree on, at every kind of place, and the run continued: the same bits again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.resume.faults import Fault, pending, plan
from tests.resume.runs import assert_same_end, events, last_checkpoint, metrics, start, to_the_end, tree

BY_STEPS = {"train__eval_every": {"steps": 4}}
NO_SAVES = {"checkpoint": {"every_steps": None, "keep": 2}}
WORKERS = NO_SAVES | {"data__loader": {"num_workers": 1}}

PLACES: dict[str, tuple[dict[str, Any], list[Fault]]] = {
    "in training": (NO_SAVES, [Fault("train", 5, do="SIGTERM"), Fault("train", 2, rank=1, do="SIGINT")]),
    # every_steps is 4 and a step is one pass of each rank: the stop and the save fall together.
    "when a save is due": ({}, [Fault("train", 4, do="SIGTERM"), Fault("train", 4, rank=1, do="SIGTERM")]),
    "while a save is written": (
        {},
        [Fault("open", 1, path="own-00000", do="SIGTERM"), Fault("os.rename", 3, path="/.step-", do="SIGTERM")],
    ),
    "in the evaluation of an epoch's end": (NO_SAVES, [Fault("eval", 1, do="SIGTERM"), Fault("eval", 2, do="SIGTERM")]),
    "in the evaluation after some steps": (BY_STEPS, [Fault("eval", 1, do="SIGTERM"), Fault("eval", 5, do="SIGTERM")]),
    "in evaluation, then killed in the restore": (
        {},
        [Fault("eval", 1, do="SIGTERM"), Fault("open", 2, path="metrics.jsonl", whom="group")],
    ),
    "at the last step": ({}, [Fault("train", 18, do="SIGTERM")]),
    # Both ranks: one that is ahead has already begun what follows the evaluation, after which nothing is left to stop.
    "in the last evaluation": (NO_SAVES, [Fault("eval", 5, do="SIGTERM"), Fault("eval", 5, do="SIGTERM", rank=1)]),
    # A worker of each rank hangs for good: no rank can begin the step, so it is not waited for.
    "while all ranks wait for data": (
        WORKERS,
        [Fault("fetch", 20, rank, do="SIGTERM", whom="parent", hangs_s=60) for rank in (0, 1)],
    ),
    # One rank's worker hangs for a while, the other rank is in the step that needs its part: that is finished first.
    "while one rank waits for data": (WORKERS, [Fault("fetch", 20, do="SIGTERM", whom="parent", hangs_s=1)]),
    "while a stream is waited for": (
        WORKERS | {"data__train__args": {"length": 48, "stream": True}},
        [Fault("fetch", 20, rank, do="SIGTERM", whom="parent", hangs_s=60) for rank in (0, 1)],
    ),
    "in an epoch's last step, with a scheduler of epochs": (
        {"scheduler": {"factory": "torch.optim.lr_scheduler:StepLR", "args": {"step_size": 1}, "interval": "epoch"}},
        [Fault("train", 6, do="SIGTERM"), Fault("train", 6, do="SIGTERM")],
    ),
    "on a stream's last step": (
        {"data__train__args": {"length": 48, "stream": True}},
        [Fault("train", 6, do="SIGTERM"), Fault("train", 1, do="SIGTERM")],
    ),
}


SLOW = {"while one rank waits for data", "while a stream is waited for"}


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=pytest.mark.slow) if place in SLOW else place for place in PLACES]
)
def test_a_stopped_run_ends_with_the_same_bits(place: str, tmp_path: Path) -> None:
    changes, faults = PLACES[place]
    assert start(tree(tmp_path / "reference", **changes), 2) == "done"
    env = plan(tmp_path / "faults", *faults)
    ends = to_the_end(tree(tmp_path / "stopped", **changes), 2, env)
    assert not pending(tmp_path / "faults")
    stops = [end for end in ends if end.startswith("SIG") and end != "SIGKILL"]
    assert len(stops) >= 1, ends
    # A stop is agreed within a step or so of the signal, and its state is there.
    assert [event["reason"] for event in events(tmp_path / "stopped", "stopped")] == stops
    assert_same_end(tmp_path / "stopped", tmp_path / "reference")


def test_a_stop_waits_for_the_save_under_way_and_then_saves_where_it_stands(tmp_path: Path) -> None:
    env = plan(
        tmp_path / "faults",
        Fault("open", 1, rank=1, path="own-00001", do="SIGTERM", since=5),  # in the save of step 4
    )
    assert start(tree(tmp_path / "run"), 2, env) == "SIGTERM"
    (stopped,) = events(tmp_path / "run", "stopped")
    assert stopped["step"] >= 5
    assert [event["step"] for event in events(tmp_path / "run", "saved")] == [4, stopped["step"]]
    assert last_checkpoint(tmp_path / "run").name == f"step-{stopped['step']:08d}"


def test_a_stop_before_the_first_step_saves_nothing(tmp_path: Path) -> None:
    config = tree(tmp_path / "run")
    env = plan(tmp_path / "faults", Fault("build", rank=1, do="SIGTERM"))
    assert start(config, 2, env) == "SIGTERM"
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    assert start(config, 2, attempt=1) == "done"
    assert start(tree(tmp_path / "reference"), 2) == "done"
    assert_same_end(tmp_path / "run", tmp_path / "reference")


def test_a_stop_at_the_very_last_step_comes_too_late_to_matter(tmp_path: Path) -> None:
    config = tree(tmp_path, train__eval_step=None, data__eval=None)
    env = plan(tmp_path / "faults", Fault("train", 18, do="SIGTERM"), Fault("train", 18, rank=1, do="SIGTERM"))
    assert start(config, 2, env) == "done"
    assert not pending(tmp_path / "faults")
    assert events(tmp_path)[-1]["event"] == "finished"


def test_a_stop_during_the_last_save_comes_too_late_to_matter(tmp_path: Path) -> None:
    config = tree(tmp_path, checkpoint={"every_steps": None, "keep": 2})
    env = plan(tmp_path / "faults", Fault("os.rename", 1, path="/.step-", do="SIGTERM"))
    assert start(config, 2, env) == "done"
    assert not pending(tmp_path / "faults")
    assert [event["event"] for event in events(tmp_path)] == ["started", "saved", "finished"]


def test_a_stop_saves_at_its_own_step_and_loses_nothing(tmp_path: Path) -> None:
    config = tree(
        tmp_path / "run", checkpoint={"every_steps": None}, log_every=1, train__eval_step=None, data__eval=None
    )
    env = plan(tmp_path / "faults", Fault("train", 5, rank=1, do="SIGTERM"))
    assert start(config, 3, env) == "SIGTERM"
    (stopped,) = events(tmp_path / "run", "stopped")
    assert stopped["step"] >= 5
    assert 0 < stopped["time"]["latency_s"] < 30
    assert last_checkpoint(tmp_path / "run").name == f"step-{stopped['step']:08d}"
    assert metrics(tmp_path / "run")[-1]["step"] == stopped["step"]
    assert start(config, 3, attempt=1) == "done"
    assert events(tmp_path / "run", "restored")[0]["step"] == stopped["step"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 19))
