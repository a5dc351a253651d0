"""Commands as a user would give them, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 100.0  # no command of these tests takes longer, on a machine that is five times slower


@dataclass
class Shell:
    """A directory to work in, and a mark in the environment by which every descendant is found again."""

    cwd: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def script(self, name: str, text: str) -> Path:
        path = self.cwd / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def config(self, name: str = "config.yaml", **changes: Any) -> Path:
        """A run of the toy model on two ranks; ``changes`` replace whole sections."""
        tree = {
            "run_dir": "run",
            "launch": {"nproc_per_node": 2},
            "model": {"factory": "tests.toy:model"},
            "data": {
                "train": {"factory": "tests.toy:dataset"},
                "eval": {"factory": "tests.toy:dataset", "args": {"length": 10}},
                "global_batch_size": 16,
            },
            "optimizer": {"factory": "torch.optim:SGD", "args": {"lr": 0.01}},
            "train": {"step": "tests.toy:step", "eval_step": "tests.toy:eval_step", "epochs": 1},
            "checkpoint": {"every_steps": 5},
        }
        path = self.cwd / name
        path.write_text(json.dumps(tree | changes))
        return path

    def env(self, **variables: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        return inherited | {"DDPKIT_TEST_MARK": self.mark, "PYTHONPATH": str(ROOT)} | variables

    def start(self, *command: str | Path, prefix: tuple[str, ...] = (), **options: Any) -> subprocess.Popen[bytes]:
        """Start ``python -m ddpkit`` with these arguments, or another command given as ``prefix``."""
        argv = [*(prefix or (sys.executable, "-m", "ddpkit")), *map(str, command)]
        variables = options.pop("env", {})
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        child: subprocess.Popen[bytes] = subprocess.Popen(
            argv, cwd=self.cwd, env=self.env(**variables), **(pipes | options)
        )
        self.children.append(child)
        return child

    def run(self, *command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        return finish(self.start(*command, **options))

    def survivors(self) -> list[psutil.Process]:
        """Processes that carry the mark, wherever they hang in the process tree."""
        needle = f"DDPKIT_TEST_MARK={self.mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if needle in (entry / "environ").read_bytes():
                        found.append(psutil.Process(int(entry.name)))
                except (OSError, psutil.Error):
                    continue
        return found

    def assert_nothing_left(self, within_s: float = 30.0) -> None:
        deadline = time.monotonic() + within_s
        while left := self.survivors():
            if time.monotonic() > deadline:
                told = [" ".join(map(str, (process.pid, process.status(), process.cmdline()))) for process in left]
                for process in left:
                    process.kill()
                raise AssertionError(f"left behind: {told}")
            time.sleep(0.05)


def finish(child: subprocess.Popen[bytes], timeout_s: float = HANG_S) -> subprocess.CompletedProcess[str]:
    """Wait for a command; its output as text."""
    out, err = child.communicate(timeout=timeout_s)
    texts = [(each or b"").decode(errors="replace") for each in (out, err)]
    return subprocess.CompletedProcess(child.args, child.returncode, *texts)


def wait_for(condition: Callable[[], Any], what: str = "the condition", within_s: float = 60.0) -> Any:
    """Ask until the answer is yes, and return it."""
    deadline = time.monotonic() + within_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {within_s:g} s"
        time.sleep(0.02)
    return answer


def interrupt_group(child: subprocess.Popen[bytes]) -> None:
    """What a terminal does on Ctrl-C; the command was started with ``start_new_session=True``."""
    os.killpg(child.pid, signal.SIGINT)
