"""Saving, loading and verifying 512 MB."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ddpkit.checkpoint import contents, manifest
from ddpkit.checkpoint.store import CheckpointStore, Snapshot
from tests.bench.measure import Row, compare, in_turn, spread

_TENSORS, _ELEMENTS = 32, 4 << 20  # of float32: 512 MB


class _Alone:
    rank, world_size = 0, 1

    def exchange(self, name: str, value: Any) -> list[Any]:
        return [value]


def rows(repeats: int) -> list[Row]:
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
        snapshot = Snapshot({"step": number}, {"model": state}, {"model": {}}, None)
        store.save(number, lambda: contents.take(snapshot, 0, 1))

    def save_peer() -> None:
        with peer.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    saved = in_turn({"ours": lambda: size / _seconds(save), "peer": lambda: size / _seconds(save_peer)}, repeats)

    def load() -> None:
        loaded = store.load_newest()
        assert loaded is not None  # it has just been saved
        _copy(loaded.replicated["model"], state)

    def load_peer() -> None:
        _copy(torch.load(peer, mmap=True, weights_only=True), state)

    newest = max((folder / "ours").glob("step-*"))
    loaded = in_turn(
        {
            "both": lambda: _seconds(load),
            "verify": lambda: _seconds(lambda: manifest.verify(newest)),
            "peer": lambda: _seconds(load_peer),
        },
        repeats,
    )
    alone = [both - verify for both, verify in zip(loaded["both"], loaded["verify"], strict=True)]
    verifying = [size / seconds / (os.cpu_count() or 1) for seconds in loaded["verify"]]
    return [
        compare("save, to durable", "GB/s", saved["ours"], "torch.save+fsync", saved["peer"], 1.0, at_least=True),
        compare("load, without verification", "s", alone, "torch.load(mmap)", loaded["peer"], 1.2),
        Row(
            "verification, per core",
            "GB/s",
            sorted(verifying)[repeats // 2],
            None,
            None,
            repeats,
            spread(verifying),
            2.0,
            at_least=True,
        ),
    ]


def _copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _ignore(*_: object, **__: object) -> None:
    return None
