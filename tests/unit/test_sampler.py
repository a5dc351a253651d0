from __future__ import annotations

import tracemalloc
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import RandomSampler, Sampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

import ddpkit
from ddpkit.errors import UserError
from ddpkit.sampler import DistributedOrder, ElasticOrder, Fetch, Order, Pass, Plan, SampledOrder, make_order, passes
from ddpkit.world import World


def world(rank: int, size: int) -> World:
    return World(rank, size, rank, size, "127.0.0.1", 1)


def plan(
    order: Order, rank: int = 0, size: int = 1, batch: int = 8, micro: int | None = None, drop_last: bool = False
) -> Plan:
    return Plan(order, world(rank, size), 0, batch, micro, drop_last)


def elastic(length: int, shuffle: bool = True, seed: int = 0) -> ElasticOrder:
    return ElasticOrder(length, seed, shuffle)


def taken(fetches: list[Fetch]) -> list[Any]:
    """What the step sees: a stand-in is not part of a pass of size zero."""
    return [item for fetch in fetches for item in fetch.items if fetch.part.size]


# Shares.


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "sizes"),
    [
        (64, None, 3, [[22], [21], [21]]),
        (5, None, 4, [[2], [1], [1], [1]]),
        (4, None, 4, [[1], [1], [1], [1]]),
        (5, 1, 4, [[1, 1], [1, 0], [1, 0], [1, 0]]),
        (64, 8, 3, [[8, 7, 7], [7, 7, 7], [7, 7, 7]]),
        (3, None, 4, [[1], [1], [1], [0]]),  # the last batch of an epoch
        (10, 100, 2, [[5], [5]]),
    ],
)
def test_a_global_batch_is_split_over_ranks_and_passes(
    batch: int, micro: int | None, ranks: int, sizes: list[list[int]]
) -> None:
    assert [[part.size for part in passes(0, batch, micro, rank, ranks)] for rank in range(ranks)] == sizes


@given(
    start=st.integers(0, 10**9),
    batch=st.integers(1, 200),
    micro=st.none() | st.integers(1, 60),
    ranks=st.integers(1, 9),
)
def test_every_position_comes_exactly_once_in_equally_many_passes(
    start: int, batch: int, micro: int | None, ranks: int
) -> None:
    per_rank = [passes(start, start + batch, micro, rank, ranks) for rank in range(ranks)]

    assert len({len(parts) for parts in per_rank}) == 1
    positions = [position for parts in per_rank for part in parts for position in range(part.start, part.stop)]
    assert positions == list(range(start, start + batch))
    shares = [sum(part.size for part in parts) for parts in per_rank]
    assert max(shares) - min(shares) <= 1
    sizes = [part.size for parts in per_rank for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert micro is None or max(sizes) <= micro
    for parts in per_rank:
        assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    total = sum(part.weight(ranks) for parts in per_rank for part in parts)
    assert total / ranks == pytest.approx(1)  # DDP divides the sum by the ranks


# An epoch.


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 300),
    batch=st.integers(4, 50),
    micro=st.none() | st.integers(1, 9),
    drop_last=st.booleans(),
    position_in_batches=st.integers(0, 8),
    epoch=st.integers(0, 3),
)
def test_the_order_depends_on_neither_ranks_nor_micro_batches_nor_where_one_begins(
    length: int, batch: int, micro: int | None, drop_last: bool, position_in_batches: int, epoch: int
) -> None:
    whole = [int(item) for item in taken(list(plan(elastic(length), batch=batch).fetches(epoch, 0)))]
    assert sorted(whole) == list(range(length))
    end = length - length % batch if drop_last else length
    position = min(position_in_batches * batch, end)

    for ranks in (1, 2, 3, 4):
        plans = [plan(elastic(length), rank, ranks, batch, micro, drop_last) for rank in range(ranks)]
        fetched = [list(each.fetches(epoch, position)) for each in plans]
        by_position: dict[int, int] = {}
        for fetches in fetched:
            for fetch in fetches:
                if fetch.part.size:
                    for at, item in enumerate(fetch.items, fetch.part.start):
                        assert at not in by_position
                        by_position[at] = item
        assert [by_position[at] for at in sorted(by_position)] == whole[position:end]
        assert all(len(list(each.fetches(epoch, 0))) == len(each) for each in plans)


def test_epochs_and_seeds_differ_in_more_than_their_sum() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [int(item) for item in taken(list(plan(elastic(50, seed=seed)).fetches(epoch, 0)))]

    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(1, 2) == order(1, 2)


def test_without_shuffling_the_order_is_the_datasets() -> None:
    assert taken(list(plan(elastic(10, shuffle=False), batch=4).fetches(3, 0))) == list(range(10))


def test_an_epoch_over_a_billion_samples_is_entered_anywhere_without_memory() -> None:
    length, batch = 10**9, 256
    some = plan(elastic(length), rank=1, size=4, batch=batch)
    position = (length // 2) // batch * batch
    tracemalloc.start()
    try:
        first = next(some.fetches(5, position))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert first.part == Pass(position + 64, position + 128, position, position + batch, True)
    assert len(set(first.items)) == 64
    assert all(type(item) is int and 0 <= item < length for item in first.items)
    assert peak < 1_000_000
    assert len(some) == -(-length // batch)


def test_looking_far_ahead_takes_little_memory() -> None:
    tracemalloc.start()
    try:
        for _ in islice(plan(elastic(10**9), batch=64).fetches(0, 0), 3000):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000


# Orders of others.


class Dataset(TorchDataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


def distributed_plans(length: int, ranks: int, batch: int, drop_last: bool) -> list[Plan]:
    return [
        plan(
            DistributedOrder(Dataset(length), 0, True, drop_last, world(rank, ranks)),
            rank,
            ranks,
            batch,
            None,
            drop_last,
        )
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("drop_last", [True, False])
def test_distributed_takes_torchs_own_order_for_each_epoch(drop_last: bool) -> None:
    ranks, length = 3, 40
    for rank, each in enumerate(distributed_plans(length, ranks, 6, drop_last)):
        torchs: DistributedSampler[Any] = DistributedSampler(
            Dataset(length),
            ranks,
            rank,
            seed=0,
            drop_last=drop_last,
        )
        for epoch in (0, 1, 4):
            torchs.set_epoch(epoch)
            expected = list(torchs)
            found = taken(list(each.fetches(epoch, 0)))
            assert found == expected[: each.stop // ranks]
            assert taken(list(each.fetches(epoch, 12))) == found[4:]  # exact from the middle
        assert len(expected) - len(found) <= (1 if drop_last else 0)


def test_distributed_needs_equal_shares_and_says_what_a_new_world_size_costs() -> None:
    with pytest.raises(UserError, match="not a multiple of 3 ranks"):
        make_order("distributed", Dataset(10), 0, True, True, world(0, 3), 64, 0)
    order = make_order("distributed", Dataset(10), 0, True, True, world(0, 2), 4, 0)
    assert order.restored(2) is None
    assert "which was 3 and is now 2" in str(order.restored(3))


@pytest.mark.parametrize(
    "make",
    [
        lambda data: WeightedRandomSampler([1.0, 2.0] * (len(data) // 2), 30, replacement=True),
        lambda data: WeightedRandomSampler([1.0, 2.0] * (len(data) // 2), 12, replacement=False),
        lambda data: WeightedRandomSampler([1.0] * len(data), 30, generator=torch.Generator().manual_seed(3)),
        lambda data: SubsetRandomSampler(range(5, 25)),
        lambda data: RandomSampler(data),
        lambda data: RandomSampler(data, generator=torch.Generator().manual_seed(3)),
    ],
)
def test_a_sampler_of_the_users_gives_all_ranks_one_order_again_after_a_restart(make: Any) -> None:
    data = Dataset(40)

    def epochs(rank: int, ranks: int, *numbers: int) -> list[list[Any]]:
        torch.manual_seed(rank)  # the ranks' generators differ, and must not come in
        each = plan(make_order(make, data, 7, True, False, world(rank, ranks), 4, 7), rank, ranks, 4)
        before = torch.get_rng_state()
        found = [taken(list(each.fetches(number, 0))) for number in numbers]
        assert torch.equal(torch.get_rng_state(), before)
        return found

    whole = epochs(0, 1, 0, 1, 2)
    assert whole[0] != whole[1] != whole[2]
    assert epochs(0, 1, 2) == whole[2:]  # a restart in epoch 2 has not seen the epochs before
    by_rank = [epochs(rank, 2, 2)[0] for rank in range(2)]
    assert sorted(by_rank[0] + by_rank[1]) == sorted(whole[2])


class Keys(Sampler[str]):
    """Items that are no numbers, by epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Any:
        return iter([f"{self.epoch}-{letter}" for letter in "abcde"])


def test_a_samplers_items_may_be_anything_and_it_is_told_the_epoch() -> None:
    each = plan(SampledOrder(Keys(), 0), batch=2)
    assert taken(list(each.fetches(3, 2))) == ["3-c", "3-d", "3-e"]


class Short(Keys):
    def __len__(self) -> int:
        return 9


class Endless:
    def __iter__(self) -> Any:
        return iter(range(3))


def test_samplers_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(UserError, match="yielded 5 indices in epoch 0, but its length is 9"):
        list(plan(SampledOrder(Short(), 0)).fetches(0, 0))
    with pytest.raises(UserError, match="has no length"):
        SampledOrder(Endless(), 0)  # type: ignore[arg-type]  # what users may give
    with pytest.raises(UserError, match="write sampler: distributed"):
        make_order(lambda data: DistributedSampler(data, 1, 0), Dataset(4), 0, True, True, world(0, 1), 4, 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sampler": "Elastic"}, "'Elastic' is none"),
        ({"sampler": 3}, "3 is none"),
        ({"micro_batch_size": 0}, "micro_batch_size: 0"),
        ({"micro_batch_size": -3}, "micro_batch_size: -3"),
    ],
)
def test_a_loader_refuses_what_cannot_be(arguments: dict[str, Any], said: str) -> None:
    with ddpkit.runtime(world=World()) as rt, pytest.raises(UserError, match=said):
        rt.loader(list(range(10)), global_batch_size=2, **arguments)


def test_a_loader_takes_a_sampler_as_it_is() -> None:
    with ddpkit.runtime(world=World()) as rt:
        loader = rt.loader(
            list(range(10)), global_batch_size=2, sampler=torch.utils.data.SubsetRandomSampler([1, 3, 5, 7])
        )
        assert sorted(item for batch in loader for item in batch.tolist()) == [1, 3, 5, 7]
