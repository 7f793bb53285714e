"""Run the tests and the workloads made from the examples on this machine's GPU, and record each.

    python -m benchmarks.programs.record_all --out benchmarks/results

Writes one JSON file for each, with device, driver, versions, date and commit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.harness import record
from benchmarks.harness.record import ROOT

WORKLOADS = (
    *("weak_refs", "char_decode", "plain_module", "continuous_batching", "embeddings", "two_models"),
)
# Without the tests of the records themselves: those hold once the records are in the repository.
SUITE = ("tests", "--ignore=tests/benchmarks/test_results.py")


def collect(options: Sequence[str]) -> list[str]:
    """Returns the names of the tests that pytest finds with these options."""
    command = [sys.executable, "-m", "pytest", "--collect-only", *SUITE, *options]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if "::" in line]


def run_tests(
    folder: Path, options: Sequence[str], *, prefix: Sequence[str] = (), stdout: Any = None
) -> dict[str, Any]:
    """Runs tests; returns how many passed, failed and were skipped on each runtime, and what failed.

    Args:
        folder: for the report.
        options: of pytest, and which tests.
        prefix: a command to run it under.
        stdout: where to write; see `subprocess.run`.
    """
    report = folder / "junit.xml"
    command = [*prefix, sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *options]
    status = subprocess.run(command, cwd=ROOT, check=False, stdout=stdout).returncode
    runtimes = ("cuda-portable", "emulated-portable", "cuda", "emulated")
    counts: dict[str, Counter[str]] = {key: Counter() for key in (*runtimes, "both")}
    wrong = []
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "")
        runtime = next((key for key in runtimes if key in name), "both")
        failed = case.find("failure") is not None or case.find("error") is not None
        skipped = case.find("skipped") is not None
        counts[runtime]["failed" if failed else "skipped" if skipped else "passed"] += 1
        if failed:
            wrong.append(f"{case.get('classname')}::{name}")
    tallies = {key: dict(count) for key, count in counts.items()}
    return {"status": status, "counts": tallies, "failed": wrong}


def run_workload(name: str, folder: Path) -> dict[str, Any]:
    """Runs one workload; returns its figures, and its exit status: 0 if they are right."""
    path = folder / f"{name}.json"
    program = [sys.executable, "-m", f"benchmarks.workloads.{name}", "--json", str(path)]
    status = subprocess.run(program, cwd=ROOT, check=False).returncode
    return {"status": status, **(json.loads(path.read_text()) if path.exists() else {})}


def main(argv: Sequence[str] | None = None) -> int:
    """Records everything; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--pytest", default="", help="more options for pytest, such as '-n 8'")
    parser.add_argument("--only", choices=("tests", *WORKLOADS), help="record this one")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("records are of runs on a GPU, and torch finds none here")
    where = record.environment()
    short = record.short_name(where)
    worst = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in (*WORKLOADS, "tests"):
            if args.only in (None, name):
                figures = (
                    run_tests(folder, [*SUITE, *args.pytest.split()])
                    if name == "tests"
                    else run_workload(name, folder)
                )
                record.write(args.out / f"{name}-{short}.json", name, figures, emulated=False)
                worst = max(worst, figures["status"])
    return int(worst != 0)


if __name__ == "__main__":
    sys.exit(main())
