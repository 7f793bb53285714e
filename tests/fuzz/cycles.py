"""Captures, calls and drops a small module again and again, and looks for what is left behind.

Memory of the pool and its lanes, memory of the device, of the host, and Python objects: after a short
warm-up, none may grow with the number of cycles. On CUDA, nothing else may use the device meanwhile.

    python -m tests.fuzz.cycles --count 10000 --device emulated --out cycles.json
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphcache
from benchmarks.harness import record
from graphcache import cuda_graphed, default_pool

WAYS = ("clear", "delete", "delete, then trim", "clear, held", "delete, held", "recapture")
WARM_UP = 4 * len(WAYS)  # cycles, in which caches of torch, of Python and of the device fill

# Bytes and objects that may be left for each cycle, and for the whole run: the allocators of Python, of
# libc and of torch return memory in pages and keep arenas. A leak in each cycle is a multiple of this.
HOST_BYTES_A_CYCLE, HOST_BYTES = 200, 8 * 2**20
OBJECTS_A_CYCLE = 0.02
TRIMMING = sum("clear" in way or "trim" in way for way in WAYS) / len(WAYS)  # these open a pool anew
DEVICE_BYTES = 4 * 2**20  # kernels that are loaded late, and the driver's own bookkeeping


class Small(nn.Module):
    """Large enough for its lane to be seen in the figures."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) + 1


def cycle(number: int, device: torch.device) -> None:
    """One life of a module, in one of several ways; nothing of it is used afterwards."""
    way = WAYS[number % len(WAYS)]
    model = cuda_graphed(
        Small().to(device).eval(), sizes=(2, 4), stale=("error", "copy")[number // 7 % 2]
    )
    x = torch.ones(4, 64, device=device)
    held = [model(x[: 4 - turn % 3]) for turn in range(6)]
    if not way.endswith("held"):
        held.clear()
    if way.startswith("clear"):
        model.forward.cache_clear()
    elif way == "recapture":
        model.linear.weight = nn.Parameter(model.linear.weight * 2)
        model(x)
    del model
    held.clear()
    if way.endswith("trim"):
        default_pool(device).trim()


def figures(device: torch.device) -> dict[str, int]:
    """Returns what is in use now, after all that can be given back was."""
    gc.collect()
    default_pool(device).trim()
    pool = default_pool(device)
    found = {
        "lanes": len(pool.lanes),
        "pool_reserved": pool.memory().reserved,
        "objects": len(gc.get_objects()),
        "host_rss": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
    }
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        found |= {
            "device_allocated": torch.cuda.memory_allocated(device),
            "device_reserved": torch.cuda.memory_reserved(device),
            "device_used": total - free,
        }
    return found


def host_bytes_of_torch(device: torch.device, count: int = 200) -> float:
    """Returns what a graph in a pool of its own leaves behind on the host, without graphcache.

    torch 2.11 keeps some 48 KiB for each private pool of the device that ever was.
    """
    if device.type == "cpu":
        return 0.0
    stream, x = torch.cuda.Stream(device), torch.zeros(1, device=device)

    def capture() -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            x.zero_()
            graph.capture_end()
        torch.cuda.synchronize(device)

    for _ in range(count):
        capture()
    before = figures(device)["host_rss"]
    for _ in range(count):
        capture()
    return (figures(device)["host_rss"] - before) / count


def run(count: int, device: torch.device, *, report: bool = False) -> dict[str, Any]:
    """Runs `count` cycles after the warm-up, and says what grew by more than noise."""
    start = time.perf_counter()
    emulated = device.type == "cpu"
    of_torch = host_bytes_of_torch(device)
    samples = []
    with graphcache.emulate() if emulated else nullcontext(), torch.no_grad():
        for number in range(WARM_UP):
            cycle(number, device)
        samples.append((0, figures(device)))
        every = max(1, count // 20)
        for number in range(1, count + 1):
            cycle(number, device)
            if number % every == 0 or number == count:
                samples.append((number, figures(device)))
                if report:
                    print(f"{number}/{count}", samples[-1][1], flush=True)
    before, after = samples[0][1], samples[-1][1]
    allowed = {
        "lanes": 0,
        "pool_reserved": 0,
        "objects": max(50, OBJECTS_A_CYCLE * count),
        "host_rss": HOST_BYTES + round((HOST_BYTES_A_CYCLE + 1.25 * TRIMMING * of_torch) * count),
        "device_allocated": 0,
        "device_reserved": 0,
        "device_used": DEVICE_BYTES,
    }
    grown = {name: after[name] - before[name] for name in before}
    return {
        "count": count,
        "seconds": round(time.perf_counter() - start, 1),
        "before": before,
        "after": after,
        "grown": grown,
        "allowed": {name: allowed[name] for name in before},
        "samples": [{"cycle": number, **each} for number, each in samples],
        "host_bytes_of_torch_for_a_pool": of_torch,
        "leaks": [name for name in before if grown[name] > allowed[name]],
    }


def main() -> int:
    """Returns 1 if something leaks."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.cycles", description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--device", choices=("emulated", "cuda"), default="emulated")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if asked.device == "cuda" else torch.device("cpu")
    figures = run(asked.count, device, report=True)
    figures["status"] = int(bool(figures["leaks"]))
    if asked.out:
        record.write(asked.out, "cycles", figures, emulated=asked.device != "cuda")
    print(f"{figures['count']} cycles in {figures['seconds']} s, grown: {figures['grown']}")
    print(f"leaks: {', '.join(figures['leaks']) or 'none'}")
    return int(figures["status"])


if __name__ == "__main__":
    raise SystemExit(main())
