"""A training loop of one's own, with `Runtime.resume`: killed, stopped, and continued with the same bits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import ddpkit
from ddpkit.agree import RankFailed
from ddpkit.errors import StopRequested, UserError
from ddpkit.testing import RankDied, run_ranks
from tests import toy
from tests.resume import faults
from tests.resume.faults import Fault, pending, plan
from tests.resume.runs import assert_same_end, events


class Average:
    """An object of the user's: weights averaged over the epochs' ends."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.sums = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        self.epochs = 0

    def add(self, model: torch.nn.Module) -> None:
        self.epochs += 1
        for name, value in model.named_parameters():
            self.sums[name] += value.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.epochs = state["sums"], state["epochs"]


def train(run_dir: Path, env: dict[str, str]) -> str:
    os.environ.update(env)
    try:
        with ddpkit.runtime(seed=3) as rt:
            model = rt.wrap(toy.model())
            loader = rt.loader(toy.dataset(length=30), global_batch_size=8, micro_batch_size=3, drop_last=False)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            average = Average(toy.model())
            objects: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader}
            run = rt.resume(run_dir, every_steps=3, keep=2, log_every=2, schedule=schedule, average=average, **objects)
            for _ in run.epochs(3):
                for batch in loader:
                    faults.watch().come_to("train")
                    loss = toy.step(model, batch)["loss"]
                    run.backward(loss)
                    assert loader.current is not None
                    if not loader.current.is_last:
                        continue
                    optimizer.step()
                    optimizer.zero_grad()
                    run.step(loss=loss)
                faults.watch().come_to("eval")
                average.add(toy.model())
                schedule.step()
    except StopRequested as stop:
        return stop.reason
    return "done"


def ends(run_dir: Path, ranks: int, env: dict[str, str]) -> list[str]:
    found: list[str] = []
    while not found or found[-1] != "done":
        assert len(found) < 9, found
        try:
            found.append(run_ranks(train, ranks, run_dir, env)[0])
        except (RankDied, RankFailed):
            found.append("killed")
    return found


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_loop_of_ones_own_goes_on_with_the_same_bits(ranks: int, tmp_path: Path) -> None:
    assert ends(tmp_path / "reference", ranks, {}) == ["done"]
    last = ranks - 1
    env = plan(
        tmp_path / "faults",
        Fault("train", 3, rank=last, do="SIGTERM"),
        Fault("eval", 1, whom="group"),  # after the epoch's last step, before its end
        Fault("train", 4, rank=last, whom="group"),
        Fault("eval", 2, rank=last, do="SIGTERM"),
    )
    assert ends(tmp_path / "run", ranks, env).count("SIGTERM") >= 1
    assert not pending(tmp_path / "faults")
    assert_same_end(tmp_path / "run", tmp_path / "reference")
    assert ends(tmp_path / "run", ranks, {}) == ["done"]  # run again when it is done
    assert_same_end(tmp_path / "run", tmp_path / "reference")
    assert events(tmp_path / "run", "finished")


def test_what_cannot_be_saved_is_named() -> None:
    def without_state() -> None:
        with ddpkit.runtime() as rt:
            rt.resume("unused", model=toy.model(), notes=[1, 2])

    with pytest.raises(UserError, match=r"notes=list cannot be part of a checkpoint"):
        run_ranks(without_state, 1)
