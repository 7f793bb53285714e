"""Describes the result of a capture, and finds the dimensions that carry the batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphcache import _C


class Geometry(NamedTuple):
    """The shape, strides and address of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Geometry":
        """Returns the geometry of `tensor`."""
        return cls(tensor.shape, tensor.stride(), tensor.data_ptr())


@dataclass
class Output:
    """One tensor of the result of a capture.

    Attributes:
        tensor: the captured tensor: weak in memory of the pool, the tensor itself in external memory.
        geometry: its geometry in the capture.
        kind: its origin.
        argument: position of the argument that it is or views, or that it is a copy of a view of; or -1.
        batch_dims: the dimensions that carry the batch; None until two sizes were compared.
    """

    tensor: Tensor
    geometry: Geometry
    kind: _C.OutputKind
    argument: int = -1
    batch_dims: tuple[int, ...] | None = None

    def is_weak(self) -> bool:
        """Return True if another replay of the lane overwrites the output."""
        return self.kind is _C.OutputKind.POOL

    def is_external(self) -> bool:
        """Return True if the output is memory that the forward neither was given nor made."""
        return self.kind in (_C.OutputKind.EXTERNAL, _C.OutputKind.EXTERNAL_VIEW)

    def is_made(self) -> bool:
        """Return True if its values are the graph's: in the pool, or a constant on the host."""
        return self.kind in (_C.OutputKind.POOL, _C.OutputKind.CONSTANT)

    def is_like(self, tensor: Tensor, arguments: Sequence[Tensor]) -> bool:
        """Return True if an eager run's tensor has the origin of this output."""
        if self.kind is _C.OutputKind.ARGUMENT:
            return tensor is arguments[self.argument]
        if self.is_made():
            return not any(tensor is argument for argument in arguments)
        return _C.storage_key(tensor) == _C.storage_key(self.tensor)

    def native(self) -> _C.Output:
        """Returns this output for native code."""
        return _C.Output(self.kind, self.tensor, self.argument)

    def compare(self, size: int, other: Geometry, other_size: int) -> str | None:
        """Finds the dimensions that carry the batch, by comparison with another size.

        Returns:
            None, or the reason why rows can't be cut out of the output.
        """
        if not self.is_weak():
            self.batch_dims = ()
            # External memory does not move with the size; a view that moves is of another part.
            is_view = self.kind in (_C.OutputKind.ARGUMENT_VIEW, _C.OutputKind.EXTERNAL_VIEW)
            moved = is_view and other != self.geometry
            return "an output views other memory outside at another batch" if moved else None
        shape = self.tensor.shape
        if len(other.shape) != len(shape):
            return f"an output has {len(shape)} dimensions at one batch, {len(other.shape)} at another"
        changed = [dim for dim, length in enumerate(shape) if length != other.shape[dim]]
        for dim in changed:
            if (shape[dim], other.shape[dim]) != (size, other_size):
                return (
                    f"dimension {dim} of an output goes from {other.shape[dim]} to {shape[dim]} where "
                    f"the batch goes from {other_size} to {size}"
                )
        if self.batch_dims is not None and self.batch_dims != tuple(changed):
            return "an output follows the batch at some batches only"
        self.batch_dims = tuple(changed)
        return None


@dataclass
class Result:
    """The result of one captured size.

    Attributes:
        layout: the nesting of the tensors; see `pytree.flatten`.
        outputs: the tensors, in order.
    """

    layout: Any
    outputs: list[Output]

    def knows_batch_dims(self) -> bool:
        """Return True if every output can be cut back to a smaller batch."""
        return all(output.batch_dims is not None for output in self.outputs)

    def batch_dims(self) -> list[tuple[int, ...]]:
        """Returns, for each output, the known dimensions that carry the batch."""
        return [output.batch_dims or () for output in self.outputs]


def find_batch_dims(
    buckets: Sequence[Any], batch: int, layout: Any, tensors: Sequence[Tensor]
) -> str | None:
    """Finds the dimensions of the outputs that carry the batch, by comparing sizes.

    Args:
        buckets: the captured sizes.
        batch: rows of an eager call.
        layout: the layout of the result of that call.
        tensors: the tensors of that result.

    Returns:
        None, or the reason why the outputs can't be cut back to a smaller batch.
    """
    known = {batch: [Geometry.of(tensor) for tensor in tensors]}
    for bucket in buckets:
        if bucket.result.layout != layout:
            return "the structure of its result, or a Python value in it, depends on the batch"
        known.setdefault(bucket.size, [output.geometry for output in bucket.result.outputs])
    for bucket in buckets:
        other = next((size for size in known if size != bucket.size), None)
        if other is None:
            continue  # one size only: the first padded call shows the rest
        for output, there in zip(bucket.result.outputs, known[other], strict=True):
            reason: str | None = output.compare(bucket.size, there, other)
            if reason is not None:
                return reason
        bucket.native.set_batch_dims(bucket.result.batch_dims())
    return None
