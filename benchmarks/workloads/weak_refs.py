"""Measure the memory that weak references to graph outputs save, and show whose outputs change.

    python -m benchmarks.workloads.weak_refs

Four graphs with outputs of 4, 3, 2 and 1 units are captured, largest first, into one pool: once with
strong references to the outputs, as plain CUDA graphs are used, and once with weak ones. Then only the
smallest is replayed, with another input. After the demonstration in vLLM's pull request 9724. A unit is
a MiB in emulation; on a GPU it is a GiB, or less where less memory is free.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import program
from graphcache import GraphPool

UNITS = (4, 3, 2, 1)


@dataclass
class Shown:
    """Memory and values with one kind of reference.

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
    """Allocates its output and nothing else."""
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


def unit_bytes(device: torch.device) -> int:
    """Returns the bytes of a unit: 14 units, with some to spare, fit the free memory of any GPU."""
    if device.type == "cpu":
        return 2**20
    free, _ = torch.cuda.mem_get_info(device)
    step = 2**21  # the allocator takes large blocks in steps of 2 MiB
    return max(step, min(2**30, free // 16) // step * step)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both demonstrations; 1 if other outputs changed than those that share the memory."""
    args = program.parse(__doc__, argv, {})
    device: torch.device = args.device
    unit = unit_bytes(device)
    figures: dict[str, Any] = {"device": program.device_name(device), "unit_bytes": unit}
    failures: dict[str, bool] = {}
    with program.graphs(device):
        for name, weak in (("strong", False), ("weak", True)):
            shown = show(device, unit, weak=weak)
            figures[f"{name}_reserved_bytes"] = shown.reserved
            figures[f"{name}_values_after"] = {str(n): shown.after[n] for n in UNITS}
            failures[f"{name} references: other outputs changed than those that share the memory"] = any(
                changed_rows(shown, units) != overlapping_rows(shown, units) for units in UNITS
            )
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return program.finish(figures, args, failures)


if __name__ == "__main__":
    sys.exit(main())
