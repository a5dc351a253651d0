"""A fetch leaves the rank's own generators as they were, and each sample finds them seeded by its position."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ddpkit.fetching import SeededDataset
from ddpkit.generators import HostGenerators
from ddpkit.sampler import ElasticOrder, Plan
from ddpkit.world import World

LENGTH = 24


class Drawing:
    def __init__(self, draw: Callable[[], Any]) -> None:
        self.draw = draw

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, float(self.draw())


def as_they_are(samples: list[Any]) -> Any:
    return samples


def passes_of(
    dataset: SeededDataset | None, own: Callable[[], Any], batch_size: int = 4
) -> tuple[list[Any], list[Any]]:
    """Every sample of two epochs, and what the rank itself draws in between."""
    plan = Plan(ElasticOrder(LENGTH, 0, True), World(), 0, batch_size, None, drop_last=True)
    HostGenerators().seed(5)
    samples: list[Any] = []
    drawn = []
    for epoch in range(2):
        for fetch in plan.fetches(epoch, 0):
            drawn.append(own())
            samples += dataset[fetch][1] if dataset is not None else []
    return samples, drawn


DRAWS: dict[str, Callable[[], Any]] = {
    "python": random.random,
    "python's second normal deviate": lambda: random.gauss(0, 1),
    "numpy": np.random.random,
    "numpy's second normal deviate": np.random.normal,
    "torch": lambda: float(torch.rand(())),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("own", DRAWS.values(), ids=DRAWS)
def test_fetches_do_not_move_the_rank_s_own_streams(draw: Callable[[], Any], own: Callable[[], Any]) -> None:
    samples, drawn = passes_of(SeededDataset(Drawing(draw), as_they_are), own)
    assert drawn == passes_of(None, own)[1]
    assert len({value for _, value in samples}) == 2 * LENGTH
    assert samples == passes_of(SeededDataset(Drawing(draw), as_they_are), lambda: None, batch_size=12)[0]


def test_a_sample_may_take_its_seed_without_drawing() -> None:
    samples, _ = passes_of(SeededDataset(Drawing(torch.initial_seed), as_they_are), lambda: None)
    assert len({value for _, value in samples}) == 2 * LENGTH
    assert samples == passes_of(SeededDataset(Drawing(torch.initial_seed), as_they_are), random.random, batch_size=8)[0]
