"""Draw the plots of docs/results.md from the records in benchmarks/results; needs matplotlib.

python -m benchmarks.report.plots
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.harness.record import RESULTS, ROOT
from benchmarks.report import comparison

PAGE_FOLDER = ROOT / "docs"
OURS, OTHERS = "#c0392b", "#7f8c8d"


def bars(figures: dict[str, Any], pyplot: Any) -> Any:
    """Draws latency and host time of each arm, a column of plots for each scenario."""
    scenarios = figures["scenarios"]
    figure, axes = pyplot.subplots(
        2, len(scenarios), figsize=(4.2 * len(scenarios) + 1.5, 6.5), squeeze=False, layout="constrained"
    )
    for column, (scenario, found) in enumerate(scenarios.items()):
        arms = {
            name: arm for name, arm in found["arms"].items() if arm.get("correct") and "host_us" in arm
        }
        names = list(arms)[::-1]
        colours = [OURS if name.startswith("graphcache") else OTHERS for name in names]
        for row, (key, title) in enumerate((("latency_us", "latency"), ("host_us", "host time"))):
            axis = axes[row][column]
            values = [arms[name][key]["median"] for name in names]
            drawn = axis.barh(names, values, color=colours)
            axis.bar_label(drawn, [f"{value:,.1f}" for value in values], padding=2, fontsize=8)
            axis.set_xscale("log")
            axis.tick_params(axis="x", which="both", bottom=False, labelbottom=False)  # bars say it
            axis.set_xlim(min(values) * 0.7, max(values) * 2.5)
            axis.set_title(f"{scenario}: {title}, us, median (log)")
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(figures["about"])
    return figure


def lines(figures: dict[str, Any], pyplot: Any) -> Any:
    """Draws memory, and the time of the first call, against the number of sizes."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind, colour in (("weak", OURS), ("strong", OTHERS)):
        rows = figures[kind]
        sizes = [row["sizes"] for row in rows]
        pool = [row["pool_bytes"] / 2**20 for row in rows]
        executables = [row["executable_bytes"] / 2**20 for row in rows]
        left.plot(sizes, pool, "o-", color=colour, label=f"pool, {kind} outputs")
        left.plot(sizes, executables, "x--", color=colour, label=f"executables, {kind} outputs")
        seconds = [row["first_call_seconds"] for row in rows]
        right.plot(sizes, seconds, "o-", color=colour, label=f"{kind} outputs")
    left.set_ylabel("MiB")
    right.set_ylabel("seconds of the first call")
    for axis in (left, right):
        axis.set_xlabel("sizes")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> int:
    """Draws the plot of each record."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "graphcache"  # the same file from the same record
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: a third of the size
    from matplotlib import pyplot

    (PAGE_FOLDER / "plots").mkdir(exist_ok=True)
    for path in sorted(RESULTS.glob("bench-*.json")):
        figures = json.loads(path.read_text())["figures"]
        comparison.check(figures)
        figures["plot"] = path.stem
        draw = lines if figures["workload"] == "memory" else bars
        figure = draw(figures, pyplot)
        figure.savefig(PAGE_FOLDER / comparison.plot_of(figures), metadata={"Date": None})
        pyplot.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
