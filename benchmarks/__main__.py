"""Measure graphcache against other ways to call the same modules.

    python -m benchmarks --out FOLDER [--only tiny --only gpt2] [--quick] [--device cpu]

Each workload runs in a process of its own and writes one JSON file, with device, driver, versions and
commit. On a CPU the graphs are emulated: that shows whether the harness works, and its records are not
accepted for the docs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness.goals import described
from benchmarks.harness.record import ROOT
from benchmarks.programs.worker import NAMES


def file_name(workload: str, device: str) -> str:
    """Returns the name of a record: `bench-tiny-h100.json`."""
    if device == "cpu":
        return f"bench-{workload}-emulated.json"
    name = torch.cuda.get_device_name(device)
    return f"bench-{workload}-{name.replace('NVIDIA ', '').split()[0].lower()}.json"


def run(workload: str, args: argparse.Namespace) -> int:
    """Runs one workload in a fresh process; returns its status."""
    path: Path = args.out / file_name(workload, args.device)
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.programs.worker", workload, str(path.resolve())]
    command += ["--device", args.device, *(["--quick"] if args.quick else [])]
    begin = time.perf_counter()
    try:
        status = subprocess.run(command, cwd=ROOT, check=False, timeout=args.timeout).returncode
    except subprocess.TimeoutExpired:
        status = 1
        print(f"{workload}: stopped after {args.timeout} s", flush=True)
    print(f"{workload}: {time.perf_counter() - begin:.0f} s, status {status}", flush=True)
    if path.exists():
        show(path)
    return status


def show(path: Path) -> None:
    """Prints the goals of a record beside the measured values."""
    rows = [described(goal) for goal in json.loads(path.read_text())["figures"]["goals"]]
    rows = [("goal", "wanted", "measured", "met"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what was asked for; 1 if an arm of `graphcache` was wrong or a workload failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Compare ways to call.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--only", action="append", choices=NAMES, help="run this one; several allowed")
    parser.add_argument("--quick", action="store_true", help="few calls of small modules, to try it")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu (emulated graphs)")
    parser.add_argument("--timeout", type=float, default=400, help="seconds for each workload")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu tries the harness with emulated graphs")
    args.out.mkdir(parents=True, exist_ok=True)
    return max(run(workload, args) for workload in args.only or NAMES)


if __name__ == "__main__":
    sys.exit(main())
