"""Holds static inputs, from which graphs read their arguments, and copies arguments into them."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from graphcache import _C
from graphcache.call.bound_call import BATCHED, BOUND, EXPANDED, PACKED, BoundCall, Leaf
from graphcache.config import Fill, Pad, fill_of
from graphcache.errors import CaptureError


class StaticInputs:
    """One buffer for each argument that is copied in, large enough for the largest size; sizes share it.

    Args:
        call: the call whose arguments give the shapes and dtypes.
        largest: the largest size, in rows.
    """

    def __init__(self, call: BoundCall, largest: int) -> None:
        self._shapes = [(tuple(call.tensors[index].shape), leaf) for index, leaf in call.copied_in()]
        self._like = [call.tensors[index] for index, _ in call.copied_in()]
        with torch.inference_mode(False):  # written to in any mode
            self._buffers = [
                torch.empty(prod(_shape(*each, largest)), dtype=like.dtype, device=like.device)
                for like, each in zip(self._like, self._shapes, strict=True)
            ]

    def at(self, size: int) -> list[Tensor]:
        """Returns the static inputs of one size: dense, with their dimensions in the caller's order.

        A static input has one address at all sizes, also where the batch is an inner dimension. It is
        conjugate or negative where the argument is: bytes are copied as they are.
        """
        tensors = []
        with torch.inference_mode(False):
            for buffer, like, (shape, leaf) in zip(self._buffers, self._like, self._shapes, strict=True):
                sizes = _shape(shape, leaf, size)
                order = leaf.order(len(sizes))
                dense = buffer[: prod(sizes)].view([sizes[dim] for dim in order])
                dense = dense.permute([order.index(dim) for dim in range(len(sizes))])
                dense = torch._conj(dense) if like.is_conj() else dense
                tensors.append(torch._neg_view(dense) if like.is_neg() else dense)
        return tensors


def arguments_over(call: BoundCall, static: Sequence[Tensor], pad: Pad) -> list[Tensor]:
    """Returns the tensors of a call: static inputs where copied in, its own where bound."""
    tensors = list(call.tensors)
    for (index, leaf), tensor in zip(call.copied_in(), static, strict=True):
        tensors[index] = as_given(tensor, tensors[index], leaf, fill_of(pad, call.paths[index]))
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


def as_given(static: Tensor, like: Tensor, leaf: Leaf, fill: Fill) -> Tensor:
    """Returns a static input as code sees the argument: with its gaps, its class and its flags.

    A static input is dense. One with gaps is made of it, by a copy inside the graph.

    Args:
        static: the static input.
        like: the argument.
        leaf: its role.
        fill: the fill of padded rows.

    Raises:
        CaptureError: where the forward reads strides that no other size can have.
    """
    given = static
    if leaf.pattern or leaf.exact or leaf.inference:
        with torch.inference_mode(leaf.inference), torch.no_grad():
            given = _spread(static, leaf, fill)
    with torch.inference_mode(False), torch.no_grad():
        if type(like) is torch.nn.Parameter:
            return torch.nn.Parameter(given, requires_grad=like.requires_grad)
        if like.requires_grad:
            given = given.detach().requires_grad_()
            with torch.enable_grad():
                return given if like.is_leaf else given.view_as(given)
    return given


def _spread(static: Tensor, leaf: Leaf, fill: Fill) -> Tensor:
    """Returns a tensor of the same values whose strides are like the caller's."""
    exact = leaf.exact or (-1,) * (static.dim() + 1)
    strides, run, extent, offset = list(static.stride()), 1, 1, max(exact[-1], 0)
    once = static  # with one element where a dimension repeats it
    for dim, mark in reversed(leaf.marks(static.dim())):
        size = static.shape[dim]
        if mark == EXPANDED and (dim != leaf.dim or fill == "edge"):
            once = once.narrow(dim, 0, 1)
            continue
        strides[dim] = exact[dim] if exact[dim] >= 0 else run if mark == PACKED else _after_gap(run)
        if size > 1:
            if strides[dim] < extent:
                raise CaptureError(
                    "it reads strides of an argument that overlaps itself, or would at another batch"
                )
            run, extent = strides[dim] * size, extent + strides[dim] * (size - 1)
    same = all(
        a == b or (size == 1 and not leaf.exact)
        for size, a, b in zip(once.shape, once.stride(), strides, strict=True)
    )
    if leaf.inference or offset or not same:
        made = static.new_empty(offset + extent).as_strided(once.shape, strides, offset)
        made = torch._conj(made) if static.is_conj() else made
        once = (torch._neg_view(made) if static.is_neg() else made).copy_(once)
    return once.expand(static.shape)


def _after_gap(run: int) -> int:
    return 2 if run == 1 else run + 16  # keeps rows aligned


def with_bits(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns the values of `tensor` in memory that is conjugate or negative where `like` is."""
    if (tensor.is_conj(), tensor.is_neg()) == (like.is_conj(), like.is_neg()):
        return tensor
    tensor = tensor.resolve_conj().resolve_neg()
    tensor = torch._conj(tensor.conj_physical()) if like.is_conj() else tensor
    return torch._neg_view(tensor.neg()) if like.is_neg() else tensor


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
        row.fill_(0 if fill == "edge" else -fill if like.is_neg() else fill)
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
            sources = [tensors[index] for index in self._positions]
            if any(row.is_conj() or row.is_neg() for row in rows):  # which no fused copy takes
                for row, source in zip(rows, sources, strict=True):
                    row.copy_(source)
            elif rows:
                torch._foreach_copy_(rows, sources)
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
