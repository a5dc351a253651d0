"""What both scripts train, and on what: which of three waves is on each channel's way through the noise."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

LENGTH = 10_000


class Signals(Dataset[tuple[Tensor, int]]):
    """Signals of shape (3, 10000), each with one of four frequencies in all channels, and which one it is."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        label = index % 4
        phases = 2 * torch.pi * torch.rand(3, 1, generator=generator)
        time = torch.linspace(0, 1, LENGTH)
        waves = torch.sin(2 * torch.pi * 100 * (label + 1) * time + phases)
        return waves + torch.randn(3, LENGTH, generator=generator), label


class Net(nn.Sequential):
    """A convolutional network: (batch, 3, 10000) to scores (batch, 4)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(3, 16, kernel_size=25, stride=10),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 32, kernel_size=9, stride=4),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(32, 4),
        )
