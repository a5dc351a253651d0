"""What the rows have in common: a measured row, processes timed from the outside, pairs run in turn."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class Row:
    """One line of the table. Values are medians; ``bar`` is what ``ratio``, or ``ours`` without a peer, may reach.

    ``at_least`` turns the bar around: more is better.
    """

    name: str
    unit: str
    ours: float
    peer_name: str | None
    peer: float | None
    n: int
    spread: str
    bar: float
    at_least: bool = False

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's."""
        return None if self.peer is None else self.ours / self.peer

    @property
    def reaches(self) -> bool:
        """Whether the bar is reached."""
        measured = self.ours if self.ratio is None else self.ratio
        return measured >= self.bar if self.at_least else measured <= self.bar


def in_turn(actions: dict[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Each action's results, taken A B A B ..., so that a machine that changes speed changes it for all."""
    found: dict[str, list[T]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            found[name].append(action())
    return found


def spread(values: Sequence[float]) -> str:
    """Smallest and largest."""
    return f"{min(values):.3g}..{max(values):.3g}"


def compare(
    name: str,
    unit: str,
    ours: Sequence[float],
    peer_name: str,
    peer: Sequence[float],
    bar: float,
    at_least: bool = False,
) -> Row:
    """A row of medians."""
    return Row(
        name,
        unit,
        statistics.median(ours),
        peer_name,
        statistics.median(peer),
        len(ours),
        f"{spread(ours)} / {spread(peer)}",
        bar,
        at_least,
    )


@dataclass(frozen=True)
class Started:
    """One start of a program: seconds to its mark, and CPU seconds of its whole tree."""

    to_mark: float
    cpu: float


def start(command: Sequence[str], timeout_s: float = 180.0) -> Started:
    """Run a command whose program writes time.monotonic() to the file that ``{mark}`` stands for."""
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "mark"
        argv = [part.replace("{mark}", str(mark)) for part in command]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begun = time.monotonic()
        done = subprocess.run(
            argv, timeout=timeout_s, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Not by the exit code: with gloo a plain script now and then aborts on its way out, after the measured step.
        if not mark.exists():
            raise RuntimeError(f"{argv} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Started(float(mark.read_text()) - begun, cpu)


def tool(name: str) -> str:
    """A console script of this environment."""
    return str(Path(sys.executable).with_name(name))
