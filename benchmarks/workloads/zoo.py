"""Run modules that people have, as they are and graphed by one line; record what came of it.

    python -m benchmarks.workloads.zoo --out benchmarks/results/zoo-h100.json

All have random weights, so nothing is downloaded; a group whose library is missing is left out. Each is
called with batches of 1 to 8 in mixed order and fresh inputs, in float32 under inference mode, and every
output is compared with that of a copy that graphcache never saw. TF32 is off for both: it rounds to
three digits, and which kernels use it depends on the batch, so it would hide errors and feign others.
Speed is told on a GPU only: ratios of medians of calls that take turns, each waited for.
"""

from __future__ import annotations

import copy
import gc
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import graphcache
from benchmarks.harness import record
from benchmarks.workloads.cases import GROUPS, Case
from benchmarks.workloads.families import attempt, counts, parser, speedup, without_folders
from graphcache import cuda_graphed
from graphcache.call.pytree import flatten

BATCHES = (3, 8, 1, 5, 2, 7, 4, 6) * 3
TIMED = (1, 8)
ROUNDS = 20
TOLERANCE = 2e-3  # of the largest value of an output


def enliven(case: Case, device: torch.device) -> None:
    """Changes weights until the output depends on the input, so that a comparison proves something.

    As they are initialised, many return the same for anything: scales of branches, or whole heads, are
    zero or next to it, and norms that normalise nothing yet let the signal fade under the biases.

    Raises:
        ValueError: where that is of no avail.
    """
    with torch.no_grad():
        for parameter in case.module.parameters():
            if parameter.numel() > 1 and parameter.std() < 1e-3:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for each in case.module.modules():
            if isinstance(each, nn.modules.batchnorm._BatchNorm):
                each.train().momentum = 1.0
        case.call(case.module, *case.fresh(max(BATCHES), device))
        case.module.eval()
        one, other = (case.call(case.module, *case.fresh(2, device)) for _ in range(2))
    spread = difference(one, other)
    if spread < 10 * TOLERANCE:
        raise ValueError(f"whatever it is given, its output is the same within {spread:.1g}")


def difference(want: Any, got: Any) -> float:
    """Returns the largest difference, relative to the largest value of the output that it is in.

    Infinite where more than floating-point numbers differ, and where one is not finite.
    """
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    alike = flatten(want, ours, []) == flatten(got, theirs, [])
    if not alike or [(t.shape, t.dtype) for t in ours] != [(t.shape, t.dtype) for t in theirs]:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        off = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        if off != 0.0:  # or nan, which inf leads to as well
            scale = a.abs().max().item() if a.is_floating_point() and isfinite(off) else 0.0
            worst = max(worst, off / scale if scale else float("inf"))
    return worst


def measure(make: Callable[[], Case], device: torch.device) -> dict[str, Any]:
    """Returns the figures of one module."""
    torch.manual_seed(0)
    case = make()
    case.module.to(device).eval()
    # Before it ran: what its first call fills is a trap of its own. Moved, as cuDNN wants the weights of
    # recurrent layers in one piece, which a copy does not keep.
    graphed = copy.deepcopy(case.module).to(device)
    enliven(case, device)
    graphed.load_state_dict(case.module.state_dict())
    # The plain one runs, so where this fails the outputs are not equal either.
    return attempt(partial(compared, case, cuda_graphed(graphed), device), outcome="error", equal=False)


def compared(case: Case, graphed: Any, device: torch.device) -> dict[str, Any]:
    """Returns the figures of a graphed copy beside its module."""
    worst = 0.0
    emulated = nullcontext() if device.type == "cuda" else graphcache.emulate()
    with emulated, warnings.catch_warnings(record=True) as caught, torch.inference_mode():
        warnings.simplefilter("always", graphcache.GraphCacheWarning)
        for batch in BATCHES:
            inputs = case.fresh(batch, device)
            want = case.call(case.module, *inputs)
            worst = max(worst, difference(want, case.call(graphed, *inputs)))
        info = graphed.forward.cache_info()
        ours = [str(w.message) for w in caught if issubclass(w.category, graphcache.GraphCacheWarning)]
        found = {
            "outcome": "replayed" if info.hits else "eager",
            "equal": worst <= TOLERANCE,
            "difference": min(worst, sys.float_info.max),
            **counts(info),
            "sizes": list(info.sizes),
            "notes": [without_folders(note) for note in info.notes],
            "warnings": [without_folders(text) for text in ours],
        }
        for batch in TIMED if device.type == "cuda" else ():
            inputs = case.fresh(batch, device)
            arms = [partial(case.call, module, *inputs) for module in (case.module, graphed)]
            found.setdefault("speedup", {})[str(batch)] = speedup(arms[0], arms[1], ROUNDS)
    graphed.forward.cache_clear()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all modules, or those that are named; 1 if an output differs anywhere."""
    everything = [name for _, names in GROUPS.values() for name in names]
    asked = parser("zoo", __doc__, everything).parse_args(argv)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(asked.device)
    results: dict[str, dict[str, Any]] = {}
    versions: dict[str, str] = {}
    for library, (make, names) in GROUPS.items():
        chosen = [name for name in names if name in asked.only]
        if not chosen:
            continue
        try:
            module = importlib.import_module(library)
        except Exception as error:  # broken is as good as missing
            print(f"{library}: left out, as it can't be imported ({error})", flush=True)
            continue
        versions[library], results[library] = module.__version__, {}
        for name in chosen:
            start = perf_counter()
            found = attempt(partial(measure, partial(make, module, name), device), outcome="error")
            results[library][name] = {**found, "seconds": round(perf_counter() - start, 1)}
            print(name, results[library][name], flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    ran = [found for group in results.values() for found in group.values() if "equal" in found]
    wrong = sum(not found["equal"] for found in ran)
    figures = {"status": int(wrong > 0), "versions": versions, "groups": results}
    if asked.out:
        record.write(asked.out, "zoo", figures, emulated=device.type == "cpu")
    print(f"{len(ran)} modules ran, outputs differ in {wrong}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
