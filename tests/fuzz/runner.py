"""A differential fuzzer: graphed modules against their undecorated twins, through random lives.

Each sequence builds one or two modules, and a twin of each that graphcache never sees. Everything that
happens to one happens to the other: calls of all kinds, replaced parameters, modes, hooks, copies,
threads. After each call the results, the state and all results that are still held must be equal; or
else graphcache must have said why not, by an error of its own.

    python -m tests.fuzz --sequences 10000 --jobs 2 --seed 0 --device emulated --out fuzz.json
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import subprocess
import sys
import time
import traceback
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as hypothesis_seed
from hypothesis.stateful import run_state_machine_as_test

from benchmarks.harness import record
from tests.fuzz.edges import KINDS
from tests.fuzz.machine import Fuzz, Stats

STEPS = 10  # of a sequence at most, and of each several calls


def run(
    sequences: int, seed: int, device: torch.device, *, kind: str | None = None, shrink: bool = True
) -> None:
    """Runs sequences of one seed in this process; raises what they find, as the least example of it."""
    machine = type("Fuzz", (Fuzz,), {"device": device, "kind": kind})
    options = settings(
        max_examples=sequences,
        stateful_step_count=STEPS,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(hypothesis_seed(seed)(machine), settings=options)


def main() -> int:
    """Spreads sequences over processes, each with a seed of its own; 1 if one found something."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("emulated", "cuda"), default="emulated")
    parser.add_argument("--out", type=Path, help="a JSON file for what was run and found")
    parser.add_argument("--chunk", type=int, default=500, help="sequences of one process")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(asked)
        return 0
    start = time.perf_counter()
    sizes = [min(asked.chunk, asked.sequences - done) for done in range(0, asked.sequences, asked.chunk)]
    # Far apart, so that two runs with neighbouring seeds do not repeat each other.
    # Each kind of module has a seed of its own.
    chunks = [(asked.seed * 1_000_000 + number * len(KINDS), size) for number, size in enumerate(sizes)]
    total, mismatches, seeds = Stats(), [], []
    with ThreadPool(asked.jobs) as pool:
        for done, (seed, stats, mismatch) in enumerate(
            pool.imap_unordered(lambda chunk: _in_process(asked.device, *chunk), chunks), 1
        ):
            total = total + stats
            seeds.append(seed)
            seconds = time.perf_counter() - start
            print(
                f"{done}/{len(chunks)} processes, {total.sequences} sequences, {total.calls} calls, "
                f"{total.replays} replays, {seconds:.0f} s",
                flush=True,
            )
            if mismatch:
                mismatches.append({"seed": seed, "what": mismatch})
                print(f"seed {seed}:\n{mismatch}", flush=True)
            figures = {
                "status": int(bool(mismatches)),
                "seconds": round(seconds, 1),
                "seeds": seeds,
                "chunk": asked.chunk,
                **vars(total),
                "mismatches": mismatches,
            }
            if asked.out:  # each time: a run that is cut off leaves what it has done
                record.write(asked.out, "fuzz", figures, emulated=asked.device != "cuda")
    print(f"{total.sequences} sequences, {len(mismatches)} mismatches")
    return 1 if mismatches else 0


def _in_process(device: str, seed: int, sequences: int) -> tuple[int, Stats, str]:
    """Runs one chunk; a process that crashes or hangs is a finding, told by the steps that led there."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [
            *(sys.executable, "-m", "tests.fuzz", "--worker", "--device", device, "--out", str(out)),
            *("--sequences", str(sequences), "--seed", str(seed)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            record = json.loads(out.read_text())
            return seed, Stats.of(record["stats"]), record["mismatch"]
        steps = out.with_suffix(".steps")
        last = steps.read_text() if steps.exists() else ""
        return seed, Stats(), f"exit status {done.returncode}\n{done.stderr[-4000:]}\n{last}"


def work(asked: argparse.Namespace) -> None:
    """Runs the sequences of one chunk, shared out evenly among the kinds; writes what came of them."""
    faulthandler.enable()
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if asked.device == "cuda" else torch.device("cpu")
    mismatch = ""
    with asked.out.with_suffix(".steps").open("w") as Fuzz.trace:
        try:
            for number, kind in enumerate(KINDS):
                run(-(-asked.sequences // len(KINDS)), asked.seed + number, device, kind=kind)
        except Exception as error:
            mismatch = "".join(traceback.format_exception(error))[-8000:]
    asked.out.write_text(json.dumps({"stats": vars(Fuzz.stats), "mismatch": mismatch}))
