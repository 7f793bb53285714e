"""Rules that a reader relies on: which way imports run, and how large things get."""

import ast
import inspect
import re
from pathlib import Path

import graphcache
from graphcache.capture.ladder import capture_ladder

PACKAGE = Path(graphcache.__file__).parent

# From the decorator down to the driver; what is not listed is a leaf at the side.
ORDER = [
    "decorators",
    "forwards",
    "cache",
    "first",
    "graphs",
    "options",
    "entry",
    "learn",
    "modes",
    "verify",
    "capture",
    "outputs",
    "pool",
    "runtime",
    "_C",
]
LEAVES = {
    "buckets": {"errors"},
    "compiled": set(),
    "config": {"errors"},
    "errors": set(),
    "fingerprint": {"_C"},
    "guards": {"_C", "ops", "places", "reads"},
    "host": {"errors", "ops", "patches"},
    "observe": {"_C", "errors", "fingerprint", "host", "ops", "state"},
    "keepers": {"_C", "errors", "guards", "places", "tree"},
    "kernels": set(),
    "names": set(),
    "ops": {"errors"},
    "patches": set(),
    "places": {"ops"},
    "reads": {"names", "ops", "patches", "places", "snapshot"},
    "signature": {"_C", "keepers", "tree"},
    "snapshot": {"places"},
    "staging": {"_C", "signature"},
    "state": {"_C"},
    "stats": {"_C", "buckets", "errors"},
    "timing": {"runtime", "stats"},
    "tree": set(),
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("graphcache"):
            module = node.module.removeprefix("graphcache").removeprefix(".")
            names |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
    return names


def test_imports_run_one_way() -> None:
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name in ("__init__", "__main__"):
            continue
        used = imported(path) - {name}
        if name in LEAVES:
            assert used <= LEAVES[name], f"{path.name} imports {used - LEAVES[name]}"
        else:
            below = set(ORDER[ORDER.index(name) + 1 :]) | LEAVES.keys()
            assert used <= below, f"{path.name} imports {used - below}"


def test_only_the_runtime_names_a_device_api() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if "runtime" not in path.parts and path.stem not in (
            "pool",
            "observe",
            "__main__",
            "modes",
            "patches",
        ):
            assert "torch.cuda." not in text, path


def test_core_loop_fits_one_function() -> None:
    assert len(inspect.getsource(capture_ladder).splitlines()) <= 40


def test_public_names_are_documented() -> None:
    for name in graphcache.__all__:
        assert hasattr(graphcache, name)
        assert getattr(graphcache, name).__doc__, name


def test_no_assert_and_no_placeholder_in_the_library() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), path


def test_docs_link_tests_that_exist() -> None:
    """Each link of docs/semantics.md names a test that exists, in the file that it leads to."""
    docs = PACKAGE.parent / "docs"
    text = (docs / "semantics.md").read_text()
    links = re.findall(r"\[(test_\w+)\]\((\.\./tests/[\w/]+\.py)\)", text)
    assert len(links) > 70
    for name, path in links:
        source = (docs / path).read_text()
        assert f"def {name}(" in source or path.endswith(f"/{name}.py"), name
