"""Holds static inputs, from which graphs read their arguments, and copies arguments into them."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from graphcache import _C
from graphcache.call.bound_call import BATCHED, BOUND, BoundCall, Leaf
from graphcache.config import Fill, Pad, fill_of


class StaticInputs:
    """One buffer for each argument that is copied in, large enough for the largest size; sizes share it.

    Args:
        call: the call whose arguments give the shapes and dtypes.
        largest: the largest size, in rows.
    """

    def __init__(self, call: BoundCall, largest: int) -> None:
        self._shapes = [(tuple(call.tensors[index].shape), leaf) for index, leaf in call.copied_in()]
        tensors = (call.tensors[index] for index, _ in call.copied_in())
        with torch.inference_mode(False):  # written to in any mode
            self._buffers = [
                torch.empty(prod(_shape(*each, largest)), dtype=like.dtype, device=like.device)
                for like, each in zip(tensors, self._shapes, strict=True)
            ]

    def at(self, size: int) -> list[Tensor]:
        """Returns the static inputs of one size: dense, with their dimensions in the caller's order.

        A static input has one address at all sizes, also where the batch is an inner dimension.
        """
        tensors = []
        with torch.inference_mode(False):
            for buffer, (shape, leaf) in zip(self._buffers, self._shapes, strict=True):
                sizes = _shape(shape, leaf, size)
                order = leaf.order or tuple(range(len(sizes)))
                dense = buffer[: prod(sizes)].view([sizes[dim] for dim in order])
                tensors.append(dense.permute([order.index(dim) for dim in range(len(sizes))]))
        return tensors


def arguments_over(call: BoundCall, static: Sequence[Tensor]) -> list[Tensor]:
    """Returns the tensors of a call: static inputs where copied in, its own where bound."""
    tensors = list(call.tensors)
    for (index, _), tensor in zip(call.copied_in(), static, strict=True):
        tensors[index] = tensor
    return [tensors[first] for first in call.identities]


def fill_rows(call: BoundCall, static: list[Tensor], size: int, pad: Pad, rows: int) -> None:
    """Copies the first rows of a call into static inputs of one size, and pads them.

    Args:
        call: the call.
        static: the static inputs.
        size: rows of the static inputs.
        pad: see `cuda_graphed`.
        rows: how many rows of the call are copied at most.
    """
    rows = min(rows, call.batch, size)
    tensors = [
        tensor if role.dim is None or role.role is BOUND else tensor.narrow(role.dim, 0, rows)
        for tensor, role in zip(call.tensors, call.roles, strict=True)
    ]
    TorchInputCopier(static, call, size, pad).copy_in(tensors, rows)


def _shape(shape: tuple[int, ...], leaf: Leaf, size: int) -> tuple[int, ...]:
    if leaf.role is not BATCHED or leaf.dim is None:
        return shape
    return (*shape[: leaf.dim], size, *shape[leaf.dim + 1 :])


def native_input_copier(static: list[Tensor], call: BoundCall, pad: Pad) -> _C.InputCopier:
    """Returns what copies arguments into the static inputs of one size without torch calls.

    Args:
        static: see `TorchInputCopier`.
        call: see `TorchInputCopier`.
        pad: see `TorchInputCopier`.
    """
    inputs = []
    for buffer, (index, leaf) in zip(static, call.copied_in(), strict=True):
        fill = fill_of(pad, call.paths[index])
        inputs.append(
            _C.StaticInput(
                buffer=buffer,
                argument=index,
                batch_dim=-1 if leaf.role is not BATCHED or leaf.dim is None else leaf.dim,
                fill=_sixteen_bytes(fill, buffer),
                edge=fill == "edge",
            )
        )
    return _C.InputCopier(inputs)


def _sixteen_bytes(fill: Fill, like: Tensor) -> bytes:
    with torch.inference_mode(False), torch.no_grad():
        row = torch.empty(16 // like.element_size(), dtype=like.dtype, device="cpu")
        row.fill_(0 if fill == "edge" else fill)
        return bytes(row.view(torch.uint8).tolist())


class TorchInputCopier:
    """Copies inputs by torch calls, on any device, and writes every row at every call.

    Args:
        static: the static inputs, in the order of `call.copied_in()`.
        call: a call with the same key as the calls to come.
        size: rows of the static inputs.
        pad: see `cuda_graphed`.
    """

    def __init__(self, static: list[Tensor], call: BoundCall, size: int, pad: Pad) -> None:
        self.static = static
        self._size = size
        self._positions = [index for index, _ in call.copied_in()]
        self._dims = [leaf.dim for _, leaf in call.copied_in()]
        self._fills = [fill_of(pad, call.paths[index]) for index in self._positions]
        self._views: dict[int, tuple[list[Tensor], list[Any]]] = {}

    def copy_in(self, tensors: list[Tensor], batch: int) -> None:
        """Copies the first `batch` rows and fills the rows after them."""
        if batch not in self._views:
            self._views[batch] = self._slices(batch)
        rows, tails = self._views[batch]
        with torch.no_grad():
            if rows:
                torch._foreach_copy_(rows, [tensors[index] for index in self._positions])
            for tail, fill in tails:
                tail.copy_(fill) if isinstance(fill, Tensor) else tail.fill_(fill)

    def _slices(self, batch: int) -> tuple[list[Tensor], list[Any]]:
        """Returns the first `batch` rows of each static input, and the other rows with their fills."""
        rows: list[Tensor] = []
        tails: list[Any] = []
        with torch.inference_mode(False):
            for static, dim, fill in zip(self.static, self._dims, self._fills, strict=True):
                if dim is None or batch == self._size:
                    rows.append(static)
                    continue
                rows.append(static.narrow(dim, 0, batch))
                edge = static.narrow(dim, batch - 1, 1)
                tail = static.narrow(dim, batch, self._size - batch)
                tails.append((tail, edge.expand_as(tail) if fill == "edge" else fill))
        return rows, tails
