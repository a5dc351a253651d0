"""The step, and the metric: intersection over union, which is no mean over images."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from examples.segmentation.data import CLASSES
from examples.segmentation.losses import dice, focal, ohem_cross_entropy


def train_step(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    """Give the sum of the three losses, to be minimised, and each of them, to be recorded."""
    images, labels = batch
    scores = model(images).float()
    losses = {
        "ohem": ohem_cross_entropy(scores, labels),
        "dice": dice(scores, labels),
        "focal": focal(scores, labels),
    }
    return {"loss": losses["ohem"] + losses["dice"] + losses["focal"], **losses}


def eval_step(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Give what `IoU.update` is called with."""
    images, labels = batch
    return model(images).argmax(dim=1), labels


class IoU(nn.Module):
    """Intersection over union of each class, over all pixels of the dataset: ddpkit gives it each image once.

    It is a module to be moved to the GPU. torchmetrics' objects can stand in its place.
    """

    pairs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pairs", torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64))

    def reset(self) -> None:
        """Begin an evaluation."""
        self.pairs.zero_()

    def update(self, found: Tensor, labels: Tensor) -> None:
        """Count a batch: how many pixels of which class were taken for which."""
        pairs = torch.bincount((len(CLASSES) * labels + found).flatten(), minlength=self.pairs.numel())
        self.pairs += pairs.view_as(self.pairs)

    def compute(self) -> dict[str, float]:
        """Give the value of each class, and their mean. Collective: the counts are summed over the ranks."""
        pairs = self.pairs.clone()
        if dist.is_initialized():
            dist.all_reduce(pairs)
        both = pairs.diagonal()
        values = both / (pairs.sum(dim=0) + pairs.sum(dim=1) - both)
        return {"mean": values.mean().item(), **dict(zip(CLASSES, values.tolist(), strict=True))}
