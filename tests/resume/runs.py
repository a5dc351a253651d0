"""Runs for tests: their configs, ways to start them, and what they leave, as values that can be compared."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ddpkit import config as configs
from ddpkit import worker
from ddpkit.agree import RankFailed
from ddpkit.checkpoint.contents import load_model_tensors
from ddpkit.errors import DdpkitError, StopRequested
from ddpkit.testing import RankDied, run_ranks
from launch.cli import main
from tests.resume import faults

ROOT = Path(__file__).parents[2]

Tree = dict[str, Any]


def tree(run_dir: Path, **changes: Any) -> Tree:
    """A config with everything in it that could break a resume; ``changes`` by key path, dots written as ``__``."""
    made: Tree = {
        "run_dir": str(run_dir),
        "launch": {"nproc_per_node": 2, "timeout_s": 60.0},
        "model": {"factory": "tests.resume.faults:model", "args": {}},
        "data": {
            "train": {"factory": "tests.resume.faults:dataset", "args": {"length": 50}},
            "eval": {"factory": "tests.resume.faults:dataset", "args": {"length": 11}},
            "global_batch_size": 8,
            "eval_batch_size": 3,
            "loader": {"num_workers": 0},
        },
        "optimizer": {"factory": "torch.optim:AdamW", "args": {"lr": 0.01}},
        "scheduler": {"factory": "torch.optim.lr_scheduler:CosineAnnealingLR", "args": {"T_max": 20}},
        "train": {"step": "tests.resume.faults:step", "eval_step": "tests.resume.faults:eval_step", "epochs": 3},
        "checkpoint": {"every_steps": 4, "keep": 3},
        "log_every": 3,
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        place = made
        for name in path:
            place = place[name]
        place[last] = value
    return made


def write(path: Path, config: Tree) -> Path:
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


# ---------------------------------------------------------------------- without a launcher: 0.5 s a start


def _as_rank(config: Tree, attempt: int, env: dict[str, str], keep_going: bool) -> str:
    multiprocessing.set_start_method("fork", force=True)  # as in a launcher's rank; this one comes from a fork server
    os.environ.update(env | {"TOY_ATTEMPT": str(attempt)})
    faults.watch()  # now: what the config refers to need not come from the tests
    try:
        worker.work("run", configs.to_tree(configs.from_tree(config)), {"attempt": attempt})
    except StopRequested as stop:
        return stop.reason
    except DdpkitError as error:
        if not keep_going:
            raise
        return f"{type(error).__name__}: {error}"
    return "done"


def start(
    config: Tree,
    ranks: int,
    env: dict[str, str] | None = None,
    attempt: int = 0,
    errors: bool = False,
    timeout_s: float = 110,
) -> str:
    """Start ranks and let them run to whatever end; says which: "done", a stop's reason, or "killed".

    With ``errors`` ddpkit's own errors count as ends too, the same on every rank; otherwise they are raised.
    """
    try:
        ends = run_ranks(_as_rank, ranks, config, attempt, env or {}, errors, timeout_s=timeout_s)
    except (RankDied, RankFailed, ConnectionError, EOFError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # for a test that has meant no such thing
        return "killed"
    except RuntimeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        if not any(sign in str(error) for sign in ("onnection", "peer", "gloo", "DataLoader worker", "ancdata")):
            raise
        return "killed"  # the first to speak was a neighbour in a collective, or the rank of a worker
    assert len(set(ends)) == 1, ends
    return ends[0]


def to_the_end(config: Tree, ranks: int | list[int], env: dict[str, str] | None = None, most: int = 12) -> list[str]:
    """Start again and again until the run is done; the ends of all starts. ``ranks`` may differ by start."""
    ends: list[str] = []
    sizes = [ranks] if isinstance(ranks, int) else ranks
    while not ends or ends[-1] != "done":
        assert len(ends) < most, ends
        ends.append(start(config, sizes[min(len(ends), len(sizes) - 1)], env, attempt=len(ends)))
    return ends


# ---------------------------------------------------------------------- from the shell


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def shell(*arguments: str, env: dict[str, str] | None = None, timeout_s: float = 100) -> Ended:
    """``ddpkit ARGUMENTS`` to its end; fails if a process of it is left after that."""
    with started(*arguments, env=env) as process:
        out, err = process.communicate(timeout=timeout_s)
    return Ended(process.returncode, out, err)


@contextlib.contextmanager
def started(*arguments: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """``ddpkit ARGUMENTS`` under way; on leaving it is waited for, and then nothing of it may be left."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpkit", *arguments],
        cwd=ROOT,
        env=os.environ | {"TOY_RUN": mark} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
        process.wait(100)
        until(lambda: not marked(mark), 30)
    finally:
        process.kill()
        for one in marked(mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.communicate()


def marked(mark: str) -> list[psutil.Process]:
    """The processes that were started under a mark, wherever they hang in the tree by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TOY_RUN") == mark:
                found.append(process)
    return found


def until(condition: Callable[[], bool], timeout_s: float = 80) -> None:
    """Wait for a condition; it is asked again and again."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> Ended:
    """The same in this very process: for what starts no ranks."""
    try:
        code = main(arguments)
    except SystemExit as leaving:  # argparse
        code = int(leaving.code or 0)
    captured = capsys.readouterr()
    return Ended(code, captured.out, captured.err)


# ---------------------------------------------------------------------- what a run has left


def assert_close_end(run_dir: Path, reference: Path, rtol: float, atol: float) -> None:
    """The same tensors in the last checkpoint, spread or whole, and every metric but the time, up to rounding."""
    ours, theirs = (load_model_tensors(last_checkpoint(path)) for path in (run_dir, reference))
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=name)
    for one, other in zip(metrics(run_dir), metrics(reference), strict=True):
        assert one.pop("kind") == other["kind"]
        assert one == {key: pytest.approx(other[key], rel=rtol) for key in one}


def last_checkpoint(run_dir: Path) -> Path:
    return sorted((run_dir / "checkpoints").glob("step-*"))[-1]


def metrics(run_dir: Path) -> list[Tree]:
    lines = _whole_lines(run_dir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def events(run_dir: Path, name: str | None = None) -> list[Tree]:
    return [line for line in _whole_lines(run_dir / "events.jsonl") if name in (None, line["event"])]


def _whole_lines(path: Path) -> list[Tree]:
    """Without the one that is being written."""
    return [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines() if line]


def assert_same_end(run_dir: Path, reference: Path) -> None:
    """The last checkpoint byte by byte, and every metric but the time."""
    ours, theirs = last_checkpoint(run_dir), last_checkpoint(reference)
    assert ours.name == theirs.name
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    for path in ours.iterdir():
        assert path.read_bytes() == (theirs / path.name).read_bytes(), path
    assert metrics(run_dir) == metrics(reference)
    assert not list((run_dir / "checkpoints").glob(".*")), "something half-written was left"
