"""What is recorded is the same at any number of ranks, and never a reason to hang or to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ddpkit
from ddpkit.errors import UserError
from ddpkit.means import RankMeans
from ddpkit.testing import run_ranks
from tests import toy


def _fit(folder: str, step: Any, **options: Any) -> None:
    with ddpkit.runtime() as rt:
        torch.manual_seed(0)
        model = rt.wrap(toy.model(dropout=0.0, batchnorm=False, dtype="float64"))
        ddpkit.fit(
            rt,
            folder,
            model=model,
            loader=rt.loader(toy.dataset(24, dtype="float64"), global_batch_size=6),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            step=step,
            max_steps=4,
            log_every=2,
            **options,
        )


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_value_that_one_rank_alone_gives_is_its_own_mean(tmp_path: Path) -> None:
    def step(model: nn.Module, batch: Any) -> Any:
        with_more = {"extra": 3.0} if torch.distributed.get_rank() == 1 else {}
        return toy.step(model, batch) | with_more

    run_ranks(_fit, 3, str(tmp_path), step)
    assert [line["extra"] for line in _lines(tmp_path)] == [3.0, 3.0]
    assert all("loss" in line for line in _lines(tmp_path))


STEPS: list[list[dict[str, float]]] = [  # by rank
    [{"loss": 0.1}, {"loss": 0.2}, {"loss": 0.7}],
    [{"loss": 0.1, "more": 1.0}, {"more": 0.3, "loss": 0.2}, {"loss": 0.7}],
    [{"loss": 0.1, "more": 1.0}, {"more": 0.3, "loss": 0.2}, {"loss": 0.7, "more": 0.5}],
    [{"less": 0.4}, {"less": 0.5}, {"loss": float("nan")}],  # the last rank's weight is 0 here
    [{}, {}, {}],
    [{"loss": 0.1}, {"loss": 0.2}, {"loss": 0.7}],
]


def _means(rt: ddpkit.Runtime, means: RankMeans, number: int) -> tuple[dict[str, float], bool]:
    weight = 0.0 if number == 3 and rt.rank == 2 else 1.0 + rt.rank
    of_itself = [10.0 * number + rt.rank, -1.0]
    means.begin(STEPS[number][rt.rank], weight, number == rt.rank == 2, of_itself)
    values, asked, by_rank = means.end()
    assert by_rank == [[10.0 * number + rank, -1.0] for rank in range(3)]
    return values, asked


def _one_after_the_other() -> list[Any]:
    with ddpkit.runtime(timeout_s=20) as rt:
        means = RankMeans(rt.ranks, rt.device)
        in_a_row = [_means(rt, means, number) for number in range(len(STEPS))]
        each_alone = [_means(rt, RankMeans(rt.ranks, rt.device), number) for number in range(len(STEPS))]
        assert in_a_row == each_alone  # to the last bit: a resumed run begins anywhere
        return in_a_row


class Order:
    """Notes at which step a line comes, and what else has come by then."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def on_step_end(self, run: ddpkit.Run) -> None:
        self.seen.append(("step", run.progress.step))

    def on_record(self, run: ddpkit.Run, kind: str, values: Any, clock: Any) -> None:
        self.seen.append((kind, run.progress.step))

    def on_epoch_end(self, run: ddpkit.Run) -> None:
        self.seen.append(("epoch", run.progress.step))


def _in_order(run_dir: str) -> list[tuple[str, int]]:
    order = Order()
    with ddpkit.runtime(timeout_s=20) as rt:
        run = rt.resume(run_dir, every_steps=None, log_every=2, callbacks=[order])
        for epoch in run.epochs(2):
            for _ in range(3):
                run.step(loss=1.0)
            if epoch == 0:
                run.record("eval", {"accuracy": 1.0})
        run.step(loss=1.0)
        run.step(loss=1.0)  # recorded, and nothing follows that would wait for it
    return order.seen


def test_a_line_is_written_before_anything_that_comes_after_its_step(tmp_path: Path) -> None:
    seen, _ = run_ranks(_in_order, 2, str(tmp_path))
    first = [("step", 1), ("step", 2), ("train", 2), ("step", 3), ("eval", 3), ("epoch", 3)]
    then = [("step", 4), ("train", 4), ("step", 5), ("step", 6), ("train", 6), ("epoch", 6)]
    assert seen == [*first, *then, ("step", 7), ("step", 8), ("train", 8)]
    places = [(line["kind"], line["step"], line["epoch"]) for line in _lines(tmp_path)]
    assert places == [("train", 2, 0), ("eval", 3, 0), ("train", 4, 1), ("train", 6, 1), ("train", 8, 2)]


def test_means_are_over_the_ranks_that_name_a_value_whatever_was_named_before() -> None:
    by_rank = run_ranks(_one_after_the_other, 3)
    assert by_rank[0] == by_rank[1] == by_rank[2]
    assert [asked for _, asked in by_rank[0]] == [False, False, True, False, False, False]
    for number, (found, _) in enumerate(by_rank[0]):
        counted = [(1.0 + rank, STEPS[number][rank]) for rank in range(2 if number == 3 else 3)]
        names = {name for _, given in counted for name in given}
        assert found.keys() == names
        for name in names:
            given = [(weight, values[name]) for weight, values in counted if name in values]
            mean = sum(weight * value for weight, value in given) / sum(weight for weight, _ in given)
            assert found[name] == pytest.approx(mean, rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weighted_values_do_not_depend_on_the_ranks(tmp_path: Path, dtype: torch.dtype) -> None:
    def step(model: nn.Module, batch: Any) -> Any:
        # Sums over the pass are what must come out, whatever way it was cut: sample i weighs i.
        weights = batch[2].double()
        errors = (model(batch[0]) - batch[1]).square().squeeze(1)
        total = weights.sum()
        return {"loss": (errors * weights).sum() / total.clamp(min=1), "weight": total.to(dtype)}

    losses = []
    for nproc in (1, 2, 3):
        run_ranks(_fit, nproc, str(tmp_path / str(nproc)), step)
        losses.append([line["loss"] for line in _lines(tmp_path / str(nproc))])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[2] == pytest.approx(losses[0], rel=1e-9)


def test_a_step_of_no_weight_at_all_records_nothing_and_goes_on(tmp_path: Path) -> None:
    def step(model: nn.Module, batch: Any) -> Any:
        return toy.step(model, batch) | {"weight": 0.0}

    run_ranks(_fit, 2, str(tmp_path), step)
    assert [line["step"] for line in _lines(tmp_path)] == [2, 4]
    assert not any("loss" in line for line in _lines(tmp_path))


def _own_loop_without_is_last(folder: str) -> int:
    with ddpkit.runtime() as rt:
        model = rt.wrap(toy.model())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = rt.loader(toy.dataset(24), global_batch_size=8, micro_batch_size=2)
        run = rt.resume(folder, model=model, optimizer=optimizer, loader=loader)
        for batch in loader:
            run.backward(toy.step(model, batch)["loss"])
            run.step()
        return run.progress.step


def test_a_loop_that_steps_after_every_micro_batch_is_told_how(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"if loader\.current\.is_last:"):
        run_ranks(_own_loop_without_is_last, 2, str(tmp_path))


class Within:
    """A metric object: the part of the samples whose error is small, over all ranks."""

    def reset(self) -> None:
        self.right = torch.zeros(2, dtype=torch.float64)

    def update(self, errors: torch.Tensor) -> None:
        self.right += torch.tensor([(errors < 1.0).sum(), len(errors)])

    def compute(self) -> torch.Tensor:
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.right)
        return self.right[0] / self.right[1]


def test_fit_evaluates_with_metric_objects(tmp_path: Path) -> None:
    def errors(model: nn.Module, batch: Any) -> torch.Tensor:
        return toy.eval_step(model, batch)["error"]

    results = []
    for nproc in (1, 2):
        evaluation = ddpkit.Evaluation(
            toy.dataset(11, augment=False, dtype="float64"), errors, batch_size=3, metrics={"within": Within()}
        )
        run_ranks(_fit, nproc, str(tmp_path / str(nproc)), toy.step, evaluation=evaluation)
        results.append([line["within"] for line in _lines(tmp_path / str(nproc)) if line["kind"] == "eval"])
    assert len(results[0]) == 1
    assert results[1] == pytest.approx(results[0], rel=1e-12)
