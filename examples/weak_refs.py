"""Show what weak references to graph outputs save, and what they cost.

    python examples/weak_refs.py

Four graphs with outputs of 4, 3, 2 and 1 units are captured, largest first, into one pool: once with
strong references to the outputs, as plain CUDA graphs are used, and once with weak ones. Then only the
smallest is replayed, with another input, to show whose outputs change. After the demonstration in
vLLM's pull request 9724. A unit is a GiB on a GPU, and a MiB in emulation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphcache import GraphPool, emulate

UNITS = (4, 3, 2, 1)


@dataclass
class Shown:
    """What one kind of reference gave.

    Attributes:
        reserved: bytes that the pool took from the device.
        starts: where each output starts, in units from the lowest of them.
        before: the value in each unit of each output, after all graphs ran on an input of ones.
        after: the same after only the smallest graph ran again, on an input of fives.
    """

    reserved: int
    starts: dict[int, float]
    before: dict[int, list[float]]
    after: dict[int, list[float]]


def one_more(rows: Tensor) -> list[Tensor]:
    return [rows + 1]


def show(device: torch.device, unit: int, *, weak: bool) -> Shown:
    """Captures the four graphs into a pool of their own.

    Args:
        device: where.
        unit: bytes of one row of the input.
        weak: whether the pool keeps outputs as weak references.
    """
    pool = GraphPool(device, weak=weak)
    lane = pool.lane()
    rows = torch.ones(max(UNITS), unit // 4, device=device)  # float32: 4 bytes
    graphs, outputs = {}, {}
    with pool.runtime.ladder(device):
        for units in UNITS:
            # The output is the only thing that a capture allocates: one more than the input.
            graphs[units], (outputs[units],) = lane.capture(partial(one_more, rows[:units]))

    def values() -> dict[int, list[float]]:
        return {units: outputs[units][:, 0].tolist() for units in UNITS}

    for graph in graphs.values():
        graph.replay()
    before = values()
    rows.fill_(5)
    graphs[min(UNITS)].replay()
    lowest = min(output.data_ptr() for output in outputs.values())
    starts = {units: (outputs[units].data_ptr() - lowest) / unit for units in UNITS}
    return Shown(pool.memory().reserved, starts, before, values())


def changed_rows(shown: Shown, units: int) -> list[int]:
    """Returns which units of one output the replay of the smallest graph changed."""
    pairs = zip(shown.before[units], shown.after[units], strict=True)
    return [row for row, (before, after) in enumerate(pairs) if before != after]


def overlapping_rows(shown: Shown, units: int) -> list[int]:
    """Returns which units of one output lie where the smallest output lies."""
    smallest = min(UNITS)
    first = shown.starts[smallest] - shown.starts[units]
    return [row for row in range(units) if first - 1 < row < first + smallest]


def report(name: str, shown: Shown, unit: int, unit_name: str) -> bool:
    """Prints one demonstration; returns whether exactly the overlapping outputs changed."""
    print(f"{name} references: {shown.reserved / unit:.2f} {unit_name} reserved")
    right = True
    for units in UNITS:
        rows, expected = changed_rows(shown, units), overlapping_rows(shown, units)
        right = right and rows == expected
        where = "begins where the smallest does" if expected else "has memory of its own"
        what = f"unit {rows[0]} changed" if rows else "unchanged"
        print(f"  output of {units}: {shown.after[units]!s:22} {what:16} {where}")
    return right


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", help="cuda or cpu; without it, cuda where there is one")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    args = parser.parse_args(argv)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both demonstrations; 1 if an output changed that should not have, or the reverse."""
    args = parse_arguments(argv)
    on_gpu = args.device.type == "cuda"
    unit, unit_name = (2**30, "GiB") if on_gpu else (2**20, "MiB")
    figures: dict[str, Any] = {"unit": unit_name}
    right = True
    print(f"outputs of {', '.join(map(str, UNITS))} {unit_name}, captured largest first")
    print("then only the graph of the smallest runs again: its input was 1, and is 5 now\n")
    with nullcontext() if on_gpu else emulate():
        for name, weak in (("strong", False), ("weak", True)):
            shown = show(args.device, unit, weak=weak)
            right = report(name, shown, unit, unit_name) and right
            figures[f"{name}_reserved_bytes"] = shown.reserved
            figures[f"{name}_values_after"] = {str(n): shown.after[n] for n in UNITS}
            if on_gpu:
                torch.cuda.empty_cache()
    print(
        "\nWith strong references every output pins memory of its own, so only that of the smallest\n"
        "changes. With weak ones, what a capture freed is used again by the next: all four outputs\n"
        "begin in the same memory, and the smallest graph wrote into the first unit of each. That is\n"
        "right as long as one graph's results are wanted at a time: one size is run per call, and the\n"
        "library raises (or copies) when an output is still held that another graph overwrites."
    )
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    if not right:
        print("other outputs changed than those that share the memory", file=sys.stderr)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
