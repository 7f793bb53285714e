"""Time the decoding of requests that come and go, in a batch that changes at every step.

    python -m benchmarks.workloads.continuous_batching

Requests arrive in bursts, with prompts and answers of different length. The KV cache has room for a few
of them at a time; each step decodes one token of every request that has a slot, and a request that ends
leaves its slot to one that waits. The step is padded to the next of four sizes: padded rows write to a
spare slot. All requests are decoded twice by the same code, eagerly and graphed, and the tokens must be
identical. The weights are random, so the text means nothing. Without a GPU the graphs are emulated.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import program
from graphcache import cuda_graphed, disabled

SLOTS, LONGEST = 8, 64  # requests that the cache holds at a time, and tokens of each
SPARE = SLOTS  # one slot more: padded rows write there, and nobody reads it
SIZES = (1, 2, 4, 8)
VOCAB, DIM, HEADS, LAYERS = 256, 64, 4, 2
REPEATS = 5  # timed runs of each arm, on a GPU


class Layer(nn.Module):
    """Attention over what the cache holds of each request, and a small MLP."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM))
        self.out = nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))
        shape = (SLOTS + 1, LONGEST, HEADS, DIM // HEADS)
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def forward(self, x: Tensor, positions: Tensor, slots: Tensor, known: Tensor) -> Tensor:
        """Returns (n, DIM)."""
        q, k, v = self.qkv(x).view(-1, 3, HEADS, DIM // HEADS).unbind(1)
        self.keys[slots, positions] = k
        self.values[slots, positions] = v
        keys, values = self.keys[slots].transpose(1, 2), self.values[slots].transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=known)
        x = x + self.out(mixed.flatten(1))
        return torch.add(x, self.mlp(x))


class Decoder(nn.Module):
    """A small transformer, whose forward feeds one token of each of n requests."""

    span: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCAB, DIM), nn.Embedding(LONGEST, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, VOCAB))
        self.register_buffer("span", torch.arange(LONGEST))
        for weights in self.layers.parameters():
            weights.data.mul_(4)  # so large that a single wrong row of the cache changes the text

    # It writes to the cache, so what padded rows hold must be said: `tokens` and `positions` zeros.
    @cuda_graphed(sizes=SIZES, pad={"slots": SPARE})
    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """Returns the token that follows each, int64 (n,) as all arguments are."""
        known = (self.span <= positions[:, None])[:, None, None]
        x = self.token(tokens) + self.position(positions)
        for layer in self.layers:
            x = layer(x, positions, slots, known)
        return torch.argmax(self.head(x), -1)


@dataclass
class Request:
    """A request, and how far it is."""

    arrives: int  # at this step
    tokens: list[int]  # the prompt, then what was written
    length: int  # at which it ends
    slot: int = SPARE
    fed: int = 0  # tokens that the cache holds


@torch.inference_mode()
def serve(model: Decoder, requests: list[Request]) -> list[list[int]]:
    """Returns the tokens of each request; at each step those that have a slot get one further."""
    requests = copy.deepcopy(requests)
    waiting, active, free = deque(requests), list[Request](), list(range(SLOTS))[::-1]
    step = 0
    while waiting or active:
        while free and waiting and waiting[0].arrives <= step:
            active.append(waiting.popleft())
            active[-1].slot = free.pop()
        step += 1
        if not active:
            continue
        rows = [(request.tokens[request.fed], request.fed, request.slot) for request in active]
        inputs = torch.tensor([*zip(*rows, strict=True)], device=model.span.device)
        picks = model(*inputs.unbind()).tolist()  # tokens, positions, slots; it waits for the device
        for request, pick in zip(active, picks, strict=True):
            request.fed += 1
            if request.fed == len(request.tokens):  # else the prompt goes on
                request.tokens.append(pick)
        free += [request.slot for request in active if len(request.tokens) == request.length]
        active = [request for request in active if len(request.tokens) < request.length]
    return [request.tokens for request in requests]


def make_requests(count: int) -> list[Request]:
    """Returns requests in the order of their arrival: some come together, some after a while."""
    rng = random.Random(0)
    requests, step = [], 0
    for _ in range(count):
        step += rng.choice((0, 0, 0, 2, 9, 30))
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(2, LONGEST // 4))]
        requests.append(Request(step, prompt, len(prompt) + rng.randint(4, LONGEST * 3 // 4)))
    return requests


def main(argv: Sequence[str] | None = None) -> int:
    """Decodes all requests twice; 1 if a token differs from eager or nothing was replayed."""
    args = program.parse(__doc__, argv, {"requests": (64, "requests to decode")})
    device: torch.device = args.device
    torch.manual_seed(0)
    # In float64: other batches are rounded otherwise, and in float32 there are near-ties now and then.
    model = Decoder().to(device, torch.float64).eval()
    requests = make_requests(args.requests)

    forward: Any = model.forward
    with program.graphs(device):
        got, info = serve(model, requests), forward.cache_info()
    with disabled():
        want = serve(model, requests)
    identical = sum(a == b for a, b in zip(got, want, strict=True))
    written = sum(request.length - len(request.tokens) for request in requests)
    figures: dict[str, Any] = {
        "device": program.device_name(device),
        "requests": len(requests),
        "identical": identical,
        "tokens": written,
        "batches": info.batches,
        "replays": info.replays,
        "padded_rows": info.padded_rows,
        "eager": info.eager,
    }
    if device.type == "cuda":
        graphed = partial(serve, model, requests)
        figures["tokens_per_second"] = program.rates(disabled()(graphed), graphed, written, REPEATS)
    failures = {"tokens differ from eager": got != want, "nothing was replayed": not info.hits}
    return program.finish(figures, args, failures)


if __name__ == "__main__":
    sys.exit(main())
