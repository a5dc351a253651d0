"""What docs/training.md shows works: each piece of config is one, and its loop runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ddpkit
from ddpkit import config as configs
from tests import pages
from tests.launch.shell import ROOT, Shell

PAGE = "docs/training.md"
PIECES = pages.of_language(PAGE, "yaml")


@pytest.mark.parametrize("piece", PIECES)
def test_every_piece_is_a_config(piece: str, tmp_path: Path) -> None:
    (whole,) = pages.of_language("README.md", "yaml")
    (tmp_path / "whole.yaml").write_text(whole)
    (tmp_path / "piece.yaml").write_text(f"defaults: [whole]\n{piece}")
    assert configs.load(tmp_path / "piece.yaml")


def test_there_are_no_other_blocks() -> None:
    assert {block.language for block in pages.blocks(PAGE)} == {"yaml", "python"}


def test_the_loop_runs_on_ranks(shell: Shell) -> None:
    (block,) = pages.of_language(PAGE, "python")
    shell.script("own.py", block)
    done = shell.run("launch", "--nproc-per-node", "2", "own.py")
    assert done.returncode == 0, done.stderr
    assert (shell.cwd / "runs/own/checkpoints/step-00000024/manifest.json").exists()


def test_every_public_name_is_there() -> None:
    assert [name for name in ddpkit.__all__ if not hasattr(ddpkit, name)] == []
    called = set(re.findall(r"ddpkit\.(\w+)\(", (ROOT / PAGE).read_text()))
    assert called <= set(ddpkit.__all__), called
