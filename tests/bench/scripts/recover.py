"""A run that marks its first step after a kill: rank 1 kills itself once, the launcher restarts the group."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if __name__ == "__main__":
    folder = Path(sys.argv[1]).parent
    killed = folder / "killed"
    is_restarted = killed.exists()  # asked once: the other rank of the killed group may still take a step after that
    dist.init_process_group("gloo")
    model = DistributedDataParallel(nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(20):
        model(torch.randn(16, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if is_restarted and dist.get_rank() == 0 and not Path(sys.argv[1]).exists():
            Path(sys.argv[1]).write_text(str(time.monotonic() - float(killed.read_text())))
        if step == 10 and dist.get_rank() == 1 and not is_restarted:
            killed.write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    dist.destroy_process_group()
