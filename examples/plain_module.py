"""Replay CUDA graphs for a module that you did not write: one line added, the same outputs.

    python examples/plain_module.py

Batches of 1 to 20 rows come in any order. Each output is compared with an eager copy of the module.
Without a GPU the graphs are emulated: the same behaviour, without the speed.
"""

import copy
import random
import sys

import torch
from torch import Tensor, nn

from graphcache import cuda_graphed, emulate

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    model = build()
    eager = copy.deepcopy(model)
    model = cuda_graphed(model)  # the one line

    worst = 0.0
    with torch.inference_mode(), emulate():  # emulate() concerns CPU tensors only
        for x in batches(150):
            worst = max(worst, difference(model(x), eager(x)))

    info = model.forward.cache_info()
    print(info)
    print(f"\nlargest difference from eager: {worst:.1e} of the largest value of an output")
    if not worst < 1e-4 or not info.hits:
        sys.exit("FAILED: outputs differ from eager, or nothing was replayed")
    print(f"three sizes for these batches: {model.forward.suggest_sizes(3)}")


def build() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(32, 128)]
    for _ in range(6):
        layers += [nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 128)]
    return nn.Sequential(*layers, nn.Linear(128, 10)).to(device).eval()


def batches(count: int) -> list[Tensor]:
    """Returns batches of mostly 5 or 12 rows."""
    rng = random.Random(0)
    rows = [rng.choice((5, 5, 12, rng.randint(1, 20))) for _ in range(count)]
    return [torch.randn(n, 32, device=device) for n in rows]


def difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


if __name__ == "__main__":
    main()
