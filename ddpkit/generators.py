"""Where Python's, NumPy's and torch's global generators stand: seeded, kept and put back at little cost.

This is done around every fetch, and the official ways copy a Mersenne state of 624 words one by one: 10 us for
Python's, 51 us for NumPy's. Both keep theirs in one piece of memory, which is read or written in 0.1 us. That it lies
where it is looked for is checked at the start; where it does not, the official ways are taken, to the same effect.
"""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.random import get_bit_generator as _get_bit_generator  # type: ignore[attr-defined]  # documented, untyped

_WORDS = 624
_SIZE = (_WORDS + 1) * 4  # bytes: the state and how many of its words are used up
_ODD = 0x9E3779B97F4A7C15  # with no pattern
_LOW = (1 << 32) - 1
_FIRST, _SECOND, _USED = slice(0, _WORDS * 2), slice(_WORDS * 2, _WORDS * 4), slice(_WORDS * 4, None)  # of NumPy's

State: TypeAlias = tuple[Any, Any, torch.Tensor]
"""Where the three stand."""


class HostGenerators:
    """The generators of this process that live in host memory. For one user at a time, in one process."""

    def __init__(self) -> None:
        self._python = _Python()
        self._numpy = _NumPy()

    def __reduce__(self) -> tuple[type[HostGenerators], tuple[()]]:
        return HostGenerators, ()  # what a loader worker unpickles are its own

    def seed(self, key: int) -> None:
        """Seed all three from a 64-bit key: fit for every sample, at half of what their own ways would take.

        All three are Mersenne twisters, filled from 32 bits by one algorithm: torch's from the lower half, NumPy's from
        what multiply-add-shift makes of both (Dietzfelbinger et al. 1997). Python's own seeding takes longest, so it
        is given NumPy's state with its halves exchanged, of which the twister makes other numbers.
        """
        np.random.seed((key + 1) * _ODD >> 32 & _LOW)
        twister, _ = self._numpy.state()
        self._python.restore((twister[_USED] + twister[_SECOND] + twister[_FIRST], None))
        # Not torch.manual_seed: it goes over every device and costs 86 us.
        torch.default_generator.manual_seed(key)

    def state(self) -> State:
        """Where they stand."""
        return self._python.state(), self._numpy.state(), torch.default_generator.get_state()

    def restore(self, state: State) -> None:
        """Put them back to where they stood."""
        python, numpy, torch_cpu = state
        self._python.restore(python)
        self._numpy.restore(numpy)
        torch.default_generator.set_state(torch_cpu)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Leave them as they were before the block."""
        before = self.state()
        try:
            yield
        finally:
            self.restore(before)


class _Python:
    """The generator behind the functions of `random`: in memory, the words used up, then the state."""

    def __init__(self) -> None:
        self._generator: Any = random.random.__self__  # type: ignore[attr-defined]  # a bound method
        # CPython's own layout: the fields come after what every object begins with.
        has_room = type(self._generator).__basicsize__ >= object.__basicsize__ + _SIZE
        address = id(self._generator) + object.__basicsize__ if has_room else None
        self._memory = _memory(address, _python_state()[0])

    def state(self) -> tuple[bytes, float | None]:
        """What the memory holds, and the second deviate of `random.gauss`."""
        if self._memory is None:
            return _python_state()
        return self._memory.raw, self._generator.gauss_next

    def restore(self, state: tuple[bytes, float | None]) -> None:
        if self._memory is None:
            used, *words = np.frombuffer(state[0], dtype=np.uint32).tolist()
            random.setstate((3, (*words, used), state[1]))
        else:
            self._memory.raw, self._generator.gauss_next = state


def _python_state() -> tuple[bytes, float | None]:
    """By the official way."""
    _, (*words, used), deviate = random.getstate()
    return np.array([used, *words], dtype=np.uint32).tobytes(), deviate


class _NumPy:
    """The generator behind the functions of `numpy.random`: in memory, the state, then the words used up.

    Every second normal deviate comes from a store of one, which lies in another object.
    """

    def __init__(self) -> None:
        self._bits: Any = None
        self._memory: Any = None
        self._store: Any = None

    def state(self) -> tuple[bytes, bytes]:
        """What the two hold."""
        if _get_bit_generator() is not self._bits:
            self._find()
        if self._memory is None:
            return _numpy_state()
        return self._memory.raw, self._store.raw

    def restore(self, state: tuple[bytes, bytes]) -> None:
        if _get_bit_generator() is not self._bits:
            self._find()
        twister, store = state
        if self._memory is not None:
            self._memory.raw, self._store.raw = twister, store
        else:
            *words, used = np.frombuffer(twister, dtype=np.uint32)
            has_deviate, deviate = _STORE.unpack(store)
            np.random.set_state(("MT19937", np.array(words), int(used), has_deviate, deviate))

    def _find(self) -> None:
        """The memory of the present generator; the user may have put another one in its place."""
        self._bits = self._memory = None  # an interrupt in here may not leave the memory of one that is gone
        bits = _get_bit_generator()
        twister, store = _numpy_state()
        self._store = _memory(_address_of_store(), store)
        self._memory = _memory(bits.ctypes.state_address, twister) if self._store is not None else None
        self._bits = bits


_STORE = struct.Struct("ixxxxd")  # whether there is one, then the deviate, as the C structure has them


def _numpy_state() -> tuple[bytes, bytes]:
    """By the official way."""
    state: Any = np.random.get_state(legacy=True)
    _, words, used, has_deviate, deviate = state
    return np.append(words, used).astype(np.uint32).tobytes(), _STORE.pack(has_deviate, deviate)


def _address_of_store() -> int | None:
    """Where the object behind the functions of `numpy.random` has its second deviate; found in one like it."""
    behind: Any = np.random.standard_normal.__self__  # type: ignore[attr-defined]  # a bound method
    like_it = np.random.RandomState(0)
    like_it.standard_normal()
    _, _, _, has_deviate, deviate = like_it.get_state(legacy=True)
    content = ctypes.string_at(id(like_it), type(like_it).__basicsize__)
    offset = content.find(_STORE.pack(has_deviate, deviate))
    return id(behind) + offset if offset >= 0 and type(behind) is type(like_it) else None


def _memory(address: int | None, expected: bytes) -> Any:
    """The memory at an address, if it holds what is expected there."""
    if address is None:
        return None
    memory = (ctypes.c_char * len(expected)).from_address(address)
    return memory if memory.raw == expected else None
