"""Write the parts of the pages that come from elsewhere: docs/api.md, and tables of measured figures.

    python docs/make.py            # writes
    python docs/make.py --check    # exit code 1 if a page is out of date

docs/api.md comes from the docstrings of `graphcache.__all__`. The tables in README.md and
docs/performance.md stand between two markers and come from the records in benchmarks/results.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import graphcache

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "results"

# Methods and properties that users call; the others belong to the library.
MEMBERS = {
    "CacheInfo": ("hits", "misses", "padded_rows"),
    "GraphPool": ("trim", "memory"),
    "Suggestion": ("saved",),
}
RESULTS = ("CacheInfo", "Suggestion")  # no user makes one
FORWARD = ("cache_info", "cache_clear", "warmup", "suggest_sizes")
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Example")  # of a docstring


# Tables of measured figures


class Record:
    """One record of benchmarks/results, and the accesses that the tables below share."""

    def __init__(self, name: str) -> None:
        found = json.loads((RECORDS / f"{name}.json").read_text())
        self.environment: dict[str, Any] = found["environment"]
        self.figures: dict[str, Any] = found["figures"]

    def median(self, scenario: str, arm: str, key: str) -> float:
        """Returns a median of one arm in microseconds: `latency_us` or `host_us`."""
        return float(self.figures["scenarios"][scenario]["arms"][arm][key]["median"])

    def seconds_per_token(self, arm: str) -> float:
        """Returns the time that one way of calling `generate` takes for a token."""
        return float(self.figures["arms"][arm]["seconds_per_token"])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; the first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def micro(value: float) -> str:
    """Returns microseconds, as milliseconds from 1,000 on."""
    return f"{value / 1e3:,.2f} ms" if value >= 1e3 else f"{value:,.1f} us"


def hardware(records: Sequence[Record]) -> str:
    """Returns the hardware and the torch that all records share.

    Raises:
        ValueError: if the records come from different machines, which no table may mix.
    """
    found = {
        f"{record.environment['device']}, torch {record.environment['torch'].partition('+')[0]}, "
        f"CUDA {record.environment['cuda']}"
        for record in records
    }
    if len(found) != 1:
        raise ValueError(f"the records come from different machines: {sorted(found)}")
    return found.pop()


def headline() -> str:
    """Returns the table of the README: five workloads, eager, other graphs and graphcache."""
    tiny, gpt2, llama, generate, memory = records = [
        Record(f"{name}-h100")
        for name in ("bench-tiny", "bench-gpt2", "bench-llama", "generate", "bench-memory")
    ]

    def row(what: str, eager: float, other: float, name: str, ours: float) -> tuple[str, ...]:
        return what, micro(eager), f"{micro(other)}, {name}", f"{micro(ours)} ({eager / ours:.1f}x)"

    def latencies(record: Record, scenario: str, *arms: str) -> Iterator[float]:
        return (record.median(scenario, arm, "latency_us") for arm in arms)

    def step(what: str, record: Record, scenario: str) -> tuple[str, ...]:
        eager, bare, ours = latencies(record, scenario, "eager", "replay", "graphcache")
        return row(what, eager, bare, "bare `replay()`", ours)

    eager, inductor, compiled = latencies(
        llama, "exact", "eager", "reduce-overhead", "graphcache+compile"
    )
    token = [
        generate.seconds_per_token(arm) * 1e6
        for arm in ("eager", "transformers compiles", "graphcache, compiled")
    ]
    pools = [memory.figures[kind][-1] for kind in ("weak", "strong")]
    weak, strong = (f"{pool['pool_bytes'] / 2**20:,.0f} MiB" for pool in pools)
    rows = [
        (hardware(records), "eager", "other graphs", "graphcache"),
        step("MLP, 4 layers of 256, 5 rows padded to 8", tiny, "padded"),
        step("decode step of GPT-2 small's shape, 8 rows", gpt2, "exact"),
        step("decode step of Llama-3.2-1B's shape, 1 row", llama, "exact"),
        row("the same, compiled", eager, inductor, "`reduce-overhead`", compiled),
        row("a token of `generate`, compiled", token[0], token[1], "transformers' own", token[2]),
        (f"memory of the graphs of {pools[0]['sizes']} sizes", "", f"{strong}, strong references", weak),
    ]
    return table(rows)


def host_times() -> str:
    """Returns what graphcache adds to the host time of a bare replay."""
    names = ("tiny", "gpt2", "llama", "char", "params")
    records = {name: Record(f"bench-{name}-h100") for name in names}
    title = hardware(list(records.values()))
    rows: list[tuple[str, ...]] = [(title, "eager", "bare `replay()`", "graphcache", "added")]
    for name, record in records.items():
        for scenario, found in record.figures["scenarios"].items():
            eager, bare, ours = (
                record.median(scenario, arm, "host_us") for arm in ("eager", "replay", "graphcache")
            )
            rows.append(
                (
                    f"{name}: {scenario}, {found['batches'][0]} rows"
                    if len(found["batches"]) == 1
                    else f"{name}: {scenario} batches",
                    *map(micro, (eager, bare, ours, ours - bare)),
                )
            )
    return table(rows)


def branches() -> str:
    """Returns what products side by side gain, for a step and for `generate`."""
    llama, generate = Record("bench-llama-h100"), Record("generate-h100")
    rows = [(hardware([llama, generate]), "in a line", "side by side", "ratio")]
    for arm, text in (("graphcache", "as it is"), ("graphcache+compile", "compiled")):
        line = llama.median("exact", f"{arm}, in a line", "latency_us")
        ours = llama.median("exact", arm, "latency_us")
        what = f"decode step of Llama-3.2-1B's shape, {text}"
        rows.append((what, micro(line), micro(ours), f"{ours / line:.2f}"))
    line, ours = (
        generate.seconds_per_token(arm) * 1e6
        for arm in ("graphcache, compiled, in a line", "graphcache, compiled")
    )
    what = "a token of `generate`, compiled"
    rows.append((what, micro(line), micro(ours), f"{ours / line:.2f}"))
    return table(rows)


def memory() -> str:
    """Returns the memory of a pool by the number of captured sizes."""
    record = Record("bench-memory-h100")
    title = hardware([record])
    rows: list[tuple[str, ...]] = [(title, "weak references", "strong references", "first call")]
    for weak, strong in zip(record.figures["weak"], record.figures["strong"], strict=True):
        bytes_of = (pool["pool_bytes"] for pool in (weak, strong))
        plural = "" if weak["sizes"] == 1 else "s"
        rows.append(
            (
                f"{weak['sizes']} size{plural}",
                *(f"{count / 2**20:,.0f} MiB" for count in bytes_of),
                f"{weak['first_call_seconds']:.2f} s",
            )
        )
    return table(rows)


def missed_goals() -> str:
    """Returns the goals that the records do not reach."""
    rows = [("record", "goal", "wanted", "measured")]
    for path in sorted(RECORDS.glob("bench-*.json")):
        record = Record(path.stem)
        for goal in record.figures["goals"]:
            if goal["met"] is False and not path.stem.endswith("-before"):
                unit = f" {goal['unit']}" if goal["unit"] else ""
                words = {">=": "at least", "<=": "at most"}[goal["sign"]]
                wanted = f"{words} {goal['limit']:g}{unit}"
                rows.append((path.stem, goal["goal"], wanted, f"{goal['value']:.2f}{unit}"))
    return table(rows)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "headline": ("README.md", headline),
    "host-times": ("docs/performance.md", host_times),
    "branches": ("docs/performance.md", branches),
    "memory": ("docs/performance.md", memory),
    "missed-goals": ("docs/performance.md", missed_goals),
}


def with_table(text: str, name: str, made: str) -> str:
    """Returns the page with the table between its markers replaced.

    Raises:
        ValueError: if the page lacks the markers.
    """
    begin, end = f"<!-- made by docs/make.py: {name} -->", "<!-- end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no markers for the table {name!r}")
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"


# docs/api.md

API = """# API

Made by `python docs/make.py` from the docstrings; do not edit. The [guide](guide.md) explains how to use
these names. [semantics.md](semantics.md) holds what a call promises.

<!-- python
import torch

from graphcache import cuda_graphed

model, tokens = torch.nn.Linear(4, 4), torch.randn(2, 4)
-->
"""


def api() -> str:
    """Returns docs/api.md."""
    names = sorted(graphcache.__all__, key=lambda name: (name != "cuda_graphed", name))
    lines = [API, *(f"- [{name}](#{name.lower()})" for name in names)]
    lines += ["- [A graphed forward](#a-graphed-forward)"]
    stub = Stub(Path(graphcache._C.__file__).with_name("_native.pyi"))
    for name in names:
        lines += ["", f"## {name}", "", *entry(name, getattr(graphcache, name), stub)]
    lines += ["", "## A graphed forward", "", "A decorated forward or function also has these methods."]
    lines += ["`__wrapped__` is the forward as it was written."]
    graphed = type(graphcache.cuda_graphed(lambda x: x))
    for name in FORWARD:
        lines += ["", f"### forward.{name}", "", *described(name, getattr(graphed, name))]
    return "\n".join(lines) + "\n"


class Stub:
    """The signatures and docstrings of the native functions, which the functions themselves lack."""

    def __init__(self, path: Path) -> None:
        functions = (n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef))
        self.found = {node.name: node for node in functions}  # of overloads, the last one

    def described(self, name: str) -> Iterator[str]:
        """Yields the lines about one function."""
        node = self.found[name]
        for argument in node.args.args:
            argument.annotation = None
        yield from code(f"{name}({ast.unparse(node.args)})")
        yield from rendered(ast.get_docstring(node) or "")


def entry(name: str, value: Any, stub: Stub) -> Iterator[str]:
    """Yields the lines about one public name."""
    if name in stub.found:
        yield from stub.described(name)
    elif inspect.isclass(value) and issubclass(value, (Exception, Warning)):
        bases = " and ".join(f"`{base.__name__}`" for base in value.__bases__)
        yield from [f"Derives from {bases}.", "", *rendered(inspect.getdoc(value) or "")]
    elif name in RESULTS:
        yield from rendered(inspect.getdoc(value) or "")
    else:
        yield from described(name, value)
    for member in MEMBERS.get(name, ()):
        yield from ["", f"### {name}.{member}", ""]
        yield from described(member, inspect.getattr_static(value, member))
    for kind in tuples_of(value):
        yield from ["", f"### {kind.__name__}", "", *rendered(inspect.getdoc(kind) or "")]


def described(name: str, value: Any) -> Iterator[str]:
    """Yields the signature, except that of a property, and the docstring."""
    if not isinstance(value, property):
        found = inspect.signature(value)
        kept = [p.replace(annotation=p.empty) for p in found.parameters.values() if p.name != "self"]
        yield from code(f"{name}{found.replace(parameters=kept, return_annotation=found.empty)}")
    yield from rendered(inspect.getdoc(value) or "")


def code(text: str) -> list[str]:
    """Returns a signature as a block."""
    return ["```", *textwrap.wrap(text, 100, subsequent_indent="    "), "```", ""]


def rendered(doc: str) -> list[str]:
    """Returns a docstring in Google's style as lines of Markdown."""
    lines: list[str] = []
    for title, body in sections(doc):
        if title:
            lines += [f"**{title}**", ""]
        if title == "Example":
            source = [line[4:] for line in body if line[:4] in (">>> ", "... ")]
            lines += ["```python", *source, "```", ""]
        elif title in ("Args", "Attributes", "Raises"):
            items = (re.sub(r"^(\*{0,2}\w[\w, *]*): ", r"- `\1`: ", line) for line in body)
            lines += [line if line.startswith("- ") else f"  {line.strip()}" for line in items] + [""]
        else:
            lines += [*body, ""]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def sections(doc: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the title, empty for the text at the start, and the lines of each section."""
    title, body = "", list[str]()
    for line in [*doc.splitlines(), "End:"]:
        if line.endswith(":") and line[:-1] in (*SECTIONS, "End"):
            yield title, textwrap.dedent("\n".join(body)).strip("\n").splitlines()
            title, body = line[:-1], []
        else:
            body.append(line)


def tuples_of(value: Any) -> Iterator[type]:
    """Yields the named tuples that the fields and methods of a public class return."""
    if not inspect.isclass(value):
        return
    hints = list(get_type_hints(value).values())
    for name in MEMBERS.get(value.__name__, ()):
        if inspect.isfunction(method := getattr(value, name)):
            hints.append(get_type_hints(method).get("return"))
    for kind in (kind for hint in hints for kind in (hint, *get_args(hint))):
        if inspect.isclass(kind) and issubclass(kind, tuple) and hasattr(kind, "_fields"):
            yield kind


def pages() -> dict[Path, str]:
    """Returns the pages as they should be."""
    made = {ROOT / "docs" / "api.md": api()}
    for name, (page, make) in TABLES.items():
        path = ROOT / page
        made[path] = with_table(made.get(path) or path.read_text(), name, make())
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is out of date")
    check = parser.parse_args(argv).check
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is out of date' if check else 'written'}")
        if not check:
            path.write_text(pages()[path])
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
