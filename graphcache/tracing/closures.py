"""Finds the functions that a forward runs, and so the cells of their closures, from their frames.

A frame that runs does not show its function. One that ended, and that somebody holds, shows it to the
cycle collector. So each such frame is held until the next event after its end. Asking the collector for
all functions of a code instead takes long, and finds none that was there at `gc.freeze()`.
"""

import gc
from collections.abc import Iterator
from types import CellType, FrameType, FunctionType
from typing import Any, NamedTuple
from weakref import ref

from graphcache.guards.reachability import ABSENT


class _Call(NamedTuple):
    """A call that is under way: its frame, its number, and the closure variables as they were."""

    frame: FrameType
    number: int
    before: dict[str, Any]


class _Variable(NamedTuple):
    """A closure variable: its cell, its name, the value before, and from which call that is known."""

    cell: CellType
    name: str
    before: Any
    number: int


class Closures:
    """The closures of the functions that ran, and the values there before."""

    def __init__(self) -> None:
        self._calls: dict[int, _Call] = {}
        self._ended: dict[int, _Call] = {}
        self._count = 0
        self._functions: dict[int, ref[FunctionType]] = {}
        self._variables: dict[int, dict[int, _Variable]] = {}  # of each function, by cell

    def enter(self, frame: FrameType) -> dict[str, Any]:
        """Takes a frame that begins, or goes on; returns its closure variables."""
        if id(frame) in self._calls:
            return {}
        values = frame.f_locals
        before = {name: values.get(name, ABSENT) for name in frame.f_code.co_freevars}
        self._count += 1
        self._calls[id(frame)] = _Call(frame, self._count, before)
        return {name: value for name, value in before.items() if value is not ABSENT}

    def leave(self, frame: FrameType) -> None:
        """Takes a frame that is about to end, or to be suspended."""
        if call := self._calls.get(id(frame)):
            self._ended[id(frame)] = call

    def settle(self) -> None:
        """Finds the functions of the frames that ended."""
        if not self._ended:
            return
        for key, call in list(self._ended.items()):
            code = call.frame.f_code
            for item in gc.get_referents(call.frame):  # without any if it is a generator that goes on
                if type(item) is FunctionType and item.__code__ is code:
                    self._add(item, call)
                    del self._ended[key], self._calls[key]
                    break

    def _add(self, function: FunctionType, call: _Call) -> None:
        known = self._functions.get(id(function))
        if known is None or known() is not function:
            self._functions[id(function)] = ref(function)
            self._variables[id(function)] = {}
        variables = self._variables[id(function)]
        for cell, name in _named_cells(function):
            earlier = variables.get(id(cell))
            if earlier is None or earlier.number > call.number:
                variables[id(cell)] = _Variable(cell, name, call.before[name], call.number)

    def rebound(self, *, restore: bool) -> set[str]:
        """Returns the names of variables that hold something else now; lets go of what they held.

        With `restore`, variables get back what they held. A function that the forward made and let go of
        is none of the caller's.
        """
        changed = self._changed()
        if restore and changed:
            self._restore()
        for held in (self._calls, self._ended, self._variables):
            held.clear()
        if changed:
            gc.collect(0)  # a function in a cell of its own dies late
        return {name for function, name in changed if function() is not None}

    def _changed(self) -> list[tuple[ref[FunctionType], str]]:
        """Returns the functions with variables that hold something else than before."""
        first: dict[int, _Variable] = {}
        for variables in self._variables.values():
            for key, variable in variables.items():
                if key not in first or first[key].number > variable.number:
                    first[key] = variable
        changed = {key: v.name for key, v in first.items() if contents_of(v.cell) is not v.before}
        return [
            (self._functions[owner], changed[key])
            for owner, variables in self._variables.items()
            for key in variables.keys() & changed.keys()
        ]

    def _restore(self) -> None:
        variables = [each for found in self._variables.values() for each in found.values()]
        for variable in sorted(
            variables, key=lambda each: -each.number
        ):  # the first is the last to count
            if variable.before is ABSENT:
                del variable.cell.cell_contents
            else:
                variable.cell.cell_contents = variable.before

    def cells(self) -> Iterator[tuple[CellType, str]]:
        """Yields the cells, and their names, of the functions that still exist."""
        if any(map(_is_in_own_cell, self._alive())):
            gc.collect(0)
        for function in self._alive():
            yield from _named_cells(function)

    def _alive(self) -> Iterator[FunctionType]:
        found = (reference() for reference in self._functions.values())
        return (function for function in found if function is not None)


def _is_in_own_cell(function: FunctionType) -> bool:
    """Return True if the function may be in a cell of its own: then it dies late."""
    held = [contents_of(cell) for cell, _ in _named_cells(function)]
    theirs = [cell for item in held if type(item) is FunctionType for cell, _ in _named_cells(item)]
    return any(item is function for item in (*held, *map(contents_of, theirs)))


def _named_cells(function: FunctionType) -> Iterator[tuple[CellType, str]]:
    return zip(function.__closure__ or (), function.__code__.co_freevars, strict=True)


def contents_of(cell: CellType) -> Any:
    """Returns what a cell holds; `ABSENT` where nothing does."""
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT
