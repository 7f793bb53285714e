"""The members that can be reached from a Python value: its items, its attributes, those of its class.

One walk serves four: the guards on all that a forward may read (`Guards`), the snapshot of all that it
may change (`Snapshot`), the code among its arguments (`code_in`), and the shape of an object that it is
passed (`read_object`). Each is a subclass of `Walker`, which takes what the walk finds.
"""

import gc
import logging
import operator
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from enum import Enum, auto
from functools import partial
from io import IOBase
from types import (
    BuiltinFunctionType,
    FunctionType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, NamedTuple
from weakref import ProxyTypes, WeakMethod, ref

import torch
from torch import Tensor, nn

from graphcache import _C
from graphcache.runtime.source_lines import is_installed, is_library

DEPTH = 4  # containers inside an attribute that are searched: self.caches[i]["k"] is two deep
LONGEST = 4096  # items of a list, entries of a dict: longer ones are known by their length
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: classes written in Python; others can't be changed
ABSENT = object()

OF_MODULE = frozenset(vars(nn.Module())) - {"training"}
_TABLES = ("_parameters", "_buffers", "_modules")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
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
# Objects of these keep caches of their own, which change how fast a forward is and not its result.
_PACKAGES = ("graphcache", "triton", "cupy", "numba", "cuda", "torch.ops", "torch.library", "torch.cuda")
_OPAQUE = (*(f"{package}." for package in _PACKAGES), "torch._")  # not a file such as cuda_ops.py
_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)
CODE = (type, FunctionType, BuiltinFunctionType, ModuleType)
_NOT_SEARCHED = (*CODE, logging.Logger, Tensor)
# Objects of these refer to the same others for ever; a view to its dict.
_REFERRING: tuple[type[Any], ...] = (
    *(partial, MethodType, BuiltinFunctionType, staticmethod, classmethod, MappingProxyType, property),
    *(type({}.keys()), type({}.values()), type({}.items())),
)


class Source(NamedTuple):
    """One place from which code gets a value.

    Attributes:
        container: a dict, list, tuple, deque or closure cell; an object with slots; a context variable.
        key: the key or index; the descriptor of a slot; None for a cell.
        value: the value there, or `ABSENT`.
        label: the name of the value, for messages.
    """

    container: Any
    key: Any
    value: Any
    label: str


def key_of(source: Source) -> tuple[int, Any]:
    """Returns a place as a key: equal for two sources of one place."""
    return id(source.container), source.key


class Kind(Enum):
    """The kinds of members that a value has."""

    DICT = auto()
    LIST = auto()  # or a set
    ATTRIBUTES = auto()  # the `__dict__` of an object
    MODULE = auto()  # that of an nn.Module
    TABLE = auto()  # the parameters, buffers or children of an nn.Module
    CLASS = auto()  # methods and constants of one class
    TYPE = auto()  # the class of an object, with its bases
    EXTRA = auto()  # attributes of a function or a tensor
    ITEMS = auto()  # of a deque or a context variable, and slots: compared one by one
    FIXED = auto()  # can't change: the items of a tuple
    LOOSE = auto()  # can be replaced, which is not noticed: the defaults of a function
    SCOPE = auto()  # the globals of a Python module, of which only those that are named count


# Before Python 3.12, to get a member of an Enum takes five times as long.
DICT, LIST, ATTRIBUTES, MODULE, TABLE, CLASS, TYPE, EXTRA, ITEMS, FIXED, LOOSE, SCOPE = Kind
_BY_NAME = (DICT, ATTRIBUTES, MODULE, TABLE, CLASS, EXTRA)


class Members(NamedTuple):
    """Members of one kind that a value has.

    Attributes:
        kind: their kind.
        container: the object that holds them.
        items: the members, each with its key.
        label: the name of the value; the class's own name for a class.
    """

    kind: Kind
    container: Any
    items: list[tuple[Any, Any]]
    label: str

    @classmethod
    def of(cls, kind: Kind, container: Any, label: str) -> "Members":
        """Reads the members that a container has at present."""
        return cls(kind, container, _items(kind, container), label)

    def label_of(self, key: Any) -> str:
        """Returns the name of one member."""
        if key is None and self.kind is not DICT:
            return self.label
        if self.kind is DICT or type(key) is int:
            return f"{self.label}[{shown(key)}]"
        name = key if type(key) is str else getattr(key, "__name__", key)
        return f"{self.label}.{name}" if self.label else str(name)

    def reachable(self) -> list[tuple[str, Any]]:
        """Returns the members that may have members themselves, each with its name."""
        found = [
            (self.label_of(key), item)
            for key, item in self.items
            if not is_plain(item) and not (self.kind is MODULE and key in OF_MODULE)
        ]
        if self.kind is DICT:
            found += [(self.label, key) for key, _ in self.items if not is_plain(key)]
        return found

    def now(self) -> list[tuple[Any, Any]]:
        """Returns the members that the container has at present."""
        return _items(self.kind, self.container)

    def changed_keys(self) -> list[Any]:
        """Returns the keys of members that are not the same objects any more."""
        first, second = dict(self.items), dict(self.now())
        keys = first.keys() | second.keys()
        return [k for k in keys if not is_same(first.get(k, ABSENT), second.get(k, ABSENT))]

    def changed(self) -> Iterable[str]:
        """Returns the names of members that are not the same objects any more."""
        now, named = self.now(), self.kind in _BY_NAME
        pairs = zip(now, self.items, strict=False)
        same = (is_same(a, b) and (k is n or not named) for (k, a), (n, b) in pairs)
        if len(now) == len(self.items) and all(same):
            return ()
        if not named:
            return (self.label,)
        return map(self.label_of, self.changed_keys())


class Walker:
    """Walks over all that can be reached from values. Subclasses take the things that the walk finds.

    Args:
        root: the module whose hooks are not walked over, since they run outside its forward; or None.

    Attributes:
        follows_classes: whether the class of an object is walked over too.
    """

    follows_classes = True

    def __init__(self, root: Any = None) -> None:
        self._root = root
        # Held, so that no other object gets an address that was visited.
        self._visited: dict[int, tuple[int, Any]] = {}
        self._types: dict[int, int] = {}

    def enter(self, value: Any, label: str, depth: int, is_new: bool) -> bool:
        """Takes a value, and returns True if its members are to be found.

        Args:
            value: perhaps one that the walk has met before.
            label: its name.
            depth: how many containers deep the walk goes from here.
            is_new: the value was not yet searched as deep.
        """
        return True

    def take(self, members: Members, held: bool) -> Iterable[tuple[str, Any]]:
        """Takes members of a value, and returns those to go on with, each with its name.

        Args:
            members: all of one kind.
            held: whether a guard compares the container of the value before the value.
        """
        return members.reachable()

    def walk(self, value: Any, label: str, depth: int = DEPTH, *, held: bool = True) -> None:
        """Walks over a value and all that can be reached from it, `depth` containers deep."""
        self._follow([(value, label, depth, held)])

    def walk_class(self, kind: type) -> None:
        """Walks over a class and its bases, also where they are a library's."""
        self._follow(self._reached(Members(TYPE, kind, [], ""), DEPTH, held=True))

    def _follow(self, pending: list[tuple[Any, str, int, bool]]) -> None:
        while pending:
            value, label, depth, held = pending.pop()
            if issubclass(type(value), nn.Module):
                depth = DEPTH + 1
            elif issubclass(type(value), Tensor):
                depth = max(depth, 2)
            is_new = depth > 0 and self._is_new(value, depth)
            if self.enter(value, label, depth, is_new) and is_new:
                groups = members_of(value, label, is_root=value is self._root)
                found = [each for group in groups for each in self._reached(group, depth - 1, held)]
                pending += reversed(found)

    def _reached(self, members: Members, depth: int, held: bool) -> list[tuple[Any, str, int, bool]]:
        kind, container = members.kind, members.container
        if kind is TYPE:
            if not self.follows_classes or self._types.get(id(container), 0) >= depth:
                return []
            self._types[id(container)] = depth
            classes = classes_of(container)
            return [each for group in classes for each in self._reached(group, depth, held)]
        if kind is CLASS and not self._is_new(container, depth):
            return []
        depth = DEPTH if kind is SCOPE else depth
        held_now = kind is not LIST and kind is not LOOSE and (held or kind is not FIXED)
        return [(item, label, depth, held_now) for label, item in self.take(members, held)]

    def _is_new(self, value: Any, depth: int) -> bool:
        """Return True if the value was not searched as deep before."""
        known = self._visited.get(id(value))
        if known is not None and known[0] >= depth:
            return False
        self._visited[id(value)] = depth, value
        return True


class _CodeSearch(Walker):
    follows_classes = False

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Any] = {}

    def enter(self, value: Any, label: str, depth: int, is_new: bool) -> bool:
        code = value if issubclass(type(value), (type, FunctionType)) else type(value)
        self.found[id(code)] = code
        return code is not value and not issubclass(code, (Tensor, nn.Module))


def code_in(arguments: Any) -> list[Any]:
    """Returns the functions and classes among arguments, and the classes of the objects there.

    The rest is compared at each call, as the next one may pass another object.
    """
    search = _CodeSearch()
    search.walk(arguments, "", 2 * DEPTH)
    return list(search.found.values())


def members_of(value: Any, label: str, *, is_root: bool = False) -> Iterator[Members]:
    """Yields all members of a value, kind by kind; the class of the value included.

    Args:
        value: the value.
        label: its name.
        is_root: whether it is a module whose hooks do not count.
    """
    kind = type(value)  # not isinstance: proxies and mocks claim to be what they are not
    if issubclass(kind, nn.Module):
        yield Members.of(MODULE, value, label)
        for table in map(vars(value).get, _TABLES):
            if isinstance(table, dict):  # a scripted module has others
                yield Members.of(TABLE, table, label)
        for name in () if is_root else HOOKS:
            if isinstance(table := vars(value).get(name), dict):
                yield Members.of(TABLE, table, f"{label}.{name}")
        yield from _slots_and_class(value, label)
    elif is_plain(value) or is_opaque(kind.__module__):
        return
    elif issubclass(kind, ModuleType):
        if not is_opaque(value.__name__):
            yield Members(SCOPE, vars(value), [], label)  # there may be thousands
    elif issubclass(kind, type):
        if value.__flags__ & HEAP_TYPE and not is_of_library(value):
            yield from classes_of(value)
            if kind is not type:
                yield Members(TYPE, kind, [], label)
    elif issubclass(kind, (FunctionType, Tensor)):
        yield Members.of(EXTRA, vars(value), label)
        if kind is FunctionType:
            defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            yield Members(LOOSE, value, [(None, item) for item in defaults], label)
    elif (behind := _behind(value)) is not None:
        yield Members(FIXED, value, [(None, item) for item in behind], label)
    else:
        yield from _of_object(value, label)


def _of_object(value: Any, label: str) -> Iterator[Members]:
    kind = type(value)
    if issubclass(kind, (dict, list, set)):
        yield Members.of(DICT if issubclass(kind, dict) else LIST, value, label)
    elif issubclass(kind, (deque, ContextVar)):
        yield Members.of(ITEMS, value, label)
    elif issubclass(kind, (tuple, frozenset)):
        yield Members.of(FIXED, value, label)
    if kind in (dict, list, set, tuple, frozenset, deque):
        return
    has_attributes = attributes_of(value) is not None
    if has_attributes:
        yield Members.of(ATTRIBUTES, value, label)
    if has_attributes or slots_of(value):
        yield from _slots_and_class(value, label)


def _slots_and_class(value: Any, label: str) -> Iterator[Members]:
    if slots := slots_of(value):
        yield Members(ITEMS, value, slots, label)
    yield Members(TYPE, type(value), [], label)


def classes_of(kind: type) -> Iterator[Members]:
    """Yields the methods and constants of a class and of its bases."""
    for base in kind.__mro__:
        if base.__flags__ & HEAP_TYPE:
            (table, *_) = gc.get_referents(vars(base))  # the dict behind the read-only view
            yield Members.of(CLASS, table, base.__qualname__)


def _behind(value: Any) -> list[Any] | None:
    """Returns the values that an object of C always refers to; None for any other object."""
    kind = type(value)
    if issubclass(kind, _REFERRING):
        return [item for item in gc.get_referents(value) if not isinstance(item, ModuleType)]
    if not is_weak(value):
        return None
    found = _C.referent(value)
    if kind is WeakMethod:
        return [found, *gc.get_referents(value())] if value() is not None else []
    # Objects and modules are known weakly; other things might be gone when they are compared.
    weakly = hasattr(type(found), "__weakref__") and not isinstance(
        found, (Tensor, dict, list, set, deque)
    )
    return [found] if weakly else []


def _items(kind: Kind, container: Any) -> list[tuple[Any, Any]]:
    """Returns the members of a container, each with its key."""
    if kind is CLASS or kind is EXTRA:
        # Without Python's own: annotations lead to docs, which are made when somebody asks for them.
        return [item for item in list(container.items()) if item[0][:2] != "__"]
    if kind is MODULE:
        return list(vars(container).items())
    if kind is ATTRIBUTES:
        return list((attributes_of(container) or {}).items())
    if isinstance(container, dict):
        return list(dict.items(container))
    if isinstance(container, ContextVar):
        try:
            return [(None, container.get())]  # perhaps its default
        except LookupError:
            return []
    if kind is ITEMS and not isinstance(container, deque):
        return slots_of(container)
    return list(enumerate(container))


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Returns the `__dict__` of an object that has one, and is not known to matter to no forward."""
    try:
        if isinstance(value, _NOT_SEARCHED) or is_plain(value) or is_opaque(type(value).__module__):
            return None
        found = getattr(value, "__dict__", None)
    except Exception:  # a property of that name, or a weak proxy whose object is gone
        return None
    return found if type(found) is dict else None


def slots_of(value: Any) -> list[tuple[MemberDescriptorType, Any]]:
    """Returns each descriptor of an object's `__slots__`, with the value there."""
    return [
        (member, getattr(value, name))
        for kind in type(value).__mro__
        if "__slots__" in vars(kind)  # members of classes of C are no state
        for name, member in vars(kind).items()
        if isinstance(member, MemberDescriptorType) and name != "__weakref__" and hasattr(value, name)
    ]


def is_opaque(module: Any) -> bool:
    """Return True if nothing of the module of this name is state of the user's."""
    return is_of_package(str(module), _OPAQUE)


def is_of_package(module: str, packages: tuple[str, ...]) -> bool:
    """Return True if a module of this name is one of some installed packages, each with a dot behind it.

    A user's file may have the name of a package; it lies elsewhere.
    """
    if not f"{module}.".startswith(packages):
        return False
    top = sys.modules.get(module.partition(".")[0])
    file = getattr(top, "__file__", None)
    return not isinstance(file, str) or is_library(file) or is_installed(file)


def is_weak(value: Any) -> bool:
    """Return True for weak references and weak proxies; a proxy claims to be what it refers to."""
    return issubclass(type(value), (ref, *ProxyTypes))


def is_plain(value: Any) -> bool:
    """Return True for a value that refers to no other, and is known by itself."""
    kind = type(value)
    if kind in _PLAIN:
        return True
    return issubclass(kind, _PLAIN) and kind.__dictoffset__ == 0 and not slots_of(value)


def shown(key: Any) -> str:
    """Returns the text of a key; without asking an object, which may be a tensor or hold one."""
    plain = is_plain(key) or (type(key) is tuple and all(map(is_plain, key)))
    return repr(key) if plain else f"<{type(key).__qualname__}>"


def is_same(value: Any, other: Any) -> bool:
    """Return True for one object, and for equal numbers and texts: a native guard takes those as one."""
    if value is other:
        return True
    exact = type(value) is type(other) and type(value) in (int, str, bytes)
    return exact and bool(value == other)


def is_iterator(value: Any) -> bool:
    """Return True if code of C keeps the position of the iterator; files have none that counts."""
    kind = type(value)
    step = getattr(kind, "__next__", None)
    of_c = step is not None and not isinstance(step, FunctionType)
    return of_c and kind not in ProxyTypes and not issubclass(kind, IOBase)


def named_in(table: dict[str, Any], names: Iterable[str]) -> list[tuple[str, Any]]:
    """Returns the globals of a Python module that count; of a library's, only code and modules."""
    kinds = CODE if is_library_module(table) else object
    return [(name, table[name]) for name in names if name in table and isinstance(table[name], kinds)]


def is_library_module(table: dict[str, Any]) -> bool:
    """Return True if the globals are those of a library's Python module."""
    file, name = table.get("__file__"), table.get("__name__")
    return is_library(file) if isinstance(file, str) else name in sys.builtin_module_names


def is_library_function(value: Any) -> bool:
    """Return True for a function of torch's or of Python's, which leads to no state of the user's."""
    if type(value) is FunctionType:
        return is_library(value.__code__.co_filename)
    return type(value) is BuiltinFunctionType and isinstance(value.__self__, ModuleType)


def is_of_library(kind: type) -> bool:
    """Return True if a class is torch's, Python's own, or of no user's state."""
    module = sys.modules.get(kind.__module__)
    return is_opaque(kind.__module__) or (module is not None and is_library_module(vars(module)))
