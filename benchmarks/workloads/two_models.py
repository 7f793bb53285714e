"""Time two models that take turns over one pool of graph memory: a draft guesses, a target checks.

    python -m benchmarks.workloads.two_models

Greedy speculative decoding: a draft of one layer guesses four tokens of each row; a target of six layers
reads them at once, keeps as many as it would have written itself, and adds one. Graphed, both use
one pool; done once more with a `GraphPool` for each, they take more memory. The tokens
must be those that the target writes alone, eagerly. At the end is shown what becomes of an output that
is held while the other model runs. Weights are random, and the draft is the first layer of the target.
Without a GPU the graphs are emulated.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import program
from graphcache import GraphPool, cuda_graphed, is_expired

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
        """Returns (n, length, DIM)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return torch.add(x, self.mlp(x))


class Decoder(nn.Module):
    """Predicts the token that follows each one of (n, length); the model keeps no cache."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCAB, DIM), nn.Embedding(length, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, VOCAB))

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns (n, length)."""
        x = self.token(tokens) + self.position.weight
        for layer in self.layers:
            x = layer(x)
        return torch.argmax(self.head(x), -1)


Pair = tuple[Decoder, Decoder]  # a draft and its target


def graphed(pair: Pair, pools: Sequence[GraphPool]) -> Pair:
    """Returns graphed copies in these pools."""
    draft, target = (
        cuda_graphed(copy.deepcopy(model), sizes=SIZES, pool=pool)
        for model, pool in zip(pair, pools, strict=True)
    )
    return draft, target


def alone(target: Decoder, prompts: Tensor, end: int) -> Tensor:
    """Returns the texts that the target writes by itself, a token at a time."""
    texts = prompts.clone()
    for length in range(PROMPT, end):
        texts[:, length] = target(texts)[:, length - 1]
    return texts[:, :end]


def speculate(pair: Pair, prompts: Tensor, end: int) -> tuple[Tensor, int]:
    """Returns the texts that the target would write, and the number of its calls."""
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


def hold(pair: Pair, pool: GraphPool, prompts: Tensor, want: Tensor) -> dict[str, bool]:
    """Returns which outputs of the draft, which should be `want`, survive a call of the target."""
    draft, target = pair
    cloned = draft(prompts).clone()  # is kept for as long as you like
    strict = cuda_graphed(copy.deepcopy(draft), sizes=SIZES, stale="error", pool=pool)
    strict(prompts)  # is captured
    held = strict(prompts)
    target(prompts)  # its graph writes to the same memory
    expired = is_expired(held)
    held = draft(prompts)
    address = held.data_ptr()
    target(prompts)
    moved = held.data_ptr() != address and torch.equal(held, want)
    return {"expired": expired, "cloned": torch.equal(cloned, want), "moved": moved}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes with one pool and with two; 1 if a token differs from eager or nothing was replayed."""
    args = program.parse(__doc__, argv, {"tokens": (40, "tokens to write in each row")})
    device: torch.device = args.device
    torch.manual_seed(0)
    end = PROMPT + args.tokens
    prompts = torch.randint(VOCAB, (max(SIZES), end + GUESSES + 1)).to(device)  # read up to PROMPT
    # In float64: other batches are rounded otherwise, and in float32 there are near-ties now and then.
    target = Decoder(prompts.shape[1]).to(device, torch.float64).eval()
    draft = copy.deepcopy(target)
    draft.layers = draft.layers[:1]
    plain, own_pools = (draft, target), (GraphPool(device), GraphPool(device))
    pool = GraphPool(device)  # not the global one: others of this process may use that

    with torch.inference_mode(), program.graphs(device):
        want = alone(target, prompts, end)
        shared, apart = graphed(plain, (pool, pool)), graphed(plain, own_pools)
        (got, calls), (again, _) = (speculate(pair, prompts, end) for pair in (shared, apart))
        forwards: dict[str, Any] = {"draft": shared[0].forward, "target": shared[1].forward}
        replays = {name: forward.cache_info().hits for name, forward in forwards.items()}
        figures: dict[str, Any] = {
            "device": program.device_name(device),
            "tokens": want[:, PROMPT:].numel(),
            "identical": int(((got == want) & (again == want))[:, PROMPT:].sum()),
            "target_calls": calls,
            "replays": replays,
            "lanes": len(pool.lanes),
            "pool_bytes_shared": pool.memory().reserved,
            "pool_bytes_apart": sum(pool.memory().reserved for pool in own_pools),
        }
        figures |= (shown := hold(shared, pool, prompts, draft(prompts)))
        if device.type == "cuda":
            one, other = (partial(speculate, pair, prompts, end) for pair in (plain, shared))
            figures["tokens_per_second"] = program.rates(one, other, figures["tokens"], REPEATS)
    failures = {
        "tokens differ from eager": figures["identical"] < figures["tokens"],
        "nothing was replayed": not all(replays.values()),
        "a held output did not expire, or a kept one changed": not all(shown.values()),
    }
    return program.finish(figures, args, failures)


if __name__ == "__main__":
    sys.exit(main())
