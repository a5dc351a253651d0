"""The weights that others leave: `python -m examples.finetune.pretrain`. No ddpkit in here, and other names.

The network learns by which quarter turn images of digits have been rotated; no label of a digit is used. What it
saves is what such projects save: a dict with the weights under a key, of names with prefixes, and with a head of its
own task's size.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from examples.digits import TRAIN_SIZE, load


class RotationNet(nn.Module):
    """(batch, 1, 8, 8) to scores (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.fc = nn.Linear(64 * 4 * 4, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.fc(self.features(images).flatten(1))
        return scores


def pretrain(path: Path, epochs: int = 5) -> None:
    """Train, and save the weights to `path`."""
    torch.manual_seed(0)
    images = load()[0][:TRAIN_SIZE]
    net = RotationNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for epoch in range(epochs):
        for batch in torch.split(images[torch.randperm(len(images))], 64):
            turns = torch.randint(4, (len(batch),))
            turned = torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(batch, turns, strict=True)])
            loss = F.cross_entropy(net(turned), turns)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {f"module.net.{name}": value for name, value in net.state_dict().items()}
    torch.save({"epoch": epochs, "state_dict": weights}, path)


if __name__ == "__main__":
    pretrain(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/pretrained.pth"))
