"""Reads the modes of torch that a call depends on, and whether a capture is under way."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._device import DeviceContext

from graphcache import _C

_HAS_CUDA = torch.backends.cuda.is_built()


def modes_of(instance: Any) -> tuple[Any, ...]:
    """Returns the modes that the forward depends on; each combination has graphs of its own."""
    return (getattr(instance, "training", None), _C.modes(DeviceContext))


def is_stream_capturing() -> bool:
    """Return True if any code captures the current CUDA stream."""
    # Asked before CUDA is initialised, a torch with CUDA raises where there is no driver.
    return _HAS_CUDA and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_capturing() -> bool:
    """Return True if this thread is inside the first call or the capture of a graphed forward.

    A graphed forward that is called there is inlined: it runs as if it were not decorated.
    """
    return _C.is_inlining() or is_stream_capturing()


@contextmanager
def inlining() -> Iterator[None]:
    """Inlines the graphed forwards that are called inside the block, in this thread."""
    before = _C.set_inlining(True)
    try:
        yield
    finally:
        _C.set_inlining(before)
