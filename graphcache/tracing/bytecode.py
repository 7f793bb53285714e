"""Reads names out of the bytecode of a function: globals, attributes, and modules that it imports."""

import re
import sys
from collections.abc import Iterator
from dis import EXTENDED_ARG, Instruction, get_instructions, opmap
from importlib.util import resolve_name
from types import CodeType, ModuleType
from typing import Any

# Code with these may read an attribute that it does not name.
_DYNAMIC = {
    "getattr", "hasattr", "vars", "dir", "__dict__", "__getstate__", "__reduce_ex__", "attrgetter",
    "__getattribute__", "eval", "exec", "asdict", "astuple", "_asdict",
}  # fmt: skip
_BY_NAME = {"getattr", "hasattr"}
_SCOPE_BY_TEXT = {"globals", "__globals__", "eval", "exec"}
_BY_TEXT = _SCOPE_BY_TEXT | {"format", "format_map"}
_IMPORTS_BY_TEXT = {"import_module", "__import__", "modules"}

_LOAD_GLOBAL = opmap["LOAD_GLOBAL"]
_SHIFT = 1 if sys.version_info >= (3, 11) else 0  # the lowest bit is set where a call follows
_OF_SCOPE = {
    opmap[name]
    for name in ("LOAD_NAME", "STORE_NAME", "STORE_GLOBAL", "DELETE_GLOBAL", "DELETE_NAME")
    if name in opmap
}
_IMPORT = opmap["IMPORT_NAME"]
_MATCH = opmap["MATCH_CLASS"]


class NamesInCode:
    """The names in one piece of code.

    Attributes:
        attributes: those that the code may read of objects and modules.
        scope: the globals that the code may read or set.
        dynamic: whether the code may read attributes that it does not name.
    """

    def __init__(self, code: CodeType) -> None:
        texts = set(_texts(code.co_consts))
        names = code.co_names
        self.attributes = texts.union(names)
        self.scope: set[str] = set()
        asked = _DYNAMIC.intersection(names)
        self.dynamic = bool(asked) and not (asked <= _BY_NAME and _asks_by_texts(code))
        imports_by_text = not _IMPORTS_BY_TEXT.isdisjoint(names)
        self._imports = {text.lstrip(".") for text in texts} if imports_by_text else set()
        if not _BY_TEXT.isdisjoint(names):  # such as "{0.scale}".format(config)
            words = {word for text in texts for word in words_in(text)}
            self.attributes |= words
            self.scope |= words if not _SCOPE_BY_TEXT.isdisjoint(names) else set()
        high = 0
        for op, low in zip(code.co_code[::2], code.co_code[1::2], strict=True):
            argument = high | low
            high = argument << 8 if op == EXTENDED_ARG else 0
            if op == _LOAD_GLOBAL:
                self.scope.add(names[argument >> _SHIFT])
            elif op in _OF_SCOPE:
                self.scope.add(names[argument])
            elif op == _IMPORT:
                self._imports.add(names[argument])
            elif op == _MATCH and argument:  # by position: reads the attributes in its __match_args__
                self.dynamic = True

    def imports(self, scope: dict[str, Any]) -> Iterator[ModuleType]:
        """Yields the modules that the code imports, as far as they are loaded; `scope`: its globals."""
        package = scope.get("__package__") or ""
        for name in self._imports:
            for level in range(package.count(".") + 2 if package else 1):
                path = resolve_name("." * level + name, package)
                for each in (path, path.split(".")[0]):  # `import a.b` gives a
                    module = sys.modules.get(each)
                    if isinstance(module, ModuleType):
                        yield module


def words_in(text: str) -> list[str]:
    """Returns the names that a format may read."""
    return re.findall(r"[^\W\d]\w*", text)


_LOADS = {"LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_CONST"}
_SKIPPED = {"PRECALL", "CACHE", "EXTENDED_ARG", "PUSH_NULL"}


def _asks_by_texts(code: CodeType) -> bool:
    """Return True if each getattr and hasattr is called with a name that is written out.

    Then the name is among the texts. Only `getattr(a.b, "name", c.d)` is understood, nothing more
    involved.
    """
    steps = [step for step in get_instructions(code) if step.opname not in _SKIPPED]

    # One letter a step: a global that is asked for, another load, an attribute, a text, a call.
    text = "".join(map(_letter, steps))
    asked = sum(step.argval in _BY_NAME for step in steps)
    return len(re.findall(r"G(?=[LTG]A*T(?:2|[LTG]A*3))", text)) == asked


def _letter(step: Instruction) -> str:
    if step.opname == "LOAD_GLOBAL" and step.argval in _BY_NAME:
        return "G"
    if step.opname == "LOAD_CONST" and type(step.argval) is str:
        return "T"
    if step.opname == "CALL":
        return {2: "2", 3: "3"}.get(step.arg or 0, "C")
    return "L" if step.opname in _LOADS else "A" if step.opname == "LOAD_ATTR" else "?"


def _texts(constants: Any) -> Iterator[str]:
    for item in constants:
        if type(item) is str:
            yield item
        elif type(item) in (tuple, frozenset):
            yield from _texts(item)
