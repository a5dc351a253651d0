"""Where a step's time goes, and what memory is held: measured in passing, without waiting for a device.

On a GPU the host's clock sees only how long it takes to ask for work. There the device's own marks are set around the
phases of the steps that are recorded, and read when the values of that step have been read, which waits for it anyway.
"""

from __future__ import annotations

import math
import time
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_DATA, _PASSES, _UPDATE = "data_s", "forward_backward_s", "optimizer_s"
_HOST_S = 1.0  # the host's memory is asked for so rarely: opening its file takes a quarter of what a line takes
_SAMPLE_STEPS = 100  # DDP measures its communication in the first ten steps, and then in every hundredth


class StepClock:
    """The time of a step's phases, on this rank: waiting for data, forward and backward passes, the update.

    Args:
        device: of this rank.

    Attributes:
        now: when it was looked at last, in seconds of a clock that never goes back.
    """

    def __init__(self, device: torch.device) -> None:
        self._has_device = device.type == "cuda"
        self._on_device = False
        self._marks: list[tuple[str, Any]] = []
        self._sums: dict[str, float] = {}
        self._steps = 0
        self.now = time.perf_counter()

    def begin(self, is_recorded: bool) -> None:
        """A step begins: what came before belongs to none of the phases."""
        self.now = time.perf_counter()
        self._on_device = is_recorded and self._has_device

    def fetched(self) -> None:
        """A batch is there."""
        self._lap(_DATA)

    def passed(self) -> None:
        """A backward pass is done."""
        self._lap(_PASSES)

    def updated(self) -> None:
        """The step is done."""
        # Where nobody has told of a backward pass, all that was done since the fetch is one.
        self._lap(_UPDATE if _PASSES in self._sums else _PASSES)
        self._steps += 1

    def means(self) -> dict[str, float]:
        """Seconds a step by phase since the last call; on a GPU the device's own, of the step just done."""
        steps = max(self._steps, 1)
        means = {phase: seconds / steps for phase, seconds in self._sums.items()}
        if self._marks:
            self._marks[-1][1].synchronize()
            means |= self._measured_by_device()
        self._sums, self._steps, self._marks = {}, 0, []
        return means

    def _lap(self, phase: str) -> None:
        before, self.now = self.now, time.perf_counter()
        self._sums[phase] = self._sums.get(phase, 0.0) + self.now - before
        if self._on_device:
            mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
            mark.record()
            self._marks.append((phase, mark))

    def _measured_by_device(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for (_, start), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase != _DATA:  # a device that waits for data does so beside the host, which has measured it
                found[phase] = found.get(phase, 0.0) + start.elapsed_time(end) / 1000
        return found


class Gauges:
    """What is read when a line is recorded: memory in MB, and the communication of the gradients.

    Args:
        device: of this rank.
        models: whose gradients are exchanged.
    """

    def __init__(self, device: torch.device, models: list[nn.Module]) -> None:
        self._device = device
        self._models = [model for model in models if isinstance(model, DistributedDataParallel)]
        self._process = psutil.Process()
        self._host: dict[str, float] = {}
        self._host_at = -math.inf
        self._communication: dict[str, float] = {}
        self._asked_at = -_SAMPLE_STEPS

    def read(self, step: int) -> dict[str, float]:
        """The values at this step, by name."""
        now = time.monotonic()
        if now - self._host_at >= _HOST_S:
            self._host, self._host_at = {"host_mb": self._process.memory_info().rss / 2**20}, now
        found = dict(self._host)
        if self._device.type == "cuda":
            found["device_mb"] = torch.cuda.max_memory_allocated(self._device) / 2**20
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._models and step - self._asked_at >= _SAMPLE_STEPS:
            self._asked_at = step
            told: list[dict[str, Any]] = [model._get_ddp_logging_data() for model in self._models]  # type: ignore[no-untyped-call]  # torch's
            self._communication = {"communication_s": sum(each.get("backward_comm_time", 0) for each in told) / 1e9}
        return found | self._communication
