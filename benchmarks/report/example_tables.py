"""Tables of the workloads that were made from the examples."""

from __future__ import annotations

from typing import Any

from benchmarks.report.comparison import mib, table

Rows = list[tuple[str, ...]]


def weak_refs(figures: dict[str, Any]) -> str:
    """Strong against weak references."""
    rows: Rows = [("references", "pool", "unit 0 of the outputs of 4, 3, 2, 1 after the smallest ran")]
    for kind in ("strong", "weak"):
        after = figures[f"{kind}_values_after"]
        rows.append(
            (
                kind,
                mib(figures[f"{kind}_reserved_bytes"]),
                ", ".join(f"{after[size][0]:g}" for size in ("4", "3", "2", "1")),
            )
        )
    text = (
        "`benchmarks/workloads/weak_refs.py`: all graphs wrote 2, and the smallest one wrote 6 "
        "afterwards.\n\n"
    )
    return text + table(rows)


def char_decode(figures: dict[str, Any]) -> str:
    """Decoding with a KV cache and a shrinking batch."""
    rows: Rows = [
        ("`benchmarks/workloads/char_decode.py`", ""),
        ("tokens identical to eager", f"{figures['identical']} of {figures['tokens']}"),
        ("sizes captured", ", ".join(map(str, figures["sizes"]))),
        ("capture time", f"{figures['capture_seconds']:.2f} s"),
        ("replays by size", ", ".join(f"{k}: {v}" for k, v in figures["replays"].items())),
        ("rows padded", f"{figures['padded_rows']} beside {figures['fed']}"),
        ("pool, weak outputs", mib(figures["pool_bytes_weak"])),
        ("pool, strong outputs", mib(figures["pool_bytes_strong"])),
        *_rates(figures["tokens_per_second"], "tokens"),
    ]
    return (
        f"A character model in {figures['dtype']}, {figures['prompts']} prompts; arms interleaved, "
        "medians of whole decodes.\n\n" + table(rows)
    )


def plain_module(figures: dict[str, Any]) -> str:
    """One line before a module of torch.nn."""
    rows: Rows = [
        ("`benchmarks/workloads/plain_module.py`", ""),
        ("largest difference from eager", f"{figures['largest_difference']:.1e} of the largest value"),
        ("replayed", f"{figures['replays']} of {figures['calls']} calls"),
        ("sizes captured", ", ".join(map(str, figures["sizes"]))),
        ("three sizes suggested", ", ".join(map(str, figures["suggested"]))),
        ("graphed against eager", f"{figures['speed_against_eager']:.2f} times"),
    ]
    return "An MLP of torch.nn, sizes by default; all calls in turn, medians.\n\n" + table(rows)


def continuous_batching(figures: dict[str, Any]) -> str:
    """Requests that come and go."""
    rows: Rows = [
        ("`benchmarks/workloads/continuous_batching.py`", ""),
        ("requests identical to eager", f"{figures['identical']} of {figures['requests']}"),
        ("batches, and how many came", ", ".join(f"{k}: {v}" for k, v in figures["batches"].items())),
        ("replays by size", ", ".join(f"{k}: {v}" for k, v in figures["replays"].items())),
        *_rates(figures["tokens_per_second"], "tokens"),
    ]
    return "A small decoder in float64, 8 cache slots and a spare one; medians.\n\n" + table(rows)


def embeddings(figures: dict[str, Any]) -> str:
    """An embedding service."""
    rows: Rows = [
        ("`benchmarks/workloads/embeddings.py`", ""),
        (
            "largest difference from eager",
            f"{figures['largest_difference']:.1e}, in vectors of length 1",
        ),
        (
            "replayed",
            f"{figures['replays']} of {figures['requests']} requests, {figures['texts']} texts",
        ),
        ("signatures (lengths of texts)", str(figures["signatures"])),
        *_rates(figures["requests_per_second"], "requests"),
    ]
    return "A small encoder, 1 to 32 texts a request; medians.\n\n" + table(rows)


def two_models(figures: dict[str, Any]) -> str:
    """Speculative decoding in one pool."""
    replays = ", ".join(f"{name}: {count}" for name, count in figures["replays"].items())
    rows: Rows = [
        ("`benchmarks/workloads/two_models.py`", ""),
        ("tokens identical to eager", f"{figures['identical']} of {figures['tokens']}"),
        ("replays", replays),
        ("one pool for both", mib(figures["pool_bytes_shared"])),
        ("a pool for each", mib(figures["pool_bytes_apart"])),
        *_rates(figures["tokens_per_second"], "tokens"),
    ]
    return "A draft of one layer and a target of six, in float64; medians.\n\n" + table(rows)


def _rates(rates: dict[str, float], what: str) -> Rows:
    return [
        (f"{what} per second, eager", f"{rates['eager']:,.0f}"),
        (f"{what} per second, graphed", f"{rates['graphed']:,.0f}"),
        ("graphed against eager", f"{rates['graphed'] / rates['eager']:.2f} times"),
    ]


SECTIONS = {
    "weak_refs": weak_refs,
    "char_decode": char_decode,
    "plain_module": plain_module,
    "continuous_batching": continuous_batching,
    "embeddings": embeddings,
    "two_models": two_models,
}
