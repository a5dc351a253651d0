"""The loader as a script of one's own sees it."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import Sampler, WeightedRandomSampler

import ddpkit
from ddpkit.errors import UserError
from ddpkit.loader import Loader
from ddpkit.testing import run_ranks


class Numbers:
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if index >= self.length:
            raise IndexError(index)
        return index


def where(loader: Loader) -> tuple[int, int, int, bool]:
    return loader.epoch, loader.position, loader.consumed, loader.at_end


@pytest.mark.parametrize("workers", [0, 2])
def test_leaving_early_ends_the_epoch(workers: int) -> None:
    children = psutil.Process().children()  # other tests' fork server
    with ddpkit.runtime() as rt:
        loader = rt.loader(Numbers(20), global_batch_size=4, num_workers=workers)
        assert where(loader) == (0, 0, 0, False)
        first: list[int] = []
        for batch in loader:
            first += batch.tolist()
            if len(first) == 8:
                break
        assert where(loader) == (0, 8, 8, False)
        second = [number for batch in loader for number in batch.tolist()]
        assert sorted(second) == list(range(20))
        assert where(loader) == (2, 0, 28, False)
        whole = [number for batch in loader for number in batch.tolist()]
        assert sorted(whole) == list(range(20)) and whole != second
    assert psutil.Process().children() == children


def test_a_loader_goes_on_where_another_one_stopped() -> None:
    with ddpkit.runtime() as rt:
        whole = [batch.tolist() for loader in [rt.loader(Numbers(22), global_batch_size=4)] for batch in loader]
    for stop in range(1, 6):
        with ddpkit.runtime() as rt:
            loader = rt.loader(Numbers(22), global_batch_size=4)
            for number, _ in enumerate(loader, 1):
                if number == stop:
                    break
            state = loader.state_dict()
            assert state["at_end"] == (stop == 5)
        with ddpkit.runtime() as rt:
            loader = rt.loader(Numbers(22), global_batch_size=4, num_workers=stop % 2)
            loader.load_state_dict(state)
            assert [batch.tolist() for batch in loader] == whole[stop:]
            assert where(loader) == (1, 0, 20, False)
            assert len(loader) == 5  # the whole epoch


def test_several_loaders_have_orders_of_their_own() -> None:
    with ddpkit.runtime() as rt:
        one, two = (rt.loader(Numbers(20), global_batch_size=4) for _ in range(2))
        pairs = [(a.tolist(), b.tolist()) for a, b in zip(one, two, strict=True)]
        assert all(a != b for a, b in pairs)
        assert len(pairs) == 5
    with ddpkit.runtime(seed=0) as rt:
        again = [rt.loader(Numbers(20), global_batch_size=4) for _ in range(2)]
        assert [batch.tolist() for batch in again[1]] == [b for _, b in pairs]
    with ddpkit.runtime(seed=1) as rt:
        other = rt.loader(Numbers(20), global_batch_size=4)
        assert [batch.tolist() for batch in other] != [a for a, _ in pairs]


@pytest.mark.parametrize(
    ("batch", "micro", "drop_last", "expected"),
    [(4, None, True, 5), (4, None, False, 6), (4, 3, True, 10), (4, 3, False, 11), (22, 5, True, 5)],
)
def test_the_length_is_that_of_a_whole_epoch(batch: int, micro: int | None, drop_last: bool, expected: int) -> None:
    with ddpkit.runtime() as rt:
        loader = rt.loader(Numbers(22), global_batch_size=batch, micro_batch_size=micro, drop_last=drop_last)
        assert len(loader) == expected == len(list(loader))


def test_what_cannot_be_loaded_is_refused() -> None:
    with ddpkit.runtime() as rt:
        with pytest.raises(UserError, match="the dataset is empty"):
            rt.loader(Numbers(0), global_batch_size=4)
        with pytest.raises(UserError, match="3 samples do not fill one global batch of 4; make the batch smaller"):
            rt.loader(Numbers(3), global_batch_size=4)
        with pytest.raises(UserError, match="iterator has no length"):
            rt.loader(iter([1]), global_batch_size=1)
        assert len(rt.loader(Numbers(3), global_batch_size=4, drop_last=False)) == 1


def test_a_dataset_that_has_grown_meanwhile_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with ddpkit.runtime() as rt:
        loader = rt.loader(Numbers(22), global_batch_size=4)
        next(iter(loader))
        state = loader.state_dict()
        with caplog.at_level(logging.WARNING, "ddpkit"):
            rt.loader(Numbers(22), global_batch_size=4).load_state_dict(state)
            assert not caplog.messages
            rt.loader(Numbers(30), global_batch_size=4).load_state_dict(state)
        assert "22 samples when the run stopped in the middle of epoch 0, 30 now" in caplog.messages[0]


# On several ranks.


class OfItsOwn(Sampler[int]):
    """Draws from a generator that nobody else knows of."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[int]:
        return iter(self.random.sample(range(20), 20))


def on_ranks() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with ddpkit.runtime(timeout_s=20) as rt:
        messages: list[str] = []
        for options in (
            {"global_batch_size": 2},
            {"global_batch_size": 4, "sampler": "distributed"},
        ):
            with pytest.raises(UserError) as caught:
                rt.loader(Numbers(20), **options)
            messages.append(str(caught.value))
        with pytest.raises(UserError) as caught:
            for _ in rt.loader(Numbers(20), global_batch_size=4, sampler=lambda data: OfItsOwn(rt.rank)):
                pass
        found["messages"] = [*messages, str(caught.value)]

        loader = rt.loader(Numbers(20), global_batch_size=6, sampler=lambda data: WeightedRandomSampler([1] * 20, 20))
        found["weighted"] = [[batch.tolist() for batch in loader] for _ in range(2)]
        loader = rt.loader(Numbers(20), global_batch_size=6, sampler="distributed", num_workers=1)
        found["distributed"] = [[batch.tolist() for batch in loader] for _ in range(2)]

        records: list[str] = []

        def keep(record: logging.LogRecord) -> bool:
            records.append(record.getMessage())
            return False

        logging.getLogger("ddpkit").addFilter(keep)
        loader.load_state_dict(
            {"epoch": 1, "position": 6, "consumed": 24, "at_end": False, "world_size": 3, "length": 20}
        )
        found["resumed"] = [batch.tolist() for batch in loader]
        loader.load_state_dict(
            {"epoch": 1, "position": 6, "consumed": 24, "at_end": False, "world_size": 2, "length": 20}
        )
        found["told"] = records
    return found


def test_samplers_on_several_ranks() -> None:
    by_rank = run_ranks(on_ranks, 3)
    for rank, found in enumerate(by_rank):
        small, shares, own = found["messages"]
        assert "2 samples cannot be split over 3 ranks; give at least 3, or start fewer ranks" in small
        assert "global_batch_size=4 is not a multiple of 3 ranks" in shares
        assert "the order of epoch 0 on ranks [1, 2] is not that of rank 0" in own
        assert found["resumed"] == found["distributed"][1][1:]  # exact at the same world size
        assert [("was 2 and is now 3" in text) for text in found["told"]] == ([True] if rank == 0 else [])
        assert all(len(batch) == 2 for batch in found["distributed"][0] + found["weighted"][0])
    assert by_rank[0]["distributed"][0] != by_rank[0]["distributed"][1]  # set_epoch is called
    for kind, length in (("distributed", 18), ("weighted", 18)):
        for epoch in range(2):
            numbers = [number for found in by_rank for batch in found[kind][epoch] for number in batch]
            assert len(numbers) == length
            assert kind == "weighted" or len(set(numbers)) == length


def uneven_to_device() -> list[int]:
    with ddpkit.runtime(timeout_s=20) as rt:
        return [len(batch) for batch in rt.loader(Numbers(10), global_batch_size=4, drop_last=False)]


def test_every_rank_gets_as_many_batches() -> None:
    assert run_ranks(uneven_to_device, 3) == [[2, 2, 1], [1, 1, 1], [1, 1, 0]]


def dying_worker() -> None:
    class Deadly(Numbers):
        def __getitem__(self, index: int) -> int:
            if index == 7:
                psutil.Process().kill()
            return index

    with ddpkit.runtime(timeout_s=20) as rt:
        for _ in rt.loader(Deadly(20), global_batch_size=2, num_workers=1):
            torch.distributed.barrier()


def test_the_death_of_a_worker_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        run_ranks(dying_worker, 2, timeout_s=30)


class Searching(Numbers):
    def __getitem__(self, index: int) -> int:
        return next(each for each in range(self.length) if each == index != 7)


def first_of(batch: list[int]) -> int:
    return next(number for number in batch if number != 3)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("place", ["dataset", "collate_fn"])
def test_a_fetch_that_runs_out_of_something_does_not_end_the_epoch(place: str, workers: int) -> None:
    collate_fn = None if place == "dataset" else first_of
    data = Searching(20) if place == "dataset" else Numbers(20)
    with ddpkit.runtime() as rt:
        loader = rt.loader(data, global_batch_size=1, num_workers=workers, collate_fn=collate_fn)
        with pytest.raises(RuntimeError, match="StopIteration in a fetch, which would look like the end of the epoch"):
            for _ in loader:
                pass
