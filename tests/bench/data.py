"""The sampler and the fetching of samples."""

from __future__ import annotations

import collections
import itertools
import time
import tracemalloc
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

import ddpkit
from ddpkit.sampler import ElasticOrder, Plan
from ddpkit.world import World
from tests.bench.measure import Bar, Measurement, Row, in_turn, seconds


class Virtual(Dataset[Any]):
    """As long as you like, and nothing to read: what is left is the loader's own cost."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.sample = torch.zeros(4)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.sample


def _plan(length: int) -> Plan:
    return Plan(ElasticOrder(length, 0, True), World(), 0, 64, None, drop_last=True)


def _first_index(repeats: int) -> list[Row]:
    """At 1e9 samples, which DistributedSampler cannot do: at 1e8 it takes 29 s and 4.7 GB."""

    def first(epoch: int) -> object:
        return next(iter(_plan(10**9).fetches(epoch, 0)))

    milliseconds = [1e3 * seconds(lambda: first(0)) for _ in range(repeats)]
    tracemalloc.start()
    collections.deque(itertools.islice(_plan(10**9).fetches(1, 0), 1000), maxlen=0)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return [
        Row("sampler, first index at 1e9", "ms", milliseconds, Bar(10.0, of="ours")),
        Row("sampler, memory at 1e9", "MB", [peak], Bar(20.0, of="ours")),
    ]


def _throughput(repeats: int) -> list[Row]:
    length = 10**6

    def ours() -> float:
        begun = time.perf_counter()
        count = sum(len(fetch.items) for fetch in _plan(length).fetches(0, 0))
        return count / (time.perf_counter() - begun)

    def peer() -> float:
        begun = time.perf_counter()
        sampler: DistributedSampler[Any] = DistributedSampler(Virtual(length), 1, 0, seed=0)
        batches = torch.utils.data.BatchSampler(sampler, 64, drop_last=True)
        count = sum(len(batch) for batch in batches)
        return count / (time.perf_counter() - begun)

    found = in_turn({"ours": ours, "peer": peer}, repeats)
    bar = Bar(1.0, at_least=True)
    return [Row("sampler, throughput at 1e6", "1/s", found["ours"], bar, "DistributedSampler", found["peer"])]


def _per_sample(batch_size: int, repeats: int) -> list[Row]:
    """Without workers, over a dataset that has nothing to do: what is left is the cost of loading itself."""
    batches = max(100, 25600 // batch_size)
    dataset = Virtual(batch_size * batches)
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, 1, 0, seed=0)
    peer = DataLoader(dataset, batch_size, sampler=sampler, drop_last=True)
    with ddpkit.runtime(world=World()) as rt:
        loader = rt.loader(dataset, global_batch_size=batch_size)

        def per_sample(batches: Iterable[Any]) -> float:
            return 1e6 * seconds(lambda: collections.deque(batches, maxlen=0)) / len(dataset)

        found = in_turn({"ours": lambda: per_sample(loader), "peer": lambda: per_sample(peer)}, repeats)
    bar = Bar(10.0, of="difference")
    return [Row(f"a sample, batch {batch_size}", "us", found["ours"], bar, "DataLoader", found["peer"])]


def _resume(repeats: int) -> list[Row]:
    length, far = 10**9, 64 * 10**7

    def first_batch(position: int) -> float:
        with ddpkit.runtime(world=World()) as rt:
            loader = rt.loader(Virtual(length), global_batch_size=64)
            state = loader.state_dict() | {"position": position, "consumed": position}
            begun = time.perf_counter()
            loader.load_state_dict(state)
            next(iter(loader))
            return time.perf_counter() - begun

    found = in_turn({"far": lambda: first_batch(far), "fresh": lambda: first_batch(0)}, repeats)
    bar = Bar(0.1, of="difference")
    return [Row("resume at 6.4e8 of 1e9", "s", found["far"], bar, "at 0", found["fresh"])]


MEASUREMENTS: dict[str, Measurement] = {
    "sampler-first": _first_index,
    "sampler-throughput": _throughput,
    "sample": lambda repeats: [row for size in (64, 8, 1) for row in _per_sample(size, repeats)],
    "resume": _resume,
}
