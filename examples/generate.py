"""Let transformers' `generate` replay its decode step: one line added, the same tokens.

    python examples/generate.py

A Llama with random weights writes after several prompts of other lengths, greedily and by sampling, once
as it is and once graphed. Each `generate` makes a cache of its own; one graph serves them all. With
`--model NAME` the weights come from the hub. Needs transformers 5.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from graphcache import cuda_graphed, emulate

LENGTHS = (7, 12, 5)  # of the prompts


def build(name: str | None, device: torch.device) -> Any:
    """Returns a decoder: small and random without a name."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name).to(device).eval()
    large = device.type == "cuda"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024 if large else 32,
        intermediate_size=2816 if large else 64,
        num_hidden_layers=16 if large else 2,
        num_attention_heads=16 if large else 4,
        num_key_value_heads=4 if large else 2,
        vocab_size=1000,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).to(device).eval()


def write(model: Any, tokens: int, device: torch.device) -> tuple[list[Tensor], float]:
    """Returns what the model writes after each prompt, and how long all of it took."""
    written = []
    start = perf_counter()
    for number, length in enumerate(LENGTHS):
        for sample in (False, True):
            torch.manual_seed(number)
            prompt = torch.randint(1, 1000, (2, length)).to(device)
            written.append(
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    min_new_tokens=tokens,
                    max_new_tokens=tokens,
                    do_sample=sample,
                    pad_token_id=0,
                    cache_implementation="static",
                    disable_compile=True,
                )
            )
    if device.type == "cuda":
        torch.cuda.synchronize()
    return written, perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Writes twice, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help="a name on the hub; else a small Llama with random weights")
    parser.add_argument("--tokens", type=int, default=32, help="to write after each prompt")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    asked = parser.parse_args(argv)
    device = torch.device(asked.device)
    try:
        model = build(asked.model, device)
    except ImportError:
        print("FAILED: this example needs transformers: pip install transformers", file=sys.stderr)
        return 2
    with nullcontext() if device.type == "cuda" else emulate():
        write(model, 2, device)  # kernels are loaded
        want, eager_seconds = write(model, asked.tokens, device)
        model = cuda_graphed(model)  # the one line
        write(model, asked.tokens, device)
        got, seconds = write(model, asked.tokens, device)
    return report(model, want, got, (eager_seconds, seconds), asked)


def report(
    model: Any, want: list[Tensor], got: list[Tensor], seconds: tuple[float, float], asked: Any
) -> int:
    """Prints what came out; 1 if a token differs or nothing was replayed."""
    info = model.forward.cache_info()
    identical = sum(int((a == b).sum()) for a, b in zip(want, got, strict=True))
    total = sum(a.numel() for a in want)
    print(info)
    print(f"tokens identical to eager: {identical} of {total}")
    figures = {
        "tokens": total,
        "identical": identical,
        "replays": info.hits,
        "eager": info.eager,
        "captures": info.captures,
    }
    if asked.device.startswith("cuda"):
        written = asked.tokens * 2 * len(want)
        rates = {"eager": written / seconds[0], "graphed": written / seconds[1]}
        figures["tokens_per_second"] = rates
        print(f"tokens per second: {rates['eager']:,.0f} eager, {rates['graphed']:,.0f} graphed")
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n")
    if identical != total or not info.hits:
        print("FAILED: tokens differ from eager, or nothing was replayed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
