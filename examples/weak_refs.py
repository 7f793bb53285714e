"""Show what weak references to graph outputs save: all sizes together take the memory of the largest.

    python examples/weak_refs.py

A row of the batch is one unit of memory, and there are graphs for 4, 3, 2 and 1 rows. They are captured
into a pool with strong references, as plain CUDA graphs hold their outputs, and into one with weak ones.
"""

import sys

import torch
from torch import Tensor

from graphcache import GraphPool, cuda_graphed, emulate

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def show(weak: bool, unit: int) -> float:
    """Prints where the outputs lie; returns the units of memory that the pool takes."""
    pool = GraphPool(device, weak=weak)  # weak=True is the default
    step = cuda_graphed(one_more, sizes=(1, 2, 3, 4), pool=pool, stale="error")  # the one line
    rows = torch.ones(4, unit // 4, device=device)  # float32: 4 bytes
    step(rows)  # runs eagerly, then captures all sizes, the largest first
    starts = {step(rows[:size]).data_ptr() for size in (4, 3, 2, 1)}
    units = pool.memory().reserved / unit
    print(f"{'weak' if weak else 'strong'} references: {units:.2f} units of {unit / 2**20:.0f} MiB")
    print(f"  the outputs of 4 sizes start at {len(starts)} different addresses")

    held = step(rows)
    cloned = held.clone()
    step(rows[:1])  # another graph of the pool runs
    try:
        held.sum()
    except RuntimeError as error:
        print(f"  an output that is held for too long raises: {str(error)[:105]}...")
    if not bool((cloned == 2).all()) or not step.cache_info().hits:
        sys.exit("FAILED: a clone changed, or nothing was replayed")
    return units


def one_more(rows: Tensor) -> Tensor:
    return rows + 1


def unit_bytes() -> int:
    """Returns the bytes of a unit: 1 MiB in emulation, else at most 1/32 of the free GPU memory."""
    if device.type == "cpu":
        return 2**20
    free, _ = torch.cuda.mem_get_info()
    step = 2**21  # the allocator takes large blocks in steps of 2 MiB
    return max(step, min(2**30, free // 32) // step * step)


with torch.inference_mode(), emulate():  # emulate() concerns CPU tensors only
    strong, weak = (show(kind, unit_bytes()) for kind in (False, True))
print(f"weak references save {1 - weak / strong:.0%}")
if weak > strong / 2:
    sys.exit("FAILED: weak references save less than half")
