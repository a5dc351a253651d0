"""Callbacks: which of their methods are called, by which name they are known, and what they are refused for."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from ddpkit.callbacks import MOMENTS, Callback, CallbackFailed, Callbacks, check
from ddpkit.errors import UserError


class Noting:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_step_end(self, run: Any) -> None:
        self.calls.append(run)


class Stateful(Callback):
    def __init__(self, count: int = 0) -> None:
        self.count = count

    def on_step_end(self, run: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_only_own_methods_are_called_in_order() -> None:
    first, second, none = Noting(), Noting(), Callback()
    told = Callbacks([first, none, second])
    for moment in MOMENTS:
        told.tell(moment, *("run",) if moment == "on_step_end" else ())  # others would raise: they take arguments
    assert first.calls == second.calls == ["run"]


def test_states_go_by_class_and_number() -> None:
    saved = Callbacks([Stateful(1), Noting(), Stateful(2)]).state_dict()
    assert [name.rpartition(".")[2] for name in saved] == ["Stateful", "Stateful-2"]
    one, two, three = Stateful(), Stateful(), Stateful()
    assert Callbacks([one, two, three]).load_state_dict(saved) == [f"{Stateful.__module__}.Stateful-3"]
    assert [one.count, two.count, three.count] == [1, 2, 0]


def test_a_failure_names_the_callback_and_the_moment() -> None:
    class Failing:
        def on_epoch_end(self, run: Any) -> None:
            raise ValueError("boom")

        def on_save(self, run: Any) -> None:
            raise UserError("say so")

        def on_end(self, run: Any, reason: str | None) -> None:
            raise RuntimeError("[gloo] Connection closed by peer")

    told = Callbacks([Failing()])
    with pytest.raises(CallbackFailed, match=r"Failing, on_epoch_end: ValueError: boom") as failed:
        told.tell("on_epoch_end", "run")
    assert isinstance(failed.value.__cause__, ValueError)
    with pytest.raises(UserError, match="say so"):
        told.tell("on_save", "run")
    with pytest.raises(RuntimeError, match="closed by peer"):  # another rank is behind it, not the callback
        told.tell("on_end", "run", None)


def test_what_is_no_callback_is_refused() -> None:
    class Misspelt:
        def on_step_ended(self, run: Any) -> None: ...

    with pytest.raises(UserError, match=r"x: there is no moment 'on_step_ended'; did you mean 'on_step_end'\?"):
        check(Misspelt(), "x")
    with pytest.raises(UserError, match="x: a dict is no callback"):
        check({}, "x")
    with pytest.raises(UserError, match="x: the class Noting is no callback"):
        check(Noting, "x")


def test_context_managers_are_left_whatever_happens() -> None:
    seen: list[str] = []

    class Managed(Noting):
        def __enter__(self) -> Managed:
            seen.append("in")
            return self

        def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
            seen.append(f"out: {error}")

    with pytest.raises(ValueError, match="boom"), ExitStack() as stack:
        Callbacks([Managed(), Noting()]).entered(stack)
        raise ValueError("boom")
    assert seen == ["in", "out: boom"]
