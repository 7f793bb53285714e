"""Records the Python side of one forward: the code that runs, its names, and the values that it changes.

A graph replays kernels and no Python. So whatever Python value the forward reads is baked in, and
guarded afterwards; what the forward changes, no replay will change.
"""

import gc
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from traceback import walk_stack
from types import CellType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch

from graphcache import _C
from graphcache.guards.guards import ReadSet
from graphcache.guards.reachability import ABSENT, CODE, OF_MODULE, SPECIAL, Source, code_in, is_opaque
from graphcache.report.reasons import Reason
from graphcache.runtime.source_lines import OURS, is_library, is_ours
from graphcache.runtime.torch_patches import as_in_a_capture
from graphcache.tracing.bytecode import NamesInCode
from graphcache.tracing.python_snapshot import Snapshot

_ALWAYS = OF_MODULE | SPECIAL | {"training", "forward"}
_TORCH = Path(torch.__file__).parent
_COMPILED = str(_TORCH / "_dynamo" / "eval_frame.py")
# Their Python compiles itself, eagerly, where no dispatch mode is active: `torch.cond`, flex_attention.
_HIGHER_ORDER = str(_TORCH / "_higher_order_ops"), str(_TORCH / "nn" / "attention")
_PICKLES = torch.Tensor._reduce_ex_internal.__code__
_ASKS = as_in_a_capture.before.__code__
# Their kernels may run on streams of their own, which no capture is told of.
_LAUNCHERS = ("cupy.", "cupyx.", "numba.cuda.", "numba_cuda.", "pycuda.", "taichi.", "warp.")
_FOREIGN = "it {}: such kernels may run on a stream that no capture sees"
# Calls whose effects nothing puts back, by the name of the function or by the module of its owner.
_EFFECTS = {"print", "input", "open", "write", "writelines", "system", "send", "sendall"}
_EFFECTS_OF = frozenset({"_io", "_queue", "_socket", "_multiprocessing", "sqlite3", "mmap"})
_SEEDS = ("manual_seed", "seed", "set_state", "graphsafe_set_state")
_DRAWS = "it draws random numbers of Python's or numpy's, which a graph freezes"
_HAND_OVER = ("_to_dlpack", "_to_dlpack_versioned")
_COMPILED_WITH_GRAPHS = (
    "torch.compile makes CUDA graphs of it (mode='reduce-overhead' or 'max-autotune'), which no graph "
    "can hold; compile it with mode='default' or 'max-autotune-no-cudagraphs'"
)


class PythonRecorder:
    """Records, while a forward runs, which functions run; and the values that each could change.

    Args:
        instance: the object that the forward is bound to, or None.
        function: the forward; it is not among its own globals.
        arguments: those of the call.
        snapshot: that of an earlier run, after which the values are as they were; or None.

    Attributes:
        code: the forward, and classes and functions in the arguments.
        asks: whether the forward asks if a capture is under way.
        compiled: whether `torch.compile` compiled some of it.
        effect: something that the user's code did and that nothing puts back; or None.
        snapshot: the Python values before the forward ran; empty after `changed()`.
        blocker: the first thing that no graph can hold, and its kind; or None.
        memos: the tables of results that functions keep, as `functools.lru_cache` does.
        valid: the snapshot, after `changed()`, if the values are as they were.
    """

    def __init__(
        self,
        instance: Any,
        function: Any = None,
        arguments: Any = (),
        snapshot: Snapshot | None = None,
    ) -> None:
        self.code = [function, *code_in(arguments)]
        self._ran: set[CodeType] = set()
        # That of them which is no library's, with its names and its globals.
        self._named: dict[CodeType, tuple[NamesInCode, dict[str, Any]]] = {}
        self._dynamic = False
        self._closures: dict[CodeType, dict[str, Any]] = {}
        self._in_cells: list[tuple[str, Any]] = []  # functions and classes in other closures
        self.asks = self.compiled = False
        self.effect: str | None = None
        self.memos: list[dict[Any, Any]] = []
        self.valid: Snapshot | None = None
        self.blocker: tuple[str, Reason] | None = None
        self._importing = 0  # code that a first import runs is none of the forward's
        self.snapshot = snapshot or Snapshot()
        for root in (instance, *self.code):
            self.snapshot.walk(root, "")

    @contextmanager
    def record(self) -> Iterator[None]:
        """Records the code that runs inside the block, in this thread; the collector has to be off.

        Finalizers and gc.callbacks that run just now would be taken for code of the forward.
        """
        profile, random_before = sys.getprofile(), _host_random()
        _C.profile_calls(self._called, OURS)  # in C: most events come from the recorders
        try:
            yield
        finally:
            sys.setprofile(profile)
            if any(a is not None and a != b for a, b in zip(random_before, _host_random(), strict=True)):
                self._block(Reason.HOST_RANDOM, _DRAWS)

    def _block(self, reason: Reason, text: str) -> None:
        self.blocker = self.blocker or (text, reason)

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
        elif code is _PICKLES:
            self._block(Reason.READS_VALUE, "it reads a value on the host: `pickle` or `torch.save`")
        elif code.co_name == "compile_wrapper" and code.co_filename == _COMPILED:
            of_torch = frame.f_back is not None and frame.f_back.f_code.co_filename
            self.compiled = self.compiled or not (of_torch and of_torch.startswith(_HIGHER_ORDER))
            config = getattr(frame.f_locals.get("self"), "compiler_config", None) or {}
            if config.get("triton.cudagraphs"):
                self._block(Reason.COMPILED_WITH_GRAPHS, _COMPILED_WITH_GRAPHS)
        if code in self._ran:
            return
        self._ran.add(code)
        self._note_launcher(frame.f_globals.get("__name__"))
        if is_library(code.co_filename) or is_opaque(frame.f_globals.get("__name__")):
            return
        named, scope = self._named[code] = NamesInCode(code), frame.f_globals
        self.snapshot.add_names(named.attributes)
        for name in named.scope:
            self.snapshot.add_global(scope, name, f"global {name}")
        for module in named.imports(scope):
            self.snapshot.walk(module, module.__name__)
        if code.co_freevars:
            values = frame.f_locals
            held = {name: values[name] for name in code.co_freevars if name in values}
            if not all(isinstance(value, CODE) for value in held.values()):
                self._closures[code] = held
            else:  # to find their cells takes long
                self._in_cells.extend(held.items())
            for name, value in held.items():
                if not _is_local_to_a_caller(frame, name, value):
                    self.snapshot.walk(value, name)

    def _called_native(self, function: Any, caller: FrameType) -> None:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        self._note_launcher(getattr(function, "__module__", None) or type(owner).__module__)
        is_effect = name in _EFFECTS or type(owner).__module__ in _EFFECTS_OF
        if is_effect and not (
            is_library(caller.f_code.co_filename) or is_opaque(caller.f_globals.get("__name__"))
        ):
            self.effect = self.effect or f"{name}()"
        if name in _HAND_OVER:
            self._block(Reason.FOREIGN_KERNELS, _FOREIGN.format("hands memory over by DLPack"))
        if isinstance(owner, torch.Generator) and name in _SEEDS:
            self._block(Reason.SEEDS_GENERATOR, f"it sets the state of a random generator ({name})")
        if (
            type(owner).__module__.startswith(("random", "numpy.random"))
            and name != "getstate"
            # A kernel that is compiled at its first call draws the names of temporary files.
            and all(frame.f_code.co_filename != tempfile.__file__ for frame, _ in walk_stack(caller))
        ):
            self._block(Reason.HOST_RANDOM, _DRAWS)

    def _note_launcher(self, module: Any) -> None:
        if f"{module}.".startswith(_LAUNCHERS):
            library = str(module).partition(".")[0]
            self._block(Reason.FOREIGN_KERNELS, _FOREIGN.format(f"calls {library}"))

    def _sources(self) -> Iterator[Source]:
        """Yields the sources of globals, imports and closures of the code that ran."""
        for named, scope in self._named.values():
            builtin = scope.get("__builtins__")
            builtin = vars(builtin) if isinstance(builtin, ModuleType) else builtin or {}
            for name in named.scope:
                # One that is absent may be defined later.
                yield Source(scope, name, scope.get(name, ABSENT), f"global {name}")
                if name not in scope and name in builtin:
                    yield Source(builtin, name, builtin[name], name)
            for module in named.imports(scope):
                yield Source(sys.modules, module.__name__, module, module.__name__)
        for _, cell, name in _cells(list(self._closures)):
            yield Source(cell, None, cell.cell_contents, f"closure {name}")
        for name, value in self._in_cells:
            yield Source((value,), 0, value, f"closure {name}")

    def read_set(self) -> ReadSet:
        """Returns the code that ran and the names that this code can read."""
        users = frozenset[str]().union(*(named.attributes for named, _ in self._named.values()))
        libraries = [code for code in self._ran if code not in self._named]
        texts = {text for code in libraries for text in code.co_consts if type(text) is str}
        names = _ALWAYS.union(users, texts, *(code.co_names for code in libraries))
        dynamic = self._dynamic or any(named.dynamic for named, _ in self._named.values())
        ran = frozenset(self._ran)
        return ReadSet(None if dynamic else names, users, self.code, list(self._sources()), ran)

    def changed(self, *, restore: bool = False) -> list[str]:
        """Returns the names of the values that were set, replaced, changed or deleted since the start.

        Lets go of all values that were there then; with `restore`, puts them back first.
        """
        names = self.snapshot.changed() or sorted(self._rebound())
        if restore and names:
            self.snapshot.restore()
            self._restore_closures()
        self.valid = self.snapshot if restore or not names else None
        self._dynamic, self.memos = self.snapshot.dynamic, self.snapshot.memos
        self.snapshot = Snapshot()
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

    def _restore_closures(self) -> None:
        cells = list(_cells(list(self._closures)))
        for function, cell, name in cells:
            before = self._closures[function.__code__].get(name, ABSENT)
            alike = sum(other.__code__ is function.__code__ and n == name for other, _, n in cells)
            if before is not ABSENT and alike == 1:  # of several, it is not known which had the value
                cell.cell_contents = before


def _is_local_to_a_caller(frame: FrameType, name: str, value: Any) -> bool:
    """Return True if a closure variable is of a call that is under way inside the forward."""
    callers = takewhile(lambda caller: not is_ours(caller[0]), walk_stack(frame.f_back))
    return any(
        name in caller.f_code.co_cellvars and caller.f_locals.get(name) is value for caller, _ in callers
    )


def _cells(codes: list[CodeType]) -> Iterator[tuple[FunctionType, CellType, str]]:
    """Yields the filled cells, and their names, of the functions that have such code and still exist."""
    for function in gc.get_referrers(*codes) if codes else ():
        if isinstance(function, FunctionType):
            names = function.__code__.co_freevars
            for cell, name in zip(function.__closure__ or (), names, strict=True):
                if gc.get_referents(cell):  # else it is not filled yet
                    yield function, cell, name


def _host_random() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy.random")
    theirs = None if numpy is None else numpy.get_state(legacy=False)["state"]
    return random.getstate(), None if theirs is None else (theirs["pos"], theirs["key"].tobytes())
