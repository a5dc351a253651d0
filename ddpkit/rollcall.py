"""Who is where: asked of all ranks when a collective has timed out.

gloo's own message names no rank. So the rank that gave up asks, and a thread beside each rank answers with the line
that its main thread is at, whatever that one is doing; only a process that is stopped stays silent.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from torch._C._distributed_c10d import Store  # where torch.distributed has it from, with its type

from ddpkit.errors import DdpkitError

_ASKED = "rollcall/asked"
_WAIT_S = 2.0  # the threads look every fifth of a second
# With the separator: the user's own folder may begin with the same letters.
_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS = str(Path(__file__).parent) + os.sep


class CollectiveTimeout(DdpkitError):
    """Some ranks did not come to a collective in time; the message says where they are instead."""


def answer(store: Store, rank: int) -> bool:
    """Say where this process's main thread is, if somebody has asked; True if so."""
    if not store.check([_ASKED]):
        return False
    store.set(f"rollcall/{rank}", json.dumps(_place()))
    return True


def call(store: Store, rank: int, world_size: int, timeout_s: float) -> CollectiveTimeout:
    """Ask every other rank, wait for the answers for a moment, and put them into one error."""
    store.set(_ASKED, "")
    others = [other for other in range(world_size) if other != rank]
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline and not store.check([f"rollcall/{other}" for other in others]):
        time.sleep(0.05)
    lines, waiting = [], [rank]
    for other in others:
        if not store.check([f"rollcall/{other}"]):
            lines.append(f"rank {other} gives no answer: stopped, or out of reach")
            continue
        waits, place = json.loads(store.get(f"rollcall/{other}"))
        if waits:
            waiting.append(other)
        else:
            lines.append(f"rank {other} is at {place}")
    late = "; ".join(lines) or "all ranks wait, in different collectives: they have parted ways"
    return CollectiveTimeout(
        f"a collective did not complete within {timeout_s:g} s (launch.timeout_s). {late}. "
        f"Waiting: rank(s) {', '.join(map(str, sorted(waiting)))}."
    )


def _place() -> tuple[bool, str]:
    """Whether the main thread waits (inside torch, or for others as we do), and the user's line that it is at."""
    ident = threading.main_thread().ident
    frame = sys._current_frames().get(ident) if ident is not None else None
    if frame is None:
        return False, "its end"
    stack = traceback.extract_stack(frame)
    users = [each for each in stack if not each.filename.startswith((_TORCH, _OURS, "<"))]
    at = users[-1] if users else stack[-1]
    return stack[-1].filename.startswith((_TORCH, _OURS)), f"{at.filename}:{at.lineno} in {at.name}: {at.line}"
