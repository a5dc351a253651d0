"""What a run has left in its directory. Half-written files are no reason to fail, and long ones none to wait.

metrics.jsonl may have a million lines: of those only the newest are read here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]

STARTS = ("started", "restored")
_PLACE = ("kind", "step", "epoch", "samples", "time")  # of a line of metrics: all but its values
_TAIL = 1 << 16  # bytes of metrics.jsonl that hold the newest lines


@dataclass(frozen=True)
class Job:
    """A Slurm job that was submitted and has not said how it ended.

    Attributes:
        number: Slurm's.
        since: when it was submitted, in Unix time.
    """

    number: str
    since: float


def attempt_files(run_dir: Path) -> list[Line]:
    """What launchers have written about each attempt, in order."""
    found = []
    for path in (run_dir / "attempts").glob("attempt-*.json"):
        tree = json_file(path)
        if tree is not None and path.stem[8:].isdigit():
            found.append({**tree, "attempt": int(path.stem[8:])})
    return sorted(found, key=lambda attempt: int(attempt["attempt"]))


def json_file(path: Path) -> Line | None:
    """The JSON object in a file; None where there is none, or not yet."""
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def events(run_dir: Path, *, but: Sequence[str] = ()) -> list[Line]:
    """The events in order, without those of the names in ``but``, which may be many.

    Of those, the one before the start of another attempt is kept: it may be the newest sign of life of the one before.
    """
    try:
        content = (run_dir / "events.jsonl").read_bytes()
    except OSError:
        return []
    lines = content.splitlines()
    dropped, starts = _beginnings(but), _beginnings(STARTS)  # as they are written: not even looked at
    kept = (
        line
        for line, following in zip(lines, [*lines, b""][1:], strict=True)
        if not line.startswith(dropped) or following.startswith(starts)
    )
    return [line for line in parsed(kept) if isinstance(line.get("event"), str)]


def _beginnings(names: Sequence[str]) -> tuple[bytes, ...]:
    return tuple(f'{{"event": "{name}"'.encode() for name in names)


def newest_lines(path: Path, back_to: int | None = None) -> list[Line]:
    """The newest lines of metrics, in order; with ``back_to`` as many more as it takes to reach one of that step."""
    size = _TAIL
    while True:
        try:
            with path.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - size))
                found = [line for line in parsed(file.read().splitlines()) if is_metric(line)]
        except OSError:
            return []
        if size >= end or (found and (back_to is None or found[0]["step"] <= back_to)):
            return found
        size *= 4


def parsed(lines: Iterable[bytes]) -> Iterator[Line]:
    """The JSON objects among lines; half a line is none."""
    for line in lines:
        try:
            tree = json.loads(line)
        except ValueError:
            continue
        if isinstance(tree, dict):
            yield tree


def is_metric(line: Line) -> bool:
    """Whether it is a line of metrics, as far as one relies on it."""
    return (
        isinstance(line.get("kind"), str) and isinstance(line.get("step"), int) and isinstance(line.get("time"), dict)
    )


def values(line: Line) -> dict[str, float]:
    """What a line of metrics has recorded, by name; only numbers can be shown."""
    return {name: value for name, value in line.items() if name not in _PLACE and is_number(value)}


def is_number(value: object) -> bool:
    """Whether it is one; JSON's true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def waiting_job(run_dir: Path) -> Job | None:
    """The job that was submitted last, if it has not ended, as far as it has told itself."""
    scripts = [
        (int(path.parent.name[11:]), path)
        for path in (run_dir / "slurm").glob("submission-*/*_submission.sh")
        if path.parent.name[11:].isdigit()
    ]
    if not scripts or (path := max(scripts)[1]).with_name("outcome.json").exists():
        return None
    return Job(path.name.partition("_")[0], path.stat().st_mtime)


def attempts(files: Sequence[Line], told: Sequence[Line]) -> list[Line]:
    """All that is known of each attempt, from its launcher's file and from the events of its ranks, in order.

    A script that others have started has no launcher of ours, and its events alone.

    Returns:
        The files' entries, and: "began" and "from_step", when and where training went on first; "starts", how often
        ranks got so far; "to_step", where they stopped, failed or finished; "seen", the newest time known of it.
    """
    found = {int(file["attempt"]): dict(file) for file in files}
    for attempt in found.values():
        _see(attempt, attempt.get("started"), attempt.get("ended"))
    have_files = set(found)
    for event in told:
        number = event.get("attempt")
        if not isinstance(number, int):
            continue
        attempt = found.setdefault(number, {"attempt": number})
        _see(attempt, event.get("unix"))
        _add(attempt, event, is_all=number not in have_files)
    return [found[number] for number in sorted(found)]


def _add(attempt: Line, event: Line, is_all: bool) -> None:
    """What an event tells of its attempt; ``is_all``: nobody else tells of it."""
    name = event["event"]
    if name in STARTS:
        attempt["starts"] = attempt.get("starts", 0) + 1
        attempt.setdefault("began", event.get("unix"))
        attempt.setdefault("from_step", event.get("step"))
        attempt.setdefault("started", event.get("unix"))
        attempt.setdefault("ranks", event.get("world_size"))
    elif name in ("stopped", "failed", "finished"):
        attempt["to_step"] = event.get("step")
        if is_all:
            words = {"stopped": f"stopped on request ({event.get('reason')})", "failed": f"{event.get('cause')}"}
            attempt["how"] = words.get(name, "done")
            attempt["ended"] = event.get("unix")
    elif name == "requeued":
        attempt.setdefault("started", event.get("unix"))
        if is_all:
            attempt["requeued"] = event.get("reason")


def _see(attempt: Line, *times: Any) -> None:
    known = [each for each in (attempt.get("seen"), *times) if isinstance(each, (int, float))]
    if known:
        attempt["seen"] = max(known)


def now() -> float:
    """Unix time, by which everything here is dated."""
    return time.time()
