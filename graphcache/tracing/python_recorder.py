"""The Python side of one forward: which code runs, which names that reads, and which values it changes.

A graph replays kernels and no Python. So whatever Python value the forward reads is baked in, and has to
be watched afterwards; what it changes, no replay will change.
"""

import gc
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from graphcache.call.object_args import is_opaque
from graphcache.guards.guards import ReadSet
from graphcache.guards.reachability import DEPTH, OF_MODULE, SPECIAL, Place, code_in
from graphcache.runtime.source_lines import is_library, is_ours
from graphcache.runtime.torch_patches import as_in_a_capture
from graphcache.tracing.bytecode import NamesInCode
from graphcache.tracing.python_snapshot import Snapshot

_ALWAYS = OF_MODULE | SPECIAL | {"training", "forward"}
_COMPILED = str(Path(torch.__file__).parent / "_dynamo" / "eval_frame.py")
_ASKS = as_in_a_capture.before.__code__
# Their kernels may run on streams of their own, which no capture is told of.
_LAUNCHERS = ("cupy.", "cupyx.", "numba.cuda.", "numba_cuda.", "pycuda.", "taichi.", "warp.")
_HAND_OVER = ("_to_dlpack", "_to_dlpack_versioned")
_CODE = (type, FunctionType, BuiltinFunctionType, ModuleType)


class PythonRecorder:
    """Notes, while a forward runs, which functions run; and what was there when each began.

    Args:
        instance: what the forward is bound to, or None.
        function: the forward; it is not among its own globals.
        arguments: what it is given.

    Attributes:
        code: what there is to run besides: the forward, and classes and functions in the arguments.
    """

    def __init__(self, instance: Any, function: Any = None, arguments: Any = ()) -> None:
        self.code = [function, *code_in(arguments)]
        self._seen: set[CodeType] = set()
        self._named: dict[
            CodeType, tuple[NamesInCode, dict[str, Any]]
        ] = {}  # with globals; not libraries'
        self._dynamic = False
        self._closures: dict[CodeType, dict[str, Any]] = {}
        self._in_cells: list[tuple[str, Any]] = []  # functions and classes in other closures
        self.seeded: str | None = None  # what it called of a generator of torch, to set its state
        self.launches: str | None = None  # what it does that has others launch kernels
        self.asks = False  # whether a capture is under way
        self.compiled = False  # by torch.compile, in whole or in part
        self.captures = False  # and that makes CUDA graphs of its own
        self._drawn = False
        self._importing = 0  # what a first import runs is none of the forward's
        self._snapshot = Snapshot()
        self._random = _host_random()
        for root in (instance, *self.code):
            self._snapshot.add(root, "", DEPTH)

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors that the instance held before the forward ran, parameters excepted."""
        return list(self._snapshot.tensors.values())

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watches what runs inside the block, in this thread; the collector has to be off.

        Finalizers and gc.callbacks that run just now would be taken for code of the forward.
        """
        before = sys.getprofile()
        sys.setprofile(self._called)
        try:
            yield
        finally:
            sys.setprofile(before)

    def _called(self, frame: FrameType, event: str, what: Any) -> None:
        if event == "c_call":
            if not self._importing:
                self._called_native(what, frame)
            return
        code = frame.f_code
        if code.co_name == "_find_and_load" and code.co_filename.startswith("<frozen importlib"):
            self._importing += {"call": 1, "return": -1}.get(event, 0)
        if event != "call" or self._importing:
            return
        if code is _ASKS:
            self.asks = self.asks or not is_ours(frame.f_back)
        elif code.co_name == "compile_wrapper" and code.co_filename == _COMPILED:
            self.compiled = True
            config = getattr(frame.f_locals.get("self"), "compiler_config", None) or {}
            self.captures = self.captures or bool(config.get("triton.cudagraphs"))
        if code in self._seen:
            return
        self._seen.add(code)
        self._note_launcher(frame.f_globals.get("__name__"))
        if _is_library(code, frame.f_globals):
            return
        named, scope = self._named[code] = NamesInCode(code), frame.f_globals
        self._snapshot.add_names(named.attributes)
        for name in named.scope:
            self._snapshot.add_entry(scope, name, f"global {name}")
        for module in named.imports(scope):
            self._snapshot.add(module, module.__name__, DEPTH)
        if code.co_freevars:
            values = frame.f_locals
            held = {name: values[name] for name in code.co_freevars if name in values}
            if not all(isinstance(value, _CODE) for value in held.values()):
                self._closures[code] = held
            else:  # to find their cells takes long
                self._in_cells.extend(held.items())
            for name, value in held.items():
                if not _is_local_to_a_caller(frame, name, value):
                    self._snapshot.add(value, name, DEPTH)

    def _called_native(self, function: Any, caller: FrameType) -> None:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        self._note_launcher(getattr(function, "__module__", None) or type(owner).__module__)
        if name in _HAND_OVER:
            self.launches = self.launches or "hands memory over by DLPack"
        if isinstance(owner, torch.Generator):
            if name in ("manual_seed", "seed", "set_state", "graphsafe_set_state"):
                self.seeded = name
        elif type(owner).__module__.startswith(("random", "numpy.random")) and name != "getstate":
            # What compiles a kernel at its first call draws the names of temporary files.
            self._drawn = self._drawn or not _is_below(tempfile.__file__, caller)

    def _note_launcher(self, module: Any) -> None:
        if self.launches is None and f"{module}.".startswith(_LAUNCHERS):
            self.launches = f"calls {str(module).partition('.')[0]}"

    @property
    def names(self) -> frozenset[str] | None:
        """The attributes that the code that ran can read; None where it may read any."""
        if self._dynamic or any(named.dynamic for named, _ in self._named.values()):
            return None
        names = set(_ALWAYS)
        for code in self._seen:
            if code not in self._named:
                names.update(code.co_names)
                names.update(text for text in code.co_consts if type(text) is str)
        return self.users_names | names

    @property
    def users_names(self) -> frozenset[str]:
        """The names in code that is no library's: they are looked up in Python modules."""
        return frozenset().union(*(named.attributes for named, _ in self._named.values()))

    def scopes(self) -> Iterator[tuple[Place, str]]:
        """Yields where the code that ran finds globals, imports and closures; and their names."""
        for named, scope in self._named.values():
            builtin = scope.get("__builtins__")
            builtin = vars(builtin) if isinstance(builtin, ModuleType) else builtin or {}
            for name in named.scope:
                if name in scope:
                    yield (scope, name, scope[name]), f"global {name}"
                    continue
                yield (scope, name), f"global {name}"  # it may be defined later
                if name in builtin:
                    yield (builtin, name, builtin[name]), name
            for module in named.imports(scope):
                yield (sys.modules, module.__name__, module), module.__name__
        for _, cell, name in _cells(list(self._closures)):
            yield (cell, None, cell.cell_contents), f"closure {name}"
        for name, value in self._in_cells:
            yield ((value,), 0, value), f"closure {name}"

    def read_set(self) -> ReadSet:
        """Returns the code that ran and the names that this code can read."""
        return ReadSet(self.names, self.users_names, self.code, list(self.scopes()))

    def changed(self) -> list[str]:
        """Returns the names of what was set, replaced, changed or deleted since the start.

        Nothing of what was there then is held any more afterwards.
        """
        names = self._snapshot.changed() or sorted(self._rebound())
        self._dynamic = self._snapshot.dynamic
        self._snapshot = Snapshot()
        for held in self._closures.values():
            held.clear()
        return names

    def _rebound(self) -> set[str]:
        """Returns the names of closure variables that no cell holds any more as they were."""
        held: dict[tuple[CodeType, str], list[Any]] = {}
        for function, cell, name in _cells(list(self._closures)):
            held.setdefault((function.__code__, name), []).append(cell.cell_contents)
        return {
            name
            for code, values in self._closures.items()
            for name, before in values.items()
            if (code, name) in held and not any(now is before for now in held[code, name])
        }

    def drew_on_the_host(self) -> bool:
        """Tells whether Python's or numpy's random numbers were drawn, which a graph would freeze."""
        before, now = self._random, _host_random()
        return self._drawn or before[0] != now[0] or (before[1] is not None and before[1] != now[1])


def _is_local_to_a_caller(frame: FrameType, name: str, value: Any) -> bool:
    """Tells whether a closure variable is of a call that is under way inside the forward."""
    caller = frame.f_back
    while caller is not None and not is_ours(caller):
        if name in caller.f_code.co_cellvars and caller.f_locals.get(name) is value:
            return True
        caller = caller.f_back
    return False


def _is_below(file: str, frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != file:
        frame = frame.f_back
    return frame is not None


def _is_library(code: CodeType, names: dict[str, Any]) -> bool:
    return is_library(code.co_filename) or is_opaque(names.get("__name__"))


def _cells(codes: list[CodeType]) -> Iterator[tuple[FunctionType, CellType, str]]:
    """Yields the filled cells, and their names, of the functions that have such code and still exist."""
    if not codes:
        return
    for function in gc.get_referrers(*codes):
        if isinstance(function, FunctionType):
            names = function.__code__.co_freevars
            for cell, name in zip(function.__closure__ or (), names, strict=True):
                try:
                    _ = cell.cell_contents
                except ValueError:  # not filled yet
                    continue
                yield function, cell, name


def _host_random() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy.random")
    theirs = None if numpy is None else numpy.get_state(legacy=False)["state"]
    return random.getstate(), None if theirs is None else (theirs["pos"], theirs["key"].tobytes())
