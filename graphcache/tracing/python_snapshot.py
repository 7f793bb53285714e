"""The Python values that a forward could change, as they were before it ran, to be put back.

A snapshot shares the walk and the records of the guards, but is no native guard. It grows while the
forward runs and shows which names count. It compares by identity, holds all that it found, so that no
address is used again, and names everything that changed.
"""

import gc
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor, nn

from graphcache.guards.guards import bytes_of
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
    TABLE,
    Kind,
    Members,
    Source,
    Walker,
    attributes_of,
    is_library_module,
    is_same,
    key_of,
    named_in,
)
from graphcache.tracing.stand_in import is_stand_in

_LRU_CACHE = type(lru_cache(len))
_NAMES = "_non_persistent_buffers_set"
_DICTS = (dict, OrderedDict, defaultdict)  # whose items are set as those of any dict
_BY_OTHER_CODE = (operator.attrgetter, operator.methodcaller)
# Under another name, no code names them.
_READERS = frozenset(
    map(id, (getattr, hasattr, vars, dir, eval, exec, object.__getattribute__, *_BY_OTHER_CODE))
)


class Change(NamedTuple):
    """A place that holds another value than before.

    Attributes:
        source: the place, with the value before.
        after: the value there now.
    """

    source: Source
    after: Any

    @property
    def key(self) -> tuple[int, Any]:
        """The place as a key: equal for two changes of one place."""
        return key_of(self.source)


class Snapshot(Walker):
    """The members of all that was reached, at the time when each was found.

    Args:
        root: the module that the forward is bound to, or None.

    Attributes:
        tensors: those that were found, by identity; parameters excepted.
        dynamic: something was found that reads attributes which no code names.
    """

    def __init__(self, root: Any = None) -> None:
        super().__init__(root)
        self.tensors: dict[int, Tensor] = {}
        self.dynamic = False
        self._members: dict[tuple[Kind, int], Members] = {}
        self._sources: dict[tuple[int, str], Source] = {}
        self._scopes: list[Members] = []
        self._names: set[str] = set()
        self._generators: list[tuple[Any, Any, str]] = []  # numpy's, with their states
        self._arrays: list[tuple[Any, bytes, str]] = []  # numbers on the host
        self.memos: list[dict[Any, Any]] = []  # what functions keep of their results
        self._known_results: list[set[Any]] = []
        self._of_one_run: list[tuple[dict[Any, Any], Any]] = []

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
        if is_stand_in(value):
            return False
        if issubclass(kind, Tensor):
            if kind is Tensor or not isinstance(value, nn.Parameter):  # that takes long to ask
                self.tensors[id(value)] = value
        elif issubclass(kind, _BY_OTHER_CODE) or id(value) in _READERS:
            self.dynamic = True
        elif kind.__module__.startswith("numpy.random") and (state := _state_of(value)) is not None:
            self._generators.append((value, state, label))
            return False
        elif kind is _LRU_CACHE:
            self._add_lru_cache(value)
        elif is_new and (array := bytes_of(value)) is not None:
            self._arrays.append((array, bytes(array), label))
        return True

    def _add_lru_cache(self, function: Any) -> None:
        """Adds the results that a function keeps; another one is no change of a value."""
        tables = (item for item in gc.get_referents(function) if type(item) is dict)
        for table in tables:
            if table is not vars(function):
                self.memos.append(table)
                self._known_results.append(set(table))

    def take(self, members: Members, held: bool) -> Iterable[tuple[str, Any]]:
        """Adds members, unless there are too many."""
        if members.kind is SCOPE:
            self._scopes.append(members)
            return self._named(members, self._names)
        if len(members.items) > LONGEST and members.kind not in (MODULE, TABLE):
            return ()
        if members.kind is MODULE and type(names := vars(members.container).get(_NAMES)) is set:
            self._members.setdefault(
                (LIST, id(names)), Members.of(LIST, names, members.label_of(_NAMES))
            )
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
        drew = (g for g in self._generators if repr(_state_of(g[0])) != repr(g[1]))
        other = (a for a in self._arrays if bytes(a[0]) != a[1])
        names = {*(source.label for source in sources), *(label for _, _, label in (*drew, *other))}
        return sorted(names.union(*(members.changed() for members in self._members.values())))

    def changes(self) -> list[Change] | None:
        """Returns the places that hold another value; None where something changed in another way.

        Other ways are a key that came or went, a list of another length, a changed class.
        """
        found: list[Change] = []
        for source in self._sources.values():
            now = source.container.get(source.key, ABSENT)
            if now is not source.value:
                found.append(Change(source, now))
        for members in self._members.values():
            if list(members.changed()):
                replaced = _replaced(members)
                if replaced is None:
                    return None
                found += replaced
        unlike = any(each.source.value is ABSENT or each.after is ABSENT for each in found)
        if unlike or any(bytes(array) != before for array, before, _ in self._arrays):
            return None
        if any(repr(_state_of(each)) != repr(state) for each, state, _ in self._generators):
            return None
        return list({change.key: change for change in found}.values())

    def note_results(self) -> None:
        """Takes down the results that functions keep now."""
        self._known_results = [set(table) for table in self.memos]

    def forget_results(self) -> None:
        """Drops the results that functions have kept since they were found, or since `note_results`."""
        for table, known in zip(self.memos, self._known_results, strict=True):
            for key in table.keys() - known:
                del table[key]

    def walk_for_one_run(self, value: Any, label: str) -> None:
        """Walks over a value that the forward itself may have made, and would not be rid of."""
        tables: tuple[dict[Any, Any], ...] = self._visited, self._members
        sizes = [len(table) for table in tables]
        self.walk(value, label)
        for table, size in zip(tables, sizes, strict=True):
            self._of_one_run += [(table, key) for key in islice(reversed(table), len(table) - size)]

    def forget_run(self) -> None:
        """Lets go of all that was found for this run only, and of the tensors."""
        for table, key in self._of_one_run:
            table.pop(key, None)
        self._of_one_run.clear()
        self.tensors.clear()

    def restore(self) -> None:
        """Puts back everything that is not as it was."""
        for source in self._sources.values():
            _set_item(source.container, source.key, source.value)
        for generator, state, _ in self._generators:
            if hasattr(generator, "set_state"):
                generator.set_state(state)
            else:
                getattr(generator, "bit_generator", generator).state = state
        for array, before, _ in self._arrays:
            if bytes(array) != before:
                memoryview(array).cast("B")[:] = before
        for members in self._members.values():
            if list(members.changed()):
                _put_back(members)


@contextmanager
def memos_restored(memos: list[dict[Any, Any]]) -> Iterator[None]:
    """Drops the results that functions kept inside the block, such as those of `functools.lru_cache`."""
    before = [(table, set(table)) for table in memos]  # a run may find more of them
    try:
        yield
    finally:
        for table, keys in before:
            for key in table.keys() - keys:
                del table[key]


def _set_item(table: dict[Any, Any], key: Any, value: Any) -> None:
    if value is ABSENT:
        table.pop(key, None)
    elif table.get(key, ABSENT) is not value:
        table[key] = value


def _put_back(members: Members) -> None:
    """Gives a container the members that it had."""
    kind, container, items, label = members
    if kind is CLASS:  # by the class, which remembers where its methods are
        owner = next(
            each
            for each in gc.get_referrers(container)
            if isinstance(each, type) and each.__qualname__ == label
        )
        for name in members.changed_keys():
            before = dict(items).get(name, ABSENT)
            delattr(owner, name) if before is ABSENT else setattr(owner, name, before)
    elif kind is ITEMS and isinstance(container, ContextVar):
        container.set(items[0][1] if items else None)
    elif kind is ITEMS and not hasattr(container, "extend"):  # slots
        for member, _ in members.now():
            member.__delete__(container)
        for member, value in items:
            member.__set__(container, value)
    elif (table := _table_of(members)) is not None:
        hidden = [(key, value) for key, value in table.items() if kind is EXTRA and key[:2] == "__"]
        kind_of = OrderedDict if isinstance(table, OrderedDict) else dict  # whose order is its own
        kind_of.clear(table)
        kind_of.update(table, [*hidden, *items])
    else:
        values = [item for _, item in items]
        container.clear()
        container.update(values) if isinstance(container, set) else container.extend(values)


def _replaced(members: Members) -> list[Change] | None:
    """Returns the members that are others now; None where they did not change one by one."""
    kind, container = members.kind, members.container
    now = members.now()
    table: Any = container
    if kind is MODULE:
        table = vars(container)
    elif kind is ATTRIBUTES:
        table = attributes_of(container)
    by_place = kind in (MODULE, ATTRIBUTES, TABLE, EXTRA, DICT) and type(table) in _DICTS
    by_place = by_place or (kind is LIST and type(container) is list)
    by_place = by_place or (kind is ITEMS and not hasattr(container, "extend"))
    if not by_place or isinstance(container, ContextVar) or len(now) != len(members.items):
        return None
    found = []
    for (key, before), (name, after) in zip(members.items, now, strict=True):
        if key is not name and key != name:
            return None
        if not is_same(before, after):
            found.append(Change(Source(table, key, before, members.label_of(key)), after))
    return found


def _table_of(members: Members) -> dict[Any, Any] | None:
    table: Any = members.container
    if members.kind is MODULE:
        table = vars(table)
    elif members.kind is ATTRIBUTES:
        table = attributes_of(table)
    return table if isinstance(table, dict) else None


def _state_of(generator: Any) -> Any:
    """Returns the state of one of numpy's generators; None for any other object."""
    if hasattr(generator, "get_state"):
        return generator.get_state(legacy=False)
    return getattr(getattr(generator, "bit_generator", generator), "state", None)
