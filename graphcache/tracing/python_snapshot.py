"""The Python values that a forward could change, as they were before it ran.

A snapshot shares the walk and the records of the guards, but is no native guard. It grows while the
forward runs and shows which names count. It compares by identity, holds all that it found, so that no
address is used again, and names everything that changed.
"""

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from graphcache.guards.reachability import (
    ABSENT,
    FIXED,
    LONGEST,
    LOOSE,
    MODULE,
    SCOPE,
    TABLE,
    Kind,
    Members,
    Source,
    Walker,
    is_library_module,
    named_in,
)

_BY_OTHER_CODE = (operator.attrgetter, operator.methodcaller)


class Snapshot(Walker):
    """The members of all that was reached, at the time when each was found.

    Attributes:
        tensors: those that were found, by identity; parameters excepted.
        dynamic: something was found that reads attributes which no code names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, Tensor] = {}
        self.dynamic = False
        self._members: dict[tuple[Kind, int], Members] = {}
        self._sources: dict[tuple[int, str], Source] = {}
        self._scopes: list[Members] = []
        self._names: set[str] = set()
        self._generators: list[tuple[Any, str, str]] = []  # numpy's

    def add_names(self, names: set[str]) -> None:
        """Adds the globals with these names of the Python modules that were found."""
        new = names - self._names
        self._names |= new
        for scope in list(self._scopes):
            for label, item in self._named(scope, new):
                self.walk(item, label)

    def add_global(self, table: dict[str, Any], key: str, label: str) -> None:
        """Adds one entry of a large dict, or that there is none."""
        value = table.get(key, ABSENT)
        self._sources.setdefault((id(table), key), Source(table, key, value, label))
        if value is not ABSENT:
            self.walk(value, label)

    def enter(self, value: Any, label: str, depth: int, is_new: bool) -> bool:
        """Adds tensors and numpy's generators; the members of all else follow."""
        kind = type(value)
        if issubclass(kind, Tensor):
            if kind is Tensor or not isinstance(value, nn.Parameter):  # that takes long to ask
                self.tensors[id(value)] = value
        elif issubclass(kind, _BY_OTHER_CODE):
            self.dynamic = True
        elif kind.__module__.startswith("numpy.random") and hasattr(value, "bit_generator"):
            self._generators.append((value, repr(value.bit_generator.state), label))
            return False
        return True

    def take(self, members: Members, held: bool) -> Iterable[tuple[str, Any]]:
        """Adds members, unless there are too many."""
        if members.kind is SCOPE:
            self._scopes.append(members)
            return self._named(members, self._names)
        if len(members.items) > LONGEST and members.kind not in (MODULE, TABLE):
            return ()
        if members.kind not in (FIXED, LOOSE):  # which do not change
            self._members.setdefault((members.kind, id(members.container)), members)
        return members.reachable()

    def _named(self, scope: Members, names: set[str]) -> list[tuple[str, Any]]:
        """Adds the globals of a Python module that have these names, and returns those to walk over."""
        table = scope.container
        found = [(scope.label_of(name), name, item) for name, item in named_in(table, names)]
        if not is_library_module(table):
            for label, name, item in found:
                self._sources.setdefault((id(table), name), Source(table, name, item, label))
        return [(label, item) for label, _, item in found]

    def changed(self) -> list[str]:
        """Returns the names of everything that is not as it was."""
        sources = (s for s in self._sources.values() if s.container.get(s.key, ABSENT) is not s.value)
        drew = (g for g in self._generators if repr(g[0].bit_generator.state) != g[1])
        names = {*(source.label for source in sources), *(label for _, _, label in drew)}
        return sorted(names.union(*(members.changed() for members in self._members.values())))
