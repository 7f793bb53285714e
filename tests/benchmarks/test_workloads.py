"""Benchmarks on the CPU: arms, goals and tables."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import graphcache
from benchmarks.harness import program
from benchmarks.harness.arms import ARMS, Graphcache
from benchmarks.harness.goals import goals_of
from benchmarks.programs import worker
from benchmarks.report import comparison, index, tables
from benchmarks.workloads import memory, weak_refs
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
    assert set(tables.SECTIONS) == set(index.HEADLINES)
    assert set(comparison.SECTIONS) == {f"bench-{name}" for name in worker.NAMES}
    for name in worker.NAMES:
        assert goals_of(name, {})
    assert set(WORKLOADS) < set(worker.NAMES)


def run_workload(name: str, folder: Path, *options: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    main = importlib.import_module(f"benchmarks.workloads.{name}").main
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more gain nothing on tensors this small
    try:
        status = main(["--device", "cpu", "--json", str(path), *options])
    finally:
        torch.set_num_threads(threads)
    return {**json.loads(path.read_text()), "status": status}


def test_weak_refs_share_memory(tmp_path: Path) -> None:
    figures = run_workload("weak_refs", tmp_path)
    assert figures["status"] == 0
    assert figures["strong_reserved_bytes"] == 10 * figures["unit_bytes"]
    assert figures["weak_reserved_bytes"] == 4 * figures["unit_bytes"]
    assert figures["weak_values_after"]["4"] == [6, 2, 2, 2]
    assert figures["strong_values_after"]["4"] == [2, 2, 2, 2]
    assert "4.00 MiB" in tables.SECTIONS["weak_refs"](figures)


@pytest.mark.parametrize("free", [2 * 2**30, 7 * 2**30, 79 * 2**30])
def test_weak_refs_unit_fits_any_gpu(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    unit = weak_refs.unit_bytes(torch.device("cuda"))
    assert unit % 2**21 == 0
    assert 14 * unit < free
    assert unit == 2**30 or 16 * (unit + 2**21) > free


def test_char_decode_workload_is_identical_to_eager(tmp_path: Path) -> None:
    figures = run_workload("char_decode", tmp_path, "--steps", "2", "--prompts", "4")
    assert figures["status"] == 0
    assert figures["identical"] == figures["tokens"] > 200
    assert figures["sizes"] == [1, 2, 4]
    assert figures["padded_rows"] > 0
    assert figures["at_rest_bytes_weak"] < figures["at_rest_bytes_strong"]


def test_two_models_workload_shares_one_pool(tmp_path: Path) -> None:
    figures = run_workload("two_models", tmp_path, "--tokens", "8")
    assert figures["status"] == 0
    assert figures["identical"] == figures["tokens"] == 8 * 8
    assert 0 < figures["pool_bytes_shared"] < figures["pool_bytes_apart"]
    assert [figures[name] for name in ("expired", "cloned", "moved")] == [True, True, True]


@pytest.mark.parametrize(
    ("name", "option"),
    [("plain_module", "--calls"), ("continuous_batching", "--requests"), ("embeddings", "--requests")],
)
def test_workload_matches_eager_or_fails(tmp_path: Path, name: str, option: str) -> None:
    figures = run_workload(name, tmp_path, option, "12")
    assert figures["status"] == 0
    assert figures["replays"]
    with graphcache.disabled():
        assert run_workload(name, tmp_path, option, "4")["status"] == 1


def test_workload_rates_are_of_arms_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    rates = program.rates(lambda: order.append("e"), lambda: order.append("g"), 100, 2)
    assert order == ["e", "g", "g", "e"]
    assert set(rates) == {"eager", "graphed"}
