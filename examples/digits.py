"""Handwritten digits: a small convolutional network for real 8x8 images (scikit-learn's `load_digits`).

All that `configs/digits.yaml` refers to, in the order in which a run uses it. Plain torch: nothing in here
knows how many ranks there are, on what device they run, or that ddpkit exists.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

TRAIN_SIZE = 1437  # of 1797 images; the other 360 are for evaluation


def build_model(width: int = 32) -> nn.Module:
    """Make the network: (batch, 1, 8, 8) to scores (batch, 10). `width`: channels of the first layer."""
    return nn.Sequential(
        *convolution(1, width),
        *convolution(width, 2 * width),
        nn.MaxPool2d(2),  # 8x8 to 4x4
        *convolution(2 * width, 2 * width),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(2 * width * 4 * 4, 10),
    )


def convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    """Make a 3x3 convolution that keeps the image's size; the normalisation brings the bias."""
    return [
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    ]


def train_dataset(augment: bool = True) -> Digits:
    """Give the 1437 images to train on; with `augment`, shifted at random each time one is read."""
    images, labels = load()
    return Digits(images[:TRAIN_SIZE], labels[:TRAIN_SIZE], augment)


def eval_dataset() -> Digits:
    """Give the 360 images to evaluate on, as they are."""
    images, labels = load()
    return Digits(images[TRAIN_SIZE:], labels[TRAIN_SIZE:], augment=False)


def load() -> tuple[Tensor, list[int]]:
    """Read all images and labels, which come with scikit-learn, in a random order that is always the same."""
    from sklearn.datasets import load_digits  # here, as it is slow to import and only this needs it

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # 17 shades, 0 to 16
    return images[order], torch.from_numpy(digits.target)[order].tolist()


class Digits(Dataset[tuple[Tensor, int]]):
    """Images with their labels: (float32 of shape (1, 8, 8) from 0 to 1, int from 0 to 9)."""

    def __init__(self, images: Tensor, labels: list[int], augment: bool) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.augment:  # torch's generator is seeded for each sample: a resumed run draws the same
            top, left = torch.randint(3, (2,)).tolist()
            image = F.pad(image, (1, 1, 1, 1))[:, top : top + 8, left : left + 8]  # by a pixel at most
        return image, self.labels[index]


def train_step(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    """Give the mean loss over the batch, to be minimised; the accuracy is recorded with it."""
    return {name: values.mean() for name, values in eval_step(model, batch).items()}


def eval_step(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    """Give the loss and the accuracy (1 right, 0 wrong) of each sample, both of shape (batch,)."""
    images, labels = batch
    scores = model(images)
    loss = F.cross_entropy(scores, labels, reduction="none")
    return {"loss": loss, "accuracy": (scores.argmax(dim=1) == labels).float()}
