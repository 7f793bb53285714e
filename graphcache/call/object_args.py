"""Objects among the arguments that hold tensors: read into a shape that graphs can compare."""

import logging
import weakref
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphcache import _C
from graphcache.call.pytree import EXACT_TENSORS, Constant, NotATree, constant
from graphcache.errors import CaptureError

DEPTH = 8  # containers and objects inside one that are looked at


MAX_CHANGES = 3  # calls that change the object that the one before changed


MAX_FILLING = 256


_POINTER = 8  # bytes


_CONTAINERS = (list, tuple, dict, OrderedDict, defaultdict)


class ObjectArg(NamedTuple):
    """One such object, in one call.

    Attributes:
        name: the path of the argument.
        value: the object.
        shape: all that it holds but the values in tensors: two of equal shape are alike to a graph.
        tensors: those that it holds.
    """

    name: str
    value: Any
    shape: Any
    tensors: list[Tensor]

    @classmethod
    def read(cls, value: Any, name: str) -> "ObjectArg | None":
        """Returns what `value` holds; None if it is no such object.

        Raises:
            NotATree: if it holds something that can't be compared with another object's.
        """
        if not _is_plain_object(value):
            return None
        walk = _Walk()
        return cls(name, value, walk.shape(value, name, DEPTH), walk.tensors)

    def changed(self) -> tuple[str, bool] | None:
        """Tells what in the object is not as it was read.

        Returns:
            The path of something, and whether the next call would pass an object of the same shape; None
            where nothing changed.
        """
        now = _Walk()
        try:
            shape = now.shape(self.value, self.name, DEPTH)
        except NotATree:
            return self.name, False
        if shape != self.shape:
            return _difference(self.shape, shape, self.name), False
        same = all(a is b for a, b in zip(self.tensors, now.tensors, strict=True))
        return None if same else (f"the tensors of {self.name}", True)


class MutationHistory:
    """What a forward does to the objects that it is passed, other than by values in their tensors.

    To fill a new one, as the first step of a decode does, is no habit: such calls run eagerly, and later
    ones have graphs. To change it in one call after another is, such as to count.
    """

    def __init__(self) -> None:
        self._filling: dict[Any, str] = {}  # shapes that a call changed, and what of them
        self._refused: dict[type, str] = {}
        self._changes: Counter[type] = Counter()
        self._last: Callable[[], Any] = lambda: None

    def check(self, kind: type) -> None:
        """Raises `NotATree` for a type of objects that the forward changes again and again."""
        if kind in self._refused:
            raise NotATree(self._refused[kind])

    def known(self, kept: list[ObjectArg]) -> str | None:
        """Says why a call runs eagerly that passes these, as far as that is known; or returns None."""
        return next((self._filling[p.shape] for p in kept if p.shape in self._filling), None)

    def note(self, kept: list[ObjectArg]) -> None:
        """Notes what a call has changed.

        Raises:
            CaptureError: where that has become a habit.
        """
        for passed in kept:
            changed = passed.changed()
            if changed is None:
                continue
            what, again = changed
            why = f"it changes {what}, which no graph replays"
            if again:
                raise CaptureError(why)
            if len(self._filling) >= MAX_FILLING:
                self._filling.clear()
            self._filling[passed.shape] = why
            kind = type(passed.value)
            self._changes[kind] += self._last() is passed.value
            self._last = weakref.ref(passed.value)
            if self._changes[kind] == MAX_CHANGES:
                self._refused[kind] = f"{why}, in one call after another"
                raise CaptureError(self._refused[kind])


def _is_plain_object(value: Any) -> bool:
    """Tells whether all that `value` holds is in its `__dict__` and `__slots__`."""
    kind = type(value)
    if isinstance(value, (Tensor, nn.Module, type)) or callable(value):
        return False
    *classes, root = kind.__mro__
    if root is not object or not all(each.__flags__ & HEAP_TYPE for each in classes):
        return False
    members = [m for each in classes for m in vars(each).values() if isinstance(m, MemberDescriptorType)]
    known = object.__basicsize__ + _POINTER * (2 + len(members))  # its __dict__ and __weakref__ besides
    weakly = hasattr(kind, "__weakref__")
    return weakly and kind.__basicsize__ <= known and attributes_of(value) is not None


class _Walk:
    """Goes through what an object holds, always in the same order."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._seen: dict[int, int] = {}
        self._storages: dict[int, int] = {}

    def shape(self, value: Any, name: str, depth: int) -> Any:
        """Returns all of it but the values in tensors."""
        kind = type(value)
        if kind in EXACT_TENSORS:
            return self._tensor(value)
        plain = constant(value)
        if plain is not None:
            return plain
        if kind in (FunctionType, type) or isinstance(value, type):
            return Constant(kind, id(value), value)
        if id(value) in self._seen:
            return "again", self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        if depth > 0 and kind in _CONTAINERS:
            return kind, tuple(self._items(value, name, depth - 1))
        if depth > 0 and kind in (set, frozenset) and all(constant(item) for item in value):
            return kind, frozenset(constant(item) for item in value)
        if depth > 0 and _is_plain_object(value):
            return kind, tuple(self._attributes(value, name, depth - 1))
        raise NotATree(f"{name} is an object of type {kind.__module__}.{kind.__qualname__}")

    def _items(self, value: Any, name: str, depth: int) -> Iterator[tuple[Any, Any]]:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            known = constant(key)
            if known is None:
                raise NotATree(f"{name} has a key of type {type(key).__qualname__}")
            yield (f"[{key!r}]", known), self.shape(item, f"{name}[{key!r}]", depth)

    def _attributes(self, value: Any, name: str, depth: int) -> Iterator[tuple[Any, Any]]:
        slots = [(member.__name__, item) for member, item in slots_of(value)]
        for key, item in [*slots, *(attributes_of(value) or {}).items()]:
            yield (f".{key}", None), self.shape(item, f"{name}.{key}", depth)

    def _tensor(self, tensor: Tensor) -> Any:
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            raise NotATree(f"a tensor of layout {tensor.layout}, or a conjugate")
        self.tensors.append(tensor)
        storage = self._storages.setdefault(_C.storage_key(tensor), len(self._storages))
        return (
            *("tensor", type(tensor), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()),
            *(tensor.storage_offset(), tensor.requires_grad, tensor.is_inference(), storage),
            tensor.untyped_storage().nbytes(),
        )


def _difference(before: Any, now: Any, path: str) -> str:
    """Returns the path of the first thing that differs."""
    if not (_has_items(before) and _has_items(now)) or before[0] is not now[0]:
        return path
    mine, theirs = dict(before[1]), dict(now[1])
    for key in [*mine, *theirs]:
        if mine.get(key, path) != theirs.get(key, path):
            return _difference(mine.get(key), theirs.get(key), f"{path}{key[0]}")
    return path


def _has_items(shape: Any) -> bool:
    return type(shape) is tuple and len(shape) == 2 and type(shape[1]) is tuple


HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: classes written in Python; others can't be changed


# Objects of these keep caches of their own, which change what is fast and not what is right.
_PACKAGES = ("graphcache", "triton", "cupy", "numba", "cuda", "torch.ops", "torch.library", "torch.cuda")


_OPAQUE = (*(f"{package}." for package in _PACKAGES), "torch._")  # not a file such as cuda_ops.py


_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)


_NOT_SEARCHED = (*_PLAIN, type, FunctionType, BuiltinFunctionType, ModuleType, logging.Logger, Tensor)


def is_opaque(module: Any) -> bool:
    """Tells whether what is of the module of this name is no state of the user's."""
    return f"{module}.".startswith(_OPAQUE)


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Returns the `__dict__` of an object that has one, and is not known to matter to no forward."""
    if isinstance(value, _NOT_SEARCHED) or is_opaque(type(value).__module__):
        return None
    try:
        found = getattr(value, "__dict__", None)
    except Exception:  # a property of that name; what it hides is not found
        return None
    return found if type(found) is dict else None


def slots_of(value: Any) -> list[tuple[MemberDescriptorType, Any]]:
    """Returns what finds each of an object's `__slots__`, and what is there."""
    return [
        (member, getattr(value, name))
        for kind in type(value).__mro__
        if "__slots__" in vars(kind)  # members of classes of C are no state
        for name, member in vars(kind).items()
        if isinstance(member, MemberDescriptorType) and name != "__weakref__" and hasattr(value, name)
    ]
