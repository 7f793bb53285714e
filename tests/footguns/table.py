"""Writes TRAPS.md, a table of all traps, from the tests here: `python -m tests.footguns.table`.

The name of a test is the trap, its docstring is what a plain CUDA graph does, and the last column is
read from the assertions of the test. `test_table.py` compares the page with the tests.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER / "TRAPS.md"
SECTIONS = (
    *("replaced_parameters", "replaced_state", "python_values", "weak_references"),
    *("code_and_structure", "composition", "state", "aliasing", "arguments", "padding"),
    *("other_batches", "failure", "order", "random_numbers", "hooks", "interplay", "memory"),
)
HEAD = """# Traps of CUDA graphs

Each trap has a test. A plain CUDA graph is one that was captured once and is replayed for each call.
This page is written by `python -m tests.footguns.table`; `test_table.py` fails if it is out of date.
"As eager": each call returns what eager returns, or raises an error of graphcache with advice.
"""


def traps(section: str) -> Iterator[ast.FunctionDef]:
    """Yields the tests of one section, in the order of its file."""
    tree = ast.parse((FOLDER / f"test_{section}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node


def called(node: ast.AST) -> str:
    """Returns the name of a called function, without what it is an attribute of."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "id", None) or getattr(function, "attr", "")


def served(test: ast.FunctionDef) -> set[bool]:
    """Returns True, False or both: the test asserts that graphs serve calls, or that none does."""
    found = {True for node in ast.walk(test) if called(node) == "replays"}
    found |= {False for node in ast.walk(test) if called(node) == "warned_once"}
    for node in ast.walk(test):
        if isinstance(node, ast.Compare) and getattr(node.left, "attr", "") == "hits":
            right = node.comparators[0]
            zero = isinstance(right, ast.Constant) and right.value == 0
            found.add(not (zero and isinstance(node.ops[0], ast.Eq)))
    return found


def here(test: ast.FunctionDef) -> str:
    """Returns the outcome with graphcache, as far as the test asserts it."""
    answers = served(test)
    if answers == {False}:
        how = ", without graphs"
    elif True in answers:
        how = ", from graphs"
    elif any(called(node) == "survives" for node in ast.walk(test)):
        how = ", from graphs until the change"
    else:
        how = ""
    warns = any(called(node) in ("warns", "warned_once") for node in ast.walk(test))
    return f"as eager{how}{'; warns' if warns else ''}"


def page() -> str:
    """Returns the whole page."""
    text = HEAD
    for section in SECTIONS:
        title = section.replace("_", " ").capitalize()
        text += f"\n## {title}\n\n| trap | plain CUDA graph | here |\n| --- | --- | --- |\n"
        for test in traps(section):
            doc = (ast.get_docstring(test) or "").split("\n\n", maxsplit=1)[0]
            plain = " ".join(doc.split()).replace("|", "\\|")
            trap = test.name.removeprefix("test_").replace("_", " ")
            link = f"[{test.name}](test_{section}.py)"
            text += f"| {trap} | {plain} | {here(test)} ({link}) |\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
