"""The proof of a checkpoint: what it holds, file by file, and a digest of every byte. Imports no torch."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import xxhash

from ddpkit.errors import BrokenCheckpoint, UserError

Json: TypeAlias = Any  # what json.loads can give: None, bool, int, float, str, list, dict with str keys

FORMAT = 1
NAME = "manifest.json"

_LARGEST_MANIFEST = 256 << 20  # bytes; beyond it the file is no manifest of ours, and is not read into memory
_CHUNK = 4 << 20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# The errors of open and read that mean "the content is gone". Others (no permission, too many open files)
# say nothing about the checkpoint, which must then not be taken for a broken one.
_CONTENT_LOST = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ELOOP}


@dataclass(frozen=True)
class FileProof:
    """One file of a checkpoint: its plain name, its size in bytes, the xxh3_128 of its content (hex)."""

    name: str
    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    ``progress`` is the run's own record (plain JSON). ``shared`` is the skeleton of the state all ranks share
    and ``own[rank]`` that of one rank's own state (see `ddpkit.state.pack`); their tensors are in ``files``.
    """

    format: int
    step: int
    world_size: int
    progress: dict[str, Json]
    shared: Json
    own: tuple[Json, ...]
    files: tuple[FileProof, ...]


def canonical(value: Json) -> bytes:
    """The one byte sequence that stands for a JSON value (the order of keys is part of the value).

    Raises ValueError for NaN and infinities, TypeError for what JSON cannot hold.
    """
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def to_bytes(manifest: Manifest) -> bytes:
    """The content of ``manifest.json``: canonical JSON with a digest of itself."""
    return canonical({**asdict(manifest), "digest": digest(manifest)})


def digest(manifest: Manifest) -> str:
    """The xxh3_128 (hex) of the manifest's content, and so of the whole checkpoint."""
    return xxhash.xxh3_128_hexdigest(canonical(asdict(manifest)))


def from_bytes(data: bytes, path: Path) -> Manifest:
    """The reverse of `to_bytes`; ``path`` is for messages only.

    The bytes must be the canonical ones: every flipped bit either changes the value, which the digest
    notices, or spells the same value in another way, which this comparison notices.
    Raises BrokenCheckpoint; UserError for an intact manifest of a format newer than this ddpkit knows.
    """
    try:
        document = json.loads(data.decode("ascii"), parse_constant=_refuse_constant)
        spelt_canonically = canonical(document) == data
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{path}: expected JSON, found {_what_json_minds(error)}") from error
    if not isinstance(document, dict):
        raise BrokenCheckpoint(f"{path}: expected a JSON object, found {type(document).__name__}")
    claimed = document.pop("digest", None)
    found = xxhash.xxh3_128_hexdigest(canonical(document))
    if claimed != found:
        raise BrokenCheckpoint(f"{path}: expected the digest {claimed!r}, found {found!r}: the file was altered")
    if not spelt_canonically:
        raise BrokenCheckpoint(f"{path}: expected canonical JSON, found other bytes: the file was altered")
    # The rules above hold for every format to come, so an intact newer one is told from a damaged one.
    if isinstance(document.get("format"), int) and document["format"] > FORMAT:
        raise UserError(
            f"{path}: written in format {document['format']} by a newer ddpkit; this one knows {FORMAT}. "
            "Install the newer ddpkit to go on with this run."
        )
    return _checked(document, path)


def read(directory: Path) -> Manifest:
    """The manifest of the checkpoint in ``directory``, itself verified; the files it names are not looked at.

    Raises BrokenCheckpoint (missing, truncated, altered), UserError (no permission; a newer format).
    """
    path = directory / NAME
    size = _size(path)
    if size > _LARGEST_MANIFEST:
        raise BrokenCheckpoint(f"{path}: expected at most {_LARGEST_MANIFEST} bytes, found {size}")
    try:
        return from_bytes(path.read_bytes(), path)
    except OSError as error:
        _raise_unreadable(path, error)


def verify(directory: Path) -> Manifest:
    """Read the manifest and hash every file it names, several at a time.

    Raises BrokenCheckpoint naming the first file that differs, what was expected and what was found.
    """
    manifest = read(directory)
    for proof in manifest.files:  # sizes first: cheap, and nothing is read that cannot be right
        size = _size(directory / proof.name)
        if size != proof.bytes:
            raise BrokenCheckpoint(f"{directory / proof.name}: expected {proof.bytes} bytes, found {size}")
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        digests = pool.map(lambda proof: _file_digest(directory / proof.name), manifest.files)
        for proof, found in zip(manifest.files, digests, strict=True):
            if found != proof.xxh3_128:
                raise BrokenCheckpoint(
                    f"{directory / proof.name}: expected the digest {proof.xxh3_128}, found {found}: "
                    "the file was altered"
                )
    return manifest


def _checked(document: dict[str, Json], path: Path) -> Manifest:
    expected = {
        "format": int,
        "step": int,
        "world_size": int,
        "progress": dict,
        "shared": object,
        "own": list,
        "files": list,
    }
    if set(document) != set(expected):
        raise BrokenCheckpoint(f"{path}: expected the entries {sorted(expected)}, found {sorted(document)}")
    for key, kind in expected.items():
        if not isinstance(document[key], kind) or isinstance(document[key], bool):
            raise BrokenCheckpoint(f"{path}: expected {kind.__name__} as {key}, found {document[key]!r:.80}")
    files = tuple(_checked_proof(entry, path) for entry in document["files"])
    if len({proof.name for proof in files}) != len(files):
        raise BrokenCheckpoint(f"{path}: expected each file once, found a name twice")
    return Manifest(**{**document, "own": tuple(document["own"]), "files": files})


def _checked_proof(entry: Json, path: Path) -> FileProof:
    match entry:
        case {"name": str(name), "bytes": int(size), "xxh3_128": str(hexdigest)} if len(entry) == 3:
            pass
        case _:
            raise BrokenCheckpoint(f"{path}: expected name, bytes and xxh3_128 of a file, found {entry!r:.80}")
    if not _PLAIN_NAME.fullmatch(name):
        raise BrokenCheckpoint(f"{path}: expected the plain name of a file in the same directory, found {name!r:.80}")
    return FileProof(name, size, hexdigest)


def _size(path: Path) -> int:
    """Size in bytes of a regular file; a link, a pipe or a directory in its place is a broken checkpoint."""
    try:
        found = path.lstat()
    except OSError as error:
        _raise_unreadable(path, error)
    if not stat.S_ISREG(found.st_mode):
        raise BrokenCheckpoint(f"{path}: expected a regular file, found {stat.filemode(found.st_mode)}")
    return found.st_size


def _file_digest(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_CHUNK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
    except OSError as error:
        _raise_unreadable(path, error)
    return hasher.hexdigest()


def _raise_unreadable(path: Path, error: OSError) -> NoReturn:
    if error.errno in _CONTENT_LOST:
        raise BrokenCheckpoint(f"{path}: expected a readable file, found: {error.strerror}") from error
    raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"the constant {name}")


def _what_json_minds(error: ValueError | RecursionError) -> str:
    return "nesting without end" if isinstance(error, RecursionError) else str(error)
