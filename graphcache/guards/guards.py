"""What a graph captured by address or by value, held and compared on every call.

A graph reads the addresses and the Python values of its capture for ever. So each place from which the
forward could get one (a parameter, a buffer, an attribute, a container or an object in it, a closure, a
global) is watched: the same object must still be there, tensors at the same address. Python searches,
once; the native guard compares.
"""

import os
import sys
from collections import deque
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from graphcache import _C
from graphcache.call.object_args import slots_of
from graphcache.guards.reachability import (
    DEPTH,
    LONGEST,
    OF_MODULE,
    Members,
    Place,
    classes,
    groups,
    is_iterator,
    is_plain,
    named_in,
)
from graphcache.runtime.op_info import overrides_dispatch

LARGEST_BUFFER = 64 * 2**10  # bytes of a host array that are compared on every call
# A dict can't be asked whether it lives. Later Pythons tell when one dies; before, only what is held by
# something that is asked before it may be watched.
_TELLS_OF_DEATH = sys.version_info >= (3, 12)


class ReadSet(NamedTuple):
    """The code that a forward ran, and the names that this code can read.

    Attributes:
        names: attributes that the code can read; None where it may read any.
        users_names: names in code that is no library's; they are looked up in Python modules.
        code: the forward, and the classes and functions among its arguments.
        scopes: sources of globals, imports and closures, each with its label.
    """

    names: frozenset[str] | None
    users_names: frozenset[str]
    code: list[Any]
    scopes: list[tuple[Place, str]]


class Guards:
    """Everything that the graphs of one signature depend on besides their arguments.

    Attributes:
        native: what holds and compares it.
        unwatched: tensors that the forward reached, and to which no place was found to lead.
        hooked: the name of a module inside that has hooks, which a replay would not call; or None.
        iterators: names of iterators, which no replay would advance.
    """

    __slots__ = ("_labels", "hooked", "iterators", "native", "unguarded")

    def __init__(
        self,
        native: _C.Guard | None = None,
        unguarded: Iterable[Tensor] = (),
        labels: dict[str, list[str]] | None = None,
        hooked: str | None = None,
        iterators: Iterable[str] = (),
    ) -> None:
        self.native = native or _C.Guard()
        self.unguarded = list(unguarded)
        self._labels = labels or {}
        self.hooked = hooked
        self.iterators = list(iterators)

    def check(self, *, grad: bool) -> bool:
        """Tells whether all is as it was; with `grad`, also that nothing requires gradients."""
        return self.native.check(grad)

    def explain(self, *, grad: bool) -> str:
        """Names what is not as it was, for a message."""
        found = self.native.explain(grad)
        if found is None:
            return "something that is back to what it was"
        kind, index, key = found
        labels = self._labels.get(kind if kind != "gone" else "module", [])
        label = labels[index] if index < len(labels) else kind
        return f"{label}.{key}".lstrip(".") if key is not None else label or "the module itself"

    @classmethod
    def find(
        cls, instance: Any, reads: ReadSet, reached: Iterable[Tensor], outside: Iterable[Tensor]
    ) -> "Guards":
        """Finds every place that leads from the forward to what it reads.

        Args:
            instance: what the forward is bound to, or None.
            reads: which code ran, and so which names count.
            reached: the tensors that the forward read or wrote and was not given, as far as somebody
                holds them still.
            outside: a tensor for each storage of such, whether somebody holds it still or not.

        Returns:
            The guards; `unguarded` holds those of `reached` and `outside` to which no place leads.
        """
        search = _Search(instance, reads.names, reads.users_names)
        search.visit(instance, (), DEPTH, "")
        for code in reads.code:
            search.visit(code, (_kept(code),), DEPTH, getattr(code, "__qualname__", ""))
        search.classes(Tensor)
        if search.counts("environ"):
            search.visit(os.environ, (), DEPTH, "os.environ")
        for place, label in reads.scopes:
            search.watch((place,), label)
            if len(place) > 2:
                search.visit(place[2], (), DEPTH, label)
        hooks = [nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks]
        native = search.native((table, False) for table in hooks)
        search.labels["dict"][:0] = ["hooks of every module"] * len(hooks)
        lost = [tensor for tensor in reached if id(tensor) not in search.tensors]
        storages = {_C.storage_key(tensor) for tensor in search.tensors.values()}
        lost += [tensor for tensor in outside if _C.storage_key(tensor) not in storages]
        names = zip(search.modules, search.labels["module"], strict=True)
        hooked = (name for module, name in names if module is not instance and _has_hooks(module))
        return cls(native, lost, search.labels, next(hooked, None), search.iterators)

    @classmethod
    def of_object(cls, value: Any, name: str, depth: int, tensors: Iterable[Tensor]) -> "Guards":
        """Finds every place in one object; `unguarded` holds those of `tensors` to which none leads."""
        search = _Search(None, None, frozenset())
        search.visit(value, (), depth, name)
        lost = [tensor for tensor in tensors if id(tensor) not in search.tensors]
        return cls(search.native(()), lost, search.labels)


class _Search:
    """Walks modules, containers and objects, and notes all that leads to something else.

    Attributes:
        names: the attributes that count, or None for all.
        users: those of them that the user's code names.
        labels: for each kind of what the native guard watches, the names of these, for messages.
    """

    def __init__(self, root: Any, names: frozenset[str] | None, users: frozenset[str]) -> None:
        self.root = root
        self.names = names
        self.users = users
        self.modules: list[nn.Module] = []
        self.objects: list[Any] = []
        self.dicts: list[tuple[dict[Any, Any], bool]] = []
        self.lists: list[Any] = []  # and sets
        self.buffers: list[Any] = []
        self.iterators: list[str] = []
        self.places: dict[tuple[int, Any], Place] = {}
        self.tensors: dict[int, Tensor] = {}
        kinds = ("module", "object", "dict", "list", "buffer", "place", "tensor")
        self.labels: dict[str, list[str]] = {kind: [] for kind in kinds}
        self._seen: dict[int, int] = {}  # and how deep it was searched

    def native(self, more: Iterable[tuple[dict[Any, Any], bool]]) -> _C.Guard:
        """Returns what compares all that was found, and `more` dicts before it."""
        return _C.Guard(
            modules=self.modules,
            root=self.root,
            objects=self.objects,
            dicts=[*more, *self.dicts],
            lists=self.lists,
            buffers=self.buffers,
            sources=list(self.places.values()),
            tensors=list(self.tensors.values()),
            names=self.names,
            grads="requires_grad" in self.users,
        )

    def watch(self, places: tuple[Place, ...], label: str) -> None:
        """Watches places by themselves: what no container above them tells of."""
        for place in places:
            key = id(place[0]), place[1]
            if key not in self.places:
                self.places[key] = place
                self.labels["place"].append(label)

    def visit(self, value: Any, leads: tuple[Place, ...], depth: int, label: str) -> None:
        """Looks at one value.

        Args:
            value: what to look at.
            leads: places to be watched where it can't be asked whether it lives: what holds it is
                compared after it. Places are compared first.
            depth: how many containers deep to look.
            label: its name.
        """
        if isinstance(value, nn.Module):
            self._module_tree(value, label)
        elif isinstance(value, Tensor):
            if _has_address(value) and id(value) not in self.tensors:
                self.tensors[id(value)] = value
                self.labels["tensor"].append(label)
                self._inside(value, leads, 1, label)
        elif is_iterator(value):
            self.iterators.append(f"{label} ({type(value).__name__})")
        elif depth > 0 and not is_plain(value) and self._is_new(value, depth):
            if (array := _bytes_of(value)) is not None:
                self.buffers.append(array)
                self.labels["buffer"].append(label)
            self._inside(value, leads, depth - 1, label)

    def _is_new(self, value: Any, depth: int) -> bool:
        """Tells whether it was not searched as deep before."""
        if self._seen.get(id(value), 0) >= depth:
            return False
        self._seen[id(value)] = depth
        return True

    def _module_tree(self, top: nn.Module, label: str) -> None:
        for name, module in top.named_modules():
            if not self._is_new(module, DEPTH):
                continue
            where = f"{label}.{name}".strip(".")
            self.modules.append(module)
            self.labels["module"].append(where)
            self._each(Members("items", module, slots_of(module)), DEPTH, where)
            self.classes(type(module))
            for key, held in [*module._parameters.items(), *module._buffers.items()]:
                self.visit(held, (), DEPTH, f"{where}.{key}".lstrip("."))
            for key, held in list(vars(module).items()):
                if key not in OF_MODULE and self.counts(key):
                    self.visit(held, (), DEPTH, f"{where}.{key}".lstrip("."))

    def _inside(self, value: Any, leads: tuple[Place, ...], depth: int, label: str) -> None:
        for group in groups(value):
            if group.kind == "module":
                self._each(group._replace(items=named_in(group.container, self.users)), DEPTH, label)
            elif group.kind in ("items", "extra"):
                self._each(group, depth, label, all_of_it=len(group.items) <= LONGEST)
            elif group.kind in ("fixed", "loose"):
                for key, item in group.items:
                    path = leads if group.kind == "fixed" else (_kept(item),)
                    self.visit(item, path, depth, group.label(label, key))
            elif group.kind == "class":
                self._class(group, leads, depth)
            elif group.kind == "classes":
                self.classes(group.container, leads, depth)
            elif group.kind == "table" and hasattr(type(value), "__weakref__"):
                self.objects.append(value)
                self.labels["object"].append(label)
                self._items(group, depth, label)
            elif len(group.items) > LONGEST and group.kind != "table":
                if not isinstance(value, set):
                    self._each(group, depth, label, all_of_it=False)
            elif group.kind == "list":
                self._list(group, leads, depth, label)
            else:
                self._dict(group, leads, label)
                self._items(group, depth, label)

    def _each(self, group: Members, depth: int, label: str, *, all_of_it: bool = True) -> None:
        """Watches items one by one, where no container tells of them."""
        for key, item in group.items:
            if self.counts(key) and (all_of_it or not is_plain(item)):
                name = group.label(label, key)
                self.watch(((group.container, key, item),), name)
                self.visit(item, (), depth, name)
        unset = isinstance(group.container, ContextVar) and not group.items
        if unset or isinstance(group.container, deque):
            self.watch(((group.container, len(group.items)),), label)  # nothing is there

    def _list(self, group: Members, leads: tuple[Place, ...], depth: int, label: str) -> None:
        self.lists.append(group.container)
        self.labels["list"].append(label)
        for key, item in group.items:
            place = (group.container, key, item) if isinstance(group.container, list) else _kept(item)
            path = () if _TELLS_OF_DEATH else (*leads, place)
            self.visit(item, path, depth, group.label(label, key))

    def _dict(self, group: Members, leads: tuple[Place, ...], label: str) -> None:
        if not _TELLS_OF_DEATH:
            self.watch(leads, label)
        self.dicts.append((group.container, group.kind != "dict"))
        self.labels["dict"].append(group.name or label)

    def _items(self, group: Members, depth: int, label: str) -> None:
        for key, item in group.items:
            if group.kind == "dict" or self.counts(key):
                self.visit(item, (), depth, group.label(label, key))
            if group.kind == "dict":
                self.visit(key, (), depth, label)

    def classes(self, kind: type, leads: tuple[Place, ...] = (), depth: int = DEPTH) -> None:
        """Looks at a class and its bases."""
        if self._is_new(kind, depth):
            for group in classes(kind):
                self._class(group, leads, depth)

    def _class(self, group: Members, leads: tuple[Place, ...], depth: int) -> None:
        """Watches the dict of a class: its methods and constants."""
        if self._is_new(group.container, depth):
            self._dict(group, leads, group.name)
            self._items(group, depth, "")

    def counts(self, key: Any) -> bool:
        """Tells whether the code that ran may read what has this key."""
        return self.names is None or type(key) is not str or key in self.names


def _kept(item: Any) -> Place:
    """Returns a place that keeps alive what nothing that is compared before it does."""
    return (item,), 0, item


def _bytes_of(value: Any) -> Any:
    """Returns what shows the bytes of an array of numbers on the host, if it is small enough."""
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


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def submodule_with_hooks(instance: Any) -> str | None:
    """Names the first submodule whose hooks a replay would not call; None where there is none."""
    if not isinstance(instance, nn.Module):
        return None
    if nn_module._has_any_global_hook():
        return "every module (a global hook)"
    for name, module in instance.named_modules():
        if module is not instance and _has_hooks(module):
            return repr(name)
    return None
