"""metrics.jsonl as curves, read once from its beginning to its end, however long it is, and thinned on the way.

Of each column of the picture a curve keeps its first, lowest, highest and last point: a spike of one step among a
million stays where it was and as high as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import history
from .history import Line

COLUMNS = 480  # of a picture: more than a phone has, and as many as a wide chart needs

_LARGEST = 1e300  # beyond it a scale has no room

Point = tuple[float, float]

_PHASES = ("data_s", "forward_backward_s", "optimizer_s", "communication_s")
_MEMORY = ("host_mb", "device_mb")


class Curve:
    """One curve, taken point by point, x growing.

    Args:
        span: the largest x; what comes after it is kept in the last column.

    Attributes:
        count: of all finite points taken.
        missing: how many were infinite, or as good as that, or not a number.
        low, high: of all finite values; of none, infinite.
        last: the newest finite value.
    """

    def __init__(self, span: float) -> None:
        self._scale = (COLUMNS - 1) / span if span > 0 else 0.0
        self._column = -1
        self._kept: list[tuple[Point, Point, Point, Point]] = []
        self._first = self._lowest = self._highest = self._newest = (0.0, 0.0)
        self.count = 0
        self.missing = 0
        self.low = math.inf
        self.high = -math.inf

    def add(self, x: float, y: float) -> None:
        """Take the next point."""
        if not abs(y) <= _LARGEST:
            self.missing += 1
            return
        point = (x, y)
        column = min(int(x * self._scale), COLUMNS - 1)
        if column != self._column:
            self._close()
            self._column = column
            self._first = self._lowest = self._highest = point
        elif y < self._lowest[1]:
            self._lowest = point
        elif y > self._highest[1]:
            self._highest = point
        self._newest = point
        self.count += 1

    @property
    def last(self) -> float:
        """The newest finite value."""
        return self._newest[1]

    def points(self) -> list[Point]:
        """What is left to draw, in order; at most four for each column."""
        self._close()
        return [point for kept in self._kept for point in sorted(set(kept))]

    def _close(self) -> None:
        if self._column >= 0:
            self._kept.append((self._first, self._lowest, self._highest, self._newest))
            self.low = min(self.low, self._lowest[1])
            self.high = max(self.high, self._highest[1])
            self._column = -1


@dataclass
class Spread:
    """The smallest, largest and mean of some numbers."""

    count: int = 0
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, value: float) -> None:
        """Take one more."""
        self.count += 1
        self.total += value
        self.low = min(self.low, value)
        self.high = max(self.high, value)

    @property
    def mean(self) -> float:
        """Of those taken; at least one is needed."""
        return self.total / self.count


@dataclass
class Recording:
    """All that metrics.jsonl has to show.

    Attributes:
        span: the last step.
        values: curves of what steps and evaluations have reported, by name and kind.
        rates: of the learning rates, by name.
        speed: samples a second.
        phases: seconds a step, by phase.
        memory: in MB, by what has it.
        by_rank: seconds a step of each rank, by what they are of: "step_s", "data_s", "communication_s".
    """

    span: int
    values: dict[str, dict[str, Curve]] = field(default_factory=dict)
    rates: dict[str, Curve] = field(default_factory=dict)
    speed: dict[str, Curve] = field(default_factory=dict)
    phases: dict[str, Curve] = field(default_factory=dict)
    memory: dict[str, Curve] = field(default_factory=dict)
    by_rank: dict[str, dict[int, Spread]] = field(default_factory=dict)


def read(path: Path) -> Recording:
    """Read a file of metrics; one that is not there is empty."""
    newest = history.newest_lines(path)
    recording = Recording(max((line["step"] for line in newest), default=0))
    for line in _lines(path):
        _take(recording, line)
    return recording


def _lines(path: Path) -> Iterator[Line]:
    try:
        with path.open("rb") as file:
            yield from filter(history.is_metric, history.parsed(file))
    except OSError:
        return


def _take(recording: Recording, line: Line) -> None:
    step, kind, clock = line["step"], line["kind"], line["time"]
    for name, value in history.values(line).items():
        if kind == "train" and is_rate(name):
            _add(recording.rates, name, recording.span, step, value)
        else:
            _add(recording.values.setdefault(name, {}), kind, recording.span, step, value)
    if kind != "train":
        return
    for curves, names in (
        (recording.speed, ("samples_per_s",)),
        (recording.phases, _PHASES),
        (recording.memory, _MEMORY),
    ):
        for name in names:
            if history.is_number(clock.get(name)):
                _add(curves, name, recording.span, step, clock[name])
    if isinstance(by_rank := clock.get("by_rank"), dict):
        _take_ranks(recording.by_rank, by_rank)


def is_rate(name: str) -> bool:
    """Whether it is how learning rates are recorded: "lr", and of other groups "lr/1"."""
    return name == "lr" or name.startswith("lr/")


def _add(curves: dict[str, Curve], name: str, span: int, step: int, value: float) -> None:
    curve = curves.get(name)
    if curve is None:
        curve = curves[name] = Curve(span)
    curve.add(step, value)


def _take_ranks(spreads: dict[str, dict[int, Spread]], told: Mapping[str, Iterable[float]]) -> None:
    for name, times in told.items():
        for rank, seconds in enumerate(times):
            if history.is_number(seconds):
                spreads.setdefault(name, {}).setdefault(rank, Spread()).add(seconds)
