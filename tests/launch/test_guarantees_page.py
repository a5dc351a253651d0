"""What docs/guarantees.md promises can be seen: its very commands, and what it says that they print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launch.pages import follow, sections
from tests.launch.shell import ROOT, Shell

PARTS = sections("guarantees.md")
WITH_A_REFERENCE = {title for title, text in PARTS.items() if "$run" in text}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_proofs_that_compare_with_an_undisturbed_run(shell: Shell) -> None:
    follow(shell, "".join(PARTS[title] for title in PARTS if title in WITH_A_REFERENCE), timeout_s=580)
    events = (shell.cwd / "runs/killed/events.jsonl").read_text()
    assert events.count('"restored"') >= 5


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("title", [title for title in PARTS if title not in WITH_A_REFERENCE])
def test_proofs_that_stand_alone(shell: Shell, title: str) -> None:
    assert "```text" in PARTS[title]
    follow(shell, PARTS[title], timeout_s=280)


def test_the_files_that_it_points_at_are_there() -> None:
    named = re.findall(r"`((?:ddpkit|launch)/[\w/.]+)`", (ROOT / "docs/guarantees.md").read_text())
    assert len(named) > 10
    assert [name for name in named if not Path(ROOT, name).exists()] == []
