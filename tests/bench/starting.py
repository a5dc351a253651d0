"""From the command to the first step, the command line itself, and how soon a killed group is back."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.bench.measure import SCRIPTS, Bar, Measurement, Row, Started, in_turn, start, tool
from tests.bench.scaling import footprint

_SCRIPT = str(SCRIPTS / "first_step.py")


def _ranks(nproc: int, repeats: int) -> list[Row]:
    commands = {
        "ddpkit": [tool("ddpkit"), "launch", "--nproc-per-node", str(nproc), _SCRIPT, "{mark}"],
        "torchrun": [tool("torchrun"), "--standalone", "--nproc-per-node", str(nproc), _SCRIPT, "{mark}"],
        "mp.spawn": [sys.executable, str(SCRIPTS / "first_step_spawn.py"), "{mark}", str(nproc)],
    }
    found: dict[str, list[Started]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            found[name].append(start(command))
    wall = {name: [each.to_mark for each in starts] for name, starts in found.items()}
    cpu = {name: [each.cpu for each in starts] for name, starts in found.items()}
    if nproc == 2:
        return [Row("start, 2 ranks", "s", wall["ddpkit"], Bar(0.5), "torchrun", wall["torchrun"])]
    return [
        Row("start, 8 ranks", "s", wall["ddpkit"], Bar(0.25), "torchrun", wall["torchrun"]),
        Row("start, 8 ranks", "s", wall["ddpkit"], Bar(0.25), "mp.spawn", wall["mp.spawn"]),
        Row("start, CPU time, 8 ranks", "s", cpu["ddpkit"], Bar(0.2), "torchrun", cpu["torchrun"]),
    ]


def _command_line(repeats: int) -> list[Row]:
    commands = {
        "CLI, --help": [tool("ddpkit"), "--help"],
        "CLI, --dry-run": [tool("ddpkit"), "run", "configs/digits.yaml", "--dry-run"],
        "CLI, refusal": [tool("ddpkit"), "run", "configs/digits.yaml", "-o", "sed=1"],
        "torch": [sys.executable, "-c", "import torch"],
    }
    found = in_turn({name: partial(_wall, command) for name, command in commands.items()}, repeats)
    peer = found.pop("torch")
    return [
        row
        for name, ours in found.items()
        for row in (Row(name, "s", ours, Bar(0.15), "import torch", peer), Row(name, "s", ours, Bar(0.3, of="ours")))
    ]


def _wall(command: Sequence[str]) -> float:
    begun = time.monotonic()
    subprocess.run(command, capture_output=True, timeout=60)
    return time.monotonic() - begun


def _recovery(repeats: int) -> list[Row]:
    script = str(SCRIPTS / "recover.py")
    ours = [tool("ddpkit"), "launch", "--nproc-per-node", "2", "-o", "launch.max_restarts=1", script]
    peer = [tool("torchrun"), "--nproc-per-node", "2", "--max-restarts", "1", "--rdzv-backend", "c10d"]
    peer += ["--rdzv-endpoint", "127.0.0.1:0", script]
    found = in_turn({"ours": lambda: _recover(ours), "peer": lambda: _recover(peer)}, repeats)
    return [Row("recovery from a killed rank", "s", found["ours"], Bar(0.5), "torchrun", found["peer"])]


def _recover(command: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "mark"
        # torchrun needs the second variable to restart with gloo on one node at all (torch 2.13).
        env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        done = subprocess.run([*command, str(mark)], capture_output=True, text=True, timeout=180, env=env)
        if not mark.exists():
            raise RuntimeError(f"{command}: no recovery\n{done.stdout}\n{done.stderr}")
        return float(mark.read_text())


def _memory(repeats: int) -> list[Row]:
    """Of a rank of eight in the middle of its training; pages that ranks share are counted once (PSS)."""
    found = in_turn({"ours": lambda: footprint(8, ours=True), "peer": lambda: footprint(8, ours=False)}, repeats)
    ours, peer = ([each["pss_mb"] for each in found[name]] for name in ("ours", "peer"))
    return [Row("memory of a rank, 8 ranks", "MB", ours, Bar(1.0), "by hand, torchrun", peer)]


MEASUREMENTS: dict[str, Measurement] = {
    "start-8": partial(_ranks, 8),
    "start-2": partial(_ranks, 2),
    "cli": _command_line,
    "recovery": _recovery,
    "memory": _memory,
}
