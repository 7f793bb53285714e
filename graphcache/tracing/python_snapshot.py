"""What a forward could change, as it was before it ran."""

import operator
from typing import Any

from torch import Tensor, nn

from graphcache.call.object_args import slots_of
from graphcache.guards.reachability import (
    DEPTH,
    LONGEST,
    OF_MODULE,
    Members,
    classes,
    groups,
    is_library_module,
    is_plain,
    named_in,
)

_TABLES = ("_parameters", "_buffers", "_modules")
_BY_OTHER_CODE = (operator.attrgetter, operator.methodcaller)
_ABSENT = object()


class Snapshot:
    """Containers as they were: each with its items then, held so that no address comes again.

    Attributes:
        tensors: those that were found, by identity; parameters excepted.
        dynamic: something was found that reads attributes which no code names.
    """

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}
        self.dynamic = False
        self._groups: dict[tuple[str, int], tuple[Members, str]] = {}
        self._entries: dict[tuple[int, str], tuple[dict[str, Any], str, Any, str]] = {}
        self._seen: dict[int, tuple[int, Any]] = {}
        self._modules: list[tuple[dict[str, Any], str]] = []  # Python's
        self._names: set[str] = set()
        self._generators: list[tuple[Any, str, str]] = []  # numpy's

    def add_names(self, names: set[str]) -> None:
        """Adds what the modules of Python that were found have of these names."""
        new = names - self._names
        self._names |= new
        for table, label in list(self._modules):
            self._add_named(table, new, label)

    def _add_named(self, table: dict[str, Any], names: set[str], label: str) -> None:
        for name, item in named_in(table, names):
            if is_library_module(table):
                self.add(item, f"{label}.{name}", DEPTH)
            else:
                self.add_entry(table, name, f"{label}.{name}")

    def add_entry(self, table: dict[str, Any], key: str, label: str) -> None:
        """Adds one entry of a large dict, or that there is none."""
        value = table.get(key, _ABSENT)
        self._entries.setdefault((id(table), key), (table, key, value, label))
        if value is not _ABSENT:
            self.add(value, label, DEPTH)

    def add(self, value: Any, label: str, depth: int) -> None:
        """Adds a value and what it holds, `depth` containers deep."""
        if isinstance(value, Tensor):
            if type(value) is Tensor or not isinstance(value, nn.Parameter):  # that takes long to ask
                self.tensors[id(value)] = value
        elif isinstance(value, nn.Module):
            for name, module in value.named_modules():
                if self._is_new(module, DEPTH):
                    self._add_module(module, f"{label}.{name}".strip("."))
            return
        elif type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator"):
            self._generators.append((value, repr(value.bit_generator.state), label))
            return
        elif isinstance(value, _BY_OTHER_CODE):
            self.dynamic = True
        if depth > 0 and self._is_new(value, depth):
            for group in groups(value):
                self._add_group(group, label, depth - 1)

    def _is_new(self, value: Any, depth: int) -> bool:
        """Tells whether it was not searched as deep before."""
        if self._seen.get(id(value), (0,))[0] >= depth:
            return False
        self._seen[id(value)] = depth, value
        return True

    def _add_module(self, module: nn.Module, name: str) -> None:
        table = vars(module)
        self._note(Members("table", table, list(table.items())), name)
        for key in _TABLES:
            if isinstance(table.get(key), dict):  # a scripted module has others
                self._note(Members("table", table[key], list(table[key].items())), name)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            self.add(tensor, name, 1)
        for key, value in list(table.items()):
            if key not in OF_MODULE:
                self.add(value, f"{name}.{key}", DEPTH)
        if slots := slots_of(module):
            self._add_group(Members("items", module, slots), name, DEPTH)
        self._add_group(Members("classes", type(module), []), name, DEPTH)

    def _add_group(self, group: Members, label: str, depth: int) -> None:
        if group.kind == "module":
            self._modules.append((group.container, label))
            self._add_named(group.container, self._names, label)
        elif group.kind == "classes":
            if self._is_new(group.container, depth):
                for each in classes(group.container):
                    self._add_group(each, label, depth)
        elif len(group.items) <= LONGEST and self._note(group, label):
            for key, item in group.items:
                if not is_plain(item):
                    self.add(item, group.label(label, key), depth)
                if group.kind == "dict" and not is_plain(key):
                    self.add(key, label, depth)

    def _note(self, group: Members, label: str) -> bool:
        known = (group.kind, id(group.container))
        if group.kind != "class" or known not in self._groups:
            self._groups.setdefault(known, (group, label.lstrip(".")))
            return True
        return False

    def changed(self) -> list[str]:
        """Returns the names of what is not as it was."""
        names = {
            label
            for table, key, before, label in self._entries.values()
            if table.get(key, _ABSENT) is not before
        }
        for generator, state, label in self._generators:
            if repr(generator.bit_generator.state) != state:
                names.add(label)
        for group, label in self._groups.values():
            if group.kind in ("fixed", "loose"):
                continue
            now = group.now()
            if not _are_same(group, now):
                names.update(_differing(group, now, label))
        return sorted(names)


def _are_same(group: Members, now: list[tuple[Any, Any]]) -> bool:
    keyed = isinstance(group.container, dict)
    return len(now) == len(group.items) and all(
        a[1] is b[1] and (a[0] is b[0] or not keyed) for a, b in zip(now, group.items, strict=True)
    )


def _differing(group: Members, now: list[tuple[Any, Any]], label: str) -> set[str]:
    if not isinstance(group.container, dict):
        return {label}
    first, second, name = dict(group.items), dict(now), group.name or label
    return {
        f"{name}.{key}".lstrip(".")
        for key in first.keys() | second.keys()
        if first.get(key, _ABSENT) is not second.get(key, _ABSENT)
    }
