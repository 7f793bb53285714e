"""The stub of the native library is the one list of its names; here it is compared with the library."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graphcache import _C
from graphcache._C import _native

STUB = ast.parse(Path(_native.__file__).with_name("_native.pyi").read_text())
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
# Of enumerations, pybind11 adds these; of every class, Python does.
ADDED = {"name", "value"}


def names_in(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def public(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for owner, body in (("", STUB.body), *((f"{name}.", node.body) for name, node in CLASSES.items())):
        for node in body:
            if isinstance(node, ast.FunctionDef) and not any(
                isinstance(each, ast.Name) and each.id in ("property", "overload")
                for each in node.decorator_list
            ):
                yield owner + node.name, node


def parameters_in(signature: str) -> list[tuple[str, bool]]:
    """Returns the parameters in what pybind11 writes of a function, and whether each has a default."""
    inner = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    while (bare := re.sub(r"\[[^\[\]]*\]|<[^<>]*>|'[^']*'|\([^()]*\)", "", inner)) != inner:
        inner = bare
    parts = [part.strip() for part in inner.split(",")]
    return [(re.split(r"[:=]", part)[0].strip(), "=" in part) for part in parts if part not in ("", "*")]


def parameters_of(node: ast.FunctionDef) -> list[tuple[str, bool]]:
    args = node.args
    required = len(args.args) - len(args.defaults)
    given = [(each.arg, index >= required) for index, each in enumerate(args.args)]
    given += [("*args", False)] if args.vararg else []
    pairs = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    return given + [(each.arg, default is not None) for each, default in pairs]


def test_stub_names_are_those_of_the_library() -> None:
    assert set(names_in(STUB.body)) == public(vars(_native))
    assert public(vars(_native)) <= vars(_C).keys()


@pytest.mark.parametrize("name", list(CLASSES))
def test_stub_members_are_those_of_the_class(name: str) -> None:
    members = public(vars(getattr(_native, name)))
    assert public(names_in(CLASSES[name].body)) == members - ADDED


@pytest.mark.parametrize(("name", "node"), [pytest.param(*each, id=each[0]) for each in functions()])
def test_stub_parameters_are_those_of_the_function(name: str, node: ast.FunctionDef) -> None:
    native: Any = _native
    for part in name.split("."):
        native = getattr(native, part)
    signature = native.__doc__.strip().splitlines()[0]
    there = [pair for pair in parameters_in(signature) if pair[0] != "arg0"]  # of `self`, without a name
    assert [pair for pair in parameters_of(node) if pair[0] != "self"] == [
        pair for pair in there if pair[0] != "self"
    ]
