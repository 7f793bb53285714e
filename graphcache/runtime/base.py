"""The base of a runtime: what a device must offer for graphs to be captured and replayed there.

The defaults are those of a device without streams, kernels and times: of emulation on the CPU.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

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


class Graph:
    """A captured graph.

    Attributes:
        node: the copy-in node of the graph; None where the graph has none.
    """

    node: _C.CopyInNode | None

    def release(self, keys: Iterable[int]) -> None:
        """Stops to keep the storages with these keys alive, which guards or the caller keep."""

    def replay(self) -> None:
        """Runs the captured operations on the current stream, over the captured addresses."""


class Arena:
    """One allocator pool: memory that a capture frees is used again by the next capture."""

    def memory(self) -> PoolMemory:
        """Returns the bytes that the pool holds now."""
        raise NotImplementedError

    def follow_stream(self) -> int:
        """Makes the current stream wait for the last replay if that ran on another one.

        Returns:
            The handle of the current stream.
        """
        return 0


class Stopwatch:
    """Times the work of the device inside a block, without waiting for that work."""

    def __enter__(self) -> object: ...
    def __exit__(self, *_: object) -> None: ...
    def is_done(self) -> bool:
        """Return True if the device has come to the end of the block."""
        return True

    def seconds(self) -> float | None:
        """Returns the time of a block that is done; None where times mean nothing."""


class Runtime:
    """The operations that a device must offer.

    Attributes:
        name: the name that `cache_info()` gives.
        new_arena: opens an allocator pool on a device.
        captures_run: whether a capture carries the operations out; their effects are put back then.
    """

    name: str
    new_arena: Callable[[torch.device], Arena]
    captures_run = False

    def stopwatch(self, device: torch.device) -> Stopwatch:
        """Returns a stopwatch for the current stream of `device`."""
        return Stopwatch()

    def use_here(self, tensors: list[Tensor]) -> None:
        """Delays the reuse of the tensors' memory until the current stream is done with it."""

    def ladder(self, device: torch.device) -> AbstractContextManager[None]:
        """Surrounds the captures of all sizes with the preparations that they share."""
        return nullcontext()

    def prepare(self, copier: _C.InputCopier, device: torch.device) -> _C.CopyInKernel | None:
        """Returns the kernel of a copy-in node; None where this device needs none.

        Raises:
            RuntimeError: where this device needs such a kernel and does not offer one.
        """
        return None

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
        raise NotImplementedError
