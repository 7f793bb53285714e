"""What a graph captured by address or by value, held and compared on every call.

A graph reads the addresses and the Python values of its capture for ever. So each place from which the
forward could get one (a parameter, a buffer, an attribute, a container or an object in it, a closure, a
global) is watched: the same object must still be there, tensors at the same address. Python searches,
once; the native guard compares.
"""

import gc
import sys
from collections.abc import Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from graphcache import _C
from graphcache.ops import overrides_dispatch
from graphcache.reads import (
    DEPTH,
    HEAP_TYPE,
    LONGEST,
    OF_MODULE,
    Place,
    Reads,
    attributes_of,
    slots_of,
)

LARGEST_BUFFER = 64 * 2**10  # bytes of a host array that are compared on every call
# A dict can't be asked whether it lives. Later Pythons tell when one dies; before, only what is held by
# something that is asked before it may be watched.
_TELLS_OF_DEATH = sys.version_info >= (3, 12)


class Guards:
    """Everything that the graphs of one signature depend on besides their arguments.

    Attributes:
        native: what holds and compares it.
        unwatched: tensors that the forward reached, and to which no place was found to lead.
        hooked: the name of a module inside that has hooks, which a replay would not call; or None.
    """

    __slots__ = ("_labels", "hooked", "native", "unwatched")

    def __init__(
        self,
        native: _C.Guard | None = None,
        unwatched: Iterable[Tensor] = (),
        labels: dict[str, list[str]] | None = None,
        hooked: str | None = None,
    ) -> None:
        self.native = native or _C.Guard()
        self.unwatched = list(unwatched)
        self._labels = labels or {}
        self.hooked = hooked

    def hold(self, *, grad: bool) -> bool:
        """Tells whether all is as it was; with `grad`, also that nothing requires gradients."""
        return self.native.hold(grad)

    def broken(self, *, grad: bool) -> str:
        """Names what is not as it was, for a message."""
        found = self.native.broken(grad)
        if found is None:
            return "something that is back to what it was"
        kind, index, key = found
        labels = self._labels.get(kind if kind != "gone" else "module", [])
        label = labels[index] if index < len(labels) else kind
        return f"{label}.{key}".lstrip(".") if key is not None else label or "the module itself"

    @classmethod
    def find(
        cls, instance: Any, reads: Reads, reached: Iterable[Tensor], outside: Iterable[Tensor]
    ) -> "Guards":
        """Finds every place that leads from the forward to what it reads.

        Args:
            instance: what the forward is bound to, or None.
            reads: which code ran, and so which names count.
            reached: the tensors that the forward read or wrote and was not given, as far as somebody
                holds them still.
            outside: a tensor for each storage of such, whether somebody holds it still or not.

        Returns:
            The guards; `unwatched` holds those of `reached` and `outside` to which no place leads.
        """
        search = _Search(instance, reads.names)
        if instance is not None:
            search.visit(instance, (), DEPTH, "")
        for place in reads.scopes():
            label = f"global {place[1]}" if isinstance(place[0], dict) else "a closure"
            search.watch((place,), label)
            search.visit(place[-1], (place,), DEPTH, label)
        hooks = [nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks]
        native = search.native((table, False) for table in hooks)
        search.labels["dict"][:0] = ["hooks of every module"] * len(hooks)
        lost = [tensor for tensor in reached if id(tensor) not in search.tensors]
        storages = {_C.storage_key(tensor) for tensor in search.tensors.values()}
        lost += [tensor for tensor in outside if _C.storage_key(tensor) not in storages]
        names = zip(search.modules, search.labels["module"], strict=True)
        hooked = (name for module, name in names if module is not instance and _has_hooks(module))
        return cls(native, lost, search.labels, next(hooked, None))

    @classmethod
    def of_object(cls, value: Any, name: str, depth: int, tensors: Iterable[Tensor]) -> "Guards":
        """Finds every place in one object; `unwatched` holds those of `tensors` to which none leads."""
        search = _Search(None, None)
        search.visit(value, (), depth, name)
        lost = [tensor for tensor in tensors if id(tensor) not in search.tensors]
        return cls(search.native(()), lost, search.labels)


class _Search:
    """Walks modules, containers and objects, and notes all that leads to something else.

    Attributes:
        names: the attributes that count, or None for all.
        labels: for each kind of what the native guard watches, the names of these, for messages.
    """

    def __init__(self, root: Any, names: frozenset[str] | None) -> None:
        self.root = root
        self.names = names
        self.modules: list[nn.Module] = []
        self.objects: list[Any] = []
        self.dicts: list[tuple[dict[Any, Any], bool]] = []
        self.lists: list[Any] = []  # and sets
        self.buffers: list[Any] = []
        self.places: dict[tuple[int, Any], Place] = {}
        self.tensors: dict[int, Tensor] = {}
        kinds = ("module", "object", "dict", "list", "buffer", "place", "tensor")
        self.labels: dict[str, list[str]] = {kind: [] for kind in kinds}
        self._seen: set[int] = set()

    def native(self, more: Iterable[tuple[dict[Any, Any], bool]]) -> _C.Guard:
        """Returns what compares all that was found, and `more` dicts before it."""
        return _C.Guard(
            modules=self.modules,
            root=self.root,
            objects=self.objects,
            dicts=[*more, *self.dicts],
            lists=self.lists,
            buffers=self.buffers,
            places=list(self.places.values()),
            tensors=list(self.tensors.values()),
            names=self.names,
        )

    def watch(self, places: tuple[Place, ...], label: str) -> None:
        """Watches places by themselves: what no container above them tells of."""
        for place in places:
            key = id(place[0]), place[1]
            if key not in self.places:
                self.places[key] = place
                self.labels["place"].append(label)

    def visit(
        self, value: Any, places: tuple[Place, ...], depth: int, label: str, *, held: bool = True
    ) -> None:
        """Looks at one value.

        Args:
            value: what to look at.
            places: those that lead to it and are watched only where it matters.
            depth: how many containers deep to look.
            label: its name.
            held: what holds it is watched, and asked before it is.
        """
        if isinstance(value, Tensor):
            if _has_address(value) and id(value) not in self.tensors:
                self.tensors[id(value)] = value
                self.labels["tensor"].append(label)
                self.watch(places, label)
        elif isinstance(value, nn.Module):
            self._module_tree(value, label, depth)
            if value is not self.root:
                self.watch(places, label)
        elif depth > 0 and id(value) not in self._seen:
            self._inside(value, places, depth - 1, label, held)

    def _module_tree(self, top: nn.Module, label: str, depth: int) -> None:
        for name, module in top.named_modules():
            if id(module) in self._seen:
                continue
            self._seen.add(id(module))
            where = f"{label}.{name}".strip(".")
            self.modules.append(module)
            self.labels["module"].append(where)
            self._classes(type(module))
            for key, held in [*module._parameters.items(), *module._buffers.items()]:
                self.visit(held, (), depth, f"{where}.{key}".lstrip("."))
            for key, held in list(vars(module).items()):
                if key not in OF_MODULE and self._counts(key):
                    self.visit(held, (), depth, f"{where}.{key}".lstrip("."))

    def _inside(self, value: Any, places: tuple[Place, ...], depth: int, label: str, held: bool) -> None:
        self._seen.add(id(value))
        if isinstance(value, dict):
            covered = (held or _TELLS_OF_DEATH) and type(value) is dict and len(value) <= LONGEST
            if covered:
                self.dicts.append((value, False))
                self.labels["dict"].append(label)
            for key, item in list(dict.items(value)):
                path = places if covered else (*places, (value, key, item))
                self.visit(item, path, depth, f"{label}[{key!r}]", held=covered)
        elif isinstance(value, (list, tuple)):
            covered = type(value) is list and len(value) <= LONGEST
            if covered:
                self.lists.append(value)
                self.labels["list"].append(label)
            for index, item in enumerate(value):
                path = places if covered else (*places, (value, index, item))
                self.visit(item, path, depth, f"{label}[{index}]", held=False)
        elif isinstance(value, partial):
            self.visit(value.args, places, depth, label, held=False)
            self.visit(value.keywords, places, depth, label, held=False)
        elif isinstance(value, MethodType):
            self.visit(value.__self__, places, depth, label, held=False)
        elif isinstance(value, set):
            if len(value) <= LONGEST:
                self.lists.append(value)
                self.labels["list"].append(label)
        elif _exports_bytes(value):
            self.buffers.append(value)
            self.labels["buffer"].append(label)
        else:
            self._attributes(value, places, depth, label, held)

    def _attributes(
        self, value: Any, places: tuple[Place, ...], depth: int, label: str, held: bool
    ) -> None:
        for member, item in slots_of(value):
            place, name = (value, member, item), f"{label}.{member.__name__}".lstrip(".")
            self.watch((place,), name)
            self.visit(item, (*places, place), depth, name, held=False)
        table = attributes_of(value)
        if table is None:
            return
        covered = True
        if hasattr(type(value), "__weakref__"):
            self.objects.append(value)
            self.labels["object"].append(label)
            self._classes(type(value))
        elif held or _TELLS_OF_DEATH:
            self.dicts.append((table, True))
            self.labels["dict"].append(label)
        else:
            covered = False
        for key, item in list(table.items()):
            if self._counts(key):
                path = places if covered else (*places, (table, key, item))
                self.visit(item, path, depth, f"{label}.{key}".lstrip("."), held=covered)

    def _classes(self, kind: type) -> None:
        """Watches the dicts of a class and its bases: their methods and constants."""
        for base in kind.__mro__:
            if id(base) not in self._seen and base.__flags__ & HEAP_TYPE:
                self._seen.add(id(base))
                (table, *_) = gc.get_referents(vars(base))  # the dict behind the read-only view
                self.dicts.append((table, True))
                self.labels["dict"].append(base.__qualname__)
                for key, item in list(table.items()):
                    of_python = key.startswith("__")  # annotations lead to docs, made when asked for
                    if isinstance(item, (Tensor, list, dict)) and self._counts(key) and not of_python:
                        self.visit(item, (), DEPTH, f"{base.__qualname__}.{key}")

    def _counts(self, key: Any) -> bool:
        return self.names is None or type(key) is not str or key in self.names


def _exports_bytes(value: Any) -> bool:
    """Tells whether `value` is an array of numbers on the host, small enough to be compared."""
    if not isinstance(value, bytearray) and type(value).__module__ not in ("numpy", "array"):
        return False
    try:
        return 0 < memoryview(value).nbytes <= LARGEST_BUFFER and memoryview(value).contiguous
    except (TypeError, ValueError, BufferError):
        return False


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
