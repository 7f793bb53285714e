"""Contexts around a forward that restore mutated memory and switch off caches and the collector."""

import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from graphcache import _C


class SavedState:
    """Copies of storages, made before a write and put back afterwards."""

    def __init__(self) -> None:
        self._saved: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def save(self, tensor: Tensor) -> None:
        """Copies the whole storage of `tensor`, once."""
        key = _C.storage_key(tensor)
        if key not in self._saved:
            with torch.inference_mode(False):  # to be written to in any mode
                everything = _C.carve(tensor, 0, tensor.untyped_storage().nbytes())
                # `tensor` is held, so that no other storage gets the key
                self._saved[key] = (everything, everything.clone(), tensor)

    def restore(self) -> None:
        """Puts every saved storage back."""
        for everything, copy, _ in self._saved.values():
            everything.copy_(copy)
        self._saved.clear()


@contextmanager
def restored_afterwards(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restores the bytes of `tensors` after the block, also after an exception."""
    saved = SavedState()
    for tensor in tensors:
        saved.save(tensor)
    try:
        yield
    finally:
        saved.restore()


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Switches off autocast's cache of cast weights inside the block."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def uncompiled() -> AbstractContextManager[Any]:
    """Runs compiled forwards eagerly inside the block.

    Dynamo never compiles code again that it met under a dispatch mode, for all modules that share the
    code. Their compiled forwards, and their captures, would run eagerly from then on.
    """
    # Without Dynamo in the process nothing is compiled, and its import takes a second.
    if "torch._dynamo" in sys.modules:
        with suppress(RuntimeError):  # refused between the graphs of a compiled caller
            return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
    return nullcontext()


@contextmanager
def uncollected() -> Iterator[None]:
    """Keeps the garbage collector off inside the block; a search makes enough objects to start it."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
