"""Memory and capture time against the number of sizes, in the shape of GPT-2 small."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.timing import quiet_collector
from benchmarks.workloads.catalog import gpt, gpt_inputs
from graphcache import GraphPool, cuda_graphed

# 35 sizes, as engines use them; the cache is short, since 256 rows of a long one say nothing more.
LADDER = (1, 2, 4, *range(8, 257, 8))
POSITIONS = 128
COUNTS = (1, 2, 4, 8, 16, 35)
REPEATS = 21  # a host is often busy for a while
FIRST_BATCH = 8


def spread(ladder: Sequence[int], count: int) -> tuple[int, ...]:
    """Returns so many sizes, evenly spread, the largest among them."""
    if count == 1:
        return (ladder[-1],)
    last = len(ladder) - 1
    return tuple(ladder[round(i * last / (count - 1))] for i in range(count))


@dataclass
class _Used:
    """Bytes that the device and the allocator have given out."""

    device_bytes: int
    allocator_bytes: int

    @classmethod
    def now(cls) -> _Used:
        free, total = torch.cuda.mem_get_info()
        return cls(total - free, torch.cuda.memory_reserved())


def settle(device: torch.device) -> None:
    """Frees unreferenced memory, so that the next reading is not of the last pool."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class _Measured:
    """One module, decorated again for each reading."""

    def __init__(self, device: torch.device, ladder: Sequence[int], small: bool) -> None:
        self.device = device
        self.ladder = ladder
        self.model: nn.Module = gpt(device, small, ladder[-1], POSITIONS).eval().requires_grad_(False)
        self.inputs = gpt_inputs(self.model, min(FIRST_BATCH, ladder[-1]), device)
        for size in ladder:  # kernels are loaded at their first use: nobody's capture pays for that
            self.model(*gpt_inputs(self.model, size, device))
        self.warm()

    def warm(self) -> None:
        """Captures once without counting it."""
        self.first_call(GraphPool(self.device), self.ladder[-1:])
        self.undecorate()

    def undecorate(self) -> None:
        """Drops the graphs."""
        if "forward" in vars(self.model):
            del self.model.forward
        settle(self.device)

    def first_call(self, pool: GraphPool, sizes: Sequence[int]) -> dict[str, float]:
        """Decorates the module and calls it once; returns how long that and its captures took."""
        cuda_graphed(
            self.model,
            sizes=sizes,
            pad={"positions": POSITIONS - 1},
            pool=pool,
            fallback=False,
            progress=False,
        )
        begin = time.perf_counter()
        out = self.model(*self.inputs)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        del out
        forward: Any = self.model.forward
        info = forward.cache_info()
        if len(info.sizes) != len(sizes):
            raise RuntimeError(f"captured {info.sizes}, not {tuple(sizes)}")
        return {"first_call_seconds": seconds, "capture_seconds": info.capture_seconds}

    def is_right(self) -> bool:
        """Compares a replay with eager; the first padded call of a size runs eagerly."""
        expected = type(self.model).forward(self.model, *self.inputs)
        self.model(*self.inputs)
        out: Tensor = self.model(*self.inputs)
        return bool((out - expected).abs().max() <= 5e-2 * expected.abs().max())


def against_sizes(
    measured: _Measured, counts: Sequence[int], save: Callable[[dict[str, Any]], None]
) -> dict[str, list[dict[str, Any]]]:
    """Reads pool and executables for each number of sizes, for weak and strong outputs."""
    on_gpu = measured.device.type == "cuda"
    rows: dict[str, list[dict[str, Any]]] = {"weak": [], "strong": []}
    settle(measured.device)
    start = _Used.now() if on_gpu else None
    for number in counts:
        sizes = spread(measured.ladder, number)
        for kind, found in rows.items():
            pool = GraphPool(measured.device, weak=kind == "weak")
            seconds = measured.first_call(pool, sizes)
            right = measured.is_right()
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            row = {"sizes": number, "pool_bytes": pool.memory().reserved, "correct": right, **seconds}
            if start is not None:
                # What the device gave out and the allocator did not get is the driver's: executables.
                now = _Used.now()
                device_bytes = now.device_bytes - start.device_bytes
                row["executable_bytes"] = device_bytes - (now.allocator_bytes - start.allocator_bytes)
            found.append(row)
            del pool
            measured.undecorate()
        save(rows)
    return rows


def bare_capture(measured: _Measured) -> float:
    """Captures all sizes by `capture_begin` and `capture_end`, largest first; returns the seconds."""
    settle(measured.device)
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    static = gpt_inputs(measured.model, measured.ladder[-1], measured.device)
    graphs = []
    with quiet_collector(), torch.cuda.stream(stream):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for size in reversed(measured.ladder):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            measured.model(*(tensor[:size] for tensor in static))
            graph.capture_end()
            graphs.append(graph)
        torch.cuda.synchronize()
        return time.perf_counter() - begin


def capture_times(measured: _Measured, repeats: int) -> dict[str, Any]:
    """Captures the whole ladder by hand and by `graphcache`, in turn."""
    bare: list[float] = []
    ours: list[dict[str, float]] = []
    for _ in range(repeats):
        if measured.device.type == "cuda":
            bare.append(bare_capture(measured))
            settle(measured.device)
        pool = GraphPool(measured.device)
        ours.append(measured.first_call(pool, measured.ladder))
        del pool
        measured.undecorate()

    def all_of(values: list[float]) -> dict[str, Any] | None:
        return {"median": statistics.median(values), "all": values} if values else None

    return {
        "sizes": len(measured.ladder),
        "bare_seconds": all_of(bare),
        "capture_seconds": all_of([one["capture_seconds"] for one in ours]),
        "first_call_seconds": all_of([one["first_call_seconds"] for one in ours]),
    }


def run(device: torch.device, quick: bool, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measures all of it."""
    ladder = (1, 2, 4, 8) if quick else LADDER
    counts = (1, 2, 4) if quick else COUNTS
    figures: dict[str, Any] = {
        "about": "A decode step in the shape of GPT-2 small, up to 256 rows, KV cache of "
        f"{POSITIONS} positions in buffers. Sizes are spread evenly over a ladder of {len(ladder)}, the "
        "largest among them. Executables: what the device gave out and torch's allocator did not get.",
        "ladder": list(ladder),
    }
    with torch.inference_mode():
        with torch.inference_mode(False), torch.no_grad():
            measured = _Measured(device, ladder, quick)
        figures |= against_sizes(measured, counts, lambda rows: save(figures | rows))
        figures["capture"] = capture_times(measured, REPEATS)
    right = all(row["correct"] for kind in ("weak", "strong") for row in figures[kind])
    figures["status"] = int(not right)
    return figures
