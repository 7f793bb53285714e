"""Let two models take turns over one pool of graph memory: a draft guesses, a target checks.

    python examples/two_models.py

Greedy speculative decoding: a draft of one layer guesses four tokens of each row; a target of six layers
reads them at once, keeps as many as it would have written itself, and adds one. Graphed, both use the
global pool of the device; done once more with a `GraphPool` for each, they take more memory. The tokens
must be those that the target writes alone, eagerly. At the end is shown what becomes of an output that
is held while the other model runs. Weights are random, and the draft is the first layer of the target.
Without a GPU the graphs are emulated.
"""

from __future__ import annotations

import argparse
import copy
import json
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

from graphcache import GraphPool, cuda_graphed, default_pool, emulate, is_expired

VOCAB, DIM, HEADS, LAYERS = 256, 64, 4, 6
PROMPT, GUESSES = 8, 4  # tokens
SIZES = (1, 2, 4, 8)  # rows leave the batch as they end
REPEATS = 5  # timed runs of each arm, on a GPU


class Layer(nn.Module):
    """Attention of each token to those before it, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM))
        self.out = nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return torch.add(x, self.mlp(x))


class Decoder(nn.Module):
    """Tells for each token of each row (n, length) which one follows it; it keeps no cache."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCAB, DIM), nn.Embedding(length, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, VOCAB))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight
        for layer in self.layers:
            x = layer(x)
        return torch.argmax(self.head(x), -1)


Pair = tuple[Decoder, Decoder]  # a draft and its target


def graphed(pair: Pair, pools: Sequence[GraphPool | None] = (None, None)) -> Pair:
    """Returns graphed copies, in the global pool or in those given."""
    draft, target = (
        cuda_graphed(copy.deepcopy(model), sizes=SIZES, pool=pool)
        for model, pool in zip(pair, pools, strict=True)
    )
    return draft, target


def alone(target: Decoder, prompts: Tensor, end: int) -> Tensor:
    """Returns what the target writes by itself, a token at a time."""
    texts = prompts.clone()
    for length in range(PROMPT, end):
        texts[:, length] = target(texts)[:, length - 1]
    return texts[:, :end]


def speculate(pair: Pair, prompts: Tensor, end: int) -> tuple[Tensor, int]:
    """Returns what the target would write, and how often it was called for that."""
    draft, target = pair
    texts, calls = prompts.clone(), 0
    known = [PROMPT] * len(texts)  # tokens of each row that are certain
    while rows := [row for row, length in enumerate(known) if length < end]:
        tokens, calls = texts[rows], calls + 1
        last = torch.tensor([[known[row] - 1] for row in rows], device=texts.device)
        for there in range(GUESSES):
            # Each output is used at once, and not held: the next call may overwrite it.
            tokens.scatter_(1, last + there + 1, draft(tokens).gather(1, last + there))
        span = last + torch.arange(GUESSES + 1, device=texts.device)
        chosen = target(tokens).gather(1, span)
        texts[rows] = tokens.scatter(1, span + 1, chosen)
        right = tokens.gather(1, span[:, 1:]) == chosen[:, :-1]
        for row, count in zip(rows, right.cumprod(1).sum(1).tolist(), strict=True):
            known[row] += count + 1  # what the target chose behind the last right guess is certain too
    return texts[:, :end], calls


def hold(pair: Pair, prompts: Tensor, want: Tensor) -> dict[str, bool]:
    """Shows what becomes of an output of the draft, which should be `want`, while the target runs."""
    draft, target = pair
    cloned = draft(prompts).clone()  # is kept for as long as you like
    held = draft(prompts)
    target(prompts)  # its graph writes to the same memory
    expired = is_expired(held)
    print("\nan output that was held while the other model ran, when it is used:")
    try:
        held.sum()
    except RuntimeError as error:
        print(f"  {error}")
    del held
    draft = cuda_graphed(copy.deepcopy(draft), sizes=SIZES, stale="copy")
    draft(prompts)  # is captured
    held = draft(prompts)
    address = held.data_ptr()
    target(prompts)
    moved = held.data_ptr() != address and torch.equal(held, want)
    print(f'kept by .clone(): {torch.equal(cloned, want)}; by stale="copy": {moved}\n')
    return {"expired": expired, "cloned": torch.equal(cloned, want), "moved": moved}


def time_arms(arms: dict[str, Pair], prompts: Tensor, end: int) -> dict[str, float]:
    """Median tokens per second of each arm; the arms take turns, and turns at going first."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(REPEATS):
        for name in list(arms)[:: 1 if repeat % 2 == 0 else -1]:
            start = perf_counter()
            texts = speculate(arms[name], prompts, end)[0].cpu()
            rates[name].append(texts[:, PROMPT:].numel() / (perf_counter() - start))
    return {name: statistics.median(each) for name, each in rates.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes with one pool and with two; 1 if a token differs from eager or nothing was replayed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=40, help="to write in each row (%(default)s)")
    parser.add_argument("--device", help="cuda or cpu; without it, cuda where there is one")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    args = parser.parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    end = PROMPT + args.tokens
    prompts = torch.randint(VOCAB, (max(SIZES), end + GUESSES + 1)).to(device)  # read up to PROMPT
    # In float64: other batches are rounded otherwise, and in float32 there are near-ties now and then.
    target = Decoder(prompts.shape[1]).to(device, torch.float64).eval()
    draft = copy.deepcopy(target)
    draft.layers = draft.layers[:1]
    plain, own_pools = (draft, target), (GraphPool(device), GraphPool(device))

    with torch.inference_mode(), nullcontext() if on_gpu else emulate():
        want = alone(target, prompts, end)
        shared, apart = graphed(plain), graphed(plain, own_pools)
        (got, calls), (again, _) = (speculate(pair, prompts, end) for pair in (shared, apart))
        forwards: dict[str, Any] = {"draft": shared[0].forward, "target": shared[1].forward}
        replays = {name: forward.cache_info().hits for name, forward in forwards.items()}
        figures: dict[str, Any] = {
            "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
            "tokens": want[:, PROMPT:].numel(),
            "identical": int(((got == want) & (again == want))[:, PROMPT:].sum()),
            "target_calls": calls,
            "replays": replays,
            "lanes": len(default_pool(device).lanes),
            "pool_bytes_shared": default_pool(device).memory().reserved,
            "pool_bytes_apart": sum(pool.memory().reserved for pool in own_pools),
        }
        for name, forward in forwards.items():
            print(f"{name}:\n{forward.cache_info()}\n")
        print(f"the pool of both: {default_pool(device)}")
        figures |= (shown := hold(shared, prompts, draft(prompts)))
        print(f"tokens identical to eager: {figures['identical']} of {figures['tokens']}")
        print(f"calls of the target: {calls}, instead of {args.tokens} without a draft")
        mib = {kind: figures[f"pool_bytes_{kind}"] / 2**20 for kind in ("shared", "apart")}
        print(f"memory: {mib['shared']:.2f} MiB in one pool, {mib['apart']:.2f} MiB in a pool for each")
        if on_gpu:
            arms = {"eager": plain, "graphed": shared}
            figures["tokens_per_second"] = rates = time_arms(arms, prompts, end)
            print(f"tokens per second: {rates['eager']:,.0f} eager, {rates['graphed']:,.0f} graphed")
            print(f"speed against eager: {rates['graphed'] / rates['eager']:.2f}x")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if figures["identical"] < figures["tokens"] or not all((*replays.values(), *shown.values())):
        print("FAILED: tokens differ from eager, or nothing was replayed or kept", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
