"""The first table of docs/results.md: one row for each record, with its headline."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.harness.goals import latency_ratio

Figures = dict[str, Any]


def times(ratio: float) -> str:
    """Returns a speed as text: "2.8 times eager's speed"."""
    return f"{ratio:.1f} times eager's speed"


def _tests(figures: Figures) -> str:
    counts = figures["counts"].values()
    passed, failed = (sum(count.get(key, 0) for count in counts) for key in ("passed", "failed"))
    return f"{passed:,} passed, {failed} failed"


def _memcheck(figures: Figures) -> str:
    return f"{figures['errors']} errors of memory"


def _generate(figures: Figures) -> str:
    arms = figures["arms"]
    eager, compiled = arms["eager"]["seconds"], arms["transformers compiles"]["seconds"]
    ours = compiled / arms["graphcache, compiled"]["seconds"]
    return (
        f"{times(eager / arms['graphcache']['seconds'])}; compiled: {ours:.2f} times that of "
        "transformers' own graphs"
    )


def _families(figures: Figures) -> str:
    found = figures["families"].values()
    identical = sum(all(each["identical"].values()) for each in found)
    speeds = [each["speedup"] for each in found if each.get("replayed") and "speedup" in each]
    speed = f"; median {times(statistics.median(speeds))}" if speeds else ""
    return f"tokens identical in {identical} of {len(found)} families{speed}"


def _zoo(figures: Figures) -> str:
    found = [each for group in figures["groups"].values() for each in group.values()]
    equal = sum(each.get("equal") is True for each in found)
    speeds = [each["speedup"]["1"] for each in found if each.get("replayed") and "speedup" in each]
    speed = f"; batch 1: median {times(statistics.median(speeds))}" if speeds else ""
    return f"outputs equal in {equal} of {len(found)} models{speed}"


def _fuzz(figures: Figures) -> str:
    return f"{len(figures['mismatches'])} mismatches in {figures['sequences']:,} sequences"


def _cycles(figures: Figures) -> str:
    over = [name for name, grown in figures["grown"].items() if grown > figures["allowed"][name]]
    readings = f"{len(over)} of {len(figures['grown'])} readings above the allowance"
    return f"{readings} after {figures['count']:,} captures"


def _against(figures: Figures) -> str:
    worst = max(each["ratio"] for each in figures["calls"].values())
    return f"{worst:.3f} of the host time before, at most"


def _weak_refs(figures: Figures) -> str:
    return f"{figures['weak_reserved_bytes'] / figures['strong_reserved_bytes']:.2f} of the memory"


def _rates(key: str) -> Callable[[Figures], str]:
    return lambda figures: times(figures[key]["graphed"] / figures[key]["eager"])


def _two_models(figures: Figures) -> str:
    memory = figures["pool_bytes_shared"] / figures["pool_bytes_apart"]
    return f"{_rates('tokens_per_second')(figures)}; one pool takes {memory:.2f} of the memory of two"


def _workload(figures: Figures) -> str:
    ratios = {arm: latency_ratio(figures, "exact", "graphcache", arm) for arm in ("eager", "replay")}
    if ratios["eager"] is None or ratios["replay"] is None:
        return "not measured"
    return f"{times(1 / ratios['eager'])}; {ratios['replay']:.2f} of the latency of `replay()` alone"


def _memory(figures: Figures) -> str:
    pools = {row["sizes"]: row["pool_bytes"] for row in figures["weak"]}
    return f"{max(pools)} sizes take {pools[max(pools)] / pools[1]:.2f} of the memory of the largest"


# By the name of a record: the subject of the measurement, and its headline.
HEADLINES: dict[str, tuple[str, Callable[[Figures], str]]] = {
    "tests": ("the test suite", _tests),
    "memcheck": ("compute-sanitizer's memcheck", _memcheck),
    "generate": ("transformers' `generate`, Llama-3.2-1B in shape", _generate),
    "families": ("decoder families of transformers under `generate`", _families),
    "zoo": ("models of torch, transformers, torchvision and timm", _zoo),
    "fuzz": ("random lives of graphed modules beside eager twins", _fuzz),
    "cycles": ("memory that captures and drops leave behind", _cycles),
    "against": ("a replayed call of two commits", _against),
    "weak_refs": ("weak against strong references to outputs", _weak_refs),
    "char_decode": ("decoding a character model", _rates("tokens_per_second")),
    "plain_module": (
        "an MLP of torch.nn, sizes by default",
        lambda figures: times(figures["speed_against_eager"]),
    ),
    "continuous_batching": ("requests that come and go", _rates("tokens_per_second")),
    "embeddings": ("an embedding service", _rates("requests_per_second")),
    "two_models": ("speculative decoding by two models", _two_models),
    "bench-tiny": ("arms on a tiny MLP, batch 8", _workload),
    "bench-gpt2": ("arms on GPT-2 small in shape, batch 8", _workload),
    "bench-llama": ("arms on Llama-3.2-1B in shape, batch 1", _workload),
    "bench-char": ("arms on the character model, batch 32", _workload),
    "bench-params": ("arms on 300 parameters and 12 inputs, batch 8", _workload),
    "bench-memory": ("memory against the number of sizes", _memory),
}


def row(name: str, stem: str, device: str, figures: Figures) -> tuple[str, ...]:
    """Returns the row of a record.

    Args:
        name: of the record.
        stem: of its file name; the section of the record has it as its heading.
        device: that it was measured on.
        figures: of the record.
    """
    subject, headline = HEADLINES[name]
    file = f"[{stem}.json](../benchmarks/results/{stem}.json)"
    return (f"[{subject}](#{stem})", headline(figures), device.removeprefix("NVIDIA "), file)
