"""Where Python's, NumPy's and torch's global generators stand: kept and put back at little cost.

This is done around every fetch, and the official ways copy a Mersenne state of 624 words one by one: 10 us for
Python's, 51 us for NumPy's. Both keep theirs in one piece of memory, which is read or written in 0.1 us. That it lies
where it is looked for is checked at the start; where it does not, the official ways are taken.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.random import get_bit_generator as _get_bit_generator  # type: ignore[attr-defined]  # documented, untyped

_WORDS = 624
_SIZE = (_WORDS + 1) * 4  # the state and how many of its words are used up, all of 32 bits

State: TypeAlias = tuple[Any, Any, bytes]
"""Where the three stand."""


class HostGenerators:
    """The generators of this process that live in host memory. For one user at a time, in one process."""

    def __init__(self) -> None:
        self._python = _Python()
        self._numpy = _NumPy()

    def __reduce__(self) -> tuple[type[HostGenerators], tuple[()]]:
        return HostGenerators, ()  # what a loader worker unpickles are its own

    def state(self) -> State:
        """Where they stand."""
        torch_cpu = torch.default_generator.get_state()
        # By its address: `numpy().tobytes()` takes 5 us more in the middle of a training step.
        copied = ctypes.string_at(torch_cpu.data_ptr(), torch_cpu.nbytes)
        return self._python.state(), self._numpy.state(), copied

    def restore(self, state: State) -> None:
        """Put them back to where they stood."""
        python, numpy, torch_cpu = state
        self._python.restore(python)
        self._numpy.restore(numpy)
        torch.default_generator.set_state(torch.frombuffer(bytearray(torch_cpu), dtype=torch.uint8))

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
        *words, used = random.getstate()[1]
        # CPython's own layout: the fields come after what every object begins with.
        has_room = type(self._generator).__basicsize__ >= object.__basicsize__ + _SIZE
        address = id(self._generator) + object.__basicsize__ if has_room else None
        self._memory = _memory(address, np.array([used, *words], dtype=np.uint32).tobytes())

    def state(self) -> tuple[Any, ...]:
        if self._memory is None:
            return random.getstate()
        return self._memory.raw, self._generator.gauss_next

    def restore(self, state: tuple[Any, ...]) -> None:
        if self._memory is None:
            random.setstate(state)
        else:
            self._memory.raw, self._generator.gauss_next = state


class _NumPy:
    """The generator behind the functions of `numpy.random`: in memory, the state, then the words used up.

    Every second normal deviate comes from a store of one, which is not in that memory.
    """

    def __init__(self) -> None:
        self._bits: Any = None
        self._memory: Any = None
        self._without_store: bytes | None = None
        """The memory for which the store is known to be empty: to fill it, one has to draw."""

    def state(self) -> tuple[bytes, float | None]:
        self._find()
        if self._memory is not None:
            memory: bytes = self._memory.raw
            if memory == self._without_store:
                return memory, None
        memory, stored = _numpy_state()
        self._without_store = memory if stored is None else None
        return memory, stored

    def restore(self, state: tuple[bytes, float | None]) -> None:
        self._find()
        memory, stored = state
        if self._memory is not None and stored is None:
            np.random.seed(0)  # empties the store
            self._memory.raw = self._without_store = memory
        else:
            *words, used = np.frombuffer(memory, dtype=np.uint32)
            np.random.set_state(("MT19937", np.array(words), int(used), int(stored is not None), stored or 0.0))
            self._without_store = None

    def _find(self) -> None:
        """The memory of the present generator; the user may have put another one in its place."""
        if (bits := _get_bit_generator()) is not self._bits:
            self._bits = bits
            self._memory = _memory(bits.ctypes.state_address, _numpy_state()[0])
            self._without_store = None


def _numpy_state() -> tuple[bytes, float | None]:
    """What the memory holds and the stored deviate, by the official way."""
    state: Any = np.random.get_state(legacy=True)
    _, words, used, has_stored, stored = state
    return np.append(words, used).astype(np.uint32).tobytes(), stored if has_stored else None


def _memory(address: int | None, expected: bytes) -> Any:
    """The memory at an address, if it holds what is expected there."""
    if address is None:
        return None
    memory = (ctypes.c_char * _SIZE).from_address(address)
    return memory if memory.raw == expected else None
