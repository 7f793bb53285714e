"""Turn texts into vectors, as an embedding service does, in batches of any size, with CUDA graphs.

    python examples/embeddings.py

A small bidirectional encoder with random weights reads 1 to 32 texts at a time, takes the mean over the
tokens of each, and normalises it. Texts are padded to one of three lengths: each is another signature,
with graphs of its own. They are captured before the first request comes, by `warmup`. Every answer is
compared with that of a copy that runs eagerly. Without a GPU the graphs are emulated.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcache import cuda_graphed, emulate

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


def time_arms(
    arms: dict[str, nn.Module], requests: list[Batch], device: torch.device
) -> dict[str, float]:
    """Median requests per second of each arm; the arms take turns, and turns at going first."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(REPEATS):
        for name in list(arms)[:: 1 if repeat % 2 == 0 else -1]:
            start = perf_counter()
            for request in requests:
                answer(arms[name], request, device)
            rates[name].append(len(requests) / (perf_counter() - start))
    return {name: statistics.median(each) for name, each in rates.items()}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=200, help="to answer (%(default)s)")
    parser.add_argument("--device", help="cuda or cpu; without it, cuda where there is one")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    args = parser.parse_args(argv)
    if args.requests < 1:
        parser.error("--requests must be at least 1")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Answers all requests; 1 if a vector differs from eager or nothing was replayed."""
    args = parse_arguments(argv)
    device: torch.device = args.device
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    model = Encoder().to(device).eval()
    eager = copy.deepcopy(model)
    requests = make_requests(args.requests)

    with torch.inference_mode(), nullcontext() if on_gpu else emulate():
        # Rows that fill a batch up repeat the last text: a row of zeros would have no real token.
        cuda_graphed(model, sizes=(1, 2, 4, 8, 16, 32), pad="edge")
        warm_up(model, device)
        pairs = [(answer(model, each, device), answer(eager, each, device)) for each in requests]
        largest = float(torch.stack([(got - want).abs().max() for got, want in pairs]).max())
        forward: Any = model.forward
        info = forward.cache_info()
        suggestion = forward.suggest_sizes(4) if info.hits else None
        figures: dict[str, Any] = {
            "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
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
        print(info)
        print(f"\nfour sizes for these batches: {suggestion}")
        print(f"largest difference from eager: {largest:.1e}, in vectors of length 1")
        if on_gpu:
            figures["requests_per_second"] = rates = time_arms(
                {"eager": eager, "graphed": model}, requests, device
            )
            print(f"requests per second: {rates['eager']:,.0f} eager, {rates['graphed']:,.0f} graphed")
            print(f"speed against eager: {rates['graphed'] / rates['eager']:.2f}x")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if not largest <= TOLERANCE or not info.hits:  # not `largest > TOLERANCE`: NaN is no larger
        print("FAILED: vectors differ from eager, or nothing was replayed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
