"""Count the instructions of a replayed call, emulated, with valgrind's callgrind.

    python -m benchmarks.programs.callgrind

A small module is called N and 2 N times in one process, and the difference is divided by N: so start-up,
capture and the way into callgrind cancel out. Needs `valgrind` with its headers, and a C compiler.
"""

import argparse
import ctypes
import gc
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

WARM_UP = 40
MARKS = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void zero(void) { CALLGRIND_ZERO_STATS; }
void dump(void) { CALLGRIND_DUMP_STATS; }
"""


def calls_under_valgrind(calls: int, marks: str) -> None:
    """Calls the module `calls` times and twice as often, and dumps the counts of each."""
    import torch

    import graphcache

    torch.manual_seed(0)
    torch.set_num_threads(1)
    callgrind = ctypes.CDLL(marks)
    with graphcache.emulate(), torch.no_grad():
        layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        module: Any = graphcache.cuda_graphed(layers.eval())
        x = torch.randn(8, 8)
        for _ in range(WARM_UP):
            module(x)
        gc.collect()
        gc.disable()
        callgrind.start()
        for _ in range(WARM_UP):
            module(x)
        for times in (calls, 2 * calls):
            callgrind.zero()
            for _ in range(times):
                module(x)
            callgrind.dump()
    replays = module.forward.cache_info().hits
    if replays < 3 * calls:
        raise SystemExit(f"only {replays} calls were replayed")


def costs_of(path: Path) -> Counter[str]:
    """Returns the instructions in each library of a profile."""
    names: dict[str, str] = {}
    costs: Counter[str] = Counter()
    library, inclusive = "", False
    for line in path.read_text().splitlines():
        if found := re.match(r"(c?)ob=(\(\d+\))(?: (.*))?", line):
            name = names.setdefault(found[2], found[3] or "")
            library = library if found[1] else name  # "cob": where a callee lies
        elif line.startswith("calls="):
            inclusive = True  # the next line counts what another function did
        elif re.match(r"[\d+*-]\S* \d+$", line):
            costs[Path(library).name] += 0 if inclusive else int(line.rsplit(" ", 1)[1])
            inclusive = False
    return costs


def count(calls: int) -> Counter[str]:
    """Returns the instructions of one replayed call in each library."""
    with tempfile.TemporaryDirectory() as folder:
        source, marks, out = (Path(folder, name) for name in ("marks.c", "marks.so", "profile"))
        source.write_text(MARKS)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(marks), str(source)], check=True)
        subprocess.run(
            [
                *("setarch", "--addr-no-randomize"),  # or alignment changes the count
                *("valgrind", "--tool=callgrind", "--instr-atstart=no", "--quiet"),
                *(f"--callgrind-out-file={out}", sys.executable, __file__),
                *("--calls", str(calls), "--marks", str(marks)),
            ],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        )
        once, twice = (costs_of(Path(f"{out}.{number}")) for number in (1, 2))
    return Counter({name: round((twice[name] - once[name]) / calls) for name in twice})


def main() -> None:
    """Prints the instructions of a replayed call."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--marks", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.marks:
        calls_under_valgrind(given.calls, given.marks)
        return
    costs = count(given.calls)
    print(f"{sum(costs.values()):,} instructions a replayed call, of these")
    for name, instructions in costs.most_common(6):
        print(f"{instructions:>9,}  {name}")


if __name__ == "__main__":
    main()
