"""State around a forward: what was written is put back, what would outlive a capture is kept out."""

import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from graphcache import _C


class SavedState:
    """Bytes of storages as they were before something wrote to them, to be put back afterwards."""

    def __init__(self) -> None:
        self._saved: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def save(self, tensor: Tensor) -> None:
        """Keeps a copy of the whole storage, once."""
        key = _C.storage_key(tensor)
        if key not in self._saved:
            with torch.inference_mode(False):  # to be written to in any mode
                everything = _C.carve(tensor, 0, tensor.untyped_storage().nbytes())
                # holding `tensor` keeps the storage, and with it the key
                self._saved[key] = (everything, everything.clone(), tensor)

    def restore(self) -> None:
        """Puts every saved storage back."""
        for everything, copy, _ in self._saved.values():
            everything.copy_(copy)
        self._saved.clear()


@contextmanager
def restored_afterwards(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Puts the bytes of `tensors` back after the block, whatever happens in it."""
    saved = SavedState()
    for tensor in tensors:
        saved.save(tensor)
    try:
        yield
    finally:
        saved.restore()


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Switches off the cache of cast weights inside the block; autocast itself stays as it is."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def uncompiled() -> AbstractContextManager[Any]:
    """Runs compiled forwards eagerly inside the block.

    Dynamo gives up on code that it meets under a dispatch mode, for good and for all modules that share
    it: their compiled forwards would run eagerly from then on, and so would a capture.
    """
    # Nothing is compiled where Dynamo was never imported, and importing it takes a second.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    try:
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    except RuntimeError:  # refused between the graphs of a compiled caller
        return nullcontext()
    return stance


@contextmanager
def uncollected() -> Iterator[None]:
    """Keeps the garbage collector off: a search makes many objects, and a run looks at all there are."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
