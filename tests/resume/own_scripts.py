"""Scripts with loops of their own, as text: played on ranks in a folder, killed, and started again until they end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ddpkit.agree import RankFailed
from ddpkit.session import Runtime
from ddpkit.testing import RankDied, run_ranks
from tests.resume import faults
from tests.resume.faults import Fault, pending, plan
from tests.resume.runs import assert_same_end, events


def play(source: str, folder: Path, env: dict[str, str]) -> int:
    """Run a script in a folder, on this rank; how many layers it has called."""
    os.environ.update(env)
    # Which saves are complete when it is killed must not depend on the machine. (This process ends with the test.)
    defaults = Runtime.resume.__kwdefaults__
    assert defaults is not None  # it has keywords
    defaults["asynchronous"] = False
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    visits = faults.watch().visits["train"]

    def count(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.Linear):
            faults.watch().come_to("train")

    handle = register_module_forward_pre_hook(count)
    try:
        exec(compile(source, f"<{folder.name}>", "exec"), {"__name__": "__main__"})
    finally:
        handle.remove()
    return faults.watch().visits["train"] - visits


def play_all(sources: dict[str, str], folder: Path) -> dict[str, int]:
    """All of them one after the other, each in a folder with its name; how many layers each has called."""
    return {name: play(source, folder / name, {}) for name, source in sources.items()}


def to_the_end(source: str, folder: Path, env: dict[str, str], ranks: int = 2) -> int:
    """Start it again until it is done; how often it was killed."""
    for kills in range(6):
        try:
            run_ranks(play, ranks, source, folder, env)
        except (RankDied, RankFailed):
            continue
        return kills
    raise AssertionError("it is killed again and again")


def assert_killed_twice_it_ends_the_same(source: str, calls: int, reference: Path, tmp_path: Path) -> None:
    """Killed with all its ranks after a third of its calls, and again soon after the restart."""
    env = plan(
        tmp_path / "faults",
        Fault("train", calls // 3, rank=1, whom="group"),
        Fault("train", calls // 3 + 3, rank=0, whom="group"),
    )
    run_dir = tmp_path / "run/runs/own"
    assert to_the_end(source, tmp_path / "run", env) == 2
    assert not pending(tmp_path / "faults")
    assert len(events(run_dir, "restored")) >= 1
    assert_same_end(run_dir, reference / "runs/own")
    assert len(events(run_dir, "finished")) == 1
