"""What the bytecode of a function names: globals, attributes, and modules that it imports."""

import re
import sys
from collections.abc import Iterator
from dis import EXTENDED_ARG, opmap
from importlib.util import resolve_name
from types import CodeType, ModuleType
from typing import Any

# Code with these may read an attribute that it does not name.
_DYNAMIC = {
    "getattr", "hasattr", "vars", "__dict__", "attrgetter", "__getattribute__", "eval", "exec",
    "asdict", "astuple", "_asdict",
}  # fmt: skip
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


class Named:
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
        self.dynamic = not _DYNAMIC.isdisjoint(names)
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
            elif op == _MATCH:  # reads what __match_args__ of the class names
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


def _texts(constants: Any) -> Iterator[str]:
    for item in constants:
        if type(item) is str:
            yield item
        elif type(item) in (tuple, frozenset):
            yield from _texts(item)
