"""Rules that a reader relies on: the order of imports, the words, and the size of things."""

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import graphcache
from graphcache.capture.ladder import capture_ladder
from graphcache.dispatch.first_call import first_call
from tests.helpers import ROOT

PACKAGE = Path(graphcache.__file__).parent
LIBRARY = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h"))

# Each part imports from its own group and from the groups to the right.
ORDER = (
    "__main__, __init__ > decorators > integrations > wrappers > dispatch > capture > tracing > guards"
    " > pool, runtime > call > config, errors, report, _C"
)

# Words of the first version, each with its successor in the field's words.
OLD_WORDS = {
    "observe, observer, observation, learn, learns, learned": "trace, recorder",
    "seen, unseen, noted, theirs, mine": "the concrete noun",
    "place, places, leads": "source",
    "hold, broken, watched": "check, explain",
    "written": "mutated",
    "outside": "external",
    "unservable, refuse, refused": "bypass",
    "stage, staged, stager, staging": "copy in, copier",
    "keeper, keepers, kept, home, homes, homeless, lent, lend": "static object, slot, lease",
    "anew": "recapture",
    "fingerprint, fingerprints": "checksum",
    "trust, trusted": "check budget, check interval",
    "paid, surplus": "amortized, LRU victim",
}
OLD = {word for words in OLD_WORDS for word in words.split(", ")}
VAGUE = re.compile(r"(What|Tells|Says)\b")
CPP_CLASS = re.compile(r"\b(?:class|struct|enum class)\s+(\w+)")
CPP_FUNCTION = re.compile(
    r"^[ \t]*(?!return\b|throw\b|else\b|case\b|using\b)[\w:<>&*, ]+[ &*](\w+)\(", re.M
)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def definitions(path: Path) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield node


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    """Returns the package, or the module at the top, that a file of the library belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module == "graphcache":
            parts |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("graphcache."):
            parts.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "graphcache"]
            parts |= {[*name.split("."), "__init__"][1] for name in names}
    return parts


def old_words(name: str) -> list[str]:
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return [word for word in words if word.lower() in OLD]


def test_imports_run_one_way() -> None:
    groups = [group.split(", ") for group in ORDER.split(" > ")]
    rank = {part: index for index, group in enumerate(groups) for part in group}
    backwards = [
        f"{shown(path)} imports {part}"
        for path in LIBRARY
        for part in imported(path)
        if rank[part] < rank[part_of(path)]
    ]
    assert not backwards
    assert {part_of(path) for path in LIBRARY} == rank.keys()


def test_only_the_runtime_names_a_device_api() -> None:
    # A pool names the current device, modes ask for a capture, and the recorder saves generators.
    allowed = {"pool.py", "__main__.py", "modes.py", "op_recorder.py"}
    others = [path for path in LIBRARY if part_of(path) != "runtime" and path.name not in allowed]
    found = [
        f"{shown(path)}:{node.lineno}"
        for path in others
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda"
    ]
    assert not found, "\n".join(found)


def test_names_in_python_have_no_old_word() -> None:
    found = [shown(path) for path in LIBRARY if old_words(path.stem)]
    found += [
        f"{shown(path)}:{node.lineno} {node.name}"
        for path in LIBRARY
        for node in definitions(path)
        if old_words(node.name)
    ]
    assert not found, "\n".join(found)


def test_names_in_native_code_have_no_old_word() -> None:
    found = [shown(path) for path in NATIVE if old_words(path.stem)]
    for path in NATIVE:
        text = path.read_text()
        names = {*CPP_CLASS.findall(text), *CPP_FUNCTION.findall(text)}
        found += [f"{shown(path)} {name}" for name in sorted(names) if old_words(name)]
    assert not found, "\n".join(found)


def test_summaries_begin_with_a_verb_or_a_noun() -> None:
    found = []
    for path in (*LIBRARY, *PACKAGE.rglob("*.pyi"), *TESTS):
        for node in (parsed(path), *definitions(path)):
            if VAGUE.match(ast.get_docstring(node) or ""):
                found.append(f"{shown(path)}:{getattr(node, 'lineno', 1)}")
    assert not found, "\n".join(found)


def test_native_comments_begin_with_a_verb_or_a_noun() -> None:
    found = []
    for path in NATIVE:
        before = ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            _, is_comment, text = line.partition("//")
            if is_comment and not before.lstrip().startswith("//") and VAGUE.match(text.strip()):
                found.append(f"{shown(path)}:{number}")
            before = line
    assert not found, "\n".join(found)


def test_functions_have_at_most_seven_parameters() -> None:
    found = []
    for path in LIBRARY:
        for node in definitions(path):
            if isinstance(node, ast.FunctionDef) and node.name != "cuda_graphed":
                given = node.args
                every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                names = [each.arg for each in every if each is not None]
                if len(names) - (names[:1] in (["self"], ["cls"])) > 7:
                    found.append(f"{shown(path)}:{node.lineno} {node.name}")
    assert not found, "\n".join(found)


def test_top_of_the_package_has_at_most_twelve_modules() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def test_packages_open_with_a_docstring() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        if path.parent.name != "_C":
            text = " ".join((ast.get_docstring(parsed(path)) or "").split())
            assert "Comes in:" in text, path
            assert "Goes out:" in text, path


def test_core_loop_fits_one_function() -> None:
    assert len(inspect.getsource(capture_ladder).splitlines()) <= 40


def test_first_call_is_fifteen_lines() -> None:
    source = inspect.getsource(inspect.unwrap(first_call)).partition("def ")[2]
    assert len(source.splitlines()) <= 15


def test_test_files_have_at_most_900_lines() -> None:
    lengths = {shown(path): len(path.read_text().splitlines()) for path in TESTS}
    assert not {path: length for path, length in lengths.items() if length > 900}


def test_test_names_have_at_most_60_characters() -> None:
    names = [node.name for path in TESTS for node in definitions(path)]
    assert not [name for name in names if name.startswith("test_") and len(name) > 60]


def test_public_names_are_documented() -> None:
    for name in graphcache.__all__:
        assert hasattr(graphcache, name)
        assert getattr(graphcache, name).__doc__, name


def test_no_assert_and_no_placeholder_in_the_library() -> None:
    for path in LIBRARY:
        for node in ast.walk(parsed(path)):
            assert not isinstance(node, ast.Assert), path


def test_docs_link_tests_that_exist() -> None:
    """Each link of docs/semantics.md names a test that exists, in the file that it leads to."""
    docs = ROOT / "docs"
    text = (docs / "semantics.md").read_text()
    links = re.findall(r"\[(test_\w+)\]\((\.\./tests/[\w/]+\.py)\)", text)
    assert len(links) > 70
    for name, path in links:
        source = (docs / path).read_text()
        assert f"def {name}(" in source or path.endswith(f"/{name}.py"), name


def test_every_native_source_is_in_one_translation_unit() -> None:
    units = [path.read_text() for path in (ROOT / "csrc").glob("*.cpp")]
    included = [name for text in units for name in re.findall(r'#include "(\S+\.cpp)"', text)]
    sources = [str(path.relative_to(ROOT / "csrc")) for path in (ROOT / "csrc").glob("*/*.cpp")]
    assert sorted(included) == sorted(sources)
