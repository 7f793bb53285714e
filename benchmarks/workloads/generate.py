"""Time `generate` of transformers at batch 1, as it is and with one line added; record what came out.

    python -m benchmarks.workloads.generate --out benchmarks/results/generate-h100.json

A decoder in the shape of Llama-3.2-1B with random weights writes 256 tokens after 64, with a static
cache, in five ways: eagerly, with graphs, as transformers compiles it, and as that with graphs in place
of Inductor's, with branches and without. All take turns in one process; medians of whole calls, and of
the time for each token once the first 16 are written. Random weights make many near ties between tokens,
so tokens alone tell little: logits are compared as long as the tokens before them agree, and these may
part at a near tie only.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import graphcache
from benchmarks.harness import record
from benchmarks.workloads.catalog import LLAMA
from graphcache import cuda_graphed
from graphcache.config import linear_var, switched

PROMPT, TOKENS, SETTLED = 64, 256, 16
TOLERANCE = 0.05  # of the largest logit, in bfloat16
BARE = {"disable_compile": True}
ARMS: dict[str, dict[str, Any]] = {
    "eager": BARE,
    "graphcache": BARE,
    "transformers compiles": {},
    "graphcache, compiled": {},
    "graphcache, compiled, in a line": {},
}


class Clock:
    """A logits processor that takes the time at which the first SETTLED tokens were written."""

    def __init__(self) -> None:
        self.start, self.settled, self.tokens = 0.0, 0.0, 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the scores as they are."""
        self.tokens += 1
        if self.tokens == SETTLED:
            torch.cuda.synchronize()
            self.settled = perf_counter()
        return scores


def generate(model: Any, options: dict[str, Any], tokens: int = TOKENS, **more: Any) -> Any:
    """Writes `tokens` greedily."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(1, 1000, (1, PROMPT), generator=generator).to(model.device)
    fixed = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        cache_implementation="static",
        **fixed,
        **options,
        **more,
    )


def timed(model: Any, options: dict[str, Any], tokens: int) -> tuple[float, float]:
    """Returns the seconds of one call, and of that for each token after the first SETTLED."""
    clock = Clock()
    torch.cuda.synchronize()
    start = perf_counter()
    generate(model, options, tokens, logits_processor=[clock])
    torch.cuda.synchronize()
    end = perf_counter()
    return end - start, (end - clock.settled) / (tokens - SETTLED)


def compared(model: Any, options: dict[str, Any], like: Any, tokens: int) -> dict[str, Any]:
    """Compares logits and tokens with those of `like`."""
    mine = generate(model, options, tokens, output_logits=True, return_dict_in_generate=True)
    identical, worst = 0, 0.0
    for step, (logits, wanted) in enumerate(zip(mine.logits, like.logits, strict=True)):
        scale = float(wanted.abs().max())
        worst = max(worst, float((logits - wanted).abs().max()) / scale)
        written = mine.sequences[0, PROMPT + step], like.sequences[0, PROMPT + step]
        if not torch.equal(*written):
            gap = float(wanted[0, written[1]] - wanted[0, written[0]]) / scale
            return {"identical": identical, "worst": worst, "gap": gap}
        identical += 1
    return {"identical": identical, "worst": worst, "gap": 0.0}


def arms(config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Returns a model for each arm, with the same weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).to(device, dtype).eval()
    plain.requires_grad_(False)
    line = cuda_graphed(copy.deepcopy(plain))
    line.generate = switched(linear_var)(line.generate)
    return {
        "eager": plain,
        "graphcache": cuda_graphed(copy.deepcopy(plain)),
        "transformers compiles": copy.deepcopy(plain),
        "graphcache, compiled": cuda_graphed(copy.deepcopy(plain)),
        "graphcache, compiled, in a line": line,
    }


def measure(models: dict[str, Any], tokens: int, rounds: int) -> dict[str, Any]:
    """Returns the times of each arm, and its differences from eager."""
    found: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        start = perf_counter()
        for _ in range(2):
            generate(model, ARMS[name], tokens)
        torch.cuda.synchronize()
        found[name] = {"set_up_seconds": perf_counter() - start}
    like = generate(models["eager"], BARE, tokens, output_logits=True, return_dict_in_generate=True)
    for name, model in models.items():
        found[name] |= compared(model, ARMS[name], like, tokens)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(rounds):
        order = list(models)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            times[name].append(timed(models[name], ARMS[name], tokens))
    for name, pairs in times.items():
        whole, settled = (statistics.median(column) for column in zip(*pairs, strict=True))
        found[name] |= {"seconds": whole, "seconds_per_token": settled}
    for name in (name for name in models if name.startswith("graphcache")):
        info = models[name].forward.cache_info()
        found[name] |= {"replayed": info.hits, "calls": info.calls, "captures": info.captures}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all arms; 1 if one is wrong or replays nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workloads.generate", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for what came out")
    asked = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("speed is told on a GPU only, and torch finds none here")
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", graphcache.GraphCacheWarning)
    config = transformers.LlamaConfig(
        **LLAMA, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=True
    )
    found = measure(arms(config, torch.device("cuda"), torch.bfloat16), TOKENS, asked.rounds)
    wrong = [name for name, arm in found.items() if not is_right(arm)]
    figures = {"status": int(bool(wrong)), "transformers": transformers.__version__, "arms": found}
    for name, arm in found.items():
        print(name, arm, flush=True)
    if asked.out:
        record.write(asked.out, "generate", figures, emulated=False)
    print(f"wrong: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))


def is_right(arm: dict[str, Any]) -> bool:
    """Return True if logits agree, tokens part at a near tie only, and graphs served the calls."""
    close = arm["worst"] <= TOLERANCE and arm["gap"] <= 2 * TOLERANCE
    return bool(close and arm.get("replayed", 1))


if __name__ == "__main__":
    sys.exit(main())
