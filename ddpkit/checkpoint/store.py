"""Checkpoint policy: when a checkpoint counts, which one is loaded, what is set aside, what is pruned."""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

from ddpkit.checkpoint import contents, listing, manifest
from ddpkit.checkpoint.contents import Loaded, Part, Snapshot, Targets, load_model_tensors
from ddpkit.checkpoint.manifest import FileProof, Json, Manifest
from ddpkit.checkpoint.writer import free_bytes, fsync_directory, raise_save_failed
from ddpkit.errors import BrokenCheckpoint, DdpkitError, SaveFailed, StateError, Superseded, UserError
from ddpkit.selection import Best, is_better

__all__ = ["CheckpointStore", "Loaded", "Ranks", "SaveResult", "Snapshot", "load_model_tensors"]

T = TypeVar("T")

_FEWEST_GOOD = 2  # checkpoints known to be intact that pruning leaves, where `keep` allows


class Ranks(Protocol):
    """What the store needs of the other ranks; no torch collective, so that a thread may save."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    def conclude(self, name: str, value: Json, conclusion: Callable[[list[Json]], Json]) -> Json:
        """Get what rank zero concludes from every rank's ``value``, in the order of ranks. Collective; names recur."""


@dataclass(frozen=True)
class SaveResult:
    """A checkpoint that is there; ``written`` is False if it was there before; ``bytes`` is its size.

    ``durable_at`` is when it was: the time of `time.monotonic`, before older ones were pruned.
    """

    step: int
    path: Path
    bytes: int
    written: bool
    durable_at: float = field(compare=False)


class CheckpointStore:
    """The checkpoints in one directory (a run's ``checkpoints/``), written and read by all ranks together.

    directory: made on the first save. keep: how many checkpoints pruning leaves (at least 1).
    event(name, **fields) and warn(text) are called on rank zero only. fence() raises Superseded if this run
    may not write any more; rank zero asks it before everything that changes what is there. best: the best intact
    checkpoint by it is kept as well.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        ranks: Ranks,
        event: Callable[..., None],
        warn: Callable[[str], None],
        fence: Callable[[], None],
        best: Best | None = None,
    ) -> None:
        self._directory = directory
        self._keep = keep
        self._best = best
        self._ranks = ranks
        self._event = event
        self._warn = warn
        self._fence = fence
        self._known_good: set[int] = set()  # steps written or verified by this process

    def beside(self, ranks: Ranks) -> CheckpointStore:
        """The same store for a thread whose partners are ``ranks``; what is known of its checkpoints is shared.

        One of the two may be at work at a time.
        """
        other = CheckpointStore(self._directory, self._keep, ranks, self._event, self._warn, self._fence, self._best)
        other._known_good = self._known_good
        return other

    def save(self, step: int, take: Callable[[], Part]) -> SaveResult:
        """Write the checkpoint of ``step``, make it durable, prune the older ones. Collective.

        ``take`` gives this rank's part, or raises what kept it from being taken.
        On every rank the same: StateError for a state that cannot be saved; SaveFailed, naming rank, host,
        path, needed and free bytes and caused by an OSError with the errno, with the older checkpoints
        untouched and nothing left behind; Superseded. An intact checkpoint of this step is left as it is if its
        progress is the same, and replaced otherwise (the run stopped in an evaluation, say); a broken one is set
        aside.
        """
        part = self._agreed(take)
        target = self._directory / listing.step_name(step)
        begin = partial(self._begin, step, target, part.progress)
        begun = self._from_main("save/begin", begin, SaveFailed)
        if begun is None:
            return SaveResult(step, target, _size(manifest.read(target)), written=False, durable_at=time.monotonic())
        temporary = self._directory / begun["name"]
        try:
            content, size = self._write(step, part.progress, part, temporary)
            commit = partial(contents.commit, content, temporary, target, self._fence, replace=begun["replaces"])
            self._from_main("save/commit", commit, SaveFailed)
        except BaseException as error:
            if self._is_main:
                _discard(temporary)
            if isinstance(error, SaveFailed) and isinstance(error.__cause__, OSError):
                # What was written of it filled the disk while the error was raised; now rank zero has removed it.
                free = self._ranks.conclude("checkpoint/save/room", free_bytes(temporary), lambda found: found[0])
                room = f"the whole checkpoint needs about {part.total_bytes} bytes; {free} are free"
                raise SaveFailed(f"{error}\n({room} without it)") from error.__cause__
            raise
        durable_at = time.monotonic()
        if self._is_main:
            self._known_good.add(step)
            self._prune()
        return SaveResult(step, target, size, written=True, durable_at=durable_at)

    def load_newest(
        self, step: int | None = None, *, read_only: bool = False, into: Targets | None = None
    ) -> Loaded | None:
        """Read the newest intact checkpoint, or that of ``step``; None when there never was one. Collective.

        What fits a tensor of ``into`` is read straight into it, and is that tensor in the result: nothing is left to
        be copied. All else has memory of its own.

        Broken ones that are newer are renamed ``broken-step-...`` with a warning and an event "set_aside"
        (step, path, problem), unless ``read_only``. On every rank the same: BrokenCheckpoint when there are
        checkpoints and none is intact (nothing is renamed, and those set aside earlier count, so that no
        later start begins afresh); UserError when ``step`` is not there, or a checkpoint cannot be judged (no
        permission, a newer format).
        """
        picked = self._from_main("load/pick", partial(self._pick, step, read_only), BrokenCheckpoint)
        if picked is None:
            return None
        read = partial(self._read, picked, into or {})
        loaded, _ = self._together("load/read", read, _nothing, _nothing, BrokenCheckpoint)
        return loaded

    def would_be_best(self, value: float) -> bool:
        """Whether a checkpoint that the evaluation gave ``value`` would be the best one. For rank zero."""
        if self._best is None:
            return False
        found = listing.evaluated(self._directory, self._best)
        return is_better(value, found[0][0] if found else None, self._best.mode)

    def clean(self) -> None:
        """Remove what interrupted saves and prunings left. Rank zero, holding the claim, before the load."""
        if not self._is_main:
            return
        self._fence()
        contents.undo_replacements(self._directory)
        for leftover in self._directory.glob(".*.tmp"):
            _discard(leftover)

    # Saving

    def _agreed(self, take: Callable[[], Part]) -> Part:
        def odd(layouts: list[Json]) -> Json:
            return [rank for rank, layout in enumerate(layouts) if layout != layouts[0]]

        part, different = self._together("save/take", take, lambda part: part.layout, odd, StateError)
        if different:
            raise StateError(
                f"the replicated state has other tensors on ranks {different} than on rank 0; "
                "give what differs between ranks as their own state"
            )
        return part

    def _begin(self, step: int, target: Path, progress: dict[str, Json]) -> Json:
        """Make the directory to write into, and say whether the checkpoint replaces one of an earlier progress.

        None if the step is there already, intact and as far.
        """
        self._fence()
        replaces = False
        if target.exists() or target.is_symlink():
            try:
                found = listing.verified(target, step)
            except BrokenCheckpoint as problem:
                self._set_aside(step, target, str(problem))
            else:
                self._known_good.add(step)
                if found.progress == progress:
                    return None
                replaces = True
        temporary = self._directory / f".{target.name}.{uuid.uuid4().hex}.tmp"
        try:
            if not self._directory.is_dir():
                self._directory.mkdir(parents=True, exist_ok=True)
                fsync_directory(self._directory.parent)
            temporary.mkdir()
        except OSError as error:
            raise_save_failed(temporary, 0, error)
        return {"name": temporary.name, "replaces": replaces}

    def _write(self, step: int, progress: dict[str, Json], part: Part, temporary: Path) -> tuple[Manifest, int]:
        """All ranks' parts, in bytes; the manifest is whole on rank zero alone."""

        words: list[Json] = []  # for the manifest, which rank zero alone writes

        def conclude(said: list[Json]) -> Json:
            words.extend(said)
            return sum(size for word in said for _, size, _ in word["files"])

        def say(proofs: tuple[FileProof, ...]) -> Json:
            return {"files": [[proof.name, proof.bytes, proof.xxh3_128] for proof in proofs], "own": part.own}

        write = partial(contents.write, part, temporary)
        _, size = self._together("save/write", write, say, conclude, SaveFailed)
        content = Manifest(
            format=manifest.FORMAT,
            step=step,
            world_size=self._ranks.world_size,
            progress=progress,
            shared=part.shared,
            own=tuple(word["own"] for word in words),
            files=tuple(FileProof(*proof) for word in words for proof in word["files"]),
        )
        return content, size

    def _prune(self) -> None:
        """Remove all but the newest `keep`, and more than those if too few of them are known to be intact."""
        try:
            self._fence()
            found = listing.complete(self._directory)
            missing = min(self._keep, _FEWEST_GOOD) - sum(
                self._is_good(step, path) for step, path in found[: self._keep]
            )
            best = self._best_good()
            for step, path in found[self._keep :]:
                if step == best:
                    continue
                if missing > 0 and self._is_good(step, path):
                    missing -= 1
                else:
                    _discard(path)
        except (DdpkitError, OSError) as error:  # the new checkpoint is safe; that is what the save is for
            self._warn(f"older checkpoints were not removed: {error}")

    def _best_good(self) -> int | None:
        if self._best is None:
            return None
        found = listing.evaluated(self._directory, self._best)
        return next((step for _, step, path in found if self._is_good(step, path)), None)

    def _is_good(self, step: int, path: Path) -> bool:
        if step in self._known_good:
            return True
        try:
            listing.verified(path, step)
        except DdpkitError:
            return False
        self._known_good.add(step)
        return True

    # Loading

    def _pick(self, step: int | None, read_only: bool) -> Json:
        """The directory to load, and its manifest's digest: other hosts must see the same one."""
        found = listing.complete(self._directory)
        if step is not None:
            return self._pick_step(step, found)
        problems: list[tuple[int, Path, str]] = []
        for candidate, path in found:
            try:
                picked = self._word(listing.verified(path, candidate), path)
            except BrokenCheckpoint as problem:
                problems.append((candidate, path, str(problem)))
                continue
            if not read_only:
                for broken in problems:
                    self._set_aside(*broken)
            return picked
        # Only now, with none intact: had they been set aside on the way, the next start would find nothing.
        earlier = [f"{path}: set aside earlier" for _, path in listing.set_aside(self._directory)]
        if problems or earlier:
            lines = "\n  ".join([problem for _, _, problem in problems] + earlier)
            raise BrokenCheckpoint(
                f"no checkpoint in {self._directory} is intact:\n  {lines}\n"
                "Restore one from a copy, or move the directory away to start afresh."
            )
        return None

    def _pick_step(self, step: int, found: list[tuple[int, Path]]) -> Json:
        for candidate, path in found:
            if candidate == step:
                return self._word(listing.verified(path, step), path)
        there = ", ".join(str(candidate) for candidate, _ in found) or "none"
        raise UserError(f"{self._directory}: no checkpoint of step {step}; there are: {there}")

    def _word(self, found: Manifest, path: Path) -> Json:
        self._known_good.add(found.step)
        return {"name": path.name, "digest": manifest.digest(found)}

    def _read(self, picked: Json, into: Targets) -> Loaded:
        path = self._directory / picked["name"]
        found = manifest.read(path)
        if manifest.digest(found) != picked["digest"]:
            raise BrokenCheckpoint(f"{path}: differs from what rank 0 reads; do all hosts share this file system?")
        return contents.read(path, found, self._ranks.rank, into)

    def _set_aside(self, step: int, path: Path, problem: str) -> None:
        self._fence()
        taken = {other.name for _, other in listing.set_aside(self._directory)}
        count = 1
        while f"broken-{path.name}-{count}" in taken:
            count += 1
        aside = path.rename(path.with_name(f"broken-{path.name}-{count}"))
        fsync_directory(self._directory)
        self._known_good.discard(step)
        self._warn(f"the checkpoint of step {step} is broken and was set aside as {aside}: {problem}")
        self._event("set_aside", step=step, path=str(aside), problem=problem)

    # Agreeing

    @property
    def _is_main(self) -> bool:
        return self._ranks.rank == 0

    def _together(
        self,
        name: str,
        action: Callable[[], T],
        say: Callable[[T], Json],
        conclusion: Callable[[list[Json]], Json],
        otherwise: type[DdpkitError],
    ) -> tuple[T, Json]:
        """Run ``action`` on all ranks; its result here, and what rank zero concludes from what each says. Collective.

        If it raises on any rank, every rank raises the same error, of kind ``otherwise`` where it is not one
        of ours.
        """
        result: T
        word: Json
        own_error: Exception | None = None
        try:
            result = action()
            word = {"said": say(result)}
        except Exception as error:  # noqa: BLE001  # the other ranks wait for this rank's word, whatever happened
            own_error = error
            word = {"failed": _describe(error, otherwise)}

        def conclude(words: list[Json]) -> Json:
            failures = [[rank, word["failed"]] for rank, word in enumerate(words) if "failed" in word]
            return {"failures": failures} if failures else {"said": conclusion([word["said"] for word in words])}

        told = self._ranks.conclude(f"checkpoint/{name}", word, conclude)
        if "failures" in told:
            _raise_agreed(told["failures"], own_error)
        return result, told["said"]

    def _from_main(self, name: str, action: Callable[[], Json], otherwise: type[DdpkitError]) -> Json:
        """Run ``action`` on rank zero alone; its result, or its error, on every rank. Collective."""
        act = action if self._is_main else _nothing
        return self._together(name, act, lambda result: result, lambda said: said[0], otherwise)[1]


_AGREED = {kind.__name__: kind for kind in (Superseded, UserError, StateError, BrokenCheckpoint, SaveFailed)}


def _describe(error: Exception, otherwise: type[DdpkitError]) -> Json:
    """An error as it travels to the other ranks."""
    known = type(error).__name__ in _AGREED
    cause = error if isinstance(error, OSError) else error.__cause__
    return {
        "kind": type(error).__name__ if known else otherwise.__name__,
        "text": str(error) if known else f"{type(error).__name__}: {error}",
        "host": socket.gethostname(),
        "errno": cause.errno if isinstance(cause, OSError) else None,
        "strerror": cause.strerror if isinstance(cause, OSError) else None,
    }


def _raise_agreed(failures: list[tuple[int, Json]], own_error: Exception | None) -> NoReturn:
    """Raise what all ranks raise: of the kind of the first failure, naming every rank that failed."""
    first = failures[0][1]
    lines = [f"rank {rank} on {failure['host']}: {failure['text']}" for rank, failure in failures]
    cause: Exception | None = own_error
    if first["errno"] is not None:
        cause = OSError(first["errno"], first["strerror"])
    raise _AGREED[first["kind"]]("\n".join(lines)) from cause


def _nothing(_: object = None) -> None:
    return None


def _size(content: Manifest) -> int:
    return sum(proof.bytes for proof in content.files)


def _discard(path: Path) -> None:
    """Remove a directory that must not be seen half removed: renamed first, as one process alone can."""
    # Gone already, or not removable: `clean` tries again on the next start.
    with contextlib.suppress(OSError):
        doomed = path.rename(path.with_name(f".{uuid.uuid4().hex}.tmp"))
        if doomed.is_dir():
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            doomed.unlink()
