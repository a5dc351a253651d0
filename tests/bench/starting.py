"""From the command to the first step, and the command line itself."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

from tests.bench.measure import SCRIPTS, Row, Started, compare, start, tool

_SCRIPT = str(SCRIPTS / "first_step.py")


def rows(repeats: int) -> list[Row]:
    """Start on 8 and 2 ranks against torchrun and mp.spawn; help, dry run and refusal against ``import torch``."""
    return [*_ranks(8, repeats), *_ranks(2, repeats), *_command_line(max(repeats, 5))]


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
        return [compare("start, 2 ranks", "s", wall["ddpkit"], "torchrun", wall["torchrun"], 0.5)]
    return [
        compare("start, 8 ranks", "s", wall["ddpkit"], "torchrun", wall["torchrun"], 0.25),
        compare("start, 8 ranks", "s", wall["ddpkit"], "mp.spawn", wall["mp.spawn"], 0.25),
        compare("start, CPU time, 8 ranks", "s", cpu["ddpkit"], "torchrun", cpu["torchrun"], 0.2),
    ]


def _command_line(repeats: int) -> list[Row]:
    import_torch = [sys.executable, "-c", "import torch"]
    commands = {
        "CLI, --help": [tool("ddpkit"), "--help"],
        "CLI, --dry-run": [tool("ddpkit"), "run", "configs/digits.yaml", "--dry-run"],
        "CLI, refusal": [tool("ddpkit"), "run", "configs/digits.yaml", "-o", "sed=1"],
    }
    found: dict[str, list[float]] = {name: [] for name in (*commands, "torch")}
    for _ in range(repeats):
        for name, command in (*commands.items(), ("torch", import_torch)):
            found[name].append(_wall(command))
    return [compare(name, "s", found[name], "import torch", found["torch"], 0.15) for name in commands]


def _wall(command: Sequence[str]) -> float:
    begun = time.monotonic()
    subprocess.run(command, capture_output=True, timeout=60)
    return time.monotonic() - begun
