"""Saving, loading and verifying 512 MB: a model of 171 MB and the two moments that AdamW keeps of it."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
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
from tests.bench.measure import Bar, Measurement, Row, in_turn, seconds

_LAYERS, _WIDTH = 41, 1024  # of float32: 4 MB a layer
_COLD = 2  # saves after which memory for the file system's cache has been used before
_BYTES = 3 * _LAYERS * (_WIDTH**2 + _WIDTH) * 4


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir="."))
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


def _stalls(repeats: int) -> list[Row]:
    """Nothing that copies all of the state can hold one rank for less than a memcpy of it; ranks share it out."""
    rows = []
    for ranks in (1, 2):
        with _folder() as folder:
            found = run_ranks(_held, ranks, str(folder / "run"), repeats, timeout_s=300)[0]
        name, ours = f"save, stall of training, {_on(ranks)}", found["ours"]
        rows.append(Row(name, "s", ours, Bar(1.3), "memcpy into warm memory", found["memcpy"]))
        rows.append(Row(name, "s", ours, Bar(0.5), "dcp.async_save", found["dcp"]))
    return rows


def _on(ranks: int) -> str:
    return f"{ranks} rank{'s' * (ranks > 1)}"


def _held(folder: str, repeats: int) -> dict[str, list[float]]:
    model, optimizer = _trained()
    flat, buffer = torch.ones(_BYTES, dtype=torch.uint8), torch.ones(_BYTES, dtype=torch.uint8)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with ddpkit.runtime() as rt:
        peers = iter(range(10**6))

        def peer() -> float:
            target = f"{folder}-dcp-{next(peers)}"
            begun = time.perf_counter()
            future: Any = async_save(state, checkpoint_id=target)
            held = time.perf_counter() - begun
            future.result()
            rt.barrier("written")
            if rt.is_main:
                shutil.rmtree(target)
            return held

        run = rt.resume(folder, every_steps=1, keep=1, model=model, optimizer=optimizer)

        def ours() -> float:
            held = seconds(run.step)
            while any(thread.name == "ddpkit-save" for thread in threading.enumerate()):
                time.sleep(0.01)
            rt.barrier("saved")
            return held

        actions = {"ours": ours, "memcpy": lambda: seconds(lambda: buffer.copy_(flat)), "dcp": peer}
        return in_turn(actions, repeats)


# ---------------------------------------------------------------------- how soon it is on the disk


def _durable(ranks: int, repeats: int) -> Row:
    with _folder() as folder:
        run_dir, peer = folder / "run", str(folder / "peer.pt")
        actions = {
            "ours": lambda: _saved_by_ranks(run_dir, ranks),
            "peer": lambda: run_ranks(_save_by_torch, 1, peer)[0],
        }
        found = in_turn(actions, repeats)
    name = f"save, to durable, {_on(ranks)}"
    return Row(name, "GB/s", found["ours"], Bar(1.0, at_least=True), "torch.save+fsync", found["peer"])


def _saved_by_ranks(run_dir: Path, ranks: int) -> float:
    """Bytes a second of a save, all ranks together, until it counts: agreements and the commit included."""
    run_ranks(_save, ranks, str(run_dir))
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    shutil.rmtree(run_dir)
    saved = [event for event in events if event["event"] == "saved"]
    taken: list[float] = [event["durable_s"] for event in saved[_COLD:]]
    return _BYTES / 1e9 / statistics.median(taken)


def _save(run_dir: str, saves: int = _COLD + 3) -> None:
    model, optimizer = _trained()
    with ddpkit.runtime() as rt:
        run = rt.resume(run_dir, every_steps=1, keep=1, asynchronous=False, model=model, optimizer=optimizer)
        for _ in range(saves):
            run.step()


def _save_by_torch(path: str) -> float:
    model, optimizer = _trained()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def save() -> None:
        with Path(path).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    return _BYTES / 1e9 / statistics.median([seconds(save) for _ in range(_COLD + 3)][_COLD:])


# ---------------------------------------------------------------------- how soon it is back


def _loads(repeats: int) -> list[Row]:
    """Each in a process of its own, as a restart is: the model is there, the memory of the optimizer's state is not.

    torch maps the file, and leaves the optimizer's two thirds of it to be read by the first step. So there is a second
    pair of figures, up to where all of it can be written to.
    """
    with _folder() as folder:
        run_dir, peer = str(folder / "run"), str(folder / "peer.pt")
        run_ranks(_save, 1, run_dir, 1)
        run_ranks(_save_by_torch, 1, peer)
        actions = {
            "ours": lambda: run_ranks(_restore, 1, run_dir)[0],
            "peer": lambda: run_ranks(_restore_by_torch, 1, peer)[0],
        }
        found: dict[str, list[dict[str, float]]] = in_turn(actions, repeats)
    ours = {key: [each[key] for each in found["ours"]] for key in ("load", "ready", "verify")}
    theirs = {key: [each[key] for each in found["peer"]] for key in ("load", "ready")}
    verified = [_BYTES / 1e9 / each for each in ours["verify"]]
    return [
        Row("load, until it returns", "s", ours["load"], Bar(1.2), "torch.load(mmap)", theirs["load"]),
        Row("load, until all can be written to", "s", ours["ready"], Bar(1.2), "torch.load(mmap)", theirs["ready"]),
        Row("verification, per core", "GB/s", verified, Bar(2.0, of="ours", at_least=True)),
    ]


def _restore(run_dir: str) -> dict[str, float]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as `ddpkit launch` has it for a rank that is alone
    model, optimizer = _fresh()
    # One file holds all but some bytes of it, and one core hashes it.
    newest = max(Path(run_dir).glob("checkpoints/step-*"))
    verify = min(seconds(lambda: manifest.verify(newest)) for _ in range(2))
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
    torch.set_num_threads(len(os.sched_getaffinity(0)))
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

    return seconds(touch)


def _ignore(*_: object, **__: object) -> None:
    return None


MEASUREMENTS: dict[str, Measurement] = {
    "save-stall": _stalls,
    "save-durable": lambda repeats: [_durable(ranks, repeats) for ranks in (1, 2)],
    "load": _loads,
}
