"""Counts the library's statements (Python) and lines of code (C++), without comments and docstrings.

python -m benchmarks.programs.code_size [FOLDER]
"""

import ast
import sys
from pathlib import Path


def statements(path: Path) -> int:
    """Returns the statements of a Python file, docstrings not counted."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.stmt)]
    return sum(
        not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in nodes
    )


def code_lines(path: Path) -> int:
    """Returns the lines of a C++ file that are neither blank nor comments."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return sum(bool(line) and not line.startswith("//") for line in lines)


def main(root: Path) -> None:
    """Prints both counts for a checkout."""
    python = sorted((root / "graphcache").rglob("*.py"))
    native = [
        p
        for folder in ("csrc", "graphcache/_C")
        for p in (root / folder).rglob("*")
        if p.suffix in (".cpp", ".h")
    ]
    print(f"Python statements: {sum(map(statements, python))} in {len(python)} files")
    print(f"C++ lines of code: {sum(map(code_lines, native))} in {len(native)} files")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
