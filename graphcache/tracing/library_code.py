"""Finds what code of torch and of Python reads: functions of theirs, and attributes of any name."""

import builtins
import functools
from collections.abc import Iterable
from functools import cache
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from graphcache.guards.reachability import ABSENT, CODE, Source, is_of_library, is_plain
from graphcache.runtime.source_lines import is_torch
from graphcache.tracing.bytecode import NamesInCode

# These read attributes that their callers name, and those of functions.
_BY_NAMES_OF_CALLERS = {
    nn.Module.__getattr__.__code__,
    functools.cached_property.__get__.__code__,
    functools.update_wrapper.__code__,
}
_IMPORTS = "_handle_fromlist"
# The members of these modules are attributes whose names are numbers, or keys of the user's.
_OF_MEMBERS = {nn.ParameterList.__getitem__.__code__, nn.ParameterDict.__getitem__.__code__}
_NOT_READ = (Tensor, nn.Module, type, FunctionType, BuiltinFunctionType)

_names_in = cache(NamesInCode)


class LibraryCode:
    """The code of libraries that ran.

    Attributes:
        dynamic: whether some of it may read any attribute of an object of the user's.
        names: those of attributes that it reads.
    """

    def __init__(self) -> None:
        self.dynamic = False
        self.names: set[str] = set()
        self._ran: list[tuple[CodeType, dict[str, Any]]] = []

    def add(self, code: CodeType, scope: dict[str, Any]) -> bool:
        """Takes code that runs for the first time; `scope`: its globals.

        Returns True if what the code reads depends on the call.
        """
        named = _names_in(code)
        self.names.update(code.co_names, named.attributes)
        self._ran.append((code, scope))
        if code in _BY_NAMES_OF_CALLERS or code.co_name == _IMPORTS:
            return False
        if code in _OF_MEMBERS or (named.dynamic and is_torch(code.co_filename)):
            return True
        self.dynamic = self.dynamic or named.dynamic
        return False

    def enter(self, frame: FrameType) -> None:
        """Takes a call of such code. What torch reads of its own objects is no state of the user's."""
        if frame.f_code in _OF_MEMBERS:
            self.names.update(vars(frame.f_locals["self"]))
        elif not self.dynamic:
            self.dynamic = any(map(_is_of_user, frame.f_locals.values()))

    def sources(self) -> Iterable[Source]:
        """Returns those of the functions, classes and modules that the code reads; after it ran.

        While it runs, some functions of torch are replaced by ours.
        """
        found: dict[tuple[int, str], Source] = {}
        for code, scope in self._ran:
            named = _names_in(code).scope
            pending = [(scope, named, False), (vars(builtins), named - scope.keys(), False)]
            searched: set[int] = set()
            while pending:
                table, names, is_lazy = pending.pop()
                searched.add(id(table))
                for name in names:
                    value = table.get(name, ABSENT)
                    if not isinstance(value, CODE) and not (is_lazy and value is ABSENT):
                        continue
                    if (id(table), name) not in found:
                        label = f"{table.get('__name__')}.{name}"
                        found[id(table), name] = Source(table, name, value, label)
                    if isinstance(value, ModuleType) and id(vars(value)) not in searched:
                        # torch._VF makes what it is asked for; what is put there comes before.
                        is_lazy = type(value) is not ModuleType
                        pending.append((vars(value), set(code.co_names), is_lazy))
        return found.values()


def _is_of_user(value: Any) -> bool:
    kind = type(value)
    return not (is_plain(value) or issubclass(kind, _NOT_READ) or is_of_library(kind))
