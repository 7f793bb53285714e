"""What a capture returned, and which of its dimensions carry the batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where a tensor lies."""

    shape: torch.Size
    stride: tuple[int, ...]
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Place":
        """Returns where `tensor` lies."""
        return cls(tensor.shape, tensor.stride(), tensor.data_ptr())


@dataclass
class Output:
    """One tensor of the result of a capture.

    Attributes:
        tensor: as captured: weak where it lies in the pool, the tensor itself where it lies outside.
        place: where it lay in the capture.
        argument: position of the argument that it is or lies in; None for memory of the graph.
        same: it is that very argument, and the caller's own object is returned.
        outside: it lies in memory that the forward found outside (a parameter, a buffer).
        constant: it is a constant on the host: the caller gets a copy.
        copied: position of the argument that eager returns a view of, where this is a copy of it.
        batch_dims: the dimensions that carry the batch; learned by comparing two sizes.
    """

    tensor: Tensor
    place: Place
    argument: int | None = None
    same: bool = False
    outside: bool = False
    constant: bool = False
    copied: int | None = None
    batch_dims: tuple[int, ...] | None = None

    def is_weak(self) -> bool:
        """Tells whether another replay of the lane overwrites it."""
        return self.argument is None and not self.outside

    def native(self) -> tuple[int, Tensor, int]:
        """Returns it as `graphcache._C.Bucket` takes it: (kind, tensor, argument)."""
        if self.constant:
            return 5, self.tensor, -1
        if self.argument is not None:
            return 4 if self.same else 3, self.tensor, self.argument
        if self.outside:
            return 2 if self.same else 1, self.tensor, -1
        return 0, self.tensor, -1 if self.copied is None else self.copied

    def learn(self, size: int, there: Place, other_size: int) -> str | None:
        """Finds the dimensions that carry the batch by what it is at another size.

        Returns:
            None, or why rows can't be cut out of it.
        """
        if not self.is_weak():
            self.batch_dims = ()
            # Memory outside does not move with the size: a view of it that does is another part.
            moved = not self.same and there != self.place
            return "an output views other memory outside at another batch" if moved else None
        other = there.shape
        if len(other) != self.tensor.dim():
            return f"an output has {self.tensor.dim()} dimensions at one batch, {len(other)} at another"
        dims = []
        for dim, (mine, theirs) in enumerate(zip(self.tensor.shape, other, strict=True)):
            if mine != theirs:
                if (mine, theirs) != (size, other_size):
                    return (
                        f"dimension {dim} of an output goes from {theirs} to {mine} where the batch "
                        f"goes from {other_size} to {size}"
                    )
                dims.append(dim)
        self.batch_dims = tuple(dims)
        return None


@dataclass
class Result:
    """The result of one captured size.

    Attributes:
        layout: how the tensors nest; see `tree.flatten`.
        outputs: those tensors, in order.
    """

    layout: Any
    outputs: list[Output]

    def knows_batch_dims(self) -> bool:
        """Tells whether every output can be cut back to a smaller batch."""
        return all(output.batch_dims is not None for output in self.outputs)

    def batch_dims(self) -> list[tuple[int, ...]]:
        """Returns for each output the dimensions that carry the batch, as far as they are known."""
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
        None, or why the outputs can't be cut back to a smaller batch.
    """
    known = {batch: [Place.of(tensor) for tensor in tensors]}
    for bucket in buckets:
        if bucket.result.layout != layout:
            return "the structure of its result, or a Python value in it, depends on the batch"
        known.setdefault(bucket.size, [output.place for output in bucket.result.outputs])
    for bucket in buckets:
        other = next((size for size in known if size != bucket.size), None)
        if other is None:
            continue  # one size only: the first padded call teaches the rest
        for output, there in zip(bucket.result.outputs, known[other], strict=True):
            why: str | None = output.learn(bucket.size, there, other)
            if why is not None:
                return why
        bucket.native.set_batch_dims(bucket.result.batch_dims())
    return None
