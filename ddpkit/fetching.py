"""Fetching samples, in this process or in the workers of torch's DataLoader, told what to fetch and with which seeds.

A sample's random stream is set before its fetch, so augmentation is the same whatever the rank, the number of
workers, the prefetching or the restarts. Collating happens beside the fetch, with a stream of its own.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
import torch.utils.data._utils.worker as torch_worker
from torch._C._autograd import _profiler_enabled
from torch.autograd.profiler import record_function
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from ddpkit.generators import HostGenerators
from ddpkit.orphans import die_with_parent
from ddpkit.permutation import derive
from ddpkit.sampler import Fetch, Pass, passes
from ddpkit.seeding import epoch_key, sample_key
from ddpkit.tensor_rows import has_rows, rows
from ddpkit.world import World

_NO_SPAN = nullcontext()
_COLLATE = 1 << 63  # sets a batch's own stream apart from those of its samples
_DYING_S = 1.0  # a process's connections are closed a moment before its parent can see its end
_LOOK_S = 0.5  # how often somebody who waits for a batch is asked whether to wait on
# A cluster manager signals every process of a job step; whether to stop is the rank's business.
_NOT_FOR_WORKERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class LoaderOptions:
    """How samples are fetched; nothing here changes which samples come, in which order, or what is in them."""

    num_workers: int = 0
    pin_memory: bool = False
    prefetch_factor: int = 2
    persistent_workers: bool = True
    collate_fn: Callable[[list[Any]], Any] | None = None
    worker_init_fn: Callable[[int], None] | None = None


class SeededDataset(Dataset[Any]):
    """A map-style dataset that is asked for whole passes, and seeds the generators for each sample."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self._dataset = dataset
        self._collate = collate
        self._generators = HostGenerators()
        self._has_rows = collate is default_collate and has_rows(dataset)

    def __getitem__(self, fetch: Fetch) -> tuple[Pass, Any]:
        """Fetch and collate one pass."""
        # A span in traces, as the DataLoader has one; where nobody traces, it would take 2 us.
        try:
            with record_function("ddpkit: fetch") if _profiler_enabled() else _NO_SPAN:
                return fetch.part, self._batch(fetch)
        except StopIteration as error:
            raise RuntimeError("StopIteration in a fetch, which would look like the end of the epoch") from error

    def _batch(self, fetch: Fetch) -> Any:
        if self._has_rows:
            with suppress(TypeError, IndexError):  # to be answered in the dataset's own words, below
                batch = rows(self._dataset, fetch.items)
                return batch if fetch.part.size else [tensor[:0] for tensor in batch]
        if get_worker_info() is not None:  # where the generators serve nothing else
            return self._seeded(fetch)
        before = self._generators.state()  # here they are the step's as well
        try:
            return self._seeded(fetch)
        finally:
            self._generators.restore(before)

    def _seeded(self, fetch: Fetch) -> Any:
        part = fetch.part
        first = part.start if part.size else part.batch_start
        samples = []
        for position, item in enumerate(fetch.items, first):
            self._generators.seed(sample_key(fetch.key, position))
            try:
                samples.append(self._dataset[item])
            except Exception as error:
                _note(error, f"at sample {item}, position {position} of the epoch")
                raise
        if self._collate is not default_collate:  # torch's draws nothing
            self._generators.seed(sample_key(fetch.key ^ _COLLATE, first))
        batch = self._collate(samples)
        return batch if part.size else nothing_of(batch, samples[0])


def _note(error: Exception, text: str) -> None:
    if hasattr(error, "add_note"):  # from Python 3.11 on; its traceback then ends with the text
        error.add_note(text)


class SeededStream(IterableDataset[Any]):
    """One epoch of an iterable dataset from a position on, as the passes of one rank.

    Every rank and every worker reads the whole stream and keeps its own part: nothing is repeated, nothing lost, and
    the order is that of the dataset. A dataset that can start in the middle offers ``iter_from(position)``; another
    one is read up to there. It must not split itself over ranks; what it asks ``get_worker_info`` about is hidden.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        world: World,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int | None,
        drop_last: bool,
        epoch: int,
        position: int,
    ) -> None:
        self._dataset = dataset
        self._collate = collate
        self._world = world
        self._key = epoch_key(seed, "sample", epoch)
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._drop_last = drop_last
        self._position = position
        self._generators = HostGenerators()

    def __iter__(self) -> Iterator[tuple[Pass, Any]]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # A dataset that splits itself over workers would leave us with a part of a part.
        torch_worker._worker_info = None  # private, and the only place that holds it
        count = 0
        for batch_start, samples in self._batches():
            end = batch_start + len(samples)
            for part in passes(batch_start, end, self._micro_batch_size, self._world.rank, self._world.world_size):
                # The DataLoader takes turns over its workers, so taking turns here keeps the order.
                if count % num_workers == worker_id:
                    yield part, self._pass(part, samples)
                count += 1

    def _pass(self, part: Pass, samples: list[Any]) -> Any:
        offset = part.batch_start
        mine = samples[part.start - offset : part.stop - offset] or samples[:1]
        with self._generators.kept():
            self._generators.seed(sample_key(self._key ^ _COLLATE, part.start))
            batch = self._collate(mine)
        return batch if part.size else nothing_of(batch, mine[0])

    def _batches(self) -> Iterator[tuple[int, list[Any]]]:
        position = self._position
        stream: Iterator[Any] | None = None
        while True:
            samples: list[Any] = []
            with self._generators.kept():
                if stream is None:
                    stream = self._opened()
                while len(samples) < self._global_batch_size:
                    self._generators.seed(sample_key(self._key, position + len(samples)))
                    try:
                        samples.append(next(stream))
                    except StopIteration:
                        break
            if len(samples) == self._global_batch_size or (samples and not self._drop_last):
                yield position, samples
            if len(samples) < self._global_batch_size:
                return
            position += len(samples)

    def _opened(self) -> Iterator[Any]:
        if callable(getattr(self._dataset, "iter_from", None)):
            opened: Iterator[Any] = iter(self._dataset.iter_from(self._position))
            return opened
        self._generators.seed(derive(self._key, "open"))
        stream: Iterator[Any] = iter(self._dataset)
        for position in range(self._position):
            self._generators.seed(sample_key(self._key, position))
            if next(stream, _END) is _END:
                break
        return stream


_END = object()


class Fetcher:
    """The DataLoader and its workers; where it has none to start and nothing to pin, what it would do, without it.

    For a pass of one sample its own bookkeeping takes as long as fetching and collating it.

    Args:
        dataset: a `SeededDataset` or a `SeededStream`.
        fetches: what to ask a `SeededDataset` for, iterated anew for each epoch.
        options: workers, pinning, collating.
        seed: for the workers' own base seed; otherwise the DataLoader draws it from the rank's generator.
        while_waiting: called now and then while workers keep us waiting; an exception of it ends the wait.
    """

    def __init__(
        self,
        dataset: SeededDataset | SeededStream,
        fetches: Iterable[Fetch] | None,
        options: LoaderOptions,
        seed: int,
        while_waiting: Callable[[], None],
    ) -> None:
        self._has_workers = options.num_workers > 0
        self._while_waiting = while_waiting
        self._workers: list[BaseProcess] = []
        self._iterator: Any = None
        self._dataset = dataset
        self._fetches = fetches
        self._loader: DataLoader[Any] | None = None
        if self._has_workers or options.pin_memory:
            self._loader = self._dataloader(options, seed)

    def _dataloader(self, options: LoaderOptions, seed: int) -> DataLoader[Any]:
        workers: dict[str, Any] = {}
        if options.num_workers:
            # For workers' sockets: made here, or each makes a directory of its own, and leaves it when it is ended.
            multiprocessing.util.get_temp_dir()
            workers = {
                "prefetch_factor": options.prefetch_factor,
                "persistent_workers": options.persistent_workers and self._fetches is not None,
                "worker_init_fn": _WorkerStart(os.getpid(), options.worker_init_fn),
            }
        return DataLoader(
            self._dataset,
            batch_size=None,  # a pass comes as a whole
            sampler=self._fetches,
            num_workers=options.num_workers,
            pin_memory=options.pin_memory,
            collate_fn=_as_it_is,
            generator=torch.Generator().manual_seed(derive(seed, "workers")),
            **workers,
        )

    def __iter__(self) -> Iterator[tuple[Pass, Any]]:
        if self._loader is None:
            return self._here()
        if not self._has_workers:
            return iter(self._loader)
        # Not by the DataLoader's own option: persistent workers that are late for a new epoch would be an error.
        if self._iterator is not None:
            self._iterator._timeout = 0
        before = set(multiprocessing.active_children())
        with _signals_held():
            self._iterator = iter(self._loader)
        self._workers += [child for child in multiprocessing.active_children() if child not in before]
        self._iterator._timeout = _LOOK_S
        return self._patiently(self._iterator)

    def _here(self) -> Iterator[tuple[Pass, Any]]:
        if isinstance(self._dataset, SeededStream):
            return iter(self._dataset)
        assert self._fetches is not None  # a map-style dataset is told what to fetch
        return map(self._dataset.__getitem__, self._fetches)

    def _patiently(self, iterator: Iterator[tuple[Pass, Any]]) -> Iterator[tuple[Pass, Any]]:
        while True:
            try:
                yield next(iterator)
            except StopIteration:
                return
            except (ConnectionError, EOFError) as error:
                if " in DataLoader worker process " not in str(error):  # it lives, and tells of something of its own
                    self._blame_the_dead(error)
                raise
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
                self._while_waiting()

    def _blame_the_dead(self, error: Exception) -> None:
        """Say in torch's words if a worker has died while it handed a batch over: by then its end may not show yet."""
        ended = wait([worker.sentinel for worker in self._workers], _DYING_S)
        if pids := [str(worker.pid) for worker in self._workers if worker.sentinel in ended]:
            raise RuntimeError(f"DataLoader worker (pid(s) {', '.join(pids)}) exited unexpectedly") from error

    def close(self) -> None:
        """End the workers now. One that is deep in a fetch would hold up the end of the process."""
        if not self._workers or threading.current_thread() is not threading.main_thread():
            return  # torch's own, slower clean-up takes place when the loader is forgotten
        # torch's handler takes the death of any of its workers for an accident.
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            for worker in self._workers:
                worker.kill()
            for worker in self._workers:
                worker.join()
        finally:
            signal.signal(signal.SIGCHLD, handler)
        self._workers.clear()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started inside are born with the signals blocked that are none of their business.

    In the meantime a forked one would run this rank's handlers, and a spawned one would die of them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
    try:
        if multiprocessing.get_start_method() != "fork":
            # Where it starts its process later, for the first worker, it unblocks two of them for those that follow.
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _WorkerStart:
    """The first thing a loader worker does; a class since it is pickled where workers are spawned."""

    def __init__(self, rank_pid: int, then: Callable[[int], None] | None) -> None:
        self._rank_pid = rank_pid
        self._then = then

    def __call__(self, worker_id: int) -> None:
        # torch's workers look for a dead parent every 5 s only. A fork server is the parent of those that it starts,
        # and ends with the rank.
        is_served = multiprocessing.get_start_method() == "forkserver"
        die_with_parent(os.getppid() if is_served else self._rank_pid)
        for number in _NOT_FOR_WORKERS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOT_FOR_WORKERS)  # what this one starts finds them as usual
        if self._then is not None:
            self._then(worker_id)


def collate_of(options: LoaderOptions) -> Callable[[list[Any]], Any]:
    """The user's collate function, or torch's."""
    return options.collate_fn or default_collate


def nothing_of(batch: Any, sample: Any) -> Any:
    """A batch of length zero with the structure of ``batch``, which was collated from ``sample`` alone.

    Tensors and arrays are cut along dimension 0. A list of one whose element is the sample, or a part of it as it was
    (texts, boxes, ...), is cut too. Anything else stays.
    """
    parts = {id(part) for part in _parts(sample)}

    def lists_samples(node: Any) -> bool:
        return type(node) in (list, tuple) and len(node) == 1 and id(node[0]) in parts

    def cut(leaf: Any) -> Any:
        is_stacked = isinstance(leaf, (torch.Tensor, np.ndarray)) and leaf.ndim > 0
        return leaf[:0] if is_stacked or lists_samples(leaf) else leaf

    return tree_map(cut, batch, is_leaf=lists_samples)


def _parts(sample: Any) -> Iterator[Any]:
    yield sample
    inner = sample.values() if isinstance(sample, Mapping) else sample if isinstance(sample, (list, tuple)) else ()
    for part in inner:
        yield from _parts(part)


def _as_it_is(fetched: Any) -> Any:
    return fetched
