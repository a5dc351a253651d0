"""The sampler and the fetching of samples."""

from __future__ import annotations

import itertools
import statistics
import time
import tracemalloc
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

import ddpkit
from ddpkit.sampler import ElasticOrder, Plan
from ddpkit.world import World
from tests.bench.measure import Row, compare, in_turn, spread


class Virtual(Dataset[Any]):
    """As long as you like, and nothing to read: what is left is the loader's own cost."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.sample = torch.zeros(4)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.sample


def rows(repeats: int) -> list[Row]:
    """First index, memory and throughput of the sampler; a sample's cost; resuming far in."""
    return [*_first_index(repeats), _throughput(repeats), _per_sample(repeats), _resume(repeats)]


def _plan(length: int) -> Plan:
    return Plan(ElasticOrder(length, 0, True), World(), 0, 64, None, drop_last=True)


def _first_index(repeats: int) -> list[Row]:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        next(iter(_plan(10**9).fetches(0, 0)))
        times.append((time.perf_counter() - begun) * 1e3)
    tracemalloc.start()
    next(iter(_plan(10**9).fetches(1, 0)))
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return [
        Row("sampler, first index at 1e9", "ms", statistics.median(times), None, None, repeats, spread(times), 10.0),
        Row("sampler, memory at 1e9", "MB", peak, None, None, 1, "", 20.0),
    ]


def _throughput(repeats: int) -> Row:
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
    return compare(
        "sampler, throughput at 1e6", "1/s", found["ours"], "DistributedSampler", found["peer"], 1.0, at_least=True
    )


def _per_sample(repeats: int) -> Row:
    length, batches = 64 * 400, 400
    dataset = Virtual(length)

    def peer() -> float:
        loader = DataLoader(dataset, 64, sampler=DistributedSampler(dataset, 1, 0, seed=0), drop_last=True)
        begun = time.perf_counter()
        for _ in itertools.islice(loader, batches):
            pass
        return (time.perf_counter() - begun) / (batches * 64) * 1e6

    with ddpkit.runtime(world=World()) as rt:
        loader = rt.loader(dataset, global_batch_size=64)

        def ours() -> float:
            begun = time.perf_counter()
            for _ in loader:
                pass
            return (time.perf_counter() - begun) / length * 1e6

        found = in_turn({"ours": ours, "peer": peer}, repeats)
    added = [a - b for a, b in zip(found["ours"], found["peer"], strict=True)]
    return Row("per-sample cost, added", "us", statistics.median(added), None, None, repeats, spread(added), 10.0)


def _resume(repeats: int) -> Row:
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
    added = [a - b for a, b in zip(found["far"], found["fresh"], strict=True)]
    return Row("resume at 6.4e8 of 1e9, added", "s", statistics.median(added), None, None, repeats, spread(added), 0.1)
