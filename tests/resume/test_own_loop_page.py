"""What docs/own-loop.md shows: each of its scripts runs, and is killed and resumed with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpkit.agree import RankFailed
from ddpkit.testing import RankDied, run_ranks
from tests import pages
from tests.resume.faults import Fault, plan
from tests.resume.own_scripts import assert_killed_twice_it_ends_the_same, play, play_all
from tests.resume.runs import events, metrics

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


SOURCES = {name: PRELUDE + script for name, script in zip(NAMES, SCRIPTS, strict=True)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Each script run to its end on two ranks, and how many layers it has called."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run_ranks(play_all, 2, SOURCES, folder)[1]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in NAMES]
)
def test_killed_and_resumed(name: str, undisturbed: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    reference, calls = undisturbed
    assert_killed_twice_it_ends_the_same(SOURCES[name], calls[name], reference / name, tmp_path)


@pytest.mark.slow
def test_killed_on_two_ranks_and_resumed_on_three(undisturbed: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    """Each step and each evaluation comes once, with the same samples; what dropout draws on three ranks differs."""
    reference, calls = undisturbed
    for name, source in SOURCES.items():
        env = plan(tmp_path / f"faults-{name}", Fault("train", calls[name] // 2, rank=1, whom="group"))
        with pytest.raises((RankDied, RankFailed)):
            run_ranks(play, 2, source, tmp_path / name, env)
    run_ranks(play_all, 3, SOURCES, tmp_path)
    for name in NAMES:
        assert [line["step"] for line in events(tmp_path / name / "runs/own", "restored")] > [0], name
        assert clocks(tmp_path / name / "runs/own") == clocks(reference / name / "runs/own"), name


def clocks(run_dir: Path) -> list[tuple[str, int, int, int]]:
    return [(line["kind"], line["step"], line["epoch"], line["samples"]) for line in metrics(run_dir)]
