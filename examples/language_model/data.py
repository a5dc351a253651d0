"""Text that every machine with Python has: the sources of its standard library, as bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset


def train_dataset(context: int = 64, megabytes: float = 1.0) -> Windows:
    """Give windows of the text but for its last tenth."""
    text = sources(megabytes)
    return Windows(text[: -len(text) // 10], context)


def eval_dataset(context: int = 64, megabytes: float = 1.0) -> Windows:
    """Give windows of the last tenth."""
    text = sources(megabytes)
    return Windows(text[-len(text) // 10 :], context)


def sources(megabytes: float) -> Tensor:
    """Read the modules in the order of their names, until there is so much text; uint8."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) > megabytes * 1e6:
            break
    return torch.frombuffer(text, dtype=torch.uint8)


class Windows(Dataset[Tensor]):
    """Pieces of `context` bytes and the one after, without overlap: int64 (context + 1,)."""

    def __init__(self, text: Tensor, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.context
        return self.text[start : start + self.context + 1].long()
