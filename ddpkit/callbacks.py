"""Named moments of a run, at which code of the user's is called. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ddpkit.errors import DdpkitError, UserError, nearest

if TYPE_CHECKING:
    from ddpkit.run import Run


class CallbackFailed(Exception):
    """A callback has raised; the message names it and the moment, the cause is what it raised."""


class Callback:
    """What is called at the named moments of a run, on every rank.

    A callback has some of these methods; it need not be a subclass. All ranks come to each moment together, so a
    callback may use collectives, as long as it does so on every rank. One that has ``state_dict`` and
    ``load_state_dict`` is part of the checkpoint: rank zero's state is saved, and every rank takes it up, before
    ``on_start``. One that is a context manager is entered before ``on_start``, and left when the run directory is
    closed, whatever has happened.

    ``run.progress`` says where the run is, ``run.objects`` has its model and optimizer by name, ``run.note(name=x)``
    adds to the line that is recorded for a step, ``run.ask_to_stop(reason)`` stops all ranks with the state saved,
    ``run.end(reason)`` ends the run for good.
    """

    def on_start(self, run: Run) -> None:
        """The run's state is there, restored or new; no step has been done yet."""

    def on_epoch_start(self, run: Run) -> None:
        """Epoch ``run.progress.epoch`` begins, or goes on after a restart."""

    def on_step_end(self, run: Run) -> None:
        """Optimizer step ``run.progress.step`` is done; nothing of it has been recorded yet."""

    def on_record(self, run: Run, kind: str, values: Mapping[str, float], clock: Mapping[str, float]) -> None:
        """A line is recorded; ``kind`` is "train" or "eval".

        Args:
            run: the run.
            kind: of the line.
            values: means over the ranks.
            clock: what depends on time, in seconds or as the name says.
        """

    def on_evaluation_end(self, run: Run, values: Mapping[str, float]) -> None:
        """The present step has been evaluated; ``values`` are the same on all ranks."""

    def on_epoch_end(self, run: Run) -> None:
        """Epoch ``run.progress.epoch`` is done, with its evaluation if it has one."""

    def on_save(self, run: Run) -> None:
        """The state of ``run.progress.step`` is about to be taken for a checkpoint."""

    def on_end(self, run: Run, reason: str | None) -> None:
        """The run leaves, its state saved: because it is done (``reason`` is None or why it ended early), or stops."""


MOMENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks:
    """A run's callbacks, each called at the moments for which it has a method.

    Args:
        callbacks: in the order in which they are called.

    Raises:
        UserError: one has no moment, or one that there is not.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._named = dict(_named(callbacks))
        self._at: dict[str, list[tuple[str, Callable[..., None]]]] = {moment: [] for moment in MOMENTS}
        for name, callback in self._named.items():
            check(callback, name)
            for moment, calls in self._at.items():
                if (method := _own_method(callback, moment)) is not None:
                    calls.append((name, method))

    def entered(self, stack: ExitStack) -> None:
        """Enter those that are context managers."""
        for callback in self._named.values():
            if hasattr(callback, "__enter__") and hasattr(callback, "__exit__"):
                stack.enter_context(callback)

    def tell(self, moment: str, *about: Any) -> None:
        """Call all that wait for this moment.

        Raises:
            CallbackFailed: one of them raised; what is ddpkit's own, or tells of another rank, is raised as it is.
        """
        for name, method in self._at[moment]:
            try:
                method(*about)
            except (DdpkitError, CallbackFailed):
                raise
            except Exception as error:
                from ddpkit.agree import is_consequence  # with torch

                if is_consequence(error):
                    raise
                raise CallbackFailed(f"callback {name}, {moment}: {type(error).__name__}: {error}") from error

    def state_dict(self) -> dict[str, Any]:
        """The states of those that have one, by name."""
        return {name: callback.state_dict() for name, callback in self._stateful()}

    def load_state_dict(self, states: Mapping[str, Any]) -> list[str]:
        """Give each its own state; returns the names of those for which there is none: they begin afresh."""
        for name, callback in self._stateful():
            if name in states:
                callback.load_state_dict(states[name])
        return [name for name, _ in self._stateful() if name not in states]

    def _stateful(self) -> Iterator[tuple[str, Any]]:
        for name, callback in self._named.items():
            if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict"):
                yield name, callback


def check(callback: Any, name: str) -> None:
    """Raise UserError unless this is a callback; ``name`` is what the message calls it."""
    methods = [each for each in dir(type(callback)) if callable(getattr(type(callback), each, None))]
    unknown = [each for each in methods if each.startswith("on_") and each not in MOMENTS]
    if unknown:
        raise UserError(
            f"{name}: there is no moment {unknown[0]!r}{nearest(unknown[0], MOMENTS)}; there are {', '.join(MOMENTS)}"
        )
    if isinstance(callback, type) or not any(hasattr(callback, moment) for moment in MOMENTS):
        given = f"the class {callback.__name__}" if isinstance(callback, type) else f"a {type(callback).__name__}"
        raise UserError(f"{name}: {given} is no callback; an object is, with some of the methods {', '.join(MOMENTS)}")


def _own_method(callback: Any, moment: str) -> Callable[..., None] | None:
    method: Callable[..., None] | None = getattr(callback, moment, None)
    is_inherited = getattr(type(callback), moment, None) is getattr(Callback, moment)
    return None if is_inherited else method


def _named(callbacks: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """By class; of several of one class, all but the first with a number."""
    seen: dict[str, int] = {}
    for callback in callbacks:
        name = f"{type(callback).__module__}.{type(callback).__qualname__}"
        seen[name] = seen.get(name, 0) + 1
        yield (name if seen[name] == 1 else f"{name}-{seen[name]}"), callback
