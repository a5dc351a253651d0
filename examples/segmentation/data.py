"""Scenes with a disc, a square and a ring in them, drawn when they are read: no file, the same scenes everywhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

SIZE = 48
CLASSES = ("background", "disc", "square", "ring")


def train_dataset(count: int = 512) -> Scenes:
    """Give the scenes to train on, flipped at random each time one is read."""
    return Scenes(range(count), flips=True)


def eval_dataset(count: int = 101) -> Scenes:
    """Give other scenes to evaluate on; so many that ranks cannot share them evenly."""
    return Scenes(range(1_000_000, 1_000_000 + count), flips=False)


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """Images, float32 (3, 48, 48), and what each pixel is: int64 (48, 48), numbers in `CLASSES`."""

    def __init__(self, seeds: range, flips: bool) -> None:
        self.seeds, self.flips = seeds, flips

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = drawn(torch.Generator().manual_seed(self.seeds[index]))
        if self.flips and torch.rand(()) < 0.5:  # ddpkit seeds torch's generator for each sample
            image, labels = image.flip(-1), labels.flip(-1)
        return image, labels


def drawn(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a scene: three shapes, one over the other, of colours that tell something of what they are, and noise."""
    image = 0.5 * torch.rand(3, 1, 1, generator=generator).expand(3, SIZE, SIZE)
    labels = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    for label in (1 + torch.randperm(3, generator=generator)).tolist():
        there = shape(CLASSES[label], generator)
        colour = torch.rand(3, 1, 1, generator=generator)
        colour[label - 1] += 0.5
        image, labels = torch.where(there, colour, image), torch.where(there, label, labels)
    return image + 0.2 * torch.randn(3, SIZE, SIZE, generator=generator), labels


def shape(name: str, generator: torch.Generator) -> Tensor:
    """Which pixels a shape somewhere in the image covers."""
    radius = 5 + 4 * torch.rand((), generator=generator)
    centre = radius + (SIZE - 2 * radius) * torch.rand(2, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    down, right = rows - centre[0], columns - centre[1]
    if name == "square":
        return torch.maximum(down.abs(), right.abs()) < radius
    distance = torch.hypot(down, right)
    return (distance < radius) & (distance > (0.6 * radius if name == "ring" else -1))
