"""Who draws what: samples by their position alone, ranks each from a stream of its own."""

from __future__ import annotations

import multiprocessing
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

import ddpkit
from ddpkit.testing import run_ranks
from tests import toy

Draws = tuple[float, float, float]
LENGTH = 41


def draw() -> Draws:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


class Drawing:
    """A sample is (index, what it drew). Map-style by its methods alone: nobody has to inherit."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> tuple[int, Draws]:
        return index, draw()


def reseed(worker_id: int) -> None:
    """What people write to have their workers differ; here it must make no difference."""
    random.seed(worker_id)
    np.random.seed(worker_id)
    torch.manual_seed(worker_id)


def noisy(samples: list[Any]) -> Any:
    """Collating that draws, too."""
    return [*samples, ("drawn", *draw())]


def as_it_is(samples: list[Any]) -> Any:
    return samples


def epochs(
    count: int = 1,
    workers: int = 0,
    init: Any = None,
    micro: int | None = None,
    prefetch: int = 2,
    start: Any = None,
    collate: Any = as_it_is,
) -> tuple[list[list[Any]], Draws]:
    """The samples of each epoch on this rank, and what the rank itself draws afterwards."""
    with ddpkit.runtime(seed=11, timeout_s=30) as rt:
        rt.wrap(nn.Linear(1, 1))
        loader = rt.loader(
            Drawing(),
            global_batch_size=8,
            micro_batch_size=micro,
            drop_last=False,
            num_workers=workers,
            worker_init_fn=init,
            prefetch_factor=prefetch,
            collate_fn=collate,
        )
        if start is not None:
            loader.load_state_dict({"world_size": 1, "at_end": False, "consumed": 0, "length": LENGTH, **start})
        seen = [[sample for batch in loader for sample in batch] for _ in range(count)]
        return seen, draw()


def several(settings: list[dict[str, Any]]) -> list[tuple[list[list[Any]], Draws]]:
    return [epochs(**setting) for setting in settings]


def test_a_samples_randomness_is_a_function_of_seed_epoch_and_position() -> None:
    whole, own_after = epochs(2)
    assert sorted(index for index, _ in whole[0]) == list(range(LENGTH))
    drawn = [value for epoch in whole for _, draws in epoch for value in draws]
    assert len(set(drawn)) == len(drawn)

    settings: list[dict[str, Any]] = [
        {"count": 2},
        {"count": 2, "workers": 2},
        {"count": 2, "workers": 2, "init": reseed, "prefetch": 5},
        {"count": 2, "micro": 2},
        {"start": {"epoch": 1, "position": 16}},
        {"start": {"epoch": 1, "position": 16}, "workers": 2},
    ]
    for ranks in (1, 3):
        by_rank = run_ranks(several, ranks, settings)
        for index, setting in enumerate(settings):
            expected = whole if setting.get("count") else [whole[1][16:]]
            for epoch, wanted in enumerate(expected):
                found = [sample for rank in range(ranks) for sample in by_rank[rank][index][0][epoch]]
                assert sorted(found) == sorted(wanted), (ranks, setting)
        if ranks == 1:
            # Fetching and collating leave the rank's own generators alone.
            assert {own for _, own in by_rank[0]} == {own_after}
        else:
            assert len({own for found in by_rank for _, own in found}) == ranks


def test_what_collating_draws_is_the_same_with_and_without_workers() -> None:
    (plain, _), (with_workers, _), (again, _) = several(
        [
            {"collate": noisy},
            {"collate": noisy, "workers": 2},
            {"collate": noisy, "start": {"epoch": 0, "position": 16}},
        ]
    )
    assert plain == with_workers
    assert plain[0][18:] == again[0]  # two whole batches of nine
    drawn = [sample[1:] for sample in plain[0] if sample[0] == "drawn"]
    assert len(set(drawn)) == len(drawn) == 6


def from_a_fork_server() -> list[Any]:
    multiprocessing.set_start_method("forkserver", force=True)
    return epochs(workers=1)[0]


def test_workers_may_come_from_a_fork_server() -> None:
    assert run_ranks(from_a_fork_server, 1) == [epochs()[0]]


class Counted(Drawing):
    """Says on disk what was asked for; loader workers have memories of their own."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __getitem__(self, index: int) -> tuple[int, Draws]:
        self.asked.append(index)
        return super().__getitem__(index)


def test_seeking_fetches_nothing_before_the_position() -> None:
    with ddpkit.runtime(seed=11) as rt:
        dataset = Counted()
        loader = rt.loader(dataset, global_batch_size=8, collate_fn=as_it_is)
        loader.load_state_dict(
            {"epoch": 3, "position": 24, "consumed": 3 * 40 + 24, "at_end": False, "world_size": 2, "length": LENGTH}
        )
        seen = [index for batch in loader for index, _ in batch]
        assert dataset.asked == seen
        assert len(seen) == 16
        assert (loader.epoch, loader.position, loader.consumed) == (4, 0, 160)


class Virtual:
    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


def test_a_huge_dataset_is_entered_in_the_middle() -> None:
    with ddpkit.runtime() as rt:
        loader = rt.loader(Virtual(), global_batch_size=10)
        loader.load_state_dict(
            {
                "epoch": 1,
                "position": 5 * 10**8,
                "consumed": 15 * 10**8,
                "at_end": False,
                "world_size": 1,
                "length": 10**9,
            }
        )
        batch = next(iter(loader))
        assert len(set(batch.tolist())) == 10
        assert len(loader) == 10**8


# The ranks' own streams.


def own_streams(evaluate: bool, workers: int) -> dict[str, Any]:
    with ddpkit.runtime(seed=2, timeout_s=30) as rt:
        before_wrap = draw()
        module = toy.model(dropout=0.5)
        parameters = [parameter.detach().clone() for parameter in module.parameters()]
        model = rt.wrap(module)
        loader = rt.loader(toy.dataset(40), global_batch_size=8, num_workers=workers)
        dropped = []
        for number, (inputs, _, _) in enumerate(loader):
            dropped.append(nn.functional.dropout(torch.ones(16)).tolist())
            if evaluate and number == 2:
                rt.evaluate(model, toy.dataset(7), toy.eval_step, batch_size=2, num_workers=workers)
                rt.mean(1.0)
                with rt.main_first():
                    pass
            del inputs
        return {"before": before_wrap, "model": parameters, "dropped": dropped, "own": draw()}


def test_the_model_begins_equal_and_dropout_differs_and_nothing_else_disturbs_it() -> None:
    plain = run_ranks(own_streams, 3, False, 0)
    assert len({found["before"] for found in plain}) == 1
    for found in plain[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found["model"], plain[0]["model"], strict=True))
    assert len({str(found["dropped"]) for found in plain}) == 3
    assert len({found["own"] for found in plain}) == 3
    for disturbed in (run_ranks(own_streams, 3, True, 0), run_ranks(own_streams, 3, True, 1)):
        assert [found["dropped"] for found in disturbed] == [found["dropped"] for found in plain]
        assert [found["own"] for found in disturbed] == [found["own"] for found in plain]


# Batches of any structure.


def structured(index: int) -> dict[str, Any]:
    return {
        "x": torch.full((2, 3), float(index)),
        "text": f"sample {index}",
        "nested": ({"y": np.full(2, index), "n": index}, [np.float32(index)]),
    }


class Structured:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        return structured(index)


def custom(samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = default_collate(samples)
    return {
        **batch,
        "none": None,
        "scalar": torch.tensor(7),
        "numpy scalar": np.float64(2),
        "count": len(samples),
        "array": np.stack([sample["x"].numpy() for sample in samples]),
        "texts": tuple(sample["text"] for sample in samples),
        "pairs": tuple(zip(*[(sample["x"], sample["nested"]) for sample in samples], strict=True)),
        "object": random.Random(0),
    }


def batches_of(collate: Any) -> list[Any]:
    with ddpkit.runtime(timeout_s=20) as rt:
        loader = rt.loader(Structured(), global_batch_size=3, micro_batch_size=1, shuffle=False, collate_fn=collate)
        return [(loader.current, batch) for batch in loader]


@pytest.mark.parametrize("collate", [None, custom], ids=["default", "custom"])
def test_a_batch_of_length_zero_has_the_structure_of_any_other(collate: Any) -> None:
    by_rank = run_ranks(batches_of, 2, collate)
    assert [[part.size for part, _ in found] for found in by_rank] == [[1, 1], [1, 0]]
    full, empty = by_rank[1][0][1], by_rank[1][1][1]
    assert full["x"].shape == (1, 2, 3) and float(full["x"].max()) == 2
    assert empty["x"].shape == (0, 2, 3)
    assert (full["text"], empty["text"]) == (["sample 2"], [])
    assert empty["nested"][0]["y"].shape == (0, 2) and empty["nested"][0]["n"].shape == (0,)
    assert empty["nested"][1][0].shape == (0,)
    if collate is not None:
        assert empty["none"] is None and empty["scalar"] == 7 and empty["numpy scalar"] == 2
        assert empty["array"].shape == (0, 2, 3) and empty["texts"] == ()
        assert empty["pairs"] == ((), ())
        assert isinstance(empty["object"], random.Random)
