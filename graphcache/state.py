"""State around a forward: what was written is put back, what would outlive a capture is kept out."""

from collections.abc import Iterator
from contextlib import contextmanager

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
def uncached_autocast() -> Iterator[None]:
    """Switches off the cache of cast weights inside the block; autocast itself stays as it is."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
