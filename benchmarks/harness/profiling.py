"""Counts the launches, copies, synchronisations and allocations of a call outside its graph."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.harness.timing import Timed

MARK = "graphcache benchmark"
CALLS = 10
ALLOCATION_CALLS = 100

LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cuMemcpy", "cudaMemset", "cuMemset")
SYNCHRONISES = ("Synchronize",)
GRAPHS = ("cudaGraphLaunch", "cuGraphLaunch")


def _run(arm: Timed, count: int) -> None:
    for index in range(count):
        function, args = arm.calls[index % len(arm.calls)]
        if arm.before is not None:
            arm.before()
        function(*args)


def allocations(arm: Timed) -> float:
    """Returns blocks taken from the caching allocator per call, no output being held."""
    with arm.mode():
        arm.reset()
        _run(arm, len(arm.calls))
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        _run(arm, ALLOCATION_CALLS)
        after = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.synchronize()
    return float(after - before) / ALLOCATION_CALLS


def outside(arm: Timed) -> dict[str, Any]:
    """Counts calls of the CUDA API by name, between the first call of the arm and its last.

    The synchronise of the harness lies outside that range, so nothing is subtracted.
    """
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with arm.mode():
        arm.reset()
        with profile(activities=activities) as profiler:
            _run(arm, len(arm.calls))
            torch.cuda.synchronize()
            with record_function(MARK):
                _run(arm, CALLS)
            torch.cuda.synchronize()
    events = [e for e in profiler.events() or () if str(e.device_type).endswith("CPU")]
    mark = next(e.time_range for e in events if e.name == MARK)
    names = Counter(
        e.name
        for e in events
        if mark.start <= e.time_range.start <= mark.end and e.name.startswith(("cuda", "cu"))
    )
    return {**count(names, CALLS), "api_calls": dict(names), "profiled_calls": CALLS}


def count(names: Counter[str], calls: int) -> dict[str, float]:
    """Returns launches outside graphs, synchronises and graph launches per call."""

    def total(parts: tuple[str, ...]) -> float:
        return sum(n for name, n in names.items() if any(part in name for part in parts)) / calls

    return {"launches": total(LAUNCHES), "synchronises": total(SYNCHRONISES), "graphs": total(GRAPHS)}
