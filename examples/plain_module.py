"""Replay CUDA graphs for a module that you did not write: one line added, the same outputs.

    python examples/plain_module.py

An MLP of `torch.nn` is called with batches as they come: many of a few sizes, now and then another. No
sizes are given, so graphs are captured as far as the batches go. Every output is compared with that of a
copy of the module that runs eagerly. At the end stand what was captured, replayed and run eagerly, and
which three sizes would have served these batches best. Without a GPU the graphs are emulated.
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
from torch import Tensor, nn

from graphcache import cuda_graphed, emulate

FEATURES, WIDTH, DEPTH, CLASSES = 32, 128, 6, 10
TOLERANCE = 1e-4  # of the largest value of an output: another batch size may be rounded otherwise
REPEATS = 9  # timed runs of each arm, on a GPU


def build(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(FEATURES, WIDTH)]
    for _ in range(DEPTH):
        layers += [nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES)).to(device).eval()


def traffic(calls: int, device: torch.device) -> list[Tensor]:
    """Returns the batches: most have 5 or 12 rows, the others anything from 1 to 20."""
    rng = random.Random(0)
    rows = [rng.choice((5, 5, 12, rng.randint(1, 20))) for _ in range(calls)]
    return [torch.randn(count, FEATURES).to(device) for count in rows]


def difference(got: Tensor, want: Tensor) -> Tensor:
    """Returns by how much two outputs differ, relative to the largest value."""
    return (got - want).abs().max() / want.abs().max()


def time_arms(arms: dict[str, nn.Module], batches: list[Tensor]) -> dict[str, float]:
    """Median seconds that each arm takes for all batches; the arms take turns, also at going first."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(REPEATS):
        for name in list(arms)[:: 1 if repeat % 2 == 0 else -1]:
            torch.cuda.synchronize(batches[0].device)
            start = perf_counter()
            for x in batches:
                arms[name](x)
            torch.cuda.synchronize(batches[0].device)
            seconds[name].append(perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--calls", type=int, default=300, help="batches to serve (%(default)s)")
    parser.add_argument("--device", help="cuda or cpu; without it, cuda where there is one")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    args = parser.parse_args(argv)
    if args.calls < 1:
        parser.error("--calls must be at least 1")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Serves all batches; 1 if an output differs from eager or nothing was replayed."""
    args = parse_arguments(argv)
    device: torch.device = args.device
    on_gpu = device.type == "cuda"
    model = build(device)
    eager = copy.deepcopy(model)
    batches = traffic(args.calls, device)

    with torch.inference_mode(), nullcontext() if on_gpu else emulate():
        model = cuda_graphed(model)  # the one line
        # Each output is used before the next call, and not kept: the next one may overwrite it.
        largest = float(torch.stack([difference(model(x), eager(x)) for x in batches]).max())
        forward: Any = model.forward
        info = forward.cache_info()
        suggestion = forward.suggest_sizes(3) if info.hits else None
        figures: dict[str, Any] = {
            "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
            "backend": info.backend,
            "calls": info.calls,
            "largest_difference": largest,
            "batches": info.batches,
            "sizes": info.sizes,
            "replays": info.hits,
            "padded_rows": info.padded_rows,
            "eager": info.eager,
            "suggested": suggestion.sizes if suggestion else (),
        }
        print(info)
        print(f"\nthree sizes for these batches: {suggestion}")
        print(f"largest difference from eager: {largest:.1e} of the largest value of an output")
        if on_gpu:
            figures["seconds"] = seconds = time_arms({"eager": eager, "graphed": model}, batches)
            figures["speed_against_eager"] = seconds["eager"] / seconds["graphed"]
            print(f"speed against eager: {figures['speed_against_eager']:.2f}x")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if not largest <= TOLERANCE or not info.hits:  # not `largest > TOLERANCE`: NaN is no larger
        print("FAILED: outputs differ from eager, or nothing was replayed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
