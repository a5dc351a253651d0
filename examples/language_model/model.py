"""A transformer over bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 256


def build_model(width: int = 96, depth: int = 3, heads: int = 4, context: int = 64) -> Transformer:
    """Make the network: bytes (batch, time) to scores of the next one (batch, time, 256)."""
    return Transformer(width, depth, heads, context)


class Transformer(nn.Module):
    """Embeddings, blocks, a head."""

    def __init__(self, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)

    def forward(self, given: Tensor) -> Tensor:
        places = torch.arange(given.shape[1], device=given.device)
        scores: Tensor = self.head(self.norm(self.blocks(self.bytes(given) + self.places(places))))
        return scores


class Block(nn.Module):
    """Attention to what came before, then two layers: what the config recomputes, and spreads, as a unit."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.layers = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(0.1),
        )

    def forward(self, state: Tensor) -> Tensor:
        state = state + self.attention_out(self.attended(self.attention_norm(state)))
        state = state + self.layers(state)
        return state

    def attended(self, state: Tensor) -> Tensor:
        """What each place takes from those before it."""
        split = self.attention_in(state).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split  # each (batch, heads, time, width / heads)
        taken: Tensor = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        return taken
