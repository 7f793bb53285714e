"""Write the tables of docs/results.md from the records in benchmarks/results.

python -m benchmarks.report.tables            # writes
python -m benchmarks.report.tables --check    # 1 if the page is not what the records say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.harness.record import RESULTS, ROOT
from benchmarks.report import comparison, example_tables, index
from benchmarks.report.comparison import table

PAGE = ROOT / "docs" / "results.md"

HEADER = """# Results

Made by `python -m benchmarks.report.tables` from the records in `benchmarks/results`; do not edit.
`python -m benchmarks.programs.record_all --out benchmarks/results` records tests and examples anew on a
GPU. Ratios are of arms that took turns in one run.
"""

COMPARISONS = """What follows is made by `python -m benchmarks --out benchmarks/results`, and its plots
by `python -m benchmarks.report.plots`. All arms of a table are timed in one process on one card. They
take turns of 32 calls, and turns at going first. The GPU is synchronised before each timed call:
*host* is
the time until the call returns, *latency* the time until a synchronise after it returns; both are
medians. *Calls per second* are of calls that nothing waits for. Every arm is compared with eager on
fresh inputs in the same run, and runs under `torch.inference_mode()` unless its row says otherwise.
*Launches* are the kernels, copies and fills that a call launches outside its graph, *synchronises* its
waits for the GPU, both counted in a profile after all timings, and *allocations* those of torch's
caching allocator, each per call.
"""


def tests(figures: dict[str, Any]) -> str:
    """One row for each runtime."""
    rows: list[tuple[str, ...]] = [("runtime", "passed", "failed", "skipped")]
    for runtime, counts in figures["counts"].items():
        name = "neither in particular" if runtime == "both" else runtime
        rows.append((name, *(str(counts.get(key, 0)) for key in ("passed", "failed", "skipped"))))
    return "The test suite, on one machine.\n\n" + table(rows)


def memcheck(figures: dict[str, Any]) -> str:
    """Counts of compute-sanitizer, for tests or examples."""
    counts = figures["counts"].values()
    passed, failed = (sum(count.get(key, 0) for count in counts) for key in ("passed", "failed"))
    rows = [
        (f"`python -m benchmarks.programs.memcheck {figures['part']}`", ""),
        ("passed, failed", f"{passed:,}, {failed:,}"),
        *(("", f"failed: `{name}`") for name in figures.get("failed", ())),
        ("errors of memory", f"{figures['errors']:,}"),
        ("errors of a script that reads freed memory", f"{figures['errors_of_a_faulty_script']:,}"),
    ]
    which = {
        "tests": "The CUDA tests, but for those that count launches by torch's profiler, whose place it "
        "takes, and those that start programs of their own,",
        "examples": "The examples of that commit, on CUDA,",
    }
    return f"{which[figures['part']]} under `compute-sanitizer --tool memcheck`.\n\n" + table(rows)


def against(figures: dict[str, Any]) -> str:
    """Host time of a replayed call of two commits."""
    rows: list[tuple[str, ...]] = [("call", "before", "now", "ratio")]
    for name, each in figures["calls"].items():
        host = (f"{each[arm]:.2f} us" for arm in ("other_us", "here_us"))
        rows.append((name, *host, f"{each['ratio']:.3f}"))
    for part, name in (("first_call", "BERT-base, 4 sizes"), ("cache", "a cache of 8 GiB, 16 sizes")):
        if part in figures:
            each = figures[part]["first"]
            seconds = (f"{each[arm]:.3f} s" for arm in ("other", "here"))
            rows.append((f"first call of {name}", *seconds, f"{each['ratio']:.3f}"))
    if "cache" in figures:
        each = figures["cache"]["more_bytes"]
        rows.append(
            (
                "memory beyond eager's meanwhile",
                *(f"{each[arm] / 2**20:.1f} MiB" for arm in ("other", "here")),
                "",
            )
        )
    text = (
        f"Host time of a replayed call: commit {figures['other'][:12]} and this one, processes in "
        "turns; the ratio is the median of the rounds."
    )
    return text + "\n\n" + table(rows)


def fuzz(figures: dict[str, Any]) -> str:
    """Counts of the differential fuzzer."""
    kinds: Counter[str] = Counter()
    for text, count in figures["our_errors"].items():
        kinds[text.split(":")[0]] += count
    ours = ", ".join(f"{name}: {count:,}" for name, count in sorted(kinds.items()))
    rows = [
        ("`python -m tests.fuzz`", ""),
        ("sequences", f"{figures['sequences']:,}"),
        ("kinds of modules", str(len(figures["kinds"])) if "kinds" in figures else "not in the log"),
        ("calls, of those replayed", f"{figures['calls']:,}, {figures['replays']:,}"),
        ("errors of ours", "not in the log" if figures.get("from_log") else ours or "none"),
        ("mismatches, aborts, hangs", str(len(figures["mismatches"]))),
        (
            "seeds",
            f"{min(figures['seeds'])} to {max(figures['seeds'])}, {figures['chunk']} sequences each",
        ),
    ]
    text = "Random lives of graphed modules beside twins that graphcache never saw."
    if figures.get("from_log"):
        text += " The figures are those of its log; its own record did not get off the machine."
    return text + "\n\n" + table(rows)


def cycles(figures: dict[str, Any]) -> str:
    """Memory and objects that captures and drops leave behind."""
    rows = [("`python -m tests.fuzz.cycles`", "grown by", "allowed")]
    for name, grown in figures["grown"].items():
        rows.append((name.replace("_", " "), f"{grown:,}", f"{figures['allowed'][name]:,.0f}"))
    return (
        f"{figures['count']:,} modules captured, called and dropped again; bytes, numbers of lanes and "
        "of Python objects. What is allowed of host memory is what torch itself leaves of each private "
        "pool that was ever opened, measured in the same run.\n\n" + table(rows)
    )


def families(figures: dict[str, Any]) -> str:
    """One row for each decoder family of transformers under `generate`."""
    rows = [("family", "tokens identical", "replayed", "captures", "faster", "or why not")]
    for name, found in figures["families"].items():
        identical = found["identical"].values()
        rows.append(
            (
                name,
                f"{sum(identical)} of {len(identical)} ways",
                _replayed(found),
                f"{found.get('captures', 0)}, {found.get('captures_again', 0)} more",
                f"{found['speedup']:.1f} times" if "speedup" in found else "not measured",
                why_not(found),
            )
        )
    cache = f"with a {named} cache" if (named := figures.get("cache", "static")) else "as it is"
    return (
        f"transformers' `generate` {cache}, from small configurations with random weights, "
        "in four ways: greedily, after a prompt of another length, by sampling with a seed, and padded "
        "on the left; all of that twice, each time with another cache. The first call of each decode "
        "fills its cache and is eager. "
        f"transformers {figures['transformers']}.\n\n" + table(rows)
    )


def _replayed(found: dict[str, Any]) -> str:
    """Returns the share of replayed calls; where it is known, that of the second decodes' steps."""
    if "steps" in found:
        return f"{found['steps_replayed_again']} of {found['steps']} steps"
    return f"{found.get('replayed', 0)} of {found.get('calls', 0)} calls"


def why_not(found: dict[str, Any]) -> str:
    """Returns the reason why a model did not run or was not replayed; an empty text if it was."""
    reasons = {} if found.get("replayed") else found.get("eager", {})
    # First calls say nothing of the model, unless there were no others.
    told = {why: count for why, count in reasons.items() if not why.startswith("the first call of")}
    most = max((told or reasons).items(), key=lambda item: item[1], default=("", 0))[0]
    return str(found.get("error", most))


def zoo(figures: dict[str, Any]) -> str:
    """One table for each library, with a row for each model."""
    parts = [
        "Modules with random weights, graphed by `cuda_graphed(module)` and nothing more, called with "
        "batches of 1 to 8 in mixed order, in float32 without TF32. Outputs are compared with those of "
        "a copy that was not graphed; times are of calls that are waited for."
    ]
    for library, group in figures["groups"].items():
        rows = [("model", "equal", "replayed", "captures", "faster, batch 1", "batch 8", "or why not")]
        for name, found in group.items():
            times = (found.get("speedup", {}).get(batch) for batch in ("1", "8"))
            rows.append(
                (
                    name,
                    {True: "yes", False: "**no**", None: "did not run"}[found.get("equal")],
                    f"{found.get('replayed', 0)} of {found.get('calls', 0)} calls",
                    str(found.get("captures", 0)),
                    *(f"{time:.1f} times" if time else "not measured" for time in times),
                    " ".join((why_not(found) or _notes(found)).replace("|", "/").split()),
                )
            )
        parts.append(f"**{library} {figures['versions'][library]}**\n\n" + table(rows))
    return "\n\n".join(parts)


def _notes(found: dict[str, Any]) -> str:
    """Returns the notes of a model, one of those that differ in numbers only."""
    return "; ".join({re.sub(r"\d+", "", note): note for note in found.get("notes", ())}.values())


def generate(figures: dict[str, Any]) -> str:
    """Times of `generate` for each arm, and the goals."""
    arms = figures["arms"]
    rows = [
        (
            "way",
            "whole call",
            "a token, once settled",
            "tokens like eager's",
            "logits off by",
            "replayed",
        )
    ]
    for name, arm in arms.items():
        replayed = f"{arm['replayed']} of {arm['calls']} calls" if "replayed" in arm else ""
        rows.append(
            (
                name,
                f"{arm['seconds'] * 1e3:,.0f} ms",
                f"{arm['seconds_per_token'] * 1e3:.3f} ms",
                str(arm["identical"]),
                f"{arm['worst']:.1%}",
                replayed,
            )
        )

    def ratio(key: str, one: str, other: str) -> float:
        return float(arms[one][key] / arms[other][key])

    theirs, ours = "transformers compiles", "graphcache, compiled"
    line = f"{ours}, in a line"
    goals = [
        ("goal", "wanted", "measured"),
        (
            "eager's whole call against graphs, nothing compiled",
            "at least 4",
            f"{ratio('seconds', 'eager', 'graphcache'):.2f}",
        ),
        (
            "a token once settled, graphs over compiled code against transformers' own",
            "at most 0.85",
            f"{ratio('seconds_per_token', ours, theirs):.3f}",
        ),
        ("the same, without branches", "", f"{ratio('seconds_per_token', line, theirs):.3f}"),
        ("the whole call, with branches", "", f"{ratio('seconds', ours, theirs):.3f}"),
    ]
    return (
        "A decoder in the shape of Llama-3.2-1B with random weights, bfloat16, batch 1, writes 256 "
        "tokens after 64, with a static cache; arms take turns, medians. *Graphcache*: one line added; "
        "*in a line*: its graphs have no branches. "
        "Tokens are counted up to the first that is another than eager's, and logits compared up to "
        "there: with random weights near ties abound, and eager does not repeat itself either (its row "
        "is a second run against the first). Where tokens part, it is by a near tie. "
        f"transformers {figures['transformers']}.\n\n" + table(rows) + "\n\n" + table(goals)
    )


SECTIONS = {
    "tests": tests,
    "memcheck": memcheck,
    "generate": generate,
    "families": families,
    "zoo": zoo,
    "fuzz": fuzz,
    "cycles": cycles,
    "against": against,
    **example_tables.SECTIONS,
    **comparison.SECTIONS,
}


def page() -> str:
    """Returns the page that the records make.

    Raises:
        ValueError: where a record is of emulated graphs.
    """
    rows: list[tuple[str, ...]] = [("measured", "headline", "device", "record")]
    parts: list[str] = []
    for name, section in SECTIONS.items():
        for path in sorted(RESULTS.glob(f"{name}-*.json")):
            record = json.loads(path.read_text())
            where = record["environment"]
            if name.startswith("bench-") and COMPARISONS not in parts:
                parts += [COMPARISONS, comparison.legend(record["figures"]) + "\n"]
            rows.append(index.row(name, path.stem, where["device"], record["figures"]))
            parts.append(f"## {path.stem}\n")
            parts.append(section({**record["figures"], "plot": path.stem}) + "\n")
            run = f"{where['device']}, {where['date']}, commit {where['commit'][:12]}"
            versions = f"driver {where['driver']}, torch {where['torch']}, Python {where['python']}"
            parts.append(f"{run}, {versions}.{where.get('note', '')}\n")
    return "\n".join([HEADER, table(rows) + "\n", *parts])


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args(argv)
    if args.check:
        return int(PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
