"""The same run on 2, 1, 4 and 3 ranks, with stops and kills in between: every sample once an epoch."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.resume.faults import Fault, pending, plan
from tests.resume.runs import events, last_checkpoint, metrics, to_the_end, tree

LENGTH, BATCH, EPOCHS = 50, 8, 4


def surviving(ledger: Path, run_dir: Path) -> list[list[int]]:
    """The indices of each optimizer step, over all ranks, in the lineage that the run's end descends from."""
    steps: list[list[int]] = []
    for event in events(run_dir):
        if event["event"] not in ("started", "restored"):
            continue
        files = sorted(ledger.glob(f"{event['attempt']}-*.txt"))
        lines = [[[int(index) for index in line.split()] for line in path.read_text().splitlines()] for path in files]
        assert len(lines) in (0, event["world_size"])
        del steps[
            event["step"] :
        ]  # and of the last step before a kill, one rank may have written a line and another not
        steps += [list(chain(*ranks)) for ranks in zip(*lines, strict=False)]
    return steps


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_sample_once_an_epoch_whatever_the_ranks(stream: bool, drop_last: bool, tmp_path: Path) -> None:
    run_dir, ledger = tmp_path / "run", tmp_path / "ledger"
    ledger.mkdir()
    arguments: dict[str, Any] = {"length": LENGTH, "stream": stream}
    config = tree(run_dir, data__train__args=arguments, data__drop_last=drop_last, train__epochs=EPOCHS, log_every=1)
    faults = [
        Fault("train", 5, do="SIGTERM"),  # on 2 ranks
        Fault("train", 6, whom="group"),  # on 1
        Fault("train", 5, rank=3, do="SIGTERM"),  # on 4
        Fault("train", 6, rank=2, whom="group"),  # on 3
    ]
    env = plan(tmp_path / "faults", *faults) | {"TOY_LEDGER": str(ledger)}
    ends = to_the_end(config, [2, 1, 4, 3, 2], env)
    assert ends == ["SIGTERM", "killed", "SIGTERM", "killed", "done"]
    assert not pending(tmp_path / "faults")
    starts = [event for event in events(run_dir) if event["event"] in ("started", "restored")]
    assert [event["world_size"] for event in starts] == [2, 1, 4, 3, 2]

    steps = surviving(ledger, run_dir)
    in_epoch = LENGTH // BATCH if drop_last else -(-LENGTH // BATCH)
    assert len(steps) == in_epoch * EPOCHS
    for epoch in range(EPOCHS):
        seen = Counter(chain(*steps[epoch * in_epoch : (epoch + 1) * in_epoch]))
        assert set(seen.values()) == {1}
        assert len(seen) == (in_epoch * BATCH if drop_last else LENGTH)
    lines = [line for line in metrics(run_dir) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, len(steps) + 1))
    assert lines[-1]["samples"] == sum(len(step) for step in steps)
    progress = json.loads((last_checkpoint(run_dir) / "manifest.json").read_text())["progress"]
    assert progress["epoch"] == EPOCHS
    assert progress["samples"] == lines[-1]["samples"]


def test_the_recorded_loss_is_the_mean_over_all_samples_at_any_number_of_ranks(tmp_path: Path) -> None:
    """Uneven shares, micro batches that do not divide them, ranks without a sample in the last pass."""
    found = []
    for ranks, micro in ((1, None), (2, 2), (3, 1), (4, None)):
        run_dir = tmp_path / f"run-{ranks}"
        config = tree(
            run_dir,
            model__args={"dropout": 0.0, "dtype": "float64"},
            data__train__args={"length": 20, "dtype": "float64"},
            data__eval={"factory": "tests.resume.faults:dataset", "args": {"length": 5, "dtype": "float64"}},
            data__global_batch_size=5,
            data__micro_batch_size=micro,
            log_every=1,
            # With batch statistics over each pass, micro batches would change the loss itself.
            model__factory="tests.resume.faults:model",
        )
        config["model"]["args"]["batchnorm"] = False
        assert to_the_end(config, ranks) == ["done"]
        found.append(metrics(run_dir))
    for other in found[1:]:
        assert len(other) == len(found[0])
        for ours, theirs in zip(other, found[0], strict=True):
            assert ours.keys() == theirs.keys()
            assert all(ours[key] == pytest.approx(theirs[key], rel=1e-9) for key in ours if key != "kind")
