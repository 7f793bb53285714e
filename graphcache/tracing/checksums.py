"""Finds the memory that a forward mutated past torch's operators, where no schema tells.

A Triton or CuPy kernel, or an extension that takes tensors without registering an operator, writes where
nothing sees it. So the bytes that it could have mutated are summed up before and after.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from graphcache import _C

_WORD = 8  # bytes


class Checksums:
    """Sums over the storages of some tensors, to be compared later."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def add(self, tensor: Tensor) -> None:
        """Sums up the storage of one more tensor, if it can be read, unless that was done."""
        if (
            tensor.layout is torch.strided
            and tensor.device.type != "meta"
            and not _C.is_expired(tensor)
            and tensor.untyped_storage().nbytes() > 0
            and _C.storage_key(tensor) not in self._before
        ):
            with torch.inference_mode(False), torch.no_grad():
                self._before[_C.storage_key(tensor)] = tensor, _sums(tensor)

    def changed(self, known: Iterable[int]) -> list[Tensor]:
        """Returns a tensor of each storage that changed, but for those with a key in `known`."""
        with torch.inference_mode(False), torch.no_grad():
            return [
                tensor
                for key, (tensor, before) in self._before.items()
                if key not in known
                and _C.storage_key(tensor) == key
                and not all(map(torch.equal, before, _sums(tensor)))
            ]


def _sums(tensor: Tensor) -> list[Tensor]:
    nbytes = tensor.untyped_storage().nbytes()
    everything = _C.carve(tensor, 0, nbytes)
    whole = nbytes // _WORD * _WORD
    words, rest = everything[:whole].view(torch.int64), everything[whole:]
    # the second shows that rows changed places
    return [words.sum(), words[::3].sum(), rest.sum()]
