"""What the rows have in common: figures taken in turn, a bar, processes timed from the outside."""

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
from typing import Literal, TypeVar

T = TypeVar("T")

SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class Bar:
    """What a row has to reach, on one of its figures: ours over the peer's, ours less the peer's, or ours alone."""

    value: float
    of: Literal["ratio", "difference", "ours"] = "ratio"
    at_least: bool = False
    """More is better."""


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, ``n`` times in turn with the peer.

    The n-th of ours and the n-th of the peer's were taken one after the other, so ratios and differences are taken pair
    by pair before their median: a machine that changes speed changes it for both.
    """

    name: str
    unit: str
    ours: Sequence[float]
    bar: Bar
    peer_name: str = ""
    peer: Sequence[float] = ()

    @property
    def ratio(self) -> float | None:
        """The median of ours over the peer's."""
        return statistics.median(self._pairwise(lambda a, b: a / b)) if self.peer else None

    @property
    def judged(self) -> list[float]:
        """The figures that the bar is for, before their median."""
        if self.bar.of == "ours":
            return list(self.ours)
        return self._pairwise((lambda a, b: a / b) if self.bar.of == "ratio" else (lambda a, b: a - b))

    @property
    def reaches(self) -> bool:
        """Whether the bar is reached."""
        figure = statistics.median(self.judged)
        return figure >= self.bar.value if self.bar.at_least else figure <= self.bar.value

    def _pairwise(self, of: Callable[[float, float], float]) -> list[float]:
        return [of(a, b) for a, b in zip(self.ours, self.peer, strict=True)]


Measurement = Callable[[int], list[Row]]
"""Takes the number of repeats; made for about a minute of the machine at five of them."""


def in_turn(actions: dict[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Each action's results, taken A B A B ...; the first round warms up and does not count."""
    found: dict[str, list[T]] = {name: [] for name in actions}
    for round_number in range(repeats + 1):
        for name, action in actions.items():
            result = action()
            if round_number:
                found[name].append(result)
    return found


def seconds(action: Callable[[], object]) -> float:
    """The wall time of a call."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


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
