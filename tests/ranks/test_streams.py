"""Iterable datasets: every sample once, over ranks and loader workers, from anywhere."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

import ddpkit
from ddpkit.testing import run_ranks


class Numbers(IterableDataset[tuple[int, float]]):
    """0, 1, 2, ..., each with a random number drawn while it was made."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[tuple[int, float]]:
        for number in range(self.length):
            yield number, random.random() + float(torch.rand(()))


class Sharding(Numbers):
    """Splits itself over workers, as torch's documentation shows."""

    def __iter__(self) -> Iterator[tuple[int, float]]:
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(start, self.length, step):
            yield number, 0.0


class Seekable(Numbers):
    """Starts anywhere, and does not like to be read from the start."""

    def iter_from(self, position: int) -> Iterator[tuple[int, float]]:
        for number in range(position, self.length):
            yield number, random.random() + float(torch.rand(()))

    def __iter__(self) -> Iterator[tuple[int, float]]:
        raise AssertionError("iter_from is there")


class Buffered(Numbers):
    """Shuffles in a buffer, with whatever generator there is."""

    def __iter__(self) -> Iterator[tuple[int, float]]:
        held: list[tuple[int, float]] = []
        for item in super().__iter__():
            held.append(item)
            if len(held) == 5:
                yield held.pop(random.randrange(5))
        random.shuffle(held)
        yield from held


def epoch(
    dataset: Any,
    batch: int,
    workers: int,
    drop_last: bool = True,
    micro: int | None = None,
    state: Any = None,
    steps: int | None = None,
    epochs: int = 1,
) -> tuple[list[list[tuple[int, float]]], dict[str, int]]:
    """This rank's samples by optimizer step, up to ``steps`` of them, and the loader's state."""
    with ddpkit.runtime(seed=5, timeout_s=30) as rt:
        loader = rt.loader(
            dataset, global_batch_size=batch, micro_batch_size=micro, drop_last=drop_last, num_workers=workers
        )
        if state is not None:
            loader.load_state_dict(state)
        seen: list[list[tuple[int, float]]] = []
        for _ in range(epochs):
            new = True
            for numbers, draws in loader:
                if new:
                    seen.append([])
                seen[-1] += list(zip(numbers.tolist(), draws.tolist(), strict=True))
                assert loader.current is not None
                new = loader.current.is_last
                if new and len(seen) == steps:
                    break
        return seen, loader.state_dict()


def several(*settings: dict[str, Any]) -> list[Any]:
    return [epoch(**setting) for setting in settings]


def together(by_rank: list[Any], setting: int) -> list[list[tuple[int, float]]]:
    """The global batches."""
    steps = zip(*(found[setting][0] for found in by_rank), strict=True)
    return [[item for part in step for item in part] for step in steps]


SETTINGS: list[dict[str, Any]] = [
    {"dataset": Numbers(29), "batch": 6, "workers": 0, "drop_last": False},
    {"dataset": Numbers(29), "batch": 6, "workers": 2, "drop_last": False},
    {"dataset": Numbers(29), "batch": 6, "workers": 3, "drop_last": True, "micro": 1},
    {"dataset": Numbers(29), "batch": 6, "workers": 0, "drop_last": True},
    {"dataset": Sharding(29), "batch": 6, "workers": 2, "drop_last": False},
    {"dataset": Buffered(29), "batch": 6, "workers": 2, "drop_last": False, "micro": 2},
    {"dataset": Seekable(29), "batch": 6, "workers": 2, "drop_last": False},
    {"dataset": Numbers(25), "batch": 6, "workers": 0, "drop_last": False},  # the last batch is of one sample
    {"dataset": Numbers(24), "batch": 6, "workers": 3, "drop_last": False},
    {"dataset": Numbers(12), "batch": 6, "workers": 2, "drop_last": False, "epochs": 2},
]


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_sample_comes_once_whatever_the_ranks_and_workers(ranks: int) -> None:
    by_rank = run_ranks(several, ranks, *SETTINGS, timeout_s=90)
    alone = several(*SETTINGS) if ranks == 1 else run_ranks(several, 1, *SETTINGS)[0]
    for index, setting in enumerate(SETTINGS):
        batches = together(by_rank, index)
        numbers = [number for step in batches for number, _ in step]
        length = setting["dataset"].length
        end = length - length % 6 if setting["drop_last"] else length
        if not isinstance(setting["dataset"], Buffered):
            assert numbers == list(range(end)) * setting.get("epochs", 1), setting
        else:
            assert sorted(numbers) == list(range(end)) != numbers
        assert [sorted(step) for step in batches] == [sorted(step) for step in alone[index][0]], setting
        assert len({str(found[index][1]) for found in by_rank}) == 1
        state = by_rank[0][index][1]
        assert state["epoch"] == setting.get("epochs", 1)
        assert (state["position"], state["consumed"]) == (0, end * setting.get("epochs", 1))
    plain = alone[0][0]
    assert plain == alone[1][0]  # with and without workers: the same draws as well
    assert [step[:6] for step in plain[:4]] == alone[3][0]
    two_epochs = alone[9][0]
    assert two_epochs[0] != two_epochs[2]  # other draws in another epoch
    assert plain == alone[6][0]  # iter_from sees the generators that reading up to there would see


@pytest.mark.parametrize("dataset", [Numbers(40), Seekable(40), Buffered(40)], ids=lambda each: type(each).__name__)
def test_a_stream_goes_on_in_the_middle_at_any_number_of_ranks_and_workers(dataset: Numbers) -> None:
    whole, _ = epoch(dataset, 6, 0, drop_last=False)
    found: list[list[tuple[int, float]]] = []
    state = None
    for ranks, workers, steps in ((2, 0, 2), (1, 2, 1), (3, 2, 2), (2, 2, None)):
        setting = {
            "dataset": dataset,
            "batch": 6,
            "workers": workers,
            "drop_last": False,
            "state": state,
            "steps": steps,
        }
        by_rank = run_ranks(several, ranks, setting)
        found += together(by_rank, 0)
        state = by_rank[0][0][1]
        assert len(found) == len(whole) or state["position"] == 6 * len(found)
    assert [sorted(step) for step in found] == [sorted(step) for step in whole]


class Uneven(Numbers):
    """As many samples as the rank has, by mistake."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __iter__(self) -> Iterator[tuple[int, float]]:
        for number in range(self.lengths[torch.distributed.get_rank()]):
            yield number, 0.0


def uneven(workers: int, drop_last: bool) -> tuple[list[int], str]:
    with ddpkit.runtime(timeout_s=30) as rt:
        records: list[logging.LogRecord] = []

        def keep(record: logging.LogRecord) -> bool:
            records.append(record)
            return True

        logging.getLogger("ddpkit").addFilter(keep)
        loader = rt.loader(Uneven([40, 14, 40]), global_batch_size=6, drop_last=drop_last, num_workers=workers)
        steps = []
        for _ in range(2):
            count = 0
            for _ in loader:
                rt.mean(1.0)  # a collective in each step
                count += 1
            steps.append(count)
        return steps, "\n".join(record.getMessage() for record in records)


@pytest.mark.parametrize(("workers", "drop_last"), [(0, True), (2, False)])
def test_a_stream_that_ends_early_on_one_rank_ends_the_epoch_for_all(workers: int, drop_last: bool) -> None:
    found = run_ranks(uneven, 3, workers, drop_last)
    assert [steps for steps, _ in found] == [[2, 2]] * 3
    assert "ended on ranks [1] in epoch 0 while others had more" in found[0][1]
    assert "in epoch 1" in found[0][1]
    assert not found[1][1]


class Failing(Numbers):
    def __iter__(self) -> Iterator[tuple[int, float]]:
        yield from [(number, 0.0) for number in range(8)]
        if torch.distributed.get_rank() == 1:
            raise OSError("the file ends here")
        yield from [(number, 0.0) for number in range(8, 100)]


def test_an_error_in_one_ranks_stream_ends_all_with_it() -> None:
    with pytest.raises(OSError, match="the file ends here"):
        run_ranks(epoch, 2, Failing(0), 4, 0, timeout_s=20)
