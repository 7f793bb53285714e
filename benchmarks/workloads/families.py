"""Run transformers' decoder families under `generate`, as they are and graphed; record what came out.

    python -m benchmarks.workloads.families --out benchmarks/results/families-h100.json

Each is built from a small configuration with random weights, so nothing is downloaded. Tokens have to be
identical to eager: greedily, after a prompt of another length, by sampling with a seed, and with padding
on the left. Speed is told on a GPU only, as a ratio of medians of whole decodes that take turns.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphcache
from benchmarks.harness import record
from benchmarks.harness.timing import median_seconds
from graphcache import cuda_graphed

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = {**SMALL, **HEADS, "intermediate_size": 64, "max_position_embeddings": 256, "pad_token_id": 0}
FOUR = {"num_attention_heads": 4, "max_position_embeddings": 256}
OLD = {"vocab_size": 97, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4}

# By the name of the configuration class, and what it is given.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": COMMON,
    "Qwen2": COMMON,
    "Qwen3": {**COMMON, "head_dim": 8},
    "Mistral": {**COMMON, "sliding_window": None},
    "Gemma": {**COMMON, "head_dim": 8},
    "Gemma2": {**COMMON, "head_dim": 8},
    "Gemma3Text": {**COMMON, "head_dim": 8},
    "GPT2": OLD,
    "GPTJ": {**OLD, "rotary_dim": 8},
    "GPTNeoX": {**SMALL, **FOUR, "intermediate_size": 64},
    "Phi": COMMON,
    "Phi3": COMMON,
    "OPT": {**SMALL, **FOUR, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "Mixtral": {**COMMON, "num_local_experts": 4, "sliding_window": None},
    "Qwen2Moe": {
        **COMMON,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "Olmo2": COMMON,
    "Falcon": {**SMALL, "num_attention_heads": 4, "alibi": False},
    "Bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "StableLm": COMMON,
    "Starcoder2": {**COMMON, "sliding_window": None},
    "Cohere": COMMON,
    "Granite": COMMON,
    "SmolLM3": COMMON,
    "Mamba": {**SMALL, "state_size": 8},
    "Mamba2": {**SMALL, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
}
TOKENS = 16
ROUNDS = 5


def decodes(model: Any, device: torch.device) -> dict[str, Tensor]:
    """Returns the tokens that the model writes in each way."""
    torch.manual_seed(1)
    short, long = (torch.randint(1, 97, (2, length)).to(device) for length in (7, 11))
    padded = torch.ones_like(short)
    padded[0, :3] = 0
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"inputs": short},
        "another length": {"inputs": long},
        "sampled": {"inputs": short, "do_sample": True},
        "padded": {"inputs": short * padded, "attention_mask": padded},
    }
    return {name: generate(model, **way) for name, way in ways.items()}


def generate(model: Any, inputs: Tensor, **options: Any) -> Tensor:
    """Writes TOKENS tokens."""
    torch.manual_seed(2)
    defaults = {"do_sample": False, "attention_mask": torch.ones_like(inputs)}
    written: Tensor = model.generate(
        inputs,
        **{**defaults, **options},
        min_new_tokens=TOKENS,
        max_new_tokens=TOKENS,
        pad_token_id=0,
        eos_token_id=None,
        cache_implementation="static",
        disable_compile=True,
    )
    return written


def family(name: str, device: torch.device) -> dict[str, Any]:
    """Returns the figures of one family."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**FAMILIES[name])
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(config).to(device).eval()
    graphed = cuda_graphed(copy.deepcopy(plain))
    with nullcontext() if device.type == "cuda" else graphcache.emulate(), warnings.catch_warnings():
        warnings.simplefilter("ignore", graphcache.GraphCacheWarning)
        want, got = decodes(plain, device), decodes(graphed, device)
        # A second time: every cache is another one, and nothing is captured.
        before = graphed.forward.cache_info().captures
        again = decodes(graphed, device)
        found = counts(graphed.forward.cache_info())
        found["captures_again"] = found["captures"] - before
        found["identical"] = {
            way: torch.equal(tokens, got[way]) and torch.equal(tokens, again[way])
            for way, tokens in want.items()
        }
        if device.type == "cuda":  # whole decodes, prefill included
            prompt = torch.ones(2, 7, dtype=torch.int64, device=device)
            one, other = (partial(generate, model, prompt) for model in (plain, graphed))
            found["speedup"] = speedup(one, other, ROUNDS)
    return found


def counts(info: graphcache.CacheInfo) -> dict[str, Any]:
    """Returns the counts of `cache_info()` for a record."""
    eager: Counter[str] = Counter()
    for why, count in info.eager.items():
        eager[without_folders(why)] += count
    return {
        "captures": info.captures,
        "replayed": info.hits,
        "calls": info.calls,
        "eager": dict(eager),
    }


def without_folders(text: str) -> str:
    """Returns `text` with paths that begin at the package, wherever that was installed."""
    return re.sub(r"(?<= )/\S*/(?=(?:timm|torch|torchvision|transformers)/)", "", text)


def speedup(plain: Callable[[], Any], graphed: Callable[[], Any], rounds: int) -> float:
    """Returns how many times faster `graphed` is; the two take turns."""
    seconds = median_seconds({"plain": plain, "graphed": graphed}, rounds, torch.cuda.synchronize)
    return seconds["plain"] / seconds["graphed"]


def parser(prog: str, about: str | None, names: Sequence[str]) -> argparse.ArgumentParser:
    """Returns the options: where to run, which of `names`, and where to write what came out."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.workloads.{prog}", description=about)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--only", nargs="*", default=list(names), choices=names, metavar="NAME")
    made.add_argument("--out", type=Path, help="a JSON file for what came out")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all families, or those that are named; 1 if tokens differ anywhere."""
    asked = parser("families", __doc__, list(FAMILIES)).parse_args(argv)
    import transformers

    transformers.logging.set_verbosity_error()
    results: dict[str, Any] = {}
    for name in asked.only:
        run = partial(family, name, torch.device(asked.device))
        results[name] = attempt(run, identical={"it runs": False})
        print(name, results[name], flush=True)
    wrong = [name for name, found in results.items() if not all(found.get("identical", {}).values())]
    figures = {"status": int(bool(wrong)), "transformers": transformers.__version__, "families": results}
    if asked.out:
        record.write(asked.out, "families", figures, emulated=asked.device == "cpu")
    print(f"{len(results)} families, tokens differ in {len(wrong)}")
    return int(bool(wrong))


def attempt(run: Callable[[], dict[str, Any]], **otherwise: Any) -> dict[str, Any]:
    """Returns the figures of a run, or its error: such a model is a row of the table too."""
    try:
        return run()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:200], **otherwise}


if __name__ == "__main__":
    sys.exit(main())
