"""Whether ranks can talk: first with rank zero's store, then each with each, then all together. For `ddpkit doctor`."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore  # where torch.distributed has it from, with its type

from ddpkit import rendezvous, world
from ddpkit.agree import AGREEMENTS, Ranks
from ddpkit.errors import DdpkitError
from ddpkit.session import choose_device
from ddpkit.world import World

# All within 30 s: what fails early ends the examination.
_MEET_S = 10.0
_STORE_S = 5.0  # of somebody who listens
_CONNECT_S = 3.0
_PAUSE_S = 0.1
_TOGETHER_S = 8.0
_AT_ONCE = 32
_ALL_PAIRS = 64  # with more ranks, the first of each node speaks for it


class Unreachable(DdpkitError):
    """This rank cannot reach rank zero's store."""


def check(me: World | None = None) -> list[str]:
    """Find who cannot talk to whom. Collective.

    Args:
        me: who this rank is; by default read from the environment.

    Returns:
        A line for each problem, the same on all ranks; empty if there is none.

    Raises:
        Unreachable: this rank cannot reach rank zero.
        RanksMissing: other ranks have not come within 10 s; the message names them.
    """
    me = me or World.from_env()
    with ExitStack() as stack:
        stack.enter_context(rendezvous.hosting(me))
        _knock(me)
        try:
            # Where no port is named, nobody has waited for rank zero yet.
            patience_s = _MEET_S if me.master_port is None else _STORE_S
            store = PrefixStore("doctor", rendezvous.connect(me, patience_s))
        except (rendezvous.NoMeeting, dist.DistError) as error:
            raise _unreachable(me, f": {_in_words(error)}") from error
        ranks = Ranks(me, PrefixStore(AGREEMENTS, store))
        address = own_address(me)
        port = stack.enter_context(_listening(address))
        told = ranks.exchange("the roll-call", [[me.host, address, port], _wrong_interface(me)], _MEET_S)
        offers = [offer for offer, _ in told]
        if wrong := [line for _, line in told if line is not None]:
            return list(dict.fromkeys(wrong))  # one for each machine
        failed = [line for lines in ranks.exchange("pairs", _try_all(me, offers), 2 * _MEET_S) for line in lines]
        if not failed:
            failed = [line for line in ranks.exchange("group", _try_together(me, store), 2 * _MEET_S) if line]
        ranks.barrier("leave", _MEET_S)
    return failed


def _knock(me: World) -> None:
    """Find what torch would find out late, and say at length: that there is no such name, or nobody there."""
    if me.master_addr is None:
        return
    try:
        socket.getaddrinfo(me.master_addr, None)
    except OSError as error:
        why = f": that name leads nowhere ({error.strerror}). Set MASTER_ADDR to an address"
        raise _unreachable(me, why) from error
    if me.master_port is None:
        return  # the ports that may be it are tried by the rendezvous itself
    deadline = time.monotonic() + _MEET_S
    while True:
        try:
            socket.create_connection((me.master_addr, me.master_port), timeout=_CONNECT_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise _unreachable(me, f" within {_MEET_S:g} s: {error.strerror or error}{_why_not(error)}") from error
        time.sleep(_PAUSE_S)


def _why_not(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return ". Nobody listens there: rank 0 has not started, or has another address"
    return ". Nothing answers there: the address is wrong, or something in between blocks the way"


def _unreachable(me: World, why: str) -> Unreachable:
    where = f"{me.master_addr}:{me.master_port}" if me.master_port else me.master_addr
    return Unreachable(f"rank {me.rank} on {me.host} cannot reach rank 0 at {where}{why}")


def _in_words(error: Exception) -> str:
    if "Ping failed" in str(error):
        return "what listens there is no store of torch's, but something else: another program, or a proxy in between"
    return str(error).partition("\n")[0]


def _wrong_interface(me: World) -> str | None:
    """gloo would say so in its own words, on every rank."""
    chosen = world.environment().get("GLOO_SOCKET_IFNAME", "")
    there = psutil.net_if_addrs()
    missing = [name for name in chosen.split(",") if name and name not in there]
    if not missing:
        return None
    return f"GLOO_SOCKET_IFNAME={chosen}: {me.host} has no network interface {missing[0]}; it has {', '.join(there)}"


def own_address(me: World) -> str:
    """The address that gloo gives to other ranks: of the chosen interface, or of the host's name."""
    chosen = world.environment().get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    for each in psutil.net_if_addrs().get(chosen, ()):
        if each.family == socket.AF_INET:
            return each.address
    if me.nnodes == 1:
        return "127.0.0.1"
    try:
        return socket.gethostbyname(me.host)
    except OSError:
        return "0.0.0.0"  # nobody can connect to that; the report says whose it is


@contextlib.contextmanager
def _listening(address: str) -> Iterator[int]:
    """Take connections on ``address``, doing nothing with them; gives the port."""
    with rendezvous.listen(address) as listener:
        thread = threading.Thread(target=_take_all, args=(listener,), daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _take_all(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):  # until it is shut down
        while True:
            listener.accept()[0].close()


def _try_all(me: World, offers: list[tuple[str, str, int]]) -> list[str]:
    step = 1 if me.world_size <= _ALL_PAIRS else me.local_world_size
    if me.rank % step:
        return []
    others = [rank for rank in range(0, me.world_size, step) if rank != me.rank]

    def attempt(rank: int) -> str | None:
        host, address, port = offers[rank]
        try:
            socket.create_connection((address, port), timeout=_CONNECT_S).close()
        except OSError as error:
            return (
                f"rank {me.rank} on {me.host} cannot connect to rank {rank} on {host} at {address}: "
                f"{error.strerror or error}{_advice(me, address)}"
            )
        return None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [line for line in pool.map(attempt, others) if line is not None]


def _advice(me: World, address: str) -> str:
    if me.nnodes == 1 or not address.startswith(("127.", "0.")):
        return ""
    return (
        ". That is what its host name leads to; other machines need another address: set GLOO_SOCKET_IFNAME (and "
        "NCCL_SOCKET_IFNAME) to the network interface between them"
    )


def _try_together(me: World, store: PrefixStore) -> str | None:
    """One all-reduce, by the backend that training would use."""
    backend = "auto" if torch.cuda.device_count() >= me.local_world_size else "gloo"
    device = choose_device(me, backend)
    name = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            name,
            store=PrefixStore("group", store),
            rank=me.rank,
            world_size=me.world_size,
            timeout=timedelta(seconds=_TOGETHER_S),
            device_id=device if name == "nccl" else None,
        )
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
        if int(total.item()) != me.world_size:
            return f"rank {me.rank} on {me.host}: {name}'s sum over {me.world_size} ranks is {total.item():g}"
    except RuntimeError as error:
        return f"rank {me.rank} on {me.host}: {name} failed: {str(error).splitlines()[0]}"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return None
