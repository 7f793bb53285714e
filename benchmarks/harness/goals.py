"""The goals of the project, against what was measured: ratios within one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Figures = dict[str, Any]
Goal = dict[str, Any]

OURS = ("graphcache", "graphcache+compile")
PEERS = ("tensordict", "make_graphed_callables", "reduce-overhead")
LEAST_NS = 0.001  # microseconds: keeps a ratio finite where nothing is added


def _arm(figures: Figures, scenario: str, arm: str) -> Figures | None:
    """Returns an arm that was timed and is right; None otherwise."""
    found = figures.get("scenarios", {}).get(scenario, {}).get("arms", {}).get(arm)
    return found if found and found.get("correct") and "host_us" in found else None


def latency_ratio(figures: Figures, scenario: str, arm: str, against: str) -> float | None:
    """Returns the ratio of the median latencies of two arms."""
    ours, theirs = _arm(figures, scenario, arm), _arm(figures, scenario, against)
    if ours is None or theirs is None:
        return None
    return float(ours["latency_us"]["median"] / theirs["latency_us"]["median"])


def added(figures: Figures, scenario: str, arm: str) -> float | None:
    """Returns the median host time of an arm over that of a bare replay, in microseconds."""
    ours, bare = _arm(figures, scenario, arm), _arm(figures, scenario, "replay")
    if ours is None or bare is None:
        return None
    return float(ours["host_us"]["median"] - bare["host_us"]["median"])


def worst_added(figures: Figures) -> float | None:
    """Returns the host time that `graphcache` adds, at exact or padded size, whichever is more."""
    values = [added(figures, scenario, "graphcache") for scenario in ("exact", "padded")]
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def times_less(figures: Figures, peer: str) -> float | None:
    """Returns how many times more host time a peer adds, at exact size."""
    ours, theirs = added(figures, "exact", "graphcache"), added(figures, "exact", peer)
    return None if ours is None or theirs is None else theirs / max(ours, LEAST_NS)


def outside(figures: Figures, key: str) -> float | None:
    """Returns a count of the profile, of the worst scenario of `graphcache`."""
    found = [
        arm["outside"].get(key)
        for scenario in figures.get("scenarios", {}).values()
        for name, arm in scenario["arms"].items()
        if name == "graphcache" and arm.get("correct") and "outside" in arm
    ]
    return None if not found or None in found else max(found)


def _goal(name: str, value: float | None, sign: str, limit: float, unit: str = "") -> Goal:
    met = None
    if value is not None:
        met = value >= limit if sign == ">=" else value <= limit
    return {"goal": name, "value": value, "sign": sign, "limit": limit, "unit": unit, "met": met}


def _peers(figures: Figures) -> Iterator[Goal]:
    for peer in PEERS:
        yield _goal(
            f"host time added at exact size, {peer}'s against ours", times_less(figures, peer), ">=", 5
        )


def _profile(figures: Figures) -> Iterator[Goal]:
    yield _goal("launches and copies outside the graph, per call", outside(figures, "launches"), "<=", 0)
    yield _goal("synchronisations per call", outside(figures, "synchronises"), "<=", 0)
    yield _goal("allocations per call", outside(figures, "allocations"), "<=", 0)


def _tiny(figures: Figures) -> Iterator[Goal]:
    ratio = latency_ratio(figures, "padded", "graphcache", "replay")
    yield _goal("latency, 5 rows padded to 8, against replay() alone", ratio, "<=", 1.12)
    yield _goal("host time over replay(), exact or padded", worst_added(figures), "<=", 3, "us")
    yield from _peers(figures)
    yield from _profile(figures)


def _gpt2(figures: Figures) -> Iterator[Goal]:
    ratio = latency_ratio(figures, "exact", "graphcache", "replay")
    yield _goal("latency at batch 8 against replay() alone", ratio, "<=", 1.02)
    yield from _peers(figures)
    yield from _profile(figures)


def _params(figures: Figures) -> Iterator[Goal]:
    yield _goal("host time over replay(), exact or padded", worst_added(figures), "<=", 6, "us")
    yield from _profile(figures)


def _llama(figures: Figures) -> Iterator[Goal]:
    ratio = latency_ratio(figures, "exact", "graphcache+compile", "reduce-overhead")
    yield _goal("latency over a compiled forward, against reduce-overhead", ratio, "<=", 0.8)
    yield from _profile(figures)


def _memory(figures: Figures) -> Iterator[Goal]:
    pools = {row["sizes"]: row["pool_bytes"] for row in figures.get("weak", ())}
    ratio = pools[max(pools)] / pools[1] if 1 in pools and len(pools) > 1 else None
    yield _goal(f"pool of {max(pools, default=35)} sizes against the largest alone", ratio, "<=", 1.05)
    capture = figures.get("capture") or {}
    bare, ours = capture.get("bare_seconds"), capture.get("capture_seconds")
    ratio = ours["median"] / bare["median"] if bare and ours else None
    sizes = capture.get("sizes", 35)
    yield _goal(f"time to capture {sizes} sizes against a bare loop", ratio, "<=", 1.2)


GOALS: dict[str, Callable[[Figures], Iterator[Goal]]] = {
    "tiny": _tiny,
    "gpt2": _gpt2,
    "llama": _llama,
    "char": _profile,
    "params": _params,
    "memory": _memory,
}


def goals_of(workload: str, figures: Figures) -> list[Goal]:
    """Returns the goals of a workload; an arm that is wrong, or missing, leaves `met` at None."""
    return list(GOALS[workload](figures))


def described(goal: Goal) -> tuple[str, str, str, str]:
    """Returns a goal as a row of a table."""
    unit = f" {goal['unit']}" if goal["unit"] else ""
    value = "not measured" if goal["value"] is None else f"{goal['value']:.2f}{unit}"
    words = {">=": "at least", "<=": "at most"}[goal["sign"]]
    met = {True: "yes", False: "no", None: "-"}[goal["met"]]
    return goal["goal"], f"{words} {goal['limit']:g}{unit}", value, met
