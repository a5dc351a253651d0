"""A random permutation of n items in O(1) memory, any position at once.

An epoch's order is such a permutation, keyed by ``derive(seed, epoch)``. It is never materialised: an item
is computed from its position, so an epoch over 1e9 samples starts at once and resumes anywhere.
Imports nothing of torch.
"""

from __future__ import annotations

import hashlib
import math
import operator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

LARGEST = 2**62  # each half then fits 31 bits, so no sum or product below leaves 64 bits
SORTED_UP_TO = 4096
ROUNDS = 8
_TABLED_UP_TO = 2**16  # values of one half, that is n up to 2**32: all rounds' tables are 4 MB then, and made in 1 ms
_TABLED_FROM = 1024  # positions asked for at once; for fewer, a table of all values is not worth its making


@dataclass(frozen=True)
class Permutation:
    """A permutation of ``range(n)`` that is a function of ``(n, key)`` alone, on any platform.

    Raises ``ValueError`` unless ``0 <= n <= 2**62``. ``key`` is any integer; take it from `derive`.
    """

    n: int
    key: int

    def __post_init__(self) -> None:
        if not 0 <= self.n <= LARGEST:
            raise ValueError(f"a permutation of {self.n} items was asked for; 0 to 2**62 are possible")

    def take(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the items at positions ``[start, stop)``: int64, shape ``(stop - start,)``.

        Raises ``IndexError`` unless ``0 <= start <= stop <= n``.
        """
        if not 0 <= start <= stop <= self.n:
            raise IndexError(f"positions [{start}, {stop}) are not within a permutation of {self.n} items")
        return self._items(np.arange(start, stop, dtype=np.uint64))

    def at(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the items at ``positions``, an integer array of any shape: int64, the same shape.

        Raises ``IndexError`` for a position outside ``[0, n)``, ``TypeError`` if they are not integers.
        """
        positions = np.asarray(positions)
        if not np.issubdtype(positions.dtype, np.integer):
            raise TypeError(f"positions must be integers, not {positions.dtype}")
        if positions.size and not 0 <= int(positions.min()) <= int(positions.max()) < self.n:
            raise IndexError(f"positions {positions.min()} to {positions.max()} are not all in [0, {self.n})")
        return self._items(positions.astype(np.uint64).reshape(-1)).reshape(positions.shape)

    def _items(self, positions: NDArray[np.uint64]) -> NDArray[np.int64]:
        if self.n <= SORTED_UP_TO:
            return self._sorted[positions.astype(np.int64)]
        items = self._encipher(positions)
        # Cycle walking: the network permutes a grid of a * b >= n points. Going on from a point outside until
        # one inside comes leaves a permutation of the n points. Fewer than one point in sqrt(n) is outside.
        outside = np.flatnonzero(items >= self.n)
        while outside.size:
            items[outside] = self._encipher(items[outside])
            outside = outside[items[outside] >= self.n]
        return items.astype(np.int64)

    @cached_property
    def _sorted(self) -> NDArray[np.int64]:
        """The whole order, for few items: there the halves of a network would be too small to mix well.

        Sorting independent 64-bit numbers gives each order the same chance (a tie has a chance of 2**-41).
        """
        numbers = np.arange(1, self.n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        numbers += np.uint64(derive("sorted", self.key))  # with the multiples above: a splitmix64 stream
        return np.argsort(_mix(numbers), kind="stable").astype(np.int64)

    @cached_property
    def _sides(self) -> tuple[int, int]:
        low = math.isqrt(self.n - 1) + 1  # the square root, rounded up
        return low, -(-self.n // low)

    @cached_property
    def _round_keys(self) -> tuple[np.uint64, ...]:
        return tuple(np.uint64(derive("feistel", self.key, number)) for number in range(ROUNDS))

    @cached_property
    def _tables(self) -> tuple[NDArray[np.uint64], ...]:
        """Each round's amounts, for every value of the half that they are made of."""
        a, b = self._sides
        lows, highs = np.arange(a, dtype=np.uint64), np.arange(b, dtype=np.uint64)
        return tuple(
            _amounts(highs, key=key, size=a) if number % 2 else _amounts(lows, key=key, size=b)
            for number, key in enumerate(self._round_keys)
        )

    def _encipher(self, points: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """A generalised Feistel network (Black & Rogaway 2002): its halves count modulo a and b, not 2**k."""
        a, b = self._sides
        high = points // np.uint64(a)
        low = points - high * np.uint64(a)
        looked_up = points.size >= _TABLED_FROM and a <= _TABLED_UP_TO  # 9 ns an item rather than 27
        # Neighbours differ in `low`, so it is `low` that stirs first.
        for number in range(ROUNDS):
            half, by, size = (low, high, a) if number % 2 else (high, low, b)
            if looked_up:
                amounts = self._tables[number].take(by.view(np.int64), mode="clip")  # unchecked: no value is outside
            else:
                amounts = _amounts(by, key=self._round_keys[number], size=size)
            half += amounts
            np.subtract(half, np.uint64(size), out=amounts)  # wraps to a huge number where half < size, so that
            np.minimum(half, amounts, out=half)  # the lesser of the two is half modulo size
        return high * np.uint64(a) + low


def derive(*parts: int | str) -> int:
    """Hash ``parts`` to a key in ``[0, 2**64)``.

    Unlike a sum, it keeps the parts apart: (seed 0, epoch 1) has nothing in common with (seed 1, epoch 0).
    """
    text = "".join(f"s{len(p)}:{p}" if isinstance(p, str) else f"i{operator.index(p)};" for p in parts)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _amounts(by: NDArray[np.uint64], *, key: np.uint64, size: int) -> NDArray[np.uint64]:
    """What a round adds to one half, from ``[0, size)``: a keyed pseudorandom function of the other half."""
    bits = (size - 1).bit_length()
    amounts = _mix(by ^ key)
    # As many high bits of the hash as leave room for the product: an even choice from [0, size), no division.
    amounts >>= np.uint64(bits)
    amounts *= np.uint64(size)
    amounts >>= np.uint64(64 - bits)
    return amounts


def _mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash each number in place (Murmur3's finaliser; the high bits are the good ones)."""
    numbers ^= numbers >> np.uint64(33)
    numbers *= np.uint64(0xFF51AFD7ED558CCD)
    numbers ^= numbers >> np.uint64(33)
    numbers *= np.uint64(0xC4CEB9FE1A85EC53)
    return numbers
