"""Graphs emulated on the CPU: operations are recorded and replayed into the same storages.

The rules and the hazards are those of CUDA graphs. Outputs live in memory that other graphs use again.
Addresses and Python values are frozen. An operation that needs a value on the host can't be captured.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from graphcache import _C
from graphcache.runtime.base import Graph, Result, Runtime
from graphcache.runtime.emulated_arena import EmulatedArena, copy_memory
from graphcache.runtime.host_transfers import HostReads
from graphcache.runtime.obstacles import obstacle
from graphcache.runtime.op_schemas import mutated_by, take_apart, tensors_in
from graphcache.runtime.torch_patches import DispatchMode, as_in_a_capture
from graphcache.runtime.torch_state import uncompiled
from graphcache.runtime.undo_log import UndoLog, restored_afterwards

_aten = torch.ops.aten
_ALLOCATIONS = (
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
)
_CPU = torch.device("cpu")


class _Operation(NamedTuple):
    func: torch._ops.OpOverload
    args: Any
    kwargs: Any
    targets: list[tuple[int, Tensor]]  # which of the results is new, and the memory it goes to


class EmulatedGraph(Graph):
    """The operations of one capture, in order."""

    node = None  # copies on the CPU take its place

    def __init__(self) -> None:
        self.operations: list[_Operation] = []
        self.external: dict[int, Tensor] = {}  # memory that the capture read but did not make

    def release(self, keys: Iterable[int]) -> None:
        """Stops to keep the storages with these keys alive."""
        for key in keys:
            self.external.pop(key, None)

    def replay(self) -> None:
        """Runs the operations over the recorded addresses."""
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            for operation in self.operations:
                results = list(tensors_in(operation.func(*operation.args, **operation.kwargs)))
                for position, target in operation.targets:
                    copy_memory(target, results[position])


class EmulatedRuntime(Runtime):
    """Captures and replays on the CPU; see `graphcache.runtime.base.Runtime`."""

    name = "emulated"
    new_arena = EmulatedArena
    captures_run = True

    def capture(
        self,
        arena: EmulatedArena,
        body: Callable[[], Result],
        copier: _C.InputCopier | None,
        kernel: _C.CopyInKernel | None,
    ) -> tuple[EmulatedGraph, Result]:
        """Runs `body`, records its operations and undoes its effects; see `Runtime.capture`.

        A capture has no effects, but only a run shows shapes and strides. So state, live outputs in the
        arena and the random generator are put back afterwards.
        """
        recorder = _Recorder(arena)
        try:
            with (
                restored_afterwards(arena.segments),
                torch.random.fork_rng(devices=[]),
                uncompiled(),
                as_in_a_capture,
                HostReads(_CPU),
                recorder,
            ):
                result = body()
        finally:
            recorder.log.undo()
        return recorder.graph, result


class _Recorder(DispatchMode):
    """Runs each operation into memory of the arena and records it for replay."""

    def __init__(self, arena: EmulatedArena) -> None:
        super().__init__()
        self.graph = EmulatedGraph()
        self.log = UndoLog()
        self._arena = arena

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        parts = take_apart(func, args, kwargs, self)
        if parts is not NotImplemented:
            return parts
        if (found := obstacle(func, args, kwargs, _CPU)) is not None:
            raise found.error()
        if func is _aten.lift_fresh.default:  # a constant written in the source
            # Each replay makes it anew: a caller may write to what it gets.
            return self.__torch_dispatch__(_aten.clone.default, types, (args[0],))
        for tensor in mutated_by(func, args, kwargs):
            if not self._arena.owns(tensor):
                self.log.before(func, args, tensor)
        given = {_C.storage_key(tensor) for tensor in tensors_in(args, kwargs)}
        result = func(*args, **kwargs)
        placed: dict[int, Tensor] = {}
        targets = []
        for position, tensor in enumerate(tensors_in(result)):
            if _C.storage_key(tensor) not in given:
                placed[id(tensor)] = target = self._arena.allocate(tensor)
                copy_memory(target, tensor)
                targets.append((position, self._weakly(target)))
        if (targets or mutated_by(func, args, kwargs)) and func not in _ALLOCATIONS:
            weak_args = tree_map_only(Tensor, self._weakly, args)
            weak_kwargs = tree_map_only(Tensor, self._weakly, kwargs)
            self.graph.operations.append(_Operation(func, weak_args, weak_kwargs, targets))
        return tree_map_only(Tensor, lambda tensor: placed.get(id(tensor), tensor), result)

    def _weakly(self, tensor: Tensor) -> Tensor:
        """Returns a weak tensor, which pins no block of the arena."""
        if not self._arena.owns(tensor):
            self.graph.external[_C.storage_key(tensor)] = _C.owned(tensor)
        with torch.inference_mode(False):
            return _C.weak_ref(tensor)
