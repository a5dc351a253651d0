"""The step, and the measure: bits that it takes to write a byte, knowing those before. Without a model it is 8."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F


def train_step(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """Give the mean loss over the batch, to be minimised."""
    return {"loss": losses(model, windows).mean()}


def eval_step(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """Give each window's mean, in bits."""
    return {"bits_per_byte": losses(model, windows).mean(dim=1) / math.log(2)}


def losses(model: nn.Module, windows: Tensor) -> Tensor:
    """The loss of each byte but the first: (batch, time)."""
    scores = model(windows[:, :-1])
    return F.cross_entropy(scores.transpose(1, 2).float(), windows[:, 1:], reduction="none")
