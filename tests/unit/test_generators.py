"""Looking at the global generators, and putting them back: by their memory and by the official ways alike."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ddpkit import generators
from ddpkit.generators import HostGenerators
from ddpkit.seeding import seed_host_generators


@pytest.fixture(params=["by memory", "officially"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HostGenerators:
    """Seeded; NumPy's and Python's hold a second normal deviate, which the next draw of one uses up."""
    if request.param == "officially":
        monkeypatch.setattr(generators, "_memory", lambda address, expected: None)
    seed_host_generators(1)
    random.gauss(0, 1)
    np.random.normal()
    torch.randn(())
    return HostGenerators()


def official() -> tuple[object, str, list[int]]:
    return random.getstate(), str(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()


def draws() -> list[float]:
    ours = [random.gauss(0, 1), random.random(), float(np.random.normal()), float(np.random.rand())]
    return [*ours, float(torch.randn(())), float(torch.rand(()))]


CHANGES: dict[str, Callable[[], object]] = {
    "random": random.random,
    "random, the second deviate": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy, the second deviate": np.random.normal,
    "numpy, a whole round of the state": lambda: np.random.bytes(4 * 624),
    "torch": lambda: torch.rand(()),
    "torch, normal": lambda: torch.randn(()),
    "seeding random": lambda: random.seed(1),
    "seeding numpy": lambda: np.random.seed(1),
    "seeding torch": lambda: torch.manual_seed(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_draw_is_noticed_and_taken_back(host: HostGenerators, change: Callable[[], object]) -> None:
    before, as_told = host.state(), official()
    assert host.state() == before
    expected = draws()
    host.restore(before)
    assert official() == as_told
    change()
    assert host.state() != before
    host.restore(before)
    assert host.state() == before and official() == as_told
    assert draws() == expected


def test_what_was_never_drawn_from_stays_unnoticed(host: HostGenerators) -> None:
    seed_host_generators(3)  # no second deviates
    before = host.state()
    np.random.default_rng(0).random()
    random.Random(0).random()
    torch.rand((), generator=torch.Generator().manual_seed(0))
    assert host.state() == before
    np.random.normal()
    host.restore(before)
    np.random.rand()
    host.restore(before)
    assert host.state() == before
    assert np.random.get_state()[3] == 0  # type: ignore[index]


def test_numpy_may_be_given_another_generator_meanwhile(host: HostGenerators) -> None:
    before_it = np.random.get_bit_generator()  # type: ignore[attr-defined]
    try:
        np.random.set_bit_generator(np.random.MT19937(5))  # type: ignore[attr-defined]
        before = host.state()
        expected = np.random.rand()
        assert host.state() != before
        host.restore(before)
        assert np.random.rand() == expected
    finally:
        np.random.set_bit_generator(before_it)  # type: ignore[attr-defined]


def test_another_process_looks_at_its_own(host: HostGenerators) -> None:
    again = pickle.loads(pickle.dumps(host))
    assert again.state() == host.state()
    random.random()
    assert again.state() == host.state()


def test_on_this_platform_they_are_found_in_memory() -> None:
    host = HostGenerators()
    host.state()
    assert host._python._memory is not None
    assert host._numpy._memory is not None
