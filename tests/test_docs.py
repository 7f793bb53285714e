"""The pages: their code runs, their links lead somewhere, and their tables are up to date."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import graphcache
from graphcache.__main__ import main as command_line
from graphcache.report.reasons import Reason

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = [
    *(page for page in PAGES if page.name not in ("results.md", "design.md")),
    ROOT / "CHANGELOG.md",
]
LONGEST_SENTENCE = 25  # words

# A block that readers see, or one hidden in a comment that prepares or checks it.
PYTHON = re.compile(r"^```python\n(.*?)^```|^<!-- python\n(.*?)^-->", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r'"([^"]+)"')
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")


def make_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """Yields the line and the text of each Python block."""
    text = page.read_text()
    for found in PYTHON.finditer(text):
        group = 1 if found[1] is not None else 2
        yield text.count("\n", 0, found.start(group)), found[group]


def page_id(page: Path) -> str:
    return page.name


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:TensorFloat32")  # of Dynamo and Inductor
@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=page_id)
def test_python_blocks_of_page_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a page from top to bottom in one namespace, as a reader would, on emulated graphs."""
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    grad = torch.is_grad_enabled()
    try:
        with graphcache.emulate():
            for line, source in blocks(page):
                exec(compile("\n" * line + source, str(page), "exec"), names)
    finally:
        torch.set_grad_enabled(grad)


def test_commands_in_pages_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["graphcache", "--help"])
    with pytest.raises(SystemExit):
        command_line()
    usage = capsys.readouterr().out
    makefile = (ROOT / "Makefile").read_text()
    found = list(commands())
    assert len(found) > 10
    for page, command in found:
        where = f"{page.name}: {command}"
        tool, *rest = command.split()
        if tool == "make":
            assert re.search(rf"^{rest[0]}:", makefile, re.MULTILINE), where
        elif tool == "pip":
            assert rest[0] == "install", where
        elif rest[:2] == ["-m", "graphcache"]:
            assert rest[2] in re.split(r"\W", usage), where
        elif rest[0] == "-m":
            assert importlib.util.find_spec(rest[1]) is not None, where
        else:
            assert (ROOT / rest[0]).is_file(), where


def commands() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        text = page.read_text()
        for command in re.findall(r"`((?:make|python) [^`]+)`", text):
            yield page, command
        for block in SHELL.findall(text):
            for line in filter(None, (line.partition("#")[0].strip() for line in block.splitlines())):
                yield page, line


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_files_headings_and_tests(page: Path) -> None:
    for name, target in LINK.findall(page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not heading or heading in headings(file), target
        if name.startswith("test_"):
            assert file.stem == name or f"def {name}(" in file.read_text(), name


def headings(page: Path) -> set[str]:
    """Returns the anchors that GitHub makes of the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", WRITTEN, ids=page_id)
def test_sentences_have_at_most_25_words(page: Path) -> None:
    long = [s for s in sentences(page.read_text()) if len(s.split()) > LONGEST_SENTENCE]
    assert not long, "\n".join(long)


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of a page: of its paragraphs, list items and cells, without code."""
    text = re.sub(r"```.*?```|<!--.*?-->", "\n\n", text, flags=re.DOTALL)
    text = LINK.sub(lambda link: link[0][1 : link[0].index("]")], re.sub(r"`[^`]*`", "code", text))
    for part in re.split(r"\n\s*\n|\n\s*(?:[-#]|\d+\.) |\n?\|", text):
        yield from re.split(r"(?<=[.!?])[)*]*\s", " ".join(part.split()))


def test_pages_made_from_docstrings_and_records_are_up_to_date(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert make_module().main(["--check"]) == 0, capsys.readouterr().out


def test_performance_gives_no_figure_outside_the_tables() -> None:
    """Every measured figure of the page comes from a record, by docs/make.py."""
    text = (ROOT / "docs" / "performance.md").read_text()
    prose = re.sub(r"<!-- made by.*?<!-- end -->", "", text, flags=re.DOTALL)
    assert re.findall(r"\d[\d.,]* ?(?:us|ns|ms|s|%|[KMG]iB|times)\b", prose) == []


def test_quoted_messages_are_messages_of_the_library() -> None:
    """Quotes in the first cells of docs/troubleshooting.md are warnings, notes and errors."""
    texts = "\n".join(messages())
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [
        text
        for cell in re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)
        for text in QUOTED.findall(cell)
    ]
    assert len(quoted) > 30
    for text in quoted:
        assert all(part.strip() in texts for part in text.split("…")), text


def messages() -> Iterator[str]:
    """Yields every string of the library, with … for what is filled in."""
    for path in (ROOT / "graphcache").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            yield "".join(
                p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else "…"
                for p in parts
            )
    for path in (*(ROOT / "graphcache").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cpp")):
        yield re.sub(r'"\s*\n\s*"', "", path.read_text())


def test_each_reason_for_an_eager_call_is_explained() -> None:
    """The tables of docs/troubleshooting.md have one row for each member of `Reason`, and its text."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = dict(re.findall(r"^\| `([A-Z_]+)`<br>([^|]*) \|", text, re.MULTILINE))
    assert rows == {name: reason.meaning for name, reason in Reason.__members__.items()}
