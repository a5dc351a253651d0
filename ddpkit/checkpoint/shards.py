"""Tensors of which each rank has a part (DTensors): what of them is saved, and how any part is found again.

Nothing here talks to another rank. Which part a rank has follows from the tensor's layout, so a checkpoint says the
layout once, each rank writes its own part, and any number of ranks, one included, finds what it needs in the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpkit.checkpoint.writer import STORED_DTYPES, Entry, read_entries, read_rows
from ddpkit.errors import BrokenCheckpoint, StateError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Region = tuple[tuple[int, int], ...]
"""From where to where, along each dimension of a tensor."""


@dataclass(frozen=True)
class Layout:
    """How a tensor lies over the ranks.

    Attributes:
        shape: of the whole tensor.
        mesh: the ranks in order, as an array of this shape.
        splits: for each dimension of the mesh, the dimension of the tensor that is split along it; None: all along it
            have the same.
    """

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    splits: tuple[int | None, ...]

    def region(self, rank: int) -> Region:
        """The part that a rank has: as torch chunks, the first ones larger, the last ones maybe empty."""
        region = [(0, size) for size in self.shape]
        for split, count, place in zip(self.splits, self.mesh, self._coordinate(rank), strict=True):
            if split is not None:
                start, stop = region[split]
                size = -(-(stop - start) // count)
                region[split] = (min(start + place * size, stop), min(start + (place + 1) * size, stop))
        return tuple(region)

    def is_written_by(self, rank: int) -> bool:
        """Whether this rank's part is the one that is saved: of those that have the same, the first one's."""
        coordinate = self._coordinate(rank)
        return all(split is not None or place == 0 for split, place in zip(self.splits, coordinate, strict=True))

    @property
    def world_size(self) -> int:
        """How many ranks it lies over."""
        return math.prod(self.mesh)

    def _coordinate(self, rank: int) -> tuple[int, ...]:
        coordinate = []
        for count in reversed(self.mesh):
            rank, place = divmod(rank, count)
            coordinate.append(place)
        return tuple(reversed(coordinate))


def is_spread(value: object) -> TypeGuard[DTensor]:
    """Whether a value is a tensor of which each rank has a part."""
    if not isinstance(value, Tensor) or type(value) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # half a second, where torch has not needed it yet

    return isinstance(value, DTensor)


def holds_spread(tree: Any) -> bool:
    """Whether there is such a tensor anywhere in a tree of mappings and sequences."""
    if isinstance(tree, Mapping):
        return any(holds_spread(child) for child in tree.values())
    if isinstance(tree, (list, tuple)):
        return any(holds_spread(child) for child in tree)
    return is_spread(tree)


def layout_of(tensor: DTensor) -> Layout:
    """How a DTensor lies over the ranks. Raises StateError for a layout that is not understood."""
    from torch.distributed.tensor import Replicate, Shard

    mesh = tensor.device_mesh.mesh
    splits: list[int | None] = []
    for placement in tensor.placements:
        if type(placement) not in (Shard, Replicate):  # a subclass cuts in another way
            raise StateError(f"it lies over the ranks as {placement}, which cannot be saved; Shard and Replicate can")
        splits.append(placement.dim if isinstance(placement, Shard) else None)
    if mesh.flatten().tolist() != list(range(mesh.numel())):
        raise StateError(f"it lies over the ranks {mesh.tolist()}; what can be saved lies over all, in order")
    return Layout(tuple(tensor.shape), tuple(mesh.shape), tuple(splits))


# ---------------------------------------------------------------------- what is saved


def own_part(tensor: DTensor) -> Tensor:
    """This rank's part, as `write_tensors` can write it: a type that files do not know as bytes, along a new axis."""
    local = tensor.to_local().detach()
    return local if local.dtype in STORED_DTYPES else local.contiguous().unsqueeze(-1).view(torch.uint8)


def shard_file(rank: int) -> str:
    """The name of the file with a rank's parts."""
    return f"sharded-{rank:05d}.safetensors"


@dataclass
class ShardFiles:
    """The files with the parts, in one checkpoint."""

    directory: Path
    _entries: dict[int, dict[str, Entry]] = field(default_factory=dict)

    def read(self, rank: int, name: str, shape: tuple[int, ...], rows: tuple[int, int]) -> Tensor:
        """Some rows of a rank's part of a tensor, which has to be of this shape. Raises BrokenCheckpoint."""
        path = self.directory / shard_file(rank)
        if rank not in self._entries:
            self._entries[rank] = read_entries(path)
        entry = self._entries[rank].get(name)
        if entry is None or entry.shape != shape:
            found = "none" if entry is None else f"one of shape {entry.shape}"
            raise BrokenCheckpoint(f"{path}: expected a tensor {name!r} of shape {shape}, found {found}")
        return read_rows(path, entry, *rows)


@dataclass(frozen=True)
class Sharded:
    """A tensor in a checkpoint, of which each rank has saved a part."""

    name: str
    layout: Layout
    dtype: torch.dtype
    files: ShardFiles

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        return torch.Size(self.layout.shape)

    def whole(self) -> Tensor:
        """All of it, on the CPU."""
        return self.read(tuple((0, size) for size in self.layout.shape))

    def read(self, region: Region) -> Tensor:
        """A part of it, out of the parts that lie across it, on the CPU. Raises BrokenCheckpoint."""
        result = torch.empty([stop - start for start, stop in region], dtype=self.dtype)
        for rank in range(self.layout.world_size):
            if not self.layout.is_written_by(rank):
                continue
            saved = self.layout.region(rank)
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(region, saved, strict=True)]
            if all(start < stop for start, stop in common):
                there = self._part(rank, saved, common)
                result[_slices(common, region)] = there
        return result

    def _part(self, rank: int, saved: Region, common: list[tuple[int, int]]) -> Tensor:
        shape = tuple(stop - start for start, stop in saved)
        is_raw = self.dtype not in STORED_DTYPES
        rows, *others = _slices(common, saved)
        found = self.files.read(
            rank, self.name, (*shape, self.dtype.itemsize) if is_raw else shape, (rows.start, rows.stop)
        )
        found = found.view(self.dtype).squeeze(-1) if is_raw else found
        return found[(slice(None), *others)]


def _slices(inner: list[tuple[int, int]], outer: Region) -> tuple[slice, ...]:
    """Where a region lies within another one."""
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(inner, outer, strict=True))


# ---------------------------------------------------------------------- what is taken up


def fitted(saved: Any, own: Any) -> Any:
    """The saved tree with its tensors spread as those in ``own``, a tree of the same structure, are.

    A tensor that is whole in the checkpoint is cut, one that was spread is joined or cut in another way, as ``own``
    asks; of what is not needed here nothing is read. Mappings are changed in place.
    """
    if is_spread(own) and isinstance(saved, (Tensor, Sharded)):
        return _spread_as(saved, own)
    if isinstance(saved, Sharded):
        return saved.whole()
    if isinstance(saved, dict):
        named = own if isinstance(own, Mapping) else {}
        for key, child in saved.items():
            saved[key] = fitted(child, named.get(key))
    elif isinstance(saved, (list, tuple)):
        others = own if isinstance(own, (list, tuple)) and len(own) == len(saved) else [None] * len(saved)
        children = [fitted(child, other) for child, other in zip(saved, others, strict=True)]
        return children if isinstance(saved, list) else tuple(children)
    return saved


def fitted_optimizer(saved: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's saved state, spread as its parameters are: it has none of its own yet to go by."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of = dict(zip(numbers, parameters, strict=True))
    state = {
        number: {key: _for_parameter(value, of.get(number)) for key, value in values.items()}
        for number, values in saved["state"].items()
    }
    return {**saved, "state": state}


def _for_parameter(value: Any, parameter: Tensor | None) -> Any:
    if not is_spread(parameter) or not isinstance(value, (Tensor, Sharded)):
        return fitted(value, None)
    if value.shape == parameter.shape:
        return _spread_as(value, parameter)
    if isinstance(value, Sharded) and len(value.layout.splits) == parameter.device_mesh.ndim:
        return _spread_over(value, parameter.device_mesh)  # of another shape than its parameter, and spread as well
    return fitted(value, None)


def _spread_as(saved: Tensor | Sharded, own: DTensor) -> DTensor:
    from torch.distributed.tensor import DTensor

    region = layout_of(own).region(own.device_mesh.get_rank())
    local = saved.read(region) if isinstance(saved, Sharded) else saved[_slices(list(region), _whole(saved))].clone()
    return DTensor.from_local(
        local.to(own.to_local().device),
        own.device_mesh,
        own.placements,
        run_check=False,
        shape=own.shape,
        stride=own.stride(),
    )


def _spread_over(saved: Sharded, mesh: Any) -> DTensor:
    """Split along the same dimensions as when it was saved, over the ranks that there are now."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    layout = Layout(saved.layout.shape, tuple(mesh.mesh.shape), saved.layout.splits)
    local = saved.read(layout.region(mesh.get_rank())).to(mesh.device_type)
    placements = [Replicate() if split is None else Shard(split) for split in layout.splits]
    stride = torch.empty(layout.shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=saved.shape, stride=stride)


def _whole(tensor: Tensor) -> Region:
    return tuple((0, size) for size in tensor.shape)
