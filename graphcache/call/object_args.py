"""Objects among the arguments that hold tensors, and the changes that a forward makes to them."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphcache import _C
from graphcache.call.pytree import NotATree
from graphcache.errors import CaptureError
from graphcache.report.reasons import Bypass, Reason

MAX_CHANGES = 3  # calls that change the object that the one before changed
MAX_FILLING = 256


class ObjectArg(NamedTuple):
    """One such object, in one call.

    Attributes:
        name: the path of the argument.
        value: the object.
        shape: all that it holds but the values in tensors, each part with its depth and its path: two of
            equal shape are alike to a graph.
        tensors: those that it holds.
        read: reads an object, given its name; None where it is no such object.
        counters: the places of its ints that forwards count in, which are no part of its shape.
        shared: the positions of tensors that an earlier object of the call holds, too, and theirs.
    """

    name: str
    value: Any
    shape: tuple[tuple[int, str, Any], ...]
    tensors: list[Tensor]
    read: Callable[[Any, str], "ObjectArg | None"]
    counters: tuple[Any, ...] = ()
    shared: tuple[tuple[int, int], ...] = ()

    def after(self, earlier: "list[ObjectArg]") -> "ObjectArg":
        """Returns the object with what it shares with earlier ones of the call."""
        again = next((passed for passed in earlier if passed.value is self.value), None)
        if again is not None:
            return self._replace(shared=again.shared)
        held = {id(tensor): i for i, tensor in enumerate(t for p in earlier for t in p.tensors)}
        shared = ((i, held[id(t)]) for i, t in enumerate(self.tensors) if id(t) in held)
        return self._replace(shared=tuple(shared))

    def changed(self) -> tuple[str, bool] | None:
        """Compares the object of now with the one that was read.

        Returns:
            The path of something that changed, and whether the next call would pass an object of the
            same shape; None where nothing changed.
        """
        try:
            now = self.read(self.value, self.name)
        except NotATree:
            now = None
        if now is None:
            return self.name, False
        if now.shape != self.shape:
            differing = set(self.shape) ^ set(now.shape)
            paths = (part[1] for part in (*self.shape, *now.shape) if part in differing)
            return f"{self.name}{next(paths, '')}", False
        same = all(a is b for a, b in zip(self.tensors, now.tensors, strict=True))
        return None if same else (f"the tensors of {self.name}", True)


def shared_memory(objects: list[ObjectArg], arguments: list[Tensor]) -> tuple[Any, ...]:
    """Returns which tensors of several objects share memory, and which of them are the same.

    Raises:
        Bypass: where an argument lies in the memory of an object.
    """
    held = [_C.storage_key(tensor) for passed in objects for tensor in passed.tensors]
    given = (tensor for tensor in arguments if tensor.layout is torch.strided)
    if held and not set(map(_C.storage_key, given)).isdisjoint(held):
        raise Bypass(Reason.SHARES_WITH_OBJECT)
    if len(objects) < 2:
        return ()
    first: dict[int, int] = {}
    memory = (first.setdefault(storage, index) for index, storage in enumerate(held))
    return (*memory, *(passed.shared for passed in objects))


class MutationHistory:
    """The changes that a forward makes to the objects that it is passed, but for values in tensors.

    To fill a new one, as the first step of a decode does, is no habit: such calls run eagerly, and later
    ones have graphs. To change it in one call after another is, such as to count.
    """

    def __init__(self) -> None:
        self._filling: dict[Any, str] = {}  # shapes that a call changed, and why that is eager
        self._rejected: dict[type, str] = {}
        self._changes: Counter[type] = Counter()
        self._last: Callable[[], Any] = lambda: None

    def check(self, kind: type) -> None:
        """Raises `NotATree` for a type of objects that the forward changes again and again."""
        if kind in self._rejected:
            raise NotATree(self._rejected[kind], Reason.OBJECT_CHANGES)

    def known(self, objects: list[ObjectArg]) -> str | None:
        """Returns why a call that passes these runs eagerly, as far as that is known; or None."""
        return next((self._filling[p.shape] for p in objects if p.shape in self._filling), None)

    def note(self, objects: list[ObjectArg]) -> None:
        """Notes the changes that a call has made.

        Raises:
            CaptureError: where that has become a habit.
        """
        for passed in objects:
            changed = passed.changed()
            if changed is None:
                continue
            what, again = changed
            why = f"it changes {what}, which no graph replays"
            if again:
                raise CaptureError(why, reason=Reason.OBJECT_CHANGES)
            if len(self._filling) >= MAX_FILLING:
                self._filling.clear()
            self._filling[passed.shape] = why
            kind = type(passed.value)
            self._changes[kind] += self._last() is passed.value
            self._last = weakref.ref(passed.value)
            if self._changes[kind] == MAX_CHANGES:
                self._rejected[kind] = f"{why}, in one call after another"
                raise CaptureError(self._rejected[kind], reason=Reason.OBJECT_CHANGES)
