"""What a graph captured by address or by value, held and compared on every call.

A graph reads the addresses and the Python values of its capture for ever. So each place from which the
forward could get a tensor (a parameter, a buffer, an attribute, a list in an attribute, a closure, a
global) is watched: the same object must still be there, at the same address. Python searches, once;
the native guard compares.
"""

from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from graphcache import _C

_OF_MODULE = frozenset(vars(nn.Module())) - {"training"}
_DEPTH = 4  # containers inside an attribute that are searched: self.caches[i]["k"] is two deep

_Place = tuple[Any, Any, Any]  # a container or a closure cell, a key, and what is there


class Guards:
    """Everything that the graphs of one signature depend on besides their arguments.

    Attributes:
        native: what holds and compares it.
        unwatched: tensors that the forward reached, and to which no place was found to lead.
    """

    __slots__ = ("native", "unwatched")

    def __init__(self, native: _C.Guard | None = None, unwatched: Iterable[Tensor] = ()) -> None:
        self.native = native or _C.Guard()
        self.unwatched = list(unwatched)

    def hold(self, *, grad: bool) -> bool:
        """Tells whether all is as it was; with `grad`, also that nothing requires gradients."""
        return self.native.hold(grad)

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
        search = _Search({_C.storage_key(tensor): tensor for tensor in reached}, instance)
        if isinstance(instance, nn.Module):
            search.visit(instance, (), _DEPTH)
        elif instance is not None and hasattr(instance, "__dict__"):
            search.inside(vars(instance), (), _DEPTH)
        for place in _free_variables(function):
            search.visit(place[-1], (place,), _DEPTH)
        native = _C.Guard(
            modules=search.modules,
            root=instance,
            dicts=[nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks],
            places=list(search.places.values()),
            tensors=list(search.found.values()),
        )
        watched = {_C.storage_key(tensor) for tensor in search.found.values()}
        return cls(native, [t for key, t in search.wanted.items() if key not in watched])


class _Search:
    """Walks modules, containers and objects, and notes what leads to a wanted storage."""

    def __init__(self, wanted: dict[int, Tensor], root: Any) -> None:
        self.wanted = wanted
        self.root = root
        self.modules: list[nn.Module] = []
        self.places: dict[tuple[int, Any], _Place] = {}
        self.found: dict[int, Tensor] = {}
        self._seen: set[int] = set()

    def visit(self, value: Any, places: tuple[_Place, ...], depth: int) -> None:
        """Looks at one value, to which `places` lead."""
        if isinstance(value, Tensor):
            if value.layout is torch.strided and _C.storage_key(value) in self.wanted:
                self.found[id(value)] = value
                self._watch(places)
        elif isinstance(value, nn.Module):
            for module in value.modules():
                if id(module) not in self._seen:
                    self._seen.add(id(module))
                    self.modules.append(module)
                    for held in _attributes(module):
                        self.visit(held, (), depth)
            if value is not self.root:
                self._watch(places)
        elif depth > 0 and id(value) not in self._seen and not isinstance(value, _NOT_SEARCHED):
            if isinstance(value, (dict, list, tuple)):
                self._seen.add(id(value))
                self.inside(value, places, depth - 1)
            elif type(getattr(value, "__dict__", None)) is dict:
                self._seen.add(id(value))
                self.inside(vars(value), places, depth - 1)

    def inside(self, container: Any, places: tuple[_Place, ...], depth: int) -> None:
        """Looks at everything in a container."""
        for key, value in _items(container):
            self.visit(value, (*places, (container, key, value)), depth)

    def _watch(self, places: tuple[_Place, ...]) -> None:
        for place in places:
            self.places[id(place[0]), place[1]] = place


_NOT_SEARCHED = (str, bytes, int, float, type, FunctionType, type(torch), torch.dtype, torch.device)


def _attributes(module: nn.Module) -> list[Any]:
    own = [value for name, value in vars(module).items() if name not in _OF_MODULE]
    return [*own, *module._parameters.values(), *module._buffers.values()]


def _items(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, dict) else enumerate(container))


def _free_variables(function: Callable[..., Any]) -> Iterator[_Place]:
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType):
        return
    for cell in function.__closure__ or ():
        try:
            yield cell, None, cell.cell_contents
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
            if isinstance(table, dict)  # a scripted module has others
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
