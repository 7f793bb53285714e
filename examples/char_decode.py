"""Train a small character model for half a minute, then decode a batch of prompts with CUDA graphs.

    python examples/char_decode.py

The text is the language reference that ships inside Python (`pydoc_data.topics`), so nothing is
downloaded. Training is plain PyTorch. Decoding feeds every live row one character per step through
`CharModel.forward`, which reads and writes a KV cache. Rows end at different times, the batch
shrinks, and the padded size that `graphcache` replays changes with it.

The same prompts are decoded three times: eagerly, with a graph pool that holds its outputs weakly
(the default), and with one that holds them strongly. The script exits with 1 when any token differs
from eager. Without a GPU the graphs are emulated, which shows the same behaviour but no speed.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcache import GraphPool, cuda_graphed, emulate

# The model and its training, sized for two slow CPU cores.
DIM, HEADS, LAYERS = 128, 4, 2
WINDOW, BATCH, LEARNING_RATE = 64, 16, 6e-3

# Decoding. A sequence ends at a blank line, or at a length of its own between these two.
STOP = "\n\n"
SHORTEST, LONGEST = 40, 192
SPARE_SLOT = -1  # the last slot of the cache: padded rows write there, and nobody reads it
TEMPERATURE = 0.4
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
        return [self._ids[c] for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.chars[i] for i in ids)

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
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)  # each (b, t, heads, d)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(mixed.transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor, positions: Tensor, slots: Tensor, bias: Tensor) -> Tensor:
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
        return self.down(F.relu(self.up(self.norm2(x))).square())

    def over_window(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attention.over_window(self.norm1(x), bias)
        return x + self.mlp(x)

    def forward(self, x: Tensor, positions: Tensor, slots: Tensor, bias: Tensor) -> Tensor:
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


@dataclass
class Decoded:
    """What one decode of all prompts gave."""

    rows: list[list[int]]
    fed: int  # tokens that went through the model: prompts and new text
    seconds: float


@torch.no_grad()
def decode(
    model: CharModel,
    prompts: list[list[int]],
    limits: list[int],
    stop: list[int],
    noise: Tensor,
) -> Decoded:
    """Continue every prompt, in one batch that shrinks as rows end.

    Prompts go through the same step as new text: a row whose next token is known ignores its
    prediction.

    Args:
        model: The model, graphed or not.
        prompts: Token ids of each row.
        limits: Length at which each row ends, its prompt included.
        stop: Tokens that end a row when its new text ends with them.
        noise: Added to the logits of each slot and position, (slots, positions, vocab).
    """
    device = model.span.device
    model.clear_cache()
    rows = [list(prompt) for prompt in prompts]
    live = list(range(len(rows)))
    step = fed = 0
    start = time.perf_counter()
    while live:
        # A row keeps its cache slot for life, wherever compaction moves it in the batch.
        inputs = [[rows[r][step] for r in live], [step] * len(live), live]
        tokens, positions, slots = torch.tensor(inputs).to(device).unbind()
        logits = model(tokens, positions, slots)
        # The one synchronisation of the step: which rows go on depends on what was picked. Reading
        # the logits here, before the next call, is also what keeps their memory free for sharing.
        picks = (logits + noise[slots, positions]).argmax(-1).tolist()
        fed += len(live)
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
    return Decoded(rows, fed, time.perf_counter() - start)


def sampling_noise(model: CharModel, args: argparse.Namespace, device: torch.device) -> Tensor:
    """Gumbel noise for every slot and position: sampling, yet the same in every decode."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.prompts, LONGEST, model.head.out_features)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp_min(1e-12)
    return (-TEMPERATURE * (-uniform.log()).log()).to(device)


def first_difference(a: list[list[int]], b: list[list[int]]) -> tuple[int, int] | None:
    """The first (row, position) at which two decodes differ, in the order of decoding."""
    found = [
        (position, row)
        for row, (x, y) in enumerate(zip(a, b, strict=True))
        for position in range(max(len(x), len(y)))
        if x[position : position + 1] != y[position : position + 1]
    ]
    return min(found)[::-1] if found else None


def count_identical(rows: list[list[int]], others: list[list[int]]) -> int:
    return sum(
        x == y for row, other in zip(rows, others, strict=True) for x, y in zip(row, other, strict=False)
    )


def ladder(largest: int) -> tuple[int, ...]:
    """Powers of two up to the first that is no smaller than `largest`."""
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=900, help="training steps (%(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="rows to decode (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda or cpu; without it, cuda where there is one")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.prompts < 1:
        parser.error("--steps and --prompts must be at least 1")
    try:
        args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        parser.error(f"--device: {error}")
    if args.device.type not in ("cpu", "cuda"):
        parser.error(f"--device: cuda or cpu, not {args.device.type}")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    return args


def time_arms(arms: dict[str, CharModel], *decode_args: Any) -> dict[str, float]:
    """Median tokens per second of each arm; the arms take turns, and turns at going first."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(REPEATS):
        for name in list(arms)[:: 1 if repeat % 2 == 0 else -1]:
            result = decode(arms[name], *decode_args)
            rates[name].append(result.fed / result.seconds)
    return {name: statistics.median(values) for name, values in rates.items()}


def print_table(figures: dict[str, Any]) -> None:
    def mib(size: int) -> str:
        return f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"

    def counts(values: dict[str, int]) -> str:
        return "  ".join(f"{name}: {count}" for name, count in values.items()) or "none"

    lines = [
        ("device", f"{figures['device']} ({figures['backend']} graphs)"),
        ("numbers", figures["dtype"]),
        ("tokens identical to eager", f"{figures['identical']} of {figures['tokens']}"),
        ("sizes captured", " ".join(map(str, figures["sizes"]))),
        ("capture time", f"{figures['capture_seconds']:.2f} s"),
        ("replays by size", counts(figures["replays"])),
        ("calls run eagerly", counts(figures["eager"])),
        ("rows padded", f"{figures['padded_rows']} (beside {figures['fed']} live ones)"),
        *(
            (
                f"pool memory, {kind} outputs",
                f"{mib(figures[f'pool_bytes_{kind}'])}, in use at rest "
                f"{mib(figures[f'at_rest_bytes_{kind}'])}",
            )
            for kind in ("weak", "strong")
        ),
    ]
    if "tokens_per_second" in figures:
        rates = figures["tokens_per_second"]
        lines += [
            ("tokens per second, eager", f"{rates['eager']:,.0f}"),
            ("tokens per second, graphed", f"{rates['graphed']:,.0f}"),
            ("speed against eager", f"{rates['graphed'] / rates['eager']:.2f}x"),
        ]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"  {name:<{width}}  {value}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    device: torch.device = args.device
    on_gpu = device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    corpus = Corpus()
    model = CharModel(len(corpus.chars), slots=args.prompts).to(device)
    weights = sum(p.numel() for p in model.parameters())
    print(f"training {weights:,} weights on {len(corpus.train):,} characters, {device}")
    start = time.perf_counter()
    loss = train(model, corpus.train.to(device), args.steps)
    train_seconds = time.perf_counter() - start
    # Eager and graphed calls multiply matrices of different heights, so their logits differ in the
    # last bits, and now and then the two best characters are as close as that. In float32 such
    # a tie would sooner or later be broken differently; in float64 it takes a real difference.
    model.double().eval().requires_grad_(False)

    prompts = corpus.prompts(args.prompts, rng)
    limits = [SHORTEST + (LONGEST - SHORTEST) * (i + 1) // args.prompts for i in range(args.prompts)]
    rng.shuffle(limits)
    # Slot 0 is where padded rows would write by mistake, were they filled with zeros: let it live
    # longest, so that such a mistake is seen.
    limits[limits.index(LONGEST)], limits[0] = limits[0], LONGEST
    decode_args = (prompts, limits, corpus.encode(STOP), sampling_noise(model, args, device))

    eager = decode(model, *decode_args)

    sizes = ladder(args.prompts)
    pools = {"weak": GraphPool(device), "strong": GraphPool(device, weak=False)}
    models: dict[str, CharModel] = {}
    graphed: dict[str, Decoded] = {}
    graphs: AbstractContextManager[Any] = nullcontext() if on_gpu else emulate()
    with graphs:
        for name, pool in pools.items():
            # The forward writes to the cache, so padding it needs to be told where padded rows
            # may write; `tokens` and `positions` of those rows are zeros.
            models[name] = cuda_graphed(
                copy.deepcopy(model), batch_dim=0, sizes=sizes, pad={"slots": SPARE_SLOT}, pool=pool
            )
            graphed[name] = decode(models[name], *decode_args)
    forward: Any = models["weak"].forward
    info = forward.cache_info()

    prompt_tokens = sum(map(len, prompts))  # given, so no merit in having them identical
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "backend": info.backend,
        "torch": torch.__version__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "seed": args.seed,
        "steps": args.steps,
        "prompts": args.prompts,
        "weights": weights,
        "loss": loss,
        "train_seconds": train_seconds,
        "tokens": sum(map(len, eager.rows)) - prompt_tokens,
        "identical": min(count_identical(eager.rows, result.rows) for result in graphed.values())
        - prompt_tokens,
        "fed": eager.fed,
        "sizes": sorted(info.sizes),
        "capture_seconds": info.capture_seconds,
        "replays": {str(size): info.replays[size] for size in sorted(info.replays, reverse=True)},
        "eager": dict(info.eager),
        "padded_rows": info.padded_rows,
        **{f"pool_bytes_{kind}": pool.memory().reserved for kind, pool in pools.items()},
        **{f"at_rest_bytes_{kind}": pool.memory().allocated for kind, pool in pools.items()},
    }
    if on_gpu:
        figures["tokens_per_second"] = time_arms(
            {"eager": model, "graphed": models["weak"]}, *decode_args
        )

    print("\nsome of the text ([prompt] and its continuation):")
    for prompt, row in list(zip(prompts, graphed["weak"].rows, strict=True))[:6]:
        text = f"[{corpus.decode(prompt)}]{corpus.decode(row[len(prompt) :])}"
        print("\n" + "\n".join(f"  | {line}" for line in text.strip().splitlines()))
    print()
    print_table(figures)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

    status = 0
    for name, result in graphed.items():
        if (difference := first_difference(eager.rows, result.rows)) is not None:
            prompt_index, position = difference
            print(
                f"\nFAILED: tokens differ from eager ({name} outputs), "
                f"first at prompt {prompt_index}, position {position}",
                file=sys.stderr,
            )
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
