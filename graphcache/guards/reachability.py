"""What a Python value leads to: its items, its attributes, those of its class, and what is behind it.

One search for what a forward may change (`Snapshot`) and for what it may read (`Guards`).
"""

import gc
import operator
import re
import sys
from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from io import IOBase
from types import (
    BuiltinFunctionType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
)
from typing import Any, NamedTuple
from weakref import ProxyTypes, ref

from torch import Tensor, nn

from graphcache.call.object_args import _PLAIN, HEAP_TYPE, attributes_of, is_opaque, slots_of
from graphcache.runtime.source_lines import is_library

DEPTH = 4  # containers inside an attribute that are searched: self.caches[i]["k"] is two deep
LONGEST = 4096  # items of a list, entries of a dict: longer ones are known by their length

OF_MODULE = frozenset(vars(nn.Module())) - {"training"}
_OPERATORS = [name[2:-2] for name, of in vars(operator).items() if name[:2] == "__" and callable(of)]
# Methods that Python calls and no code names.
SPECIAL = frozenset(
    f"__{name}__"
    for name in re.findall(
        r"\w+",
        "call getattr getattribute setattr delattr get set len bool float int complex iter next "
        "reversed enter exit hash str repr format missing torch_function divmod round",
    )
    + [f"{r}{name}" for name in _OPERATORS for r in ("", "r")]
)


_BY_LENGTH = (dict, list, set, deque)
_VIEWS: tuple[type[Any], ...] = (type({}.keys()), type({}.values()), type({}.items()))

Place = tuple[Any, ...]  # a container, a key, and what is there; without the third: nothing is


class Members(NamedTuple):
    """Something that a value leads to other values by.

    Attributes:
        kind: "dict", "list" (or a set), "table" (the `__dict__` of an object), "class" (that of a
            class), "classes" (see `classes`), "module" (of Python), "extra" (of a function or a tensor),
            "items" (read one by one: deques, slots, context variables), "fixed" (can't change) or
            "loose" (can be replaced, which is not noticed: the defaults of a function).
        container: what holds the items.
        items: keys, and what is there.
        name: that of the class.
    """

    kind: str
    container: Any
    items: list[tuple[Any, Any]]
    name: str = ""

    def label(self, label: str, key: Any) -> str:
        """Names an item of what has the name `label`."""
        if self.kind in ("fixed", "loose") or key is None:
            return label
        if self.kind == "class":
            return f"{self.name}.{key}"
        if self.kind in ("dict", "list") or isinstance(key, int):
            return f"{label}[{key!r}]"
        return f"{label}.{getattr(key, '__name__', key)}".lstrip(".")

    def now(self) -> list[tuple[Any, Any]]:
        """Returns the items as they are at present."""
        if self.kind in ("class", "extra"):
            return _own_names(self.container)
        if self.kind == "items" and not isinstance(self.container, (deque, ContextVar)):
            return slots_of(self.container)
        return _items(self.container)


def _own_names(table: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns entries but those of Python itself: annotations lead to docs, made when asked for."""
    return [item for item in list(table.items()) if item[0][:2] != "__"]


def _items(container: Any) -> list[tuple[Any, Any]]:
    if isinstance(container, dict):
        return list(dict.items(container))
    if isinstance(container, ContextVar):
        try:
            return [(None, container.get())]
        except LookupError:
            return []
    return list(enumerate(container))


def groups(value: Any) -> Iterator[Members]:
    """Yields what a value, which is no nn.Module, leads to other values by; its own class included."""
    kind = type(value)  # not isinstance: proxies and mocks claim to be what they are not
    if issubclass(kind, _PLAIN) or is_opaque(kind.__module__):
        return
    if issubclass(kind, ModuleType):
        if not is_opaque(value.__name__):
            yield Members("module", vars(value), [])  # there may be thousands: take those that are named
    elif issubclass(kind, type):
        if value.__flags__ & HEAP_TYPE and not _is_of_library(value):
            yield from classes(value)
            if kind is not type:
                yield Members("classes", kind, [])
    elif issubclass(kind, (FunctionType, Tensor)):
        yield Members("extra", vars(value), _own_names(vars(value)))
        if kind is FunctionType:
            defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            yield Members("loose", value, list(enumerate(defaults)))
    elif (behind := _behind(value)) is not None:
        yield Members("fixed", value, behind)
    else:
        yield from _own(value)


def _own(value: Any) -> Iterator[Members]:
    kind = type(value)
    if issubclass(kind, (dict, list, set)):
        yield Members("dict" if issubclass(kind, dict) else "list", value, _items(value))
    elif issubclass(kind, (deque, ContextVar)):
        yield Members("items", value, _items(value))
    elif issubclass(kind, (tuple, frozenset)):
        yield Members("fixed", value, list(enumerate(value)))
    if kind in (dict, list, set, tuple, frozenset, deque):
        return
    slots = slots_of(value)
    if slots:
        yield Members("items", value, slots)
    table = attributes_of(value)
    if table is not None:
        yield Members("table", table, list(table.items()))
    if slots or table is not None:
        yield Members("classes", kind, [])


def _behind(value: Any) -> list[tuple[Any, Any]] | None:
    """Returns what an object of C leads to that always leads there; None for any other."""
    kind = type(value)
    if issubclass(kind, partial):
        return [(".func", value.func), (".args", value.args), (".keywords", value.keywords)]
    if issubclass(kind, (MethodType, BuiltinFunctionType)):
        owner = value.__self__
        return [] if isinstance(owner, ModuleType) else [("self", owner)]
    if issubclass(kind, (staticmethod, classmethod)):
        return [("func", value.__func__)]
    if issubclass(kind, MappingProxyType):
        return [("of", each) for each in gc.get_referents(value)]
    if issubclass(kind, _VIEWS):
        return [("of", value.mapping)]
    if issubclass(kind, ref):
        found = value()
        # Objects and modules are known weakly; other things might be gone when they are compared.
        weakly = hasattr(type(found), "__weakref__") and not isinstance(found, (Tensor, *_BY_LENGTH))
        return [("of", found)] if weakly else []
    return None


def classes(kind: type) -> Iterator[Members]:
    """Yields a class and its bases: their methods and constants."""
    for base in kind.__mro__:
        if base.__flags__ & HEAP_TYPE:
            (table, *_) = gc.get_referents(vars(base))  # the dict behind the read-only view
            yield Members("class", table, _own_names(table), base.__qualname__)


def code_in(value: Any, depth: int = 2 * DEPTH, seen: set[int] | None = None) -> Iterator[Any]:
    """Yields the classes of an argument and of what it holds, and functions in it.

    The rest of it is compared at each call, as it may be another object then.
    """
    seen = set() if seen is None else seen
    if isinstance(value, (type, FunctionType)):
        yield value
    elif depth > 0 and not isinstance(value, (Tensor, nn.Module, *_PLAIN)) and id(value) not in seen:
        seen.add(id(value))
        for group in groups(value):
            if group.kind == "classes":
                yield group.container
            elif group.kind != "module":
                for _, item in group.items:
                    yield from code_in(item, depth - 1, seen)


def is_plain(value: Any) -> bool:
    """Tells whether it leads to nothing, and is known by its value."""
    return isinstance(value, _PLAIN)


def is_iterator(value: Any) -> bool:
    """Tells whether code of C keeps how far it has come; where a file stands is no value."""
    kind = type(value)
    step = getattr(kind, "__next__", None)
    if step is None or isinstance(step, FunctionType):
        return False
    return kind not in ProxyTypes and not issubclass(kind, IOBase)


def named_in(table: dict[str, Any], names: Any) -> list[tuple[str, Any]]:
    """Returns what counts of a Python module: of a library's, only what computes or leads on."""
    found = [(name, table[name]) for name in names if name in table]
    if not is_library_module(table):
        return found
    code = (FunctionType, BuiltinFunctionType, ModuleType, type)
    return [item for item in found if isinstance(item[1], code)]


def is_library_module(table: dict[str, Any]) -> bool:
    """Tells it of the `__dict__` of a Python module."""
    file, name = table.get("__file__"), table.get("__name__")
    return is_library(file) if isinstance(file, str) else name in sys.builtin_module_names


def _is_of_library(kind: type) -> bool:
    module = sys.modules.get(kind.__module__)
    return is_opaque(kind.__module__) or (module is not None and is_library_module(vars(module)))
