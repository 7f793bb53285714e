"""Objects that are passed to a forward and keep tensors for it: a cache of keys and values.

A graph reads and writes their tensors by address. So an object like the one of the capture is let into
the memory that the graph knows, once nobody uses that any more: its storages get that memory in place of
their own, with what they held, and all views follow. As long as it is the same object and holds the same
things, which a native guard sees, nothing has to be done at all.

The caches of transformers are such objects: `generate` makes a new one each time.
"""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphcache import _C
from graphcache.call.bound_call import BoundCall
from graphcache.call.object_args import DEPTH, ObjectArg
from graphcache.call.pytree import NotATree
from graphcache.guards.guards import Guards
from graphcache.pool import GraphPool
from graphcache.report.reasons import Bypass

MAX_IDLE = 8  # objects in a row that were let in and not passed again: then it is no state


BeforeMove = Callable[[list[Tensor]], None]


class Slot:
    """What the graphs of some signatures were captured with in place of such an object.

    Attributes:
        native: the object that is at home there now, as native code compares it.
    """

    def __init__(self) -> None:
        self.native = _C.StaticObject()
        self._guards: Guards | None = None  # native code knows it weakly
        self._memory: list[_C.LeasedMemory] | None = None
        self._idle = 0
        self._refused: Callable[[], Any] = lambda: None

    def is_empty(self) -> bool:
        """Tells whether its object is gone."""
        return self.native.object is None

    def adopt(self, passed: ObjectArg, device: torch.device, before: BeforeMove) -> bool:
        """Makes the memory that graphs know that of the object; tells whether it could be."""
        if self.native.holds(passed.value):
            if self._guards is not None and self._guards.check(grad=True):
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
        if self._guards.unguarded:
            raise NotATree(f"{passed.name} holds tensors in a way that can't be watched")
        self._watch = weakref.ref(passed.value, partial(_forget, weakref.ref(self)))
        self.native.bind(passed.value, self._guards.native)
        return True

    def _move(self, passed: ObjectArg, device: torch.device, before: BeforeMove) -> bool:
        pairs = list(zip(self._memory or (), _storages(passed.tensors, device), strict=True))
        foreign = [(memory, tensor) for memory, tensor in pairs if not memory.is_leased_to(tensor)]
        if any(memory.is_leased() for memory, _ in foreign):
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
            memory.adopt(tensor)
        return True

    def lease(self, passed: ObjectArg, device: torch.device) -> None:
        """Takes the memory of the object before the first capture, and lends it back."""
        if self._memory is None:
            self._memory = [_C.LeasedMemory(tensor) for tensor in _storages(passed.tensors, device)]

    def forget(self) -> None:
        """Lets go of the tensors of an object that is gone."""
        self._guards = None


def _forget(slot: "weakref.ref[Slot]", _: Any) -> None:
    found = slot()
    if found is not None and found.is_empty():
        found.forget()


_SLOTS: "weakref.WeakKeyDictionary[GraphPool, Slots]" = weakref.WeakKeyDictionary()


def with_slots(call: BoundCall, pool: GraphPool) -> BoundCall:
    """Returns the call with a home in `pool` for each of `kept`, which become part of the key.

    Raises:
        Unservable: where an object can't have one.
    """
    if not call.objects:
        return call
    slots = _SLOTS.setdefault(pool, Slots(partial(_before_move, weakref.ref(pool))))
    try:
        found = tuple(slots.of(passed, pool.device) for passed in call.objects)
    except NotATree as error:
        raise Bypass(str(error)) from None
    return call._replace(slots=found, key=(*call.key, *found))


def _before_move(pool: "weakref.ref[GraphPool]", tensors: list[Tensor]) -> None:
    # Graphs may still read the memory that is written to, on a stream that the caller has left.
    found = pool()
    if found is not None:
        found.use_here(tensors)


class Slots:
    """The homes of one pool, by shape; they live as long as graphs use them.

    Args:
        before: called before the contents of tensors are moved, with these.
    """

    def __init__(self, before: BeforeMove) -> None:
        self._before = before
        self._by_shape: dict[Any, weakref.WeakSet[Slot]] = {}

    def of(self, passed: ObjectArg, device: torch.device) -> Slot:
        """Returns a home for the object: its own, an empty one that it moves into, or a new one.

        Raises:
            NotATree: where it can't be watched, or is another object each time.
        """
        slots = list(self._by_shape.get(passed.shape, ()))
        for slot in sorted(slots, key=lambda slot: not slot.native.holds(passed.value)):
            if slot.adopt(passed, device, self._before):
                return slot
        slot = Slot()
        slot.adopt(passed, device, self._before)
        self._by_shape = {shape: slots for shape, slots in self._by_shape.items() if slots}
        self._by_shape.setdefault(passed.shape, weakref.WeakSet()).add(slot)
        return slot


def _storages(tensors: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yields a tensor for each storage on the device, in the order of the object."""
    seen: set[int] = set()
    for tensor in tensors:
        key = _C.storage_key(tensor)
        if tensor.device == device and key not in seen and tensor.untyped_storage().nbytes():
            seen.add(key)
            yield tensor
