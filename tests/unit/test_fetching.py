"""Samples have the same randomness whether they are seeded or not, since those that are not draw nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ddpkit import fetching
from ddpkit.fetching import SeededDataset
from ddpkit.sampler import ElasticOrder, Plan
from ddpkit.seeding import seed_host_generators
from ddpkit.world import World

LENGTH = 24


class Sometimes:
    """Draws at some samples only."""

    def __init__(self, draws_at: Callable[[int], bool], draw: Callable[[], Any] = random.random) -> None:
        self.draws_at = draws_at
        self.draw = draw
        self.asked: list[int] = []

    def __getitem__(self, index: int) -> tuple[int, float]:
        self.asked.append(index)
        return index, float(self.draw()) if self.draws_at(index) else 0.0


def passes_of(dataset: SeededDataset, own: Callable[[], Any]) -> tuple[list[Any], list[Any]]:
    """Every pass of two epochs, and what the rank itself draws in between."""
    plan = Plan(ElasticOrder(LENGTH, 0, True), World(), 0, 4, None, drop_last=True)
    seed_host_generators(5)
    batches, drawn = [], []
    for epoch in range(2):
        for fetch in plan.fetches(epoch, 0):
            drawn.append(own())
            batches.append(dataset[fetch])
    return batches, drawn


def as_they_are(samples: list[Any]) -> Any:
    return samples


def noisy_at_the_end(samples: list[Any]) -> Any:
    return [*samples, random.random() if samples[0][0] == 7 else None]


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The keys that samples are seeded by."""
    keys: list[int] = []

    def seed(key: int) -> None:
        keys.append(key)
        seed_host_generators(key)

    monkeypatch.setattr(fetching, "seed_host_generators", seed)
    return keys


OWN = [lambda: 0.0, np.random.normal, lambda: random.gauss(0, 1), lambda: float(torch.randn(()))]


@pytest.mark.parametrize("own", OWN, ids=["nothing", "numpy", "random", "torch"])
@pytest.mark.parametrize("draw", [random.random, lambda: random.gauss(0, 1), np.random.normal, lambda: torch.randn(())])
@pytest.mark.parametrize("collate", [as_they_are, noisy_at_the_end])
def test_a_dataset_that_draws_now_and_then_is_as_if_seeded_for_every_sample(
    draw: Callable[[], Any], own: Callable[[], Any], collate: Callable[[list[Any]], Any]
) -> None:
    always = SeededDataset(Sometimes(lambda index: index % 11 == 10, draw), collate)
    always._draws = True
    expected = passes_of(always, own)
    now_and_then = SeededDataset(Sometimes(lambda index: index % 11 == 10, draw), collate)
    assert passes_of(now_and_then, own) == expected


def test_a_dataset_that_draws_nothing_is_seeded_in_its_first_pass_only(seeds: list[int]) -> None:
    quiet = Sometimes(lambda index: False)
    passes_of(SeededDataset(quiet, as_they_are), lambda: None)
    assert len(seeds) == 4 + 1  # and for collating
    assert len(quiet.asked) == 2 * LENGTH


def test_a_dataset_that_draws_is_asked_for_nothing_twice(seeds: list[int]) -> None:
    drawing = Sometimes(lambda index: True)
    passes_of(SeededDataset(drawing, as_they_are), lambda: None)
    assert len(seeds) == 2 * (LENGTH + LENGTH // 4)
    assert len(drawing.asked) == 2 * LENGTH


def test_an_error_is_that_of_the_seeded_fetch() -> None:
    class Failing(Sometimes):
        def __getitem__(self, index: int) -> tuple[int, float]:
            if index == 7:
                raise ValueError(f"drew {random.random()}")
            return super().__getitem__(index)

    errors = []
    for draws in (None, True):
        dataset = SeededDataset(Failing(lambda index: False), as_they_are)
        dataset._draws = draws
        with pytest.raises(ValueError) as caught:
            passes_of(dataset, random.random)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
