"""The guards of a graph: all that it captured by address or by value, compared on every call.

A graph reads the addresses and the Python values of its capture for ever. So each source from which the
forward could get one (a parameter, a buffer, an attribute, a container or an object in it, a closure, a
global) is guarded: the same object must still be there, tensors at the same address. Python searches,
once; the native guard compares.
"""

import os
from collections import deque
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from types import CodeType, MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from graphcache import _C
from graphcache.guards.reachability import (
    ABSENT,
    ATTRIBUTES,
    CLASS,
    DICT,
    EXTRA,
    FIXED,
    ITEMS,
    LIST,
    LONGEST,
    LOOSE,
    MODULE,
    SCOPE,
    Members,
    Source,
    Walker,
    attributes_of,
    is_iterator,
    is_library_function,
    is_library_module,
    is_plain,
    is_weak,
    key_of,
    named_in,
)
from graphcache.runtime.op_schemas import overrides_dispatch

LARGEST_BUFFER = 64 * 2**10  # bytes of a host array that are compared on every call


class ReadSet(NamedTuple):
    """The code that a forward ran, and the names that this code can read.

    Attributes:
        names: attributes that the code can read; None where it may read any.
        users_names: names in code that is no library's; they are looked up in Python modules.
        code: the forward, and the classes and functions among its arguments.
        sources: those of globals, imports and closures.
        ran: the code that ran and is no library's, by its address and that of its globals.
        calls_root: whether the forward calls the module that it is bound to, and so the hooks of that.
    """

    names: frozenset[str] | None
    users_names: frozenset[str]
    code: list[Any]
    sources: list[Source]
    ran: Mapping[tuple[int, int], CodeType] = MappingProxyType({})
    calls_root: bool = False

    def united(self, other: "ReadSet") -> "ReadSet":
        """Returns what either of two runs of one forward can read."""
        names = None if self.names is None or other.names is None else self.names | other.names
        return ReadSet(
            names,
            self.users_names | other.users_names,
            self.code,
            [*self.sources, *other.sources],
            {**self.ran, **other.ran},
            self.calls_root or other.calls_root,
        )


class Guards:
    """Everything that the graphs of one signature depend on besides their arguments.

    Attributes:
        native: holds and compares it.
        unguarded: tensors that the forward reached, and for which no source was found.
        iterators: names of iterators, which no replay would advance.
        places: the places among those asked for that were found.
        held: those of them whose containers the guard keeps alive.
    """

    def __init__(self, builder: "_GuardBuilder | None" = None, unguarded: Iterable[Tensor] = ()) -> None:
        found = builder or _GuardBuilder()
        self.native, self.iterators = found.native, found.iterators
        self.unguarded = list(unguarded)
        self.places, self.held = found.places, found.held

    def check(self, *, grad: bool) -> bool:
        """Return True if all is as it was; with `grad`, only if nothing requires gradients either."""
        return self.native.check(grad)

    def explain(self, *, grad: bool) -> str:
        """Names the first thing that is not as it was, for a message."""
        found = self.native.explain(grad)
        if found is None:
            return "something that is back to what it was"
        return found.lstrip(".") or "the module itself"

    @classmethod
    def find(
        cls,
        instance: Any,
        reads: ReadSet,
        reached: Iterable[Tensor],
        external: Iterable[Tensor],
        free: Iterable[tuple[Source, bool]] = (),
    ) -> "Guards":
        """Finds every source from which the forward gets the things that it reads.

        Args:
            instance: the object that the forward is bound to, or None.
            reads: which code ran, and so which names count.
            reached: the tensors that the forward read or wrote and was not given, as far as somebody
                holds them still.
            external: a tensor for each storage of such, whether somebody holds it still or not.
            free: places to be found, and whether the value there is not compared.

        Returns:
            The guards; `unguarded` holds those of `reached` and `external` that have no source.
        """
        root = None if reads.calls_root else instance
        builder = _GuardBuilder(root, reads.names, reads.users_names, free)
        for hooks in (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks):
            builder.native.add_dict(hooks, "hooks of every module", named=False, held=True)
        builder.walk(instance, "")
        for code in reads.code:
            builder.walk(code, getattr(code, "__qualname__", ""), held=False)
        builder.walk_class(Tensor)
        if builder.counts("environ"):
            builder.walk(os.environ, "os.environ")
        for source in reads.sources:
            builder.add_source(source)
            if builder.is_free(source):
                continue
            if source.value is not ABSENT and not is_library_function(source.value):
                builder.walk(source.value, source.label)
        storages = {_C.storage_key(tensor) for tensor in builder.tensors.values()}
        unguarded = [tensor for tensor in reached if id(tensor) not in builder.tensors]
        unguarded += [tensor for tensor in external if _C.storage_key(tensor) not in storages]
        return cls(builder, unguarded)

    @classmethod
    def of_object(
        cls,
        value: Any,
        name: str,
        depth: int,
        tensors: Iterable[Tensor],
        free: Iterable[tuple[Source, bool]] = (),
    ) -> "Guards":
        """Guards all of one object; `unguarded` holds those of `tensors` that were not found in it."""
        builder = _GuardBuilder(free=free)
        builder.walk(value, name, depth)
        return cls(builder, [tensor for tensor in tensors if id(tensor) not in builder.tensors])


class _GuardBuilder(Walker):
    """Adds to a native guard all that can be reached and counts.

    Args:
        root: the module whose hooks run outside the forward; or None.
        names: the attributes that count, or None for all.
        users_names: those of them that the user's code names.
        free: places to be found, and whether the value there is not compared.
    """

    def __init__(
        self,
        root: Any = None,
        names: frozenset[str] | None = None,
        users_names: frozenset[str] = frozenset(),
        free: Iterable[tuple[Source, bool]] = (),
    ) -> None:
        super().__init__(root)
        self.native = _C.Guard(names, "requires_grad" in users_names)
        self.places: set[tuple[int, Any]] = set()
        self.held: set[tuple[int, Any]] = set()
        self._free = {key_of(source): is_free for source, is_free in free}
        for source, is_free in free:
            if is_free:
                self.native.free(source.container, source.key)
            if type(source.container) is list:  # effects know it by its address
                self.native.pin(source.container)
        self.tensors: dict[int, Tensor] = {}
        self.iterators: list[str] = []
        self._names, self._users_names = names, users_names
        self._sources: set[tuple[int, Any]] = set()

    def enter(self, value: Any, label: str, depth: int, is_new: bool) -> bool:
        kind = type(value)
        if issubclass(kind, nn.Module):
            if is_new:
                self.native.add_module(value, label, is_root=value is self._root)
        elif issubclass(kind, Tensor):
            if not _has_address(value):
                return False
            if id(value) not in self.tensors:
                self.tensors[id(value)] = value
                self.native.add_tensor(value, label)
        elif is_weak(value):
            if is_new:
                self.native.add_reference(value, label)
        elif issubclass(kind, finalize):
            table: Any = finalize._registry  # type: ignore[attr-defined]
            self.add_source(Source(table, value, table.get(value, ABSENT), label))
            return False
        elif is_iterator(value):
            self.iterators.append(f"{label} ({kind.__name__})")
            return False
        elif is_new and (array := bytes_of(value)) is not None:
            self.native.add_bytes(array, label)
        return True

    def take(self, members: Members, held: bool) -> Iterable[tuple[str, Any]]:
        kind, container, items, label = members
        if kind in (FIXED, LOOSE, LIST):
            self._pin(item for _, item in items)
        if kind is FIXED:  # perhaps of a weak proxy, which nobody may ask
            return members.reachable()
        if kind is LOOSE:
            for _, item in items:
                self.native.keep(item)  # not compared, so it has to live
        if kind is SCOPE:
            items = named_in(container, self._users_names)
            if self._names is None and not is_library_module(container):
                items += [item for item in container.items() if is_plain(item[1])]
        # Code of C shows all of a namespace to whoever prints it.
        elif kind in (MODULE, ATTRIBUTES, CLASS, EXTRA) and not isinstance(container, SimpleNamespace):
            items = [item for item in items if self.counts(item[0])]
        members = Members(kind, container, items, label)
        reachable = self._without_free(members) if self._free else members
        is_long = kind is not SCOPE and len(items) > LONGEST
        if isinstance(container, set) and is_long:
            return ()
        if kind in (SCOPE, ITEMS, EXTRA) or (is_long and kind in (DICT, LIST)):
            self._add_sources(members, plain=not is_long)
        elif kind is LIST:
            self.native.add_items(container, label)
        elif isinstance(container, SimpleNamespace):
            self.native.add_dict(vars(container), label, named=False, held=held)
        elif kind is ATTRIBUTES and type(container).__weakrefoffset__:
            self.native.add_object(container, label)
        elif kind in (DICT, ATTRIBUTES, CLASS):
            table: Any = attributes_of(container) if kind is ATTRIBUTES else container
            self.native.add_dict(table, label, named=kind is not DICT, held=held)
        return reachable.reachable()

    def _without_free(self, members: Members) -> Members:
        """Notes which of the places are among members; returns those that the walk goes on with."""
        kind, table = members.kind, members.container
        if kind in (MODULE, ATTRIBUTES):
            table = vars(table) if kind is MODULE else attributes_of(table)
        self.places.update(self._free.keys() & {(id(table), key) for key, _ in members.items})
        items = [item for item in members.items if not self._free.get((id(table), item[0]))]
        return members._replace(items=items)

    def _add_sources(self, members: Members, *, plain: bool) -> None:
        """Guards members one by one, where no container is compared; plain ones only if asked to."""
        container = members.container
        for key, item in members.items:
            if plain or not is_plain(item):
                self.add_source(Source(container, key, item, members.label_of(key)))
        if isinstance(container, deque) or (isinstance(container, ContextVar) and not members.items):
            self.add_source(Source(container, len(members.items), ABSENT, members.label))

    def add_source(self, source: Source) -> None:
        """Guards a source by itself, where comparing no container is enough."""
        known = id(source.container), source.key
        if known in self._sources:
            return
        self._sources.add(known)
        self._pin([source.value])
        if known in self._free:
            self.places.add(known)
            self.held.add(known)
            if self._free[known]:
                return
        if source.value is ABSENT:
            self.native.add_absence(source.container, source.key, source.label)
        else:
            self.native.add_source(*source)

    def _pin(self, values: Iterable[Any]) -> None:
        """Has lists stay the same objects, as they are in places that are not compared by attribute."""
        for value in values:
            if type(value) is list:
                self.native.pin(value)

    def is_free(self, source: Source) -> bool:
        """Return True if the value at a place is not compared."""
        return self._free.get(key_of(source), False)

    def counts(self, key: Any) -> bool:
        """Return True if the code that ran may read a member with this key."""
        return self._names is None or type(key) is not str or key in self._names


def bytes_of(value: Any) -> Any:
    """Returns a view of the bytes of an array on the host; None if it is large or no array."""
    kind = type(value).__mro__[-2:][0]  # the one of C below all subclasses
    if kind is not bytearray and kind.__module__ not in ("numpy", "array", "_ctypes"):
        return None
    try:
        if getattr(getattr(value, "dtype", None), "kind", "") in ("m", "M"):  # times show no bytes
            value = value.view("i8")
        return value if 0 < memoryview(value).nbytes <= LARGEST_BUFFER else None
    except (TypeError, ValueError, BufferError):
        return None


def _has_address(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and not nn.parameter.is_lazy(tensor)
        and not overrides_dispatch(tensor)
    )
