"""FSDP2 runs, stopped and killed: the same bits on the same ranks, the same numbers on others and in one piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import toy
from tests.resume.faults import Fault, pending, plan
from tests.resume.runs import (
    assert_close_end,
    assert_same_end,
    cli,
    last_checkpoint,
    metrics,
    shell,
    start,
    to_the_end,
    tree,
)
from tests.resume.test_training_state import planted_tree

SHARDED: dict[str, Any] = {"model__parallel": "fsdp2", "model__fsdp2": {"layers": ["Linear"]}}


def test_killed_and_stopped_it_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    changes = SHARDED | {"data__micro_batch_size": 1, "train__clip_grad_norm": 1.0, "train__epochs": 2}
    assert start(tree(tmp_path / "reference", **changes), 3) == "done"
    # With passes of one sample three ranks make three of them in each step.
    env = plan(
        tmp_path / "faults",
        Fault("train", 16, rank=1, do="SIGTERM"),
        Fault("train", 14, rank=2, whom="group"),
    )
    ends = to_the_end(tree(tmp_path / "run", **changes), 3, env)
    assert sorted(ends) == ["SIGTERM", "done", "killed"]
    assert not pending(tmp_path / "faults")
    assert_same_end(tmp_path / "run", tmp_path / "reference")


def test_killed_on_two_ranks_it_goes_on_with_three_and_in_one_piece(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact: dict[str, Any] = {
        # A bias before a BatchNorm has no gradient but rounding errors, and Adam makes whole steps of them.
        "model__args": {"dropout": 0.0, "dtype": "float64", "batchnorm": False},
        "data__train__args": {"length": 50, "dtype": "float64", "augment": False},
        "data__eval__args": {"length": 11, "dtype": "float64", "augment": False},
    }
    assert start(tree(tmp_path / "whole", **exact), 1) == "done"
    run_dir = tmp_path / "run"
    sharded = tree(run_dir, **exact | SHARDED, checkpoint__asynchronous=False)  # the kill comes after the save
    env = plan(tmp_path / "faults", Fault("train", 6, rank=1, whom="group"))
    assert start(sharded, 2, env) == "killed"  # saved at step 4
    assert [len(list(path.glob("sharded-*"))) for path in (run_dir / "checkpoints").iterdir()] == [2]
    assert start(sharded, 3, plan(tmp_path / "more", Fault("train", 3, do="SIGTERM")), attempt=1) == "SIGTERM"
    # The same checkpoint goes into a model that is whole on each rank, and back.
    in_one = tree(run_dir, **exact)
    assert start(in_one, 2, plan(tmp_path / "third", Fault("train", 3, do="SIGTERM")), attempt=2) == "SIGTERM"
    assert not list(last_checkpoint(run_dir).glob("sharded-*"))
    assert start(sharded, 1, plan(tmp_path / "fourth", Fault("train", 3, do="SIGTERM")), attempt=3) == "SIGTERM"
    assert start(sharded, 2, attempt=4) == "done"

    assert_close_end(run_dir, tmp_path / "whole", rtol=1e-9, atol=1e-12)
    assert cli(capsys, "verify", str(run_dir)).code == 0
    assert cli(capsys, "export", str(run_dir), str(tmp_path / "model.safetensors")).code == 0
    model = toy.model(dtype="float64", batchnorm=False)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_a_nan_on_one_rank_stops_all_and_is_traced(tmp_path: Path) -> None:
    config = planted_tree(tmp_path / "run", [22], model__parallel="fsdp2", model__fsdp2={"layers": ["Linear"]})
    end = start(config, 2, errors=True)
    assert end.startswith("NotFinite: step 3 cannot be taken: the loss is nan on rank 1"), end
    assert "it appeared first in the forward pass of 1 (FSDPTrip)" in end or "forward pass of 1 (Trip)" in end, end
    assert last_checkpoint(tmp_path / "run").name == "step-00000002"
    skipping = planted_tree(
        tmp_path / "run",
        [22],
        train__on_nonfinite="skip",
        model__parallel="fsdp2",
        model__fsdp2={"layers": ["Linear"]},
    )
    assert start(skipping, 2, attempt=1) == "done"


@pytest.mark.slow
def test_a_sharded_run_from_the_shell(tmp_path: Path) -> None:
    config = tree(tmp_path / "run", **SHARDED)
    (tmp_path / "x.yaml").write_text(json.dumps(config))
    done = shell("run", str(tmp_path / "x.yaml"))
    assert done.code == 0, done.err
    recorded = metrics(tmp_path / "run")[-1]
    evaluated = shell("eval", str(tmp_path / "run"), "-o", "launch.nproc_per_node=3", "-o", "data.eval_batch_size=1")
    assert evaluated.code == 0, evaluated.err
    found = json.loads(evaluated.out)
    assert found == {key: pytest.approx(recorded[key], rel=1e-5) for key in ("step", "error", "within")}
    typo = ("-o", f"run_dir={tmp_path / 'y'}", "-o", "model.fsdp2.layers=[Linaer]")
    wrong = shell("run", str(tmp_path / "x.yaml"), *typo)
    assert wrong.code == 2
    assert "fsdp2: layers: no part of the model is a 'Linaer', by class or by name; did you mean 'Linear'?" in wrong.err
    assert "Traceback" not in wrong.err
