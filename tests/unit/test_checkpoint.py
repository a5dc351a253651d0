from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from ddpkit.checkpoint import contents, listing, manifest, writer
from ddpkit.checkpoint.manifest import FileProof, Manifest
from ddpkit.checkpoint.staging import Staging
from ddpkit.checkpoint.store import CheckpointStore, Loaded, SaveResult, Snapshot, load_model_tensors
from ddpkit.checkpoint.writer import read_tensors, write_json, write_tensors
from ddpkit.errors import BrokenCheckpoint, SaveFailed, StateError, Superseded, UserError


class Exchange:
    """The meeting point of ranks that are threads."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=30)
        self.values: list[Any] = [None] * world_size
        self.concluded = ""


@dataclass(frozen=True)
class ThreadRank:
    rank: int
    world_size: int
    meeting: Exchange

    def conclude(self, name: str, value: Any, conclusion: Callable[[list[Any]], Any]) -> Any:
        self.meeting.values[self.rank] = json.dumps([name, value])
        self.meeting.barrier.wait()
        if self.rank == 0:
            met = [json.loads(text) for text in self.meeting.values]
            assert {other for other, _ in met} == {name}
            self.meeting.concluded = json.dumps(conclusion([value for _, value in met]))
        self.meeting.barrier.wait()
        return json.loads(self.meeting.concluded)


@dataclass
class Run:
    """A run of `world_size` ranks on one directory."""

    run_dir: Path
    world_size: int = 1
    keep: int = 3
    fence: Callable[[], None] = lambda: None
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    stores: list[CheckpointStore] = field(default_factory=list)

    def __post_init__(self) -> None:
        meeting = Exchange(self.world_size)
        self.stores = [
            CheckpointStore(
                self.directory,
                self.keep,
                ThreadRank(rank, self.world_size, meeting),
                lambda name, **fields: self.events.append((name, fields)),
                self.warnings.append,
                lambda: self.fence(),
            )
            for rank in range(self.world_size)
        ]

    @property
    def directory(self) -> Path:
        return listing.checkpoints_directory(self.run_dir)

    def on_all(self, action: Callable[[int, CheckpointStore], Any]) -> list[Any]:
        """Results, or the exceptions raised, by rank."""

        def caught(rank: int, store: CheckpointStore) -> Any:
            try:
                return action(rank, store)
            except Exception as error:  # noqa: BLE001  # returned: what every rank raises is what is tested
                return error

        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(caught, range(self.world_size), self.stores))

    def save(self, step: int, make: Callable[[int, int], Snapshot] | None = None) -> list[Any]:
        make = make or snapshot
        return self.on_all(
            lambda rank, store: store.save(step, lambda: contents.take(make(step, rank), rank, self.world_size))
        )

    def load(self, step: int | None = None, read_only: bool = False) -> list[Any]:
        return self.on_all(lambda rank, store: store.load_newest(step, read_only=read_only))

    def names(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())


def snapshot(step: int, rank: int) -> Snapshot:
    value = float(step)
    return Snapshot(
        progress={"step": step, "samples": step * 64},
        replicated={
            "model": {f"layer{i}.weight": torch.full((i + 1, 7), value + i) for i in range(9)},
            "optimizer": {"state": {0: {"step": torch.tensor(value)}}, "lr": 0.1},
        },
        main={"model": {"layer0.mean": torch.full((3,), -value)}, "user": [step]} if rank == 0 else None,
        own={"rng": torch.full((4,), value + rank), "rank": rank},
    )


def assert_loaded(found: Any, step: int, rank: int, saved_by: int) -> None:
    assert isinstance(found, Loaded), found
    expected = snapshot(step, rank)
    assert (found.step, found.world_size, found.progress) == (step, saved_by, expected.progress)
    for name, tensor in expected.replicated["model"].items():
        assert torch.equal(found.replicated["model"][name], tensor)
    assert found.replicated["optimizer"]["state"][0]["step"].item() == step
    assert torch.equal(found.main["model"]["layer0.mean"], torch.full((3,), -float(step)))
    assert found.main["user"] == [step]
    if rank < saved_by:
        assert found.own["rank"] == rank and torch.equal(found.own["rng"], expected.own["rng"])
    else:
        assert found.own is None


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


# Bytes


def test_written_tensors_are_a_safetensors_file_with_the_right_proof(tmp_path: Path) -> None:
    tensors = {
        "half": torch.arange(3, dtype=torch.bfloat16),
        "large": torch.rand(300, 1000, dtype=torch.float64).T,
        "empty": torch.empty(0, 2),
        "flag": torch.tensor(True),
    }
    path = tmp_path / "x.safetensors"
    proof = write_tensors(path, tensors)
    data = path.read_bytes()
    assert proof == FileProof("x.safetensors", len(data), xxhash.xxh3_128_hexdigest(data))
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        assert torch.equal(file.get_tensor("large"), tensors["large"])
    found = read_tensors(path)
    path.write_bytes(b"")  # would be SIGBUS if the tensors were mapped
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_writing_never_replaces_a_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(SaveFailed, match="File exists"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert (tmp_path / "x.json").read_text() == '{"a":1}\n'


def test_a_dtype_that_safetensors_lacks_is_refused_by_the_writer(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"x: safetensors cannot hold torch\.complex128"):
        write_tensors(tmp_path / "x", {"x": torch.ones(1, dtype=torch.complex128)})


def test_tensors_are_read_into_those_that_they_fit(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    stored = {name: torch.randn(4, 6) for name in ("same", "shape", "dtype", "strided", "absent")}
    stored["parameter"], stored["scalar"] = torch.randn(3), torch.tensor(7.0)
    write_tensors(path, stored)
    into = {
        "same": torch.zeros(4, 6),
        "shape": torch.zeros(6, 4),
        "dtype": torch.zeros(4, 6, dtype=torch.float64),
        "strided": torch.zeros(6, 4).T,
        "parameter": torch.nn.Parameter(torch.zeros(3)),
        "scalar": torch.tensor(0.0),
        "more": torch.zeros(2),
    }
    found = read_tensors(path, into=into)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    assert {name for name, tensor in found.items() if tensor is into.get(name)} == {"same", "parameter", "scalar"}
    assert not any(into[name].any() for name in ("shape", "dtype", "strided", "more"))


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_several_threads_read_what_one_does(tmp_path: Path, three_threads: None) -> None:
    path = tmp_path / "x.safetensors"
    sizes = {"large": 21 << 20, "small": 5, "none": 0, "a piece": 8 << 20, "odd": (8 << 20) + 1}
    stored = {name: torch.randint(0, 256, (size,), dtype=torch.uint8) for name, size in sizes.items()}
    write_tensors(path, stored)
    into = {"large": torch.zeros(21 << 20, dtype=torch.uint8)}
    found = read_tensors(path, into=into)
    assert found["large"] is into["large"]
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())


def test_where_one_thread_cannot_read_the_others_stop(
    tmp_path: Path, three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.zeros(50 << 16, dtype=torch.uint8)})
    monkeypatch.setattr(writer, "_PIECE", 1 << 16)
    reads = itertools.count()
    read = os.preadv

    def breaks(descriptor: int, buffers: Any, offset: int) -> int:
        if next(reads) == 4:
            raise OSError(errno.EIO, "Input/output error")
        time.sleep(0.01)
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", breaks)
    with pytest.raises(BrokenCheckpoint, match="Input/output error"):
        read_tensors(path)
    assert next(reads) < 20  # of 50 pieces


HEADERS = {
    "a size beyond the file": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "a size that is not the shape's": b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,4]}}',
    "a shape beyond all memory": b'{"a":{"dtype":"U8","shape":[99999999999999999999],"data_offsets":[0,4]}}',
    "sizes below nothing": b'{"a":{"dtype":"U8","shape":[-2,-2],"data_offsets":[0,4]}}',
    "a beginning before the data": b'{"a":{"dtype":"U8","shape":[5],"data_offsets":[-1,4]}}',
    "an end before the beginning": b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[4,3]}}',
    "an unknown dtype": b'{"a":{"dtype":"Q9","shape":[4],"data_offsets":[0,4]}}',
    "something else": b'{"a":[1]}',
    "no object": b"[1, 2]",
    "nesting without end": b"[" * 100_000,
    "no text": b"\xff\xfe",
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_file_that_is_not_what_its_header_says_is_broken(header: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(HEADERS[header]).to_bytes(8, "little") + HEADERS[header] + b"abcd")
    with pytest.raises(BrokenCheckpoint, match="expected a safetensors file"):
        read_tensors(path)
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(BrokenCheckpoint, match="a header of"):
        read_tensors(path)


def test_a_copy_is_of_its_moment_and_is_written_as_the_original_is(tmp_path: Path) -> None:
    def state(value: float) -> Snapshot:
        tensors = {
            "strided": torch.full((30, 50), value).T,
            "half": torch.full((3,), value, dtype=torch.bfloat16),
            "complex": torch.full((2,), complex(value, 1)),
            "flag": torch.tensor(True),
            "empty": torch.empty(0, 2),
            "array": np.full(5, value),
        }
        return Snapshot({}, tensors, {"tied": [tensors["half"], tensors["half"]]}, {"rng": torch.full((7,), value)})

    staging = Staging(torch.device("cpu"))
    taken = None
    for number, value in enumerate((1.0, 2.0)):
        snapshot, folders = state(value), [tmp_path / f"{number}-{kind}" for kind in ("copy", "original")]
        for folder in folders:
            folder.mkdir()
        part = contents.take(snapshot, 0, 1)
        copied = staging.copy(part)()
        originals = contents.write(part, folders[1])
        for tensors in part.files.values():
            for tensor in tensors.values():
                tensor.zero_()
        assert contents.write(copied, folders[0]) == originals
        # One buffer, as large as one part, and the same for the next one.
        places = {tensor.untyped_storage().data_ptr() for file in copied.files.values() for tensor in file.values()}
        assert len(places) == 1 and taken in (None, places)
        taken = places
    assert 6000 < staging.bytes < 8000


def test_places_of_a_copy_are_kept_until_the_state_looks_otherwise() -> None:
    staging = Staging(torch.device("cpu"))

    def copied(**state: Tensor) -> dict[str, Tensor]:
        copy = staging.copy(contents.take(Snapshot({}, state, None, None), 0, 1))()
        return copy.files["replicated-00000.safetensors"]

    weight = torch.randn(4, 6)
    first, second = copied(w=weight), copied(w=weight + 1)
    assert first["w"] is second["w"] and torch.equal(second["w"], weight + 1)
    others: list[dict[str, Tensor]] = [
        {"w": weight.int()},  # of the same size
        {"w": weight.T},
        {"v": weight},
        {"w": weight, "v": weight + 1},
        {"v": weight + 2, "w": weight},
        {"w": torch.randn(9, 9)},
    ]
    for state in others:
        found = copied(**state)
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), (state, name)


# The manifest


def made_manifest() -> Manifest:
    proofs = (FileProof("a.safetensors", 3, "0" * 32),)
    return Manifest(manifest.FORMAT, 5, 2, {"x": 0.1}, {"s": [1, None]}, ({"r": 0}, {"r": 1}), proofs)


def write_manifest(directory: Path, document: Any) -> None:
    """A manifest with a right digest, whatever it says."""
    document = {**document, "digest": xxhash.xxh3_128_hexdigest(manifest.canonical(document))}
    (directory / manifest.NAME).write_bytes(manifest.canonical(document))


def document_of(content: Manifest) -> Any:
    document = json.loads(manifest.to_bytes(content))
    del document["digest"]
    return document


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    (tmp_path / manifest.NAME).write_bytes(manifest.to_bytes(made_manifest()))
    assert manifest.read(tmp_path) == made_manifest()


def test_every_flipped_bit_and_every_truncation_of_a_manifest_is_noticed() -> None:
    data = manifest.to_bytes(made_manifest())
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(BrokenCheckpoint):
            manifest.from_bytes(bytes(flipped), Path("manifest.json"))
    for length in range(len(data)):
        with pytest.raises(BrokenCheckpoint):
            manifest.from_bytes(data[:length], Path("manifest.json"))


@pytest.mark.parametrize(
    "change",
    [
        {"files": [{"name": "../a", "bytes": 1, "xxh3_128": "0"}]},
        {"files": [{"name": "/etc/passwd", "bytes": 1, "xxh3_128": "0"}]},
        {"files": [{"name": "..", "bytes": 1, "xxh3_128": "0"}]},
        {"files": [{"name": "a\x00", "bytes": 1, "xxh3_128": "0"}]},
        {"files": [{"name": "a", "bytes": "1", "xxh3_128": "0"}]},
        {"files": [{"name": "a", "bytes": 1}]},
        {"files": [{"name": "a", "bytes": 1, "xxh3_128": "0"}] * 2},
        {"files": ["a"]},
        {"files": None},
        {"step": "5"},
        {"step": True},
        {"own": {}},
        {"progress": []},
        {"more": 1},
    ],
    ids=str,
)
def test_a_manifest_that_makes_no_sense_is_broken_even_if_its_digest_is_right(change: Any, tmp_path: Path) -> None:
    write_manifest(tmp_path, {**document_of(made_manifest()), **change})
    with pytest.raises(BrokenCheckpoint, match="expected"):
        manifest.read(tmp_path)


def test_hostile_files_in_place_of_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / manifest.NAME
    for content in (b"", b"[" * 100_000, b'{"a":' * 100_000, b"NaN", b"[]", b"1" * 10_000, b"\xff", b"null"):
        path.write_bytes(content)
        with pytest.raises(BrokenCheckpoint):
            manifest.read(tmp_path)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: must not be read into memory
    with pytest.raises(BrokenCheckpoint, match="at most"):
        manifest.read(tmp_path)
    path.unlink()
    os.mkfifo(path)  # must not block
    with pytest.raises(BrokenCheckpoint, match="regular file"):
        manifest.read(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(BrokenCheckpoint, match="regular file"):
        manifest.read(tmp_path)


def test_a_newer_format_is_the_users_business_and_not_a_broken_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    run.save(2)
    directory = run.directory / "step-00000002"
    write_manifest(directory, {**document_of(manifest.read(directory)), "format": 2, "new": 1})
    with pytest.raises(UserError, match="newer ddpkit"):
        manifest.read(directory)
    assert isinstance(run.load()[0], UserError)
    assert run.names() == ["step-00000001", "step-00000002"]


def test_huge_sizes_are_answered_without_reading(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    directory = run.directory / "step-00000001"
    document = document_of(manifest.read(directory))
    document["files"][0]["bytes"] = 10**30
    write_manifest(directory, document)
    with pytest.raises(BrokenCheckpoint, match=f"expected {10**30} bytes"):
        manifest.verify(directory)


# Saving and loading


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(1, 1), (3, 3), (4, 3), (3, 4), (2, 1)])
def test_a_checkpoint_loads_on_any_number_of_ranks(saved_by: int, loaded_by: int, tmp_path: Path) -> None:
    run = Run(tmp_path, saved_by)
    results = run.save(7)
    target = run.directory / "step-00000007"
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    assert results == [SaveResult(7, target, size, written=True, durable_at=0.0)] * saved_by
    assert run.names() == ["step-00000007"]
    for rank, found in enumerate(Run(tmp_path, loaded_by).load()):
        assert_loaded(found, 7, rank, saved_by)


def test_the_replicated_state_is_spread_over_the_ranks(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.zeros(1000) for i in range(6)} | {"big": torch.zeros(3000)}

    def make(step: int, rank: int) -> Snapshot:
        return Snapshot({}, tensors, None, None)

    run = Run(tmp_path, 3)
    run.save(1, make)
    sizes = [path.stat().st_size for path in run.directory.glob("step-00000001/replicated-*")]
    assert len(sizes) == 3 and max(sizes) - min(sizes) < 1000


def test_a_model_is_loaded_into_its_own_memory_whatever_is_tied_or_renamed(tmp_path: Path) -> None:
    stored = {"a.b": torch.full((2,), 1.0), "a": torch.full((3,), 2.0)}
    stored["tied"] = stored["a"]
    run = Run(tmp_path)
    run.save(1, lambda step, rank: Snapshot({}, {"model": stored, "list": [torch.ones(2)]}, None, None))
    own = {"a.b": torch.zeros(2), "a": torch.zeros(3), "tied": torch.zeros(3), "new": torch.zeros(1)}
    loaded = run.stores[0].load_newest(into={"model": own, "list": {"0": torch.zeros(2)}, "more": own})
    assert loaded is not None
    found = loaded.replicated["model"]
    assert found["a.b"] is own["a.b"] and found["a"] is own["a"] and found["tied"] is own["a"]
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    assert not own["tied"].any() and not own["new"].any()  # they are copied from the other, or told to be missing


def test_nothing_to_load_is_none_on_every_rank(tmp_path: Path) -> None:
    run = Run(tmp_path / "new", 2)
    assert run.load() == [None, None]
    assert not run.run_dir.exists()
    leftover = run.directory / ".step-00000001.x.tmp"
    leftover.mkdir(parents=True)
    assert run.load() == [None, None]


def test_saving_a_step_again_leaves_an_intact_checkpoint_and_replaces_a_broken_one(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    run.save(5)
    target = run.directory / "step-00000005"
    before = (target / manifest.NAME).stat().st_mtime_ns
    assert [result.written for result in run.save(5)] == [False, False]
    assert (target / manifest.NAME).stat().st_mtime_ns == before
    flip(target / "main.safetensors", 80)
    assert [result.written for result in run.save(5)] == [True, True]
    assert run.names() == ["broken-step-00000005-1", "step-00000005"]
    assert run.events[0][0] == "set_aside" and "main.safetensors" in run.warnings[0]


def test_a_certain_step_can_be_loaded(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    run.save(1)
    run.save(2)
    for rank, found in enumerate(run.load(1)):
        assert_loaded(found, 1, rank, 2)
    missing = run.load(3)
    assert all(isinstance(error, UserError) and "there are: 2, 1" in str(error) for error in missing)
    flip(run.directory / "step-00000001" / "main.safetensors", 9)
    assert all(isinstance(error, BrokenCheckpoint) for error in run.load(1))
    assert run.names() == ["step-00000001", "step-00000002"]


def test_the_parts_of_a_save_need_no_other_rank(tmp_path: Path) -> None:
    parts = [contents.take(snapshot(3, rank), rank, 2) for rank in range(2)]
    temporary = tmp_path / "t"
    temporary.mkdir()
    proofs = [contents.write(part, temporary) for part in parts]
    whole = Manifest(1, 3, 2, {"step": 3, "samples": 192}, parts[0].shared, (None, None), (*proofs[0], *proofs[1]))
    contents.commit(whole, temporary, tmp_path / "step-00000003", lambda: None)
    found = contents.read(tmp_path / "step-00000003", manifest.verify(tmp_path / "step-00000003"), 0, {})
    assert torch.equal(found.replicated["model"]["layer8.weight"], torch.full((9, 7), 11.0))


def test_the_model_is_exported_in_its_own_order(tmp_path: Path) -> None:
    model: Any = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[2].weight = model[1].weight
    state = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def make(step: int, rank: int) -> Snapshot:
        return Snapshot(
            progress={},
            replicated={"model": {k: v for k, v in state.items() if k in parameters}, "optimizer": {}},
            main={
                "model": {k: v for k, v in state.items() if k not in parameters},
                "model_keys": list(state),
            },
            own=None,
        )

    run = Run(tmp_path, 2)
    run.save(1, make)
    found = load_model_tensors(run.directory / "step-00000001")
    assert list(found) == list(state)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert found["1.weight"] is found["2.weight"]


# What goes wrong with files


def test_every_flipped_bit_in_any_file_is_noticed(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    run.save(1)
    draw = random.Random(0)
    directory = run.directory / "step-00000001"
    files = sorted(directory.iterdir())
    assert len(files) == 6
    for path in files:
        size = path.stat().st_size
        for bit in [0, 8 * size - 1, *(draw.randrange(8 * size) for _ in range(60))]:
            flip(path, bit)
            with pytest.raises(BrokenCheckpoint) as error:
                manifest.verify(directory)
            assert str(path) in str(error.value) and "expected" in str(error.value)
            flip(path, bit)
    manifest.verify(directory)


def test_every_file_truncated_extended_missing_or_replaced_is_noticed(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    run.save(1)
    directory = run.directory / "step-00000001"
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        for length in {0, 1, 7, 8, 9, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:length])
            with pytest.raises(BrokenCheckpoint):
                manifest.verify(directory)
        path.write_bytes(data + b"\0")
        with pytest.raises(BrokenCheckpoint):
            manifest.verify(directory)
        path.unlink()
        with pytest.raises(BrokenCheckpoint, match="No such file"):
            manifest.verify(directory)
        path.mkdir()
        with pytest.raises(BrokenCheckpoint, match="regular file"):
            manifest.verify(directory)
        path.rmdir()
        path.write_bytes(data)
    manifest.verify(directory)


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def test_a_pickle_bomb_is_never_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(trace))
    pickle.loads(bomb)
    assert trace.exists()  # it does work
    trace.unlink()
    torch.save({"x": Bomb(trace)}, tmp_path / "bomb.pt")
    run = Run(tmp_path / "run")
    run.save(1)
    directory = run.directory / "step-00000001"
    for content in (bomb, (tmp_path / "bomb.pt").read_bytes()):
        for path in sorted(directory.iterdir()):
            data = path.read_bytes()
            path.write_bytes(content)
            assert isinstance(run.load()[0], BrokenCheckpoint)
            with pytest.raises(BrokenCheckpoint):
                load_model_tensors(directory)
            with pytest.raises(BrokenCheckpoint):
                read_tensors(path)
            path.write_bytes(data)
    # Not even with a manifest that vouches for it.
    document = document_of(manifest.read(directory))
    (directory / "main.safetensors").write_bytes(bomb)
    for entry in document["files"]:
        if entry["name"] == "main.safetensors":
            entry.update(bytes=len(bomb), xxh3_128=xxhash.xxh3_128_hexdigest(bomb))
    write_manifest(directory, document)
    assert isinstance(run.load()[0], BrokenCheckpoint)
    assert not trace.exists()


def test_a_broken_newest_is_set_aside_and_the_one_before_is_used(tmp_path: Path) -> None:
    run = Run(tmp_path, 2, keep=9)
    for step in (1, 2, 3, 4):
        run.save(step)
    flip(run.directory / "step-00000004" / "main.safetensors", 70)
    (run.directory / "step-00000003" / "own-00001.safetensors").unlink()
    for rank, found in enumerate(run.load(read_only=True)):
        assert_loaded(found, 2, rank, 2)
    assert not run.warnings and "step-00000004" in run.names()
    for rank, found in enumerate(run.load()):
        assert_loaded(found, 2, rank, 2)
    aside = ["broken-step-00000003-1", "broken-step-00000004-1"]
    assert run.names() == [*aside, "step-00000001", "step-00000002"]
    assert [(name, fields["step"]) for name, fields in run.events] == [("set_aside", 4), ("set_aside", 3)]
    assert "main.safetensors" in run.warnings[0] and "own-00001" in run.warnings[1]
    run.save(4)
    flip(run.directory / "step-00000004" / "main.safetensors", 70)
    run.load()
    assert "broken-step-00000004-2" in run.names()


def test_all_broken_is_an_error_now_and_on_every_later_start(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    run.save(1)
    run.save(2)
    for step in (1, 2):
        flip(run.directory / f"step-0000000{step}" / "main.safetensors", 70)
    for _ in range(2):
        for error in run.load():
            assert isinstance(error, BrokenCheckpoint)
            assert "step-00000001" in str(error) and "step-00000002" in str(error)
    assert run.names() == ["step-00000001", "step-00000002"]


def test_checkpoints_set_aside_earlier_are_no_fresh_start(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    (run.directory / "step-00000001").rename(run.directory / "broken-step-00000001-1")
    assert "set aside earlier" in str(run.load()[0])


def test_a_renamed_checkpoint_is_not_of_that_step(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    (run.directory / "step-00000001").rename(run.directory / "step-00000009")
    assert "expected step 9, found 1" in str(run.load()[0])


def test_ranks_that_see_other_files_say_so(tmp_path: Path) -> None:
    run = Run(tmp_path / "a", 2)
    run.save(1)
    Run(tmp_path / "b", 2).save(1, lambda step, rank: snapshot(2, rank))
    run.stores[1]._directory = listing.checkpoints_directory(tmp_path / "b")
    for error in run.load():
        assert isinstance(error, BrokenCheckpoint) and "all hosts share" in str(error)
    run.stores[1]._directory = tmp_path / "nowhere"
    for error in run.save(2):
        assert isinstance(error, SaveFailed) and "all hosts share" in str(error)
    assert run.names() == ["step-00000001"]


def test_listing_tells_intact_from_broken(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert listing.listing(tmp_path) == [] and listing.intact_newest(tmp_path) is None
    for step in (1, 2, 3):
        run.save(step)
    flip(run.directory / "step-00000003" / manifest.NAME, 100)
    (run.directory / "step-1").mkdir()  # not a name of ours
    found = listing.listing(tmp_path)
    assert [(one.step, one.problem is None) for one in found] == [(3, False), (2, True), (1, True)]
    newest = listing.intact_newest(tmp_path)
    assert newest is not None and newest.progress == {"step": 2, "samples": 128}


# What goes wrong while saving


def assert_failed_everywhere(errors: list[Any], kind: type[Exception], *texts: str) -> None:
    assert all(type(error) is kind for error in errors), errors
    assert len({str(error) for error in errors}) == 1
    for text in texts:
        assert text in str(errors[0])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def large(step: int, rank: int) -> Snapshot:
    return Snapshot({}, {"w": torch.rand(50_000), "v": torch.rand(50_000)}, None, {"r": torch.rand(8)})


def test_a_full_disk_leaves_the_older_checkpoints_and_nothing_else(small_disk: Path) -> None:
    run = Run(small_disk, 2)
    assert run.save(1)[0].written
    errors = run.save(2, large)
    assert_failed_everywhere(errors, SaveFailed, "No space left on device", "bytes needed", "free", "rank ")
    assert all(error.__cause__.errno == errno.ENOSPC for error in errors)
    assert run.names() == ["step-00000001"]
    assert_loaded(run.load()[1], 1, 1, 2)
    assert run.save(3)[1].written


def test_a_file_size_limit_fails_the_save_on_every_rank(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    run.save(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        errors = run.save(2, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_failed_everywhere(errors, SaveFailed, "File too large", "rank 0 on", "rank 1 on")
    assert all(error.__cause__.errno == errno.EFBIG for error in errors)
    assert run.names() == ["step-00000001"]


def test_a_state_that_cannot_be_saved_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    run = Run(tmp_path, 3)
    errors = run.save(1, lambda step, rank: Snapshot({}, {}, None, object() if rank == 1 else None))
    assert_failed_everywhere(errors, StateError, "rank 1 on", "builtins.object")
    assert not run.directory.exists()


def test_ranks_with_different_replicated_tensors_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, 3)
    errors = run.save(1, lambda step, rank: Snapshot({}, {"w": torch.ones(1 + rank // 2)}, None, None))
    assert_failed_everywhere(errors, StateError, "on ranks [2]")


def test_an_unexpected_error_on_one_rank_reaches_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, 2)
    real_write = contents.write

    def failing(part: contents.Part, directory: Path) -> Any:
        if "own-00001.safetensors" in part.files:
            raise RuntimeError("CUDA error: out of luck")
        return real_write(part, directory)

    monkeypatch.setattr(contents, "write", failing)
    assert_failed_everywhere(run.save(1), SaveFailed, "rank 1 on", "RuntimeError: CUDA error: out of luck")
    assert run.names() == []


def test_a_superseded_run_cannot_commit_set_aside_prune_or_clean(tmp_path: Path) -> None:
    run = Run(tmp_path, 2, keep=1)
    run.save(1)
    leftover = run.directory / ".step-00000009.x.tmp"
    leftover.mkdir()
    calls = []

    def superseded_at_commit() -> None:
        calls.append(1)
        if len(calls) > 1:
            raise Superseded("restart 2 of job 17 has taken over")

    run.fence = superseded_at_commit
    assert_failed_everywhere(run.save(2), Superseded, "restart 2 of job 17")
    flip(run.directory / "step-00000001" / "main.safetensors", 70)
    assert_failed_everywhere(run.save(1), Superseded)
    with pytest.raises(Superseded):
        run.stores[0].clean()
    assert run.names() == [leftover.name, "step-00000001"]


def test_of_two_runs_that_commit_the_same_step_the_second_loses(tmp_path: Path) -> None:
    first, second = Run(tmp_path), Run(tmp_path)
    calls: list[int] = []

    def overtaken() -> None:
        calls.append(1)
        if len(calls) == 2:  # after the second's manifest is written, just before its rename
            first.save(5)

    second.fence = overtaken
    assert_failed_everywhere(second.save(5, lambda step, rank: snapshot(6, rank)), SaveFailed, "another process")
    assert first.names() == ["step-00000005"]
    assert_loaded(first.load()[0], 5, 0, 1)


def test_a_takeover_just_before_the_rename_leaves_nothing_to_rename(tmp_path: Path) -> None:
    old, new = Run(tmp_path), Run(tmp_path)
    calls: list[int] = []

    def passed_and_then_taken_over() -> None:
        calls.append(1)
        if len(calls) == 2:
            new.stores[0].clean()

    old.fence = passed_and_then_taken_over
    assert_failed_everywhere(old.save(5), SaveFailed)
    assert new.names() == []


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    run = Run(tmp_path, 2, keep=2)
    for step in (1, 2, 3, 4):
        run.save(step)
    assert run.names() == ["step-00000003", "step-00000004"]
    one = Run(tmp_path, keep=1)
    one.save(5)
    assert one.names() == ["step-00000005"]


def test_pruning_counts_only_what_is_intact(tmp_path: Path) -> None:
    Run(tmp_path, keep=9).save(1)
    Run(tmp_path, keep=9).save(2)
    run = Run(tmp_path, keep=2)
    flip(run.directory / "step-00000002" / "main.safetensors", 70)
    run.save(3)
    assert run.names() == ["step-00000001", "step-00000002", "step-00000003"]
    run.save(4)
    assert run.names() == ["step-00000003", "step-00000004"]


def test_a_failing_pruning_does_not_fail_the_save(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=1)
    run.save(1)
    calls: list[int] = []

    def failing_third() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.EIO, "Input/output error")

    run.fence = failing_third
    assert run.save(2)[0].written
    assert "older checkpoints were not removed" in run.warnings[0]


def test_all_is_durable_before_the_rename_and_the_rename_before_the_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, keep=1)
    run.save(1)
    log: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        log.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        log.append(("rename", str(path)))
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    run.save(2)
    (committed, temporary), (pruned, _) = [(i, p) for i, (what, p) in enumerate(log) if what == "rename"]
    files = [path.name for path in (run.directory / "step-00000002").iterdir()]
    assert len(files) == 4
    before = {path for what, path in log[:committed]}
    assert before >= {temporary, *(f"{temporary}/{name}" for name in files)}
    assert log[committed - 1] == ("fsync", temporary)
    assert ("fsync", str(run.directory)) in log[committed:pruned]
    assert log[pruned][1] == str(run.directory / "step-00000001")


def test_clean_removes_what_an_interrupted_save_left(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    run.save(1)
    leftover = run.directory / ".step-00000002.abc.tmp"
    leftover.mkdir()
    (leftover / "main.safetensors").write_bytes(b"half")
    run.on_all(lambda rank, store: store.clean())
    assert run.names() == ["step-00000001"]


# Killed at any point: one process imports torch, then forks a writer for each kill.

KILLER = textwrap.dedent(
    """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    from ddpkit.checkpoint import contents
    from ddpkit.checkpoint.store import CheckpointStore, Snapshot

    class Alone:
        rank, world_size = 0, 1
        def conclude(self, name, value, conclusion):
            return conclusion([value])

    def store(directory):
        return CheckpointStore(directory, 2, Alone(), lambda *a, **k: None, bad.append, lambda: None)

    def take(step):
        state = {f"w{i}": torch.full((500,), float(step)) for i in range(4)}
        return contents.take(Snapshot({"step": step}, state, {"step": step}, {"rng": torch.tensor(step)}), 0, 1)

    def check(found):
        assert not bad, bad
        step = 0 if found is None else found.step
        if found is not None:
            assert found.progress == found.main == {"step": step} and found.own["rng"].item() == step
            assert all((w == step).all() for w in found.replicated.values()) and len(found.replicated) == 4
        return step

    def forked(action):
        pid = os.fork()
        if pid == 0:
            try:
                action()
                os._exit(0)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(3)
        return pid

    def ended(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def one_save_killed_at(directory, event):
        seen = [0]
        def count(name, *args):
            if name.startswith(("os.", "open", "shutil.", "fsync")):
                seen[0] += 1
                if seen[0] == event:
                    os.kill(os.getpid(), signal.SIGKILL)
        fsync = os.fsync
        def counted_fsync(descriptor):
            count("fsync")
            fsync(descriptor)
            count("fsync")
        os.fsync = counted_fsync
        sys.addaudithook(count)
        one = store(directory)
        one.clean()
        step = check(one.load_newest())
        one.save(step + 1, lambda: take(step + 1))

    def saves_for_ever(directory):
        one = store(directory)
        one.clean()
        step = check(one.load_newest())
        while True:
            step += 1
            one.save(step, lambda: take(step))

    def reached(directory):
        return max((int(path.name[5:]) for path in directory.glob("step-*")), default=0)

    def newest(directory):
        return check(store(directory).load_newest(read_only=True))

    bad = []
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    assert ended(forked(lambda: [store(root / "every").save(step, lambda: take(step)) for step in (1, 2)])) == 0
    event, before = 0, 2
    while True:  # at every file operation of clean, load, save and prune, one after the other
        event += 1
        code = ended(forked(lambda: one_save_killed_at(root / "every", event)))
        after = newest(root / "every")
        assert after in (before, before + 1), (event, before, after)
        before = after
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
    assert event > 30 and before > 4, (event, before)
    draw = random.Random(0)
    half_written, before = 0, 0
    for _ in range(15):  # at random moments
        pid = forked(lambda: saves_for_ever(root / "random"))
        deadline = time.monotonic() + 60
        while reached(root / "random") <= before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        half_written += any(True for _ in (root / "random").glob(".*.tmp"))
        after = newest(root / "random")
        assert after >= before, (before, after)
        before = after
    assert before > 3 and half_written, (before, half_written)
    """
)


def test_killed_at_any_point_a_save_leaves_one_of_the_two_states(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_what_the_command_line_needs_imports_no_torch() -> None:
    code = "import ddpkit.checkpoint.claim, ddpkit.checkpoint.listing, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
