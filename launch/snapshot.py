"""A copy of the code for a Slurm job, as it is when the job is submitted, whatever becomes of the original.

What git knows of the current directory's repository is copied, as it lies there: committed or not. The job imports
from the copy, while its working directory, and with it the paths of data and results, stays what it was.
(submitit's RsyncSnapshot clones the repository beforehand, wants rsync, and has the job work in the copy.)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from ddpkit import config as configs
from ddpkit import factories, references
from ddpkit.errors import UserError

from .job import Job
from .plan import Plan


@dataclass(frozen=True)
class _Copy:
    """A repository, and where it was copied to."""

    root: Path
    copy: Path

    def path(self, original: Path) -> Path | None:
        """Where the copy of a file or folder is; None for what was not copied."""
        found = self.relative(original)
        return self.copy / found if found is not None and (self.copy / found).exists() else None

    def relative(self, original: Path) -> Path | None:
        """The path inside the repository, a link standing for itself; None for what lies elsewhere."""
        here = Path.cwd() / original
        here = here.parent.resolve() / here.name
        return here.relative_to(self.root) if here.is_relative_to(self.root) else None


def take(plans: Sequence[Plan], folder: Path) -> list[Plan]:
    """Copy the repository to ``folder``, and give the plans that use the copy.

    Raises:
        UserError: the current directory is in no repository, or something that a plan needs is not known to git.
    """
    root = Path(_git("rev-parse", "--show-toplevel").rstrip("\n"))
    for name in _git("ls-files", "-z", "--recurse-submodules", cwd=root).split("\0"):
        original, copied = root / name, folder / name
        if name and (original.is_file() or original.is_symlink()):  # git still knows what was just deleted
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(original, copied, follow_symlinks=False)
    made = _Copy(root, folder)
    return [replace(plan, job=_moved(plan.job, made)) for plan in plans]


def _moved(job: Job, made: _Copy) -> Job:
    search_path = tuple(str(copied) for entry in job.search_path if (copied := made.path(Path(entry))))
    # Folders of the repository that Python looks into anyway: PYTHONPATH, an editable installation.
    inside = (made.path(Path(entry)) for entry in sys.path if entry)
    search_path += tuple(str(copied) for copied in inside if copied and str(copied) not in search_path)
    moved = replace(job, search_path=search_path)
    if job.kind in ("run", "eval"):
        return _moved_config(moved, made)
    if job.kind == "script":
        target = made.path(Path(job.target))
        if target is None:
            raise UserError(f"launch.snapshot: {_unknown(job.target, made)}")
        return replace(moved, target=str(target))
    top = job.target.partition(".")[0]
    was_here = PathFinder.find_spec(top, list(job.search_path)) is not None
    if was_here and PathFinder.find_spec(top, list(search_path)) is None:
        raise UserError(f"launch.snapshot: {_unknown(f'the module {top}', made)}")
    return moved


def _moved_config(job: Job, made: _Copy) -> Job:
    config = configs.from_tree(job.config)
    files = {}
    for key, ref in factories.all_references(config):
        parsed = references.parse(ref)
        path = Path(parsed.module_or_path)
        if parsed.is_file and made.relative(path) is not None:
            copied = made.path(path)
            if copied is None:
                raise UserError(f"launch.snapshot: {key}: {_unknown(str(path), made)}")
            files[ref] = f"{copied}:{parsed.name}"
    tree = _replaced(job.config, files)
    outside = [entry for entry in sys.path[1:] if made.path(Path(entry)) is None]
    problems = factories.check(configs.from_tree(tree), [*job.search_path, *outside])
    if problems:
        lines = "\n".join(problems)
        raise UserError(
            f"launch.snapshot: the copy of {made.root} lacks what git does not know (`git add` it):\n{lines}"
        )
    # What the run directory keeps is the config as it was given: the next start may have another copy.
    return replace(job, config=tree, options=job.options | {"config": configs.dump(config)})


def _replaced(tree: Any, words: dict[str, str]) -> Any:
    if isinstance(tree, dict):
        return {key: _replaced(value, words) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_replaced(value, words) for value in tree]
    return words.get(tree, tree) if isinstance(tree, str) else tree


def _unknown(what: str, made: _Copy) -> str:
    return f"{what} is not among the files that git knows in {made.root}; `git add` it, or submit without a snapshot"


def _git(*arguments: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise UserError("launch.snapshot: git is not installed here; submit without a snapshot") from None
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"launch.snapshot: {cwd or Path.cwd()} is in no git repository that can be read: {error.stderr.strip()}"
        ) from None
    return done.stdout
