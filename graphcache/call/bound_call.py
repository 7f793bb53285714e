"""One call of a forward, read: its arguments, the role of each tensor, and the key of its graphs."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from graphcache import _C
from graphcache.call.object_args import ObjectArg
from graphcache.call.pytree import ObjectRef, rebuild

BATCHED, WHOLE, BOUND = _C.Role.BATCHED, _C.Role.WHOLE, _C.Role.BOUND
PACKED, GAPPED, EXPANDED = range(3)


class Leaf(NamedTuple):
    """The role of one tensor argument.

    Attributes:
        role: BATCHED (copied in and padded), WHOLE (copied in as it is) or BOUND (read at its address).
        dim: the batch dimension, counted from the front; None without one.
        pattern: what code can see of strides besides the numbers; see `_C.stride_pattern`.
        exact: strides that the forward may read, and the storage offset; -1 for any. Empty: all any.
        inference: the forward may ask for an inference tensor, and this is one.
    """

    role: _C.Role
    dim: int | None
    pattern: tuple[int, ...] = ()
    exact: tuple[int, ...] = ()
    inference: bool = False

    def marks(self, dims: int) -> list[tuple[int, int]]:
        """Returns the dimensions from the outermost, each with the mark of its stride.

        A mark is PACKED, GAPPED or EXPANDED; `dims` is the number of dimensions.
        """
        return [divmod(each, 4) for each in self.pattern] or [(dim, PACKED) for dim in range(dims)]

    def order(self, dims: int) -> list[int]:
        """Returns the dimensions from the outermost."""
        return [dim for dim, _ in self.marks(dims)]


class BoundCall(NamedTuple):
    """One call of a forward, read.

    Attributes:
        args, kwargs: the arguments as the caller gave them.
        layout: the arguments in the order of the parameters, tensors taken out; see `pytree.flatten`.
        tensors: the tensors of the arguments.
        paths: the path of each tensor, such as `batch['ids'][0]`.
        roles: the role of each tensor.
        identities: for each tensor, the first that is the same one: forwards ask (`key is value`).
        batch: rows of this call.
        key: equal for calls that the same graphs serve, at any batch.
        objects: the objects among the arguments that hold tensors; see `object_args`.
        slots: the slot that graphs know in place of each object; see `static_objects`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layout: Any
    tensors: list[Tensor]
    paths: list[str]
    roles: list[Leaf]
    identities: tuple[int, ...]
    batch: int
    key: tuple[Any, ...]
    objects: list[ObjectArg]
    slots: tuple[Any, ...] = ()

    @property
    def form(self) -> tuple[Any, ...]:
        """The layout of the arguments, without the metadata of their tensors."""
        return self.layout, self.identities

    @property
    def bare_key(self) -> tuple[Any, ...]:
        """The key without slots: equal for calls that differ only by objects of one shape."""
        return self.key[: len(self.key) - len(self.slots)]

    def object_ref(self, value: Any, _: str) -> ObjectRef | None:
        """Returns the reference to one of `objects`, None for any other value; for `pytree.flatten`."""
        refs = (ObjectRef(i) for i, passed in enumerate(self.objects) if passed.value is value)
        return next(refs, None)

    def static_objects(self) -> list[Any]:
        """Returns the native counterpart of each slot."""
        return [slot.native for slot in self.slots]

    def copied_in(self) -> Iterator[tuple[int, Leaf]]:
        """Yields the positions and roles of the tensors that are copied into static inputs."""
        return ((i, leaf) for i, leaf in enumerate(self.roles) if leaf.role is not BOUND)

    def arguments(self, tensors: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of this call, in its own style, with other tensors in them."""
        values = rebuild(self.layout, iter(tensors), [passed.value for passed in self.objects])
        positional = tuple(values.values())[: len(self.args)]
        return positional, {name: values[name] for name in self.kwargs}
