"""The runtime: a process group and what hangs on it, from entering the context to leaving it."""

from __future__ import annotations

import logging
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import PrefixStore, Store  # where torch.distributed has them from, with types
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import Sampler

from ddpkit import accelerated, launched, rendezvous, requeue, rollcall
from ddpkit import evaluate as evaluation
from ddpkit import model as models
from ddpkit.agree import AGREEMENTS, RankFailed, Ranks, is_consequence
from ddpkit.allocation import ENDS, AllocationWatch
from ddpkit.batchnorm import convert_sync_batchnorm
from ddpkit.checkpoint import listing as checkpoints
from ddpkit.errors import NoProgress, StopRequested, UserError, is_orderly
from ddpkit.fetching import LoaderOptions
from ddpkit.gathering import GatheringWatch
from ddpkit.heartbeat import Heartbeat
from ddpkit.loader import Loader
from ddpkit.nonfinite import Watch
from ddpkit.permutation import derive
from ddpkit.precision import Precision
from ddpkit.progress import ProgressBar
from ddpkit.record import Recorder
from ddpkit.run import Run
from ddpkit.seeding import seed_generators
from ddpkit.selection import Best, EarlyStopping
from ddpkit.sharding import Sharding, shard
from ddpkit.stall import StallWatch
from ddpkit.step import StepFunction, TrainStep
from ddpkit.stop import Requests, StopVote
from ddpkit.trackers import Trackers
from ddpkit.world import Allocation, World
from ddpkit.zero import Zero, ZeroOptimizer
from ddpkit.zero_config import ZeroConfig

log = logging.getLogger("ddpkit")

_TOLD_S = 0.3  # they look every 20 ms
_CLOSING_S = 60.0  # ranks leave together, but one that does not come must not hold the others for long


class Runtime:
    """This rank's view of the run: who it is, its device, its process group. A context manager.

    Entering is collective (the group forms), and so is leaving without an exception. A single process has no group.
    Use `runtime` to make one.

    Attributes:
        world: who this rank is.
        device: this rank's.
        ranks: agreements outside of tensors.
        stop: the vote on stopping.
        heartbeat: what this rank is doing, for those who ask.
    """

    def __init__(
        self,
        world: World,
        *,
        seed: int,
        backend: str,
        timeout_s: float,
        stall_timeout_s: float = 600.0,
        warning_signal: str = "USR2",
        max_idle_requeues: int = 3,
        run_dir: Path | None = None,
    ) -> None:
        self.world = world
        self.seed = seed
        self.heartbeat = Heartbeat()
        self._has_begun = False
        self._note_requeue: Callable[[int, str], None] = self._note_before_the_run
        self._stall_timeout_s = stall_timeout_s
        self._warning_signal = warning_signal
        self._max_idle_requeues = max_idle_requeues
        self._run_dir = run_dir
        self.device = choose_device(world, backend)
        self._backend = ("nccl" if self.device.type == "cuda" else "gloo") if backend == "auto" else backend
        self._timeout_s = timeout_s
        self._stack = ExitStack()
        self._loaders: list[Loader] = []
        self._wrapped = weakref.WeakSet[nn.Module]()  # not kept alive: what DDP holds must end with the group
        self._threads = 0
        self._has_own_stream = False
        self._entry = 0
        self._launched = launched.surrounding()
        self.ranks: Ranks
        self.stop: StopVote

    def __enter__(self) -> Runtime:
        seed_generators(derive(self.seed, "start"))  # the same on all ranks, for the model's initialisation
        try:
            # First: a stop that comes before the group has formed is to be one of all ranks, too.
            requests = self._stack.enter_context(Requests(self._stop_signals()))
            with GatheringWatch(
                self.world, requests, self._who_is_missing, self._stall_timeout_s, self._come_back_before_the_group
            ):
                self._form_group()
            self.stop = self._stack.enter_context(StopVote(self.world, requests, self._connect, self.heartbeat))
            watch = StallWatch(self.world, self._connect, self.heartbeat, self._stall_timeout_s, self.stop)
            self._stack.enter_context(watch)
            if self.world.allocation is not None and self.is_main:
                self._stack.enter_context(
                    AllocationWatch(
                        self.world.allocation, self.heartbeat, self.stop.request, self._come_back_as_saved_last
                    )
                )
        except BaseException:
            self._stack.close()
            raise
        self._launched.begun()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None or is_orderly(error):
                self._leave_together()
            else:
                self._tell_failure(error)
        finally:
            self._stack.__exit__(kind, error, trace)

    @property
    def rank(self) -> int:
        """This rank's number among all."""
        return self.world.rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.world.world_size

    @property
    def local_rank(self) -> int:
        """This rank's number on its node."""
        return self.world.local_rank

    @property
    def is_main(self) -> bool:
        """Whether this is rank zero."""
        return self.world.is_main

    def wrap(
        self, module: nn.Module, *, parallel: str = "ddp", sync_batchnorm: bool = True, **options: Any
    ) -> nn.Module:
        """Move to the device, synchronise BatchNorm, wrap in DDP; from here the ranks' generators differ. Collective.

        Args:
            module: with the same parameters on all ranks; a model built after `runtime` began has them.
            parallel: "ddp"; "fsdp2" for models that are too large for one rank, which spreads the module in place, so
                make the optimizer afterwards; or "accelerate", which has Hugging Face's accelerate prepare it, or
                DeepSpeed, whose model needs `wrap_optimizer` as well.
            sync_batchnorm: have BatchNorm layers see the batch of all ranks.
            options: for "ddp" what `torch.nn.parallel.DistributedDataParallel` takes; for "fsdp2" what
                `ddpkit.sharding.Sharding` has (``layers=["Block"], param_dtype="bf16", ...``); for "accelerate" maybe
                ``config="file.yaml"``, made by `accelerate config`.
        """
        self.stop_before_the_run()
        if parallel not in _WAYS:
            raise UserError(f"wrap: parallel={parallel!r}; choose one of {', '.join(_WAYS)}")
        wrapped = _WAYS[parallel](self, module, sync_batchnorm, **options)
        self._stack.callback(models.release, wrapped)
        self._wrapped.add(wrapped)
        if not self._has_own_stream:  # once: a second model must not have the same numbers drawn again
            seed_generators(derive(self.seed, "rank", self.rank))
            self._has_own_stream = True
        return wrapped

    def _replicate(self, module: nn.Module, sync_batchnorm: bool, **options: Any) -> nn.Module:
        return models.wrap(module, self.world, self.device, sync_batchnorm=sync_batchnorm, **options)

    def _shard(self, module: nn.Module, sync_batchnorm: bool, **options: Any) -> nn.Module:
        unknown = options.keys() - {field.name for field in fields(Sharding)}
        if unknown:
            known = ", ".join(field.name for field in fields(Sharding))
            raise UserError(f"wrap: parallel='fsdp2' has no option {min(unknown)!r}; it has {known}")
        sharding = Sharding(**options)
        if not dist.is_initialized():
            self._start_group()  # one process alone is spread over itself: it computes, offloads, ... as several would
        if sync_batchnorm and self.world_size > 1:
            module = convert_sync_batchnorm(module)
        return shard(module, self.device, sharding)

    def _accelerate(self, module: nn.Module, sync_batchnorm: bool, config: str | Path | None = None) -> nn.Module:
        zero = accelerated.read(config).zero
        if zero is not None:
            return self._zero(module, sync_batchnorm, zero)
        if self.world_size == 1:
            return self._replicate(module, sync_batchnorm)
        if sync_batchnorm:
            module = convert_sync_batchnorm(module)
        prepared = accelerated.prepare(module, self.device, self.world_size)
        self._stack.callback(accelerated.release)
        if isinstance(prepared, DistributedDataParallel):
            models.settle_buckets(prepared)
        return prepared

    def _zero(self, module: nn.Module, sync_batchnorm: bool, config: ZeroConfig) -> nn.Module:
        models.check_has_shapes(module)
        if not dist.is_initialized():
            self._start_group()  # one process alone is spread over itself, as with FSDP2
        if sync_batchnorm and self.world_size > 1:
            module = convert_sync_batchnorm(module)
        module = module.to(self.device)
        models.share_buffers(module, self.world, with_parameters=True)
        return Zero(module, config, self.device)

    def wrap_optimizer(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        """What steps a model as `wrap` gave it: DeepSpeed's optimizer for DeepSpeed's model, or just the one given.

        Collective for DeepSpeed, which takes the optimizer over: go on with what this returns. A scheduler belongs to
        that, too.
        """
        return ZeroOptimizer(optimizer, model) if isinstance(model, Zero) else optimizer

    def train_step(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        function: StepFunction,
        *,
        precision: str = "fp32",
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        log_grad_norm: bool = False,
        looks_for_nonfinite: bool = True,
    ) -> TrainStep:
        """Make what takes optimizer steps: precision, accumulation, scaling, clipping and checks in the right order.

        Call ``step.accumulate(batch, loader.current)`` for each batch, after the last one of a step
        ``values = step.update()``, and then ``run.step(**values)``, or ``run.skip(step.fault)`` where there is one.

        Args:
            model: as `wrap` gave it.
            optimizer: over its parameters.
            function: ``(model, batch) -> loss | {"loss": mean, "weight": n (optional), other scalars}``.
            precision: "fp32", "bf16" or "fp16", whose ``step.scaler`` belongs to the state of a run; or "bf16-true" or
                "fp16-true", for a module converted by ``Precision.named(...).convert(module)`` before it was wrapped.
            clip_grad_norm: the largest norm of the gradient.
            clip_grad_value: the largest absolute value in it.
            log_grad_norm: give the norm among the values also where it is not clipped.
            looks_for_nonfinite: do not take a step whose loss or gradient is not finite on some rank.
        """
        watch = Watch(self.ranks, model, self.device) if looks_for_nonfinite else None
        if self.is_main:
            Precision.named(precision).warn_if_slow(self.device)
        return TrainStep(
            model,
            optimizer,
            function,
            self.world,
            self.device,
            precision,
            clip_grad_norm,
            clip_grad_value,
            log_grad_norm,
            watch,
        )

    def loader(
        self,
        dataset: Any,
        *,
        global_batch_size: int,
        micro_batch_size: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        sampler: str | Sampler[Any] | Callable[[Any], Sampler[Any]] = "elastic",
        num_workers: int = 0,
        pin_memory: bool | None = None,
        prefetch_factor: int = 2,
        persistent_workers: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        worker_init_fn: Callable[[int], None] | None = None,
    ) -> Loader:
        """Make this rank's loader: resumable at any sample, the same order at any number of ranks.

        Args:
            dataset: map-style (``__len__`` and ``__getitem__``) or a `torch.utils.data.IterableDataset`.
            global_batch_size: samples per optimizer step over all ranks.
            micro_batch_size: samples per rank and pass; None takes the rank's whole share at once. With it the loader
                gives out several batches for each optimizer step: ``if loader.current.is_last:`` is where to step.
            shuffle: False keeps the dataset's order.
            drop_last: leave out the incomplete last global batch; False trains it as it is.
            sampler: "elastic", "distributed" (torch's, with the seed of the runtime), or a function of the dataset that
                gives a torch ``Sampler`` of the order of all samples.
            num_workers: processes that fetch; 0 fetches in this one.
            pin_memory: None pins if the device is a GPU.
            prefetch_factor: passes that each worker fetches ahead.
            persistent_workers: keep the workers from epoch to epoch.
            collate_fn: list of samples to batch; torch's `default_collate` by default.
            worker_init_fn: called in each worker with its number.

        Raises:
            UserError: fewer samples in a global batch than ranks, an empty dataset, a sampler that does not fit.
        """
        loader = Loader(
            dataset,
            self.world,
            self.ranks,
            self.device,
            seed=derive(self.seed, "loader", len(self._loaders)),
            run_seed=self.seed,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            sampler=sampler,
            options=LoaderOptions(
                num_workers=num_workers,
                pin_memory=self.device.type == "cuda" if pin_memory is None else pin_memory,
                prefetch_factor=prefetch_factor,
                persistent_workers=persistent_workers,
                collate_fn=collate_fn,
                worker_init_fn=worker_init_fn,
            ),
        )
        self._loaders.append(loader)
        self._stack.callback(loader.close)
        return loader

    def resume(
        self,
        run_dir: str | Path,
        *,
        every_steps: int | None = 1000,
        every_minutes: float | None = None,
        keep: int = 3,
        best: Best | None = None,
        early_stopping: EarlyStopping | None = None,
        trackers: Sequence[Any] = (),
        progress_bar: bool = False,
        callbacks: Sequence[Any] = (),
        asynchronous: bool = True,
        log_every: int = 10,
        **objects: Any,
    ) -> Run:
        """Open a run directory, restore its newest intact checkpoint if there is one. Collective.

        Args:
            run_dir: where the run keeps everything it writes; made if missing.
            every_steps: optimizer steps between saves; None saves at the end and on stops only.
            every_minutes: minutes between saves; looked at whenever a line is recorded.
            keep: checkpoints kept.
            best: keep the best checkpoint, by what ``run.record("eval", values)`` is given, too.
            early_stopping: end ``run.epochs`` when evaluations are not better any more; ``run.ended_early`` tells.
            trackers: services that metrics are sent to: names ("tensorboard"), `ddpkit.Tracker` with options, or
                objects of your own.
            progress_bar: show one on rank zero.
            callbacks: what is called at the moments of the run; see `ddpkit.Callback`.
            asynchronous: have training go on while a save is written, from a copy in host memory; False has it wait.
            log_every: optimizer steps between lines in metrics.jsonl.
            objects: what belongs to the run's state, by name: modules (wrapped or not), optimizers, loaders,
                schedulers, and anything else with state_dict and load_state_dict.

        Raises:
            UserError: another process is using the directory, or the checkpoint is of other objects.
            BrokenCheckpoint: there are checkpoints, and none is intact.
        """
        given = [*callbacks, *([Trackers(trackers)] if trackers else []), *([ProgressBar()] if progress_bar else [])]
        run = Run(
            self,
            Path(run_dir).expanduser(),
            objects,
            every_steps=every_steps,
            every_minutes=every_minutes,
            keep=keep,
            best=best,
            early_stopping=early_stopping,
            callbacks=given,
            asynchronous=asynchronous,
            log_every=log_every,
        )
        return self._stack.enter_context(run)

    def evaluate(
        self,
        model: nn.Module,
        data: Any,
        eval_step: evaluation.EvalStep,
        *,
        batch_size: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        **loader: Any,
    ) -> dict[str, float]:
        """Evaluate exactly: every sample counts once, on any number of ranks. Collective.

        Args:
            model: wrapped or not.
            data: a dataset, or a loader (`Runtime.loader`'s or torch's) over it: its dataset is evaluated as a whole,
                whatever it shuffles, pads or drops.
            eval_step: ``(model, batch) -> {name: tensor of shape (batch,)}``.
            batch_size: samples per rank and pass; by default the loader's, or 64.
            metrics: torchmetrics-style objects by name, instead of means; see `ddpkit.evaluate.evaluate`.
            loader: ``num_workers`` and so on, as for `Runtime.loader`.

        Raises:
            UserError: the step returned something else, the data are empty, or the loader takes some samples only.
        """
        dataset, batch_size, options = evaluation.source_of(data, batch_size, loader)
        return evaluation.evaluate(
            self,
            model,
            dataset,
            eval_step,
            batch_size=batch_size,
            metrics=metrics,
            options=options,
        )

    def mean(self, values: Any, weights: Any = None) -> Any:
        """The mean over all ranks, weighted, the same on every rank. Collective.

        Args:
            values: a number, a tensor, or a mapping of names to them; of this rank.
            weights: this rank's weight, a number; by default all ranks count the same. A rank of weight 0 counts
                nothing, whatever its value (NaN, say).

        Returns:
            In the shape of ``values``: floats for numbers, float64 tensors for tensors.
        """
        return evaluation.mean(self, values, weights)

    @contextmanager
    def main_first(self, scope: str = "global") -> Iterator[None]:
        """Rank zero (or with ``scope="node"`` the first rank of each node) runs the block first. Collective."""
        self.stop_before_the_run()
        leads = self.rank == self.ranks.leader(scope)
        with self.ranks.main_first(scope):
            if not leads:
                self.stop_before_the_run()
            yield
        if leads:
            self.stop_before_the_run()

    def barrier(self, name: str, timeout_s: float | None = None) -> None:
        """Wait for all ranks; a barrier that times out names those that did not come. Collective."""
        self.ranks.barrier(name, timeout_s if timeout_s is not None else self._timeout_s)

    def stop_before_the_run(self) -> None:
        """Leave here, if the ranks have agreed to, as long as no run is open. Collective, as every unit of work.

        Raises:
            StopRequested: there is nothing to save that is not there already.
        """
        if not self._has_begun and (reason := self.stop.poll()) is not None:
            self.leave(reason)

    def ranks_beside(self, heartbeat: Heartbeat, leaving: threading.Event) -> Ranks:
        """Partners in agreements for a thread beside the main one; all ranks make theirs in the same order.

        Args:
            heartbeat: of that thread.
            leaving: once it is set, waits are given up.
        """
        self._threads += 1
        thread = f"thread {self._threads}"
        return Ranks(self.world, PrefixStore(AGREEMENTS, self._connect()), heartbeat, thread, leaving)

    def begin(self, run_dir: Path, note_requeue: Callable[[int, str], None]) -> None:
        """A run is being opened: from here it is the run that stops, at its own places.

        Args:
            run_dir: of the run.
            note_requeue: writes down that the job comes back; see `requeue.ask`.
        """
        self._has_begun, self._run_dir, self._note_requeue = True, run_dir, note_requeue

    def feeds_from_outside(self, known: Sequence[Loader]) -> bool:
        """Whether a loop over a loader of this runtime is under way, and over none of those that are ``known``."""
        is_outside = False
        for loader in self._loaders:
            if loader.is_open:
                if loader in known:
                    return False
                is_outside = True
        return is_outside

    def check_same_parameters(self, modules: Mapping[str, nn.Module]) -> None:
        """Raise UserError, on all ranks, if a module that nobody has wrapped differs between them. Collective."""
        if self.world_size == 1:
            return
        own = {
            name: models.digest(module)
            for name, module in modules.items()
            if not (module in self._wrapped or models.is_sharded(module))
        }

        def differing(told: list[dict[str, str]]) -> dict[str, list[int]]:
            return {
                name: [rank for rank, each in enumerate(told) if each.get(name) != digest]
                for name, digest in told[0].items()
            }

        for name, odd in self.ranks.conclude("parameters of modules that are not wrapped", own, differing).items():
            if odd:
                raise UserError(
                    f"resume: {name} is not wrapped, and its parameters on ranks {odd} are not those of rank 0. Give "
                    "it to rt.wrap, or make it before the first rt.wrap: from there the ranks draw different numbers"
                )

    def leave(self, reason: str) -> NoReturn:
        """Leave, as all ranks have agreed; what there was to save is saved. Collective.

        Where Slurm itself has started the ranks, nobody but them is there to see to the job's return.

        Args:
            reason: what the vote said.

        Raises:
            StopRequested: always, but
            NoProgress: the job has come back too often, and got nowhere.
        """
        if (allocation := self._own_allocation) is not None:
            signal_name = None if reason.startswith(ENDS) else reason
            self.ranks.on_main("requeue", lambda: self._come_back(allocation, signal_name))
        raise StopRequested(reason)

    @property
    def _own_allocation(self) -> Allocation | None:
        """The Slurm job whose return is for these ranks to see to."""
        return None if self.world.has_launcher else self.world.allocation

    def _come_back_before_the_group(self, signal_name: str) -> None:
        if self.is_main and (allocation := self._own_allocation) is not None:
            self._come_back(allocation, signal_name)
        self._launched.stopped()

    def _come_back(self, allocation: Allocation, signal_name: str | None) -> None:
        directory = checkpoints.checkpoints_directory(self._run_dir) if self._run_dir is not None else None
        saved = checkpoints.complete(directory) if directory is not None else []
        requeue.ask(
            allocation,
            signal_name=signal_name,
            warning_signal=self._warning_signal,
            run_dir=self._run_dir,
            step=saved[0][0] if saved else 0,
            max_idle=self._max_idle_requeues,
            note=self._note_requeue,
        )

    def _come_back_as_saved_last(self) -> None:
        """The job is about to end, and its ranks are not: one of them is stuck, maybe. From the allocation's thread."""
        where = rollcall.report(self._connect(), self.rank, self.world_size) if self.world_size > 1 else ""
        log.warning("the allocation ends, and the ranks have not stopped in time.\n%s", where)
        if (allocation := self._own_allocation) is not None:
            try:
                self._come_back(allocation, None)
            except NoProgress as error:
                log.warning("%s", error)

    def _note_before_the_run(self, step: int, why: str) -> None:
        if self._run_dir is not None and self._run_dir.is_dir():
            recorder = Recorder(self._run_dir, is_main=True, attempt=None)
            recorder.event(requeue.EVENT, step=step, reason=why)
            recorder.close()

    def _stop_signals(self) -> list[signal.Signals]:
        # Outside of Slurm the warning signal is the user's own.
        warning = [signal.Signals[f"SIG{self._warning_signal}"]] if self.world.allocation is not None else []
        return [signal.SIGTERM, signal.SIGINT, *warning]

    def _connect(self) -> Store:
        return PrefixStore(f"runtime/{self._entry}", rendezvous.connect(self.world, self._timeout_s))

    def _who_is_missing(self, timeout_s: float) -> list[int]:
        """The ranks that have not entered as often as this one."""
        store = rendezvous.connect(self.world, timeout_s)
        counts = {rank: f"entered/{rank}" for rank in range(self.world_size)}
        return [
            rank for rank, key in counts.items() if not store.check([key]) or int(store.get(key)) < max(self._entry, 1)
        ]

    def _form_group(self) -> None:
        self._stack.enter_context(rendezvous.hosting(self.world))
        store = rendezvous.connect(self.world, self._timeout_s)
        # A script may enter one runtime after another; what the one before left in the store must not be read.
        self._entry = store.add(f"entered/{self.rank}", 1)
        self.store = PrefixStore(f"runtime/{self._entry}", store)
        self.ranks = Ranks(self.world, PrefixStore(AGREEMENTS, self.store), self.heartbeat)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size == 1:
            return
        _check_even(self.world, self.store)
        if dist.is_initialized():
            raise UserError(
                "a process group exists already: enter ddpkit.runtime() instead of calling init_process_group"
            )
        self._start_group()

    def _start_group(self) -> None:
        dist.init_process_group(
            self._backend,
            store=PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=self._timeout_s),
            device_id=self.device if self._backend == "nccl" else None,
        )
        self._stack.callback(dist.destroy_process_group)

    def _leave_together(self) -> None:
        # A rank that closed its connections early would cut off ranks that are still in their last collective.
        try:
            self.ranks.barrier("leave", _CLOSING_S)
        except Exception as error:  # noqa: BLE001 - the work is done; what can fail here is others leaving
            log.debug("leaving alone: %s", error)

    def _who_is_late(self, error: BaseException) -> BaseException:
        try:
            return rollcall.explain_timeout(self.store, self.rank, self.world_size, self.heartbeat, self._timeout_s)
        except Exception as asking:  # noqa: BLE001 - the store may be what failed; the error itself matters
            log.debug("no roll-call: %s", asking)
            return error

    def _tell_failure(self, error: BaseException) -> None:
        if self.world_size > 1 and is_consequence(error) and rollcall.is_timeout(error):
            late = self._who_is_late(error)
            if late is not error:
                self._tell_failure(late)
                raise late from error
        try:
            rank, cause = self.ranks.tell_failure(f"{type(error).__name__}: {error}")
        except Exception as telling:  # noqa: BLE001 - the error itself matters, and the store may be what failed
            log.debug("could not tell the others: %s", telling)
            return
        if self.is_main and self.world_size > 1 and not self.world.agent_store:
            time.sleep(_TOLD_S)  # for the others to read it: the store ends with this process
        if rank != self.rank and is_consequence(error) and not isinstance(error, RankFailed):
            raise RankFailed(f"rank {rank} failed: {cause}") from error


_WAYS: dict[str, Callable[..., nn.Module]] = {
    "ddp": Runtime._replicate,
    "fsdp2": Runtime._shard,
    "accelerate": Runtime._accelerate,
}


def runtime(
    seed: int = 0,
    *,
    backend: str = "auto",
    timeout_s: float = 1800.0,
    stall_timeout_s: float = 600.0,
    warning_signal: str = "USR2",
    max_idle_requeues: int = 3,
    world: World | None = None,
) -> Runtime:
    """The entry for a script of one's own: ``with ddpkit.runtime(seed=0) as rt``.

    Args:
        seed: of everything random.
        backend: "auto" takes nccl on GPUs and gloo on CPU; "gloo" stays on the CPU.
        timeout_s: of collectives, in seconds. What a launcher of ddpkit's was told (``-o launch.timeout_s``) counts
            instead.
        stall_timeout_s: seconds without any progress, while ranks wait for each other, after which each is asked where
            it is, and the run ends; two minutes at most once a stop has been asked for. ``-o launch.stall_timeout_s``
            counts instead.
        warning_signal: under Slurm, the signal that comes before the time limit ("USR1", "USR2" or "HUP"); it asks for
            a stop, as SIGTERM does.
        max_idle_requeues: under Slurm, how often in a row a job comes back without having got any further.
        world: who this rank is; by default read from the environment of whatever launcher started it, if any.

    Raises:
        UserError: the environment is half-set or contradicts itself, or there are more ranks than GPUs.
    """
    if warning_signal not in ("USR1", "USR2", "HUP"):
        raise UserError(f"runtime: warning_signal={warning_signal!r}; choose USR1, USR2 or HUP")
    told = launched.surrounding()
    return Runtime(
        world or World.from_env(),
        seed=seed,
        backend=backend,
        timeout_s=timeout_s if told.timeout_s is None else told.timeout_s,
        stall_timeout_s=stall_timeout_s if told.stall_timeout_s is None else told.stall_timeout_s,
        warning_signal=warning_signal,
        max_idle_requeues=max_idle_requeues,
    )


def _check_even(world: World, store: Store) -> None:
    # Each rank knows its own node's number alone: 2 + 1 + 1 ranks look like 2 + 2 to the first two.
    others = store.compare_set("ranks per node", "", str(world.local_world_size)).decode()
    if others != str(world.local_world_size):
        raise UserError(
            f"{world.local_world_size} rank(s) on {world.host}, and {others} on another node: every node needs the "
            f"same number of ranks. This is {world.source}"
        )


def choose_device(world: World, backend: str) -> torch.device:
    """This rank's GPU if there are GPUs and the backend can use them, else the CPU."""
    if backend == "gloo" or not torch.cuda.is_available():
        if backend == "nccl":
            raise UserError("launch.backend: nccl needs GPUs, and torch sees none here; use auto or gloo")
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if world.local_world_size > count:
        raise UserError(
            f"launch.nproc_per_node: {world.local_world_size} ranks on {world.host}, which has {count} GPU(s): "
            f"one rank needs one GPU. Start {count}, or use launch.backend=gloo to train on the CPU."
        )
    return torch.device("cuda", world.local_rank)
