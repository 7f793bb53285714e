"""Runs one workload in this process and writes its record; `python -m benchmarks` starts it."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import profiling
from benchmarks.harness.arms import ARMS, Arm, Setup
from benchmarks.harness.goals import OURS, goals_of
from benchmarks.harness.record import environment
from benchmarks.harness.timing import BLOCK, Timed, figures_of, host_and_latency, take_turns, throughput
from benchmarks.harness.workload import Inputs, Scenario, Workload
from benchmarks.workloads import memory
from benchmarks.workloads.catalog import WORKLOADS
from graphcache import emulate

NAMES = (*WORKLOADS, "memory")
INPUTS = 4  # sets of inputs of each batch that the timed calls go round
CHECKS = 3  # calls one after another that are compared with eager
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,  # for an arm that does not work in the other
}
METHOD = {
    "host_us": "until the call returns; the GPU is synchronised before each call",
    "latency_us": "until a synchronise after the call returns",
    "calls_per_second": "calls that nothing waits for, up to a synchronise at their end",
    "order": f"arms take turns of {BLOCK} calls, and turns at going first; collector off",
    "correct": "against eager on fresh inputs, in the same run, from the same state",
}


class _Run:
    """One workload: its arms and figures."""

    def __init__(self, workload: Workload, device: torch.device, quick: bool) -> None:
        self.workload = workload
        self.device = device
        self.quick = quick
        with torch.no_grad():
            self.base = workload.build(device, quick).eval().requires_grad_(False)
            self.clean = [tensor.clone() for tensor in workload.state(self.base)]
        self.setup = Setup(workload, device, self.duplicate, self.inputs)
        self.arms: dict[str, tuple[Arm, str]] = {}
        self.failed: dict[str, str] = {}
        self.to_profile: list[tuple[Timed, dict[str, Any]]] = []
        self.synchronize: Callable[[], Any] = (
            torch.cuda.synchronize if device.type == "cuda" else lambda: None
        )

    def duplicate(self) -> nn.Module:
        """Makes an arm's own module; outside inference mode, as a user's would be."""
        with torch.inference_mode(False), torch.no_grad():
            return self.workload.duplicate(self.base).requires_grad_(False)

    def inputs(self, batch: int) -> Inputs:
        """Makes fresh inputs, as tensors that exist outside inference mode."""
        with torch.inference_mode(False), torch.no_grad():
            return self.workload.inputs(self.base, batch, self.device)

    def reset(self, model: nn.Module) -> None:
        """Puts the state of a module back, in place."""
        for tensor, clean in zip(self.workload.state(model), self.clean, strict=True):
            tensor.copy_(clean)

    def ready(self, name: str, scenario: Scenario) -> tuple[Arm, str]:
        """Returns an arm, made and warmed, and its mode."""
        if name in self.arms:
            arm, mode = self.arms[name]
            with MODES[mode]():
                arm.prepare(scenario)
            return arm, mode
        errors = []
        for mode, context in MODES.items():
            try:
                with context():
                    arm = ARMS[name](self.setup)
                    if arm.served(scenario) is None:
                        arm.prepare(scenario)
            except ImportError as error:
                raise NotInstalled(f"not installed ({error})") from error
            except Exception as error:
                errors.append(f"{mode}: {type(error).__name__}: {error}")
                continue
            self.arms[name] = arm, mode
            return arm, mode
        raise RuntimeError("; ".join(errors))

    def check(self, arm: Arm, mode: str, scenario: Scenario, tests: list[Inputs]) -> dict[str, Any]:
        """Compares an arm with eager on a run of calls."""
        error, scale = 0.0, 0.0
        with MODES[mode]():
            self.reset(arm.model)
            got = [arm.result(scenario, args) for args in tests]
        for ours, expected in zip(got, self.expected(tests), strict=True):
            if ours.shape != expected.shape or ours.dtype != expected.dtype:
                return {"correct": False, "why": f"{ours.dtype}{list(ours.shape)}"}
            difference = (ours.double() - expected.double()).abs().max().item()
            error = max(error, float("inf") if math.isnan(difference) else difference)
            scale = max(scale, expected.double().abs().max().item())
        tolerance = self.workload.tolerance * scale
        return {
            "correct": error <= tolerance,
            "max_abs_error": min(error, sys.float_info.max),
            "tolerance": tolerance,
        }

    def expected(self, tests: list[Inputs]) -> list[Tensor]:
        """Returns the outputs of the untouched module."""
        with torch.inference_mode():
            self.reset(self.base)
            return [self.base(*args).clone() for args in tests]

    def scenario(self, scenario: Scenario) -> dict[str, Any]:
        """Checks and times all arms in one scenario."""
        each = [self.inputs(batch) for _ in range(INPUTS) for batch in scenario.batches]
        tests = [self.inputs(batch) for _ in range(CHECKS) for batch in scenario.batches]
        found: dict[str, dict[str, Any]] = {}
        timed: dict[str, Timed] = {}
        for name, kind in ARMS.items():
            if self.device.type != "cuda" and not kind.on_cpu:
                found[name] = {"error": "needs a GPU"}
                continue
            if name in self.failed:
                found[name] = {"error": self.failed[name]}
                continue
            begin, compiled = time.perf_counter(), compilations()
            try:
                arm, mode = self.ready(name, scenario)
                left_out = arm.served(scenario)
                if left_out is not None:
                    found[name] = {"left_out": left_out}
                    continue
                found[name] = {"mode": mode, **self.check(arm, mode, scenario, tests)}
                with MODES[mode]():
                    calls = arm.calls(scenario, each)
            except Exception as error:
                text = (
                    str(error) if isinstance(error, NotInstalled) else f"{type(error).__name__}: {error}"
                )
                found[name] = {"error": text[:2000]}
                if name not in self.arms:
                    self.failed[name] = found[name]["error"]
                print(f"  {scenario.name} {name}: {found[name]['error'][:300]}", flush=True)
                continue
            found[name]["prepare_seconds"] = time.perf_counter() - begin
            found[name]["compiled_graphs"] = compilations() - compiled
            reset = partial(self.reset, arm.model)
            timed[name] = Timed(name, calls, MODES[mode], reset, arm.before)
        self.time(timed, found)
        return {"batches": list(scenario.batches), "size": scenario.size, "arms": found}

    def time(self, timed: dict[str, Timed], found: dict[str, dict[str, Any]]) -> None:
        """Times the arms and adds their figures to `found`."""
        before = {name: self.arms[name][0].facts() for name in timed}
        rounds = 2 if self.quick else self.workload.rounds
        blocks, calls = (2, 8) if self.quick else self.workload.pipelined
        arms, sync = list(timed.values()), self.synchronize
        take_turns(arms, rounds, lambda arm: host_and_latency(arm, sync), sync)
        take_turns(arms, blocks, lambda arm: throughput(arm, sync, calls), sync)
        for name, arm in timed.items():
            facts = self.arms[name][0].facts()
            if "replayed" in facts:  # how the timed calls were served, and not those of before
                facts["replayed"] -= before[name]["replayed"]
                earlier = before[name]["eager"]
                facts["eager"] = {
                    why: n - earlier.get(why, 0)
                    for why, n in facts["eager"].items()
                    if n != earlier.get(why)
                }
            found[name] |= facts | figures_of(arm)
        if self.device.type == "cuda":
            graphed = [
                name for name, arm in timed.items() if arm.error is None and self.arms[name][0].graphed
            ]
            self.to_profile += [(timed[name], found[name]) for name in graphed]

    def profile(self, arm: Timed) -> dict[str, Any]:
        """Counts the CUDA calls of an arm outside its graph."""
        try:
            return {"allocations": profiling.allocations(arm), **profiling.outside(arm)}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:2000]}

    def all(self, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Runs every scenario; `save` is handed what there is after each."""
        figures: dict[str, Any] = {
            "about": self.workload.about,
            "method": METHOD,
            "arms": {name: arm.about for name, arm in ARMS.items()},
            "scenarios": {},
        }
        for scenario in self.workload.scenarios:
            begin = time.perf_counter()
            figures["scenarios"][scenario.name] = self.scenario(scenario)
            seconds = time.perf_counter() - begin
            print(f"  {self.workload.name} {scenario.name}: {seconds:.0f} s", flush=True)
            figures["status"] = status_of(figures)
            save(figures)
        # After all timings: a profiler that was attached once may slow down every launch after it.
        begin = time.perf_counter()
        for arm, found in self.to_profile:
            found["outside"] = self.profile(arm)
        print(f"  {self.workload.name} profiles: {time.perf_counter() - begin:.0f} s", flush=True)
        return figures


class NotInstalled(Exception):
    """An arm's library is missing."""


def compilations() -> int:
    """Returns how many graphs torch.compile has made: a new one in a scenario is a recompilation."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def status_of(figures: dict[str, Any]) -> int:
    """Returns 1 where an arm of `graphcache` was wrong, failed, or was not served by graphs."""
    for scenario in figures["scenarios"].values():
        for name in OURS:
            arm = scenario["arms"][name]
            # Now and then one is compared with eager, and each size is timed once: that is how it ships.
            usual = {"compared with a padded replay", "timed beside its graph"}
            eager = arm.get("eager", {}).keys() - usual
            if "left_out" not in arm and ("error" in arm or not arm["correct"] or eager):
                return 1
    return 0


def where(device: torch.device) -> dict[str, str]:
    """Returns the environment of a record; that of a CPU is marked as emulated."""
    if device.type == "cuda":
        found = environment()
    else:
        found = {"device": "cpu", "driver": "none", "torch": torch.__version__}
        found |= {"python": platform.python_version(), "date": "", "commit": ""}
    for package in ("transformers", "tensordict", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    cpus = Path("/proc/cpuinfo")
    names = (
        [line for line in cpus.read_text().splitlines() if "model name" in line] if cpus.exists() else []
    )
    found["cpu"] = names[0].split(":")[1].strip() if names else platform.processor()
    if device.type == "cuda":
        query = "--query-gpu=clocks.sm,clocks.mem,power.limit"
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        found["clocks and power limit"] = (asked.stdout.splitlines() or ["unknown"])[0]
    return found


def record(name: str, path: Path, device: torch.device, quick: bool) -> int:
    """Runs one workload and writes its record, also after each part of it."""
    begin = time.perf_counter()
    emulated = device.type != "cuda"
    head = {"workload": name, "emulated": emulated, "quick": quick}
    place = where(device)

    def save(figures: dict[str, Any], complete: bool = False) -> None:
        whole = {**head, "complete": complete, "seconds": time.perf_counter() - begin, **figures}
        whole.setdefault("status", 1)
        whole["goals"] = goals_of(name, whole)
        written = {"name": f"bench-{name}", "environment": place, "figures": whole}
        path.write_text(json.dumps(written, indent=1) + "\n")

    figures: dict[str, Any]
    with ExitStack() as stack:
        if emulated:
            stack.enter_context(emulate())
        try:
            if name == "memory":
                figures = memory.run(device, quick, save)
            else:
                figures = _Run(WORKLOADS[name], device, quick).all(save)
        except Exception as error:
            figures = {"status": 1, "error": f"{type(error).__name__}: {error}"[:4000]}
            if path.exists():
                figures = json.loads(path.read_text())["figures"] | figures
            print(f"  {name}: {figures['error']}", flush=True)
    save(figures, complete="error" not in figures)
    return int(figures["status"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one workload; 1 if an arm of `graphcache` was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("workload", choices=NAMES)
    parser.add_argument("path", type=Path, help="the record to write")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="few calls of small modules")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    random.seed(0)
    warnings.filterwarnings("ignore", "`torch.jit")  # Dynamo's own use of it
    # Every arm compiles the same forward; their variants count against one limit.
    torch._dynamo.config.recompile_limit = 64
    # What an earlier run learned of dynamic shapes would have the first compilation differ.
    torch._dynamo.config.automatic_dynamic_local_pgo = False
    return record(args.workload, args.path, torch.device(args.device), args.quick)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # what compiles in the background is not waited for
