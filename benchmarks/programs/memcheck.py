"""Run the CUDA tests, or the examples, under compute-sanitizer's memcheck, and record what it found.

    python -m benchmarks.programs.memcheck tests --out benchmarks/results --jobs 24
    python -m benchmarks.programs.memcheck examples --out benchmarks/results

Each process has a sanitizer of its own: one for all of them serves one after another.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.harness import record
from benchmarks.programs import record_all

# Captures fail on purpose in many tests, and errors of the API are no errors of memory. Its walk through
# Python's stack leaks what the frames hold (fixed in release 2025.4.1), so no backtraces.
SANITIZER = (
    *("compute-sanitizer", "--tool", "memcheck", "--target-processes", "all"),
    *("--report-api-errors", "no", "--show-backtrace", "no"),
)
# Each process takes long to start, and Inductor would start one for each core.
FEW_PROCESSES = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
# The profiler is what memcheck takes the place of.
TESTS = ("-k", "cuda and not profile", "-m", "not programs")
EXAMPLES = sorted((record.ROOT / "examples").glob("*.py"))
GROUP = 20  # tests of one process: it takes seconds to start
# What it has to report, or a run without errors would tell nothing. It reads the end, as what is freed
# may be handed out again, from its beginning.
READS_FREED_MEMORY = """
import torch
from graphcache import _C
tensor = torch.ones(2**24, device="cuda")
weak = _C.weak_ref(tensor)
del tensor
torch.cuda.empty_cache()
(weak[-1:] + 1).item()
"""


def errors(text: str) -> int:
    """Returns the number of errors in a log.

    Raises:
        ValueError: for a log without a summary.
    """
    found = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    if not found:
        raise ValueError("the log of compute-sanitizer ends without a summary")
    return sum(map(int, found))


def run_tests(folder: Path, options: Sequence[str], jobs: int) -> tuple[str, dict[str, Any]]:
    """Runs the tests, `jobs` groups at a time; returns the logs, and how many passed."""
    names = record_all.collect([*TESTS, *options])
    counts: Counter[str] = Counter()
    failed: list[str] = []
    devices = deque(range(torch.cuda.device_count()))

    groups = -(-len(names) // GROUP)

    def run(index: int) -> str:
        part = folder / f"tests-{index:03}"
        part.mkdir()
        (part / "names").write_text("\n".join(names[index::groups]))  # slow ones are neighbours
        devices.rotate()
        order = ",".join(map(str, devices))  # which of them is the current one
        with (part / "log").open("w") as stdout:
            found = record_all.run_tests(
                part,
                [f"@{part / 'names'}", *options],
                prefix=("env", f"CUDA_VISIBLE_DEVICES={order}", *SANITIZER),
                stdout=stdout,
            )
        for tally in found["counts"].values():
            counts.update(tally)
        failed.extend(found["failed"])
        print(f"{part.name} ended; so far {dict(counts)}", *found["failed"], flush=True)
        return (part / "log").read_text()

    with ThreadPool(jobs) as pool:
        logs = pool.map(run, range(groups), chunksize=1)
    return _joined(logs), {"counts": {"cuda": dict(counts)}, "failed": failed}


def _joined(logs: Sequence[str]) -> str:
    for log in logs:
        errors(log)  # each has to have its summary
    return "\n".join(logs)


def run_examples(folder: Path, options: Sequence[str], jobs: int) -> tuple[str, dict[str, Any]]:
    """Runs the examples, `jobs` at a time; returns the logs, and how many passed."""

    def run(path: Path) -> int:
        start = perf_counter()
        with (folder / f"{path.stem}.log").open("w") as stdout:
            command = [*SANITIZER, sys.executable, str(path)]
            status = subprocess.run(command, cwd=folder, check=False, stdout=stdout).returncode
        print(f"{path.stem}: {perf_counter() - start:.0f} s, status {status}", flush=True)
        return status

    with ThreadPool(jobs) as pool:
        wrong = sum(status != 0 for status in pool.map(run, EXAMPLES, chunksize=1))
    logs = [(folder / f"{path.stem}.log").read_text() for path in EXAMPLES]
    return _joined(logs), {"counts": {"cuda": {"passed": len(logs) - wrong, "failed": wrong}}}


def run(part: str, folder: Path, options: Sequence[str], jobs: int) -> dict[str, Any]:
    """Runs one part and the script above; returns the errors of each, and how many passed.

    Args:
        part: which; see `PARTS`.
        folder: where the logs go.
        options: more for what is run.
        jobs: how many processes at a time.
    """
    log, counts = PARTS[part](folder, options, jobs)
    canary = subprocess.run(
        [*SANITIZER, sys.executable, "-c", READS_FREED_MEMORY],
        cwd=record.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = {"errors": errors(log), "errors_of_a_faulty_script": errors(canary.stdout)}
    wrong = found["errors"] or not found["errors_of_a_faulty_script"]
    return {"part": part, **found, **counts, "status": int(bool(wrong))}


PARTS = {"tests": run_tests, "examples": run_examples}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the record; 1 if memory errors were found, or if none is ever found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=PARTS, help="what to run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file")
    parser.add_argument("--options", default="", help="more options for pytest")
    parser.add_argument("--jobs", type=int, default=8, help="how many processes at a time")
    parser.add_argument("--logs", type=Path, help="a new folder for the output, which is kept then")
    args = parser.parse_args(argv)
    os.environ.update(FEW_PROCESSES)
    short = record.short_name(record.environment())
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = run(args.part, folder, args.options.split(), args.jobs)
    record.write(args.out / f"memcheck-{args.part}-{short}.json", "memcheck", figures, emulated=False)
    return int(figures["status"])


if __name__ == "__main__":
    sys.exit(main())
