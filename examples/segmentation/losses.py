"""Three losses for images that are mostly background, each a mean over images: the same on any number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def ohem_cross_entropy(scores: Tensor, labels: Tensor, kept: float = 0.25) -> Tensor:
    """Cross-entropy of the hardest pixels of each image alone (online hard example mining); `kept`: their share."""
    losses = F.cross_entropy(scores, labels, reduction="none").flatten(1)
    return losses.topk(int(kept * losses.shape[1]), dim=1).values.mean()


def dice(scores: Tensor, labels: Tensor) -> Tensor:
    """One minus the overlap of each class with where it is, of which every class has the same share."""
    there = F.one_hot(labels, scores.shape[1]).movedim(-1, 1)
    chances = scores.softmax(dim=1)
    overlap = (chances * there).sum(dim=(2, 3))
    sizes = (chances + there).sum(dim=(2, 3))
    return (1 - (2 * overlap + 1) / (sizes + 1)).mean()


def focal(scores: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    """Cross-entropy in which pixels count the less, the surer they are right."""
    losses = F.cross_entropy(scores, labels, reduction="none")
    return ((1 - torch.exp(-losses)) ** gamma * losses).mean()
