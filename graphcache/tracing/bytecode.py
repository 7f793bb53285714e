"""What the bytecode of a function names: globals, attributes, and modules that it imports."""

import re
import sys
from collections.abc import Iterator
from dis import EXTENDED_ARG, get_instructions, opmap
from importlib.util import resolve_name
from types import CodeType, ModuleType
from typing import Any

# Code with these may read an attribute that it does not name.
_DYNAMIC = {
    "getattr", "hasattr", "vars", "__dict__", "attrgetter", "__getattribute__", "eval", "exec",
    "asdict", "astuple", "_asdict",
}  # fmt: skip
_BY_NAME = {"getattr", "hasattr"}
_SCOPE_BY_TEXT = {"globals", "__globals__", "eval", "exec"}
_BY_TEXT = _SCOPE_BY_TEXT | {"format", "format_map"}
_IMPORTS_BY_TEXT = {"import_module", "__import__", "modules"}

_LOAD_GLOBAL = opmap["LOAD_GLOBAL"]
_SHIFT = 1 if sys.version_info >= (3, 11) else 0  # the lowest bit tells whether it is called next
_OF_SCOPE = {
    opmap[name]
    for name in ("LOAD_NAME", "STORE_NAME", "STORE_GLOBAL", "DELETE_GLOBAL", "DELETE_NAME")
    if name in opmap
}
_IMPORT = opmap["IMPORT_NAME"]
_MATCH = opmap["MATCH_CLASS"]


class NamesInCode:
    """What one piece of code names.

    Attributes:
        attributes: what it may read of objects and modules.
        scope: the globals that it may read or set.
        dynamic: it may read attributes that it does not name.
    """

    __slots__ = ("_imports", "attributes", "dynamic", "scope")

    def __init__(self, code: CodeType) -> None:
        texts = set(_texts(code.co_consts))
        names = code.co_names
        self.attributes = texts.union(names)
        self.scope: set[str] = set()
        asked = _DYNAMIC.intersection(names)
        self.dynamic = bool(asked) and not (asked <= _BY_NAME and _asks_by_texts(code))
        self._imports: set[str] = set()
        if not _BY_TEXT.isdisjoint(names):  # such as "{0.scale}".format(config)
            words = {word for text in texts for word in re.findall(r"[^\W\d]\w*", text)}
            self.attributes |= words
            self.scope |= words if not _SCOPE_BY_TEXT.isdisjoint(names) else set()
        if not _IMPORTS_BY_TEXT.isdisjoint(names):
            self._imports.update(text.lstrip(".") for text in texts)
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
            elif op == _MATCH and argument:  # by position: reads what __match_args__ of the class names
                self.dynamic = True

    def imports(self, scope: dict[str, Any]) -> Iterator[ModuleType]:
        """Yields the modules that it imports, as far as they are known; `scope`: its globals."""
        package = scope.get("__package__") or ""
        for name in self._imports:
            for level in range(package.count(".") + 2 if package else 1):
                path = resolve_name("." * level + name, package) if level else name
                for each in (path, path.split(".")[0]):  # `import a.b` gives a
                    module = sys.modules.get(each)
                    if isinstance(module, ModuleType):
                        yield module


_LOADS = {"LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_CONST"}
_NO_STEPS = {"PRECALL", "CACHE", "EXTENDED_ARG", "PUSH_NULL"}


def _asks_by_texts(code: CodeType) -> bool:
    """Tells whether each getattr and hasattr is called with a name that is written out.

    It is among the texts then. Only `getattr(a.b, "name", c.d)` is understood, nothing more involved.
    """
    steps = [step for step in get_instructions(code) if step.opname not in _NO_STEPS]

    def after(place: int) -> int:
        """Returns where a value and its attributes are loaded from `place` on; the end if none is."""
        if place >= len(steps) or steps[place].opname not in _LOADS:
            return len(steps)
        place += 1
        while place < len(steps) and steps[place].opname == "LOAD_ATTR":
            place += 1
        return place

    for place, step in enumerate(steps):
        if step.argval not in _BY_NAME:
            continue
        name = after(place + 1)
        call = name + 1
        if call < len(steps) and steps[call].opname != "CALL":
            call = after(call)
        if step.opname != "LOAD_GLOBAL" or call >= len(steps) or steps[call].opname != "CALL":
            return False
        given = 2 if call == name + 1 else 3
        if steps[call].arg != given or steps[name].opname != "LOAD_CONST":
            return False
        if type(steps[name].argval) is not str:
            return False
    return True


def _texts(constants: Any) -> Iterator[str]:
    for item in constants:
        if type(item) is str:
            yield item
        elif type(item) in (tuple, frozenset):
            yield from _texts(item)
