"""What a checkpoint holds: a snapshot of the run as files, and the way back.

`take`, `write` and `commit` are apart, and none of them talks to another rank: a save takes the state (and copies
it: `ddpkit.checkpoint.staging`), then writes and commits while training goes on.
"""

from __future__ import annotations

import errno
import heapq
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import xxhash
from torch import Tensor

from ddpkit.checkpoint import manifest
from ddpkit.checkpoint.manifest import FileProof, Json, Manifest
from ddpkit.checkpoint.writer import (
    fsync_directory,
    raise_save_failed,
    read_tensors,
    write_bytes,
    write_tensors,
)
from ddpkit.errors import BrokenCheckpoint, SaveFailed
from ddpkit.state import pack, tensor_names, unpack

Targets: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""Tensors in use, by the entry of the replicated state and the key in it whose content they are to take up."""

_REPLICATED = re.compile(r"replicated-\d{5,}\.safetensors")
_MAIN = "main.safetensors"
_REPLACED = ".replaced"


@dataclass(frozen=True)
class Snapshot:
    """The state of a run on one rank, as `ddpkit.state.pack` takes it; tensors are those in use, not copies.

    progress: plain JSON, the run's own record (rank zero's counts).
    replicated: the same on all ranks (parameters, optimizer); written in parallel, each rank a part.
    main: rank zero's counts (buffers, scheduler, the user's objects); other ranks may leave None.
    own: each rank's own (generators).
    """

    progress: dict[str, Json]
    replicated: Any
    main: Any
    own: Any


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as read by one rank. ``own`` is None for a rank that the saved run did not have."""

    step: int
    world_size: int
    progress: dict[str, Json]
    replicated: Any
    main: Any
    own: Any


@dataclass(frozen=True)
class Part:
    """What one rank writes: its tensors by file, its skeletons, and a digest of the replicated layout."""

    progress: dict[str, Json]
    files: dict[str, dict[str, Tensor]]
    shared: Json
    own: Json
    layout: str
    total_bytes: int
    """Of the whole checkpoint, all ranks together; a little less than its files take."""


def take(snapshot: Snapshot, rank: int, world_size: int) -> Part:
    """This rank's part of a snapshot; its tensors are those of the snapshot.

    Raises StateError for a state that cannot be saved.
    """
    replicated, replicated_tensors = pack(snapshot.replicated)
    main, main_tensors = pack(snapshot.main if rank == 0 else None)
    own, own_tensors = pack(snapshot.own)
    mine = _share(replicated_tensors, world_size)[rank]
    files = {
        f"replicated-{rank:05d}.safetensors": {name: replicated_tensors[name] for name in mine},
        _MAIN: main_tensors,
        _own_file(rank): own_tensors,
    }
    return Part(
        progress=snapshot.progress,
        files={name: tensors for name, tensors in files.items() if tensors},
        shared={"replicated": replicated, "main": main},
        own=own,
        layout=_layout(replicated_tensors),
        total_bytes=_bytes(replicated_tensors) + _bytes(main_tensors) + world_size * _bytes(own_tensors),
    )


def write(part: Part, directory: Path) -> tuple[FileProof, ...]:
    """Write this rank's files, each durable on return. Raises SaveFailed."""
    return tuple(write_tensors(directory / name, tensors) for name, tensors in part.files.items())


def commit(
    content: Manifest, temporary: Path, target: Path, fence: Callable[[], None], *, replace: bool = False
) -> None:
    """Turn the directory all ranks have written to into the checkpoint ``target``, durably, by one rename.

    ``fence`` raises if this process may not write any more. It is asked last, and that suffices: whoever
    takes the run over first changes the claim, then renames every temporary directory away, then looks for
    checkpoints. So either this rename came before that look, or there is nothing left here to rename.
    With ``replace`` the checkpoint of the same step that was there when the save began is moved away just before;
    a kill in between is what `undo_replacements` is for. One that has come since is another writer's.
    Raises SaveFailed, also when another writer has just committed this step; then its checkpoint stays untouched.
    """
    data = manifest.to_bytes(content)
    replaced = target.with_name(f".{target.name}{_REPLACED}")
    try:
        write_bytes(temporary / manifest.NAME, data)
        fsync_directory(temporary)
        fence()
        if replace:
            target.rename(replaced)
        # Onto a directory that is not empty this fails: the second of two writers loses.
        temporary.rename(target)
        fsync_directory(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise SaveFailed(f"{target}: another process has committed this step meanwhile") from error
        raise_save_failed(target, len(data), error)


def undo_replacements(directory: Path) -> None:
    """Give a checkpoint its name back whose replacement was cut off between the two renames."""
    for replaced in directory.glob(f".*{_REPLACED}"):
        target = replaced.with_name(replaced.name[1 : -len(_REPLACED)])
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(target)
            fsync_directory(directory)


def read(directory: Path, found: Manifest, rank: int, into: Targets) -> Loaded:
    """Read a verified checkpoint, whatever the number of ranks that wrote it. Raises BrokenCheckpoint."""
    names = [proof.name for proof in found.files]
    shared = _shared(directory, found, "replicated")
    files = [name for name in names if _REPLICATED.fullmatch(name)]
    replicated = _read_files(directory, files, into=_places(shared, into))
    main = _read_files(directory, [name for name in names if name == _MAIN])
    had_part = rank < len(found.own)
    own = _read_files(directory, [name for name in names if had_part and name == _own_file(rank)])
    return Loaded(
        step=found.step,
        world_size=found.world_size,
        progress=found.progress,
        replicated=_unpack(directory, shared, replicated),
        main=_unpack(directory, _shared(directory, found, "main"), main),
        own=_unpack(directory, found.own[rank], own) if had_part else None,
    )


def load_model_tensors(directory: Path, name: str = "model") -> dict[str, Tensor]:
    """The model's state_dict, for export, out of the checkpoint in ``directory``; only its tensors are read.

    It is the entry ``name`` of the replicated state (parameters) with the entry ``name`` of the main state
    (buffers), in the order of the list "{name}_keys" of the main state (the keys of the state_dict); without
    that list, parameters come first. Tied entries are one tensor object. Verifies the checkpoint.
    Raises BrokenCheckpoint, also when there is no model; KeyError when the run kept nothing else of this name.
    """
    found = manifest.verify(directory)
    main = _shared(directory, found, "main")
    if name != "model" and not (isinstance(main, dict) and name in main):
        raise KeyError(name)
    entries: dict[str, Tensor] = {}
    for group, is_file in (("replicated", _REPLICATED.fullmatch), ("main", _MAIN.__eq__)):
        skeleton = _shared(directory, found, group)
        model = skeleton.get(name, {}) if isinstance(skeleton, dict) else {}
        wanted = set(tensor_names(model))
        files = [proof.name for proof in found.files if is_file(proof.name)]
        entries.update(_unpack(directory, model, _read_files(directory, files, wanted)))
    order = list(entries)
    if isinstance(main, dict) and f"{name}_keys" in main:
        order = _unpack(directory, main[f"{name}_keys"], {})
    if not entries or set(order) != set(entries):
        raise BrokenCheckpoint(f"{directory}: expected a model with the entries {order}, found {list(entries)}")
    return {key: entries[key] for key in order}


def _share(tensors: dict[str, Tensor], world_size: int) -> list[list[str]]:
    """The names that each rank writes: the largest first, each to the rank with the fewest bytes so far."""
    shares: list[list[str]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]  # a heap
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        load, rank = loads[0]
        shares[rank].append(name)
        heapq.heapreplace(loads, (load + tensor.nbytes, rank))
    return shares


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _layout(tensors: dict[str, Tensor]) -> str:
    """Equal on all ranks, or the parts they write would not make a whole."""
    looks = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()]
    return xxhash.xxh3_128_hexdigest(manifest.canonical(looks))


def _own_file(rank: int) -> str:
    return f"own-{rank:05d}.safetensors"


def _shared(directory: Path, found: Manifest, group: str) -> Json:
    if not isinstance(found.shared, dict) or group not in found.shared:
        raise BrokenCheckpoint(f"{directory / manifest.NAME}: expected the {group} state in it, found none")
    return found.shared[group]


def _places(skeleton: Json, targets: Targets) -> dict[str, Tensor]:
    """The tensors of ``targets`` by the names under which their content is stored."""
    places: dict[str, Tensor] = {}
    for entry, tensors in targets.items():
        stored = skeleton.get(entry) if isinstance(skeleton, dict) else None
        for key, tensor in tensors.items():
            match stored.get(key) if isinstance(stored, dict) else None:
                case {"!": "tensor", "name": str(name), **more} if not more:
                    places.setdefault(name, tensor)  # tied ones: the first
    return places


def _read_files(
    directory: Path, names: Iterable[str], wanted: set[str] | None = None, into: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors.update(read_tensors(directory / name, wanted, into))
    return tensors


def _unpack(directory: Path, skeleton: Json, tensors: dict[str, Tensor]) -> Any:
    try:
        return unpack(skeleton, tensors)
    except BrokenCheckpoint as error:
        raise BrokenCheckpoint(f"{os.fspath(directory)}: {error}") from error
