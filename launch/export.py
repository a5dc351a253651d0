"""A checkpoint's model as a file for other programs."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from ddpkit.checkpoint import listing
from ddpkit.checkpoint.store import load_model_tensors
from ddpkit.errors import BrokenCheckpoint, UserError


def write_model(run_dir: Path, out: Path, step: int | None) -> None:
    """Write the plain state_dict of the model: BatchNorm as BatchNorm, no wrapper's prefix.

    Args:
        run_dir: of the run.
        out: ends in .pt or .safetensors; replaced whole.
        step: None takes the newest intact checkpoint.

    Raises:
        UserError: an unknown ending, no such checkpoint, or a file that cannot be written.
        BrokenCheckpoint: the checkpoint of this step is not intact.
    """
    if out.suffix not in (".pt", ".safetensors"):
        raise UserError(
            f"export: {out} ends in {out.suffix or 'nothing'}; give a name that ends in .pt or .safetensors"
        )
    tensors = load_model_tensors(_checkpoint(run_dir, step))
    temporary = out.with_name(f".{out.stem}.part{out.suffix}")
    try:
        if out.suffix == ".pt":
            torch.save(tensors, temporary)
        else:
            # The format refuses entries that share memory (tied weights); each gets its own.
            save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"export: {out} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


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
    return listing.checkpoints_directory(run_dir) / listing.step_name(newest.step)
