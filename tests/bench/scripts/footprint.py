"""Trains a little, by hand or with ddpkit's loop, and says what it takes: time, memory, an agreement's time."""

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

STEPS, BATCH = 20, 16


def model():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))


def dataset(ranks):
    return TensorDataset(torch.randn(STEPS * BATCH * ranks, 32))


def by_hand(folder):
    dist.init_process_group("gloo")
    net = DistributedDataParallel(model())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    data = dataset(dist.get_world_size())
    stepped = None
    for (batch,) in DataLoader(data, BATCH, sampler=DistributedSampler(data), drop_last=True):
        net(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        stepped = stepped or time.monotonic()
    dist.barrier()
    note(folder, dist.get_rank(), stepped, 0.0, dist.barrier)
    dist.barrier()
    dist.destroy_process_group()


def with_ddpkit(folder, exchanges):
    import ddpkit

    with contextlib.ExitStack() as stack:
        rt = stack.enter_context(ddpkit.runtime())
        run_dir = rt.ranks.decide("run_dir", stack.enter_context(tempfile.TemporaryDirectory()))
        net = rt.wrap(model())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        loader = rt.loader(dataset(rt.world_size), global_batch_size=BATCH * rt.world_size)
        run = rt.resume(run_dir, every_steps=None, model=net, optimizer=optimizer, loader=loader)
        stepped = None
        for _ in run.epochs(1):
            for (batch,) in loader:
                loss = net(batch).square().mean()
                run.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                run.step(loss=loss)
                stepped = stepped or time.monotonic()
        rt.barrier("trained")
        begun = time.perf_counter()
        for _ in range(exchanges):
            rt.ranks.exchange("bench", rt.rank)
        taken = (time.perf_counter() - begun) / exchanges
        note(folder, rt.rank, stepped, taken, lambda: rt.barrier("measured"))


def note(folder, rank, stepped, exchange_s, together):
    """Memory is looked at while all are there: what they share is then shared by all."""
    own = psutil.Process().memory_full_info().pss
    everything = 0
    if rank == 0:  # the launcher, and all that it has started
        launcher = psutil.Process().parent()
        while launcher.parent() is not None and Path(launcher.name()).stem in ("python", "python3", "ddpkit"):
            above = launcher.parent()
            if not {"ddpkit", "torchrun"} & {Path(part).name for part in above.cmdline()}:
                break
            launcher = above
        everything = sum(each.memory_full_info().pss for each in (launcher, *launcher.children(recursive=True)))
    together()
    found = {"stepped": stepped, "pss": own, "all": everything, "exchange_s": exchange_s}
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    folder, kind, exchanges = sys.argv[1:]
    if kind == "ddpkit":
        with_ddpkit(folder, int(exchanges))
    else:
        by_hand(folder)
