"""Exact evaluation: each sample counts once, whatever the number of ranks and the batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import IterableDataset

from ddpkit.errors import UserError
from ddpkit.fetching import Fetcher, LoaderOptions, SeededDataset, SeededStream, collate_of
from ddpkit.model import share_buffers, unwrap
from ddpkit.permutation import derive
from ddpkit.sampler import Fetch, Pass, passes
from ddpkit.seeding import epoch_key, seed_generators
from ddpkit.state import rng_state, set_rng_state

if TYPE_CHECKING:
    from ddpkit.session import Runtime

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
    module = unwrap(model)
    share_buffers(module, rt.world)
    tally = _MetricObjects(metrics, rt) if metrics is not None else _Means()
    with _undisturbed(module, rt), _fetching(rt, dataset, batch_size, options) as stream:
        for part, batch in stream:
            if stoppable and (reason := rt.stop.poll()) is not None:
                raise EvaluationStopped(reason)
            if part.size:
                tally.add(eval_step(module, _to(batch, rt.device)), part.size)
        return tally.result(rt)


def mean(rt: Runtime, values: Any, weights: Any = None) -> Any:
    """The weighted mean over ranks of a number, a tensor or a mapping of them. Collective. See `Runtime.mean`."""
    weight = 1.0 if weights is None else float(weights)
    total = sum(rt.ranks.exchange("mean weights", weight))
    if total <= 0:
        raise ValueError(f"the weights of all ranks together are {total}; a mean needs more than 0")
    return tree_map(lambda value: _mean(rt, value, weight, total), values)


def _mean(rt: Runtime, value: Any, weight: float, total: float) -> Any:
    tensor = torch.as_tensor(value, dtype=torch.float64).to(rt.device)
    scaled = tensor.detach() * weight if weight else torch.zeros_like(tensor)
    if rt.world_size > 1:
        torch.distributed.all_reduce(scaled)
    scaled = scaled / total
    return scaled if isinstance(value, torch.Tensor) else scaled.item()


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
    rt: Runtime, dataset: Any, batch_size: int, options: LoaderOptions
) -> Iterator[Iterator[tuple[Pass, Any]]]:
    collate, seed = collate_of(options), derive(rt.seed, "evaluate")
    if isinstance(dataset, IterableDataset):
        # A "global batch" of the stream is one batch for each rank; its shares even out the last one.
        stream = SeededStream(
            dataset, collate, rt.world, seed, batch_size * rt.world_size, None, False, 0, 0, "evaluate"
        )
        fetcher = Fetcher(stream, None, options, seed)
    else:
        if len(dataset) == 0:
            raise UserError("data.eval: the dataset is empty")
        fetcher = Fetcher(SeededDataset(dataset, collate), _fetches(rt, len(dataset), batch_size), options, seed)
    try:
        yield iter(fetcher)
    finally:
        fetcher.close()


def _fetches(rt: Runtime, length: int, batch_size: int) -> list[Fetch]:
    key = epoch_key(rt.seed, "evaluate", 0)
    # One "global batch" of everything: as many passes on every rank, whatever its share.
    parts = passes(0, length, batch_size, rt.rank, rt.world_size)
    return [Fetch(part, list(range(part.start, part.stop)) or [0], key) for part in parts]


def _to(batch: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, batch)


class _Means:
    """Sums of per-sample values, in double precision."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    def add(self, values: Any, size: int) -> None:
        """Count one pass of ``size`` samples."""
        if not isinstance(values, Mapping):
            raise UserError(
                f"train.eval_step returned {type(values).__name__}; it is to return a mapping of names to tensors of "
                "one value for each sample"
            )
        for name, value in values.items():
            if not isinstance(value, torch.Tensor) or value.shape != (size,):
                found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise UserError(
                    f"train.eval_step: {name!r} is to be a tensor of shape ({size},), one value for each sample of the "
                    f"batch; found {found}. Do not take the mean: ddpkit does, over all samples of all ranks."
                )
            # Left on the device: adding waits for nothing.
            self._sums[name] = self._sums.get(name, 0) + value.double().sum()
        self._count += size

    def result(self, rt: Runtime) -> dict[str, float]:
        """The means over all ranks."""
        # JSON keeps doubles exactly, and a rank without samples need not know the names.
        sums = {name: total.item() for name, total in self._sums.items()}
        gathered = rt.ranks.exchange("evaluation", [sums, self._count])
        count = sum(samples for _, samples in gathered)
        if count == 0:
            raise UserError("data.eval: the dataset is empty")
        names = dict.fromkeys(name for found, _ in gathered for name in found)
        return {name: sum(found.get(name, 0.0) for found, _ in gathered) / count for name in names}


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

    def result(self, rt: Runtime) -> dict[str, float]:
        """What the metrics computed."""
        del rt
        return {name: float(np.asarray(metric.compute().cpu())) for name, metric in self._metrics.items()}
