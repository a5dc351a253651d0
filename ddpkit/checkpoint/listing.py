"""Which checkpoints a run directory holds, by the names of their directories. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ddpkit.checkpoint import manifest
from ddpkit.checkpoint.manifest import Manifest
from ddpkit.errors import BrokenCheckpoint, UserError
from ddpkit.selection import Best

_COMPLETE = re.compile(r"step-(\d{8,})")
_SET_ASIDE = re.compile(r"broken-step-(\d{8,})-\d+")


@dataclass(frozen=True)
class Listed:
    """One checkpoint: its step, its directory, and what is wrong with it (None: verified, intact)."""

    step: int
    path: Path
    problem: str | None


def checkpoints_directory(run_dir: Path) -> Path:
    """Where the checkpoints of a run are."""
    return run_dir / "checkpoints"


def step_name(step: int) -> str:
    """The name of the directory of a complete checkpoint, ``step-00000050``."""
    return f"step-{step:08d}"


def complete(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every entry named as a complete checkpoint, newest first; nothing is verified."""
    return _named(directory, _COMPLETE)


def set_aside(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints found broken earlier and renamed, newest first."""
    return _named(directory, _SET_ASIDE)


def verified(path: Path, step: int) -> Manifest:
    """The manifest of an intact checkpoint of this very step; raises as `manifest.verify` does."""
    found = manifest.verify(path)
    if found.step != step:
        raise BrokenCheckpoint(f"{path / manifest.NAME}: expected step {step}, found {found.step}: was it renamed?")
    return found


def listing(run_dir: Path) -> list[Listed]:
    """Every checkpoint of the run, newest first, each verified; without those set aside earlier."""
    return [Listed(step, path, _problem(path, step)) for step, path in complete(checkpoints_directory(run_dir))]


def intact_newest(run_dir: Path) -> Manifest | None:
    """The manifest of the newest intact checkpoint; None when there is none. Changes nothing.

    Raises UserError when a checkpoint that is newer cannot be judged (no permission, a newer format).
    """
    for step, path in complete(checkpoints_directory(run_dir)):
        try:
            return verified(path, step)
        except BrokenCheckpoint:
            continue
    return None


def has_any(run_dir: Path) -> bool:
    """Whether the run has ever saved a checkpoint, intact by now or not: then it never begins afresh."""
    directory = checkpoints_directory(run_dir)
    return bool(complete(directory) or set_aside(directory))


def evaluated(directory: Path, best: Best) -> list[tuple[float, int, Path]]:
    """(value, step, path) of every checkpoint that was saved after an evaluation of its step, the best first.

    Of equal ones the earlier is the better. Nothing but the manifests is verified.
    """
    found = []
    for step, path in complete(directory):
        try:
            progress = manifest.read(path).progress
        except (BrokenCheckpoint, UserError):
            continue
        value = progress.get("values", {}).get(best.metric)
        if value is not None and progress.get("evaluated") == step:
            found.append((value, step, path))
    return sorted(found, key=lambda each: (each[0] if best.mode == "min" else -each[0], each[1]))


def intact_best(run_dir: Path) -> tuple[Best, Manifest | None] | None:
    """What makes a checkpoint of this run the best, and the manifest of the best intact one; None if nothing does."""
    newest = intact_newest(run_dir)
    rule = newest.progress.get("best") if newest is not None else None
    if rule is None:
        return None
    best = Best(**rule)
    for _, step, path in evaluated(checkpoints_directory(run_dir), best):
        try:
            return best, verified(path, step)
        except (BrokenCheckpoint, UserError):
            continue
    return best, None


def _problem(path: Path, step: int) -> str | None:
    try:
        verified(path, step)
    except (BrokenCheckpoint, UserError) as error:
        return str(error)
    return None


def _named(directory: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    try:
        entries = list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{directory}: cannot be read: {error.strerror}") from error
    matches = [(pattern.fullmatch(entry.name), entry) for entry in entries]
    return sorted(((int(match[1]), entry) for match, entry in matches if match), reverse=True)
