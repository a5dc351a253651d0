"""Accidents on demand: tests.toy's objects, except that a process dies or is signalled at a place given beforehand.

A test lists accidents in ``$TOY_FAULTS/faults.json``. Each happens once, in whichever attempt comes to it first; the
note that it has happened is made before it does.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests import toy


@dataclass(frozen=True)
class Fault:
    """What happens where.

    Attributes:
        at: "train" or "eval" (passes), "fetch" (samples, in a worker), "build" (the model), or the name of an audit
            event (https://docs.python.org/3/library/audit_events.html) such as "os.rename".
        count: at the how manieth of them, within one attempt; from 1.
        rank: on which rank.
        path: an audit event counts if its arguments contain this.
        do: the signal's name; none if it is empty.
        whom: "self", "parent", "grandparent", "group" (this process and its siblings) or "all" of them.
        hangs_s: seconds for which this process then does nothing.
        since: it happens when training, beside the thread that came here, has begun so many passes.
        until: that thread goes on when training has begun so many.
    """

    at: str
    count: int = 1
    rank: int = 0
    path: str = ""
    do: str = "SIGKILL"
    whom: str = "self"
    hangs_s: float = 0.0
    since: int = 0
    until: int = 0


def plan(directory: Path, *faults: Fault) -> dict[str, str]:
    """Write the accidents down; returns the environment variables that make them happen."""
    directory.mkdir(exist_ok=True)
    (directory / "faults.json").write_text(json.dumps([asdict(fault) for fault in faults]))
    return {"TOY_FAULTS": str(directory)}


def pending(directory: Path) -> list[Fault]:
    """Those that have not happened."""
    faults = [Fault(**tree) for tree in json.loads((directory / "faults.json").read_text())]
    return [fault for number, fault in enumerate(faults) if not (directory / f"happened-{number}").exists()]


class _Thread(threading.local):
    """Each thread's own: whether it is looking at an event. What it does then makes events itself."""

    is_busy = False


class _Watch:
    """Counts the places that this process comes to."""

    def __init__(self) -> None:
        self.directory = Path(os.environ["TOY_FAULTS"]) if "TOY_FAULTS" in os.environ else None
        self.rank = int(os.environ.get("RANK", "0"))
        self.faults: list[tuple[int, Fault]] = []
        self.counts: list[int] = []
        self.visits: Counter[str] = Counter()
        self.thread = _Thread()
        if self.directory is not None:
            listed = [Fault(**tree) for tree in json.loads((self.directory / "faults.json").read_text())]
            self.faults = [(number, fault) for number, fault in enumerate(listed) if fault.rank == self.rank]
            self.counts = [0] * len(self.faults)
            if any("." in fault.at or fault.at == "open" for _, fault in self.faults):
                sys.addaudithook(self.on_audit)

    def on_audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.thread.is_busy and any(fault.at == event for _, fault in self.faults):
            self.thread.is_busy = True
            try:
                self.come_to(event, repr(arguments))
            finally:
                self.thread.is_busy = False

    def come_to(self, place: str, arguments: str = "") -> int:
        """Count a visit, and let happen what is planned for it; the number of the visit."""
        self.visits[place] += 1
        for index, (number, fault) in enumerate(self.faults):
            if fault.at != place or fault.path not in arguments:
                continue
            self.counts[index] += 1
            if self.counts[index] == fault.count and self._is_first(number):
                self._happen(fault)
        return self.visits[place]

    def _is_first(self, number: int) -> bool:
        assert self.directory is not None
        try:
            os.close(os.open(self.directory / f"happened-{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _happen(self, fault: Fault) -> None:
        self._until_training(fault.since)
        if fault.do:
            _send(fault)
            time.sleep(fault.hangs_s)
            _until_agreed()
        self._until_training(fault.until)

    def _until_training(self, passes: int) -> None:
        deadline = time.monotonic() + 30
        while self.visits["train"] < passes and time.monotonic() < deadline:
            time.sleep(0.002)


def _send(fault: Fault) -> None:
    me = psutil.Process()
    parent = me.parent()
    assert parent is not None
    siblings = [child for child in parent.children() if child.pid != me.pid]
    launcher = parent.parent()
    assert launcher is not None
    whom = {
        "self": [me],
        "parent": [parent],
        "grandparent": [launcher],
        "group": [*siblings, me],
        "all": [*siblings, launcher, parent, me],
    }[fault.whom]
    number = getattr(signal, fault.do)
    for process in whom:
        process.send_signal(number)
    if number == signal.SIGKILL:
        time.sleep(60)  # whoever was killed takes this process along; nothing more may happen here


def is_agreed() -> bool:
    """Whether the ranks have agreed on a stop, or there is nothing to agree on: then the vote's thread has ended."""
    return not any(thread.name == "ddpkit-stop" for thread in threading.enumerate())


def _until_agreed() -> None:
    """Stay where a stop was asked for until the ranks have agreed on it: real steps are longer than the agreement."""
    deadline = time.monotonic() + 10
    while not is_agreed() and time.monotonic() < deadline:
        time.sleep(0.005)


@functools.cache
def watch() -> _Watch:
    return _Watch()


class Faulty(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.rank_pid = os.getpid()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if os.getpid() != self.rank_pid:  # `get_worker_info` is hidden from streams
            watch().come_to("fetch")
        return self.dataset[index]


def dataset(stream: bool = False, **args: Any) -> Any:
    made: Any = Faulty(toy.dataset(**args))
    return toy.Stream(made) if stream else made


def model(**args: Any) -> nn.Module:
    watch().come_to("build")
    return toy.model(**args)


def step(model: nn.Module, batch: Any) -> Any:
    """Also notes the indices that it saw in ``$TOY_LEDGER``, a line for each pass of each rank in each attempt."""
    watch().come_to("train")
    if (ledger := os.environ.get("TOY_LEDGER")) is not None:
        name = f"{os.environ['TOY_ATTEMPT']}-{os.environ.get('RANK', '0')}.txt"
        with (Path(ledger) / name).open("a") as file:
            file.write(" ".join(str(int(index)) for index in batch[2]) + "\n")
    return toy.step(model, batch)


def eval_step(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    watch().come_to("eval")
    return toy.eval_step(model, batch)
