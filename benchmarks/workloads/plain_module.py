"""Time a module of `torch.nn` with one line added, called with batches as they come.

    python -m benchmarks.workloads.plain_module

An MLP of `torch.nn` is called with batches as they come: many of a few sizes, now and then another. No
sizes are given, so graphs are captured as far as the batches go. Every output is compared with that of a
copy of the module that runs eagerly. At the end stand what was captured, replayed and run eagerly, and
which three sizes would have served these batches best. Without a GPU the graphs are emulated.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import program
from benchmarks.harness.timing import median_seconds
from graphcache import cuda_graphed

FEATURES, WIDTH, DEPTH, CLASSES = 32, 128, 6, 10
TOLERANCE = 1e-4  # of the largest value of an output: another batch size may be rounded otherwise
REPEATS = 9  # timed runs of each arm, on a GPU


def build(device: torch.device) -> nn.Module:
    """Returns an MLP with random weights."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Serves all batches; 1 if an output differs from eager or nothing was replayed."""
    args = program.parse(__doc__, argv, {"calls": (300, "batches to serve")})
    device: torch.device = args.device
    model = build(device)
    eager = copy.deepcopy(model)
    batches = traffic(args.calls, device)

    with torch.inference_mode(), program.graphs(device):
        model = cuda_graphed(model)  # the one line
        # Each output is used before the next call, and not kept: the next one may overwrite it.
        largest = float(torch.stack([difference(model(x), eager(x)) for x in batches]).max())
        forward: Any = model.forward
        info = forward.cache_info()
        suggestion = forward.suggest_sizes(3) if info.hits else None
        figures: dict[str, Any] = {
            "device": program.device_name(device),
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
        if device.type == "cuda":
            arms = {
                name: partial(serve, each, batches)
                for name, each in (("eager", eager), ("graphed", model))
            }
            figures["seconds"] = seconds = median_seconds(arms, REPEATS, torch.cuda.synchronize)
            figures["speed_against_eager"] = seconds["eager"] / seconds["graphed"]
    # `not largest <= TOLERANCE`, because NaN is no larger.
    failures = {
        "outputs differ from eager": not largest <= TOLERANCE,
        "nothing was replayed": not info.hits,
    }
    return program.finish(figures, args, failures)


def serve(model: nn.Module, batches: list[Tensor]) -> None:
    """Calls the model with each batch."""
    for x in batches:
        model(x)


if __name__ == "__main__":
    sys.exit(main())
