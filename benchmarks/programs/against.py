"""Times a replayed call of two checkouts in turns, on the host of a GPU, and records the ratio.

    python -m benchmarks.programs.against OTHER --commit HASH --out benchmarks/results

OTHER is the folder of another checkout whose native library is built. Each round starts one process for
each checkout; a process checks the outputs against eager and gives the median host time of a call.
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
PROGRAM = """
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


def run(checkout: Path) -> dict[str, float]:
    """Returns the median host time of a call, in microseconds, by its rows."""
    variables = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", PROGRAM]
    printed = subprocess.run(
        command, cwd=checkout, env=variables, check=True, capture_output=True, text=True
    ).stdout
    times: dict[str, float] = json.loads(printed.splitlines()[-1])
    return times


def main(argv: Sequence[str] | None = None) -> int:
    """Times both checkouts, and writes one record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--out", type=Path, required=True, help="folder for the record")
    parser.add_argument("--commit", required=True, help="commit of the other checkout")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("speed is told on a GPU only, and torch finds none here")
    rounds = [(run(args.other.resolve()), run(ROOT)) for _ in range(args.rounds)]
    calls = {}
    for rows in rounds[0][0]:
        other, here = (median(times[rows] for times in arm) for arm in zip(*rounds, strict=True))
        ratio = median(here[rows] / other[rows] for other, here in rounds)
        calls[f"{rows} rows"] = {"other_us": other, "here_us": here, "ratio": ratio}
        print(f"{rows} rows: {other:.2f} us there, {here:.2f} us here, ratio {ratio:.3f}")
    figures = {"status": 0, "other": args.commit, "calls": calls}
    write(args.out / f"against-{short_name(environment())}.json", "against", figures, emulated=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
