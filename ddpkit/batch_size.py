"""The largest micro batch that fits into memory: tried out before the run begins, on copies, by all ranks together."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.data import IterableDataset

from ddpkit.agree import Ranks
from ddpkit.checkpoint import listing, manifest
from ddpkit.errors import BrokenCheckpoint, UserError
from ddpkit.fetching import LoaderOptions, collate_of
from ddpkit.generators import HostGenerators
from ddpkit.sampler import Pass
from ddpkit.state import rng_state, set_rng_state
from ddpkit.step import StepFunction, TrainStep
from ddpkit.world import World

log = logging.getLogger("ddpkit")


def largest_that_fits(ranks: Ranks, device: torch.device, attempt: Callable[[int], object], at_most: int) -> int:
    """The largest size with which ``attempt(size)`` does not run out of memory on any rank. Collective.

    Sizes are doubled until one does not fit, then halved in between; a single sample, which batch normalisation does
    not take, is tried last. The generators are as before afterwards; all else that ``attempt`` changes is its own
    affair, and it must not wait for other ranks: one of them may have failed.

    Args:
        ranks: partners in the agreement.
        device: of this rank.
        attempt: raises what torch raises when memory runs out.
        at_most: where to stop.

    Raises:
        UserError: not even one sample fits.
    """
    fits, fails = 0, at_most + 1
    size = min(2, at_most)
    with _generators_kept(device):
        while fits + 1 < fails:
            own = _fits(attempt, size, device)
            if all(ranks.exchange("size of a micro batch", own)):
                fits = size
                size = (fits + fails) // 2 if fails <= at_most else min(2 * size, at_most)
            else:
                fails = size
                size = (fits + fails) // 2
    if not fits:
        raise UserError(
            "data.micro_batch_size: auto: memory runs out with a single sample; the model is too large for this device "
            "(model.activation_checkpointing and a half precision make it smaller)"
        )
    return fits


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a device or in this process."""
    from accelerate.utils.memory import should_reduce_batch_size  # takes a while to import, and only this needs it

    return isinstance(error, MemoryError) or bool(should_reduce_batch_size(error))


@dataclass
class Trial:
    """Two optimizer steps with a micro batch, on copies of everything; called with its size.

    Two, since the optimizer has its state from the first one on. What DDP will hold besides is held, too.

    Attributes:
        module: as it will be wrapped.
        make_optimizer: of a module, as the run's.
        function: the user's step; it must not communicate.
        dataset: whose first samples are used, over and over if they are too few.
        options: how samples are collated.
        device: of this rank.
        precision: as for `TrainStep`.
        extra_bytes: held besides: a set of gradients in DDP's buffers, an average of the weights.
    """

    module: nn.Module
    make_optimizer: Callable[[nn.Module], Optimizer]
    function: StepFunction
    dataset: Any
    options: LoaderOptions
    device: torch.device
    precision: str = "fp32"
    extra_bytes: int = 0
    _samples: Sequence[Any] = field(default_factory=list)

    def __call__(self, size: int) -> None:
        """Take the steps."""
        batch = self._batch(size)
        held = torch.empty(self.extra_bytes, dtype=torch.uint8, device=self.device)
        module = copy.deepcopy(self.module).to(self.device)
        step = TrainStep(module, self.make_optimizer(module), self.function, World(), self.device, self.precision)
        for _ in range(2):
            step.accumulate(batch, Pass(0, size, 0, size, is_last=True), keep_values=False)
            step.update()
        del held

    def _batch(self, size: int) -> Any:
        with HostGenerators().kept():
            if len(self._samples) < size:
                self._samples = _first(self.dataset, size)
            samples = [self._samples[index % len(self._samples)] for index in range(size)]
            batch = collate_of(self.options)(samples)
        return tree_map(lambda leaf: leaf.to(self.device) if hasattr(leaf, "to") else leaf, batch)


def remembered(run_dir: Path, world_size: int) -> int | None:
    """The micro batch size with which a run goes on bit by bit: that of its newest checkpoint, at as many ranks."""
    for _, path in listing.complete(listing.checkpoints_directory(run_dir)):
        try:
            shared = manifest.read(path).shared
        except BrokenCheckpoint:
            continue
        loader = shared["main"]["loader"]
        size: int | None = loader.get("micro_batch_size")
        return size if loader["world_size"] == world_size else None
    return None


def _fits(attempt: Callable[[int], object], size: int, device: torch.device) -> bool:
    try:
        attempt(size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    finally:
        gc.collect()  # modules and graphs are in cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return False


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    before = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(before, device)


def _first(dataset: Any, count: int) -> Sequence[Any]:
    if isinstance(dataset, IterableDataset):
        return list(islice(iter(dataset), count))
    return [dataset[index] for index in range(min(count, len(dataset)))]
