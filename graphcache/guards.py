"""What a graph captured by address or by value, held and compared on every call.

A graph reads the addresses and the Python values of its capture for ever. So each place from which the
forward could get a tensor (a parameter, a buffer, an attribute, a list in an attribute, a closure, a
global) is watched: the same object must still be there, at the same address.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import itemgetter
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from graphcache import _C

_OF_MODULE = frozenset(vars(nn.Module())) - {"training"}
_DEPTH = 4  # containers inside an attribute that are searched: self.caches[i]["k"] is two deep


class _Watched:
    """One place: `container[key]` must be `expected`."""

    __slots__ = ("container", "expected", "key")

    def __init__(self, container: Any, key: Any, expected: Any) -> None:
        self.container = container
        self.key = key
        # Modules weakly, as in _WatchedModule.
        self.expected = weakref.ref(expected) if isinstance(expected, nn.Module) else expected

    def holds(self) -> bool:
        expected = self.expected() if isinstance(self.expected, weakref.ref) else self.expected
        try:
            return expected is not None and self.container[self.key] is expected
        except (KeyError, IndexError):
            return False


class _Cell:
    """A closure cell, made to look like a container."""

    __slots__ = ("cell",)

    def __init__(self, cell: CellType) -> None:
        self.cell = cell

    def __getitem__(self, key: Any) -> Any:
        return self.cell.cell_contents


class _WatchedModule:
    """The attributes of one module, its parameters, buffers and children, all by identity.

    Modules are watched through weak references: a child that knows its parent must not keep the
    parent, and with it these guards, alive for ever. An id stands for an object as long as that lives:
    tensors and plain values are held here, and each child is watched, and so known to live, itself.
    """

    __slots__ = ("_children", "_get", "_held", "_hooks", "_ids", "_module", "_size", "_tensors")

    def __init__(self, module: nn.Module, *, is_root: bool) -> None:
        self._module = weakref.ref(module)
        self._hooks = () if is_root else ("_forward_hooks", "_forward_pre_hooks")
        attributes = vars(module)
        own = [name for name in attributes if name not in _OF_MODULE]
        # Two names or more, so that it gives a tuple; some modules have no "training" of their own.
        self._get = itemgetter(*own, "_parameters", "_buffers")
        values = self._get(attributes)
        tensors = (*module._parameters.values(), *module._buffers.values())
        self._size = len(attributes)
        self._ids = tuple(map(id, values))
        self._tensors = tuple(map(id, tensors))
        self._children = tuple(map(id, module._modules.values()))
        self._held = [*tensors, *filter(_is_plain, values)]

    def holds(self) -> bool:
        module = self._module()
        if module is None:
            return False
        attributes = module.__dict__
        return (
            len(attributes) == self._size
            and tuple(map(id, self._get(attributes))) == self._ids
            and tuple(
                map(id, chain(attributes["_parameters"].values(), attributes["_buffers"].values()))
            )
            == self._tensors
            and tuple(map(id, attributes["_modules"].values())) == self._children
            and not any(attributes[name] for name in self._hooks)
        )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (int, float, complex, str, bytes, Tensor))


class Guards:
    """Everything that the graphs of one signature depend on besides their arguments."""

    def __init__(self) -> None:
        self.native = _C.Guard()
        reference = weakref.ref(self)
        self.native.stub = lambda grad: reference().hold(grad=grad)
        self._modules: list[_WatchedModule] = []
        self._places: list[_Watched] = []
        self._addresses: list[tuple[Tensor, int]] = []
        self.unwatched: list[Tensor] = []

    def hold(self, *, grad: bool) -> bool:
        """Tells whether all is as it was; with `grad`, also that nothing requires gradients."""
        return (
            all(module.holds() for module in self._modules)
            and all(place.holds() for place in self._places)
            and all(tensor.data_ptr() == address for tensor, address in self._addresses)
            and not (grad and any(tensor.requires_grad for tensor, _ in self._addresses))
        )

    @classmethod
    def find(cls, function: Callable[..., Any], instance: Any, reached: Iterable[Tensor]) -> "Guards":
        """Finds every place that leads from the forward to a tensor that it reached.

        Args:
            function: the forward.
            instance: what it is bound to, or None.
            reached: a tensor of each storage that the forward read or wrote and was not given.

        Returns:
            The guards; `unwatched` holds those of `reached` to which no place leads.
        """
        guards = cls()
        search = _Search(guards, {_C.storage_key(tensor): tensor for tensor in reached}, instance)
        if isinstance(instance, nn.Module):
            search.visit(instance, (), _DEPTH)
        elif instance is not None and hasattr(instance, "__dict__"):
            search.inside(vars(instance), (), _DEPTH)
        for container, key, value in _free_variables(function):
            search.visit(value, (_Watched(container, key, value),), _DEPTH)
        found = search.found.values()
        guards._addresses = [(tensor, tensor.data_ptr()) for tensor in found]
        watched = {_C.storage_key(tensor) for tensor in found}
        guards.unwatched = [t for key, t in search.wanted.items() if key not in watched]
        return guards


class _Search:
    """Walks modules, containers and objects, and adds to `guards` what leads to a wanted storage."""

    def __init__(self, guards: Guards, wanted: dict[int, Tensor], root: Any) -> None:
        self.guards = guards
        self.wanted = wanted
        self.root = root
        self.found: dict[int, Tensor] = {}
        self._seen: set[int] = set()

    def visit(self, value: Any, places: tuple[_Watched, ...], depth: int) -> None:
        """Looks at one value, to which `places` lead."""
        if isinstance(value, Tensor):
            if value.layout is torch.strided and _C.storage_key(value) in self.wanted:
                self.found[id(value)] = value
                self.guards._places.extend(places)
        elif isinstance(value, nn.Module):
            for module in value.modules():
                if id(module) not in self._seen:
                    self._seen.add(id(module))
                    watched = _WatchedModule(module, is_root=module is self.root)
                    self.guards._modules.append(watched)
                    for held in _attributes(module):
                        self.visit(held, (), depth)
            if value is not self.root:
                self.guards._places.extend(places)
        elif depth > 0 and id(value) not in self._seen and not isinstance(value, _NOT_SEARCHED):
            if isinstance(value, (dict, list, tuple)):
                self._seen.add(id(value))
                self.inside(value, places, depth - 1)
            elif type(getattr(value, "__dict__", None)) is dict:
                self._seen.add(id(value))
                self.inside(vars(value), places, depth - 1)

    def inside(self, container: Any, places: tuple[_Watched, ...], depth: int) -> None:
        """Looks at everything in a container."""
        for key, value in _items(container):
            self.visit(value, (*places, _Watched(container, key, value)), depth)


_NOT_SEARCHED = (str, bytes, int, float, type, FunctionType, type(torch), torch.dtype, torch.device)


def _attributes(module: nn.Module) -> list[Any]:
    own = [value for name, value in vars(module).items() if name not in _OF_MODULE]
    return [*own, *module._parameters.values(), *module._buffers.values()]


def _items(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, dict) else enumerate(container))


def _free_variables(function: Callable[..., Any]) -> Iterator[tuple[Any, Any, Any]]:
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType):
        return
    for cell in function.__closure__ or ():
        try:
            yield _Cell(cell), None, cell.cell_contents
        except ValueError:  # not filled yet
            continue
    names = set(function.__code__.co_names)
    for name, value in list(function.__globals__.items()):
        # Helpers that the forward calls read globals too: their tensors count, named here or not.
        if isinstance(value, Tensor) or (name in names and not isinstance(value, _NOT_SEARCHED)):
            yield function.__globals__, name, value


def submodule_with_hooks(instance: Any) -> str | None:
    """Names the first submodule whose hooks a replay would not call; None where there is none."""
    if not isinstance(instance, nn.Module):
        return None
    if nn_module._has_any_global_hook():
        return "every module (a global hook)"
    for name, module in instance.named_modules():
        if module is not instance and (module._forward_hooks or module._forward_pre_hooks):
            return repr(name)
    return None


class AttributeWatch:
    """Notices what of a module tree one forward changes: attributes, and the containers in them."""

    def __init__(self, instance: Any) -> None:
        modules = instance.named_modules() if isinstance(instance, nn.Module) else ()
        self._before = [
            (name, table, dict(table), {key: _contents(value) for key, value in table.items()})
            for name, module in modules
            for table in (vars(module), module._parameters, module._buffers)
        ]

    def changed(self) -> list[str]:
        """Returns the names of the attributes that were set, replaced, changed or deleted since."""
        return sorted(
            f"{where}.{key}".lstrip(".")
            for where, table, before, contents in self._before
            for key in before.keys() | table.keys()
            if table.get(key, _ABSENT) is not before.get(key, _ABSENT)
            or (key not in _OF_MODULE and _contents(table[key]) != contents[key])
        )


_ABSENT = object()


def _contents(value: Any) -> list[int] | None:
    if isinstance(value, (list, set)):
        return [id(item) for item in value]
    if isinstance(value, dict):
        return [id(item) for pair in value.items() for item in pair]
    return None
