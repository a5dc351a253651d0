"""Saves that are written while training goes on: of the step that they name, and the same as those it waits for."""

from __future__ import annotations

import json
from pathlib import Path

from tests.resume.faults import Fault, pending, plan
from tests.resume.runs import assert_same_end, events, start, tree


def test_every_checkpoint_is_the_same_however_late_it_is_written(tmp_path: Path) -> None:
    """Each save is held, on one rank or the other, until training is three steps further."""
    saving = {"every_steps": 4, "keep": 9}
    reference = tree(tmp_path / "reference", checkpoint=saving | {"asynchronous": False}, log_every=1)
    assert start(reference, 2) == "done"
    held = [
        Fault("open", 1, path="own-00000", do="", until=7),  # of step 4
        Fault("open", 2, rank=1, path="replicated-00001", do="", until=11),
        Fault("os.rename", 3, path="/.step-", do="", until=15),
    ]
    config = tree(tmp_path / "run", checkpoint=saving, log_every=1)
    assert start(config, 2, plan(tmp_path / "faults", *held)) == "done"
    assert not pending(tmp_path / "faults")

    names = sorted(path.name for path in (tmp_path / "reference/checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (4, 8, 12, 16, 18)]
    for name in names:
        for path in (tmp_path / "reference/checkpoints" / name).iterdir():
            assert path.read_bytes() == (tmp_path / "run/checkpoints" / name / path.name).read_bytes(), path
    assert_same_end(tmp_path / "run", tmp_path / "reference")
    # They were late indeed, and say what they held in memory.
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    recorded = {line["step"]: line["time"]["unix"] for line in lines if line["kind"] == "train"}
    saved = {event["step"]: event for event in events(tmp_path / "run", "saved")}
    assert all(saved[step]["unix"] >= recorded[step + 2] for step in (4, 8, 12))
    assert all(event["staging_bytes"] > 1000 for event in saved.values())
    assert all(0 < max(event["held_s"], event["durable_s"]) <= event["seconds"] for event in saved.values())
    assert all(event["staging_bytes"] == 0 for event in events(tmp_path / "reference", "saved"))
