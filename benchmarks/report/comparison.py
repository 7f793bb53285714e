"""The sections of docs/results.md about the benchmark records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness.goals import described

TITLES = {
    "exact": "batch {batches}, its own size",
    "padded": "batch {batches}, padded to {size}; an arm that can't pad runs the very batch",
    "changing": "batches {batches} in turn, each its own size",
}


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Returns a Markdown table; the first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def mib(nbytes: int) -> str:
    """Returns a number of bytes in MiB."""
    return f"{nbytes / 2**20:,.2f} MiB"


def legend(figures: dict[str, Any]) -> str:
    """Returns a table of the arms."""
    return table([("arm", "what it is"), *figures.get("arms", {}).items()])


def _timed(name: str, arm: dict[str, Any], replay: dict[str, Any]) -> tuple[str, ...]:
    if "left_out" in arm or "error" in arm:
        why = arm.get("left_out") or str(arm["error"]).splitlines()[0][:80].replace("|", "/")
        return (f"{name}: {why}", *[""] * 7)
    if not arm["correct"]:
        return (f"{name}: **wrong**", *[""] * 7)
    about = name if arm["mode"] == "inference_mode" else f"{name} ({arm['mode']})"
    latency, host, outside = arm["latency_us"], arm["host_us"], arm.get("outside", {})
    floor = replay["latency_us"]["median"] if "latency_us" in replay else None
    return (
        about,
        f"{latency['median']:,.1f} ({latency['p99']:,.1f})",
        f"{latency['median'] / floor:.2f}" if floor else "",
        f"{host['median']:,.1f} ({host['p99']:,.1f})",
        f"{arm['calls_per_second']:,.0f}",
        *(
            f"{outside[key]:g}" if key in outside else ""
            for key in ("launches", "synchronises", "allocations")
        ),
    )


def _scenario(name: str, scenario: dict[str, Any]) -> str:
    batches = ", ".join(map(str, scenario["batches"]))
    title = TITLES[name].format(batches=batches, size=scenario["size"])
    times = ("latency, us (p99)", "against replay", "host, us (p99)", "calls per second")
    header = ("arm", *times, "launches", "synchronises", "allocations")
    arms = scenario["arms"]
    rows = [_timed(arm, found, arms.get("replay", {})) for arm, found in arms.items()]
    return f"**{name}**: {title}.\n\n" + table([header, *rows])


def goals(figures: dict[str, Any]) -> str:
    """Returns the goals beside the measured values."""
    rows = [("goal", "wanted", "measured", "met"), *map(described, figures["goals"])]
    return table(rows)


def check(figures: dict[str, Any]) -> None:
    """Raises for records that prove nothing about speed.

    Raises:
        ValueError: for emulated graphs, and for runs that only try the harness.
    """
    if figures["emulated"] or figures["quick"]:
        raise ValueError("a record of emulated graphs or of a quick run is not for the docs")


def workload(figures: dict[str, Any]) -> str:
    """One table for each scenario, and the goals."""
    check(figures)
    parts = [
        figures["about"],
        f"![Latency and host time]({plot_of(figures)})",
        *(_scenario(name, found) for name, found in figures["scenarios"].items()),
        goals(figures),
    ]
    return "\n\n".join(parts)


def memory(figures: dict[str, Any]) -> str:
    """Memory and capture time against the number of sizes."""
    check(figures)
    rows = [("sizes", "pool, weak", "pool, strong", "executables, weak", "strong", "first call, weak")]
    for weak, strong in zip(figures["weak"], figures["strong"], strict=True):
        rows.append(
            (
                str(weak["sizes"]),
                mib(weak["pool_bytes"]),
                mib(strong["pool_bytes"]),
                mib(weak["executable_bytes"]),
                mib(strong["executable_bytes"]),
                f"{weak['first_call_seconds']:.3f} s",
            )
        )
    capture = figures["capture"]
    times = [("median of the captures of all sizes", "")]
    times += [
        (text, f"{capture[key]['median']:.3f} s")
        for key, text in (
            ("bare_seconds", "a bare loop of `capture_begin` and `capture_end`"),
            ("capture_seconds", "`graphcache`, capture"),
            ("first_call_seconds", "`graphcache`, the whole first call"),
        )
    ]
    plot = f"![Memory and first call]({plot_of(figures)})"
    return "\n\n".join([figures["about"], plot, table(rows), table(times), goals(figures)])


def plot_of(figures: dict[str, Any]) -> str:
    """Returns the path of a plot, relative to the page; the plot is named like its record."""
    return f"plots/{figures.get('plot', 'bench-' + figures['workload'])}.svg"


# The memory record says nothing of arms, so it is not the first.
SECTIONS = {
    "bench-tiny": workload,
    "bench-gpt2": workload,
    "bench-llama": workload,
    "bench-char": workload,
    "bench-params": workload,
    "bench-memory": memory,
}
