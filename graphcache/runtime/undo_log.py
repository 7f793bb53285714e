"""Copies what operations are about to overwrite, by rows where an index names them, to put it back."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphcache import _C

_aten = torch.ops.aten
# Operators that overwrite some rows, or some elements, of their first argument.
_BY_POSITIONS = (_aten.index_put_, _aten._index_put_impl_)
_BY_INDEX = (_aten.index_copy_, _aten.index_add_, _aten.index_fill_, _aten.index_reduce_)
_BY_ELEMENT = (_aten.scatter_, _aten.scatter_add_, _aten.scatter_reduce_)


class _Region(NamedTuple):
    """A part of memory: a tensor, or some of its rows.

    Attributes:
        tensor: an alias of the tensor, which holds its storage.
        read: copies the part out of the tensor.
        write: writes such a copy back into the tensor.
    """

    tensor: Tensor
    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor, Tensor], Any]


class UndoLog:
    """Copies of what operations are about to overwrite, to be put back in reverse order.

    Operations that write some rows of a tensor, such as `index_copy_`, cost the bytes of these rows.

    Args:
        limit: the number of bytes that may be copied; None for no limit.

    Attributes:
        is_complete: whether all that was overwritten can be put back.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.is_complete = True
        self._left = sys.maxsize if limit is None else limit
        self._steps: list[tuple[_Region, Tensor]] = []
        self._known: set[Any] = set()

    def before(self, func: torch._ops.OpOverload, args: tuple[Any, ...], mutated: Tensor) -> None:
        """Copies what a call of `func` will overwrite of a tensor that it mutates."""
        if not has_memory(mutated):
            return
        if args and mutated is args[0] and (rows := _rows_of(func, args)) is not None:
            self._add(_Region(alias_of(mutated), *rows))
        elif torch._debug_has_internal_overlap(mutated) == 1:  # which can't be written as a whole
            self.save(mutated)
        else:
            geometry = (mutated.storage_offset(), mutated.shape, mutated.stride(), mutated.dtype)
            self._add(_Region(alias_of(mutated), Tensor.clone, Tensor.copy_), mutated.nbytes, geometry)

    def save(self, tensor: Tensor) -> None:
        """Copies the whole storage of `tensor`."""
        nbytes = tensor.untyped_storage().nbytes()
        with torch.inference_mode(False):  # to be written to in any mode
            # The storage is held by `tensor`, so that no other storage gets its address.
            part = _Region(
                tensor, lambda held: _bytes(held).clone(), lambda held, copy: _bytes(held).copy_(copy)
            )
        self._add(part, nbytes, "storage")

    def _add(self, region: _Region, nbytes: int = 0, geometry: Any = None) -> None:
        key = None if geometry is None else (_C.storage_key(region.tensor), geometry)
        if key in self._known:
            return
        if nbytes > self._left:
            self.is_complete = False
            return
        with _plainly():
            copy = region.read(region.tensor)
        if copy.nbytes > self._left:
            self.is_complete = False
            return
        self._left -= copy.nbytes
        self._steps.append((region, copy))
        if key is not None:
            self._known.add(key)

    def undo(self) -> None:
        """Puts back what was overwritten, the last first."""
        with _plainly():
            for region, copy in reversed(self._steps):
                region.write(region.tensor, copy)

    def values(self) -> list[Tensor]:
        """Returns copies of what all regions hold now."""
        with _plainly():
            return [region.read(region.tensor) for region, _ in self._steps]

    @contextmanager
    def protected(self) -> Iterator[list[Tensor]]:
        """Keeps the contents of all regions, which it yields: they are put back after the block."""
        now = self.values()
        try:
            yield now
        finally:
            with _plainly():
                for (region, _), copy in zip(self._steps, now, strict=True):
                    region.write(region.tensor, copy)

    @contextmanager
    def undone(self) -> Iterator[list[Tensor]]:
        """Begins the block in the state before the operations; brings that of now back afterwards.

        Yields the contents of all regions now.
        """
        with self.protected() as now:
            self.undo()
            yield now


def has_memory(tensor: Tensor) -> bool:
    """Return True if `tensor` lies in one storage that can be copied."""
    return (
        tensor.layout is torch.strided and tensor.device.type != "meta" and torch._C._has_storage(tensor)
    )


def alias_of(tensor: Tensor) -> Tensor:
    """Returns a plain tensor over the same memory, which can be written to in any mode."""
    with torch.inference_mode(False):
        return _C.alias(tensor, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _bytes(tensor: Tensor) -> Tensor:
    return _C.carve(tensor, 0, tensor.untyped_storage().nbytes())


def _rows_of(
    func: torch._ops.OpOverload, args: tuple[Any, ...]
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Any]] | None:
    """Returns how to read and write the rows that a call of `func` overwrites; None where all may be."""
    packet = func.overloadpacket
    if packet in _BY_POSITIONS:
        positions = [None if each is None else each.clone() for each in args[1]]
        return lambda t: _aten.index(t, positions), lambda t, rows: t.index_put_(positions, rows)
    if len(args) < 3 or not isinstance(args[2], Tensor) or args[0].dim() == 0:
        return None
    dim, index = args[1], args[2].clone()
    if packet in _BY_INDEX:
        index = index.reshape(-1)
        return lambda t: t.index_select(dim, index), lambda t, rows: t.index_copy_(dim, index, rows)
    if packet in _BY_ELEMENT:
        return lambda t: t.gather(dim, index), lambda t, values: t.scatter_(dim, index, values)
    return None


@contextmanager
def _plainly() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def restored_afterwards(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restores the bytes of `tensors` after the block, also after an exception."""
    log = UndoLog()
    for tensor in tensors:
        log.save(tensor)
    try:
        yield
    finally:
        log.undo()
