"""The scripts of docs/moving.md: those of others run unchanged, and ours give the same losses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.shell import Shell
from tests.pages import Block, by_section, follow_in_one_shell

PARTS = by_section("docs/moving.md")
TOY = PARTS[""]
[AFTER_DDP] = [block for block in PARTS["From a hand-written DDP script"] if block.file == "after_ddp.py"]


def _losses(path: Path) -> list[float]:
    return [float(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("loss ")]


def test_by_hand_and_with_ddpkit(shell: Shell) -> None:
    follow_in_one_shell(shell, TOY + PARTS["From a hand-written DDP script"], timeout_s=250)
    before = _losses(shell.cwd / "before_ddp.txt")
    assert len(before) == 16
    assert before[-1] < before[0]
    assert _losses(shell.cwd / "after_ddp.txt") == pytest.approx(before, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["accelerate", "fabric"])
def test_accelerate_and_fabric_as_they_are(shell: Shell, peer: str) -> None:
    [title] = [title for title in PARTS if title.lower().endswith(peer)]
    ours = [AFTER_DDP, Block("sh", "ddpkit launch --nproc-per-node 2 after_ddp.py > after_ddp.txt", title)]
    follow_in_one_shell(shell, [*TOY, *PARTS[title], *ours], timeout_s=250)
    before = _losses(shell.cwd / f"before_{peer}.txt")
    assert len(before) == 16
    assert _losses(shell.cwd / "after_ddp.txt") == pytest.approx(before, rel=1e-4)


@pytest.mark.slow
def test_submitit_and_our_calls(shell: Shell) -> None:
    follow_in_one_shell(shell, TOY + PARTS["From submitit"], timeout_s=250)
    before = _losses(shell.cwd / "before_submitit.txt")
    assert len(before) == 16
    assert _losses(shell.cwd / "after_submitit.txt") == pytest.approx(before, rel=1e-4)
