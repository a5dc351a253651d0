"""The bytes of a checkpoint: files written straight from memory, hashed on the way and made durable."""

from __future__ import annotations

import errno
import json
import math
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import NoReturn, TypeAlias

import torch
import xxhash
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
_READ_DTYPES = {name: dtype for dtype, name in STORED_DTYPES.items()}

_PIECE = 8 << 20  # bytes hashed and written at a time: still in the processor's cache when written

_Piece: TypeAlias = tuple[memoryview, int]
"""Memory, and where in a file its content begins."""


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


def read_tensors(
    path: Path, names: Collection[str] | None = None, into: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the CPU; ``names`` None means all.

    Each is read into the tensor of its name in ``into``, where that one is of the same kind and shape and can be read
    into; otherwise into memory of its own. Nothing is mapped: a tensor that aliased the file would end the process
    with SIGBUS if the file were truncated, or removed on a network file system, while in use.
    As many threads read as torch would compute with. Raises BrokenCheckpoint.
    """
    tensors = {}
    pieces: list[_Piece] = []
    try:
        with path.open("rb", buffering=0) as file:
            for name, entry in _entries(file).items():
                if names is None or name in names:
                    found = None if into is None else into.get(name)
                    tensors[name] = found if found is not None and _fits(found, entry) else _fresh(entry)
                    pieces += _pieces(tensors[name], entry)
            _fill(file, pieces)
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{path}: expected a safetensors file, found: {error}") from error
    return tensors


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: what it is, and where its content begins."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def read_entries(path: Path) -> dict[str, Entry]:
    """What a safetensors file holds, by name. Raises BrokenCheckpoint."""
    try:
        with path.open("rb", buffering=0) as file:
            return _entries(file)
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{path}: expected a safetensors file, found: {error}") from error


def read_rows(path: Path, entry: Entry, start: int, stop: int) -> Tensor:
    """A tensor's part from ``start`` to ``stop`` along its first dimension, alone. Raises BrokenCheckpoint."""
    row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    part = Entry(entry.dtype, (stop - start, *entry.shape[1:]), entry.start + start * row)
    tensor = _fresh(part)
    try:
        with path.open("rb", buffering=0) as file:
            _fill(file, _pieces(tensor, part))
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(f"{path}: expected a safetensors file, found: {error}") from error
    return tensor


def _entries(file: FileIO) -> dict[str, Entry]:
    """What a safetensors file says that it holds. Raises ValueError if it cannot be so."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("a header that is no JSON object")
    header.pop("__metadata__", None)
    return {name: _entry(described, 8 + length, size) for name, described in header.items()}


def _entry(described: Json, data: int, size: int) -> Entry:
    match described:
        case {"dtype": str(name), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if name in _READ_DTYPES:
            dtype = _READ_DTYPES[name]
        case _:
            raise ValueError(f"a tensor described as {described!r:.80}")
    # Checked before any memory is asked for.
    if not all(isinstance(length, int) and length >= 0 for length in shape) or not 0 <= begin <= end <= size - data:
        raise ValueError(f"a tensor described as {described!r:.80}")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{end - begin} bytes for a tensor of {name} and shape {shape}")
    return Entry(dtype, tuple(shape), data + begin)


def _fits(tensor: Tensor, entry: Entry) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == entry.dtype
        and tuple(tensor.shape) == entry.shape
        and tensor.is_contiguous()
    )


def _fresh(entry: Entry) -> Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype)


def _pieces(tensor: Tensor, entry: Entry) -> list[_Piece]:
    if not tensor.numel():
        return []
    memory = _memory(tensor).numpy().data
    return [(memory[at : at + _PIECE], entry.start + at) for at in range(0, len(memory), _PIECE)]


def _fill(file: FileIO, pieces: list[_Piece]) -> None:
    """Read each piece, in threads: taking the memory from the kernel costs several times as much as reading.

    Raises OSError; ValueError if the file ends early.
    """
    threads = min(torch.get_num_threads(), len(pieces))
    if threads < 2 or sum(len(memory) for memory, _ in pieces) <= _PIECE:
        _fill_in_turn(file, deque(pieces))
        return
    left = deque(pieces)
    with ThreadPoolExecutor(threads, thread_name_prefix="ddpkit-load") as pool:
        try:
            for done in [pool.submit(_fill_in_turn, file, left) for _ in range(threads)]:
                done.result()
        finally:
            left.clear()  # after a Ctrl-C here, they end with the piece that they are at


def _fill_in_turn(file: FileIO, left: deque[_Piece]) -> None:
    """Read pieces as long as there are some. After an error there are none, for other threads too."""
    while True:
        try:
            memory, start = left.popleft()
        except IndexError:
            return
        try:
            _read(file, memory, start)
        except BaseException:
            left.clear()
            raise


def _read(file: FileIO, memory: memoryview, start: int) -> None:
    done = 0
    while done < len(memory):  # a signal, or a network file system, may cut a read short
        count = os.preadv(file.fileno(), [memory[done:]], start + done)
        if not count:
            raise ValueError(f"its end, {len(memory) - done} bytes early")
        done += count


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
            written = on_its_way = 0
            for memory in content:
                for start in range(0, len(memory), _PIECE):
                    piece = memory[start : start + _PIECE]
                    hasher.update(piece)
                    file.write(piece)
                    written += len(piece)
                    if written - on_its_way >= _PIECE:
                        _send_off(file.fileno(), on_its_way)
                        on_its_way = written
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise_save_failed(path, size, error)
    return FileProof(path.name, size, hasher.hexdigest())


def _send_off(descriptor: int, start: int) -> None:
    """Have the kernel begin to write, from ``start`` on, what it holds of a file.

    Otherwise it begins at the fsync, when all is hashed (0.23 s for 512 MB, 0.14 s like this). That Linux does so is a
    part of this call which only asks for the memory back; there is no other one in the standard library.
    """
    with suppress(OSError):  # a file system that will not: fsync sees to it
        os.posix_fadvise(descriptor, start, 0, os.POSIX_FADV_DONTNEED)


def free_bytes(path: Path) -> str:
    """Bytes free on the file system that ``path`` is to be written to, as text; "unknown" if it cannot be asked."""
    try:
        found = os.statvfs(path.parent)
    except OSError:
        return "unknown"
    return str(found.f_bavail * found.f_frsize)
