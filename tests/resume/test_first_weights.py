"""`model.init_from`: a run begins with somebody else's weights on all ranks, and goes on with its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddpkit.checkpoint.contents import load_model_tensors
from ddpkit.errors import UserError
from tests import toy
from tests.resume.runs import cli, events, last_checkpoint, start, tree, write


def test_a_run_begins_with_them_and_goes_on_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(99)
    theirs = torch.nn.DataParallel(toy.model(dropout=0.0))
    path = tmp_path / "theirs.pt"
    torch.save({"state_dict": theirs.state_dict(), "epoch": 7}, path)
    changes: dict[str, Any] = {
        "model__init_from": {"path": str(path), "key": "state_dict"},
        "optimizer": {"factory": "torch.optim:SGD", "args": {"lr": 0.0}},  # so that they are still there at the end
        "train__epochs": 1,
    }
    config = tree(tmp_path / "run", **changes)
    assert start(config, 2) == "done"
    kept = load_model_tensors(last_checkpoint(tmp_path / "run"))
    for name, value in theirs.module.named_parameters():
        assert torch.equal(kept[name], value)

    path.unlink()
    assert start(tree(tmp_path / "run", **changes | {"train__epochs": 2}), 2, attempt=1) == "done"
    assert [event["event"] for event in events(tmp_path / "run")].count("restored") == 1

    elsewhere = tree(tmp_path / "other", **changes)
    told = cli(capsys, "run", str(write(tmp_path / "x.yaml", elsewhere)))
    assert (told.code, told.err) == (2, f"ddpkit: model.init_from.path: {path}: there is no such file\n")
    torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, path)
    with pytest.raises(UserError, match=r"model\.init_from: .*theirs\.pt does not fit the model"):
        start(elsewhere, 2)
    assert not (tmp_path / "other").exists()
