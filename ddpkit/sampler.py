"""Which samples this rank takes, as arithmetic on positions.

An epoch is one global order of samples. A global batch is a slice of it, and each rank takes a slice of the slice.
So the order depends on (seed, epoch, length) alone, never on the number of ranks, and the whole position of a run in
its data is one number: the samples consumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Sampler
from torch.utils.data.distributed import DistributedSampler

from ddpkit.errors import UserError
from ddpkit.generators import HostGenerators
from ddpkit.permutation import Permutation, derive
from ddpkit.seeding import epoch_key
from ddpkit.world import World

_made = tuple.__new__  # what a NamedTuple's constructor calls: half the time, and there are two for each pass
_BLOCK = 16384  # positions permuted at once, of which numpy's cost per call no longer shows; an epoch begins with less


class Pass(NamedTuple):  # like `Fetch` no dataclass: made for every pass, and a frozen one takes 3 times as long
    """One forward and backward pass of one rank: its part of a global batch, or a part of that part.

    Positions count samples in the epoch's global order. ``start == stop`` is a pass without samples: the rank takes
    part in its collectives and adds nothing.
    """

    start: int
    stop: int
    batch_start: int
    batch_stop: int
    is_last: bool
    """Whether the optimizer steps after this pass."""

    @property
    def size(self) -> int:
        """Samples of this rank in this pass."""
        return self.stop - self.start

    @property
    def batch_size(self) -> int:
        """Samples of all ranks in the whole optimizer step."""
        return self.batch_stop - self.batch_start

    def weight(self, world_size: int) -> float:
        """What to scale a mean loss by, so that DDP's mean over ranks is the mean over the global batch."""
        return self.size * world_size / self.batch_size


def split(start: int, stop: int, part: int, parts: int) -> tuple[int, int]:
    """Part number ``part`` of ``[start, stop)`` cut into ``parts`` whose sizes differ by at most one."""
    quotient, remainder = divmod(stop - start, parts)
    begin = start + part * quotient + min(part, remainder)
    return begin, begin + quotient + (part < remainder)


def passes_per_step(batch_size: int, micro_batch_size: int | None, world_size: int) -> int:
    """Passes of every rank in one optimizer step: what the largest share needs."""
    largest_share = -(-batch_size // world_size)
    return 1 if micro_batch_size is None else max(1, -(-largest_share // micro_batch_size))


def passes(batch_start: int, batch_stop: int, micro_batch_size: int | None, rank: int, world_size: int) -> list[Pass]:
    """The passes of one rank over one global batch; every rank gets the same number of them."""
    start, stop = split(batch_start, batch_stop, rank, world_size)
    count = passes_per_step(batch_stop - batch_start, micro_batch_size, world_size)
    return [Pass(*split(start, stop, i, count), batch_start, batch_stop, is_last=i == count - 1) for i in range(count)]


class Order(Protocol):
    """The global order of one epoch's samples."""

    def __len__(self) -> int:
        """Positions in an epoch."""
        ...

    def items(self, epoch: int, positions: np.ndarray[Any, np.dtype[np.int64]]) -> list[Any]:
        """What to ask the dataset for at these positions of an epoch."""
        ...

    def restored(self, world_size_then: int) -> str | None:
        """What is lost when a position saved at another world size is taken up, for people; None: nothing."""
        ...


class ElasticOrder:
    """ddpkit's own: a keyed permutation that is computed where it is needed, never stored.

    Args:
        length: samples in the dataset.
        seed: of the run.
        shuffle: False keeps the dataset's own order.
    """

    def __init__(self, length: int, seed: int, shuffle: bool) -> None:
        self._length = length
        self._seed = seed
        self._shuffle = shuffle
        self._permutation = (-1, Permutation(0, 0))

    def __len__(self) -> int:
        return self._length

    def items(self, epoch: int, positions: np.ndarray[Any, np.dtype[np.int64]]) -> list[int]:
        """Indices into the dataset, Python ints."""
        if not self._shuffle:
            return _listed(positions)
        if self._permutation[0] != epoch:
            self._permutation = (epoch, Permutation(self._length, derive(self._seed, "order", epoch)))
        return _listed(self._permutation[1].at(positions))

    def restored(self, world_size_then: int) -> None:
        """Nothing is lost at any world size."""


class SampledOrder:
    """The order that a torch ``Sampler`` of the user's yields (weighted sampling, say), the same on every rank.

    The sampler draws from generators seeded by (seed, epoch), so every rank and every restart sees the same epoch; its
    own ``generator``, where it has one as torch's samplers do, is seeded by (its seed, epoch). Any other randomness of
    its own has to be a function of ``set_epoch``. One epoch's indices are held in memory.
    """

    def __init__(self, sampler: Sampler[Any], seed: int) -> None:
        if not isinstance(sampler, Sized):
            raise UserError(f"data.sampler: {type(sampler).__name__} has no length; a sampler needs __len__")
        self._sampler = sampler
        self._length = len(sampler)
        self._seed = seed
        generator = getattr(sampler, "generator", None)
        self._generator = generator if isinstance(generator, torch.Generator) else None
        self._generator_seed = self._generator.initial_seed() if self._generator else 0
        self._drawn: tuple[int, list[Any]] = (-1, [])

    def __len__(self) -> int:
        return self._length

    def items(self, epoch: int, positions: np.ndarray[Any, np.dtype[np.int64]]) -> list[Any]:
        """Whatever the sampler yields at these positions."""
        drawn = self._of(epoch)
        return [drawn[position] for position in positions.tolist()]

    def digest(self, epoch: int) -> int:
        """A hash of an epoch's order, to compare with other ranks'."""
        return derive(repr(self._of(epoch)))

    def _of(self, epoch: int) -> list[Any]:
        if self._drawn[0] != epoch:
            _set_epoch(self._sampler, epoch)
            generators = HostGenerators()
            with generators.kept():
                generators.seed(epoch_key(self._seed, "sampler", epoch))
                if self._generator is not None:
                    self._generator.manual_seed(epoch_key(self._generator_seed, "sampler", epoch))
                self._drawn = (epoch, list(self._sampler))
            if len(self._drawn[1]) != self._length:
                raise UserError(
                    f"data.sampler: {type(self._sampler).__name__} yielded {len(self._drawn[1])} indices in epoch "
                    f"{epoch}, but its length is {self._length}"
                )
        return self._drawn[1]

    def restored(self, world_size_then: int) -> None:
        """Nothing is lost: the order is global, whatever the number of ranks."""


class DistributedOrder:
    """torch's ``DistributedSampler``, for those who stay with it; ``set_epoch`` is called for them.

    Its order belongs to a world size. Resuming at the same one is exact; at another one the epoch goes on at the same
    number of samples in a different order, so some are repeated and others left out until the epoch ends.
    """

    def __init__(self, dataset: Any, seed: int, shuffle: bool, drop_last: bool, world: World) -> None:
        self._world_size = world.world_size
        self._sampler: DistributedSampler[Any] = DistributedSampler(
            dataset,
            world.world_size,
            world.rank,
            shuffle=shuffle,
            seed=seed & 0x7FFFFFFF,
            drop_last=drop_last,
        )
        self._own: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self._sampler) * self._world_size

    def items(self, epoch: int, positions: np.ndarray[Any, np.dtype[np.int64]]) -> list[int]:
        """Indices from this rank's own list: one for every ``world_size`` positions of the global batch."""
        if self._own[0] != epoch:
            self._sampler.set_epoch(epoch)
            self._own = (epoch, list(self._sampler))
        own = self._own[1]
        return [own[position] for position in positions.tolist()]

    def restored(self, world_size_then: int) -> str | None:
        """Say what a change of the world size costs."""
        if world_size_then == self._world_size:
            return None
        return (
            f"data.sampler: distributed orders samples by the number of ranks, which was {world_size_then} and is now "
            f"{self._world_size}: this epoch repeats some samples and leaves out others; the next one is whole. "
            "sampler: elastic has no such loss."
        )


class Fetch(NamedTuple):
    """What one pass asks of the dataset; small, since it travels to loader workers."""

    part: Pass
    items: list[Any]
    """Indices of the samples; of one stand-in sample if the pass has none, to have a batch to take nothing of."""
    key: int
    """The epoch's key of the samples' random streams."""


@dataclass(frozen=True)
class Plan:
    """A rank's way through an epoch: from a position, all passes with what they fetch.

    Args:
        order: the epoch's global order.
        world: who this rank is.
        global_batch_size: samples per optimizer step over all ranks.
        micro_batch_size: samples per rank and pass; None takes the rank's whole share at once.
        drop_last: leave out the incomplete last global batch.
    """

    order: Order
    world: World
    seed: int
    global_batch_size: int
    micro_batch_size: int | None
    drop_last: bool

    @property
    def stop(self) -> int:
        """The position at which an epoch ends."""
        length = len(self.order)
        return length - length % self.global_batch_size if self.drop_last else length

    def __len__(self) -> int:
        """Passes of each rank in a whole epoch."""
        whole, rest = divmod(self.stop, self.global_batch_size)
        count = whole * passes_per_step(self.global_batch_size, self.micro_batch_size, self.world.world_size)
        return count + (passes_per_step(rest, self.micro_batch_size, self.world.world_size) if rest else 0)

    def fetches(self, epoch: int, position: int) -> Iterator[Fetch]:
        """All passes from ``position`` on. Seeking is arithmetic: nothing before it is computed."""
        key, end = epoch_key(self.seed, "sample", epoch), self.stop
        steps = 1
        while position < end:
            batch_size = min(self.global_batch_size, end - position)  # the epoch's last one may be smaller
            steps = min(steps, (end - position) // batch_size)
            yield from self._block(epoch, key, range(position, position + steps * batch_size, batch_size))
            position += steps * batch_size
            steps = max(1, min(steps * 8, _BLOCK // self.global_batch_size))

    def _block(self, epoch: int, key: int, batch_starts: range) -> Iterator[Fetch]:
        """The passes of several steps of one size: those of the first one, again and again further on."""
        batch_size = batch_starts.step
        parts = passes(0, batch_size, self.micro_batch_size, self.world.rank, self.world.world_size)
        counts = [part.size or 1 for part in parts]  # a pass without samples fetches one, to take nothing of it
        within = np.concatenate(
            [np.arange(count) + (part.start if part.size else 0) for part, count in zip(parts, counts, strict=True)]
        )
        starts = np.array(batch_starts)
        if isinstance(self.order, DistributedOrder):
            # Its lists are per rank: the batch's place in this rank's own list, plus the place within the share.
            starts, within = starts // self.world.world_size, within - parts[0].start
        items = self.order.items(epoch, np.add.outer(starts, within).reshape(-1))
        taken = 0
        for batch_start in batch_starts:
            for (start, stop, _, _, is_last), count in zip(parts, counts, strict=True):
                place = (batch_start + start, batch_start + stop, batch_start, batch_start + batch_size, is_last)
                yield _made(Fetch, (_made(Pass, place), items[taken : taken + count], key))
                taken += count


def make_order(
    sampler: str | Sampler[Any] | Callable[[Any], Sampler[Any]],
    dataset: Any,
    seed: int,
    shuffle: bool,
    drop_last: bool,
    world: World,
    global_batch_size: int,
    run_seed: int,
) -> Order:
    """The order that ``data.sampler`` asks for: "elastic", "distributed", or a factory called with the dataset.

    ``seed`` is the loader's own; torch's sampler gets ``run_seed``, the run's, so that it has the order that it had in
    the script it comes from.
    """
    if sampler == "elastic":
        return ElasticOrder(len(dataset), seed, shuffle)
    if sampler == "distributed":
        if global_batch_size % world.world_size:
            raise UserError(
                f"data.sampler: distributed gives every rank as many samples: global_batch_size={global_batch_size} "
                f"is not a multiple of {world.world_size} ranks. Choose a multiple, or sampler: elastic."
            )
        return DistributedOrder(dataset, run_seed, shuffle, drop_last, world)
    if not (callable(sampler) or isinstance(sampler, Sampler)):
        raise UserError(
            f"data.sampler: {sampler!r} is none; give 'elastic', 'distributed', a torch Sampler, or a function of the "
            "dataset that returns one"
        )
    made = sampler if isinstance(sampler, Sampler) else sampler(dataset)
    if isinstance(made, DistributedSampler):
        raise UserError(
            "data.sampler: the factory returned a DistributedSampler, which splits the samples over ranks itself; "
            "write sampler: distributed for it, or return a sampler that yields the order of all samples"
        )
    return SampledOrder(made, seed)


def _listed(positions: np.ndarray[Any, np.dtype[np.int64]]) -> list[int]:
    listed: list[int] = positions.tolist()  # Python's ints: what every dataset takes
    return listed


def _set_epoch(sampler: Any, epoch: int) -> None:
    if callable(getattr(sampler, "set_epoch", None)):
        sampler.set_epoch(epoch)


__all__ = ["ElasticOrder", "Fetch", "Order", "Pass", "Plan", "make_order", "passes", "split"]
