"""Rules of the tests themselves: length of files, names, docstrings and imports."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import ROOT

TESTS = sorted((ROOT / "tests").rglob("*.py"))


def definitions(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the name and the docstring of a file, and of each class and function in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield getattr(node, "name", path.stem), ast.get_docstring(node) or ""


def test_test_files_are_at_most_900_lines() -> None:
    for path in TESTS:
        assert len(path.read_text().splitlines()) <= 900, path


def test_test_names_are_short_and_begin_with_a_subject() -> None:
    for path in TESTS:
        for name, _ in definitions(path):
            if name.startswith("test_"):
                assert len(name) <= 60, name
                assert not re.match(r"test_(what|which|who|where|whether|it|the)_", name), name


def test_docstrings_of_tests_begin_with_a_subject() -> None:
    for path in TESTS:
        for name, doc in definitions(path):
            riddle = re.match(r"(What|Tells?|Says?|Where|Whether|It|Likewise)\b", doc)
            assert not riddle, f"{path}: {name}"


def test_test_files_import_no_other_test_file() -> None:
    for path in TESTS:
        found = re.findall(r"from (tests\.[\w.]*\btest_\w+) import", path.read_text())
        assert path.name == "checks.py" or not found, f"{path} imports {found}"
