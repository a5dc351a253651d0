from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ddpkit.permutation import SORTED_UP_TO, Permutation, derive

SMALL, LARGE = (
    1000,
    9973,
)  # by sorting, and by the Feistel network (9973 is prime: its grid has points outside)


def whole(n: int, key: int) -> NDArray[np.int64]:
    return Permutation(n, key).take(0, n)


def z_of_chi_square(counts: NDArray[np.integer]) -> float:
    """How many standard deviations the chi-square of counts that should be even lies from its mean."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2).sum() / expected - freedom) / math.sqrt(2 * freedom))


def z_of_poisson(counts: list[int], mean: float) -> float:
    """The same for the sum of counts that should be Poisson distributed."""
    return (sum(counts) - mean * len(counts)) / math.sqrt(mean * len(counts))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 10, 100, 4095, 4096, 4097, 4160, 4225, 5000, 65537, 10**6])
@pytest.mark.parametrize("key", [0, derive(1, 2)])
def test_every_item_comes_exactly_once(n: int, key: int) -> None:
    items = whole(n, key)
    assert items.dtype == np.int64 and items.shape == (n,)
    assert np.array_equal(np.bincount(items, minlength=n), np.ones(n, dtype=np.int64))


def test_the_order_is_the_same_on_every_platform_and_for_ever() -> None:
    # A run that is resumed with a newer numpy must go on in the order it started with.
    first = {n: Permutation(n, 7).take(0, 4).tolist() for n in (10, 5000, 10**6, 10**9, 2**62)}
    assert first == {
        10: [2, 1, 8, 3],
        5000: [292, 2069, 2057, 2255],
        10**6: [605592, 478879, 578898, 465332],
        10**9: [34025359, 241807306, 275797357, 133192964],
        2**62: [2653446934317497784, 3557695398907703381, 4526556086870978386, 3288116406060113459],
    }
    assert (derive(0, 1), derive("x", -1)) == (0x18D7DC27729BC3F7, 0x912B0940CE910E50)


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(st.integers(1, 3 * SORTED_UP_TO), st.integers(1, 2**62)),
    st.integers(0, 2**64 - 1),
    st.data(),
)
def test_any_slice_at_once(n: int, key: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, min(n, start + 300)))
    permutation = Permutation(n, key)
    items = permutation.take(start, stop)
    middle = (start + stop) // 2
    parts = [permutation.take(start, middle), permutation.take(middle, stop)]
    assert np.array_equal(items, np.concatenate(parts))
    backwards = np.arange(start, stop)[::-1]
    assert np.array_equal(Permutation(n, key).at(backwards), items[::-1])
    assert len(set(items.tolist())) == stop - start
    assert all(0 <= item < n for item in items.tolist())


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_slices_are_slices_of_the_whole(n: int) -> None:
    order = whole(n, 3)
    for start, stop in [(0, 0), (0, 1), (17, 400), (n - 1, n), (n, n)]:
        assert np.array_equal(Permutation(n, 3).take(start, stop), order[start:stop])
    grid = np.array([[0, 5], [n - 1, 5]], dtype=np.int32)
    assert np.array_equal(Permutation(n, 3).at(grid), order[grid])


@pytest.mark.parametrize("n", [LARGE, 10**6, 2**32 - 1, 2**32, 2**32 + 1])
def test_many_positions_at_once_are_no_different_from_a_few(n: int) -> None:
    start = n // 3
    at_once = Permutation(n, 5).take(start, start + 2048)
    permutation = Permutation(n, 5)
    few = [permutation.take(first, first + 256) for first in range(start, start + 2048, 256)]
    assert np.array_equal(at_once, np.concatenate(few))


@pytest.mark.parametrize("n", [10**9, 2**60, 2**62])
def test_seeking_takes_no_memory(n: int) -> None:
    permutation = Permutation(n, 5)
    tracemalloc.start()
    items = np.concatenate([permutation.take(0, 4096), permutation.take(n - 4096, n)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22  # the tables of 1e9 are 2 MB
    assert len(np.unique(items)) == 8192
    assert z_of_chi_square(np.bincount(items // (n // 64 + 1), minlength=64)) < 4


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_each_order_of_a_few_items_is_as_likely(n: int) -> None:
    orders = Counter(tuple(whole(n, derive(n, key)).tolist()) for key in range(6000))
    counts = np.array([orders[order] for order in permutations(range(n))])
    assert counts.sum() == 6000
    assert z_of_chi_square(counts) < 4


@pytest.mark.parametrize("n", [SMALL, LARGE, 10**9])
def test_where_an_item_goes_is_uniform_over_keys(n: int) -> None:
    positions = np.array([0, 1, n // 2, n - 1])
    # Plain counting numbers as keys: the worst that a caller can do.
    items = np.array([Permutation(n, key).at(positions) for key in range(2000)])
    for column in items.T:
        assert z_of_chi_square(np.bincount(column * 40 // n, minlength=40)) < 4
    # Where one goes says nothing of where its neighbour goes, nor what the next key does.
    for difference in (items[:, 1] - items[:, 0], items[:, 3] - items[:, 2], items[1:, 0] - items[:-1, 0]):
        assert z_of_chi_square(np.bincount(difference % n * 40 // n, minlength=40)) < 4


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_each_part_of_the_order_holds_items_from_everywhere(n: int) -> None:
    parts = 8
    table = np.zeros((parts, parts), dtype=np.int64)
    for key in range(50):
        np.add.at(table, (np.arange(n) * parts // n, whole(n, key) * parts // n), 1)
    # Both margins are fixed, which leaves (parts - 1) ** 2 degrees of freedom: the bound is on the safe side.
    assert abs(z_of_chi_square(table.reshape(-1))) < 4


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_neighbouring_positions_are_unrelated(n: int) -> None:
    orders = [whole(n, derive(0, epoch)) for epoch in range(50)]
    grid = math.isqrt(n - 1) + 1
    for lag in (1, 2, grid, grid + 1):  # a network's weak spots would lie along its grid
        serial = [np.corrcoef(order[:-lag], order[lag:])[0, 1] for order in orders]
        assert abs(np.mean(serial)) < 4 / math.sqrt(n * len(orders))
        for step in (1, -1, grid):
            together = [int(np.count_nonzero(np.diff(order[::lag]) == step)) for order in orders]
            assert abs(z_of_poisson(together, mean=1 / lag)) < 4
    displacement = [np.abs(order - np.arange(n)).mean() / n for order in orders]
    assert np.mean(displacement) == pytest.approx(1 / 3, abs=4 * 0.24 / math.sqrt(n * len(orders)))


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_epochs_and_seeds_are_unrelated(n: int) -> None:
    def orders_of(keys: list[int]) -> list[NDArray[np.int64]]:
        return [whole(n, key) for key in keys]

    for orders in (
        orders_of([derive(0, epoch) for epoch in range(60)]),
        orders_of([derive(seed, 0) for seed in range(60)]),
        orders_of(list(range(60))),
    ):
        fixed = [int(np.count_nonzero(order == np.arange(n))) for order in orders]
        assert abs(z_of_poisson(fixed, mean=1)) < 4 and len(set(fixed)) > 2
        pairs = list(pairwise(orders))
        same = [int(np.count_nonzero(one == other)) for one, other in pairs]
        assert abs(z_of_poisson(same, mean=1)) < 4
        correlation = [np.corrcoef(one, other)[0, 1] for one, other in pairs]
        assert max(map(abs, correlation)) < 4.5 / math.sqrt(n)
        # Two items that follow each other in one epoch do so in the next about once.
        following = [len(follows(one) & follows(other)) for one, other in pairs]
        assert abs(z_of_poisson(following, mean=1)) < 4


def follows(order: NDArray[np.int64]) -> set[tuple[int, int]]:
    return set(zip(order[:-1].tolist(), order[1:].tolist(), strict=True))


def test_derived_keys_do_not_alias() -> None:
    grid = [derive(seed, epoch) for seed in range(50) for epoch in range(50)]
    assert len(set(grid)) == 2500 and all(0 <= key < 2**64 for key in grid)
    parts: list[tuple[int | str, ...]] = [
        (),
        ("",),
        (1, 2),
        (12,),
        ("1", "2"),
        ("12",),
        (1, "2"),
        ("1;i2",),
        (-1, 2),
        ("a", "b"),
        ("as1:b",),
    ]
    assert len({derive(*these) for these in parts}) == len(parts)
    assert derive(np.int64(3)) == derive(3)  # type: ignore[arg-type]  # numpy's integers count as integers


def test_what_cannot_be_is_refused() -> None:
    for n in (-1, 2**62 + 1):
        with pytest.raises(ValueError, match=str(n)):
            Permutation(n, 0)
    for start, stop in [(-1, 2), (3, 2), (0, 11)]:
        with pytest.raises(IndexError, match="10 items"):
            Permutation(10, 0).take(start, stop)
    for position in (-1, 10):
        with pytest.raises(IndexError, match=r"\[0, 10\)"):
            Permutation(10, 0).at(np.array([position]))
    with pytest.raises(TypeError, match="float64"):
        Permutation(10, 0).at(np.array([1.0]))
    assert Permutation(10, 0).at(np.array([], dtype=np.int64)).shape == (0,)
