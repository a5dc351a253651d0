"""From the user's module to one that trains on all ranks, and back."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import xxhash
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from ddpkit.batchnorm import convert_sync_batchnorm
from ddpkit.errors import UserError
from ddpkit.unused import Replicated
from ddpkit.world import World
from ddpkit.zero import Zero


def wrap(module: nn.Module, world: World, device: torch.device, *, sync_batchnorm: bool, **ddp: Any) -> nn.Module:
    """Move to the device, synchronise BatchNorm, wrap in DDP. Collective.

    A single process gets the module itself, on its device: nothing there needs wrapping.

    Args:
        module: with the same parameters on all ranks (DDP sends rank zero's to the others).
        world: who this rank is.
        device: of this rank.
        sync_batchnorm: have BatchNorm layers see the batch of all ranks.
        ddp: passed on to `torch.nn.parallel.DistributedDataParallel`.
    """
    if sync_batchnorm and world.world_size > 1:
        # Before DDP, which looks at the module's buffers and parameters once.
        module = convert_sync_batchnorm(module)
    module = module.to(device)
    if world.world_size == 1:
        return module
    check_has_shapes(module)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        share_buffers(module, world, with_parameters=True)  # DDP takes no such module; this is what it would do
        return module
    wrapped = Replicated(module, device_ids=[device.index] if device.type == "cuda" else None, **ddp)
    settle_buckets(wrapped)
    return wrapped


def unwrap(module: nn.Module) -> nn.Module:
    """The user's module inside; a module that was not wrapped is returned as it is."""
    return module.module if isinstance(module, (DistributedDataParallel, Zero)) else module


def digest(module: nn.Module) -> str:
    """What its parameters and buffers are, bit by bit, in a few characters."""
    found = xxhash.xxh3_128()
    for tensor in chain(module.parameters(), module.buffers()):
        if not is_lazy(tensor):
            # As bytes: not every type of torch's has a counterpart in numpy.
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has spread the model, or a part of it; see `ddpkit.sharding`."""
    return any(is_unit(part) for part in model.modules())


def is_unit(part: nn.Module) -> bool:
    """Whether a module's parameters are gathered and forgotten by FSDP2 together."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # takes long to import, and where it was not, nothing is spread
    return fsdp is not None and isinstance(part, fsdp.FSDPModule)


def reshard(model: nn.Module) -> None:
    """Forget whatever is still gathered from a forward pass that had no backward pass."""
    if is_sharded(model):
        for part in model.modules():
            if callable(forget := getattr(part, "reshard", None)):
                forget()


@contextmanager
def unsynced(model: nn.Module) -> Iterator[None]:
    """The context for passes after which gradients stay on their rank, to be summed up to those of the last one."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, Zero):
        with model.unsynced():
            yield
    elif is_sharded(model):
        model.set_requires_gradient_sync(False)  # type: ignore[operator]  # FSDPModule's
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)  # type: ignore[operator]
    else:
        yield


def release(wrapped: nn.Module) -> None:
    """Take DDP or DeepSpeed off the process group, before the group is closed. DDP's module remains of use.

    DDP's reducer would otherwise hold the last reference to the group, and frees it under the GIL; the destructor
    joins gloo's threads, and a thread that is just letting go of its last all-reduce waits for the GIL: for ever.
    """
    if isinstance(wrapped, DistributedDataParallel):
        del wrapped.logger, wrapped.reducer  # the logger holds the reducer
    elif isinstance(wrapped, Zero):
        wrapped.release()


def settle_buckets(model: DistributedDataParallel) -> None:
    """Have DDP rebuild its gradient buckets now, not after the first real step. Collective.

    DDP lays its buckets out anew after the first backward pass. From three ranks on, the sum of an element depends (by
    an ulp) on where it lies in the reduced buffer, so a resumed run would take its first step in another layout than
    the run that was never interrupted, and their bits would part. One backward pass of a stub, before any counted
    step, on a fresh start and a resume alike, makes the layout the same from the first step on.

    The order in which gradients become ready here is the order of the buckets from then on. Autograd runs the
    operation recorded last first, so the last parameters' gradients come first, as in a real backward pass, where
    their reduction overlaps with the rest.
    """
    parameters = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    module = model.module
    model.module = _Stub(module)
    model.require_forward_param_sync = False  # there are no buffers to even out; DDP sets it again in this forward
    try:
        model().backward()
    finally:
        model.module = module
    for parameter in parameters:
        parameter.grad = None


class _Stub(nn.Module):
    """Uses every parameter of a module once, with a gradient of zero."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        tables = (part for part in module.modules() if isinstance(part, (nn.Embedding, nn.EmbeddingBag)))
        self._sparse = {id(table.weight) for table in tables if table.sparse}
        # A list: not registered, so nothing sees them twice.
        self._parameters_in_use = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def forward(self) -> torch.Tensor:
        # Double precision: the parameters' types may differ, and sums of one type must not overflow.
        return torch.stack([self._nothing_of(parameter) for parameter in self._parameters_in_use]).sum()

    def _nothing_of(self, parameter: torch.Tensor) -> torch.Tensor:
        if id(parameter) in self._sparse:  # DDP insists on the kind of gradient that the layer will give
            row = torch.zeros(1, dtype=torch.long, device=parameter.device)
            parameter = nn.functional.embedding(row, parameter, sparse=True)
        if parameter.is_complex():
            parameter = torch.view_as_real(parameter)
        return (parameter.sum() * 0).double()


def check_has_shapes(module: nn.Module) -> None:
    """Raise UserError for a model whose parameters have to see a batch first."""
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise UserError(
            f"the model's parameters {', '.join(lazy[:5])} have no shapes yet (Lazy modules), which they need to be "
            "wrapped: run one batch through the model before, in model.factory, say"
        )


def share_buffers(module: nn.Module, world: World, *, with_parameters: bool = False) -> None:
    """Give every rank rank zero's buffers, and its parameters if asked for. Collective.

    Without SyncBatchNorm each rank's running statistics drift apart within a step, and DDP only evens them out at the
    next training pass; rank zero's are the ones that count and that are saved.
    """
    if world.world_size == 1:
        return
    share(chain(module.parameters(), module.buffers()) if with_parameters else module.buffers())


def share(tensors: Iterable[torch.Tensor], device: torch.device | None = None) -> None:
    """Give every rank rank zero's values of these tensors, by way of ``device`` if they are elsewhere. Collective."""
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        packed = tensor.detach().to(device or tensor.device).contiguous()  # what a broadcast needs
        torch.distributed.broadcast(packed, 0)
        if packed.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(packed)


def tied_names(module: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def retie(module: nn.Module, ties: list[list[str]], preferred: Container[str] = ()) -> None:
    """Make each group of names one parameter again: the one that has a ``preferred`` name now, or the first name."""
    for names in ties:
        kept = module.get_parameter(next((name for name in names if name in preferred), names[0]))
        for name in names:
            owner, _, attribute = name.rpartition(".")
            module.get_submodule(owner).register_parameter(attribute, kept)
