"""The Python side of one forward: which code runs, which names that reads, and which values it changes.

A graph replays kernels and no Python. So whatever Python value the forward reads is baked in, and has to
be watched afterwards; what it changes, no replay will change.
"""

import gc
import logging
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FrameType,
    FunctionType,
    MemberDescriptorType,
    ModuleType,
)
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.ops import is_library, is_ours
from graphcache.patches import as_in_a_capture

DEPTH = 4  # containers inside an attribute that are searched: self.caches[i]["k"] is two deep
LONGEST = 4096  # items of a list, entries of a dict: longer ones are known by their length

HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: classes written in Python; others can't be changed
OF_MODULE = frozenset(vars(nn.Module())) - {"training"}
_TABLES = ("_parameters", "_buffers", "_modules")
_ALWAYS = OF_MODULE | {"training", "forward"}
# Code with these may read an attribute that it does not name.
_DYNAMIC = {"getattr", "vars", "__dict__", "attrgetter", "__getattribute__", "eval", "exec"}

NOT_SEARCHED = (
    str, bytes, int, float, complex, type, FunctionType, BuiltinFunctionType, ModuleType,
    logging.Logger, torch.dtype, torch.device, Tensor,
)  # fmt: skip

# Objects of these keep caches of their own, which change what is fast and not what is right.
_PACKAGES = ("triton", "cupy", "numba", "cuda", "torch.ops", "torch.library", "torch.cuda")
_OPAQUE = (*(f"{package}." for package in _PACKAGES), "torch._")  # not a file such as cuda_ops.py

_COMPILED = str(Path(torch.__file__).parent / "_dynamo" / "eval_frame.py")
_ASKS = as_in_a_capture.before.__code__
_CODE = (type, FunctionType, BuiltinFunctionType, ModuleType)

Place = tuple[Any, Any, Any]  # a container or a closure cell, a key, and what is there
_ABSENT = object()


class Reads:
    """Notes, while a forward runs, which functions run; and what was there when each began.

    Args:
        instance: what the forward is bound to, or None.
    """

    def __init__(self, instance: Any) -> None:
        self._codes: dict[CodeType, dict[str, Any]] = {}  # and the globals of each
        self._closures: dict[CodeType, dict[str, Any]] = {}
        self.seeded: str | None = None  # what it called of a generator of torch, to set its state
        self.asks = False  # whether a capture is under way
        self.compiled = False  # by torch.compile, in whole or in part
        self.captures = False  # and that makes CUDA graphs of its own
        self._drawn = False
        self._importing = 0  # what a first import runs is none of the forward's
        self._snapshot = _Snapshot()
        self._random = _host_random()
        self._instance = instance
        if instance is not None:
            self._snapshot.add(instance, "", DEPTH)

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors that the instance held before the forward ran, parameters excepted."""
        return list(self._snapshot.tensors.values())

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watches what runs inside the block, in this thread."""
        before, collects = sys.getprofile(), gc.isenabled()
        # Finalizers and gc.callbacks that run just now would be taken for code of the forward.
        gc.disable()
        sys.setprofile(self._called)
        try:
            yield
        finally:
            if collects:
                gc.enable()
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
        if code in self._codes:
            return
        self._codes[code] = frame.f_globals
        if _is_library(code, frame.f_globals):
            return
        names = frame.f_globals
        for name in code.co_names:
            if name in names:
                self._snapshot.add_entry(names, name, f"global {name}")
        if code.co_freevars:
            values = frame.f_locals
            held = {name: values[name] for name in code.co_freevars if name in values}
            if not all(isinstance(value, _CODE) for value in held.values()):
                self._closures[code] = held
            for name, value in held.items():
                self._snapshot.add(value, name, DEPTH)

    def _called_native(self, function: Any, caller: FrameType) -> None:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, torch.Generator):
            if name in ("manual_seed", "seed", "set_state", "graphsafe_set_state"):
                self.seeded = name
        elif type(owner).__module__.startswith(("random", "numpy.random")) and name != "getstate":
            # What compiles a kernel at its first call draws the names of temporary files.
            self._drawn = self._drawn or not _is_below(tempfile.__file__, caller)

    @property
    def names(self) -> frozenset[str] | None:
        """The attributes that the code that ran can read; None where it may read any."""
        names: set[str] = set(_ALWAYS)
        for code in self._codes:
            if not _is_library(code, self._codes[code]) and not _DYNAMIC.isdisjoint(code.co_names):
                return None
            names.update(code.co_names)
            names.update(text for text in code.co_consts if type(text) is str)
        return frozenset(names)

    def scopes(self) -> Iterator[Place]:
        """Yields the globals that the code that ran names, and the closure cells of its functions."""
        seen: set[tuple[int, str]] = set()
        for code, names in self._codes.items():
            if _is_library(code, names):
                continue
            for name in code.co_names:
                if name in names and (id(names), name) not in seen:
                    seen.add((id(names), name))
                    yield names, name, names[name]
                    yield from _inside_module(names[name], code)
        for _, cell, _ in _cells(list(self._closures)):
            yield cell, None, cell.cell_contents

    def changed(self) -> list[str]:
        """Returns the names of what was set, replaced, changed or deleted since the start.

        Nothing of what was there then is held any more afterwards.
        """
        names = self._snapshot.changed() or sorted(self._rebound())
        self._snapshot = _Snapshot()
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


def _is_below(file: str, frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != file:
        frame = frame.f_back
    return frame is not None


def _is_library(code: CodeType, names: dict[str, Any]) -> bool:
    return is_library(code.co_filename) or _is_opaque(names.get("__name__"))


def _is_opaque(module: Any) -> bool:
    return f"{module}.".startswith(_OPAQUE)


def _inside_module(value: Any, code: CodeType) -> Iterator[Place]:
    if isinstance(value, ModuleType) and not is_library(getattr(value, "__file__", None) or "<"):
        table = vars(value)
        for name in code.co_names:
            if name in table and not isinstance(table[name], (ModuleType, BuiltinFunctionType)):
                yield table, name, table[name]


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


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Returns the `__dict__` of an object that has one, and is not known to matter to no forward."""
    if isinstance(value, NOT_SEARCHED) or _is_opaque(type(value).__module__):
        return None
    try:
        found = getattr(value, "__dict__", None)
    except Exception:  # a property of that name; what it hides is not found
        return None
    return found if type(found) is dict else None


def slots_of(value: Any) -> list[tuple[MemberDescriptorType, Any]]:
    """Returns what finds each of an object's `__slots__`, and what is there."""
    if isinstance(value, NOT_SEARCHED) or _is_opaque(type(value).__module__):
        return []
    return [
        (member, getattr(value, name))
        for kind in type(value).__mro__
        for name, member in vars(kind).items()
        if isinstance(member, MemberDescriptorType)
        and kind.__flags__ & HEAP_TYPE
        and name != "__weakref__"
        and hasattr(value, name)
    ]


class _Snapshot:
    """Containers as they were: each with its items then, held so that no address comes again."""

    def __init__(self) -> None:
        self._containers: dict[int, tuple[Any, list[Any], str]] = {}
        self._entries: dict[tuple[int, str], tuple[dict[str, Any], Any, str]] = {}
        self._slots: dict[tuple[int, Any], tuple[Any, Any, str]] = {}
        self.tensors: dict[int, Tensor] = {}
        self._generators: list[tuple[Any, str, str]] = []  # numpy's

    def add_module(self, module: nn.Module, name: str) -> None:
        """Adds one module, without its children."""
        table = vars(module)
        self._note(table, name)
        for key in _TABLES:
            if isinstance(table.get(key), dict):  # a scripted module has others
                self._note(table[key], name)
        for tensor in module._buffers.values():
            self.add(tensor, name, 0)
        for key, value in table.items():
            if key not in OF_MODULE:
                self.add(value, f"{name}.{key}", DEPTH)

    def add_entry(self, table: dict[str, Any], key: str, label: str) -> None:
        """Adds one entry of a large dict."""
        self._entries.setdefault((id(table), key), (table, table[key], label))
        self.add(table[key], label, DEPTH)

    def add(self, value: Any, label: str, depth: int) -> None:
        """Adds a value and what it holds, `depth` containers deep."""
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                self.tensors[id(value)] = value
            return
        if isinstance(value, nn.Module):
            for name, module in value.named_modules():
                if id(vars(module)) not in self._containers:
                    self.add_module(module, f"{label}.{name}".strip("."))
            return
        if type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator"):
            self._generators.append((value, repr(value.bit_generator.state), label))
            return
        if depth == 0 or id(value) in self._containers:
            return
        if isinstance(value, (dict, list, tuple, set)):
            container = value
        else:
            for member, item in slots_of(value):
                name = f"{label}.{member.__name__}".lstrip(".")
                self._slots.setdefault((id(value), member), (value, item, name))
                self.add(item, name, depth - 1)
            found = attributes_of(value)
            if found is None or id(found) in self._containers:
                return
            container = found
        if len(container) > LONGEST:
            return
        self._note(container, label)
        if isinstance(container, dict):
            for key, item in list(dict.items(container)):
                self.add(item, f"{label}.{key}", depth - 1)
        else:
            for item in list(container):
                self.add(item, label, depth - 1)

    def _note(self, container: Any, label: str) -> None:
        self._containers.setdefault(id(container), (container, _items(container), label.lstrip(".")))

    def changed(self) -> list[str]:
        """Returns the names of what is not as it was."""
        names = {
            label
            for table, before, label in self._entries.values()
            if table.get(label.removeprefix("global "), _ABSENT) is not before
        }
        for generator, state, label in self._generators:
            if repr(generator.bit_generator.state) != state:
                names.add(label)
        for (_, member), (value, before, label) in self._slots.items():
            if getattr(value, member.__name__, _ABSENT) is not before:
                names.add(label)
        for container, before, label in self._containers.values():
            now = _items(container)
            if len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True)):
                continue
            if isinstance(container, dict):
                names.update(f"{label}.{key}".lstrip(".") for key in _differing(before, now))
            else:
                names.add(label)
        return sorted(names)


def _items(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return [item for pair in list(dict.items(container)) for item in pair]
    return list(container)


def _differing(before: list[Any], now: list[Any]) -> set[str]:
    first, second = dict(_pairs(before)), dict(_pairs(now))
    return {
        str(key)
        for key in first.keys() | second.keys()
        if first.get(key, _ABSENT) is not second.get(key, _ABSENT)
    }


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)
