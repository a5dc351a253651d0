"""Batches of datasets of tensors are those that torch makes sample by sample."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, default_collate

from ddpkit.fetching import LoaderOptions, SeededDataset, collate_of
from ddpkit.sampler import ElasticOrder, Plan
from ddpkit.tensor_rows import has_rows, rows
from ddpkit.world import World

TENSORS = TensorDataset(
    torch.randn(20, 3, 2).transpose(1, 2), torch.arange(20), torch.rand(20, 1).half(), torch.rand(20) > 0.5
)


class Doubled(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return tuple(2 * tensor[index] for tensor in self.tensors)


class Marked(torch.Tensor):
    pass


def equal(ours: Any, theirs: Any) -> bool:
    assert type(ours) is type(theirs) is list and len(ours) == len(theirs)
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize(
    "dataset",
    [
        TENSORS,
        Subset(TENSORS, [3, 1, 19, 3, 0, 7]),
        Subset(Subset(TENSORS, np.arange(10, 20)[::-1]), torch.tensor([4, 2, 0])),  # type: ignore[arg-type]  # as people do
    ],
    ids=["tensors", "a part", "a part of a part"],
)
def test_rows_are_what_torch_collates(dataset: Any) -> None:
    items = [len(dataset) - 1, 0, 1, 0]
    assert has_rows(dataset)
    assert equal(rows(dataset, items), default_collate([dataset[item] for item in items]))


@pytest.mark.parametrize(
    "dataset",
    [
        Doubled(torch.arange(20)),
        Subset(Doubled(torch.arange(20)), range(5)),
        ConcatDataset([TENSORS, TENSORS]),
        TensorDataset(torch.eye(20).to_sparse()),
        TensorDataset(torch.ones(20).as_subclass(Marked)),
        [1, 2, 3],
    ],
    ids=["a subclass", "a part of one", "several", "sparse", "tensors of a subclass", "a list"],
)
def test_what_may_be_more_than_rows_is_fetched_one_by_one(dataset: Any) -> None:
    assert not has_rows(dataset)
    samples = [dataset[item] for item in (0, 2)]
    [fetch] = Plan(ElasticOrder(2, 0, False), World(), 0, 2, None, drop_last=True).fetches(0, 0)
    fetch.items[:] = [0, 2]
    _, batch = SeededDataset(dataset, lambda samples: samples)[fetch]
    assert str(batch) == str(samples)


def test_passes_with_and_without_samples() -> None:
    world = World(rank=1, world_size=2)
    # Of three samples rank 1 gets one, and in its second pass none.
    plan = Plan(ElasticOrder(20, 0, True), world, 0, 3, 1, drop_last=False)
    ours = SeededDataset(TENSORS, collate_of(LoaderOptions()))
    one_by_one = SeededDataset(TENSORS, lambda samples: default_collate(samples))
    sizes = set()
    for fetch in plan.fetches(0, 0):
        (part, batch), (_, expected) = ours[fetch], one_by_one[fetch]
        assert equal(batch, expected)
        sizes.add(part.size)
    assert sizes == {0, 1}


def test_no_generator_is_touched() -> None:
    [fetch] = Plan(ElasticOrder(20, 0, True), World(), 0, 20, None, drop_last=True).fetches(0, 0)
    before = random.getstate(), torch.get_rng_state()
    SeededDataset(TENSORS, collate_of(LoaderOptions()))[fetch]
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize(("items", "error"), [(["a"], (IndexError, TypeError)), ([20], IndexError)], ids=str)
def test_an_item_that_is_not_there_is_answered_as_by_the_dataset(items: list[Any], error: Any) -> None:
    [fetch] = Plan(ElasticOrder(1, 0, True), World(), 0, 1, None, drop_last=True).fetches(0, 0)
    fetch.items[:] = items
    with pytest.raises(error) as caught:
        SeededDataset(TENSORS, collate_of(LoaderOptions()))[fetch]
    assert "at sample" in "".join(getattr(caught.value, "__notes__", ["at sample"]))


def test_a_sampler_of_groups_of_samples() -> None:
    """An item may be whatever a dataset takes; torch's takes lists of numbers, and slices."""
    [fetch] = Plan(ElasticOrder(2, 0, True), World(), 0, 2, None, drop_last=True).fetches(0, 0)
    fetch.items[:] = [[0, 5], [1, 3]]
    _, batch = SeededDataset(TENSORS, collate_of(LoaderOptions()))[fetch]
    assert equal(batch, default_collate([TENSORS[[0, 5]], TENSORS[[1, 3]]]))


def test_a_dataset_that_draws_is_seeded_as_ever() -> None:
    class Drawing(Dataset[float]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> float:
            return random.random()

    [fetch] = Plan(ElasticOrder(4, 0, True), World(), 0, 4, None, drop_last=True).fetches(0, 0)
    first, second = (SeededDataset(Drawing(), collate_of(LoaderOptions()))[fetch][1] for _ in range(2))
    assert torch.equal(first, second) and len(set(first.tolist())) == 4
