"""Exact evaluation: each sample counts once, whatever the number of ranks and the batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from ddpkit.errors import UserError
from ddpkit.fetching import Fetcher, LoaderOptions, SeededDataset, SeededStream, collate_of
from ddpkit.loader import Loader
from ddpkit.model import is_sharded, reshard, share_buffers, unwrap
from ddpkit.permutation import derive
from ddpkit.sampler import ElasticOrder, Pass, Plan
from ddpkit.seeding import seed_generators
from ddpkit.state import rng_state, set_rng_state
from ddpkit.zero import Zero

if TYPE_CHECKING:
    from ddpkit.session import Runtime

_BATCH_SIZE = 64  # of an evaluation, by rank, where nobody gives one

EvalStep = Callable[[nn.Module, Any], Any]
"""(model, batch) -> {name: tensor of shape (batch,)}, one value a sample; or what metric objects are updated with."""


class EvaluationStopped(Exception):
    """All ranks have agreed to stop, in the middle of an evaluation."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def evaluate(
    rt: Runtime,
    model: nn.Module,
    dataset: Any,
    eval_step: EvalStep,
    *,
    batch_size: int,
    options: LoaderOptions,
    metrics: Mapping[str, Any] | None = None,
    stoppable: bool = False,
) -> dict[str, float]:
    """Evaluate on all ranks. Collective.

    The model is in eval mode meanwhile, without gradients, and back in its modes afterwards, also after an exception;
    the ranks' random streams go on as if nothing had been evaluated.

    Args:
        rt: the runtime.
        model: wrapped or not; the step gets the user's module itself.
        dataset: map-style, or iterable (then every rank reads the same stream).
        eval_step: ``(model, batch) -> {name: tensor of shape (batch,)}``, one value a sample. With ``metrics`` it
            returns the arguments of their ``update``.
        batch_size: samples per rank and pass.
        options: how samples are fetched.
        metrics: torchmetrics-style objects by name (``reset``, ``update``, ``compute``; ``compute`` synchronises).
        stoppable: poll for an agreed stop before each pass.

    Returns:
        Means over all samples, or what the metrics computed; the same on all ranks.

    Raises:
        UserError: the step returned something else, or the dataset is empty.
        EvaluationStopped: the ranks agreed to stop (``stoppable`` only).
    """
    module = model if isinstance(model, Zero) else unwrap(model)
    share_buffers(module, rt.world)
    # In each pass, from all ranks: each has to make as many.
    gathers = module.spreads_parameters if isinstance(module, Zero) else is_sharded(module)
    tally = _MetricObjects(metrics, rt) if metrics is not None else _Means()

    def stop(ask: Callable[[], str | None]) -> None:
        if stoppable and (reason := ask()) is not None:
            raise EvaluationStopped(reason)

    with rt.heartbeat.during("evaluating"), _undisturbed(module, rt):
        count, length = 0, 0
        with _fetching(rt, dataset, batch_size, options, lambda: stop(rt.stop.look)) as stream:
            for part, batch in stream:
                rt.heartbeat.beat()
                stop(rt.stop.poll)
                count, length = count + part.size, part.batch_stop
                if part.size:
                    tally.add(eval_step(module, _to(batch, rt.device)), part.size)
                elif gathers:
                    _take_part(eval_step, module, _to(batch, rt.device), rt.rank)
        reshard(module)
        stop(rt.stop.poll)  # nobody may leave a wait for the stream's end while others are in what follows
        return tally.result(rt, _counts(rt, count, length))


def _take_part(eval_step: EvalStep, module: nn.Module, batch: Any, rank: int) -> None:
    """A pass in which this rank has no sample: with a batch of length zero, for the sake of the others. Collective."""
    try:
        eval_step(module, batch)
    except Exception as error:
        raise UserError(
            f"train.eval_step: rank {rank} has no sample in the last pass, and the step cannot take a batch of length "
            f"zero ({type(error).__name__}: {error}), which it has to: all ranks compute together on a model that is "
            "spread over them. Choose another data.eval_batch_size, or a step that takes it."
        ) from error


def _counts(rt: Runtime, count: int, length: int) -> list[int]:
    """How many samples each rank has evaluated; all must have divided the same data. Collective."""
    told = rt.ranks.exchange("evaluated", [count, length])
    lengths = [length for _, length in told]
    if min(lengths) != max(lengths):
        raise UserError(
            f"data.eval: the dataset gave the ranks different numbers of samples ({lengths}, by rank), so no sample "
            "can be counted once. Every rank has to see the same data; ddpkit does the splitting."
        )
    if max(lengths) == 0:
        raise UserError("data.eval: the dataset is empty")
    return [count for count, _ in told]


def mean(rt: Runtime, values: Any, weights: Any = None) -> Any:
    """The weighted mean over ranks of a number, a tensor or a mapping of them. Collective. See `Runtime.mean`."""
    weight = 1.0 if weights is None else float(weights)
    leaves, structure = tree_flatten(_by_name(values))
    tensors = [torch.as_tensor(leaf, dtype=torch.float64, device=rt.device).detach() for leaf in leaves]
    shapes = [list(tensor.shape) for tensor in tensors]
    told = rt.ranks.exchange("mean", [weight, str(structure), shapes])
    if odd := [rank for rank, (_, *found) in enumerate(told) if found != told[0][1:]]:
        raise UserError(f"mean: ranks {odd} gave other names or shapes than rank 0: {[told[0][1:], told[odd[0]][1:]]}")
    total = sum(weight for weight, *_ in told)
    if not total > 0:
        raise ValueError(f"the weights of all ranks together are {total}; a mean needs more than 0")
    # A rank of weight 0 counts nothing, whatever its values are: NaN times 0 would be NaN.
    flat = torch.cat(
        [tensor.reshape(-1) * weight if weight else tensor.new_zeros(tensor.numel()) for tensor in tensors]
    )
    if rt.world_size > 1:
        torch.distributed.all_reduce(flat)
    means = [
        part.view(shape) for part, shape in zip((flat / total).split([t.numel() for t in tensors]), shapes, strict=True)
    ]
    return tree_unflatten(
        [found if isinstance(leaf, torch.Tensor) else found.item() for leaf, found in zip(leaves, means, strict=True)],
        structure,
    )


def _by_name(values: Any) -> Any:
    """Mappings in the order of their names: ranks may have filled them in different orders."""
    if isinstance(values, Mapping):
        return {name: _by_name(values[name]) for name in sorted(values)}
    return values


def source_of(data: Any, batch_size: int | None, options: Mapping[str, Any]) -> tuple[Any, int, LoaderOptions]:
    """What `evaluate` needs of a dataset, a loader of ddpkit's or a `DataLoader`: dataset, batch size, options.

    A loader gives its dataset and how it fetches; which samples are evaluated, and how they are divided, is always
    the same: all of them, each once. A ``DistributedSampler``'s padding does not come in.

    Raises:
        UserError: a loader that chooses among the samples, which an exact evaluation would not do.
    """
    if isinstance(data, Loader):
        if not data.takes_all:
            raise UserError("evaluate: the loader has a sampler of its own; give the dataset that is to be evaluated")
        return data.dataset, batch_size or data.batch_size, replace(data.options, **options)
    if isinstance(data, DataLoader):
        if not _takes_all(data):
            raise UserError(
                f"evaluate: the DataLoader chooses samples by {type(data.sampler).__name__} and "
                f"{type(data.batch_sampler).__name__}, but every sample is to count once; give the dataset "
                "(a torch.utils.data.Subset, say)"
            )
        found = {
            "num_workers": data.num_workers,
            "collate_fn": data.collate_fn,
            "worker_init_fn": data.worker_init_fn,
            "pin_memory": data.pin_memory,
        }
        return data.dataset, batch_size or data.batch_size or 1, LoaderOptions(**{**found, **options})
    return data, batch_size or _BATCH_SIZE, LoaderOptions(**options)


def _takes_all(loader: DataLoader[Any]) -> bool:
    if isinstance(loader.dataset, IterableDataset):
        return loader.batch_size is not None
    sampler = loader.sampler
    if isinstance(sampler, RandomSampler):
        takes_all = not sampler.replacement and len(sampler) == len(sampler.data_source)
    else:
        takes_all = isinstance(sampler, (SequentialSampler, DistributedSampler))
    return takes_all and type(loader.batch_sampler) is BatchSampler


@contextmanager
def _undisturbed(module: nn.Module, rt: Runtime) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards every module's mode and every generator as before."""
    modes = [(part, part.training) for part in module.modules()]
    streams = rng_state(rt.device)
    seed_generators(derive(rt.seed, "evaluate", rt.rank))
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training
        set_rng_state(streams, rt.device)


@contextmanager
def _fetching(
    rt: Runtime, dataset: Any, batch_size: int, options: LoaderOptions, while_waiting: Callable[[], None]
) -> Iterator[Iterator[tuple[Pass, Any]]]:
    collate, seed = collate_of(options), derive(rt.seed, "evaluate")
    # A "global batch" is one batch for each rank; the shares of the last one differ by at most one.
    global_batch_size = batch_size * rt.world_size
    if isinstance(dataset, IterableDataset):
        stream = SeededStream(dataset, collate, rt.world, seed, global_batch_size, None, False, 0, 0)
        fetcher = Fetcher(stream, None, options, seed, while_waiting)
    else:
        order = ElasticOrder(len(dataset), seed, shuffle=False)
        plan = Plan(order, rt.world, seed, global_batch_size, None, drop_last=False)
        fetcher = Fetcher(SeededDataset(dataset, collate), plan.fetches(0, 0), options, seed, while_waiting)
    try:
        yield iter(fetcher)
    finally:
        fetcher.close()


def _to(batch: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, batch)


class _Means:
    """Sums of per-sample values, in double precision."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, values: Any, size: int) -> None:
        """Count one pass of ``size`` samples."""
        if not isinstance(values, Mapping):
            raise UserError(
                f"train.eval_step returned {type(values).__name__}; it is to return a mapping of names to tensors of "
                "one value for each sample"
            )
        if self._sums and values.keys() != self._sums.keys():
            raise UserError(f"train.eval_step returned {sorted(values)}, and before that {sorted(self._sums)}")
        for name, value in values.items():
            if not isinstance(value, torch.Tensor) or value.shape != (size,):
                found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise UserError(
                    f"train.eval_step: {name!r} is to be a tensor of shape ({size},), one value for each sample of the "
                    f"batch; found {found}. Do not take the mean: ddpkit does, over all samples of all ranks."
                )
            # Left on the device: adding waits for nothing.
            self._sums[name] = self._sums.get(name, 0) + value.double().sum()

    def result(self, rt: Runtime, counts: list[int]) -> dict[str, float]:
        """The means over all ranks."""
        # JSON keeps doubles exactly, and a rank without samples need not know the names.
        gathered = rt.ranks.exchange("evaluation", {name: total.item() for name, total in self._sums.items()})
        found = [sums for sums, count in zip(gathered, counts, strict=True) if count]
        if any(sums.keys() != found[0].keys() for sums in found):
            raise UserError(
                f"train.eval_step returned different names on the ranks: {[sorted(sums) for sums in found]}"
            )
        return {name: sum(sums[name] for sums in found) / sum(counts) for name in found[0]}


class _MetricObjects:
    """torchmetrics-style objects; their own ``compute`` gathers over the process group."""

    def __init__(self, metrics: Mapping[str, Any], rt: Runtime) -> None:
        self._metrics = metrics
        for metric in metrics.values():
            metric.reset()
            if hasattr(metric, "to"):
                metric.to(rt.device)

    def add(self, outputs: Any, size: int) -> None:
        """Update every metric with what the step returned."""
        del size
        arguments = outputs if isinstance(outputs, tuple) else (outputs,)
        for metric in self._metrics.values():
            if isinstance(outputs, Mapping):
                metric.update(**outputs)
            else:
                metric.update(*arguments)

    def result(self, rt: Runtime, counts: list[int]) -> dict[str, float]:
        """What the metrics computed."""
        with_samples = [rank for rank, count in enumerate(counts) if count]
        values: dict[str, float] = {}
        with _gathering_over(with_samples, rt, self._metrics) as left_out:
            for name, metric in self._metrics.items():
                if name not in left_out:
                    values |= _numbers(name, metric.compute())
        # One rank's answer for all: those without samples have none of their own.
        numbers: dict[str, float] = rt.ranks.exchange("metrics", values)[with_samples[0]]
        return numbers


@contextmanager
def _gathering_over(ranks: list[int], rt: Runtime, metrics: Mapping[str, Any]) -> Iterator[set[str]]:
    """Have torchmetrics' objects gather over these ranks; gives the names of those without this one. Collective.

    An object that was never updated does not know the types and dimensions of what it would gather, and takes part
    with a guess: the others then hang or fail. So the ranks without samples stay out.
    """
    if len(ranks) == rt.world_size:
        yield set()
        return
    takes_part = rt.rank in ranks
    holders = {name: _holders(metric) for name, metric in metrics.items()}
    group = torch.distributed.new_group(ranks)
    for holder in (holder for found in holders.values() for holder in found):
        holder.process_group = group
    try:
        yield set() if takes_part else {name for name, found in holders.items() if found}
    finally:
        for holder in (holder for found in holders.values() for holder in found):
            holder.process_group = None
        if takes_part:
            torch.distributed.destroy_process_group(group)


def _holders(metric: Any) -> list[Any]:
    """The metric and those inside it, as far as they let others choose the process group."""
    parts = metric.modules() if isinstance(metric, nn.Module) else [metric]
    return [part for part in parts if getattr(part, "process_group", False) is None]


def _numbers(name: str, computed: Any) -> dict[str, float]:
    """A metric's answer as numbers; those of a collection get its name in front."""
    if isinstance(computed, Mapping):
        return {key: value for part in computed for key, value in _numbers(f"{name}/{part}", computed[part]).items()}
    array = np.asarray(computed.cpu() if isinstance(computed, torch.Tensor) else computed)
    if array.size != 1:
        raise UserError(
            f"evaluate: the metric {name!r} computed values of shape {array.shape}; one number is needed, or a mapping "
            "of names to numbers (torchmetrics has ClasswiseWrapper for that)"
        )
    return {name: float(array.reshape(()))}
