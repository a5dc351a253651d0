"""The network: an encoder that halves the image twice, a decoder that doubles it again, and shortcuts between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def build_model(width: int = 16, classes: int = 4) -> EncoderDecoder:
    """Make the network: images (batch, 3, H, W) to scores (batch, classes, H, W). `width`: channels at full size."""
    return EncoderDecoder(width, classes)


class EncoderDecoder(nn.Module):
    """`encoder`, `decoder` and `head`, by whose names the config gives them learning rates."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = Encoder(width)
        self.decoder = Decoder(width)
        self.head = nn.Conv2d(width, classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.decoder(*self.encoder(images)))
        return scores


class Encoder(nn.Module):
    """An image as features of full, half and quarter size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = convolution(3, width)
        self.second = convolution(width, 2 * width, stride=2)
        self.third = convolution(2 * width, 4 * width, stride=2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        full = self.first(images)
        half = self.second(full)
        return full, half, self.third(half)


class Decoder(nn.Module):
    """Features of all sizes as features of full size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = convolution(4 * width + 2 * width, 2 * width)
        self.second = convolution(2 * width + width, width)

    def forward(self, full: Tensor, half: Tensor, quarter: Tensor) -> Tensor:
        half = self.first(torch.cat([doubled(quarter), half], dim=1))
        full = self.second(torch.cat([doubled(half), full], dim=1))
        return full


def convolution(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Make a 3x3 convolution with normalisation, which brings the bias."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def doubled(features: Tensor) -> Tensor:
    """Give features of twice the height and width."""
    return F.interpolate(features, scale_factor=2, mode="nearest")
