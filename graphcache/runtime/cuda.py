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

from graphcache import _C
from graphcache.runtime.base import Arena, Graph, PoolMemory, Result, Runtime, Stopwatch
from graphcache.runtime.branches import Branching, Streams
from graphcache.runtime.nvrtc import copy_in_kernel
from graphcache.runtime.torch_state import uncollected

RESERVE = 256 << 20  # bytes of the device that graphs leave alone; 1 % of it, if that is more
_IDLE_STREAMS: dict[torch.device, list[Streams]] = {}


def _current_after(last: torch.cuda.Stream | None, device: torch.device) -> torch.cuda.Stream:
    """Returns the current stream, which waits for `last` if that is another one."""
    current = torch.cuda.current_stream(device)
    if last is not None and last != current:
        current.wait_stream(last)
    return current


class _Turn:
    """Orders the graphs of a device that draw random numbers, on whatever stream each of them runs.

    torch has one place for the generator's numbers, for all graphs of a device. It writes there at the
    start of a capture and before each replay, on the current stream. Kernels read there as they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._last: torch.cuda.Stream | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        self._last = _current_after(self._last, self._device)

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_TURNS: dict[torch.device, _Turn] = {}


def _handle(pool: torch.cuda.MemPool) -> Any:
    return pool.id  # torch types what it gives and what it takes here differently


class CudaArena(Arena):
    """A private pool of torch's caching allocator, and the streams whose captures allocate from it.

    Each arena has a stream, because the allocator reuses blocks per stream. Also, the cuBLAS workspace
    of a stream is allocated during its first capture: here, where no replay of another arena writes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.turn = _TURNS.setdefault(device, _Turn(device))
        with torch.cuda.device(device):
            self.pool = torch.cuda.MemPool()
            # cuBLAS never frees the workspace of a stream, so streams are used again. Once all
            # workspaces are cleared, the next capture allocates one in this pool.
            idle = _IDLE_STREAMS.setdefault(device, [])
            self.streams = idle.pop() if idle else Streams(device)
            weakref.finalize(self, idle.append, self.streams).atexit = False
            torch._C._cuda_clearCublasWorkspaces()
            self._last = torch.cuda.current_stream(device)
            self._anchor = self._capture_nothing()

    def _capture_nothing(self) -> torch.cuda.CUDAGraph:
        """Captures an empty graph, which the arena holds for life.

        A pool whose last graph died can't be captured into again. A held `MemPool` preserves the half
        of the pool on the device; only a graph preserves the half in pinned host memory.
        """
        graph = torch.cuda.CUDAGraph()
        scratch = torch.zeros(1, device=self.device)
        self.streams.main.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.streams.main), self.turn:
            graph.capture_begin(pool=_handle(self.pool), capture_error_mode="thread_local")
            scratch.zero_()
            graph.capture_end()
        return graph

    def memory(self) -> PoolMemory:
        """Returns the bytes of the segments of this pool."""
        # Of all pools: asked for one pool, torch 2.11 releases the numbers of its id once too often.
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
        """Makes the current stream wait for the last replay if that ran on another one."""
        self._last = _current_after(self._last, self.device)
        return int(self._last.cuda_stream)


class CudaStopwatch(Stopwatch):
    """Two events on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __enter__(self) -> None:
        self._events[0].record(torch.cuda.current_stream(self._device))

    def __exit__(self, *_: object) -> None:
        self._events[1].record(torch.cuda.current_stream(self._device))

    def is_done(self) -> bool:
        """Return True if the device has come to the second event."""
        return bool(self._events[1].query())

    def seconds(self) -> float:
        """Returns the time between the events."""
        return float(self._events[0].elapsed_time(self._events[1])) / 1e3


@dataclass(eq=False)  # compared by identity
class CudaGraph(Graph):
    """A graph of torch, its copy-in node, and the number of products that run beside others.

    torch gives the graph numbers of `generator`, the state of the capture. `graphsafe_set_state` may
    have replaced that since.
    """

    graph: torch.cuda.CUDAGraph
    node: _C.CopyInNode | None
    turn: _Turn
    branches: int
    generator: torch.Generator

    def replay(self) -> None:
        """Launches the graph by torch, which advances the random generators."""
        with self.turn:
            current, captured = _generator_of(self.generator.device), self.generator
            now = current.initial_seed(), current.get_offset()
            if (captured.initial_seed(), captured.get_offset()) != now:
                captured.manual_seed(now[0])
                captured.set_offset(now[1])
            self.graph.replay()
            current.set_offset(captured.get_offset())


def _generator_of(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index]


class _Ladder(threading.local):
    """The captures of a ladder, in this thread.

    Attributes:
        free_before: free bytes of the device at the start.
        branching: chooses the captures that get branches.
    """

    free_before = 0
    branching = Branching()


class CudaRuntime(Runtime):
    """Captures and replays on CUDA; see `graphcache.runtime.base.Runtime`."""

    name = "cuda"
    new_arena = CudaArena

    def __init__(self) -> None:
        self._ladder = _Ladder()

    def stopwatch(self, device: torch.device) -> CudaStopwatch:
        """Returns a pair of events."""
        return CudaStopwatch(device)

    def use_here(self, tensors: list[Tensor]) -> None:
        """Delays the reuse of the tensors' memory until the current stream is done with it."""
        for tensor in tensors:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))

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
            self._ladder.branching.pays = True
            yield

    def prepare(self, copier: _C.InputCopier, device: torch.device) -> _C.CopyInKernel:
        """Compiles the copy-in kernel for `device`, once."""
        with torch.cuda.device(device):
            return copy_in_kernel(device, copier.count)

    def capture(
        self,
        arena: CudaArena,
        body: Callable[[], Result],
        copier: _C.InputCopier | None,
        kernel: _C.CopyInKernel | None,
    ) -> tuple[CudaGraph, Result]:
        """Captures `body` on the stream of the arena; see `Runtime.capture`."""
        node = None if copier is None or kernel is None else _C.CopyInNode(kernel, copier)
        branching = self._ladder.branching
        # The handle of a node lives as long as the graph that it was captured into.
        graph = torch.cuda.CUDAGraph(keep_graph=node is not None)
        arena.streams.main.wait_stream(torch.cuda.current_stream(arena.device))
        # The outer context brings the thread back to its stream even if ending the capture raises.
        with (
            torch.cuda.device(arena.device),
            torch.cuda.stream(arena.streams.main),
            arena.turn,
        ):
            # A driver that offers no copy-in node is not asked for branches either.
            branches = None if node is None else branching.open(arena.streams)
            # thread_local: other threads may go on calling CUDA (data loaders, NCCL's watchdog)
            graph.capture_begin(pool=_handle(arena.pool), capture_error_mode="thread_local")
            try:
                if node is not None:
                    node.record(arena.streams.main.cuda_stream)
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
        count = branching.close(branches)
        self._check_reserve(arena.device)
        state = _generator_of(arena.device).graphsafe_get_state()
        return CudaGraph(graph, node, arena.turn, count, state), result

    def _check_reserve(self, device: torch.device) -> None:
        """Raises `OutOfMemoryError` where a graph leaves too little memory for eager calls.

        A graph that found little memory, and took little of it, passes.
        """
        free, total = torch.cuda.mem_get_info(device)
        if free < max(total // 100, RESERVE):
            torch.cuda.empty_cache()  # an earlier size that did not fit may have left some
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
    """Undoes the leftovers of a capture that could not be ended on torch 2.11 (docs/design.md)."""
    index = torch.cuda.current_device()
    # Each of these raises where a later torch has done so already; then nothing is released twice.
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(index, arena.pool.id)
        torch._C._cuda_releasePool(index, arena.pool.id)
    with suppress(RuntimeError):
        _C.end_host_capture(*arena.pool.id)
    # Until a capture ends well, the state of the generator believes to be inside one.
    CudaArena(arena.device)
