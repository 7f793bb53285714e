"""Run the CUDA tests under compute-sanitizer's memcheck, and record what it found.

    python -m benchmarks.memcheck tests --out benchmarks/results --pytest "-n 20 --dist worksteal"
    python -m benchmarks.memcheck programs --out benchmarks/results --pytest "-n 7"

The second is of the examples, which launch most: each launch is waited for, and processes on one GPU
wait for each other besides. So these are best run on a GPU of their own.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

# Captures fail on purpose in many tests, and errors of the API are no errors of memory. Its walk through
# Python's stack leaks what the frames hold (fixed in release 2025.4.1), so no backtraces.
SANITIZER = (
    *("compute-sanitizer", "--tool", "memcheck", "--target-processes", "all"),
    *("--report-api-errors", "no", "--show-backtrace", "no"),
)
# Each process takes long to start, and Inductor would start one for each core.
FEW_PROCESSES = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
# The profiler is what memcheck takes the place of.
PARTS = {
    "tests": "cuda and not profile and not test_examples",
    "programs": "cuda and test_examples",
}
# What it has to report, or a run without errors would tell nothing.
READS_FREED_MEMORY = """
import torch
from graphcache import _C
tensor = torch.ones(2**24, device="cuda")
weak = _C.weak_ref(tensor)
del tensor
torch.cuda.empty_cache()
(weak + 1).sum().item()
"""


def errors(text: str) -> int:
    """Returns how many errors a log tells of.

    Raises:
        ValueError: for a log without a summary.
    """
    found = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    if not found:
        raise ValueError("the log of compute-sanitizer ends without a summary")
    return sum(map(int, found))


def run(part: str, folder: Path, options: Sequence[str], log: Path) -> dict[str, Any]:
    """Runs the tests and the script above; returns the errors of each, and how many tests passed.

    Args:
        part: which tests; see `PARTS`.
        folder: for the report of the tests.
        options: more of pytest.
        log: where the output goes.
    """
    options = ["-k", PARTS[part], *options]
    with log.open("w") as stdout:
        tests = record.run_tests(folder, options, prefix=SANITIZER, stdout=stdout)
    canary = subprocess.run(
        [*SANITIZER, sys.executable, "-c", READS_FREED_MEMORY],
        cwd=record.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = {"errors": errors(log.read_text()), "errors_of_a_faulty_script": errors(canary.stdout)}
    wrong = found["errors"] or not found["errors_of_a_faulty_script"]
    return {"part": part, **found, "counts": tests["counts"], "status": int(bool(wrong))}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the record; 1 if memory errors were found, or if none is ever found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=PARTS, help="which tests")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file")
    parser.add_argument("--pytest", default="", help="more options for pytest, such as '-n 8'")
    parser.add_argument("--log", type=Path, help="where the output of the tests goes")
    args = parser.parse_args(argv)
    os.environ.update(FEW_PROCESSES)
    short = record.environment()["device"].replace("NVIDIA ", "").split()[0].lower()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        figures = run(args.part, folder, args.pytest.split(), args.log or folder / "memcheck.log")
    record.write(args.out / f"memcheck-{args.part}-{short}.json", "memcheck", figures, emulated=False)
    return int(figures["status"])


if __name__ == "__main__":
    sys.exit(main())
