"""The end of the first optimizer step of a small DDP model; the same script under every launcher."""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def train(mark: str) -> None:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(16, 32)).square().mean().backward()
    optimizer.step()
    if dist.get_rank() == 0:
        Path(mark).write_text(str(time.monotonic()))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
