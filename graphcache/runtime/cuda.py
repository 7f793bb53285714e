"""Graphs of the CUDA driver, through `torch.cuda.CUDAGraph`."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from graphcache.runtime import PoolMemory, Result


class CudaArena:
    """A private pool of torch's caching allocator, and the stream whose captures allocate from it.

    The stream belongs to the arena because the allocator reuses blocks per stream, and because the
    cuBLAS workspace of a stream is allocated during its first capture, here, where no other arena's
    replay can disturb it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            # Held, so that the pool outlives its last graph: a pool that lost it can't be reopened.
            self.pool = torch.cuda.MemPool()
            self.stream = torch.cuda.Stream(device)
        self._last = torch.cuda.current_stream(device)

    def memory(self) -> PoolMemory:
        """Returns the bytes of the segments of this pool."""
        segments = torch.cuda.memory_snapshot(self.pool.id)
        return PoolMemory(
            sum(segment["total_size"] for segment in segments),
            sum(segment["allocated_size"] for segment in segments),
        )

    def follow_stream(self) -> None:
        """Orders this call after the last one where the caller has changed streams."""
        current = torch.cuda.current_stream(self.device)
        if current != self._last:
            current.wait_stream(self._last)
            self._last = current


class CudaRuntime:
    """See `graphcache.runtime.Runtime`."""

    name = "cuda"

    def new_arena(self, device: torch.device) -> CudaArena:
        """Opens a private pool."""
        return CudaArena(device)

    @contextmanager
    def ladder(self, device: torch.device) -> Iterator[None]:
        """Synchronises, collects and empties the cache once, where torch does so for each graph.

        The collector stays off inside: an object that it finalises in mid-capture (a kernel module,
        another graph) would invalidate the capture.
        """
        torch.cuda.synchronize(device)
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        torch.cuda.empty_cache()
        try:
            yield
        finally:
            if collecting:
                gc.enable()

    def capture(
        self, arena: CudaArena, body: Callable[[], Result]
    ) -> tuple[torch.cuda.CUDAGraph, Result]:
        """Captures `body` on the stream of the arena; see `Runtime.capture`."""
        graph = torch.cuda.CUDAGraph()
        arena.stream.wait_stream(torch.cuda.current_stream(arena.device))
        # The outer context brings the thread back to its stream even if ending the capture raises.
        with torch.cuda.device(arena.device), torch.cuda.stream(arena.stream):
            try:
                # thread_local: other threads may go on calling CUDA (data loaders, NCCL's watchdog)
                graph.capture_begin(pool=arena.pool.id, capture_error_mode="thread_local")
                result = body()
                with warnings.catch_warnings():
                    # A forward that only passes its inputs on has nothing to replay.
                    warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
                    graph.capture_end()
            except BaseException:
                _recover(graph, arena)
                raise
        return graph, result


def _recover(graph: torch.cuda.CUDAGraph, arena: CudaArena) -> None:
    """Undoes what a failed capture leaves behind, as measured on torch 2.11 (docs/design.md)."""
    index = torch.cuda.current_device()
    with suppress(Exception):
        graph.capture_end()  # ends the driver's capture; raises because it is invalid
    with suppress(Exception):
        torch._C._cuda_endAllocateToPool(index, arena.pool.id)  # type: ignore[attr-defined]
    with suppress(Exception):
        torch._C._cuda_releasePool(index, arena.pool.id)  # type: ignore[attr-defined]
    # The generator believes that it is still inside the capture; a state of its own frees it.
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())
