"""The loader that users iterate: batches on the device, and a position that is saved with the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset, Sampler

from ddpkit.agree import Ranks
from ddpkit.errors import UserError
from ddpkit.fetching import Fetcher, LoaderOptions, SeededDataset, SeededStream, collate_of
from ddpkit.sampler import Fetch, Pass, Plan, SampledOrder, make_order, passes_per_step
from ddpkit.world import World

log = logging.getLogger("ddpkit")

_LEFT = (
    "epoch %d of a loader was left early, after %d batches; a restart had begun it at batch %d. A loop that counts its "
    "batches (enumerate, islice) has to count on from there: loader.done tells, before the loop"
)
_P = TypeVar("_P")


class Watch(Protocol):
    """Who wants to know where the loop over a loader is; see `ddpkit.loops`."""

    def asked(self, loader: Loader) -> None:
        """The next batch has been asked for, and not been fetched yet."""
        ...

    def fetching(self, loader: Loader, is_done: bool) -> None:
        """A pass has been fetched (True), or workers keep us waiting for one (False, now and then)."""
        ...

    def given(self, loader: Loader) -> None:
        """A batch is given out."""
        ...

    def ended(self, loader: Loader, is_left: bool) -> None:
        """An iteration has come to its end, or was left before it."""
        ...


class Loader:
    """Iterates this rank's passes over a dataset, on from wherever it stopped.

    Each iteration is one epoch; the first one after a restore is the rest of the epoch that was under way. Leaving
    it early (``break``) ends that epoch. One iteration can be under way at a time. `Runtime.loader` makes it.

    Attributes:
        epoch: the epoch of the last batch given out, or to come next.
        position: samples of that epoch given out so far, over all ranks.
        consumed: samples given out in all epochs, over all ranks.
        dataset: as it was given.
        options: how samples are fetched.
        current: the pass given out last; its size, and whether the optimizer steps after it.
        watch: of the run that this loader feeds, which saves and leaves from there.
    """

    def __init__(
        self,
        dataset: Any,
        world: World,
        ranks: Ranks,
        device: torch.device,
        *,
        seed: int,
        run_seed: int,
        global_batch_size: int,
        micro_batch_size: int | None,
        shuffle: bool,
        drop_last: bool,
        sampler: str | Sampler[Any] | Callable[[Any], Sampler[Any]],
        options: LoaderOptions,
    ) -> None:
        if global_batch_size < world.world_size:
            raise UserError(
                f"data.global_batch_size: {global_batch_size} samples cannot be split over {world.world_size} ranks; "
                f"give at least {world.world_size}, or start fewer ranks"
            )
        if micro_batch_size is not None and micro_batch_size < 1:
            raise UserError(f"data.micro_batch_size: {micro_batch_size} samples make no pass; give 1 or more, or None")
        if isinstance(dataset, DataLoader):
            raise UserError("loader: got a torch DataLoader; give the dataset, ddpkit makes the loader")
        self._world = world
        self._ranks = ranks
        self._device = device
        self.dataset = dataset
        self._seed = seed
        self.options = options
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._drop_last = drop_last
        self._plan: Plan | None = None
        if not isinstance(dataset, IterableDataset):
            if not isinstance(dataset, Sized):
                raise UserError(
                    f"data.train: {type(dataset).__name__} has no length; a map-style dataset needs __len__, "
                    "any other one is to subclass torch.utils.data.IterableDataset"
                )
            order = make_order(sampler, dataset, seed, shuffle, drop_last, world, global_batch_size, run_seed)
            self._plan = Plan(order, world, seed, global_batch_size, micro_batch_size, drop_last)
            if self._plan.stop == 0:
                raise UserError(
                    f"data.train: {len(dataset)} samples do not fill one global batch of {global_batch_size}; "
                    "make the batch smaller, or set drop_last: false"
                    if len(dataset)
                    else "data.train: the dataset is empty"
                )
        self.epoch = 0
        self.position = 0
        self.consumed = 0
        self.current: Pass | None = None
        self.watch: Watch | None = None
        self._restored = False
        self._ended = False
        self._iteration: object | None = None
        self._is_left = False
        self._was_asked = False
        self._fetcher: Fetcher | None = None

    def __len__(self) -> int:
        """Batches that this rank gets in a whole epoch, the same on all ranks.

        Raises:
            TypeError: an iterable dataset's length is not known.
        """
        if self._plan is None:
            raise TypeError("a loader over an iterable dataset has no length")
        return len(self._plan)

    @property
    def batch_size(self) -> int:
        """The most samples that this rank gets in one pass."""
        share = -(-self._global_batch_size // self._world.world_size)
        return min(share, self._micro_batch_size or share)

    @property
    def steps_in_epoch(self) -> int | None:
        """Optimizer steps in a whole epoch; None for an iterable dataset."""
        return None if self._plan is None else -(-self._plan.stop // self._global_batch_size)

    @property
    def takes_all(self) -> bool:
        """Whether an epoch is made of the dataset's samples as they are, not of a user's sampler's choice of them."""
        return self._plan is None or not isinstance(self._plan.order, SampledOrder)

    @property
    def at_end(self) -> bool:
        """Whether the batch given out last was the last one of its epoch."""
        return self._ended or (self._plan is not None and self.position >= self._plan.stop)

    @property
    def is_open(self) -> bool:
        """Whether an iteration is under way: a batch has been given out, and the next one may be asked for."""
        return self._iteration is not None

    @property
    def done(self) -> int:
        """Batches of its epoch, on each rank, that a restart has found done already; 0 once an iteration has begun.

        At how manieth batch the iteration to come begins: ``enumerate(loader, loader.done)``.
        """
        self._was_asked = True  # a loop that knows need not be warned
        return self._begins_at() if self._restored else 0

    def _begins_at(self) -> int:
        steps = self.position // self._global_batch_size
        return steps * passes_per_step(self._global_batch_size, self._micro_batch_size, self._world.world_size)

    def __iter__(self) -> Iterator[Any]:
        return _Iteration(self._batches())

    def _batches(self) -> Iterator[Any]:
        if not self._restored and self.position > 0:
            self.end_epoch()  # the iteration before this one was left early
        if self.at_end:  # restored there
            self._restored = False
            self.end_epoch()
            return
        began_at = passes = self._begins_at()
        self._restored = False
        self._iteration = iteration = object()
        try:
            self._ask()
            for part, batch, is_last in self._looking_ahead():
                passes += 1
                self.current = part
                if part.is_last:
                    self.consumed += part.batch_stop - self.position
                    self.position = part.batch_stop
                    self._ended = is_last
                if self.watch is not None:
                    self.watch.given(self)
                yield self._on_device(batch)
                if self._iteration is not iteration:
                    raise UserError(
                        "loader: two iterations over one loader are under way at once, and it has one position only; "
                        "make a loader for each"
                    )
                self._ask()
            self._close(is_left=False)
        except GeneratorExit:
            if self._iteration is iteration:
                if began_at and not self._was_asked and self._world.is_main:
                    log.warning(_LEFT, self.epoch, passes, began_at)
                self._close(is_left=True)
            raise

    def _ask(self) -> None:
        if self.watch is not None:
            self.watch.asked(self)

    def _close(self, is_left: bool) -> None:
        self._iteration = None
        if not is_left:
            self.end_epoch()
        if self.watch is not None:
            self.watch.ended(self, is_left)

    def end_epoch(self) -> None:
        """Go to the start of the next epoch, unless nothing of this one was taken."""
        if self.position > 0 or self._ended:
            self.epoch += 1
            self.position = 0
        self._ended = self._is_left = False

    def leave(self) -> None:
        """Nothing more of this epoch will be asked for: a restart is to begin with the next one."""
        self._is_left = self.position > 0

    def rewind(self) -> None:
        """Forget what has been given out: a run begins, and a batch that was only looked at is none of it."""
        self.epoch = self.position = self.consumed = 0
        self._ended, self._is_left, self.current, self._iteration = False, False, None, None

    def take_back(self) -> None:
        """Stand before the global batch of the pass given out last, which comes again then; for a state to be saved."""
        part = self.current
        if part is not None and self.position == part.batch_stop:
            self.consumed -= part.batch_size
            self.position = part.batch_start
            self._ended = False

    def state_dict(self) -> dict[str, Any]:
        """The position, as samples over all ranks: it means the same at any world size."""
        return {
            "epoch": self.epoch + self._is_left,
            "position": 0 if self._is_left else self.position,
            "consumed": self.consumed,
            "at_end": self.at_end and not self._is_left,
            "world_size": self._world.world_size,
            "micro_batch_size": self._micro_batch_size,
            "length": len(self.dataset) if self._plan else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next iteration go on at a saved position."""
        self.epoch, self.position, self.consumed = state["epoch"], state["position"], state["consumed"]
        self._ended = bool(state["at_end"])
        self._restored, self._iteration, self._is_left = True, None, False
        if self._plan and self.position and self._world.is_main:
            length, now = state["length"], len(self.dataset)
            if length != now:
                log.warning(
                    "data.train: %d samples when the run stopped in the middle of epoch %d, %d now: the rest of this "
                    "epoch is in another order, repeats some samples and leaves out others; the next one is whole",
                    length,
                    self.epoch,
                    now,
                )
            elif lost := self._plan.order.restored(state["world_size"]):
                log.warning("%s", lost)

    def close(self) -> None:
        """End the loader's workers."""
        if self._fetcher is not None:
            self._fetcher.close()

    def _looking_ahead(self) -> Iterator[tuple[Pass, Any, bool]]:
        """The passes, each with whether it is known to be the epoch's last (a stream is asked for the next first)."""
        if self._plan is not None:
            for part, batch in self._stoppable(self._fetched()):
                yield part, batch, False  # `at_end` follows from the position
            return
        ahead = self._agreed(self._stoppable(_then_none(self._fetched())))
        held = next(ahead, None)
        while held is not None:
            following = next(ahead, None)
            yield *held, following is None
            held = following

    def _stoppable(self, passes: Iterator[_P]) -> Iterator[_P]:
        """Between the fetch, in which ranks do not need each other, and what follows, in which they do."""
        for each in passes:
            if self.watch is not None:
                self.watch.fetching(self, True)
            yield each

    def _while_waiting(self) -> None:
        if self.watch is not None:
            self.watch.fetching(self, False)

    def _fetched(self) -> Iterator[tuple[Pass, Any]]:
        if self._plan is None:
            self.close()
            self._fetcher = Fetcher(self._stream(), None, self.options, self._seed, self._while_waiting)
            return iter(self._fetcher)
        if isinstance(self._plan.order, SampledOrder):
            self._check_same_order(self._plan.order)
        if self._fetcher is None:
            dataset = SeededDataset(self.dataset, collate_of(self.options))
            fetches = _Fetches(self, self._plan)
            self._fetcher = Fetcher(dataset, fetches, self.options, self._seed, self._while_waiting)
        return iter(self._fetcher)

    def _check_same_order(self, order: SampledOrder) -> None:
        """A sampler that draws on its own differs from rank to rank; their shares would not make up the whole."""
        digests = self._ranks.exchange("order of samples", order.digest(self.epoch))
        if odd := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
            raise UserError(
                f"data.sampler: the order of epoch {self.epoch} on ranks {odd} is not that of rank 0. It has to be a "
                "function of the epoch (set_epoch) or of the generators that ddpkit seeds: random, numpy.random, torch"
            )

    def _stream(self) -> SeededStream:
        return SeededStream(
            self.dataset,
            collate_of(self.options),
            self._world,
            self._seed,
            self._global_batch_size,
            self._micro_batch_size,
            self._drop_last,
            self.epoch,
            self.position,
        )

    def _agreed(self, stream: Iterator[tuple[Pass | None, Any]]) -> Iterator[tuple[Pass, Any]]:
        """End the epoch on all ranks when the stream of one of them ends: no rank may wait alone in a collective."""
        for part, batch in stream:
            size = part.batch_size if part is not None else 0
            if self._world.world_size > 1:
                # The smallest and the largest in one all-reduce: max(-x) is -min(x).
                extremes = torch.tensor([size, -size], device=self._device)
                dist.all_reduce(extremes, dist.ReduceOp.MAX)
                largest, smallest = int(extremes[0]), -int(extremes[1])
                if largest != smallest:
                    self._tell_uneven(size)
                    return
            if part is None:
                return
            yield part, batch

    def _tell_uneven(self, size: int) -> None:
        sizes = self._ranks.exchange("sizes of streams", size)
        short = [rank for rank, got in enumerate(sizes) if got < max(sizes)]
        if self._world.is_main:
            log.warning(
                "data.train: the iterable dataset ended on ranks %s in epoch %d while others had more (next global "
                "batch: %s samples by rank). The epoch ends here for all. Every rank has to see the same stream; "
                "ddpkit does the splitting.",
                short,
                self.epoch,
                sizes,
            )

    def _on_device(self, batch: Any) -> Any:
        if self._device.type == "cpu":
            return batch
        return tree_map(lambda leaf: leaf.to(self._device, non_blocking=True) if hasattr(leaf, "to") else leaf, batch)


class _Iteration(Iterator[Any]):
    """What a loop asks for batches. One that has failed says so if it is asked again, and does not seem to be done."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self._failure: Exception | None = None

    def __next__(self) -> Any:
        if self._failure is not None:
            raise UserError(
                f"loader: its last batch could not be had ({type(self._failure).__name__}: {self._failure}), and it "
                "cannot go on without it: on other ranks the batch may be there. Have the dataset's __getitem__, or "
                "collate_fn, deal with samples that fail"
            ) from self._failure
        try:
            return next(self._batches)
        except StopIteration:
            raise
        except Exception as error:
            self._failure = error
            raise


class _Fetches:
    """What is to be fetched: iterated anew for each epoch, from where the loader then stands."""

    def __init__(self, loader: Loader, plan: Plan) -> None:
        self._loader = loader
        self._plan = plan

    def __iter__(self) -> Iterator[Fetch]:
        return self._plan.fetches(self._loader.epoch, self._loader.position)


def _then_none(stream: Iterator[tuple[Pass, Any]]) -> Iterator[tuple[Pass | None, Any]]:
    yield from stream
    yield None, None
