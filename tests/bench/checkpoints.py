"""Saving, loading and verifying 512 MB: a model of 171 MB and the two moments that AdamW keeps of it."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import async_save

import ddpkit
from ddpkit.checkpoint import manifest
from ddpkit.checkpoint.store import CheckpointStore
from ddpkit.testing import run_ranks
from tests.bench.measure import Row, compare, in_turn, spread

_LAYERS, _WIDTH = 41, 1024  # of float32: 4 MB a layer
_BYTES = 3 * _LAYERS * (_WIDTH**2 + _WIDTH) * 4


def rows(repeats: int) -> list[Row]:
    """On this machine's disk; what was written before is still in the page cache, for all."""
    with _folder() as folder:
        return [*_stalls(folder, repeats), *_durable(folder, repeats), *_loads(folder, repeats)]


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir="."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(_LAYERS)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


# ---------------------------------------------------------------------- how long training is held


def _stalls(folder: Path, repeats: int) -> list[Row]:
    (found,) = run_ranks(_held, 1, str(folder / "held"), repeats, timeout_s=300)
    ours = found["ours"]
    return [
        compare("save, stall of training", "s", ours, "memcpy into warm memory", found["memcpy"], 1.3),
        compare("save, stall of training", "s", ours, "dcp.async_save", found["dcp"], 0.5),
    ]


def _held(folder: str, repeats: int) -> dict[str, list[float]]:
    """The first of each is left out: its memory is not there yet."""
    model, optimizer = _trained()
    flat, buffer = torch.ones(_BYTES, dtype=torch.uint8), torch.ones(_BYTES, dtype=torch.uint8)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    peers = iter(range(10**6))

    def peer() -> float:
        target = f"{folder}-dcp-{next(peers)}"
        begun = time.perf_counter()
        future: Any = async_save(state, checkpoint_id=target)
        held = time.perf_counter() - begun
        future.result()
        shutil.rmtree(target)
        return held

    with ddpkit.runtime() as rt:
        run = rt.resume(folder, every_steps=1, keep=1, model=model, optimizer=optimizer)

        def ours() -> float:
            held = _seconds(run.step)
            while any(thread.name == "ddpkit-save" for thread in threading.enumerate()):
                time.sleep(0.01)
            return held

        actions = {"ours": ours, "memcpy": lambda: _seconds(lambda: buffer.copy_(flat)), "dcp": peer}
        return {name: values[1:] for name, values in in_turn(actions, repeats + 1).items()}


# ---------------------------------------------------------------------- how soon it is on the disk


def _durable(folder: Path, repeats: int) -> list[Row]:
    peer = run_ranks(_save_by_torch, 1, str(folder / "peer.pt"), repeats, timeout_s=300)[0]
    rows = []
    for ranks in (1, 2):
        run_dir = folder / f"durable-{ranks}"
        run_ranks(_save, ranks, str(run_dir), repeats, timeout_s=300)
        events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
        ours = [event["bytes"] / 1e9 / event["seconds"] for event in events if event["event"] == "saved"]
        name = f"save, to durable, {ranks} rank{'s' * (ranks > 1)} together"
        rows.append(compare(name, "GB/s", ours[1:], "torch.save+fsync", peer, 1.0, at_least=True))
        if ranks > 1:
            shutil.rmtree(run_dir)
    return rows


def _save(run_dir: str, repeats: int) -> None:
    model, optimizer = _trained()
    with ddpkit.runtime() as rt:
        run = rt.resume(run_dir, every_steps=1, keep=1, asynchronous=False, model=model, optimizer=optimizer)
        for _ in range(repeats + 1):
            run.step()


def _save_by_torch(path: str, repeats: int) -> list[float]:
    model, optimizer = _trained()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def save() -> None:
        with Path(path).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    save()
    return [_BYTES / 1e9 / _seconds(save) for _ in range(repeats)]


# ---------------------------------------------------------------------- how soon it is back


def _loads(folder: Path, repeats: int) -> list[Row]:
    """Each in a process of its own, as a restart is: the model is there, the memory of the optimizer's state is not.

    torch maps the file, and leaves the optimizer's two thirds of it to be read by the first step. So there is a second
    pair of figures, up to where all of it can be written to.
    """
    run_dir, peer = str(folder / "durable-1"), str(folder / "peer.pt")
    actions = {
        "ours": lambda: run_ranks(_restore, 1, run_dir)[0],
        "peer": lambda: run_ranks(_restore_by_torch, 1, peer)[0],
    }
    found: dict[str, list[dict[str, float]]] = in_turn(actions, repeats)
    ours = {key: [each[key] for each in found["ours"]] for key in ("load", "ready", "verify")}
    theirs = {key: [each[key] for each in found["peer"]] for key in ("load", "ready")}
    verified = [_BYTES / 1e9 / seconds for seconds in ours["verify"]]
    return [
        compare("load, until it returns", "s", ours["load"], "torch.load(mmap)", theirs["load"], 1.2),
        compare("load, until all can be written to", "s", ours["ready"], "torch.load(mmap)", theirs["ready"], 1.2),
        Row(
            "verification, per core",
            "GB/s",
            statistics.median(verified),
            None,
            None,
            repeats,
            spread(verified),
            2.0,
            True,
        ),
    ]


def _restore(run_dir: str) -> dict[str, float]:
    model, optimizer = _fresh()
    # One file holds all but some bytes of it, and one core hashes it.
    newest = max(Path(run_dir).glob("checkpoints/step-*"))
    verify = min(_seconds(lambda: manifest.verify(newest)) for _ in range(2))
    with ddpkit.runtime() as rt:
        store = CheckpointStore(newest.parent, 1, rt.ranks, _ignore, _ignore, _ignore)
        begun = time.perf_counter()
        loaded = store.load_newest(read_only=True, into={"model": dict(model.named_parameters())})
        assert loaded is not None  # it has just been saved
        model.load_state_dict({**loaded.replicated["model"], **loaded.main["model"]})
        optimizer.load_state_dict(loaded.replicated["optimizer"])
        load = time.perf_counter() - begun - verify
        return {"verify": verify, "load": load, "ready": load + _written_to(model, optimizer)}


def _restore_by_torch(path: str) -> dict[str, float]:
    model, optimizer = _fresh()
    begun = time.perf_counter()
    loaded = torch.load(path, mmap=True, weights_only=True)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    load = time.perf_counter() - begun
    return {"load": load, "ready": load + _written_to(model, optimizer)}


def _fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(_LAYERS)))
    return model, torch.optim.AdamW(model.parameters())


def _written_to(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    def touch() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                for tensor in (parameter, *optimizer.state[parameter].values()):
                    tensor.mul_(1)

    return _seconds(touch)


def _seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _ignore(*_: object, **__: object) -> None:
    return None
