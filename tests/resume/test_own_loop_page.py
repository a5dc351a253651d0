"""What docs/own-loop.md shows: each of its scripts runs, and is killed and resumed with the same bits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ddpkit.agree import RankFailed
from ddpkit.session import Runtime
from ddpkit.testing import RankDied, run_ranks
from tests import pages
from tests.resume import faults
from tests.resume.faults import Fault, pending, plan
from tests.resume.runs import assert_same_end, events, metrics

PRELUDE, *SCRIPTS = pages.of_language("docs/own-loop.md", "python")
NAMES = [
    "in order",
    "two models",
    "accumulation",
    "validation",
    "enumerate",
    "exceptions",
    "zip",
    "nested",
    "forever",
    "own objects",
    "steps",
]
# The shapes whose saves come at other places than the plain loop's are looked at each time.
OFTEN = ("accumulation", "validation", "nested")


def play(number: int, folder: Path, env: dict[str, str]) -> int:
    """Run a script of the page in a folder; how many layers it has called on this rank."""
    os.environ.update(env)
    # Which saves are complete when it is killed must not depend on the machine. (This process ends with the test.)
    defaults = Runtime.resume.__kwdefaults__
    assert defaults is not None  # it has keywords
    defaults["asynchronous"] = False
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    visits = faults.watch().visits["train"]

    def count(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.Linear):
            faults.watch().come_to("train")

    handle = register_module_forward_pre_hook(count)
    try:
        exec(compile(PRELUDE + SCRIPTS[number], f"<{NAMES[number]}>", "exec"), {"__name__": "__main__"})
    finally:
        handle.remove()
    return faults.watch().visits["train"] - visits


def play_all(folder: Path) -> list[int]:
    return [play(number, folder / name, {}) for number, name in enumerate(NAMES)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """Each script run to its end on two ranks, and how many layers it has called."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run_ranks(play_all, 2, folder)[1]


def to_the_end(number: int, folder: Path, env: dict[str, str], ranks: int = 2) -> int:
    """Start again until it is done; how often it was killed."""
    for kills in range(6):
        try:
            run_ranks(play, ranks, number, folder, env)
        except (RankDied, RankFailed):
            continue
        return kills
    raise AssertionError("it is killed again and again")


def test_every_script_has_a_name() -> None:
    assert len(SCRIPTS) == len(NAMES)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in NAMES]
)
def test_killed_and_resumed(name: str, undisturbed: tuple[Path, list[int]], tmp_path: Path) -> None:
    number = NAMES.index(name)
    reference, calls = undisturbed
    third = calls[number] // 3
    env = plan(
        tmp_path / "faults",
        Fault("train", third, rank=1, whom="group"),
        Fault("train", third + 3, rank=0, whom="group"),
    )
    assert to_the_end(number, tmp_path / "run", env) == 2
    assert not pending(tmp_path / "faults")
    assert len(events(tmp_path / "run/runs/own", "restored")) >= 1
    assert_same_end(tmp_path / "run/runs/own", reference / name / "runs/own")
    assert len(events(tmp_path / "run/runs/own", "finished")) == 1


@pytest.mark.slow
def test_killed_on_two_ranks_and_resumed_on_three(undisturbed: tuple[Path, list[int]], tmp_path: Path) -> None:
    """Each step and each evaluation comes once, with the same samples; what dropout draws on three ranks differs."""
    reference, calls = undisturbed
    for number, name in enumerate(NAMES):
        env = plan(tmp_path / f"faults-{name}", Fault("train", calls[number] // 2, rank=1, whom="group"))
        with pytest.raises((RankDied, RankFailed)):
            run_ranks(play, 2, number, tmp_path / name, env)
    run_ranks(play_all, 3, tmp_path)
    for name in NAMES:
        assert [line["step"] for line in events(tmp_path / name / "runs/own", "restored")] > [0], name
        assert clocks(tmp_path / name / "runs/own") == clocks(reference / name / "runs/own"), name


def clocks(run_dir: Path) -> list[tuple[str, int, int, int]]:
    return [(line["kind"], line["step"], line["epoch"], line["samples"]) for line in metrics(run_dir)]
