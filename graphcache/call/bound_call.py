"""One call, read: its arguments, the role of each tensor, and the key of its graphs."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from graphcache import _C
from graphcache.call.object_args import Passed
from graphcache.call.pytree import Kept, rebuild

BATCHED, WHOLE, BOUND = "batched", "whole", "bound"


class Leaf(NamedTuple):
    """The role of one tensor argument.

    Attributes:
        role: BATCHED (staged and padded), WHOLE (staged as it is) or BOUND (by address).
        dim: the batch dimension, counted from the front; None without one.
        order: dimensions by descending stride, None if that is 0, 1, 2, …
    """

    role: str
    dim: int | None
    order: tuple[int, ...] | None


class Call(NamedTuple):
    """One call of a forward, read.

    Attributes:
        args, kwargs: as the caller gave them.
        layout: the arguments in order of the parameters, tensors taken out; see `tree.flatten`.
        leaves: those tensors.
        names: their paths, such as `batch['ids'][0]`.
        roles: what becomes of each.
        same: for each of them, the first one that is the same tensor: forwards ask (`key is value`).
        batch: rows of this call.
        key: equal for calls that the same graphs serve, at any batch.
        kept: the objects among the arguments that keep tensors; see `keepers`.
        homes: what graphs know in place of each.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layout: Any
    leaves: list[Tensor]
    names: list[str]
    roles: list[Leaf]
    same: tuple[int, ...]
    batch: int
    key: tuple[Any, ...]
    kept: list[Passed]
    homes: tuple[Any, ...] = ()

    @property
    def form(self) -> tuple[Any, ...]:
        """The arguments but for all that is told of their tensors."""
        return self.layout, self.same

    @property
    def bare_key(self) -> tuple[Any, ...]:
        """The key without homes: of calls that differ by objects of one shape at most."""
        return self.key[: len(self.key) - len(self.homes)]

    def place(self, value: Any, _: str) -> Kept | None:
        """Returns the place of an object among `kept`, None for another one; for `tree.flatten`."""
        for index, passed in enumerate(self.kept):
            if passed.value is value:
                return Kept(index)
        return None

    def keepers(self) -> list[_C.Keeper]:
        """Returns what native code knows in place of each of `kept`."""
        return [home.native for home in self.homes]

    def staged(self) -> Iterator[tuple[int, Leaf]]:
        """Yields the positions and roles of the leaves that are copied into static inputs."""
        return ((i, leaf) for i, leaf in enumerate(self.roles) if leaf.role is not BOUND)

    def arguments(self, leaves: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of this call, in its own style, with other tensors in them."""
        values = rebuild(self.layout, iter(leaves), [passed.value for passed in self.kept])
        positional = tuple(values.values())[: len(self.args)]
        return positional, {name: values[name] for name in self.kwargs}
