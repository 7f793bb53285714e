"""Objects that are passed to a forward and keep tensors for it: a cache of keys and values.

A graph reads and writes their tensors by address. So an object like the one of the capture is let into
the memory that the graph knows, once nobody uses that any more: its storages get that memory in place of
their own, with what they held, and all views follow. As long as it is the same object and holds the same
things, which a native guard sees, nothing has to be done at all.

The caches of transformers are such objects: `generate` makes a new one each time.
"""

import weakref
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MemberDescriptorType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphcache import _C
from graphcache.errors import CaptureError
from graphcache.guards import Guards
from graphcache.places import HEAP_TYPE, attributes_of, slots_of
from graphcache.tree import EXACT_TENSORS, Constant, NotATree, constant

DEPTH = 8  # containers and objects inside one that are looked at
MAX_IDLE = 8  # objects in a row that were let in and not passed again: then it is no state

MAX_CHANGES = 3  # calls that change the object that the one before changed
MAX_FILLING = 256

_POINTER = 8  # bytes
BeforeMove = Callable[[list[Tensor]], None]
_CONTAINERS = (list, tuple, dict, OrderedDict, defaultdict)


class Passed(NamedTuple):
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
    def read(cls, value: Any, name: str) -> "Passed | None":
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


class Home:
    """What the graphs of some signatures were captured with in place of such an object.

    Attributes:
        native: the object that is at home there now, as native code compares it.
    """

    def __init__(self) -> None:
        self.native = _C.Keeper()
        self._guards: Guards | None = None  # native code knows it weakly
        self._memory: list[_C.Memory] | None = None
        self._idle = 0
        self._refused: Callable[[], Any] = lambda: None

    def is_empty(self) -> bool:
        """Tells whether its object is gone."""
        return self.native.object is None

    def let_in(self, passed: Passed, device: torch.device, before: BeforeMove) -> bool:
        """Makes the memory that graphs know that of the object; tells whether it could be."""
        if self.native.holds(passed.value):
            if self._guards is not None and self._guards.hold(grad=True):
                return True
        elif self._memory is not None and not self.is_empty():
            return False  # both are in use
        if any(_C.is_weak(tensor) for tensor in passed.tensors):
            raise NotATree(f"{passed.name} holds an output of a graph; put a .clone() into it")
        self._guards = None  # it held the tensors of the last object
        if self._memory is not None and not self._move(passed, device, before):
            self.native.release()
            return False
        self._guards = Guards.of_object(passed.value, passed.name, DEPTH, passed.tensors)
        if self._guards.unwatched:
            raise NotATree(f"{passed.name} holds tensors in a way that can't be watched")
        self._watch = weakref.ref(passed.value, partial(_forget, weakref.ref(self)))
        self.native.bind(passed.value, self._guards.native)
        return True

    def _move(self, passed: Passed, device: torch.device, before: BeforeMove) -> bool:
        pairs = list(zip(self._memory or (), _storages(passed.tensors, device), strict=True))
        foreign = [(memory, tensor) for memory, tensor in pairs if not memory.is_lent_to(tensor)]
        if any(memory.is_lent() for memory, _ in foreign):
            return False
        again = self._refused() is passed.value
        self._idle = 0 if again or self.native.calls or not foreign else self._idle + 1
        if self._idle > MAX_IDLE:
            self._refused = weakref.ref(passed.value)
            raise NotATree(
                f"{passed.name} is another object at each call, each used once; pass its tensors as "
                "arguments of their own"
            )
        before([tensor for _, tensor in foreign])
        for memory, tensor in foreign:
            memory.move_in(tensor)
        return True

    def lend(self, passed: Passed, device: torch.device) -> None:
        """Takes the memory of the object before the first capture, and lends it back."""
        if self._memory is None:
            self._memory = [_C.Memory(tensor) for tensor in _storages(passed.tensors, device)]

    def forget(self) -> None:
        """Lets go of the tensors of an object that is gone."""
        self._guards = None


def _forget(home: "weakref.ref[Home]", _: Any) -> None:
    found = home()
    if found is not None and found.is_empty():
        found.forget()


class Homes:
    """The homes of one pool, by shape; they live as long as graphs use them.

    Args:
        before: called before the contents of tensors are moved, with these.
    """

    def __init__(self, before: BeforeMove) -> None:
        self._before = before
        self._by_shape: dict[Any, weakref.WeakSet[Home]] = {}

    def of(self, passed: Passed, device: torch.device) -> Home:
        """Returns a home for the object: its own, an empty one that it moves into, or a new one.

        Raises:
            NotATree: where it can't be watched, or is another object each time.
        """
        homes = list(self._by_shape.get(passed.shape, ()))
        for home in sorted(homes, key=lambda home: not home.native.holds(passed.value)):
            if home.let_in(passed, device, self._before):
                return home
        home = Home()
        home.let_in(passed, device, self._before)
        self._by_shape = {shape: homes for shape, homes in self._by_shape.items() if homes}
        self._by_shape.setdefault(passed.shape, weakref.WeakSet()).add(home)
        return home


class Habits:
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

    def known(self, kept: list[Passed]) -> str | None:
        """Says why a call runs eagerly that passes these, as far as that is known; or returns None."""
        return next((self._filling[p.shape] for p in kept if p.shape in self._filling), None)

    def note(self, kept: list[Passed]) -> None:
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


def _storages(tensors: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yields a tensor for each storage on the device, in the order of the object."""
    seen: set[int] = set()
    for tensor in tensors:
        key = _C.storage_key(tensor)
        if tensor.device == device and key not in seen and tensor.untyped_storage().nbytes():
            seen.add(key)
            yield tensor


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
