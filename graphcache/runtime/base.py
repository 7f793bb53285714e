"""Where graphs are captured and replayed: on CUDA, or emulated on the CPU.

Everything above this package is the same for both; nothing above it names a device.
"""

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
        node: its staging node, where it has one.
    """

    node: _C.CopyInNode | None

    def replay(self) -> None:
        """Runs everything that was captured, on the current stream, over the captured addresses."""


class Arena(Protocol):
    """One allocator pool: what is freed during a capture is used again by the next capture."""

    def memory(self) -> PoolMemory:
        """Returns what the pool holds now."""

    def follow_stream(self) -> int:
        """Makes the current stream wait for the last replay if that ran on another one.

        Returns:
            The handle of the current stream.
        """


class Stopwatch(Protocol):
    """Times what the device does inside its block, without waiting for it."""

    def __enter__(self) -> object: ...
    def __exit__(self, *_: object) -> None: ...
    def is_done(self) -> bool:
        """Tells whether the device has come to the end of the block."""

    def seconds(self) -> float | None:
        """Returns the time, once it is done; None where times mean nothing."""


class Runtime(Protocol):
    """What a device must offer."""

    name: str

    def stopwatch(self, device: torch.device) -> Stopwatch:
        """Returns a stopwatch for the current stream of `device`."""

    def new_arena(self, device: torch.device) -> Arena:
        """Opens an allocator pool on `device`."""

    def use_here(self, tensors: list[Tensor]) -> None:
        """Notes a use of tensors on the current stream: their memory is free again only after it."""

    def ladder(self, device: torch.device) -> AbstractContextManager[None]:
        """Surrounds the captures of all sizes: does once what need not be done for each."""

    def prepare(self, stage: _C.InputCopier, device: torch.device) -> _C.CopyInKernel | None:
        """Returns the kernel of a staging node; None where this device needs none.

        Raises:
            RuntimeError: where this device needs one and does not offer it.
        """

    def capture(
        self,
        arena: Any,
        body: Callable[[], Result],
        stage: _C.InputCopier | None,
        kernel: _C.CopyInKernel | None,
    ) -> tuple[Graph, Result]:
        """Records what `body` does, without its effects, and returns what it returned.

        Args:
            arena: where memory comes from.
            body: what to record.
            stage: what copies the inputs; None where torch calls do.
            kernel: what the graph begins with, for that; see `prepare`.

        Raises:
            Exception: what `body` raised, or the driver; the process is in good order, but nothing
                more may be captured into `arena`.
        """


def runtime_for(device: torch.device) -> Runtime:
    """Returns the runtime that serves tensors on `device`."""
    if device.type == "cuda":
        from graphcache.runtime.cuda import CudaRuntime

        return CudaRuntime()
    from graphcache.runtime.emulated import EmulatedRuntime

    return EmulatedRuntime()
