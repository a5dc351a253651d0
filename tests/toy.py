"""A small model, dataset and step for tests: everything in them that could break a bit-exact resume."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset


class Augmented(Dataset[tuple[Tensor, Tensor, int]]):
    """Samples that draw from all three generators; an item is (features, target, index)."""

    def __init__(self, length: int, features: int, delay_s: float, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(length, features, generator=generator, dtype=torch.float64).to(dtype)
        self.targets = self.inputs.sum(dim=1, keepdim=True).sin()
        self.delay_s = delay_s

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        time.sleep(self.delay_s)
        noise = 0.01 * torch.randn(self.inputs.shape[1]).to(self.inputs.dtype)
        noise = noise * (1 + random.random()) + 0.001 * float(np.random.rand())
        return self.inputs[index] + noise, self.targets[index], index


class Plain(Augmented):
    """The same without any randomness."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.inputs[index], self.targets[index], index


class Stream(IterableDataset[tuple[Tensor, Tensor, int]]):
    """The same samples in order, one after the other."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Any:
        for index in range(len(self.dataset)):
            yield self.dataset[index]


def dataset(
    length: int = 96,
    features: int = 6,
    delay_s: float = 0.0,
    augment: bool = True,
    dtype: str = "float32",
    stream: bool = False,
) -> Dataset[Any]:
    kind = Augmented if augment else Plain
    made = kind(length, features, delay_s, getattr(torch, dtype))
    return Stream(made) if stream else made


def spawning_dataset(**args: Any) -> Dataset[Any]:
    """The same, and loader workers that are started anew, each with its imports."""
    multiprocessing.set_start_method("spawn", force=True)
    return dataset(**args)


def model(
    features: int = 6, width: int = 16, dropout: float = 0.2, batchnorm: bool = True, dtype: str = "float32"
) -> nn.Module:
    layers = [nn.Linear(features, width), *([nn.BatchNorm1d(width)] if batchnorm else []), nn.Tanh()]
    layers += [nn.Dropout(dropout), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)]
    return nn.Sequential(*layers).to(getattr(torch, dtype))


def step(model: nn.Module, batch: Any) -> Any:
    inputs, targets, _ = batch
    return {"loss": (model(inputs) - targets).square().mean()}


def slow_step(model: nn.Module, batch: Any) -> Any:
    time.sleep(0.02)
    return step(model, batch)


def ledger_step(model: nn.Module, batch: Any) -> Any:
    """Also writes the indices it saw into $TOY_LEDGER, a line for each pass of each rank."""
    with (Path(os.environ["TOY_LEDGER"]) / f"pid-{os.getpid()}.txt").open("a") as file:
        file.write(" ".join(str(int(index)) for index in batch[2]) + "\n")
    return step(model, batch)


def eval_step(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    inputs, targets, _ = batch
    error = (model(inputs) - targets).squeeze(1)
    return {"error": error.square(), "within": (error.abs() < 0.5).double()}


def slow_eval_step(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    time.sleep(0.05)
    return eval_step(model, batch)
