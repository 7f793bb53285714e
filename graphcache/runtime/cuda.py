"""Graphs of the CUDA driver, through `torch.cuda.CUDAGraph`."""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphcache import _C, config
from graphcache.runtime.base import PoolMemory, Result
from graphcache.runtime.nvrtc import copy_in_kernel
from graphcache.runtime.torch_state import uncollected

RESERVE = 256 << 20  # bytes of the device that graphs leave alone; 1 % of it, if that is more
SIDES = 3  # streams for branches: attention has three products of its input
_IDLE_STREAMS: dict[torch.device, "list[_Streams]"] = {}


class _Turn:
    """Whose turn it is to use the numbers that a generator hands to graphs.

    torch keeps them in one place for all graphs of a device. It writes them at the start of a capture,
    on the stream of that, and before each replay, on the current one; kernels read them as they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._last: torch.cuda.Stream | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        current = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_TURNS: dict[torch.device, _Turn] = {}


class _Streams:
    """The stream of an arena, and those of the branches of its graphs."""

    def __init__(self, device: torch.device) -> None:
        self.main = torch.cuda.Stream(device)
        self.sides: list[torch.cuda.Stream] = []

    def branches(self) -> _C.Branches:
        """Returns what captures products beside one another."""
        if not self.sides:
            device = self.main.device
            self.sides = [torch.cuda.ExternalStream(_C.new_stream(), device) for _ in range(SIDES)]
        return _C.Branches(self.main.cuda_stream, self.main, self.sides)


def _handle(pool: torch.cuda.MemPool) -> Any:
    return pool.id  # torch types what it gives and what it takes here differently


class CudaArena:
    """A private pool of torch's caching allocator, and the streams whose captures allocate from it.

    A stream belongs to the arena because the allocator reuses blocks per stream, and because the
    cuBLAS workspace of a stream is allocated during its first capture, here, where no other arena's
    replay can disturb it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.turn = _TURNS.setdefault(device, _Turn(device))
        with torch.cuda.device(device):
            self.pool = torch.cuda.MemPool()
            # cuBLAS keeps a workspace for each stream, for ever. Used again, a stream costs one, and
            # with those of before cleared, the next capture allocates it here.
            idle = _IDLE_STREAMS.setdefault(device, [])
            self.streams = idle.pop() if idle else _Streams(device)
            self.stream = self.streams.main
            weakref.finalize(self, idle.append, self.streams).atexit = False
            torch._C._cuda_clearCublasWorkspaces()
            self._last = torch.cuda.current_stream(device)
            self._anchor = self._capture_nothing()

    def _capture_nothing(self) -> torch.cuda.CUDAGraph:
        """Captures a graph that is held for the life of the arena.

        A pool whose last graph died can't be captured into again. A held `MemPool` keeps the device's
        half alive; only a graph keeps that of pinned host memory.
        """
        graph = torch.cuda.CUDAGraph()
        scratch = torch.zeros(1, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream), self.turn:
            graph.capture_begin(pool=_handle(self.pool), capture_error_mode="thread_local")
            scratch.zero_()
            graph.capture_end()
        return graph

    def memory(self) -> PoolMemory:
        """Returns the bytes of the segments of this pool."""
        # Of all pools: asked for one, torch 2.11 releases the numbers of its id once too often.
        segments = [
            segment
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment["segment_pool_id"]) == tuple(self.pool.id)
        ]
        return PoolMemory(
            sum(segment["total_size"] for segment in segments),
            sum(segment["allocated_size"] for segment in segments),
        )

    def follow_stream(self) -> int:
        """Orders this call after the last one where the caller has changed streams."""
        current = torch.cuda.current_stream(self.device)
        if current != self._last:
            current.wait_stream(self._last)
            self._last = current
        return int(current.cuda_stream)


class CudaStopwatch:
    """Two events on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __enter__(self) -> None:
        self._events[0].record(torch.cuda.current_stream(self._device))

    def __exit__(self, *_: object) -> None:
        self._events[1].record(torch.cuda.current_stream(self._device))

    def is_done(self) -> bool:
        """Tells whether the device has come to the second event."""
        return bool(self._events[1].query())

    def seconds(self) -> float:
        """Returns the time between the events."""
        return float(self._events[0].elapsed_time(self._events[1])) / 1e3


@dataclass(eq=False)  # known by identity
class CudaGraph:
    """A graph of torch, its staging node, and how many products run beside others."""

    graph: torch.cuda.CUDAGraph
    node: _C.CopyInNode | None
    turn: _Turn
    branches: int

    def replay(self) -> None:
        """Launches the graph the way of torch, which advances the random generators."""
        with self.turn:
            self.graph.replay()


class _Ladder(threading.local):
    """The captures of a ladder, in this thread.

    Attributes:
        free_before: bytes of the device, as they began.
        has_branches: whether the next graph may have any: smaller sizes have none where the largest
            had none, and to look for them makes a capture a quarter longer.
    """

    free_before = 0
    has_branches = True


class CudaRuntime:
    """See `graphcache.runtime.Runtime`."""

    name = "cuda"

    def __init__(self) -> None:
        self._ladder = _Ladder()

    def stopwatch(self, device: torch.device) -> CudaStopwatch:
        """Returns a pair of events."""
        return CudaStopwatch(device)

    def use_here(self, tensors: list[Tensor]) -> None:
        """Keeps their memory from being used again before the current stream is done with it."""
        for tensor in tensors:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def new_arena(self, device: torch.device) -> CudaArena:
        """Opens a private pool."""
        return CudaArena(device)

    @contextmanager
    def ladder(self, device: torch.device) -> Iterator[None]:
        """Synchronises and empties the cache once, where torch does so for each graph.

        The collector is off inside: an object that it finalises in mid-capture (a kernel module,
        another graph) would invalidate the capture. To collect first would take a tenth of a second
        with large libraries loaded.
        """
        torch.cuda.synchronize(device)
        with uncollected():
            torch.cuda.empty_cache()
            self._ladder.free_before = torch.cuda.mem_get_info(device)[0]
            self._ladder.has_branches = True
            yield

    def prepare(self, stage: _C.InputCopier, device: torch.device) -> _C.CopyInKernel:
        """Compiles the staging kernel for `device`, once."""
        with torch.cuda.device(device):
            return copy_in_kernel(device, stage.count)

    def capture(
        self,
        arena: CudaArena,
        body: Callable[[], Result],
        stage: _C.InputCopier | None,
        kernel: _C.CopyInKernel | None,
    ) -> tuple[CudaGraph, Result]:
        """Captures `body` on the stream of the arena; see `Runtime.capture`."""
        node = None if stage is None or kernel is None else _C.CopyInNode(kernel, stage)
        # The handle of a node lives as long as the graph that it was captured into.
        graph = torch.cuda.CUDAGraph(keep_graph=node is not None)
        arena.stream.wait_stream(torch.cuda.current_stream(arena.device))
        # The outer context brings the thread back to its stream even if ending the capture raises.
        with (
            torch.cuda.device(arena.device),
            torch.cuda.stream(arena.stream),
            arena.turn,
        ):
            # Where the driver offers no node for staging, it is not asked for anything else.
            linear = node is None or config.is_linear() or not self._ladder.has_branches
            branches = None if linear else arena.streams.branches()
            # thread_local: other threads may go on calling CUDA (data loaders, NCCL's watchdog)
            graph.capture_begin(pool=_handle(arena.pool), capture_error_mode="thread_local")
            try:
                if node is not None:
                    node.record(arena.stream.cuda_stream)
                with branches or nullcontext():
                    result = body()
            except BaseException:
                _abandon(graph, arena)
                raise
            try:
                _end(graph)
            except BaseException:
                _clean_up(arena)
                raise
            if node is not None:
                graph.instantiate()
                node.attach(graph.raw_cuda_graph(), graph.raw_cuda_graph_exec())
        if branches is not None:
            self._ladder.has_branches = branches.count + branches.large > 0
        self._check_reserve(arena.device)
        return CudaGraph(graph, node, arena.turn, branches.count if branches else 0), result

    def _check_reserve(self, device: torch.device) -> None:
        """Leaves memory for what runs eagerly, unless there was little before and little was taken."""
        free, total = torch.cuda.mem_get_info(device)
        if free < max(total // 100, RESERVE):
            torch.cuda.empty_cache()  # a size that did not fit before this one may have left some
            free, _ = torch.cuda.mem_get_info(device)
            if free < max(total // 100, RESERVE) and free < self._ladder.free_before - free:
                raise torch.OutOfMemoryError(f"the graph would leave {free >> 20} MiB of the device")


def _end(graph: torch.cuda.CUDAGraph) -> None:
    with warnings.catch_warnings():
        # A forward that only passes its inputs on has nothing to replay.
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        graph.capture_end()


def _abandon(graph: torch.cuda.CUDAGraph, arena: CudaArena) -> None:
    """Ends a capture whose body raised."""
    try:
        _end(graph)  # works where the driver saw nothing wrong, and cleans up after itself then
    except Exception:
        _clean_up(arena)


def _clean_up(arena: CudaArena) -> None:
    """Undoes what a capture that could not be ended leaves behind on torch 2.11 (docs/design.md)."""
    index = torch.cuda.current_device()
    # Each of these raises where a later torch has done it already; then nothing is released twice.
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(index, arena.pool.id)
        torch._C._cuda_releasePool(index, arena.pool.id)
    with suppress(RuntimeError):
        _C.end_host_capture(*arena.pool.id)
    # The state of the generator believes that it is inside a capture, until one ends well.
    CudaArena(arena.device)
