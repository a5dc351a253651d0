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


@pytest.fixture(params=["by memory", "officially"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HostGenerators:
    """Seeded; NumPy's and Python's hold a second normal deviate, which the next draw of one uses up."""
    if request.param == "officially":
        monkeypatch.setattr(generators, "_memory", lambda address, expected: None)
    HostGenerators().seed(1)
    random.gauss(0, 1)
    np.random.normal()
    torch.randn(())
    return HostGenerators()


def official() -> tuple[object, str, list[int]]:
    return random.getstate(), str(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()


def stand(host: HostGenerators) -> tuple[object, object, list[int]]:
    """Where they stand, to be compared."""
    python, numpy, torch_cpu = host.state()
    return python, numpy, torch_cpu.tolist()


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
    before, stood, as_told = host.state(), stand(host), official()
    assert stand(host) == stood
    expected = draws()
    host.restore(before)
    assert official() == as_told
    change()
    assert stand(host) != stood
    host.restore(before)
    assert stand(host) == stood and official() == as_told
    assert draws() == expected


def test_what_was_never_drawn_from_stays_unnoticed(host: HostGenerators) -> None:
    HostGenerators().seed(3)  # no second deviates
    before, stood = host.state(), stand(host)
    np.random.default_rng(0).random()
    random.Random(0).random()
    torch.rand((), generator=torch.Generator().manual_seed(0))
    assert stand(host) == stood
    np.random.normal()
    host.restore(before)
    np.random.rand()
    host.restore(before)
    assert stand(host) == stood
    assert np.random.get_state()[3] == 0  # type: ignore[index]


def test_numpy_may_be_given_another_generator_meanwhile(host: HostGenerators) -> None:
    before_it = np.random.get_bit_generator()  # type: ignore[attr-defined]
    try:
        np.random.set_bit_generator(np.random.MT19937(5))  # type: ignore[attr-defined]
        before, stood = host.state(), stand(host)
        expected = np.random.rand()
        assert stand(host) != stood
        host.restore(before)
        assert np.random.rand() == expected
    finally:
        np.random.set_bit_generator(before_it)  # type: ignore[attr-defined]


def test_another_process_looks_at_its_own(host: HostGenerators) -> None:
    again = pickle.loads(pickle.dumps(host))
    assert stand(again) == stand(host)
    random.random()
    assert stand(again) == stand(host)


def test_on_this_platform_they_are_found_in_memory() -> None:
    host = HostGenerators()
    host.state()
    assert host._python._memory is not None
    assert host._numpy._memory is not None


def test_seeding_is_the_same_by_memory_and_officially(host: HostGenerators) -> None:
    host.seed(0x0123456789ABCDEF)
    assert random.getstate()[2] is None and np.random.get_state()[3] == 0  # type: ignore[index]  # no second deviates
    # What a sample draws is part of what is promised: the same on any machine.
    expected = [0.31407260368562, 0.82260730686335, 0.80381346337304, 0.96066995469134, -1.6218299, 0.5785720]
    assert draws() == pytest.approx(expected, abs=1e-6)


def test_each_of_the_three_has_a_stream_of_its_own(host: HostGenerators) -> None:
    host.seed(7)
    python, numpy = set(random.getstate()[1][:-1]), set(np.random.get_state()[1].tolist())  # type: ignore[index]
    pytorch = set(torch.get_rng_state()[24 : 24 + 8 * 624].view(torch.int64).tolist())
    assert len(pytorch) > 600 and len(python | numpy | pytorch) > 3 * 620
