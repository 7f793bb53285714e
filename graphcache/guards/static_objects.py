"""Objects that are passed to a forward and keep tensors for it: a cache of keys and values.

A graph reads and writes their tensors by address. So an object like the one of the capture adopts the
memory that the graph knows, once nobody uses that any more. Its storages get that memory in place of
their own, with their contents, and all views follow. As long as the same object comes and holds the same
things, which a native guard checks, nothing has to be done at all.

The caches of transformers are such objects: `generate` makes a new one each time.
"""

import re
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Set
from functools import partial
from itertools import count
from types import FunctionType, MemberDescriptorType
from typing import Any

import torch
from torch import Tensor, nn

from graphcache import _C
from graphcache.call.bound_call import BoundCall
from graphcache.call.object_args import ObjectArg
from graphcache.call.pytree import EXACT_TENSORS, Constant, NotATree, constant
from graphcache.guards.guards import Guards
from graphcache.guards.reachability import (
    ATTRIBUTES,
    DICT,
    HEAP_TYPE,
    Members,
    Source,
    Walker,
    attributes_of,
    key_of,
)
from graphcache.pool import GraphPool
from graphcache.report.reasons import Bypass, Reason

# Consecutive objects seen only once; after that the argument is not treated as persistent state.
MAX_IDLE = 8
DEPTH = 8  # containers and objects inside one that are looked at
_POINTER = 8  # bytes
MAX_COUNTERS = 256  # paths in one type of objects
_COUNTER = "counter"  # stands for an int in a shape
# The paths of the ints that forwards count in, by the type of the object.
_COUNTERS: "weakref.WeakKeyDictionary[type, frozenset[str]]" = weakref.WeakKeyDictionary()
_CONTAINERS = (list, tuple, dict, OrderedDict, defaultdict)


def read_object(value: Any, name: str) -> ObjectArg | None:
    """Reads all that an object holds; returns None for a value that is no such object.

    Raises:
        NotATree: if the object holds something that can't be compared with another object's.
    """
    if not _is_plain_object(value):
        return None
    shape = _Shape(name, _COUNTERS.get(type(value), frozenset()))
    shape.walk(value, name, DEPTH)
    return ObjectArg(name, value, tuple(shape.parts), shape.tensors, read_object, tuple(shape.counters))


def counters_like(passed: ObjectArg, places: Set[tuple[int, Any]]) -> list[Source]:
    """Returns the places of an object's ints that would be counters if those at `places` were some."""
    found = _Ints(passed)
    paths = _COUNTERS.get(type(passed.value), frozenset()).union(found.paths_of(places))
    return [source for path, source in found.ints if path in paths]


def add_counters(passed: ObjectArg, places: Set[tuple[int, Any]]) -> bool:
    """Has ints of an object be no part of its shape from here on, as in all objects of its type.

    Args:
        passed: the object.
        places: the keys of the places of the ints; those elsewhere are left out.

    Returns:
        Whether there are new ones.
    """
    known = _COUNTERS.get(type(passed.value), frozenset())
    paths = known.union(_Ints(passed).paths_of(places))
    if len(paths) > MAX_COUNTERS:
        raise Bypass(
            Reason.TOO_MANY_SIGNATURES, text="more counters in an object than can be told apart"
        )
    _COUNTERS[type(passed.value)] = paths
    return paths != known


def containers_of(passed: ObjectArg) -> set[int]:
    """Returns the addresses of the dicts and lists that an object consists of."""
    return _Ints(passed).containers


def _path(label: str, name: str) -> str:
    """Returns the path of a counter, alike in all items of a list."""
    return re.sub(r"\[\d+\]", "[*]", label[len(name) :])


class _Ints(Walker):
    """The dicts and lists of an object, and the paths of the ints in it."""

    follows_classes = False

    def __init__(self, passed: ObjectArg) -> None:
        super().__init__()
        self.containers: set[int] = set()
        self.ints: list[tuple[str, Source]] = []
        self._name = passed.name
        self.walk(passed.value, passed.name, DEPTH)

    def paths_of(self, places: Set[tuple[int, Any]]) -> set[str]:
        """Returns the paths of the ints at these places."""
        return {path for path, source in self.ints if key_of(source) in places}

    def enter(self, value: Any, label: str, depth: int, is_new: bool) -> bool:
        return not isinstance(value, Tensor)

    def take(self, members: Members, held: bool) -> Iterable[tuple[str, Any]]:
        container = _table_of(members)
        self.containers.add(id(container))
        for key, item in members.items:
            if type(item) is int:
                label = members.label_of(key)
                self.ints.append((_path(label, self._name), Source(container, key, item, label)))
        return members.reachable()


def _table_of(members: Members) -> Any:
    is_table = members.kind is ATTRIBUTES
    return attributes_of(members.container) if is_table else members.container


def _is_plain_object(value: Any) -> bool:
    """Return True if the `__dict__` and the `__slots__` of `value` are all that it has."""
    kind = type(value)
    if isinstance(value, (Tensor, nn.Module, type)) or callable(value):
        return False
    classes = kind.__mro__[:-1]
    of_python = all(each.__flags__ & HEAP_TYPE for each in classes) and hasattr(kind, "__weakref__")
    slots = [m for each in classes for m in vars(each).values() if isinstance(m, MemberDescriptorType)]
    known = object.__basicsize__ + _POINTER * (2 + len(slots))  # its __dict__ and __weakref__ besides
    return of_python and kind.__basicsize__ <= known and attributes_of(value) is not None


class _Shape(Walker):
    """All that an object holds but the values in tensors, in the order of the walk.

    Attributes:
        parts: the depth, the path and the kind or value of each thing.
        tensors: those in it.
        counters: the places of ints that forwards count in.
    """

    follows_classes = False

    def __init__(self, name: str, counted: Set[str]) -> None:
        super().__init__()
        self.counters: list[Source] = []
        self._counted = counted
        self.parts: list[tuple[int, str, Any]] = []
        self.tensors: list[Tensor] = []
        self._name = name
        self._numbers: dict[int, int] = {}
        self._storages: dict[int, int] = {}
        self._tensor_numbers: dict[int, int] = {}

    def enter(self, value: Any, label: str, depth: int, is_new: bool) -> bool:
        counts = type(value) is int and self._counted and _path(label, self._name) in self._counted
        part = _COUNTER if counts else self._part(value, label, depth)
        self.parts.append((depth, label[len(self._name) :], part))
        return part is type(value)

    def take(self, members: Members, held: bool) -> Iterable[tuple[str, Any]]:
        for key, _ in members.items if members.kind is DICT else ():
            known = constant(key)
            if known is None:
                raise NotATree(f"{members.label} has a key of type {type(key).__qualname__}")
            self.parts.append((0, members.label_of(key)[len(self._name) :], known))
        for key, item in members.items if self._counted else ():
            label = members.label_of(key)
            if type(item) is int and _path(label, self._name) in self._counted:
                self.counters.append(Source(_table_of(members), key, item, label))
        return [(members.label_of(key), item) for key, item in members.items]

    def _part(self, value: Any, label: str, depth: int) -> Any:
        """Returns what stands for a value; its type where its members follow."""
        kind = type(value)
        if kind in EXACT_TENSORS:
            return self._tensor(value)
        if (plain := constant(value)) is not None:
            return plain
        if kind is FunctionType or issubclass(kind, type):
            return Constant(kind, id(value), value)
        if id(value) in self._numbers:
            return "again", self._numbers[id(value)]
        self._numbers[id(value)] = len(self._numbers)
        if depth > 0:
            if kind in _CONTAINERS or _is_plain_object(value):
                return kind
            if kind in (set, frozenset) and all(constant(item) for item in value):
                return kind, tuple(constant(item) for item in value)  # a loop over it has an order
        raise NotATree(f"{label} is an object of type {kind.__module__}.{kind.__qualname__}")

    def _tensor(self, tensor: Tensor) -> Any:
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            raise NotATree(f"a tensor of layout {tensor.layout}, or a conjugate")
        self.tensors.append(tensor)
        storage = self._storages.setdefault(_C.storage_key(tensor), len(self._storages))
        return (
            *("tensor", type(tensor), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()),
            *(tensor.storage_offset(), tensor.requires_grad, tensor.is_inference(), storage),
            *(
                tensor.untyped_storage().nbytes(),
                self._tensor_numbers.setdefault(id(tensor), len(self.tensors)),
            ),
        )


class Slot:
    """The object that the graphs of some signatures were captured with, or one in its place.

    Attributes:
        native: the object of now, as native code compares it.
        number: slots that are older have smaller ones.
    """

    _numbers = count()

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.native = _C.StaticObject()
        self._guards: Guards | None = None  # native code knows it weakly
        self._memory: list[_C.LeasedMemory] | None = None
        self._idle = 0
        self._rejected: Callable[[], Any] = lambda: None

    def memory(self) -> list[_C.LeasedMemory]:
        """Returns the memory that graphs know; none before the first capture."""
        return self._memory or []

    def is_empty(self) -> bool:
        """Return True if the object of the slot is gone."""
        return self.native.object is None

    def adopt(self, passed: ObjectArg, pool: GraphPool, placed: Set[int]) -> bool:
        """Gives the object the memory that graphs know; returns False where another object uses that.

        Args:
            passed: the object.
            pool: the pool of the graphs.
            placed: keys of the storages of other objects of the call, which stay where they are.

        Raises:
            NotATree: where the object can't be guarded, or is another one each time.
        """
        if self.native.holds(passed.value):
            if self._guards is not None and self._guards.check(grad=True):
                return True
        elif self._memory is not None and not self.is_empty():
            return False  # both are in use
        if any(_C.is_weak(tensor) for tensor in passed.tensors):
            raise NotATree(
                f"{passed.name} holds an output of a graph; put a .clone() into it",
                Reason.OBJECT_HOLDS_OUTPUT,
            )
        self._guards = None  # it held the tensors of the last object
        if self._memory is not None and not self._move(passed, pool, placed):
            self.native.release()
            return False
        free = [(source, True) for source in passed.counters]
        self._guards = Guards.of_object(passed.value, passed.name, DEPTH, passed.tensors, free)
        if self._guards.unguarded:
            raise NotATree(
                f"{passed.name} holds tensors in a way that can't be watched", Reason.OBJECT_UNGUARDED
            )
        self._reference = weakref.ref(passed.value, partial(_forget, weakref.ref(self)))
        counters = [(source.container, source.key) for source in passed.counters]
        self.native.bind(passed.value, self._guards.native, passed.tensors, counters)
        return True

    def _move(self, passed: ObjectArg, pool: GraphPool, placed: Set[int]) -> bool:
        pairs = zip(self._memory or (), _storages(passed.tensors, pool.device), strict=True)
        foreign = [(memory, tensor) for memory, tensor in pairs if not memory.is_leased_to(tensor)]
        if any(memory.is_leased() or _C.storage_key(tensor) in placed for memory, tensor in foreign):
            return False
        again = self._rejected() is passed.value
        self._idle = 0 if again or self.native.calls or not foreign else self._idle + 1
        if self._idle > MAX_IDLE:
            self._rejected = weakref.ref(passed.value)
            raise NotATree(
                f"{passed.name} is another object at each call, each used once; pass its tensors as "
                "arguments of their own",
                Reason.OBJECT_EACH_CALL,
            )
        # Graphs may still read the memory that is written to, on a stream that the caller has left.
        pool.use_here([tensor for _, tensor in foreign])
        for memory, tensor in foreign:
            memory.adopt(tensor)
        return True

    def lease(self, passed: ObjectArg, device: torch.device, known: list[_C.LeasedMemory]) -> None:
        """Takes the memory of the object before the first capture, and leases it back.

        Args:
            passed: the object.
            device: the device of the graphs.
            known: memory of the call's other objects, which may hold the same storages; grows.
        """
        if self._memory is None:
            self._memory = []
            for tensor in _storages(passed.tensors, device):
                shared = (memory for memory in known if memory.is_leased_to(tensor))
                self._memory.append(next(shared, None) or _C.LeasedMemory(tensor))
        known.extend(self._memory)


def lease_all(call: BoundCall, device: torch.device) -> None:
    """Takes the memory of the call's objects before the first capture, and leases it back."""
    known = [memory for slot in call.slots for memory in slot.memory()]
    for passed, slot in zip(call.objects, call.slots, strict=True):
        slot.lease(passed, device, known)


def _forget(slot: "weakref.ref[Slot]", _: Any) -> None:
    found = slot()
    if found is not None and found.is_empty():
        found._guards = None  # and with them the tensors of an object that is gone


_SLOTS: "weakref.WeakKeyDictionary[GraphPool, Slots]" = weakref.WeakKeyDictionary()


def with_slots(call: BoundCall, pool: GraphPool) -> BoundCall:
    """Returns the call with a slot in `pool` for each of its objects; slots become part of the key.

    Raises:
        Bypass: where an object can't have one.
    """
    if not call.objects:
        return call
    slots = _SLOTS.setdefault(pool, Slots())
    found: tuple[Slot, ...] = ()
    placed: set[int] = set()
    try:
        for passed in call.objects:
            found += (slots.of(passed, pool, placed, found),)
            placed.update(map(_C.storage_key, passed.tensors))
    except NotATree as error:
        raise Bypass(error.reason, text=str(error)) from None
    return call._replace(slots=found, key=(*call.key, *found))


class Slots:
    """The slots of one pool, by the shape of their objects; each lives as long as graphs use it."""

    def __init__(self) -> None:
        self._by_shape: dict[Any, weakref.WeakSet[Slot]] = {}

    def of(self, passed: ObjectArg, pool: GraphPool, placed: Set[int], taken: Collection[Slot]) -> Slot:
        """Returns a slot for the object: its own, an empty one that it moves into, or a new one.

        Args:
            passed: the object.
            pool: the pool of the graphs.
            placed: see `Slot.adopt`.
            taken: the slots of other objects of the call.

        Raises:
            NotATree: where the object can't be guarded, or is another one each time.
        """
        shape = passed.shape, passed.shared
        alike = self._by_shape.get(shape, ())
        free = (slot for slot in alike if slot not in taken or slot.native.holds(passed.value))
        slots = sorted(free, key=lambda slot: (not slot.native.holds(passed.value), slot.number))
        slot = next(slot for slot in (*slots, Slot()) if slot.adopt(passed, pool, placed))
        self._by_shape = {key: slots for key, slots in self._by_shape.items() if slots}
        self._by_shape.setdefault(shape, weakref.WeakSet()).add(slot)
        return slot


def _storages(tensors: list[Tensor], device: torch.device) -> Iterable[Tensor]:
    """Returns a tensor for each storage on the device, in the order of the object."""
    there = (t for t in tensors if t.device == device and t.untyped_storage().nbytes())
    return {_C.storage_key(tensor): tensor for tensor in there}.values()
