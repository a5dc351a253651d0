"""The examples as they are, on ranks that start in a fraction of a second, killed where a test says."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path

from ddpkit import config as configs
from ddpkit.agree import RankFailed
from ddpkit.testing import RankDied, run_ranks
from tests.resume import faults
from tests.resume.faults import Fault, plan
from tests.resume.runs import ROOT, Tree

EXAMPLES = ROOT / "examples"


def tree(example: str, run_dir: Path, *overrides: str) -> Tree:
    """The config of an example, smaller: what `-o` would make of it."""
    path = ROOT / "configs/digits.yaml" if example == "digits" else EXAMPLES / example / "config.yaml"
    made: Tree = configs.to_tree(configs.load(path, [f"run_dir={run_dir}", *overrides]))
    return made


def killed_in_save(directory: Path, step: int) -> dict[str, str]:
    """The variables by which rank zero is killed (SIGKILL) just before a checkpoint would have its name."""
    return plan(directory, Fault(at="os.rename", path=f"step-{step:08}"))


def script(path: Path, ranks: int, cwd: Path, env: dict[str, str] | None = None) -> str | None:
    """Run a script as a launcher would, in a directory; what rank zero printed, or None if a rank was killed."""
    cwd.mkdir(exist_ok=True)
    try:
        return run_ranks(_as_main, ranks, path, cwd, env or {}, timeout_s=110)[0]
    except (RankDied, RankFailed):
        return None


def _as_main(path: Path, cwd: Path, env: dict[str, str]) -> str:
    os.environ.update(env)
    os.chdir(cwd)
    sys.path.insert(0, str(path.parent))
    faults.watch()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(path), run_name="__main__")
    return out.getvalue()
