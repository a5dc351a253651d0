"""The network, and when its backbone is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import ddpkit

if TYPE_CHECKING:
    from ddpkit.run import Run


class Classifier(nn.Module):
    """A backbone and a head: (batch, 1, 8, 8) to scores (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Linear(64 * 4 * 4, 10)
        self.backbone_is_frozen = False

    def freeze_backbone(self, is_frozen: bool) -> None:
        """Keep the backbone as it is from here on, its running statistics too; or train it again."""
        self.backbone_is_frozen = is_frozen
        self.backbone.train(not is_frozen)

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.backbone_is_frozen):
            features = self.backbone(images)
        scores: Tensor = self.head(features.flatten(1))
        return scores


class UnfreezeBackbone(ddpkit.Callback):
    """Has the backbone trained from an epoch on. It goes by the run's own clock, so it has nothing to save."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_start(self, run: Run) -> None:
        """An epoch begins, or goes on after a restart."""
        for part in run.objects["model"].modules():
            if isinstance(part, Classifier):
                part.freeze_backbone(run.progress.epoch < self.epoch)
