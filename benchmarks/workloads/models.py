"""The modules that are measured, with random weights: shapes matter here, not what they say."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TinyMlp(nn.Module):
    """Four layers, and a second input that is added to their result."""

    def __init__(self, width: int = 256, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Returns (n, width)."""
        for layer in self.layers:
            x = F.relu(layer(x))
        return x + skip


class ManyParameters(nn.Module):
    """150 linear layers (300 parameters) that 12 inputs run through.

    Each input has a chain of 12 layers; 6 more follow on their sum.
    """

    INPUTS, CHAIN, AFTER = 12, 12, 6

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.chains = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, width) for _ in range(self.CHAIN)) for _ in range(self.INPUTS)
        )
        self.after = nn.ModuleList(nn.Linear(width, width) for _ in range(self.AFTER))

    # Twelve arguments, spelled out: a signature with *args would be another measurement.
    def forward(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor,
        e: Tensor,
        f: Tensor,
        g: Tensor,
        h: Tensor,
        i: Tensor,
        j: Tensor,
        k: Tensor,
        l: Tensor,  # noqa: E741
    ) -> Tensor:
        """Returns (n, width)."""
        total = torch.zeros_like(a)
        for x, chain in zip((a, b, c, d, e, f, g, h, i, j, k, l), self.chains, strict=True):
            y = x
            for layer in chain:  # type: ignore[attr-defined]
                y = torch.tanh(layer(y))
            total = total + y
        for layer in self.after:
            total = torch.tanh(layer(total))
        return total


class GptAttention(nn.Module):
    """Attention of one new token per row against a KV cache in buffers."""

    keys: Tensor
    values: Tensor
    rows: Tensor

    def __init__(self, width: int, heads: int, rows: int, positions: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        shape = (rows, heads, positions, width // heads)
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))
        self.register_buffer("rows", torch.arange(rows))

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Writes the token's key and value, then attends to all positions up to it."""
        n = x.shape[0]
        q, k, v = self.qkv(x).view(n, 3, self.heads, -1).unbind(1)
        rows = self.rows[:n]
        self.keys[rows, :, positions] = k
        self.values[rows, :, positions] = v
        mixed = F.scaled_dot_product_attention(
            q.unsqueeze(2), self.keys[:n], self.values[:n], attn_mask=mask
        )
        return self.out(mixed.flatten(1))  # type: ignore[no-any-return]


class GptBlock(nn.Module):
    """One pre-norm block."""

    def __init__(self, width: int, heads: int, rows: int, positions: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = GptAttention(width, heads, rows, positions)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Returns (n, width)."""
        x = x + self.attention(self.norm1(x), positions, mask)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))  # type: ignore[no-any-return]


class GptStep(nn.Module):
    """A decode step in the shape of GPT-2 small: one token for each row, a row of the cache each.

    The last position is spare: padded rows write there, and no real token comes so far.
    """

    span: Tensor

    def __init__(
        self,
        rows: int,
        positions: int = 1024,
        layers: int = 12,
        width: int = 768,
        heads: int = 12,
        vocab: int = 50257,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.places = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(GptBlock(width, heads, rows, positions) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("span", torch.arange(positions))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Returns logits (n, vocab)."""
        mask = (self.span <= positions[:, None])[:, None, None]
        x = self.tokens(tokens) + self.places(positions)
        for block in self.blocks:
            x = block(x, positions, mask)
        return F.linear(self.norm(x), self.tokens.weight)


class LlamaStep(nn.Module):
    """A decode step of a model of transformers against its own static cache.

    Args:
        model: a causal language model; shared between copies of this module.
        positions: length of the cache.
    """

    def __init__(self, model: Any, positions: int) -> None:
        super().__init__()
        from transformers import StaticCache

        self.model = model
        self.positions = positions
        self.cache = StaticCache(config=model.config, max_cache_len=positions)
        with torch.no_grad():  # allocates the cache, which its first use does
            self(torch.zeros(1, 1, dtype=torch.long, device=model.device))

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits (1, vocab) of the next token; the cache counts positions itself."""
        out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def state(self) -> list[Tensor]:
        """Returns the tensors that a step writes to."""
        layers = self.cache.layers
        counters = [layer.cumulative_length for layer in layers if hasattr(layer, "cumulative_length")]
        return [*counters, *(t for layer in layers for t in (layer.keys, layer.values))]
