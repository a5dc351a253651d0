"""Saving, loading and verifying 512 MB."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ddpkit.checkpoint import manifest
from ddpkit.checkpoint.store import CheckpointStore, Snapshot
from tests.bench.measure import Bar, Measurement, Row, in_turn, seconds

_TENSORS, _ELEMENTS = 32, 4 << 20  # of float32: 512 MB


class _Alone:
    rank, world_size = 0, 1

    def exchange(self, name: str, value: Any) -> list[Any]:
        return [value]


def _rows(repeats: int) -> list[Row]:
    """One rank on this machine's disk; what was written before is dropped from the page cache nowhere."""
    state = {f"layer.{index}": torch.randn(_ELEMENTS) for index in range(_TENSORS)}
    folder = Path(tempfile.mkdtemp(dir="."))
    try:
        return _measured(state, folder, repeats)
    finally:
        shutil.rmtree(folder)


def _measured(state: dict[str, torch.Tensor], folder: Path, repeats: int) -> list[Row]:
    store = CheckpointStore(folder / "ours", 1, _Alone(), _ignore, _ignore, _ignore)
    peer, step = folder / "peer.pt", iter(range(1, 10**6))
    size = sum(tensor.nbytes for tensor in state.values()) / 1e9

    def save() -> None:
        number = next(step)
        store.save(number, Snapshot({"step": number}, {"model": state}, {"model": {}}, None))

    def save_peer() -> None:
        with peer.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    saved = in_turn({"ours": lambda: size / seconds(save), "peer": lambda: size / seconds(save_peer)}, repeats)

    def load() -> None:
        loaded = store.load_newest()
        assert loaded is not None  # it has just been saved
        _copy(loaded.replicated["model"], state)

    def load_peer() -> None:
        _copy(torch.load(peer, mmap=True, weights_only=True), state)

    newest = max((folder / "ours").glob("step-*"))
    loaded = in_turn(
        {
            "both": lambda: seconds(load),
            "verify": lambda: seconds(lambda: manifest.verify(newest)),
            "peer": lambda: seconds(load_peer),
        },
        repeats,
    )
    alone = [both - verify for both, verify in zip(loaded["both"], loaded["verify"], strict=True)]
    verifying = [size / each / (os.cpu_count() or 1) for each in loaded["verify"]]
    return [
        Row("save, to durable", "GB/s", saved["ours"], Bar(1.0, at_least=True), "torch.save+fsync", saved["peer"]),
        Row("load, without verification", "s", alone, Bar(1.2), "torch.load(mmap)", loaded["peer"]),
        Row("verification, per core", "GB/s", verifying, Bar(2.0, of="ours", at_least=True)),
    ]


def _copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _ignore(*_: object, **__: object) -> None:
    return None


MEASUREMENTS: dict[str, Measurement] = {"checkpoint": _rows}
