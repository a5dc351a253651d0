"""Parts of tensors in files: any part is found again, whatever the parts were cut like. No process group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpkit.checkpoint.shards import Layout, Sharded, ShardFiles, fitted, shard_file
from ddpkit.checkpoint.writer import STORED_DTYPES, write_tensors
from ddpkit.errors import BrokenCheckpoint
from ddpkit.state import layouts, tensor_names, unpack


def cut(tensor: Tensor, region: tuple[tuple[int, int], ...]) -> Tensor:
    return tensor[tuple(slice(start, stop) for start, stop in region)]


def saved(tensor: Tensor, layout: Layout, directory: Path) -> Sharded:
    """What every rank would write, and the tensor as it is found again."""
    directory.mkdir()
    for rank in range(layout.world_size):
        part = cut(tensor, layout.region(rank)).contiguous()
        raw = part if part.dtype in STORED_DTYPES else part.unsqueeze(-1).view(torch.uint8)
        if part.numel() and layout.is_written_by(rank):
            write_tensors(directory / shard_file(rank), {"x": raw})
    return Sharded("x", layout, tensor.dtype, ShardFiles(directory))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("size", [1, 4, 5, 7])
def test_regions_are_those_of_chunk(size: int, count: int) -> None:
    regions = [Layout((size, 2), (count,), (0,)).region(rank) for rank in range(count)]
    chunks = [chunk.tolist() for chunk in torch.arange(size).chunk(count)]
    assert [list(range(*rows)) for rows, _ in regions] == chunks + [[]] * (count - len(chunks))
    assert {columns for _, columns in regions} == {(0, 2)}


LAYOUTS = [
    ((7, 3), (3,), (0,)),
    ((7, 3), (5,), (1,)),
    ((2,), (4,), (0,)),
    ((6, 5), (2, 2), (None, 0)),  # whole groups of ranks that have the same
    ((6, 5), (2, 3), (0, 1)),
    ((7, 5), (2, 2), (0, 0)),
    ((0, 3), (2,), (0,)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize(("shape", "mesh", "splits"), LAYOUTS)
def test_any_part_is_found_again(
    shape: tuple[int, ...], mesh: tuple[int, ...], splits: tuple[int | None, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    tensor = torch.randn(shape, dtype=dtype)
    found = saved(tensor, Layout(shape, mesh, splits), tmp_path / "x")
    assert torch.equal(found.whole(), tensor)
    assert (found.whole().dtype, found.shape) == (dtype, tensor.shape)
    for count in (1, 2, 3, 4):
        for dim in range(len(shape)):
            other = Layout(shape, (count,), (dim,))
            for rank in range(count):
                region = other.region(rank)
                assert torch.equal(found.read(region), cut(tensor, region))


def test_a_skeleton_says_how_tensors_lie(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    shards = saved(tensor, Layout((6,), (2,), (0,)), tmp_path / "x").files
    packed = {"!": "sharded", "name": "x", "dtype": "float32", "shape": [6], "mesh": [2], "splits": [0]}
    skeleton = {"a": packed, "b": [packed, {"!": "tensor", "name": "y"}]}
    assert list(tensor_names(skeleton)) == ["y"]
    assert layouts(skeleton) == {"x": (Layout((6,), (2,), (0,)), torch.float32)}
    tree = unpack(skeleton, {"y": torch.ones(1)}, shards)
    assert torch.equal(fitted(tree, None)["b"][0], tensor)
    with pytest.raises(BrokenCheckpoint, match="spread over ranks, where none may be"):
        unpack(skeleton, {"y": torch.ones(1)})
    for wrong in ({"splits": [1]}, {"mesh": [2, 2]}, {"dtype": "nothing"}, {"shape": 3}):
        with pytest.raises(BrokenCheckpoint):
            unpack(packed | wrong, {}, shards)


def test_a_part_that_is_not_as_it_should_be(tmp_path: Path) -> None:
    found = saved(torch.ones(6, 2), Layout((6, 2), (2,), (0,)), tmp_path / "x")
    grown = Sharded("x", Layout((8, 2), (2,), (0,)), torch.float32, found.files)
    with pytest.raises(BrokenCheckpoint, match=r"sharded-00000.*'x' of shape \(4, 2\), found one of shape \(3, 2\)"):
        grown.whole()
    with pytest.raises(BrokenCheckpoint, match=r"expected a tensor 'z' of shape \(3, 2\), found none"):
        Sharded("z", found.layout, found.dtype, found.files).whole()
    (tmp_path / "x" / shard_file(1)).unlink()
    with pytest.raises(BrokenCheckpoint, match=r"sharded-00001"):
        saved_again = Sharded("x", found.layout, found.dtype, ShardFiles(tmp_path / "x"))
        saved_again.whole()
