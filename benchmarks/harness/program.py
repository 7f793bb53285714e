"""Options, timing and the record of a workload that runs as its own program."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.timing import median_seconds
from graphcache import emulate

Counts = Mapping[str, tuple[int, str]]  # by the name of an option: its default, and help


def parse(about: str | None, argv: Sequence[str] | None, counts: Counts) -> argparse.Namespace:
    """Returns the options: the counts, `--device` and `--json`."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n", maxsplit=1)[0])
    for name, (default, text) in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (%(default)s)")
    parser.add_argument("--device", help="cuda or cpu; without it, cuda where there is one")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    args = parser.parse_args(argv)
    if any(getattr(args, name) < 1 for name in counts):
        parser.error(f"{', '.join(counts)} must be at least 1")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return args


def graphs(device: torch.device) -> AbstractContextManager[Any]:
    """Emulates graphs inside the block if the device is a CPU."""
    return nullcontext() if device.type == "cuda" else emulate()


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def rates(
    eager: Callable[[], Any], graphed: Callable[[], Any], work: int, repeats: int
) -> dict[str, float]:
    """Returns the units of work per second of each arm, on the current GPU."""
    arms = {"eager": eager, "graphed": graphed}
    seconds = median_seconds(arms, repeats, torch.cuda.synchronize)
    return {name: work / each for name, each in seconds.items()}


def finish(figures: Mapping[str, Any], args: argparse.Namespace, failures: Mapping[str, bool]) -> int:
    """Prints the figures and writes their file.

    Args:
        figures: values of the record, by name.
        args: see `parse`.
        failures: True for each check that failed, by the message to print.

    Returns:
        The exit status: 1 if a check failed.
    """
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    wrong = [text for text, failed in failures.items() if failed]
    for text in wrong:
        print(f"FAILED: {text}", file=sys.stderr)
    return int(bool(wrong))
