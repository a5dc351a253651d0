"""The largest micro batch that fits, with memory that ends where the test says."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpkit import batch_size
from ddpkit.agree import Ranks
from ddpkit.batch_size import Trial, is_out_of_memory, largest_that_fits
from ddpkit.errors import UserError
from ddpkit.fetching import LoaderOptions
from ddpkit.world import World
from tests import toy

CPU = torch.device("cpu")
ALONE = Ranks(World(), torch._C._distributed_c10d.HashStore())
WORDS = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
]


@pytest.mark.parametrize("error", WORDS)
def test_what_running_out_of_memory_looks_like(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), ValueError("out of memory."), KeyError(1)]
)
def test_what_it_does_not_look_like(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("at_most", [1, 2, 7, 8, 100])
def test_the_largest_is_found_exactly_and_nothing_far_beyond_it_is_tried(
    at_most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)  # which takes its time
    for limit in range(1, 120):
        tried: list[int] = []

        def attempt(size: int, limit: int = limit, tried: list[int] = tried) -> None:
            tried.append(size)
            if size > limit:
                raise WORDS[size % 3]

        assert largest_that_fits(ALONE, CPU, attempt, at_most) == min(limit, at_most)
        assert max(tried) <= min(2 * limit, at_most) and len(tried) == len(set(tried)) <= 15


def test_a_single_sample_that_does_not_fit_is_told() -> None:
    def attempt(size: int) -> None:
        raise MemoryError

    with pytest.raises(UserError, match="memory runs out with a single sample"):
        largest_that_fits(ALONE, CPU, attempt, 8)


def test_other_errors_are_the_users() -> None:
    with pytest.raises(ZeroDivisionError):
        largest_that_fits(ALONE, CPU, lambda size: 1 // 0, 8)


def test_the_search_leaves_everything_as_it_was() -> None:
    torch.manual_seed(0)
    module = toy.model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    sizes = []

    def step(model: nn.Module, batch: Any) -> Tensor:
        assert model is not module
        np.random.rand(), random.random()
        sizes.append(len(batch[0]))
        if len(batch[0]) > 11:
            raise MemoryError
        loss: Tensor = toy.step(model, batch)["loss"]
        return loss

    trial = Trial(
        module,
        lambda module: torch.optim.AdamW(module.parameters()),
        step,
        toy.dataset(length=9),
        LoaderOptions(),
        CPU,
        extra_bytes=100,
    )
    streams = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    assert largest_that_fits(ALONE, CPU, trial, 64) == 11
    assert set(sizes) == {2, 4, 8, 16, 12, 10, 11} and sizes.count(8) == 2
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    assert torch.equal(streams[0], after[0]) and streams[1:] == after[1:]
    assert module.training and all(parameter.grad is None for parameter in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_without_a_checkpoint_nothing_is_remembered(tmp_path: Path) -> None:
    assert batch_size.remembered(tmp_path, 1) is None
