"""The same on GPUs: one rank for each, NCCL, and the same bits after a stop."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.launch.conftest import shell
from tests.launch.shell import Shell, finish, wait_for

__all__ = ["shell"]  # the fixture

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def _config(shell: Shell, name: str) -> Path:
    return shell.config(
        f"{name}.yaml",
        run_dir=name,
        launch={"nproc_per_node": "auto"},
        train={
            "step": "tests.toy:slow_step",
            "eval_step": "tests.toy:eval_step",
            "epochs": 20,
            "deterministic": True,
        },
    )


def _end(shell: Shell, name: str) -> tuple[dict[str, bytes], list[object]]:
    newest = max((shell.cwd / name / "checkpoints").glob("step-*"))
    lines = [json.loads(line) for line in (shell.cwd / name / "metrics.jsonl").read_text().splitlines()]
    values: list[object] = [{key: value for key, value in line.items() if key != "time"} for line in lines]
    return {path.name: path.read_bytes() for path in newest.iterdir()}, values


def test_a_stopped_run_goes_on_with_the_same_bits(shell: Shell) -> None:
    assert shell.run("run", _config(shell, "whole")).returncode == 0
    config = _config(shell, "stopped")
    child = shell.start("run", config)
    wait_for(lambda: (shell.cwd / "stopped/metrics.jsonl").exists() and _has_steps(shell), "some steps", 120)
    child.send_signal(signal.SIGTERM)
    assert finish(child).returncode == 75
    assert shell.run("run", config).returncode == 0
    assert _end(shell, "stopped") == _end(shell, "whole")


def _has_steps(shell: Shell) -> bool:
    return "train" in (shell.cwd / "stopped/metrics.jsonl").read_text()
