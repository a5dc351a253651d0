"""Random streams: one for each rank, and one for each sample.

A rank's stream (dropout, user code in the step) is saved and goes on after a restart. A sample's (augmentation in
``__getitem__`` and in collating) is set from (seed, epoch, position) before each fetch and depends on nothing else.
Every stream's key is a hash: seed + epoch would make seed 0's epoch 1 seed 1's epoch 0.
"""

from __future__ import annotations

import torch

from ddpkit.generators import HostGenerators
from ddpkit.permutation import derive

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment: neighbouring positions get distant keys
_MASK = (1 << 64) - 1


def seed_generators(key: int) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices) of this process from a 64-bit key."""
    HostGenerators().seed(key)
    torch.cuda.manual_seed_all(key)  # remembered until CUDA starts, without starting it


def sample_key(base: int, position: int) -> int:
    """Mix a sample's position in the epoch into the epoch's key (splitmix64's finaliser, Steele et al. 2014)."""
    z = (base + (position + 1) * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def epoch_key(seed: int, purpose: str, epoch: int) -> int:
    """The key under which the samples of an epoch draw."""
    return derive(seed, purpose, epoch)
