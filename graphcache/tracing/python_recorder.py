"""Records the Python side of one forward: the code that runs, its names, and the values that it changes.

A graph replays kernels and no Python. So whatever Python value the forward reads is baked in, and
guarded afterwards; what the forward changes, no replay will change.
"""

import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from itertools import takewhile
from pathlib import Path
from traceback import walk_stack
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch
from torch import nn

from graphcache import _C
from graphcache.guards.guards import ReadSet
from graphcache.guards.reachability import (
    ABSENT,
    HOOKS,
    OF_MODULE,
    SPECIAL,
    Source,
    code_in,
    is_of_package,
    is_opaque,
)
from graphcache.report.reasons import Reason
from graphcache.runtime.source_lines import OURS, is_library, is_ours, is_torch
from graphcache.runtime.torch_patches import as_in_a_capture
from graphcache.runtime.torch_state import uncollected
from graphcache.tracing.bytecode import NamesInCode, words_in
from graphcache.tracing.closures import Closures, contents_of
from graphcache.tracing.hooks import HookRecorder
from graphcache.tracing.library_code import LibraryCode
from graphcache.tracing.python_snapshot import Change, Snapshot

_ALWAYS = OF_MODULE | SPECIAL | {"training", "forward", "_call_impl"}
_TORCH = Path(torch.__file__).parent
_COMPILED = str(_TORCH / "_dynamo" / "eval_frame.py")
# Their Python compiles itself, eagerly, where no dispatch mode is active: `torch.cond`, flex_attention.
_HIGHER_ORDER = str(_TORCH / "_higher_order_ops"), str(_TORCH / "nn" / "attention")
_PICKLES = torch.Tensor._reduce_ex_internal.__code__
_CALL = nn.Module._call_impl.__code__
_ASKS = as_in_a_capture.before.__code__
# Their kernels may run on streams of their own, which no capture is told of.
_LAUNCHERS = ("cupy.", "cupyx.", "numba.cuda.", "numba_cuda.", "pycuda.", "taichi.", "warp.")
_FOREIGN = "it {}: such kernels may run on a stream that no capture sees"
# Calls whose effects nothing puts back, by the name of the function or by the module of its owner.
_EFFECTS = {"print", "input", "open", "write", "writelines", "system", "send", "sendall"}
_EFFECTS_OF = frozenset({"_io", "_queue", "_socket", "_multiprocessing", "sqlite3", "mmap"})
_SEEDS = ("manual_seed", "seed", "set_state", "graphsafe_set_state")
_DRAWS = "it draws random numbers of Python's or numpy's, which a graph freezes"
_READERS = {"getattr", "hasattr", "vars", "dir", "eval", "exec"}
_GENERATORS = ("random.", "_random.", "numpy.random.")
_SYSTEM = ("posix", "nt", "_uuid")
_OF_SYSTEM = ("urandom", "getrandom", "generate_time_safe")
_CLOCKS = {
    f"{name}{unit}"
    for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time", "clock_gettime")
    for unit in ("", "_ns")
} | {"localtime", "gmtime", "ctime", "strftime"}
_DATES = ("now", "utcnow", "today")
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
        hooks: the hooks of submodules that ran.
        snapshot: the Python values before the forward ran; empty after `changed()`.
        blocker: the first thing that no graph can hold, and its kind; or None.
        memos: the tables of results that functions keep, as `functools.lru_cache` does.
    """

    def __init__(
        self,
        instance: Any,
        function: Any = None,
        arguments: Any = (),
        snapshot: Snapshot | None = None,
    ) -> None:
        self.code = [function, *code_in(arguments)]
        # By code and globals, since code of two files may be equal; with what takes each call.
        self._ran: dict[tuple[int, int], tuple[CodeType, Callable[[FrameType], None] | None]] = {}
        self._dull: set[tuple[Any, str, type]] = set()  # functions of C that do not matter
        self._named: list[tuple[NamesInCode, dict[str, Any]]] = []  # of users' code, with its globals
        self._of_users: dict[tuple[int, int], CodeType] = {}  # likewise, code that is no library's
        self._dynamic = False
        self._closures = Closures()
        self._library = LibraryCode()
        self.asks = self.compiled = False
        self.effect: str | None = None
        self.hooks = HookRecorder()
        self.memos: list[dict[Any, Any]] = []
        self.blocker: tuple[str, Reason] | None = None
        self._importing = 0  # code that a first import runs is none of the forward's
        self._root = instance if isinstance(instance, nn.Module) else None
        self._calls_root = False
        self.snapshot = snapshot or Snapshot(self._root)
        self.snapshot.note_results()
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
            self._closures.settle()
            if any(a is not None and a != b for a, b in zip(random_before, _host_random(), strict=True)):
                self._block(Reason.HOST_RANDOM, _DRAWS)

    def _block(self, reason: Reason, text: str) -> None:
        self.blocker = self.blocker or (text, reason)

    def _called(self, frame: FrameType, event: str, what: Any) -> None:
        if event == "call":
            self._closures.settle()
            self._called_python(frame)
        elif event == "c_call":
            self._closures.settle()
            if not self._importing:
                self._called_native(what, frame)
        elif event == "return":
            self._closures.settle()
            if self._importing and _imports(frame):
                self._importing -= 1
            self.hooks.leave(frame)
            if frame.f_code.co_freevars:
                self._closures.leave(frame)

    def _called_python(self, frame: FrameType) -> None:
        code, scope = frame.f_code, frame.f_globals
        if _imports(frame):
            self._importing += 1
        if self._importing:
            return
        self.hooks.enter(frame)
        if code is _ASKS:
            self.asks = self.asks or not is_ours(frame.f_back)
        elif code is _PICKLES:
            self._block(Reason.READS_VALUE, "it reads a value on the host: `pickle` or `torch.save`")
        elif code is _CALL and self._root is not None and frame.f_locals["self"] is self._root:
            self._calls_root = True  # as a method that is not the forward may do
            for table in HOOKS:
                self.snapshot.walk(vars(self._root).get(table), table)
        elif code.co_name == "compile_wrapper" and code.co_filename == _COMPILED:
            of_torch = frame.f_back is not None and frame.f_back.f_code.co_filename
            self.compiled = self.compiled or not (of_torch and of_torch.startswith(_HIGHER_ORDER))
            config = getattr(frame.f_locals.get("self"), "compiler_config", None) or {}
            if config.get("triton.cudagraphs"):
                self._block(Reason.COMPILED_WITH_GRAPHS, _COMPILED_WITH_GRAPHS)
        key = id(code), id(scope)
        if known := self._ran.get(key):
            enter = known[1]
        else:
            self._note_launcher(scope.get("__name__"))
            enter = self._entered(frame)
            self._ran[key] = code, enter
        if enter is not None:
            enter(frame)

    def _entered(self, frame: FrameType) -> Callable[[FrameType], None] | None:
        """Takes code that runs for the first time; returns what takes each call of it."""
        code, scope = frame.f_code, frame.f_globals
        if is_ours(frame):
            return None
        if _is_of_library(frame):
            if self._library.add(code, scope):
                return self._library.enter
            in_closures = code.co_freevars and not is_torch(code.co_filename)
            return self._enter_library if in_closures else None
        named = NamesInCode(code)
        self._named.append((named, scope))
        # Libraries make such code as they run, such as Triton for each kernel that it compiles.
        if code.co_filename != "<string>" or scope.get("__name__") == "__main__":
            self._of_users[id(code), id(scope)] = code
        self.snapshot.add_names(named.attributes)
        for name in named.scope:
            self.snapshot.add_global(scope, name, f"global {name}")
        for module in named.imports(scope):
            self.snapshot.walk(module, module.__name__)
        return self._enter_closure if code.co_freevars else None

    def _enter_library(self, frame: FrameType) -> None:
        self._closures.enter(frame)

    def _enter_closure(self, frame: FrameType) -> None:
        for name, value in self._closures.enter(frame).items():
            if not _is_local_to_a_caller(frame, name, value):
                self.snapshot.walk_for_one_run(value, name)

    def _called_native(self, function: Any, caller: FrameType) -> None:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        module = getattr(function, "__module__", None)
        key = module, name, owner if isinstance(owner, type) else type(owner)
        if key in self._dull:
            return
        self._note_launcher(module or type(owner).__module__)
        if name in _EFFECTS or type(owner).__module__ in _EFFECTS_OF:
            hook = self.hooks.running(caller)
            if hook is not None:
                hook.effect = hook.effect or f"{name}()"
            if hook is not None or not _is_of_library(caller):
                self.effect = self.effect or f"{name}()"
            return
        if name in _HAND_OVER:
            self._block(Reason.FOREIGN_KERNELS, _FOREIGN.format("hands memory over by DLPack"))
        elif issubclass(type(owner), torch.Generator) and name in _SEEDS:
            self._block(Reason.SEEDS_GENERATOR, f"it sets the state of a random generator ({name})")
        elif name in _READERS:  # under another name
            of_user = not is_library(caller.f_code.co_filename)
            self._dynamic = self._dynamic or (of_user and name not in caller.f_code.co_names)
        elif module == "_pickle":
            self._dynamic = True
        elif type(owner) is str and name == "format":
            self._library.names.update(words_in(owner))
        elif not self._note_draw(module, owner, name, caller):
            self._dull.add(key)

    def _note_draw(self, module: Any, owner: Any, name: str, caller: FrameType) -> bool:
        """Blocks a graph if code of the user's gets a number that is another one at each call.

        Returns True if the function gives such numbers.
        """
        of_generator = f"{type(owner).__module__}.".startswith(_GENERATORS) and name != "getstate"
        # A generator without a seed gets one of the system's.
        draws = of_generator or (module in _SYSTEM and name in _OF_SYSTEM)
        if draws and _is_for_user(caller):
            self._block(Reason.HOST_RANDOM, _DRAWS)
        is_date = isinstance(owner, type) and issubclass(owner, date) and name in _DATES
        is_clock = is_date or (module == "time" and name in _CLOCKS)
        if is_clock and not _is_of_library(caller):
            self._block(Reason.READS_CLOCK, f"it reads the clock ({name}), which a graph freezes")
        return draws or is_clock

    def _note_launcher(self, module: Any) -> None:
        if is_of_package(str(module), _LAUNCHERS):
            library = str(module).partition(".")[0]
            self._block(Reason.FOREIGN_KERNELS, _FOREIGN.format(f"calls {library}"))

    def _sources(self) -> Iterator[Source]:
        """Yields the sources of globals, imports and closures of the code that ran."""
        for named, scope in self._named:
            builtin = scope.get("__builtins__")
            builtin = vars(builtin) if isinstance(builtin, ModuleType) else builtin or {}
            for name in named.scope:
                # One that is absent may be defined later.
                yield Source(scope, name, scope.get(name, ABSENT), f"global {name}")
                if name not in scope and name in builtin:
                    yield Source(builtin, name, builtin[name], name)
            for module in named.imports(scope):
                yield Source(sys.modules, module.__name__, module, module.__name__)
        for cell, name in self._closures.cells():
            yield Source(cell, None, contents_of(cell), f"closure {name}")
        yield from self._library.sources()

    def read_set(self) -> ReadSet:
        """Returns the code that ran and the names that this code can read."""
        users = frozenset[str]().union(*(named.attributes for named, _ in self._named))
        names = _ALWAYS.union(users, self._library.names)
        dynamic = (
            self._dynamic or self._library.dynamic or any(named.dynamic for named, _ in self._named)
        )
        sources = list(self._sources())
        names_read = None if dynamic else names
        return ReadSet(names_read, users, self.code, sources, self._of_users, self._calls_root)

    def changed(
        self, *, restore: bool = False
    ) -> tuple[list[str], Snapshot | None, list[Change] | None]:
        """Finds the values that were set, replaced, changed or deleted since the start.

        Lets go of all values that were there then; with `restore`, puts them back first.

        Returns:
            The names of these values; the snapshot if the values are as they were at the start; and the
            places that hold other values, None where something changed in another way.
        """
        names = self.snapshot.changed()
        replaced = self.snapshot.changes() if names else []
        if restore:
            self.snapshot.forget_results()
        if restore and names:
            self.snapshot.restore()
        rebound = sorted(self._closures.rebound(restore=restore))
        valid = self.snapshot if restore or not (names or rebound) else None
        self.snapshot.forget_run()
        self.memos = self.snapshot.memos
        self._dynamic = self._dynamic or self.snapshot.dynamic
        self.snapshot = Snapshot()
        return names or rebound, valid, None if rebound else replaced


def _imports(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_name == "_find_and_load" and code.co_filename.startswith("<frozen importlib")


def _is_of_library(frame: FrameType) -> bool:
    return is_library(frame.f_code.co_filename) or is_opaque(frame.f_globals.get("__name__"))


def _is_for_user(caller: FrameType) -> bool:
    """Return True if a number is drawn for code of the user's, perhaps by Python's own modules.

    Torch draws names of files, at least where a kernel is compiled.
    """
    frames = [frame for frame, _ in walk_stack(caller)]
    if any(frame.f_code.co_filename == tempfile.__file__ for frame in frames):
        return False
    names = ((frame, frame.f_code.co_filename) for frame in frames)
    first = next((frame for frame, name in names if is_torch(name) or not is_library(name)), None)
    return first is not None and not _is_of_library(first)


@contextmanager
def values_restored(instance: Any, function: Any, arguments: dict[str, Any]) -> Iterator[None]:
    """Puts back the Python values that a run of `function` inside the block changes, such as counts."""
    python = PythonRecorder(instance, function, ((), arguments))
    try:
        with uncollected(), python.record():
            yield
    finally:
        python.changed(restore=True)


def _is_local_to_a_caller(frame: FrameType, name: str, value: Any) -> bool:
    """Return True if a closure variable is of a call that is under way inside the forward."""
    callers = takewhile(lambda caller: not is_ours(caller[0]), walk_stack(frame.f_back))
    return any(
        name in caller.f_code.co_cellvars and caller.f_locals.get(name) is value for caller, _ in callers
    )


def _host_random() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy.random")
    theirs = None if numpy is None else numpy.get_state(legacy=False)["state"]
    return random.getstate(), None if theirs is None else (theirs["pos"], theirs["key"].tobytes())
