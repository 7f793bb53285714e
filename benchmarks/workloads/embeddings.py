"""Time an embedding service: texts to vectors, in batches of any size.

    python -m benchmarks.workloads.embeddings

A small bidirectional encoder with random weights reads 1 to 32 texts at a time, takes the mean over the
tokens of each, and normalises it. Texts are padded to one of three lengths: each is another signature,
with graphs of its own. They are captured before the first request comes, by `warmup`. Every answer is
compared with that of a copy that runs eagerly. Without a GPU the graphs are emulated.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import program
from graphcache import cuda_graphed

LENGTHS = (16, 32, 64)  # texts are padded to the least of them that holds the longest
MOST = 32  # texts in a request
VOCAB, DIM, HEADS, LAYERS = 1000, 64, 4, 3
TOLERANCE = 1e-4  # of vectors of length 1: another batch size may be rounded otherwise
REPEATS = 7  # timed runs of each arm, on a GPU
Batch = tuple[Tensor, Tensor]  # token ids (texts, length), and which of them are real


class Layer(nn.Module):
    """Attention of every token to all real ones, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(
            nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)
        )

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Returns (texts, length, DIM)."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return torch.add(x, self.mlp(x))


class Encoder(nn.Module):
    """One vector of length 1 for each text."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCAB, DIM), nn.Embedding(max(LENGTHS), DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Returns (texts, DIM)."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, real)
        total = x.masked_fill(~real[..., None], 0.0).sum(1)
        return F.normalize(total / real.sum(1, keepdim=True), dim=-1)


def collate(texts: list[list[int]]) -> Batch:
    """Returns texts as tensors, padded to one of the lengths that there are graphs for."""
    longest = max(map(len, texts))
    length = next(length for length in LENGTHS if length >= longest)
    tokens = torch.tensor([text + [0] * (length - len(text)) for text in texts])
    real = torch.tensor([[True] * len(text) + [False] * (length - len(text)) for text in texts])
    return tokens, real


def make_requests(count: int) -> list[Batch]:
    """Returns requests of 1 to MOST texts."""
    rng = random.Random(0)
    requests = []
    for _ in range(count):
        longest = rng.choice(LENGTHS)
        lengths = [rng.randint(3, longest) for _ in range(rng.randint(1, MOST))]
        requests.append(collate([[rng.randrange(1, VOCAB) for _ in range(n)] for n in lengths]))
    return requests


def answer(model: nn.Module, request: Batch, device: torch.device) -> Tensor:
    """Returns the vectors of a request, copied to the host: the next call may overwrite the output."""
    tokens, real = request
    vectors: Tensor = model(tokens.to(device), real.to(device))
    return vectors.to("cpu", copy=True)  # `.cpu()` copies nothing where there is no GPU


def warm_up(model: nn.Module, device: torch.device) -> None:
    """Captures the graphs of each length; else that would be done while requests wait."""
    forward: Any = model.forward
    for length in LENGTHS:
        example = collate([[1] * length] * MOST)
        forward.warmup(*(tensor.to(device) for tensor in example))


def main(argv: Sequence[str] | None = None) -> int:
    """Answers all requests; 1 if a vector differs from eager or nothing was replayed."""
    args = program.parse(__doc__, argv, {"requests": (200, "requests to answer")})
    device: torch.device = args.device
    torch.manual_seed(0)
    model = Encoder().to(device).eval()
    eager = copy.deepcopy(model)
    requests = make_requests(args.requests)

    with torch.inference_mode(), program.graphs(device):
        # Rows that fill a batch up repeat the last text: a row of zeros would have no real token.
        cuda_graphed(model, sizes=(1, 2, 4, 8, 16, 32), pad="edge")
        warm_up(model, device)
        pairs = [(answer(model, each, device), answer(eager, each, device)) for each in requests]
        largest = float(torch.stack([(got - want).abs().max() for got, want in pairs]).max())
        forward: Any = model.forward
        info = forward.cache_info()
        suggestion = forward.suggest_sizes(4) if info.hits else None
        figures: dict[str, Any] = {
            "device": program.device_name(device),
            "backend": info.backend,
            "requests": len(requests),
            "texts": sum(len(tokens) for tokens, _ in requests),
            "largest_difference": largest,
            "signatures": info.signatures,
            "sizes": info.sizes,
            "replays": info.hits,
            "padded_rows": info.padded_rows,
            "eager": info.eager,
            "suggested": suggestion.sizes if suggestion else (),
        }
        if device.type == "cuda":
            one, other = (partial(answer_all, each, requests, device) for each in (eager, model))
            figures["requests_per_second"] = program.rates(one, other, len(requests), REPEATS)
    # `not largest <= TOLERANCE`, because NaN is no larger.
    failures = {
        "vectors differ from eager": not largest <= TOLERANCE,
        "nothing was replayed": not info.hits,
    }
    return program.finish(figures, args, failures)


def answer_all(model: nn.Module, requests: list[Batch], device: torch.device) -> None:
    """Answers each request."""
    for request in requests:
        answer(model, request, device)


if __name__ == "__main__":
    sys.exit(main())
