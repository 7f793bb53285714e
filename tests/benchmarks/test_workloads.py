"""Benchmarks on the CPU: arms, goals and tables."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.arms import ARMS, Graphcache
from benchmarks.harness.goals import goals_of
from benchmarks.programs import worker
from benchmarks.report import comparison, tables
from benchmarks.workloads import memory
from benchmarks.workloads.catalog import WORKLOADS


def record_tiny(folder: Path) -> dict[str, Any]:
    path = folder / "bench-tiny-emulated.json"
    worker.record("tiny", path, torch.device("cpu"), quick=True)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ARMS, "graphcache+compile")  # compiling takes longer than all of this
    monkeypatch.setattr(worker, "OURS", ("graphcache",))


def made_up(**latencies: float) -> dict[str, Any]:
    """Figures of an exact and a padded scenario in which the host time is a tenth of the latency."""
    arms = {
        name.replace("_or_", "-"): {
            "correct": True,
            "latency_us": {"median": value},
            "host_us": {"median": value / 10},
            "outside": {"launches": 0.0, "synchronises": 0.0, "allocations": 0.0},
        }
        for name, value in latencies.items()
    }
    return {"scenarios": {"exact": {"arms": arms}, "padded": {"arms": arms}}}


@pytest.mark.usefixtures("quick")
def test_tiny_workload_runs_emulated_and_says_so(tmp_path: Path) -> None:
    figures = record_tiny(tmp_path)["figures"]
    assert figures["emulated"]
    assert figures["complete"]
    assert figures["status"] == 0
    for scenario in figures["scenarios"].values():
        arms = scenario["arms"]
        assert arms["graphcache"]["correct"]
        assert arms["graphcache"]["replayed"] > 0
        assert not arms["graphcache"]["eager"].keys() - {"compared with a padded replay"}
        assert arms["eager"]["latency_us"]["median"] > 0
        assert arms["replay"] == {"error": "needs a GPU"}
    assert all(goal["met"] is None for goal in figures["goals"])


@pytest.mark.usefixtures("quick")
def test_a_wrong_arm_is_marked_and_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(Graphcache):
        def result(self, *args: Any) -> torch.Tensor:
            return super().result(*args) + 1

    monkeypatch.setitem(ARMS, "graphcache", Wrong)
    figures = record_tiny(tmp_path)["figures"]
    assert figures["status"] == 1
    arm = figures["scenarios"]["exact"]["arms"]["graphcache"]
    assert not arm["correct"]
    assert arm["max_abs_error"] > 0.5
    figures["arms"] = {name: kind.about for name, kind in ARMS.items()}
    figures |= {"emulated": False, "quick": False}
    assert "**wrong**" in comparison.workload(figures)


@pytest.mark.usefixtures("quick")
def test_an_arm_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(ARMS["eager"]):  # type: ignore[misc]
        on_cpu = True

        def prepare(self, *args: Any) -> None:
            raise RuntimeError("no luck")

    monkeypatch.setitem(ARMS, "replay", Failing)
    arms = record_tiny(tmp_path)["figures"]["scenarios"]["padded"]["arms"]
    assert "no luck" in arms["replay"]["error"]
    assert arms["graphcache"]["correct"]


def test_goals_are_ratios_within_one_run() -> None:
    figures = made_up(
        replay=100.0,
        graphcache=110.0,
        tensordict=160.0,
        make_graphed_callables=140.0,
        reduce_or_overhead=150.0,
    )
    goals = {goal["goal"]: goal for goal in goals_of("tiny", figures)}
    latency = goals["latency, 5 rows padded to 8, against replay() alone"]
    assert latency["value"] == pytest.approx(1.1)
    assert latency["met"]
    peers = {name: goal for name, goal in goals.items() if name.startswith("host time added")}
    assert [round(goal["value"], 6) for goal in peers.values()] == [6.0, 4.0, 5.0]
    assert [goal["met"] for goal in peers.values()] == [True, False, True]
    figures["scenarios"]["exact"]["arms"]["graphcache"]["correct"] = False
    assert all(goal["met"] is None for goal in goals_of("tiny", figures))


def test_tables_refuse_what_is_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"workload": "tiny", "emulated": True, "quick": False}
    record = {"name": "bench-tiny", "environment": {"device": "cpu"}, "figures": figures}
    (tmp_path / "bench-tiny-emulated.json").write_text(json.dumps(record))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="emulated"):
        tables.page()


def test_results_page_shows_plots_that_exist() -> None:
    for plot in re.findall(r"\]\((plots/[^)]*)\)", tables.PAGE.read_text()):
        assert (tables.PAGE.parent / plot).exists(), f"{plot}: run python -m benchmarks.report.plots"


def test_sizes_are_spread_over_the_ladder() -> None:
    assert len(memory.LADDER) == 35
    for count in memory.COUNTS:
        sizes = memory.spread(memory.LADDER, count)
        assert len(set(sizes)) == count
        assert max(sizes) == 256


def test_each_workload_has_a_section_and_goals() -> None:
    assert set(comparison.SECTIONS) == {f"bench-{name}" for name in worker.NAMES}
    for name in worker.NAMES:
        assert goals_of(name, {})
    assert set(WORKLOADS) < set(worker.NAMES)
