"""What docs/training.md shows works: each piece of config is one, and its loop runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import ddpkit
from ddpkit import config as configs
from tests.launch.shell import ROOT, Shell
from tests.launch.test_readme import README

PAGE = (ROOT / "docs/training.md").read_text()
PIECES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def _merged(base: Any, piece: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(piece, dict)):
        return piece
    return {**base, **{key: _merged(base.get(key), value) for key, value in piece.items()}}


@pytest.mark.parametrize("piece", PIECES)
def test_every_piece_is_a_config(piece: str, tmp_path: Path) -> None:
    whole = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert whole is not None
    yaml = YAML(typ="safe")
    path = tmp_path / "config.yaml"
    tree = _merged(yaml.load(whole[1]), yaml.load(piece))
    with path.open("w") as file:
        yaml.dump(tree, file)
    assert configs.load(path)


def test_the_loop_runs_on_ranks(shell: Shell) -> None:
    block = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    shell.script("own.py", block[1])
    done = shell.run("launch", "--nproc-per-node", "2", "own.py")
    assert done.returncode == 0, done.stderr
    assert (shell.cwd / "runs/own/checkpoints/step-00000024/manifest.json").exists()


def test_every_public_name_is_there() -> None:
    assert [name for name in ddpkit.__all__ if not hasattr(ddpkit, name)] == []
    called = set(re.findall(r"ddpkit\.(\w+)\(", PAGE))
    assert called <= set(ddpkit.__all__), called
