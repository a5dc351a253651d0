"""`first_step`, started by torch.multiprocessing.spawn."""

import os
import socket
import sys

import torch.distributed as dist
import torch.multiprocessing as mp
from first_step import train


def rank_main(rank: int, world_size: int, port: int, mark: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    train(mark)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_main, args=(int(sys.argv[2]), port, sys.argv[1]), nprocs=int(sys.argv[2]))
