"""What docs/guarantees.md promises can be seen: its very commands, and what it says that they print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launch.shell import ROOT, Shell
from tests.pages import by_section, follow_in_one_shell

PARTS = by_section("docs/guarantees.md")
WITH_A_REFERENCE = [title for title, part in PARTS.items() if any("$run" in block.text for block in part)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_proofs_that_compare_with_an_undisturbed_run(shell: Shell) -> None:
    follow_in_one_shell(shell, [block for title in WITH_A_REFERENCE for block in PARTS[title]], timeout_s=580)
    events = (shell.cwd / "runs/killed/events.jsonl").read_text()
    assert events.count('"restored"') >= 5


@pytest.mark.slow
@pytest.mark.parametrize("title", [title for title in PARTS if title not in WITH_A_REFERENCE])
def test_proofs_that_stand_alone(shell: Shell, title: str) -> None:
    assert any(block.language == "text" for block in PARTS[title])
    follow_in_one_shell(shell, PARTS[title], timeout_s=280)


def test_the_files_that_it_points_at_are_there() -> None:
    named = re.findall(r"`((?:ddpkit|launch)/[\w/.]+)`", (ROOT / "docs/guarantees.md").read_text())
    assert len(named) > 10
    assert [name for name in named if not Path(ROOT, name).exists()] == []
