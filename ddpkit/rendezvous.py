"""Where ranks find each other: the key-value store under the process group.

Nobody's rank owns the store if a launcher of ours is there: its node process serves it, on a socket that was
bound before anything started (no port race; on one machine it listens on the loopback alone), so a rank that leaves
early cannot strand the others. Under another launcher the store is that launcher's, or rank zero's. Where nobody has
named a port (Slurm, MPI), every rank derives the same few candidates from the job's name. Rank zero puts a `_Signpost`
on the first that is free; by what that says the others know it from another job's, or from any other server.

torch is imported inside the functions that need it: launchers bind the socket, and have no torch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from ddpkit.errors import DdpkitError, UserError
from ddpkit.world import World

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, TCPStore  # where torch.distributed has them from, with types

_PORTS = range(10_000, 32_768)  # below those that the kernel gives to connections
_CANDIDATES = 16  # a node with so many jobs at once whose names lead to the same ports is not to be expected
_PROBE_S = 3.0  # for an answer; what listens on a candidate may be something else, and silent
_PAUSE_S = 0.1
_PARTING_S = 5.0  # rank zero must not wait long for a rank that has died at the very end
_PARTING_PAUSE_S = 0.01
_PREFIX = "ddpkit"
_LEFT = "left"


class NoMeeting(DdpkitError):
    """Rank zero could not be found in time."""


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


@contextlib.contextmanager
def hosting(world: World) -> Iterator[None]:
    """Serve the store if that falls to this rank: to rank zero, where no launcher serves it.

    Leaving without an error is collective: rank zero stays until the others have used the store for the last time.

    Raises:
        UserError: the port that rank zero was told to serve on is taken.
    """
    if world.world_size == 1 or world.agent_store:
        yield
        return
    if not world.is_main:
        with _at_orderly_end(lambda: _part(world)):
            yield
        return
    assert world.master_addr is not None  # World checks it
    with contextlib.ExitStack() as stack:
        if world.master_port is not None:
            kept = serve(_listen_as_master(world.master_addr, world.master_port))
        else:
            assert world.job is not None  # as above
            kept = serve(stack.enter_context(meeting_point(world.master_addr, world.job)))
        stack.enter_context(_at_orderly_end(partial(_await_others, world, kept)))
        yield


@contextlib.contextmanager
def meeting_point(address: str, job: str) -> Iterator[socket.socket]:
    """Listen at ``address``, on a port to which `find` leads those who know ``job``, and nobody else.

    Raises:
        UserError: this machine does not have that address, or has no port left for it.
    """
    ports = candidates(job)
    post = listen_on_any(address, ports)
    with listen_on_any(address, ports) as listener, _Signpost(post, job, listener.getsockname()[1]):
        yield listener


@contextlib.contextmanager
def _at_orderly_end(part: Callable[[], object]) -> Iterator[None]:
    leaving: SystemExit | None = None
    try:
        yield
    except SystemExit as error:  # an agreed stop
        leaving = error
    with contextlib.suppress(OSError, RuntimeError, NoMeeting):  # the work is done; torch's errors are RuntimeErrors
        part()
    if leaving is not None:
        raise leaving


def _part(world: World) -> None:
    """Let rank zero go, and wait until its store has: a script may enter a runtime again, and must not find this one.

    A connection that says nothing ends when the store does.
    """
    assert world.master_addr is not None  # World checks it
    port = _port(world, _PARTING_S)
    with socket.create_connection((world.master_addr, port), timeout=_PARTING_S) as held:
        connect(world, _PARTING_S).add(_LEFT, 1)
        held.recv(1)


def _await_others(world: World, store: TCPStore) -> None:
    deadline = time.monotonic() + _PARTING_S
    while store.add(f"{_PREFIX}/0/{_LEFT}", 0) < world.world_size - 1 and time.monotonic() < deadline:
        time.sleep(_PARTING_PAUSE_S)


def connect(world: World, timeout_s: float) -> Store:
    """Open a connection to the store of this attempt; a client must not be shared between threads.

    Args:
        world: who this rank is; a single process gets a store within itself.
        timeout_s: how long to wait for the store to appear, in seconds; also the default of its operations.

    Raises:
        NoMeeting: rank zero serves none on any port that it can be expected on.
    """
    from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

    if world.world_size == 1:
        return HashStore()
    assert world.master_addr is not None  # World checks it
    store = TCPStore(world.master_addr, _port(world, timeout_s), is_master=False, timeout=timedelta(seconds=timeout_s))
    # A launcher's store outlives an attempt: after a restart no rank may read what the one before has left. (A store
    # of rank zero's does not, and the agents of several nodes do not always count alike.)
    return PrefixStore(f"{_PREFIX}/{world.restart_count if world.agent_store else 0}", store)


def _port(world: World, timeout_s: float) -> int:
    if world.master_port is not None:
        return world.master_port
    assert world.master_addr is not None and world.job is not None  # World checks it
    return find(world.master_addr, world.job, timeout_s)


def candidates(job: str) -> list[int]:
    """The ports on which rank zero of ``job`` may be, in the order in which it tries them."""
    drawn = hashlib.shake_128(job.encode()).digest(4 * _CANDIDATES)
    numbers = [int.from_bytes(drawn[at : at + 4], "big") for at in range(0, len(drawn), 4)]
    return list(dict.fromkeys(_PORTS[number % len(_PORTS)] for number in numbers))


class _Signpost:
    """A port that tells everyone who connects whose it is, and the port of that job's store.

    Not the store itself: a client of torch's that has connected to anything else waits for ever, whatever its timeout.
    """

    def __init__(self, listener: socket.socket, job: str, port: int) -> None:
        self._listener = listener
        self._text = json.dumps({"job": job, "port": port}).encode() + b"\n"
        self._thread = threading.Thread(target=self._tell, name="ddpkit-signpost", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _tell(self) -> None:
        while True:
            try:
                asking, _ = self._listener.accept()
            except ConnectionAbortedError:
                continue
            except OSError:
                return  # shut down
            with asking, contextlib.suppress(OSError):
                asking.sendall(self._text)


def find(address: str, job: str, timeout_s: float) -> int:
    """The port of the `meeting_point` of ``job``, once that is there.

    Raises:
        NoMeeting: it was not there in time.
    """
    ports = candidates(job)
    deadline = time.monotonic() + timeout_s
    while True:
        for port in ports:
            if (found := _ask(address, port, job)) is not None:
                return found
        if time.monotonic() > deadline:
            raise NoMeeting(
                f"rank 0 of {job} was not found at {address} within {timeout_s:g} s, on any of the ports "
                f"{', '.join(map(str, ports))}: it has not started, or something between the nodes blocks the way. "
                "Set MASTER_ADDR and MASTER_PORT to choose another."
            )
        time.sleep(_PAUSE_S)


def _ask(address: str, port: int, job: str) -> int | None:
    """What the signpost of ``job`` says, if that is what listens there."""
    try:
        with (
            socket.create_connection((address, port), timeout=_PROBE_S) as connection,
            connection.makefile("rb") as said,
        ):
            told = json.loads(said.readline(4096))
        return int(told["port"]) if told["job"] == job else None
    except (OSError, ValueError, TypeError, KeyError):  # nobody, or somebody with other words
        return None


def listen_on_any(address: str, ports: list[int]) -> socket.socket:
    """Listen on the first of ``ports`` that is free.

    Raises:
        UserError: none is, or this machine does not have that address.
    """
    for port in ports:
        try:
            return _bind(address, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"{address}: rank 0 cannot listen on it: {error.strerror or error}") from error
    raise UserError(
        f"{address}: all ports that this job may use are taken: {', '.join(map(str, ports))}. Set MASTER_PORT to a "
        "free one."
    )


def _listen_as_master(address: str, port: int) -> socket.socket:
    try:
        return _bind(address, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"MASTER_PORT={port} on {address} is taken by another process: choose a free one, or let a "
                "launcher choose (ddpkit launch)"
            ) from error
        raise UserError(f"MASTER_ADDR={address}: rank 0 cannot listen on it: {error.strerror or error}") from error


def _bind(address: str, port: int) -> socket.socket:
    try:
        return listen(address, port)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:  # the address reaches this host without being one of its own (NAT)
            return listen("0.0.0.0", port)
        raise
