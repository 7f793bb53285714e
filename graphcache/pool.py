"""The memory of graphs: one global pool per device, divided into lanes."""

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from graphcache import _C
from graphcache.errors import OptionError
from graphcache.runtime import runtime_for
from graphcache.runtime.base import Graph, PoolMemory, Runtime, Stopwatch


class Lane:
    """One allocator pool, in which only one graph's results are live at a time.

    Attributes:
        open: False after a failed capture: its graphs still replay, but no more are captured into it.
    """

    def __init__(self, runtime: Runtime, device: torch.device, *, weak: bool) -> None:
        self.open = True
        self.arena = runtime.new_arena(device)
        self._runtime, self._device = runtime, device
        self._weak = weak
        self.native = _C.Lane(self.arena)
        self.follow_stream()
        self._first_results: list[StorageWeakRef] = []
        self._graphs: weakref.WeakSet[Graph] = weakref.WeakSet()

    def is_free(self) -> bool:
        """Return True if no output is held here, so that another graph may be captured."""
        self._first_results = [result for result in self._first_results if not result.expired()]
        return self.open and not self._first_results and not self.native.holds_outputs()

    def is_done(self) -> bool:
        """Return True if neither a graph nor an output refers to the memory of this lane."""
        return not self._graphs and not self.native.holds_outputs()

    def capture(
        self,
        body: Callable[[], list[Tensor]],
        copier: _C.InputCopier | None = None,
        kernel: _C.CopyInKernel | None = None,
    ) -> tuple[Graph, list[Tensor]]:
        """Captures `body` into this lane.

        Args:
            body: runs the forward and returns its output tensors.
            copier: see `Runtime.capture`.
            kernel: likewise.

        Returns:
            The graph, and the outputs as weak references, whose memory is free for the next capture. A
            pool with `weak=False` returns the outputs themselves, which pin their memory.

        Raises:
            Exception: the error of `body` or of the driver; the lane is closed then.
        """

        def weakened() -> list[Tensor]:
            outputs = body()
            return _C.weak_ref(outputs) if self._weak else outputs

        try:
            graph, outputs = self._runtime.capture(self.arena, weakened, copier, kernel)
        except BaseException:
            self.open = False
            raise
        self._graphs.add(graph)
        return graph, outputs

    def follow_stream(self) -> int:
        """Makes the current stream wait for the last replay; returns the current stream."""
        self.native.stream = self.arena.follow_stream()
        return self.native.stream

    def stopwatch(self) -> Stopwatch:
        """Returns a stopwatch for the current stream of its device."""
        return self._runtime.stopwatch(self._device)

    def reserve_for(self, tensors: Iterable[Tensor]) -> None:
        """Counts the results of an eager first call as held outputs of this lane."""
        self._first_results = [
            StorageWeakRef(t.untyped_storage()) for t in tensors if t.layout is torch.strided
        ]


_pools: "weakref.WeakSet[GraphPool]" = weakref.WeakSet()
_locked_for_fork: "list[GraphPool]" = []


def _before_fork() -> None:
    # A thread in the middle of a call would leave its pool locked, and half changed, in the child.
    _locked_for_fork.extend(_pools)
    for pool in _locked_for_fork:
        pool.lock.__enter__()


def _after_fork(unlock: Callable[[_C.PoolLock], None]) -> None:
    while _locked_for_fork:
        unlock(_locked_for_fork.pop().lock)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=partial(_after_fork, _C.PoolLock.__exit__),
        after_in_child=partial(_after_fork, _C.PoolLock.renew),
    )


class GraphPool:
    """The memory that captured graphs share.

    A forward uses the pool of its device, `default_pool(device)`, unless it is given another pool.

    Args:
        device: the device of the memory. By default the current CUDA device; without a GPU the CPU,
            for emulated graphs.
        weak: hold outputs as weak references. With False every captured output pins its memory, as in
            plain use of CUDA graphs. That takes more memory and gains nothing; use it to compare.

    Raises:
        OptionError: if the device has no graphs.
    """

    def __init__(self, device: torch.device | str | None = None, *, weak: bool = True) -> None:
        self.device = _indexed(device)
        if self.device.type not in ("cuda", "cpu"):
            raise OptionError(f"graphcache: no graphs on {device}; use a CUDA device or the CPU")
        self.weak = weak
        self.runtime = runtime_for(self.device)
        self.lanes: list[Lane] = []
        _pools.add(self)
        self.lock = _C.PoolLock()  # one graph of a pool is dispatched at a time
        self.capturing_thread: int | None = None

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Takes the lock for a capture: as long as it lasts, calls of other threads run eagerly."""
        with self.lock:
            before, self.capturing_thread = self.capturing_thread, threading.get_ident()
            try:
                yield
            finally:
                self.capturing_thread = before

    def lane(self) -> Lane:
        """Returns the first lane in which no output is held, opening one where there is none."""
        for lane in self.lanes:
            if lane.is_free():
                return lane
        self.lanes.append(Lane(self.runtime, self.device, weak=self.weak))
        return self.lanes[-1]

    def lane_after(self, lane: Lane) -> Lane:
        """Closes a lane that ran out of memory, trims the pool, and returns another lane."""
        lane.open = False
        self.trim()
        return self.lane()

    def trim(self) -> None:
        """Returns the memory that no graph and no output uses to torch's allocator.

        On CUDA, `torch.cuda.empty_cache()` then returns that memory to the device.
        """
        with self.lock:
            self.lanes = [lane for lane in self.lanes if not lane.is_done()]

    def memory(self) -> PoolMemory:
        """Returns the bytes that the pool has reserved, and the bytes of them in use."""
        found = [lane.arena.memory() for lane in self.lanes]
        return PoolMemory(sum(each.reserved for each in found), sum(each.allocated for each in found))

    def use_here(self, tensors: list[Tensor]) -> None:
        """Orders this call after the last replays, and uses `tensors` on the current stream."""
        for lane in self.lanes:
            lane.follow_stream()
        self.runtime.use_here(tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles a pool as an empty one of its kind, and the global pool by its device."""
        if self is _default_pool(self.device):
            return default_pool, (str(self.device),)
        return partial(GraphPool, weak=self.weak), (str(self.device),)

    def __repr__(self) -> str:
        mib = self.memory().reserved / 2**20
        kind = "weak" if self.weak else "strong"
        return f"<GraphPool on {self.device}: {len(self.lanes)} lanes, {mib:.1f} MiB, {kind} outputs>"


def default_pool(device: torch.device | str | None = None) -> GraphPool:
    """Returns the shared pool of `device`, by default of the current CUDA device, or else the CPU."""
    return _default_pool(_indexed(device))


def _indexed(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if str(asked) == "cuda" else asked


@cache
def _default_pool(device: torch.device) -> GraphPool:
    return GraphPool(device)
