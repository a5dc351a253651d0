"""Metrics on their way to where people look at them: accelerate's trackers by name, or one of the user's own.

Rank zero sends every line of metrics.jsonl, from a thread of each tracker's own: its network holds no step, and what
goes wrong in it costs lines there, never the run. A run that goes on is the same one to the service; what that is
called there is kept in ``trackers.json``. Imports no torch, and a tracker's library only when it is asked for.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpkit import services
from ddpkit.callbacks import Callback
from ddpkit.errors import UserError
from ddpkit.services import SERVICES, Place
from ddpkit.world import adopted, as_torchrun_has_it

if TYPE_CHECKING:
    from ddpkit.run import Run

log = logging.getLogger("ddpkit")

_FILE = "trackers.json"
_START_S = 60.0  # for a tracker to start; after that the run goes on without waiting
_FINISH_S = 10.0  # for what is still to be sent when the run leaves, which may have to leave soon
_FINISH_FAILED_S = 2.0  # when it has failed, and its report waits
_LONGEST_QUEUE = 10_000  # lines; a tracker that hangs costs no more memory


@dataclass(frozen=True)
class Tracker:
    """One of accelerate's trackers, with options.

    Attributes:
        name: "tensorboard", "wandb", "mlflow" and so on.
        args: of the tracker's class in accelerate, over those that ddpkit gives.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)


class Trackers(Callback):
    """Sends what is recorded. For one run.

    Args:
        trackers: names, `Tracker`, or objects with ``log(values, step)`` and, if they like, ``start()``,
            ``store_init_configuration(values)`` and ``finish()``, as accelerate's have.
        config: what the run was started with, sent once.

    Raises:
        UserError: there is no such tracker, or it is not installed.
    """

    def __init__(self, trackers: Sequence[Any], config: Mapping[str, Any] | None = None) -> None:
        self._given = [Tracker(each) if isinstance(each, str) else each for each in trackers]
        self._config = dict(flat(config or {}))
        self._senders: list[_Sender] = []
        for each in self._given:
            problem = services.missing(each.name) if isinstance(each, Tracker) else _no_tracker(each)
            if problem is not None:
                raise UserError(f"trackers: {problem}")

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        for sender in self._senders:
            sender.close(_FINISH_S if error is None or isinstance(error, SystemExit) else _FINISH_FAILED_S)

    def on_start(self, run: Run) -> None:
        """Start all; collective.

        Raises:
            UserError: one could not start, in a run that begins. One that goes on does so without.
        """
        run.rt.ranks.on_main("trackers", lambda: self._start(run))

    def on_record(self, run: Run, kind: str, values: Mapping[str, float], clock: Mapping[str, float]) -> None:
        """Send a line."""
        if not self._senders:
            return
        sent = {f"{kind}/{name}": value for name, value in values.items()}
        sent |= {f"time/{name}": value for name, value in clock.items()}
        sent |= {"progress/epoch": run.progress.epoch, "progress/samples": run.progress.samples}
        for sender in self._senders:
            sender.send(sent, run.progress.step)

    def _start(self, run: Run) -> None:
        identities = _Identities(run.run_dir / _FILE)
        made = [self._made(each, run, identities) for each in self._given]
        if any(hasattr(each.tracker, "main_process_only") for each in made):
            _introduce(run)
        for each in made:
            is_first = each.name not in identities
            sender = _Sender(each, identities, self._config if is_first else {})
            self._senders.append(sender)
            if (problem := sender.started()) is None:
                continue
            if is_first and run.progress.step == 0:
                raise UserError(f"trackers: {each.name} could not be started: {problem}")
            log.warning("trackers: %s could not be started, and the run goes on without it: %s", each.name, problem)

    def _made(self, given: Any, run: Run, identities: _Identities) -> _Made:
        if not isinstance(given, Tracker):
            return _Made(type(given).__name__, given, lambda: None)
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # a heavy import

        service = SERVICES[given.name]
        own = identities.get(given.name)
        if own is None and service.new_identity is not None:
            own = service.new_identity()
        place = Place(run.run_dir.resolve(), run.progress.step, own, goes_on=given.name in identities)
        try:
            tracker = LOGGER_TYPE_TO_CLASS[given.name](**(service.arguments(place) | dict(given.args)))
        except TypeError as error:
            raise UserError(f"trackers: {given.name} does not take these args: {error}") from error
        asks = service.identity_of
        return _Made(given.name, tracker, lambda: own if asks is None else asks(tracker))


@dataclass(frozen=True)
class _Made:
    """A tracker that has not started; ``identity`` says how the service calls the run once it has."""

    name: str
    tracker: Any
    identity: Callable[[], str | None]


class _Identities:
    """By which names services know this run; in a file beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._known: dict[str, str | None] = json.loads(path.read_text())
        except (OSError, ValueError):
            self._known = {}

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def get(self, name: str) -> str | None:
        return self._known.get(name)

    def put(self, name: str, identity: str | None) -> None:
        with self._lock:
            self._known[name] = identity
            temporary = self._path.with_name(f".{self._path.name}.tmp")
            temporary.write_text(json.dumps(self._known))
            temporary.replace(self._path)


class _Sender:
    """Calls one tracker, from a thread: many of these libraries keep to the one that has started them.

    Args:
        made: the tracker.
        identities: where to note how the service calls the run.
        config: what it is told at its start; empty for a run that goes on.
    """

    def __init__(self, made: _Made, identities: _Identities, config: Mapping[str, Any]) -> None:
        self._made = made
        self._identities = identities
        self._config = config
        self._lines: queue.SimpleQueue[tuple[dict[str, Any], int] | None] = queue.SimpleQueue()
        self._has_started = threading.Event()
        self._problem: str | None = None
        self._has_complained = False
        self._thread = threading.Thread(target=self._work, name=f"ddpkit-{made.name}", daemon=True)

    def started(self) -> str | None:
        """Start; what went wrong, if that is known by now."""
        self._thread.start()
        if not self._has_started.wait(_START_S):
            log.warning("trackers: %s has not started in %.0f s; the run goes on", self._made.name, _START_S)
        return self._problem

    def send(self, values: dict[str, Any], step: int) -> None:
        """Have a line sent."""
        if self._thread.is_alive() and self._lines.qsize() < _LONGEST_QUEUE:
            self._lines.put((values, step))

    def close(self, timeout_s: float) -> None:
        """Send what is left, and finish."""
        self._lines.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("trackers: %s has not sent everything in %.0f s", self._made.name, timeout_s)

    def _work(self) -> None:
        try:
            self._start()
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the run
            self._problem = f"{type(error).__name__}: {error}"
            return
        finally:
            self._has_started.set()
        while (line := self._lines.get()) is not None:
            self._do("a line could not be sent", self._made.tracker.log, *line)
        if hasattr(self._made.tracker, "finish"):
            self._do("it could not be finished", self._made.tracker.finish)

    def _start(self) -> None:
        tracker = self._made.tracker
        if hasattr(tracker, "start"):
            tracker.start()
        self._identities.put(self._made.name, self._made.identity())
        if self._config and hasattr(tracker, "store_init_configuration"):
            self._do("it does not take the config", tracker.store_init_configuration, dict(self._config))

    def _do(self, problem: str, action: Callable[..., Any], *about: Any) -> None:
        try:
            action(*about)
        except Exception as error:  # noqa: BLE001 - as above
            if not self._has_complained:
                self._has_complained = True
                words = (self._made.name, problem, type(error).__name__, error)
                log.warning("trackers: %s: %s (%s: %s); the run goes on, and this is not said again", *words)


def flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """The values in a tree by key path, as services take them: lists as text, nulls left out."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        elif isinstance(value, (bool, int, float, str)):
            yield f"{above}{name}", value
        elif value is not None:
            yield f"{above}{name}", json.dumps(value)


def _no_tracker(given: Any) -> str | None:
    if callable(getattr(given, "log", None)) and not isinstance(given, type):
        return None
    return f"{given!r:.80} is no tracker: a name is needed, or an object with log(values, step)"


def _introduce(run: Run) -> None:
    """Have accelerate know who this rank is: its trackers ask, and for good it believes what it is told first."""
    import torch
    from accelerate.state import PartialState

    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # where nobody has said, it would choose another number
    with as_torchrun_has_it(run.rt.world), adopted(threads):
        PartialState(cpu=run.rt.device.type == "cpu")
