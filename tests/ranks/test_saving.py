"""Saves beside training: one under way at most, errors that reach all ranks, nothing that hangs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ddpkit
from ddpkit import saving
from ddpkit.agree import RankFailed
from ddpkit.checkpoint import contents
from ddpkit.checkpoint.contents import Part, Snapshot
from ddpkit.checkpoint.manifest import FileProof
from ddpkit.checkpoint.staging import Staging
from ddpkit.errors import SaveFailed, Superseded
from ddpkit.heartbeat import Heartbeat
from ddpkit.run import Run
from ddpkit.session import Runtime
from ddpkit.testing import run_ranks
from tests import toy

Write = Callable[[Part, Path], tuple[FileProof, ...]]


def _run(rt: Runtime, folder: str, **options: Any) -> Run:
    return rt.resume(folder, model=rt.wrap(toy.model()), **options)


def _events(folder: str, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(folder) / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def _writing(instead: Callable[[Write, Part, Path], tuple[FileProof, ...]]) -> None:
    """Have parts written otherwise, in this process (which is a rank's, and ends with the test)."""
    write = contents.write
    contents.write = lambda part, directory: instead(write, part, directory)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)


def _due_while_one_is_under_way(folder: str) -> None:
    with ddpkit.runtime() as rt:
        # The first one is not written before training waits for it.
        def held(write: Write, part: Part, directory: Path) -> tuple[FileProof, ...]:
            _until(lambda: part.progress["step"] > 1 or (rt.heartbeat.phase == "saving" and steps == [1]))
            return write(part, directory)

        _writing(held)
        run, steps = _run(rt, folder, every_steps=1), list[int]()
        run.step()
        _until(lambda: rt.heartbeat.saving_since is not None)
        steps.append(1)
        run.step()
    # Left with a save under way, which was waited for.
    assert {path.name for path in (Path(folder) / "checkpoints").iterdir()} == {"step-00000001", "step-00000002"}


def test_a_save_that_is_due_waits_for_the_one_under_way_and_says_so(tmp_path: Path) -> None:
    run_ranks(_due_while_one_is_under_way, 2, str(tmp_path))
    (delayed,) = _events(str(tmp_path), "save_delayed")
    assert (delayed["step"], delayed["behind"]) == (2, 1)
    assert [event["step"] for event in _events(str(tmp_path), "saved")] == [1, 2]


def _fails_for_good(folder: str, kind: type[Exception], text: str) -> int:
    """The only save fails; how many steps follow until the run does."""
    with ddpkit.runtime() as rt:

        def failing(write: Write, part: Part, directory: Path) -> tuple[FileProof, ...]:
            raise kind(text)

        _writing(failing)
        run = _run(rt, folder, every_steps=3)
        run._saver._max_failures = 1
        with pytest.raises(kind, match=text):
            for step in range(10**6):
                rt.barrier(f"step {step}")  # the collectives of a step
                run.step()
        return run.progress.step


@pytest.mark.parametrize("kind", [SaveFailed, Superseded])
def test_an_error_that_ends_the_run_does_not_wait_for_the_next_save(kind: type[Exception], tmp_path: Path) -> None:
    first, second = run_ranks(_fails_for_good, 2, str(tmp_path), kind, "out of luck")
    assert first == second >= 3  # all ranks at the same step
    assert len(_events(str(tmp_path), "save_failed")) == (kind is SaveFailed)


def _fails_while_a_save_is_under_way(folder: str) -> str:
    try:
        with ddpkit.runtime() as rt:
            run = _run(rt, folder, every_steps=1)
            if rt.rank == 1:  # its part is not written

                def stuck(write: Write, part: Part, directory: Path) -> tuple[FileProof, ...]:
                    time.sleep(60)
                    raise AssertionError("this process has ended by now")

                _writing(stuck)
                saving._GIVE_UP_S = 0.2
            run.step()
            if rt.rank == 1:
                raise ValueError("no more")
            run.step()
    except (ValueError, RankFailed) as error:
        assert rt.rank == 1 or not any(thread.name == "ddpkit-save" for thread in threading.enumerate())
        return f"{type(error).__name__}: {error}"
    return "went on"


def test_a_rank_that_fails_during_a_save_leaves_nobody_waiting(tmp_path: Path) -> None:
    first, second = run_ranks(_fails_while_a_save_is_under_way, 2, str(tmp_path))
    assert second == "ValueError: no more"
    assert first == "RankFailed: rank 1 failed: ValueError: no more"
    assert not list((tmp_path / "checkpoints").glob("*step*"))


def _in_two_threads() -> tuple[list[list[int]], list[list[int]]]:
    with ddpkit.runtime() as rt:
        beside = rt.ranks_beside(Heartbeat(), threading.Event())
        found: list[list[int]] = []

        def exchange() -> None:
            found.extend(beside.exchange("same", -each - rt.rank) for each in range(30))

        thread = threading.Thread(target=exchange)
        thread.start()
        own = [rt.ranks.exchange("same", each + rt.rank) for each in range(30)]
        thread.join()
        return own, found


def test_agreements_of_two_threads_do_not_mix() -> None:
    expected = [[each, each + 1] for each in range(30)], [[-each, -each - 1] for each in range(30)]
    assert run_ranks(_in_two_threads, 2) == [expected] * 2


@pytest.mark.gpu
def test_a_copy_from_a_gpu_comes_before_whatever_is_done_to_the_state_next() -> None:
    device = torch.device("cuda")
    staging = Staging(device)
    for value in (1.0, 2.0):
        state = {f"w{index}": torch.full((1 << 24,), value + index, device=device) for index in range(8)}
        copied = staging.copy(contents.take(Snapshot({}, state, None, None), 0, 1))
        for tensor in state.values():
            tensor.zero_()
        files = copied().files["replicated-00000.safetensors"]
        assert all(tensor.is_pinned() for tensor in files.values())
        assert all((files[f"w{index}"] == value + index).all() for index in range(8))
