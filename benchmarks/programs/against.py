"""Times replayed calls and first calls of two checkouts in turns, on a GPU, and records the ratios.

    python -m benchmarks.programs.against OTHER --commit HASH --out benchmarks/results

OTHER is the folder of another checkout whose native library is built. Each round starts one process for
each checkout and program. It checks outputs against eager, and gives the median host time of a call, or
the seconds of a first call: of BERT-base, and of a forward that writes to a cache of 8 GiB.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.harness.record import ROOT, environment, short_name, write

# Only public names: it runs with either checkout.
CALLS = """
import json, statistics, time, torch
from graphcache import cuda_graphed

torch.manual_seed(0)
layers = [layer for _ in range(4) for layer in (torch.nn.Linear(256, 256), torch.nn.ReLU())]
plain = torch.nn.Sequential(*layers).cuda()
graphed = cuda_graphed(plain.forward, sizes=(4, 8))
medians = {}
with torch.inference_mode():
    for rows in (8, 5):
        x = torch.randn(rows, 256, device="cuda")
        for _ in range(2000):
            result = graphed(x)
        torch.testing.assert_close(result, plain(x), rtol=1e-3, atol=1e-4)
        del result
        times = []
        for _ in range(200):
            torch.cuda.synchronize()
            for _ in range(20):
                start = time.perf_counter()
                graphed(x)
                times.append(time.perf_counter() - start)
        medians[rows] = statistics.median(times) * 1e6
print(json.dumps(medians))
"""


FIRST_CALL = """
import json, time, torch
from transformers import BertConfig, BertModel
from graphcache import cuda_graphed

torch.manual_seed(0)
small = torch.nn.Linear(8, 8).cuda()
model = BertModel(BertConfig()).cuda().eval()
ids = torch.randint(0, 30000, (8, 128), device="cuda")
with torch.inference_mode():
    cuda_graphed(small, sizes=(1, 2))(torch.randn(2, 8, device="cuda"))  # what a process pays once
    for _ in range(3):
        expected = model(input_ids=ids).last_hidden_state
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(input_ids=ids)
    torch.cuda.synchronize()
    eager = time.perf_counter() - start
    cuda_graphed(model, sizes=(1, 2, 4, 8))
    start = time.perf_counter()
    model(input_ids=ids)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    torch.testing.assert_close(model(input_ids=ids).last_hidden_state, expected, rtol=1e-3, atol=1e-3)
    assert model.forward.cache_info().sizes == (1, 2, 4, 8)
print(json.dumps({"eager": eager, "first": first}))
"""
CACHE = """
import json, time, torch
from graphcache import cuda_graphed

class Cached(torch.nn.Module):
    def __init__(self, slots):
        super().__init__()
        self.project = torch.nn.Linear(4096, 4096, dtype=torch.float16)
        self.register_buffer("cache", torch.zeros(slots, 4096, dtype=torch.float16))

    def forward(self, x, slots):
        self.cache.index_copy_(0, slots, self.project(x))
        return self.cache.index_select(0, slots) * 2

torch.manual_seed(0)
SIZES, SLOTS = tuple(range(1, 17)), 8 * 2**30 // 8192
x, slots = torch.randn(16, 4096, dtype=torch.float16, device="cuda"), torch.arange(16, device="cuda")
with torch.inference_mode():
    small = cuda_graphed(Cached(64).cuda(), sizes=SIZES, pad={"x": 0, "slots": 63})
    small(x, slots)  # what a process pays once
    model = Cached(SLOTS + 1).cuda()
    for _ in range(3):
        expected = model(x, slots)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    cuda_graphed(model, sizes=SIZES, pad={"x": 0, "slots": SLOTS})
    start = time.perf_counter()
    model(x, slots)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    more = torch.cuda.max_memory_allocated() - peak
    assert torch.equal(model(x, slots), expected)
    assert model.forward.cache_info().sizes == SIZES
print(json.dumps({"first": first, "more_bytes": more}))
"""


def run(checkout: Path, program: str) -> dict[str, float]:
    """Returns the figures that one program prints, with the library of a checkout."""
    variables = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(
        command, cwd=checkout, env=variables, check=True, capture_output=True, text=True
    ).stdout
    figures: dict[str, float] = json.loads(printed.splitlines()[-1])
    return figures


def in_turns(other: Path, program: str, rounds: int) -> dict[str, dict[str, float]]:
    """Returns the medians of both checkouts and of their ratios, for each figure of a program."""
    found = [(run(other, program), run(ROOT, program)) for _ in range(rounds)]
    compared = {}
    for name in found[0][0]:
        there, here = (median(each[name] for each in arm) for arm in zip(*found, strict=True))
        ratio = median(
            here[name] / max(there[name], 1) if "bytes" in name else here[name] / there[name]
            for there, here in found
        )
        compared[name] = {"other": there, "here": here, "ratio": ratio}
        print(f"{name}: {there:.4g} there, {here:.4g} here, ratio {ratio:.3f}")
    return compared


def main(argv: Sequence[str] | None = None) -> int:
    """Times both checkouts, and writes one record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--out", type=Path, required=True, help="folder for the record")
    parser.add_argument("--commit", required=True, help="commit of the other checkout")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--first-rounds", type=int, default=3, help="0: first calls are left out")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("speed is told on a GPU only, and torch finds none here")
    other = args.other.resolve()
    calls = {
        f"{rows} rows": {"other_us": each["other"], "here_us": each["here"], "ratio": each["ratio"]}
        for rows, each in in_turns(other, CALLS, args.rounds).items()
    }
    figures = {
        "status": 0,
        "other": args.commit,
        "calls": calls,
    }
    if args.first_rounds:
        figures["first_call"] = in_turns(other, FIRST_CALL, args.first_rounds)
        figures["cache"] = in_turns(other, CACHE, args.first_rounds)
    write(args.out / f"against-{short_name(environment())}.json", "against", figures, emulated=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
