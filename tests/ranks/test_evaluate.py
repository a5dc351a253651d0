"""Each sample counts once, on any number of ranks, and nothing is different afterwards."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SubsetRandomSampler
from torch.utils.data.distributed import DistributedSampler

import ddpkit
from ddpkit.errors import UserError
from ddpkit.evaluate import EvaluationStopped, evaluate
from ddpkit.fetching import LoaderOptions
from ddpkit.testing import run_ranks
from tests import toy


def batchnorm_model() -> nn.Module:
    return toy.model(dropout=0.5, dtype="float64")


def samples(length: int, stream: bool = False) -> Any:
    return toy.dataset(length, dtype="float64", stream=stream)


def typed_step(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    inputs, targets, indices = batch
    errors = (model(inputs) - targets).squeeze(1)
    return {
        "error": errors.square(),
        "index": indices,
        "right": errors.abs() < 0.5,
        "coarse": (errors > 0).to(torch.bfloat16),
    }


SETTINGS: list[tuple[int, int, bool, int]] = [  # length, batch size, stream, workers
    (37, 8, False, 0),
    (37, 8, False, 2),
    (37, 8, True, 0),
    (37, 5, True, 2),
    (37, 100, False, 0),
    (2, 8, False, 0),
    (2, 8, True, 0),
    (1, 1, True, 2),
    (36, 3, False, 0),
]


def evaluations() -> list[dict[str, float]]:
    with ddpkit.runtime(seed=4, timeout_s=30) as rt:
        model = rt.wrap(batchnorm_model())
        return [
            rt.evaluate(model, samples(length, stream), typed_step, batch_size=batch, num_workers=workers)
            for length, batch, stream, workers in SETTINGS
        ]


def test_the_numbers_are_the_same_on_any_number_of_ranks() -> None:
    alone = evaluations()
    for (length, *_), found in zip(SETTINGS, alone, strict=True):
        assert found["index"] == (length - 1) / 2
        assert 0 < found["error"] < 10 and 0 <= found["right"] <= 1
    assert alone[0] == pytest.approx(alone[3], rel=1e-12)  # batch size, stream and workers do not matter
    for ranks in (1, 2, 3, 4):
        by_rank = run_ranks(evaluations, ranks)
        assert all(found == by_rank[0] for found in by_rank)
        for found, expected in zip(by_rank[0], alone, strict=True):
            assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)


def loaders() -> list[dict[str, float]]:
    """The same data in all that may hold it."""
    with ddpkit.runtime(seed=4, timeout_s=30) as rt:
        model = rt.wrap(batchnorm_model())
        data = samples(21)
        distributed: DistributedSampler[Any] = DistributedSampler(data, rt.world_size, rt.rank)
        sources: list[Any] = [
            data,
            rt.loader(data, global_batch_size=4),
            rt.loader(data, global_batch_size=20, micro_batch_size=3, drop_last=False, num_workers=1),
            rt.loader(data, global_batch_size=4, sampler="distributed"),
            DataLoader(data, 4, shuffle=True, drop_last=True),
            DataLoader(data, 4, sampler=distributed, num_workers=1),
            DataLoader(samples(21, stream=True), 4),
        ]
        found = [rt.evaluate(model, source, typed_step) for source in sources]
        refused: list[Any] = [
            DataLoader(data, 4, sampler=SubsetRandomSampler(range(5))),
            DataLoader(data, 4, sampler=RandomSampler(data, num_samples=5)),
            DataLoader(data, batch_sampler=[[0, 1], [2]]),
            rt.loader(data, global_batch_size=4, sampler=lambda data: SubsetRandomSampler(range(8))),
        ]
        for source in refused:
            with pytest.raises(UserError, match="give the dataset"):
                rt.evaluate(model, source, typed_step)
        return found


def test_a_loaders_dataset_is_evaluated_as_a_whole() -> None:
    for ranks in (1, 2):
        for found in run_ranks(loaders, ranks):
            for values in found:
                assert values == pytest.approx(found[0], rel=1e-12)
                assert values["index"] == 10


class Odd(Exception):
    pass


def surroundings() -> None:
    """Modes, generators, gradients and buffers after evaluations that end well, fail, or are stopped."""
    with ddpkit.runtime(seed=4, timeout_s=30) as rt:
        model = rt.wrap(batchnorm_model(), sync_batchnorm=False)
        inside: Any = model.module if rt.world_size > 1 else model
        inside[1].eval()  # a frozen layer in a training model
        modes = [part.training for part in model.modules()]
        assert True in modes and False in modes
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)

        def fails(model: nn.Module, batch: Any) -> Any:
            assert not any(part.training for part in model.modules())
            assert not torch.is_grad_enabled()
            random.random(), np.random.rand(), torch.rand(3)
            raise Odd

        def check(before: list[Any]) -> None:
            assert [part.training for part in model.modules()] == modes
            assert torch.is_grad_enabled()
            assert all(parameter.grad is not None for parameter in model.parameters())
            after = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]  # the legacy state is a tuple
            assert after == before

        before = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]  # the legacy state is a tuple
        for length in (9, 1):
            rt.evaluate(model, samples(length), toy.eval_step, batch_size=2)
            check(before)
        with pytest.raises(Odd):
            rt.evaluate(model, samples(9), fails, batch_size=2)
        check(before)
        rt.stop.request("enough")
        with pytest.raises(EvaluationStopped, match="enough"):
            while True:
                evaluate(rt, model, samples(9), toy.eval_step, batch_size=2, options=LoaderOptions(), stoppable=True)
        check(before)


@pytest.mark.parametrize("ranks", [1, 2])
def test_everything_is_as_before_afterwards(ranks: int) -> None:
    run_ranks(surroundings, ranks)


class Nothing(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


class Growing(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(list(toy.dataset(5 + 3 * torch.distributed.get_rank(), dtype="float64")))  # type: ignore[call-overload]  # toy's are iterable by index


def refusals() -> list[str]:
    messages = []
    with ddpkit.runtime(timeout_s=30) as rt:
        model = rt.wrap(batchnorm_model())
        data = samples(7)

        def by_rank(model: nn.Module, batch: Any) -> dict[str, Tensor]:
            return {f"from rank {rt.rank}": batch[0].sum(dim=1)}

        def by_batch(model: nn.Module, batch: Any) -> dict[str, Tensor]:
            return {f"of {len(batch[0])}": batch[0].sum(dim=1)}

        cases: list[tuple[Any, Any]] = [
            (data, lambda model, batch: {"mean": batch[0].mean()}),
            (data, lambda model, batch: {"all": batch[0]}),
            (data, lambda model, batch: {"listed": batch[0].sum(dim=1).tolist()}),
            (data, lambda model, batch: batch[0].sum(dim=1)),
            (samples(0), toy.eval_step),
            (Nothing(), toy.eval_step),
            *([(data, by_batch)] if rt.world_size == 1 else [(data, by_rank), (Growing(), toy.eval_step)]),
        ]
        for source, step in cases:
            with pytest.raises(UserError) as caught:
                rt.evaluate(model, source, step, batch_size=2)
            messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_cannot_be_counted_exactly_is_refused(ranks: int) -> None:
    for messages in run_ranks(refusals, ranks):
        scalar, matrix, listed, bare, empty, nothing, *names = messages
        assert "'mean' is to be a tensor of shape (2,)" in scalar and "found shape ()" in scalar
        assert "found shape (2, 6)" in matrix
        assert "found list" in listed
        assert "returned Tensor; it is to return a mapping" in bare
        assert empty == nothing == "data.eval: the dataset is empty"
        if ranks == 1:
            assert "['of 1'], and before that ['of 2']" in names[0]
        else:
            assert "different names on the ranks: [['from rank 0'], ['from rank 1']]" in names[0]
            assert "different numbers of samples ([5, 8], by rank)" in names[1]


def fails_on_one() -> None:
    with ddpkit.runtime(timeout_s=30) as rt:

        def step(model: nn.Module, batch: Any) -> Any:
            if rt.rank == 1:
                raise Odd("on rank 1")
            return toy.eval_step(model, batch)

        rt.evaluate(rt.wrap(batchnorm_model()), samples(9), step, batch_size=2)


def test_an_error_on_one_rank_ends_all_with_it() -> None:
    with pytest.raises(Odd, match="on rank 1"):
        run_ranks(fails_on_one, 3, timeout_s=20)


class Buffers(nn.Module):
    """Rank zero's buffers are the ones that count, whatever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)
        self.register_buffer("turned", torch.zeros(4, 3).t())
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("coarse", torch.zeros(2, dtype=torch.bfloat16))

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layer(inputs)
        return output


def buffers() -> list[Any]:
    with ddpkit.runtime(timeout_s=30) as rt:
        model = rt.wrap(Buffers())
        for buffer in model.buffers():
            buffer.fill_(rt.rank == 0)
        rt.evaluate(model, toy.dataset(3), toy.eval_step)
        return [buffer.float().sum().item() for buffer in model.buffers()]


def test_all_ranks_evaluate_with_rank_zeros_buffers() -> None:
    assert run_ranks(buffers, 2) == [[12, 1, 2]] * 2


# torchmetrics' objects.


class Scored(Dataset[tuple[Tensor, int]]):
    """A score for each of three classes, and the class."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.scores = torch.rand(length, 3, generator=generator).softmax(dim=1)
        self.classes = torch.randint(0, 3, (length,), generator=generator)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.scores[index], int(self.classes[index])


class Largest:
    """Like torchmetrics' in its methods, and no more; gathers over all ranks by itself."""

    def __init__(self, rt: ddpkit.Runtime) -> None:
        self.rt = rt

    def reset(self) -> None:
        self.largest = 0.0

    def update(self, scores: Tensor, classes: Tensor) -> None:
        self.largest = max(self.largest, float(scores.max()))

    def compute(self) -> float:
        return float(max(self.rt.ranks.exchange("largest", self.largest)))


def with_metrics(length: int) -> dict[str, float]:
    import torchmetrics  # here: the fork server need not import it
    from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

    warnings.simplefilter("ignore")  # AUROC's, about classes of which a tiny set has none
    with ddpkit.runtime(timeout_s=10) as rt:
        model = rt.wrap(nn.Linear(1, 1))
        metrics: dict[str, Any] = {
            "accuracy": MulticlassAccuracy(3, average="micro"),
            "auroc": MulticlassAUROC(3),
            "both": torchmetrics.MetricCollection([MulticlassAccuracy(3, average="macro"), MulticlassAUROC(3)]),
            "largest": Largest(rt),
        }
        answers = []
        for _ in range(2):  # the objects are used again in every evaluation
            step = lambda model, batch: (batch[0], batch[1])  # noqa: E731 - short
            answers.append(rt.evaluate(model, Scored(length), step, metrics=metrics, batch_size=3))
        assert str(answers[0]) == str(answers[1])
        mean = rt.evaluate(
            model, Scored(length), lambda model, batch: batch[0][:, 0], metrics={"m": torchmetrics.MeanMetric()}
        )
        named = rt.evaluate(
            model,
            Scored(length),
            lambda model, batch: {"preds": batch[0], "target": batch[1]},
            metrics={"named": MulticlassAccuracy(3, average="micro")},
        )
        if length == 20:  # where every rank has samples, and so finds the fault
            with pytest.raises(UserError, match=r"'each' computed values of shape \(3,\)"):
                rt.evaluate(model, Scored(length), step, metrics={"each": MulticlassAccuracy(3, average=None)})
        return {**answers[0], **mean, **named}


@pytest.mark.parametrize(("length", "ranks"), [(20, 2), (3, 4), (1, 2)])
def test_metric_objects_see_every_sample_once_also_where_a_rank_has_none(length: int, ranks: int) -> None:
    alone = with_metrics(length)
    assert alone["accuracy"] == alone["named"]
    assert set(alone) == {
        "accuracy",
        "auroc",
        "both/MulticlassAccuracy",
        "both/MulticlassAUROC",
        "largest",
        "m",
        "named",
    }
    for found in run_ranks(with_metrics, ranks, length, timeout_s=60):
        assert found == pytest.approx(alone, rel=1e-6, nan_ok=True)
