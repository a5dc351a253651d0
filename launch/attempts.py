"""What the launcher writes into a run directory: a file for each attempt, its logs, and the newest failure report."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpkit.errors import EXIT_STOPPED, UserError
from ddpkit.world import Allocation

from .causes import explain
from .job import Failure


@dataclass(frozen=True)
class AttemptFile:
    """One start of the ranks of a run."""

    run_dir: Path
    number: int
    begun: dict[str, Any] | None
    """What is known of it; None where another node's launcher writes it down."""

    @property
    def log_dir(self) -> Path:
        """Where the ranks' logs go."""
        return log_dir(self.run_dir, self.number)

    def end(self, how: str, exit_code: int, requeued: str | None = None) -> None:
        """Note how the attempt ended; ``requeued``: why Slurm starts the job again."""
        if self.begun is None:
            return
        ended = {"ended": time.time(), "how": how, "exit_code": exit_code}
        if requeued is not None:
            ended["requeued"] = requeued
        write(_path(self.run_dir, self.number), self.begun | ended)


def begin(
    run_dir: Path, launcher: str, nproc: int, command: tuple[str, ...], allocation: Allocation | None = None
) -> AttemptFile:
    """Take the next attempt's number and make its folders. ``allocation``: the Slurm job in which it runs.

    Raises:
        UserError: the run directory cannot be written.
    """
    begun = {
        "launcher": launcher,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ranks": nproc,
        "command": list(command),
        "started": time.time(),
    }
    if allocation is not None:
        begun |= {"job": allocation.job_id, "restart_count": allocation.restart_count}
    with _writing_into(run_dir):
        (run_dir / "attempts").mkdir(parents=True, exist_ok=True)
        number = _take_number(run_dir)
        attempt = AttemptFile(run_dir, number, {"attempt": number} | begun)
        attempt.log_dir.mkdir(parents=True, exist_ok=True)
    write(_path(run_dir, number), {"attempt": number} | begun)
    return attempt


def follow(run_dir: Path, number: int) -> AttemptFile:
    """Join an attempt that another node's launcher has begun: only the logs of the ranks here are written here.

    Raises:
        UserError: the run directory cannot be written.
    """
    attempt = AttemptFile(run_dir, number, None)
    with _writing_into(run_dir):
        attempt.log_dir.mkdir(parents=True, exist_ok=True)
    return attempt


@contextlib.contextmanager
def _writing_into(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run_dir: {run_dir} cannot be written: {error.strerror}. Choose another one, or make room or change its "
            "permissions."
        ) from error


def log_dir(run_dir: Path, number: int) -> Path:
    """Where the ranks' logs of an attempt go."""
    return run_dir / "logs" / f"attempt-{number}"


def count_saved(run_dir: Path) -> int:
    """How many attempts have ended with their state saved."""
    count = 0
    for path in (run_dir / "attempts").glob("attempt-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):  # taken, but not written yet
            count += json.loads(path.read_text()).get("exit_code") == EXIT_STOPPED
    return count


def report_failure(
    failures: tuple[Failure, ...],
    attempt: AttemptFile | None,
    without_logs: str = "run with --run-dir DIR to keep each rank's output",
) -> str:
    """The failure report as text: the cause once, its consequences in a line each; also kept as failure.json."""
    first, *others = failures
    logs = str(attempt.log_dir / f"rank-{first.rank}.log") if attempt is not None else None
    advice = "its output: " + logs if logs else without_logs
    said = _first_line(first) if first.traceback else first.message  # the rest of it is in the traceback
    lines = [f"rank {first.rank} on {first.host} failed: {_with_kind(first, said)}"]
    if first.traceback:
        lines += ["", *("  " + line for line in first.traceback.rstrip().splitlines()), ""]
    if first.last_lines:
        lines += ["  its last words:", *("  | " + line for line in first.last_lines)]
    lines += [f"  {line}" for line in _consequences(first, others)]
    lines.append(advice)
    if attempt is not None and attempt.begun is not None:
        tree = _tree(first) | {
            "attempt": attempt.number,
            "log": logs,
            "others": [_tree(other) for other in others],
        }
        write(attempt.run_dir / "failure.json", tree)
    return "\n".join(lines)


def _consequences(first: Failure, others: list[Failure]) -> list[str]:
    """A line for all that say the same: most of many ranks have lost their connection to the one that failed."""
    ranks: dict[str, list[int]] = {}
    for other in others:
        is_same = (other.kind, other.message) == (first.kind, first.message)
        line = _ADDRESS.sub("", _first_line(other))
        brief = line.partition(". ")[0] if other.is_consequence else line  # gloo goes on about where to look
        said = "" if is_same else _with_kind(other, brief[:160])
        ranks.setdefault(said, []).append(other.rank)
    same = ranks.pop("", [])
    lines = [f"the same on rank(s) {_listed(same)}"] if same else []
    return lines + [
        f"then rank{'s' if len(those) > 1 else ''} {_listed(those)}: {said}" for said, those in ranks.items()
    ]


_ADDRESS = re.compile(r"^\[/\S+:\d+\] | \[\S+\]:\d+")  # gloo's line of its own source; a peer's address
_LISTED = 16


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, sorted(ranks)[:_LISTED]))
    return shown if len(ranks) <= _LISTED else f"{shown} and {len(ranks) - _LISTED} more"


def _first_line(failure: Failure) -> str:
    return (failure.message.splitlines() or [""])[0]


def _with_kind(failure: Failure, said: str) -> str:
    return ": ".join(filter(None, (failure.kind, said)))


def write(path: Path, tree: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all; a disk that refuses it ends nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(tree, indent=1) + "\n")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def newest(run_dir: Path) -> int:
    """The number of the newest attempt; -1 if there was none."""
    taken = [int(path.stem[8:]) for path in (run_dir / "attempts").glob("attempt-*.json") if path.stem[8:].isdigit()]
    return max(taken, default=-1)


def _take_number(run_dir: Path) -> int:
    number = newest(run_dir) + 1
    while True:
        try:
            _path(run_dir, number).touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return number


def _path(run_dir: Path, number: int) -> Path:
    return run_dir / "attempts" / f"attempt-{number}.json"


def _tree(failure: Failure) -> dict[str, Any]:
    return {
        "rank": failure.rank,
        "host": failure.host,
        "kind": failure.kind or None,
        "message": failure.message,
        "exit": explain(failure.exit_code).partition(" (")[0],
        "traceback": failure.traceback or None,
        "last_lines": list(failure.last_lines),
        "memory": vars(failure.memory) if failure.memory else None,
    }
