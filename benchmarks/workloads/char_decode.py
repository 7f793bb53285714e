"""Train a small character model, then time decoding a batch of prompts, eagerly and graphed.

    python -m benchmarks.workloads.char_decode

The text is the language reference that ships inside Python (`pydoc_data.topics`), so nothing is
downloaded. Decoding feeds each live row one character per step through `CharModel.forward`, which reads
and writes a KV cache. Rows end at different times, so the batch shrinks and smaller sizes are replayed.

The same prompts are decoded three times: eagerly, with a pool that holds its outputs weakly (the
default), and with one that holds them strongly. The program exits with 1 when any token differs from
eager. Without a GPU the graphs are emulated.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Sequence
from functools import partial
from pydoc_data.topics import topics
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import program
from graphcache import GraphPool, cuda_graphed

# The model and its training, sized for two slow CPU cores.
DIM, HEADS, LAYERS = 128, 4, 2
WINDOW, BATCH, LEARNING_RATE = 64, 16, 6e-3

# Decoding. A sequence ends at a blank line, or at a length of its own between these two.
STOP = "\n\n"
SHORTEST, LONGEST = 40, 192
SPARE_SLOT = -1  # the last slot of the cache: padded rows write there, and nobody reads it
TEMPERATURE = 0.4
SEED = 0
REPEATS = 7  # timed decodes of each arm, on a GPU


class Corpus:
    """The reference text as character ids, with its tail held out for the prompts."""

    def __init__(self) -> None:
        text = "\n\n".join(topics[name].strip() for name in sorted(topics))
        text = "".join(c for c in text if c == "\n" or " " <= c <= "~")
        self.chars = sorted(set(text))
        self._ids = {c: i for i, c in enumerate(self.chars)}
        split = len(text) * 19 // 20
        self.train = torch.tensor(self.encode(text[:split]))
        self._held_out = text[split:]

    def encode(self, text: str) -> list[int]:
        """Returns character ids."""
        return [self._ids[c] for c in text]

    def prompts(self, count: int, rng: random.Random) -> list[list[int]]:
        """Openings, 6 to 24 characters long, of paragraphs that the model was not trained on."""
        paragraphs = [p for p in self._held_out.split("\n\n") if len(p) > 60 and p[0].isupper()]
        rng.shuffle(paragraphs)
        return [self.encode(paragraphs[i % len(paragraphs)][: rng.randint(6, 24)]) for i in range(count)]


class Attention(nn.Module):
    """Causal self-attention, over a window (training) or against a KV cache (decoding)."""

    cache_k: Tensor
    cache_v: Tensor

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)
        nn.init.zeros_(self.out.weight)
        # One slot more than there are rows: see SPARE_SLOT.
        shape = (slots + 1, LONGEST, HEADS, DIM // HEADS)
        self.register_buffer("cache_k", torch.zeros(shape), persistent=False)
        self.register_buffer("cache_v", torch.zeros(shape), persistent=False)

    def over_window(self, x: Tensor, bias: Tensor) -> Tensor:
        """Returns (b, t, DIM), for training."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)  # each (b, t, heads, d)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(mixed.transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor, positions: Tensor, slots: Tensor, bias: Tensor) -> Tensor:
        """Returns (n, DIM), for one decode step."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)  # each (n, heads, d)
        self.cache_k[slots, positions] = k
        self.cache_v[slots, positions] = v
        keys, values = self.cache_k[slots], self.cache_v[slots]  # (n, LONGEST, heads, d)
        mixed = F.scaled_dot_product_attention(
            q.unsqueeze(2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=bias
        )
        return self.out(mixed.flatten(1))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = Attention(slots)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)
        nn.init.zeros_(self.down.weight)

    def mlp(self, x: Tensor) -> Tensor:
        """Returns the change that the MLP adds."""
        return self.down(F.relu(self.up(self.norm2(x))).square())

    def over_window(self, x: Tensor, bias: Tensor) -> Tensor:
        """Returns (b, t, DIM), for training."""
        x = x + self.attention.over_window(self.norm1(x), bias)
        return x + self.mlp(x)

    def forward(self, x: Tensor, positions: Tensor, slots: Tensor, bias: Tensor) -> Tensor:
        """Returns (n, DIM), for one decode step."""
        x = x + self.attention(self.norm1(x), positions, slots, bias)
        return x + self.mlp(x)


class CharModel(nn.Module):
    """A character transformer whose `forward` is one decode step against a KV cache.

    Positions enter as a penalty on distance, one slope per head (ALiBi), which learns quickly and
    holds beyond the training window.

    Args:
        vocab: Number of characters.
        slots: Number of sequences that the cache holds, besides the spare slot.
    """

    slopes: Tensor
    span: Tensor

    def __init__(self, vocab: int, slots: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, DIM)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.blocks = nn.ModuleList(Block(slots) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, vocab)
        slopes = 0.25 ** torch.arange(HEADS).view(HEADS, 1, 1)
        self.register_buffer("slopes", slopes, persistent=False)
        self.register_buffer("span", torch.arange(LONGEST), persistent=False)

    def _bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        distance = keys - queries
        return (self.slopes * distance).masked_fill(distance > 0, float("-inf"))

    def logits_of_window(self, tokens: Tensor) -> Tensor:
        """Logits (b, t, vocab) of every position of a window (b, t), for training."""
        span = self.span[: tokens.shape[1]]
        bias = self._bias(span[:, None], span)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = cast(Block, block).over_window(x, bias)
        return self.head(self.norm(x))

    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """One decode step: one token for each of n sequences. This is what gets graphed.

        Args:
            tokens: The token to feed, int64 (n,).
            positions: Its position in its sequence, int64 (n,).
            slots: The cache slot of its sequence, int64 (n,).

        Returns:
            Logits of the next token, (n, vocab).
        """
        bias = self._bias(positions[:, None, None, None], self.span)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, positions, slots, bias)
        return self.head(self.norm(x))

    def clear_cache(self) -> None:
        """Zero the cache in place: graphs were captured with its address."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.cache_k.zero_()
                module.cache_v.zero_()


def train(model: CharModel, data: Tensor, steps: int) -> float:
    """Train on random windows of `data`; returns the mean loss of the last tenth of the steps."""
    device = data.device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05
    )
    # A short warm-up, then straight down to nearly nothing.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - 0.97 * step / steps)
    )
    offsets = torch.arange(WINDOW + 1, device=device)
    losses: list[Tensor] = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        # Drawn on the CPU, so that a seed means the same windows on every device.
        starts = torch.randint(len(data) - WINDOW, (BATCH, 1)).to(device)
        window = data[starts + offsets]
        logits = model.logits_of_window(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % max(steps // 5, 1) == 0:
            seconds = time.perf_counter() - start
            print(f"  step {step:4d}  loss {loss.item():.2f}  {seconds:5.1f} s", flush=True)
    return torch.stack(losses[-max(steps // 10, 1) :]).mean().item()


@torch.no_grad()
def decode(
    model: CharModel,
    prompts: list[list[int]],
    limits: list[int],
    stop: list[int],
    noise: Tensor,
) -> list[list[int]]:
    """Continue every prompt, in one batch that shrinks as rows end.

    Prompts go through the same step as new text: a row whose next token is known ignores its
    prediction.

    Args:
        model: The model, graphed or not.
        prompts: Token ids of each row.
        limits: Length at which each row ends, its prompt included.
        stop: Tokens that end a row when its new text ends with them.
        noise: Added to the logits of each slot and position, (slots, positions, vocab).

    Returns:
        Token ids of each row, its prompt included.
    """
    device = model.span.device
    model.clear_cache()
    rows = [list(prompt) for prompt in prompts]
    live = list(range(len(rows)))
    step = 0
    while live:
        # A row keeps its cache slot for life, wherever compaction moves it in the batch.
        inputs = [[rows[r][step] for r in live], [step] * len(live), live]
        tokens, positions, slots = torch.tensor(inputs).to(device).unbind()
        logits = model(tokens, positions, slots)
        # The one synchronisation of the step: which rows go on depends on what was picked. Reading
        # the logits here, before the next call, is also what keeps their memory free for sharing.
        picks = (logits + noise[slots, positions]).argmax(-1).tolist()
        going_on = []
        for r, pick in zip(live, picks, strict=True):
            row = rows[r]
            if step + 1 == len(row):
                row.append(pick)
                new = row[len(prompts[r]) :]
                if len(row) >= limits[r] or new[-len(stop) :] == stop:
                    continue
            going_on.append(r)
        live = going_on
        step += 1
    return rows


def sampling_noise(model: CharModel, prompts: int, seed: int) -> Tensor:
    """Gumbel noise for every slot and position: sampling, yet the same in every decode."""
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, LONGEST, model.head.out_features)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp_min(1e-12)
    return (-TEMPERATURE * (-uniform.log()).log()).to(model.span.device)


def count_identical(rows: list[list[int]], others: list[list[int]]) -> int:
    """Returns how many tokens of two decodes are identical."""
    return sum(
        x == y for row, other in zip(rows, others, strict=True) for x, y in zip(row, other, strict=False)
    )


def ladder(largest: int) -> tuple[int, ...]:
    """Powers of two up to the first that is no smaller than `largest`."""
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, then decodes three times; 1 if a token differs from eager."""
    args = program.parse(
        __doc__, argv, {"steps": (900, "training steps"), "prompts": (32, "rows to decode")}
    )
    device: torch.device = args.device
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(SEED)
    rng = random.Random(SEED)

    corpus = Corpus()
    model = CharModel(len(corpus.chars), slots=args.prompts).to(device)
    start = time.perf_counter()
    loss = train(model, corpus.train.to(device), args.steps)
    train_seconds = time.perf_counter() - start
    # Eager and graphed calls multiply matrices of different heights, so their logits differ in the
    # last bits. In float32 a near-tie of two characters would sooner or later be broken differently.
    model.double().eval().requires_grad_(False)

    prompts = corpus.prompts(args.prompts, rng)
    limits = [SHORTEST + (LONGEST - SHORTEST) * (i + 1) // args.prompts for i in range(args.prompts)]
    rng.shuffle(limits)
    # Padded rows write to slot 0 by mistake if they are filled with zeros. That row lives longest, so
    # that such a mistake is seen.
    limits[limits.index(LONGEST)], limits[0] = limits[0], LONGEST
    noise = sampling_noise(model, args.prompts, SEED)
    run = partial(decode, prompts=prompts, limits=limits, stop=corpus.encode(STOP), noise=noise)

    eager = run(model)
    pools = {"weak": GraphPool(device), "strong": GraphPool(device, weak=False)}
    models: dict[str, CharModel] = {}
    graphed: dict[str, list[list[int]]] = {}
    with program.graphs(device):
        for name, pool in pools.items():
            # The forward writes to the cache, so `pad` says where padded rows may write; their
            # `tokens` and `positions` are zeros.
            models[name] = cuda_graphed(
                copy.deepcopy(model), sizes=ladder(args.prompts), pad={"slots": SPARE_SLOT}, pool=pool
            )
            graphed[name] = run(models[name])
    forward: Any = models["weak"].forward
    info = forward.cache_info()

    given = sum(map(len, prompts))  # tokens of prompts are identical anyway
    fed = sum(len(row) - 1 for row in eager)
    figures: dict[str, Any] = {
        "device": program.device_name(device),
        "backend": info.backend,
        "torch": torch.__version__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "seed": SEED,
        "steps": args.steps,
        "prompts": args.prompts,
        "weights": sum(p.numel() for p in model.parameters()),
        "loss": loss,
        "train_seconds": train_seconds,
        "tokens": sum(map(len, eager)) - given,
        "identical": min(count_identical(eager, rows) for rows in graphed.values()) - given,
        "fed": fed,
        "sizes": sorted(info.sizes),
        "capture_seconds": info.capture_seconds,
        "replays": {str(size): info.replays[size] for size in sorted(info.replays, reverse=True)},
        "eager": dict(info.eager),
        "padded_rows": info.padded_rows,
        **{f"pool_bytes_{kind}": pool.memory().reserved for kind, pool in pools.items()},
        **{f"at_rest_bytes_{kind}": pool.memory().allocated for kind, pool in pools.items()},
    }
    if device.type == "cuda":
        one, other = partial(run, model), partial(run, models["weak"])
        figures["tokens_per_second"] = program.rates(one, other, fed, REPEATS)
    differ = any(rows != eager for rows in graphed.values())
    failures = {"tokens differ from eager": differ, "nothing was replayed": not info.hits}
    return program.finish(figures, args, failures)


if __name__ == "__main__":
    sys.exit(main())
