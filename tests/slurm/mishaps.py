"""A model, a dataset and a step for jobs: tests.toy's, slowed down or upset where a test has asked for it.

What is asked for is in ``$JOB_MISHAP``, a `Mishap` as JSON; nothing of it changes a bit of the result.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ddpkit.errors import UserError
from tests import toy

LATER_S = 0.05  # the others fail so long after the one that is the cause


@dataclass(frozen=True)
class Mishap:
    """What happens in a job.

    Attributes:
        do: "raise", "exit" and "kill" end the rank, and the others fail 50 ms later; "stick" keeps it in the step for
            good; "refuse" is an error of the user's, found when the model is built; "requeue" has Slurm requeue the job
            in the middle of a save; "" is nothing at all.
        rank: to whom.
        at: in which pass of an attempt; which save, counted alike.
        starts: in how many of the job's starts; in "raise" and its like also of the launcher's.
        stays_s: "requeue": how long the save then takes.
        pace_s: seconds that a pass takes in the first ``slow_starts`` starts of the job.
        slow_starts: as said.
    """

    do: str = ""
    rank: int = 0
    at: int = 10
    starts: int = 1
    stays_s: float = 0.0
    pace_s: float = 0.5
    slow_starts: int = 0


@functools.cache
def _mishap() -> Mishap:
    mishap = Mishap(**json.loads(os.environ.get("JOB_MISHAP", "{}")))
    if mishap.do == "requeue" and _happens_to(mishap):
        sys.addaudithook(_RequeueInSave(mishap))
    return mishap


@functools.cache
def _passes() -> Iterator[int]:
    return itertools.count(1)


def _starts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _happens_to(mishap: Mishap) -> bool:
    return int(os.environ["RANK"]) == mishap.rank and _starts() < mishap.starts


class _RequeueInSave:
    """Stands between the files of a checkpoint and its name."""

    def __init__(self, mishap: Mishap) -> None:
        self._mishap = mishap
        self._saves = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "os.rename" or "/.step-" not in str(arguments[0]):
            return
        self._saves += 1
        if self._saves == self._mishap.at:
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
            time.sleep(self._mishap.stays_s)


def model(**args: Any) -> nn.Module:
    mishap = _mishap()
    if mishap.do == "refuse" and _happens_to(mishap):
        raise UserError("model.args: this model wants another machine")
    return toy.model(**args)


def dataset(context: str | None = None, **args: Any) -> Any:
    """``context``: how loader workers are started."""
    if context is not None:
        multiprocessing.set_start_method(context, force=True)
    return toy.dataset(**args)


def step(model: nn.Module, batch: Any) -> Any:
    mishap = _mishap()
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) < mishap.slow_starts:
        time.sleep(mishap.pace_s)
    if mishap.do in ("raise", "exit", "kill", "stick") and next(_passes()) == mishap.at and _starts() < mishap.starts:
        _happen(mishap)
    return toy.ledger_step(model, batch)


def _happen(mishap: Mishap) -> None:
    if int(os.environ["RANK"]) != mishap.rank:
        if mishap.do == "stick":
            return
        time.sleep(LATER_S)
        raise RuntimeError("a consequence")
    if mishap.do == "raise":
        raise ValueError("the cause")
    if mishap.do == "exit":
        os._exit(7)
    if mishap.do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(1)
