"""The protocols of a runtime: what a device must offer for graphs to be captured and replayed there."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from graphcache import _C

Result = TypeVar("Result")


class PoolMemory(NamedTuple):
    """Memory of one allocator pool, in bytes.

    Attributes:
        reserved: bytes taken from the device.
        allocated: bytes of these in blocks that are in use.
    """

    reserved: int
    allocated: int

    def __add__(self, other: object) -> "PoolMemory":
        if not isinstance(other, PoolMemory):
            return NotImplemented
        return PoolMemory(self.reserved + other.reserved, self.allocated + other.allocated)


class Graph(Protocol):
    """A captured graph.

    Attributes:
        node: the copy-in node of the graph; None where the graph has none.
    """

    node: _C.CopyInNode | None

    def replay(self) -> None:
        """Runs the captured operations on the current stream, over the captured addresses."""


class Arena(Protocol):
    """One allocator pool: memory that a capture frees is used again by the next capture."""

    def memory(self) -> PoolMemory:
        """Returns the bytes that the pool holds now."""

    def follow_stream(self) -> int:
        """Makes the current stream wait for the last replay if that ran on another one.

        Returns:
            The handle of the current stream.
        """


class Stopwatch(Protocol):
    """Times the work of the device inside a block, without waiting for that work."""

    def __enter__(self) -> object: ...
    def __exit__(self, *_: object) -> None: ...
    def is_done(self) -> bool:
        """Return True if the device has come to the end of the block."""

    def seconds(self) -> float | None:
        """Returns the time of a block that is done; None where times mean nothing."""


class Runtime(Protocol):
    """The operations that a device must offer."""

    name: str

    def stopwatch(self, device: torch.device) -> Stopwatch:
        """Returns a stopwatch for the current stream of `device`."""

    def new_arena(self, device: torch.device) -> Arena:
        """Opens an allocator pool on `device`."""

    def use_here(self, tensors: list[Tensor]) -> None:
        """Delays the reuse of the tensors' memory until the current stream is done with it."""

    def ladder(self, device: torch.device) -> AbstractContextManager[None]:
        """Surrounds the captures of all sizes with the preparations that they share."""

    def prepare(self, copier: _C.InputCopier, device: torch.device) -> _C.CopyInKernel | None:
        """Returns the kernel of a copy-in node; None where this device needs none.

        Raises:
            RuntimeError: where this device needs such a kernel and does not offer one.
        """

    def capture(
        self,
        arena: Any,
        body: Callable[[], Result],
        copier: _C.InputCopier | None,
        kernel: _C.CopyInKernel | None,
    ) -> tuple[Graph, Result]:
        """Captures the operations of `body` without their effects; returns the graph and the result.

        Args:
            arena: the source of memory.
            body: the function to capture.
            copier: copies the inputs; None where torch calls copy them.
            kernel: the copy-in kernel, with which the graph begins; see `prepare`.

        Raises:
            Exception: the error of `body`, or of the driver. The process is in good order, but nothing
                more may be captured into `arena`.
        """


def runtime_for(device: torch.device) -> Runtime:
    """Returns the runtime that serves tensors on `device`."""
    if device.type == "cuda":
        from graphcache.runtime.cuda import CudaRuntime

        return CudaRuntime()
    from graphcache.runtime.emulated import EmulatedRuntime

    return EmulatedRuntime()
