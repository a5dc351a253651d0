"""Models spread over the ranks by torch's own FSDP2: each rank holds a part of every parameter.

A layer's parameters are gathered when it computes, and forgotten after; gradients come back as parts. Parameters are
DTensors from then on, and so is what an optimizer keeps for them: `ddpkit.checkpoint.shards` knows how they are saved.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpkit.errors import UserError, nearest
from ddpkit.model import check_has_shapes, retie, share, tied_names

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 spreads a model.

    Attributes:
        layers: class names, or patterns of module names, of what is gathered and forgotten as a unit (the blocks of a
            transformer, say); what is in none of them is a unit of its own.
        param_dtype: "fp32", "bf16" or "fp16": what layers compute in; None: what the parameters are in.
        reduce_dtype: what gradients are summed in; None: as they come.
        reshard_after_forward: forget a layer's parameters between its forward and its backward pass. False takes
            memory, and saves gathering them twice.
        cpu_offload: keep this rank's part, its gradients and its optimizer state in the host's memory.
    """

    layers: Sequence[str] = ()
    param_dtype: str | None = None
    reduce_dtype: str | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            raise UserError(f"fsdp2: layers={self.layers!r}; give a list of names")
        for name in ("param_dtype", "reduce_dtype"):
            if (given := getattr(self, name)) is not None and given not in _DTYPES:
                raise UserError(f"fsdp2: {name}={given!r}; choose {', '.join(_DTYPES)}")


def shard(module: nn.Module, device: torch.device, sharding: Sharding) -> nn.Module:
    """Spread a module over the ranks, in place; rank zero's values are those of all. Collective.

    Unit by unit, so that a device never holds more than one whole unit. A module that was built under
    ``torch.device("meta")`` has no values yet: those that nobody has loaded since are made here, by the
    ``reset_parameters`` of its modules, and no rank ever holds the whole model.

    Raises:
        UserError: a layer that the model does not have, or a parameter that cannot be spread.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    check_has_shapes(module)
    units = _units(module, sharding.layers)
    ties = tied_names(module)
    _check_can_be_spread(module, units, ties)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=_DTYPES.get(sharding.param_dtype or ""), reduce_dtype=_DTYPES.get(sharding.reduce_dtype or "")
    )
    offloads = sharding.cpu_offload and device.type != "cpu"
    if device.type == "cpu":
        _return_large_blocks()
    for unit in units:
        if unit.materialize(device):
            retie(module, [names for names in ties if unit.owns(module, names[0])])
        share(unit.tensors(), device)
        try:
            fully_shard(
                unit.module,
                mesh=mesh,
                reshard_after_forward=None if sharding.reshard_after_forward else False,  # None: but for the outermost
                mp_policy=policy,
                offload_policy=CPUOffloadPolicy() if offloads else OffloadPolicy(),
            )
        except ValueError as error:
            raise UserError(f"fsdp2: {unit.name or 'the model'}: {error}") from error
    return module


def _return_large_blocks() -> None:
    """Have the C library give large blocks back to the system when they are freed.

    glibc comes to keep them, and what is gathered and forgotten leaves holes that the next layer does not fit into: a
    model of 96 MiB on two ranks was seen to take 470 MiB on each of them in training, and with this, 124 MiB.
    """
    with contextlib.suppress(OSError, AttributeError):  # not every C library has it
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


# ---------------------------------------------------------------------- units


@dataclass(frozen=True)
class _Unit:
    """What is gathered and forgotten together.

    Attributes:
        name: of its outermost module.
        module: that module.
        parts: the modules in it that are in no unit further inside, by name.
    """

    name: str
    module: nn.Module
    parts: dict[str, nn.Module]

    def tensors(self) -> Iterator[Tensor]:
        """Its parameters and buffers."""
        for part in self.parts.values():
            yield from part.parameters(recurse=False)
            yield from part.buffers(recurse=False)

    def owns(self, model: nn.Module, parameter: str) -> bool:
        """Whether this parameter of the model is in it."""
        owner = model.get_submodule(parameter.rpartition(".")[0])
        return any(part is owner for part in self.parts.values())

    def materialize(self, device: torch.device) -> bool:
        """Give values to what is on the meta device; whether there was anything."""
        found = False
        for name, part in self.parts.items():
            own = dict(part.named_parameters(recurse=False)) | dict(part.named_buffers(recurse=False))
            if not any(tensor.is_meta for tensor in own.values()):
                continue
            found = True
            reset = getattr(part, "reset_parameters", None)
            if not callable(reset):
                raise UserError(
                    f"fsdp2: {name or 'the model'} ({type(part).__name__}) is on the meta device, and has no "
                    "reset_parameters() that would give its tensors their first values; add one, or build the model "
                    "with values"
                )
            part.to_empty(device=device, recurse=False)
            reset()
            with torch.no_grad():
                for key, tensor in own.items():
                    if not tensor.is_meta:  # loaded meanwhile
                        getattr(part, key).copy_(tensor)
        return found


def _units(module: nn.Module, layers: Sequence[str]) -> list[_Unit]:
    """The units that are chosen, and last the rest; those further inside come before those around them."""
    named = dict(module.named_modules())
    chosen = []
    for layer in layers:
        found = [name for name, part in named.items() if name and _is_called(layer, name, part)]
        if not found:
            classes = list(dict.fromkeys(type(part).__name__ for part in named.values()))
            raise UserError(
                f"fsdp2: layers: no part of the model is a {layer!r}, by class or by name"
                f"{nearest(layer, classes)} (its classes: {', '.join(classes)})"
            )
        chosen += found
    units, taken = [], set[int]()
    for name in [*sorted(dict.fromkeys(chosen), key=lambda name: -name.count(".")), ""]:
        prefix = f"{name}." if name else ""
        inside = named[name].named_modules()
        parts = {(prefix + below).rstrip("."): part for below, part in inside if id(part) not in taken}
        taken |= {id(part) for part in parts.values()}
        units.append(_Unit(name, named[name], parts))
    return units


def _is_called(layer: str, name: str, part: nn.Module) -> bool:
    return any(kind.__name__ == layer for kind in type(part).__mro__) or fnmatchcase(name, layer)


def _check_can_be_spread(module: nn.Module, units: Sequence[_Unit], ties: Sequence[Sequence[str]]) -> None:
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0:
            raise UserError(f"fsdp2: {name} is a single number, which cannot be spread; make it a tensor of shape (1,)")
    for names in ties:
        homes = [unit.name or "the rest" for unit in units for name in names if unit.owns(module, name)]
        if len(set(homes)) > 1:
            raise UserError(
                f"fsdp2: {' and '.join(names)} are one parameter, but belong to several units ({', '.join(homes)}); "
                "choose layers so that they are in one"
            )
