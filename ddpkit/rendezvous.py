"""Where ranks find each other: the key-value store under the process group.

Nobody's rank owns the store if a launcher of ours is there: its node process serves it, on a socket that was
bound before anything started (no port race; on one machine it listens on the loopback alone), so a rank that leaves
early cannot strand the others. Under another launcher the store is that launcher's, or rank zero's.

torch is imported inside the functions that need it: launchers bind the socket, and have no torch.
"""

from __future__ import annotations

import errno
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from ddpkit.errors import UserError
from ddpkit.world import World

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, TCPStore  # where torch.distributed has them from, with types


def listen(address: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """Bind and listen, for `serve` to use later, perhaps in a child. Port 0: any free one."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(2048)
    return listener


def serve(listener: socket.socket) -> TCPStore:
    """Serve a store on a socket from `listen`; it lives as long as the returned object does."""
    from torch._C._distributed_c10d import TCPStore

    address, port = listener.getsockname()
    return TCPStore(address, port, None, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def host(world: World) -> TCPStore | None:
    """Serve the store if that falls to this rank: to rank zero, where no launcher serves it. Keep what is returned.

    Raises:
        UserError: the port that rank zero was told to serve on is taken.
    """
    if world.world_size == 1 or world.agent_store or not world.is_main:
        return None
    assert world.master_addr is not None and world.master_port is not None  # World checks it
    return serve(_listen_as_master(world.master_addr, world.master_port))


def connect(world: World, timeout_s: float) -> Store:
    """Open a connection to the store of this attempt; a client must not be shared between threads.

    Args:
        world: who this rank is; a single process gets a store within itself.
        timeout_s: how long to wait for the store to appear, in seconds; also the default of its operations.
    """
    from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

    if world.world_size == 1:
        return HashStore()
    assert world.master_addr is not None and world.master_port is not None  # World checks it
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(world.master_addr, world.master_port, is_master=False, timeout=timeout)
    # A prefix for each attempt: after a restart no rank may read what the one before has left.
    return PrefixStore(f"ddpkit/{world.restart_count}", store)


def _listen_as_master(address: str, port: int) -> socket.socket:
    try:
        return listen(address, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"MASTER_PORT={port} on {address} is taken by another process: choose a free one, or let a "
                "launcher choose (ddpkit launch)"
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:  # the address reaches this host without being one of its own (NAT)
            return listen("0.0.0.0", port)
        raise UserError(f"MASTER_ADDR={address}: rank 0 cannot listen on it: {error.strerror or error}") from error
