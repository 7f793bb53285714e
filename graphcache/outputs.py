"""What a replay returns: tensors over the memory of the graph, cut back to the caller's batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphcache import _C
from graphcache.pool import Outputs, Stale
from graphcache.tree import rebuild


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
        batch_dims: the dimensions that carry the batch; learned by comparing two sizes.
    """

    tensor: Tensor
    place: Place
    argument: int | None = None
    same: bool = False
    outside: bool = False
    batch_dims: tuple[int, ...] | None = None

    def is_weak(self) -> bool:
        """Tells whether another replay of the lane overwrites it."""
        return self.argument is None and not self.outside

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
    stale: Stale
    _handed: Outputs = field(init=False)
    _groups: list[int] = field(init=False)  # for each output, its storage
    _first: list[Tensor] = field(init=False)  # for each storage, an output that lies in it

    def __post_init__(self) -> None:
        self._handed = Outputs(self.stale)
        self._groups, self._first = [], []
        known: dict[int, int] = {}
        for output in self.outputs:
            key = _C.storage_key(output.tensor)
            if output.is_weak() and key not in known:
                known[key] = len(self._first)
                self._first.append(output.tensor)
                self._handed.storages.append(None)
            self._groups.append(known.get(key, -1))

    def knows_batch_dims(self) -> bool:
        """Tells whether every output can be cut back to a smaller batch."""
        return all(output.batch_dims is not None for output in self.outputs)

    def give(
        self, batch: int, size: int, arguments: list[Tensor], made_by: Callable[[], str]
    ) -> tuple[Any, Outputs]:
        """Returns the result for `batch` rows, and the storages that the caller now shares.

        The tensors are new ones, over storages that are told apart from the graph's own: those can
        expire while the graph goes on writing to the same memory.
        """
        storages = [
            _C.weak_ref(first) if kept is None else kept
            for kept, first in zip(self._handed.storages, self._first, strict=True)
        ]
        self._handed.storages = [*storages]
        self._handed.made_by = made_by
        tensors = [
            self._tensor(output, storages[group] if output.is_weak() else None, batch, size, arguments)
            for output, group in zip(self.outputs, self._groups, strict=True)
        ]
        return rebuild(self.layout, iter(tensors)), self._handed

    def _tensor(
        self,
        output: Output,
        storage: Tensor | None,
        batch: int,
        size: int,
        arguments: list[Tensor],
    ) -> Tensor:
        tensor = output.tensor
        if output.same:
            return tensor if output.argument is None else arguments[output.argument]
        if output.argument is not None:  # the captured tensor's offset counts from that argument
            base = arguments[output.argument]
            offset = int(base.storage_offset()) + int(tensor.storage_offset())
            return _C.alias(base, tensor.shape, tensor.stride(), offset, tensor)
        if storage is None:
            return _C.alias(tensor, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        shape = list(tensor.shape)
        if batch != size:
            for dim in output.batch_dims or ():
                shape[dim] = batch
        view = _C.alias(storage, shape, tensor.stride(), int(tensor.storage_offset()), tensor)
        return view if shape == list(tensor.shape) else _as_eager(view, tensor)


def _as_eager(cut: Tensor, whole: Tensor) -> Tensor:
    """Returns `cut` with the strides that eager gives: copied, unless only outer rows were cut."""
    if not _is_dense(whole) or _is_dense(cut):
        return cut
    strides, run = [0] * cut.dim(), 1
    for dim in sorted(range(cut.dim()), key=lambda d: (whole.stride(d), -d)):
        strides[dim] = run
        run *= max(cut.shape[dim], 1)
    return torch.empty_strided(cut.shape, strides, dtype=cut.dtype, device=cut.device).copy_(cut)


def _is_dense(tensor: Tensor) -> bool:
    run = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != run:
                return False
            run *= size
    return True
