"""The bytes of a checkpoint: files written straight from memory, hashed on the way and made durable."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddpkit.checkpoint.manifest import FileProof, Json, canonical
from ddpkit.errors import BrokenCheckpoint, SaveFailed, StateError

# The names safetensors gives to dtypes, as far as every version we allow knows them.
# `ddpkit.state.pack` stores the others as bytes.
STORED_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_PIECE = 8 << 20  # bytes hashed and written at a time: still in the processor's cache when written


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileProof:
    """Write a new safetensors file and make it durable (fsync of the file, not of its directory).

    The content is streamed from the tensors' own memory; only a tensor that is not contiguous, or not on the
    CPU, is copied, one at a time. dtypes: the keys of `STORED_DTYPES`.
    Raises SaveFailed (caused by the OSError) with the bytes needed and free; StateError for another dtype.
    """
    # Wide elements first, as safetensors itself does: every tensor is then aligned to its element's size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header, size = _header(ordered)
    return _write(path, _chain(header, ordered), len(header) + size)


def write_bytes(path: Path, content: bytes) -> FileProof:
    """Write a new file and make it durable (fsync of the file). Raises SaveFailed."""
    return _write(path, [memoryview(content)], len(content))


def write_json(path: Path, value: Json) -> FileProof:
    """Write a value as canonical JSON; as `write_bytes`."""
    return write_bytes(path, canonical(value))


def read_tensors(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the CPU, in memory of their own; ``names`` None means all.

    Each tensor is copied out of the mapped file: the mapping ends with this call. A tensor that aliased the
    file would end the process with SIGBUS if the file were truncated, or removed on a network file system,
    while in use.
    Raises BrokenCheckpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {
                name: file.get_tensor(name).clone()
                for name in file.keys()  # noqa: SIM118  # not a dict
                if names is None or name in names
            }
    except (SafetensorError, OSError) as error:
        raise BrokenCheckpoint(f"{path}: expected a safetensors file, found: {error}") from error


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable: a power cut can otherwise undo a rename, or a new file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot: they order names themselves
            raise
    finally:
        os.close(descriptor)


def raise_save_failed(path: Path, needed: int, error: OSError) -> NoReturn:
    """Raise SaveFailed for an operation on ``path`` that ``needed`` bytes of space."""
    hint = ""
    if error.errno == errno.ENOENT:
        hint = " (do all hosts share this file system? has another run cleaned up here?)"
    reason = error.strerror or str(error)
    raise SaveFailed(f"{path}: {reason}{hint}; {needed} bytes needed, {free_bytes(path)} free") from error


def _header(ordered: Iterable[tuple[str, Tensor]]) -> tuple[bytes, int]:
    """The safetensors header, and the size of the data that follows it."""
    entries = {}
    offset = 0
    for name, tensor in ordered:
        if tensor.dtype not in STORED_DTYPES:
            raise StateError(
                f"{name}: safetensors cannot hold {tensor.dtype}; pass the state through ddpkit.state.pack"
            )
        end = offset + tensor.numel() * tensor.element_size()
        dtype = STORED_DTYPES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def _chain(header: bytes, ordered: Iterable[tuple[str, Tensor]]) -> Iterator[memoryview]:
    yield memoryview(header)
    for _, tensor in ordered:
        if tensor.numel():
            yield _memory(tensor).numpy().data


def _memory(tensor: Tensor) -> Tensor:
    """The tensor's content as a flat uint8 tensor on the CPU; its own memory where that is possible."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _write(path: Path, content: Iterable[memoryview], size: int) -> FileProof:
    hasher = xxhash.xxh3_128()
    try:
        with path.open("xb") as file:
            for memory in content:
                for start in range(0, len(memory), _PIECE):
                    piece = memory[start : start + _PIECE]
                    hasher.update(piece)
                    file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise_save_failed(path, size, error)
    return FileProof(path.name, size, hasher.hexdigest())


def free_bytes(path: Path) -> str:
    """Bytes free on the file system that ``path`` is to be written to, as text; "unknown" if it cannot be asked."""
    try:
        found = os.statvfs(path.parent)
    except OSError:
        return "unknown"
    return str(found.f_bavail * found.f_frsize)
