"""Loops of one's own: where they are saved, what they leave, and what is refused."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddpkit
from ddpkit.errors import UserError
from ddpkit.run import Run
from ddpkit.session import Runtime
from ddpkit.testing import run_ranks


class Counter:
    """An object of the user's: counts turns of a loop."""

    def __init__(self) -> None:
        self.turns = 0

    def state_dict(self) -> dict[str, Any]:
        return {"turns": self.turns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turns = state["turns"]


class Numbers(Counter):
    """A data loader that is not ddpkit's, and knows its place."""

    def __iter__(self) -> Iterator[int]:
        while self.turns < 4:
            self.turns += 1
            yield self.turns
        self.turns = 0


def saved(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return sorted({line["step"] for line in lines if line["event"] == "saved"})  # an epoch's end may be saved once more


def finished(folder: Path) -> int:
    return (folder / "events.jsonl").read_text().count('"finished"')


def opened(rt: Runtime, folder: Path, **objects: Any) -> Run:
    model = rt.wrap(nn.Linear(1, 1))
    return rt.resume(folder, every_steps=1, keep=100, log_every=1, asynchronous=False, model=model, **objects)


def test_what_follows_the_step_in_its_turn_is_saved_with_it(tmp_path: Path) -> None:
    for attempt in range(2):
        with contextlib.suppress(InterruptedError), ddpkit.runtime() as rt:
            loader, counter = rt.loader(range(12), global_batch_size=4), Counter()
            next(iter(loader))  # a look at the data, before the run begins
            run = opened(rt, tmp_path, loader=loader, counter=counter)
            # The second turn was not over.
            assert (run.progress.step, counter.turns, loader.done) == ((1, 1, 1) if attempt else (0, 0, 0))
            assert run.progress.samples == (4 if attempt else 0)
            for _ in run.epochs(1):
                for number, _ in enumerate(loader, loader.done):
                    run.step()
                    counter.turns += 1
                    assert (loader.done, number) == (0, counter.turns - 1)
                    if not attempt and counter.turns == 2:
                        raise InterruptedError
    assert (saved(tmp_path), finished(tmp_path), counter.turns) == ([1, 2, 3], 1, 3)


def test_a_run_that_is_not_over_its_epochs_is_finished_when_its_script_is(tmp_path: Path) -> None:
    with ddpkit.runtime() as rt:
        loader = rt.loader(range(12), global_batch_size=4)
        run = opened(rt, tmp_path, loader=loader)
        for _ in loader:
            run.step()
            assert run.progress.step != 2 or saved(tmp_path)[-1:] <= [1]
            if run.progress.step == 2:
                break
    assert (saved(tmp_path), finished(tmp_path)) == ([1, 2], 1)
    with ddpkit.runtime() as rt:  # nothing is done, so nothing is saved
        loader = rt.loader(range(12), global_batch_size=4)
        assert opened(rt, tmp_path, loader=loader).progress.step == 2
        assert (loader.epoch, loader.position) == (1, 0)  # the epoch was left
    assert (saved(tmp_path), finished(tmp_path)) == ([1, 2], 1)
    with ddpkit.runtime() as rt:
        loader = rt.loader(range(12), global_batch_size=4)
        run = opened(rt, tmp_path, loader=loader)
        for _ in run.epochs(5):
            for _ in loader:
                run.step()
            break
    assert (saved(tmp_path), finished(tmp_path)) == ([1, 2, 3, 4, 5], 1)  # of its own will, but not at its end


def test_a_loader_of_somebody_elses(tmp_path: Path) -> None:
    def run_with(folder: Path, data: Any, **objects: Any) -> list[int]:
        with ddpkit.runtime() as rt:
            run = opened(rt, folder, **objects)
            for _ in run.epochs(2):
                for _ in data:
                    run.step()
        return saved(folder)

    assert run_with(tmp_path / "plain", range(3)) == [3, 6]  # nothing knows its place within an epoch
    numbers = Numbers()
    assert run_with(tmp_path / "stateful", numbers, numbers=numbers) == list(range(1, 9))


def test_the_outer_one_of_two_loaders_leads(tmp_path: Path) -> None:
    def places(folder: Path, loop: Any) -> list[int]:
        with ddpkit.runtime() as rt:
            a, b = rt.loader(range(12), global_batch_size=4), rt.loader(range(8), global_batch_size=4)
            run = opened(rt, folder, b=b, a=a)
            for _ in run.epochs(2):
                loop(run, a, b)
        return saved(folder)

    def nested(run: Run, a: Any, b: Any) -> None:
        for _ in a:
            for _ in b:
                run.step()

    def beside(run: Run, a: Any, b: Any) -> None:
        for _ in zip(a, b, strict=False):
            run.step()

    def in_turn(run: Run, a: Any, b: Any) -> None:
        for loader in (a, b):
            for _ in loader:
                run.step()

    def looked_at_first(run: Run, a: Any, b: Any) -> None:
        list(b)
        beside(run, a, b)

    assert places(tmp_path / "nested", nested) == [2, 4, 6, 8, 10, 12]
    assert places(tmp_path / "beside", beside) == [1, 2, 3, 4]
    assert places(tmp_path / "in turn", in_turn) == [1, 2, 5, 6, 7, 10]
    assert places(tmp_path / "looked at", looked_at_first) == [1, 2, 3, 4]


def test_a_last_line_that_fails_leaves_no_claim_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ConnectionError("the others have gone")

    with pytest.raises(ConnectionError, match="the others have gone"), ddpkit.runtime() as rt:
        run = opened(rt, tmp_path)
        assert (tmp_path / "claim.json").exists()
        monkeypatch.setattr(run, "_write_line", fail)
        raise SystemExit(0)
    assert not (tmp_path / "claim.json").exists()


def _weighted(folder: str) -> list[float]:
    """Gradients of the mean of the ranks' numbers over the samples of a batch, from loaders with other shares."""
    found = []
    with ddpkit.runtime(timeout_s=20) as rt:
        model = rt.wrap(nn.Linear(1, 1, bias=False))
        even, uneven = (rt.loader(range(12), global_batch_size=size) for size in (4, 3))
        run = rt.resume(folder, every_steps=None, model=model, even=even, uneven=uneven)
        for _ in zip(even, uneven, strict=False):
            run.backward(model(torch.tensor([[float(rt.rank)]])).mean())
            found.append(next(model.parameters()).grad.item())  # type: ignore[union-attr]  # there has been a pass
            break
        for _ in even:
            model.zero_grad()
            run.backward(model(torch.tensor([[float(rt.rank)]])).mean())
            found.append(next(model.parameters()).grad.item())  # type: ignore[union-attr]  # as above
            run.step()
            break
    return found


def test_a_gradient_is_weighted_by_the_share_of_the_batch_given_out_last(tmp_path: Path) -> None:
    # Of three samples rank 0 gets two; of four both get as many.
    for found in run_ranks(_weighted, 2, str(tmp_path)):
        assert found == pytest.approx([1 / 3, 1 / 2])


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    def by_turns(run: Run, rt: Runtime, loader: Any) -> None:
        other = run.objects["other"]
        while True:
            for each in (loader, other):
                for _ in each:
                    run.step()

    def unknown(run: Run, rt: Runtime, loader: Any) -> None:
        for _ in rt.loader(range(8), global_batch_size=4):
            run.step()

    def twice(run: Run, rt: Runtime, loader: Any) -> None:
        for _ in loader:
            for _ in loader:
                run.step()

    def failed(run: Run, rt: Runtime, loader: Any) -> None:
        def collate(samples: list[int]) -> int:
            raise ArithmeticError("no good")

        batches = iter(rt.loader(range(8), global_batch_size=4, collate_fn=collate))
        with pytest.raises(ArithmeticError):
            next(batches)
        next(batches)

    for number, (loop, words) in enumerate(
        [
            (by_turns, "take turns"),
            (unknown, "not part of the run"),
            (twice, "two iterations"),
            (failed, r"ArithmeticError: no good"),
        ]
    ):
        with pytest.raises(UserError, match=words), ddpkit.runtime() as rt:
            loader, other = rt.loader(range(8), global_batch_size=4), rt.loader(range(8), global_batch_size=4)
            loop(opened(rt, tmp_path / str(number), loader=loader, other=other), rt, loader)


def _differs(folder: Path) -> None:
    with ddpkit.runtime() as rt:
        same = nn.Linear(1, 1)
        model = rt.wrap(nn.Linear(1, 1))
        teacher = nn.Linear(1, 1)  # the ranks draw different numbers by now
        rt.resume(folder, model=model, same=same, teacher=teacher)


def test_a_model_that_differs_between_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"resume: teacher is not wrapped, and its parameters on ranks \[1\]"):
        run_ranks(_differs, 2, tmp_path)


def test_a_loop_that_forgets_what_came_before_a_restart_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for attempt in range(2):
        caplog.clear()
        with contextlib.suppress(InterruptedError), ddpkit.runtime() as rt:
            loader = rt.loader(range(16), global_batch_size=4)
            run = opened(rt, tmp_path, loader=loader)
            for _ in run.epochs(1):
                for number, _ in enumerate(loader):
                    run.step()
                    if attempt and number == 1:
                        break
                    if number == 2:
                        raise InterruptedError
    [message] = [each for each in caplog.messages if "left early" in each]
    assert "after 4 batches; a restart had begun it at batch 2" in message


def test_without_a_launcher_it_is_an_ordinary_process(tmp_path: Path) -> None:
    process = psutil.Process()
    before = {thread.ident for thread in threading.enumerate()}, process.num_fds(), len(process.children())
    with ddpkit.runtime() as rt:
        model = nn.Linear(1, 1)
        assert rt.wrap(model) is model
        loader = rt.loader(range(8), global_batch_size=4)
        run = rt.resume(tmp_path, every_steps=1, model=model, loader=loader)
        for _ in run.epochs(2):
            for _ in loader:
                run.backward(model(torch.ones(1, 1)).sum())
                run.step()
                rt.barrier("alone")
                assert rt.mean(2.0) == 2.0
        assert not dist.is_initialized()
        for thread in threading.enumerate():  # which write, or look after what does; they end with the block
            assert thread.ident in before[0] or (thread.daemon and thread.name.startswith("ddpkit-"))
        assert [each for each in process.net_connections() if each.status == psutil.CONN_LISTEN] == []
        assert len(process.children()) == before[2]
    assert ({thread.ident for thread in threading.enumerate()}, process.num_fds(), len(process.children())) == before
