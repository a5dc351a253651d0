"""Distributed training as it is written by hand: `python examples/before_after/before.py [RANKS]`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from signals import Net, Signals

EPOCHS = 3
BATCH_SIZE = 32


def train(rank: int, world_size: int) -> None:
    """What each rank does."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29400")  # hopefully free
    has_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if has_gpu else "gloo", rank=rank, world_size=world_size)
    device = torch.device("cuda", rank) if has_gpu else torch.device("cpu")

    torch.manual_seed(0)
    model = DistributedDataParallel(Net().to(device), device_ids=[rank] if has_gpu else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    dataset = Signals(512)
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=BATCH_SIZE // world_size, sampler=sampler)

    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)  # forgotten, every epoch has the order of the first
        for signals, labels in loader:
            loss = nn.functional.cross_entropy(model(signals.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch}: loss {loss.item():.6f}")
            Path("runs").mkdir(exist_ok=True)
            torch.save(model.module.state_dict(), "runs/signals.pt")  # killed here, it is half a file

    dist.barrier()  # or the others leave while rank zero saves, and with gloo may abort on their way out
    del model  # DDP has to go before the group
    dist.destroy_process_group()


if __name__ == "__main__":
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else max(2, torch.cuda.device_count())
    mp.spawn(train, args=(ranks,), nprocs=ranks)
