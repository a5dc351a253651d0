"""A checkpoint's model as a file for other programs."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from ddpkit import ema
from ddpkit.checkpoint import listing
from ddpkit.checkpoint.store import load_model_tensors
from ddpkit.checkpoint.writer import write_tensors
from ddpkit.errors import BrokenCheckpoint, SaveFailed, UserError


def write_model(run_dir: Path, out: Path, step: int | None, *, averaged: bool = False) -> None:
    """Write the plain state_dict of the model: BatchNorm as BatchNorm, no wrapper's prefix.

    Args:
        run_dir: of the run.
        out: ends in .pt or .safetensors; replaced whole.
        step: None takes the newest intact checkpoint.
        averaged: the moving average of the weights instead of the weights.

    Raises:
        UserError: an unknown ending, no such checkpoint, no average in it, or a file that cannot be written.
        BrokenCheckpoint: the checkpoint of this step is not intact.
    """
    if out.suffix not in (".pt", ".safetensors"):
        raise UserError(
            f"export: {out} ends in {out.suffix or 'nothing'}; give a name that ends in .pt or .safetensors"
        )
    checkpoint = _checkpoint(run_dir, step)
    tensors = ema.weights_in(_average(checkpoint)) if averaged else load_model_tensors(checkpoint)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if out.suffix == ".pt":
            _save_pt(temporary, tensors)
        else:
            write_tensors(temporary, tensors)  # tied weights, which have one entry in memory, get two in the file
        temporary.replace(out)
    except (OSError, SaveFailed) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        raise UserError(f"export: {out} cannot be written: {getattr(cause, 'strerror', None) or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _average(checkpoint: Path) -> dict[str, Tensor]:
    try:
        return load_model_tensors(checkpoint, ema.NAME)
    except KeyError:
        raise UserError(f"export: {checkpoint} has no average of the weights: model.ema_decay keeps one") from None


def _save_pt(path: Path, tensors: dict[str, Tensor]) -> None:
    # Into an open file: given a path, torch writes its name into the content (equal models would differ).
    with path.open("wb") as file:
        try:
            torch.save(tensors, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk; torch's own words are "unexpected pos"
                raise error.__context__ from None
            raise


def _checkpoint(run_dir: Path, step: int | None) -> Path:
    found = listing.complete(listing.checkpoints_directory(run_dir))
    if step is not None:
        for number, path in found:
            if number == step:
                return path
        there = ", ".join(str(number) for number, _ in found) or "none"
        raise UserError(f"{run_dir}: no checkpoint of step {step}; there are: {there}")
    newest = listing.intact_newest(run_dir)
    if newest is None:
        if found:
            raise BrokenCheckpoint(f"{run_dir}: none of its checkpoints is intact; see ddpkit verify {run_dir}")
        raise UserError(f"{run_dir}: there is no checkpoint in it")
    if found[0][0] != newest.step:
        print(  # noqa: T201 - to people
            f"ddpkit: the checkpoint of step {found[0][0]} is broken; exporting that of step {newest.step}",
            file=sys.stderr,
        )
    return listing.checkpoints_directory(run_dir) / listing.step_name(newest.step)
