"""Seconds per step of the same small model under a hand-written loop, ddpkit, accelerate and Fabric; run on 2 ranks.

All four live in the same processes and take turns of ten steps, in which ddpkit records one line, so that a slow moment
of the machine is everybody's. Who comes first in a round changes from round to round, and who is made first with the
number that is given.
Prints one JSON line: {name: [seconds per step in each turn]}.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import ddpkit

BATCH, STEPS = 32, 10
WARM_UP = 4  # rounds


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def dataset(world_size: int) -> TensorDataset:
    count = BATCH * world_size * 1000
    return TensorDataset(torch.randn(64, 256).repeat(count // 64, 1), torch.randint(10, (count,)))


def by_hand(data: TensorDataset) -> Iterator[None]:
    net = DistributedDataParallel(model())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    while True:
        for inputs, targets in DataLoader(data, BATCH, sampler=DistributedSampler(data), drop_last=True):
            nn.functional.cross_entropy(net(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield


def with_ddpkit(data: TensorDataset, rt: ddpkit.Runtime, folder: str) -> Iterator[None]:
    net = rt.wrap(model())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    loader = rt.loader(data, global_batch_size=BATCH * rt.world_size)
    run = rt.resume(folder, every_steps=None, model=net, optimizer=optimizer, loader=loader)
    for _ in run.epochs(10**6):
        for inputs, targets in loader:
            loss = nn.functional.cross_entropy(net(inputs), targets)
            run.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            run.step(loss=loss)
            yield


def with_accelerate(data: TensorDataset) -> Iterator[None]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    net, optimizer, loader = accelerator.prepare(net, optimizer, DataLoader(data, BATCH, shuffle=True, drop_last=True))
    while True:
        for inputs, targets in loader:
            accelerator.backward(nn.functional.cross_entropy(net(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
            yield


def with_fabric(data: TensorDataset) -> Iterator[None]:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp")
    fabric.launch()
    net = model()
    net, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))
    loader = fabric.setup_dataloaders(DataLoader(data, BATCH, shuffle=True, drop_last=True))
    while True:
        for inputs, targets in loader:
            fabric.backward(nn.functional.cross_entropy(net(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
            yield


def _beginning_with(number: int, names: list[str]) -> list[str]:
    first = number % len(names)
    return names[first:] + names[:first]


def turn(steps: Iterator[None]) -> float:
    begun = time.perf_counter()
    for _ in range(STEPS):
        next(steps)
    return (time.perf_counter() - begun) / STEPS


def main(rounds: int, first_made: int) -> None:
    with tempfile.TemporaryDirectory() as folder, ddpkit.runtime() as rt, contextlib.redirect_stdout(sys.stderr):
        data = dataset(rt.world_size)
        folder = rt.ranks.decide("folder", folder)
        loops: dict[str, Callable[[], Any]] = {
            "by hand": lambda: by_hand(data),
            "ddpkit": lambda: with_ddpkit(data, rt, folder),
            "accelerate": lambda: with_accelerate(data),
            "Fabric": lambda: with_fabric(data),
        }
        names = list(loops)
        running: dict[str, Iterator[None]] = {}
        for name in _beginning_with(first_made, names):
            running[name] = loops[name]()
            for _ in range(STEPS // 2):  # so that ddpkit's line falls into the middle of its turns
                next(running[name])
        found: dict[str, list[float]] = {name: [] for name in names}
        for number in range(-WARM_UP, rounds):
            for name in _beginning_with(number, names):
                dist.barrier()
                taken = turn(running[name])
                if number >= 0:
                    found[name].append(taken)
        for steps in running.values():
            steps.close()
    if rt.is_main:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
