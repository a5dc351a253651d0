"""Digits again, few of them labelled."""

from __future__ import annotations

from examples.digits import TRAIN_SIZE, Digits, load


def train_dataset(count: int = 100) -> Digits:
    """Give the images whose labels are known, shifted at random each time one is read."""
    images, labels = load()
    return Digits(images[:count], labels[:count], augment=True)


def eval_dataset() -> Digits:
    """Give the 360 images of the quick start's evaluation."""
    images, labels = load()
    return Digits(images[TRAIN_SIZE:], labels[TRAIN_SIZE:], augment=False)
