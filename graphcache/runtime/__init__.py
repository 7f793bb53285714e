"""Where graphs are captured and replayed: on CUDA, or emulated on the CPU.

Everything above this package is the same for both; nothing above it names a device.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import local
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

Result = TypeVar("Result")


class PoolMemory(NamedTuple):
    """Memory of one allocator pool, in bytes.

    Attributes:
        reserved: taken from the device.
        allocated: of that, blocks that somebody owns now.
    """

    reserved: int
    allocated: int

    def __add__(self, other: object) -> "PoolMemory":
        if not isinstance(other, PoolMemory):
            return NotImplemented
        return PoolMemory(self.reserved + other.reserved, self.allocated + other.allocated)


class Graph(Protocol):
    """A captured graph."""

    def replay(self) -> None:
        """Runs everything that was captured, on the current stream, over the captured addresses."""


class Arena(Protocol):
    """One allocator pool: what is freed during a capture is used again by the next capture."""

    def memory(self) -> PoolMemory:
        """Returns what the pool holds now."""

    def follow_stream(self) -> None:
        """Makes the current stream wait for the last replay if that ran on another one."""


class Runtime(Protocol):
    """What a device must offer."""

    name: str

    def new_arena(self, device: torch.device) -> Arena:
        """Opens an allocator pool on `device`."""

    def ladder(self, device: torch.device) -> AbstractContextManager[None]:
        """Surrounds the captures of all sizes: does once what need not be done for each."""

    def capture(self, arena: Any, body: Callable[[], Result]) -> tuple[Graph, Result]:
        """Records what `body` does, without its effects, and returns what it returned.

        Raises:
            Exception: what `body` raised, or the driver; the process is in good order, but nothing
                more may be captured into `arena`.
        """


_thread = local()
_HAS_CUDA = torch.backends.cuda.is_built()


def is_capturing() -> bool:
    """Tells whether this thread is inside the first call or the capture of a graphed forward.

    A graphed forward that is called there is inlined: it runs as if it were not decorated.
    """
    return getattr(_thread, "inside", False) or (_HAS_CUDA and torch.cuda.is_current_stream_capturing())


@contextmanager
def inlining() -> Iterator[None]:
    """Inlines the graphed forwards that are called inside the block, in this thread."""
    before = getattr(_thread, "inside", False)
    _thread.inside = True
    try:
        yield
    finally:
        _thread.inside = before


def runtime_for(device: torch.device) -> Runtime:
    """Returns the runtime that serves tensors on `device`."""
    if device.type == "cuda":
        from graphcache.runtime.cuda import CudaRuntime

        return CudaRuntime()
    from graphcache.runtime.emulated import EmulatedRuntime

    return EmulatedRuntime()
