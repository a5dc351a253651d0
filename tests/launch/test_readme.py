"""What the README and the map say is so: their code runs, their files are there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from ddpkit import config as configs
from tests import pages
from tests.launch.shell import ROOT, Shell

README = (ROOT / "README.md").read_text()


def _block(language: str) -> str:
    (text,) = pages.of_language("README.md", language)
    return text


def test_the_first_command_trains_digits_and_leaves_what_the_page_lists(shell: Shell) -> None:
    # The page's command, from the repository's root, but into a directory of the test's own.
    assert "ddpkit run configs/digits.yaml" in README
    os.symlink(ROOT / "examples", shell.cwd / "examples")
    command = ("run", ROOT / "configs/digits.yaml", "-o", "run_dir=run", "-o", "launch.backend=gloo")
    first = shell.run(*command, "-o", "launch.nproc_per_node=2")
    assert first.returncode == 0, first.stderr
    lines = [json.loads(line) for line in (shell.cwd / "run/metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if line["kind"] == "eval"][-1]["accuracy"] >= 0.97
    listed = re.findall(r"^    (\S+?)/?   +\S", README.partition("## What a run leaves")[2], re.MULTILINE)
    assert len(listed) == 7
    for name in listed:
        there = (shell.cwd / "run" / name.replace("00000050", "00000400")).exists()
        assert there == (name != "failure.json"), name
    assert "is finished" in shell.run(*command, "-o", "launch.nproc_per_node=2").stderr


@pytest.mark.parametrize("ranks", [0, 2])
def test_the_loop_of_ones_own_runs_under_python_and_on_ranks(shell: Shell, ranks: int) -> None:
    shell.script("own.py", _block("python"))
    arguments = ("launch", "--nproc-per-node", str(ranks), "own.py") if ranks else ("own.py",)
    done = shell.run(*arguments) if ranks else shell.run("own.py", prefix=("python",))
    assert done.returncode == 0, done.stderr
    assert (shell.cwd / "runs/own/checkpoints/step-00000024/manifest.json").exists()


def test_the_config_of_the_page_is_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(_block("yaml"))
    assert configs.load(path).data.global_batch_size == 64


def test_the_map_names_files_that_are_there() -> None:
    text = (ROOT / "docs/map.md").read_text()
    named = re.findall(r"`((?:ddpkit|launch|tests|docs|configs)/[\w/.]+)`", text)
    assert len(named) > 40
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_module_is_on_the_map() -> None:
    text = (ROOT / "docs/map.md").read_text()
    plumbing = {"__init__.py", "__main__.py", "errors.py", "orphans.py", "lines.py", "output.py", "job.py"}
    files = [path for part in ("ddpkit", "launch") for path in (ROOT / part).rglob("*.py")]
    assert [path.name for path in files if path.name not in plumbing and path.name not in text] == []
