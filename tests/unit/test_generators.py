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
    expected = [0.73116992681948, 0.16265305728066, -0.4875198473787, 0.13447026310265, -1.6218299, 0.5785720]
    assert draws() == pytest.approx(expected, abs=1e-6)


def test_each_of_the_three_has_a_stream_of_its_own(host: HostGenerators) -> None:
    drawn = []
    for key in (0, 7, 0x0123456789ABCDEF, 0xFEDCBA9876543210):
        host.seed(key)
        count = 3 * 624  # what the states were filled with is used up, and made anew, and again
        python = [random.getrandbits(32) for _ in range(count)]
        numpy = np.random.randint(0, 2**32, count, dtype=np.uint32).tolist()
        pytorch = torch.randint(0, 2**32, (count,)).tolist()
        drawn += [python, numpy, pytorch]
    together = {number for stream in drawn for number in stream}
    assert len(together) > len(drawn) * count - 5  # by chance hardly one meets another
    assert np.abs(np.corrcoef(np.array(drawn, dtype=float)) - np.eye(len(drawn))).max() < 0.1
