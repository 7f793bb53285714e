"""Names the operator by which the rows of a batch come to depend on each other, for messages."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from graphcache.call.bound_call import BATCHED, BoundCall
from graphcache.runtime.source_lines import user_line
from graphcache.runtime.torch_patches import DispatchMode
from graphcache.tracing.trace import Forward, trace_forward


def mixing_operator(forward: Forward, call: BoundCall, batch: int) -> str | None:
    """Returns the first operator whose first rows depend on other rows, and the user's line.

    Runs the forward twice, without lasting effects.

    Args:
        forward: the forward.
        call: a call whose rows after the first `batch` change what the first ones give.
        batch: how many rows those are.

    Returns:
        None where no operator is found: perhaps only the kernels of the graph mix rows.
    """
    runs: list[list[tuple[str, Tensor]]] = []
    for tensors in (call.tensors, _repeated(call, batch)):
        args, kwargs = call.arguments(tensors)
        results = _Results(batch, call.batch)
        there = call._replace(args=args, kwargs=kwargs, tensors=tensors)
        trace_forward(forward._replace(function=results(forward.function)), there, restore=True)
        runs.append(results.found)
    first, second = runs
    for (name, one), (_, other) in zip(first, second, strict=False):
        if one.shape != other.shape or not torch.equal(one, other):
            return name
    return None


def _repeated(call: BoundCall, batch: int) -> list[Tensor]:
    """Returns the arguments with the row before others in place of these."""
    tensors = []
    for tensor, leaf in zip(call.tensors, call.roles, strict=True):
        repeated = tensor
        if leaf.role is BATCHED and leaf.dim is not None:
            repeated = tensor.clone()
            last = tensor.narrow(leaf.dim, batch - 1, 1)
            repeated.narrow(leaf.dim, batch, call.batch - batch).copy_(last)
        tensors.append(repeated)
    return tensors


class _Results(DispatchMode):
    """Takes down what each operator gives for the first rows, as sums of bytes."""

    def __init__(self, batch: int, size: int) -> None:
        super().__init__()
        self._batch, self._size = batch, size
        self.found: list[tuple[str, Tensor]] = []

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function, run in this mode."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operator."""
        result = func(*args, **(kwargs or {}))
        sums = [
            self._first_rows(leaf).detach().resolve_conj().flatten().contiguous().view(torch.uint8).sum()
            for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor) and leaf.numel() and leaf.layout is torch.strided
        ]
        if sums:
            self.found.append(
                (f"{getattr(func, 'overloadpacket', func)}, at {user_line()}", torch.stack(sums))
            )
        return result

    def _first_rows(self, tensor: Tensor) -> Tensor:
        for dim, length in enumerate(tensor.shape):
            if length == self._size:
                return tensor.narrow(dim, 0, self._batch)
        if tensor.dim() and tensor.shape[0] % self._size == 0:  # rows of rows, such as tokens
            return tensor.narrow(0, 0, tensor.shape[0] // self._size * self._batch)
        return tensor
