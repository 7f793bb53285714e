"""Run transformers' decoder families under `generate`, as they are and graphed; record what came out.

    python -m benchmarks.workloads.families --out benchmarks/results/families-h100.json
    python -m benchmarks.workloads.families --cache static --out ...

Each is built from a small configuration with random weights, so nothing is downloaded. Tokens have to be
identical to those of the model without graphs: greedily, after a prompt of another length, by sampling
with a seed, and with padding on the left. Windows are crossed in the middle of a decode. Speed is told
on a GPU only, as a ratio of medians of whole decodes that take turns.
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

WINDOW = {**COMMON, "head_dim": 8, "sliding_window": 12}
TURNS = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
HALF = {"layers": 2, "ffn_dim": 64, "attention_heads": 4}
TWO: dict[str, Any] = {
    f"{part}_{what}": number for part in ("encoder", "decoder") for what, number in HALF.items()
}
TWO |= {"vocab_size": 97, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 1}
TWO |= {"forced_eos_token_id": None}

# By the name of the configuration class, and what it is given.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": COMMON,
    "Qwen2": COMMON,
    "Qwen3": {**COMMON, "head_dim": 8},
    "Qwen2Moe": {**COMMON, **EXPERTS, "shared_expert_intermediate_size": 32},
    "Qwen3Moe": {**COMMON, **EXPERTS, "head_dim": 8},
    "Mistral": WINDOW,
    "Mixtral": {**WINDOW, "num_local_experts": 4},
    "Gemma": {**COMMON, "head_dim": 8},
    "Gemma2": TURNS,
    "Gemma3Text": TURNS,
    "Gemma4Text": {**TURNS, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97},
    "GptOss": {**TURNS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Llama4Text": {
        **COMMON,
        "head_dim": 8,
        "attention_chunk_size": 12,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "Olmo2": COMMON,
    "Olmo3": TURNS,
    "Cohere": COMMON,
    "Cohere2": TURNS,
    "Exaone4": TURNS,
    "Ministral": TURNS,
    "GPT2": OLD,
    "GPTJ": {**OLD, "rotary_dim": 8},
    "GPTNeo": {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 12,
    },
    "GPTNeoX": {**SMALL, **FOUR, "intermediate_size": 64},
    "GPTBigCode": OLD,
    "Phi": COMMON,
    "Phi3": WINDOW,
    "OPT": {**SMALL, **FOUR, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "Falcon": {**SMALL, "num_attention_heads": 4, "alibi": False},
    "Bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "use_cache": True},
    "StableLm": COMMON,
    "Starcoder2": WINDOW,
    "Granite": COMMON,
    "SmolLM3": COMMON,
    "Glm4": {**COMMON, "head_dim": 8},
    "SeedOss": {**COMMON, "head_dim": 8},
    "Ernie4_5": {**COMMON, "head_dim": 8},
    "DeepseekV3": {
        **COMMON,
        **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
        **{"qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 2},
        **{"topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "first_k_dense_replace": 1,
    },
    "Lfm2": {**COMMON, "layer_types": ["conv", "full_attention"]},
    "Bamba": {
        **COMMON,
        **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
        "attn_layer_indices": [1],
    },
    "FalconH1": {
        **{**COMMON, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
        "mamba_d_state": 8,
    },
    "Mamba": {**SMALL, "state_size": 8},
    "Mamba2": {**SMALL, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "RecurrentGemma": {
        **{**COMMON, "head_dim": 8, "lru_width": 32, "attention_window_size": 12},
        "block_types": ["recurrent", "attention"],
    },
    "T5": {
        **{"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        **{"pad_token_id": 0, "decoder_start_token_id": 0},
    },
    "Bart": TWO,
    "Marian": TWO,
    "Pegasus": TWO,
}
TOKENS = 16
ROUNDS = 5


def decodes(model: Any, device: torch.device, cache: str | None) -> dict[str, Tensor]:
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
    return {name: generate(model, cache=cache, **way) for name, way in ways.items()}


def generate(model: Any, inputs: Tensor, cache: str | None, **options: Any) -> Tensor:
    """Writes TOKENS tokens, with the model's own default cache or the one that is named."""
    torch.manual_seed(2)
    named = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    defaults = {"do_sample": False, "attention_mask": torch.ones_like(inputs)}
    written: Tensor = model.generate(
        inputs,
        **{**defaults, **options},
        min_new_tokens=TOKENS,
        max_new_tokens=TOKENS,
        pad_token_id=0,
        eos_token_id=None,
        **named,
    )
    return written


def family(name: str, device: torch.device, cache: str | None) -> dict[str, Any]:
    """Returns the figures of one family."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**FAMILIES[name])
    torch.manual_seed(0)
    kind = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    plain = getattr(transformers, kind).from_config(config).to(device).eval()
    graphed = cuda_graphed(copy.deepcopy(plain))
    with nullcontext() if device.type == "cuda" else graphcache.emulate(), warnings.catch_warnings():
        warnings.simplefilter("ignore", graphcache.GraphCacheWarning)
        want, got = decodes(plain, device, cache), decodes(graphed, device, cache)
        # A second time: every cache is another one, and nothing is captured.
        before = graphed.forward.cache_info()
        again = decodes(graphed, device, cache)
        info = graphed.forward.cache_info()
        found = counts(info)
        found["captures_again"] = info.captures - before.captures
        found["steps"] = len(want) * (TOKENS - 1)
        found["steps_replayed_again"] = info.hits - before.hits
        found["identical"] = {
            way: torch.equal(tokens, got[way]) and torch.equal(tokens, again[way])
            for way, tokens in want.items()
        }
        if device.type == "cuda":  # whole decodes, prefill included
            prompt = torch.ones(2, 7, dtype=torch.int64, device=device)
            one, other = (partial(generate, each, prompt, cache) for each in (plain, graphed))
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
    known = parser("families", __doc__, list(FAMILIES))
    known.add_argument("--cache", help="a cache_implementation; by default none is named")
    asked = known.parse_args(argv)
    import transformers

    transformers.logging.set_verbosity_error()
    results: dict[str, Any] = {}
    for name in asked.only:
        run = partial(family, name, torch.device(asked.device), asked.cache)
        results[name] = attempt(run, identical={"it runs": False})
        print(name, results[name], flush=True)
    wrong = [name for name, found in results.items() if not all(found.get("identical", {}).values())]
    figures = {
        "status": int(bool(wrong)),
        "cache": asked.cache,
        "transformers": transformers.__version__,
        "families": results,
    }
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
