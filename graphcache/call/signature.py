"""What a call looks like: its tensors, the role of each, and the key under which its graphs are kept."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from graphcache import _C
from graphcache.call.bound_call import BATCHED, BOUND, WHOLE, BoundCall, Leaf
from graphcache.call.object_args import MutationHistory, ObjectArg
from graphcache.call.pytree import Node, NotATree, ObjectRef, attributes_of_tensor, flatten, native
from graphcache.config import BatchDim, by_path, top_name
from graphcache.report.reasons import Bypass

# An unbatched argument up to this size is copied at each call (a few us); above, its address is bound.
COPY_LIMIT = 4 * 2**20  # bytes

_NOT_NAMED = object()
_REQUIRED = inspect.Parameter.empty


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a function; any at all, where it does not tell: builtins of torch."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return inspect.signature(lambda *args, **kwargs: None).parameters


class Signature:
    """The parameters of one forward, by which calls in any style are brought into one order.

    Args:
        function: the forward, bound where it is a method.
        batch_dim: the dimension of the arguments that carries the batch, or that of each by its name;
            negative ones count from the end.
        bind: names of parameters that are bound by address.

    Attributes:
        habits: what the forward does to objects that it is passed.
    """

    def __init__(self, function: Callable[..., Any], batch_dim: BatchDim, bind: Iterable[str]) -> None:
        self.batch_dim = batch_dim
        self.bind = frozenset(bind)
        self.mutation_history = MutationHistory()
        parameters = parameters_of(function).values()
        self.defaults = {
            p.name: p.default for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        self.by_position_only = {p.name for p in parameters if p.kind is p.POSITIONAL_ONLY}
        self.positional = [
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        self.open = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.varargs = any(p.kind is p.VAR_POSITIONAL for p in parameters)

    def native(self, call: BoundCall) -> tuple[list[Any], list[Any]]:
        """Returns what `graphcache._C.Dispatcher.add` takes: the parameters and the leaves."""
        positions = {name: index for index, name in enumerate(self.positional)}
        parameters = []
        for name, layout in zip(call.layout.keys, call.layout.children, strict=True):
            extra = name.startswith("*")
            position = len(positions) + int(name[1:]) if extra else positions.get(name, -1)
            default = self.defaults.get(name, _REQUIRED)
            parameters.append(
                (
                    position,
                    None if extra or name in self.by_position_only else name,
                    None if default is _REQUIRED else (default,),
                    native(layout, call.static_objects()),
                )
            )
        leaves = []
        for tensor, name, leaf in zip(call.tensors, call.paths, call.roles, strict=True):
            dim = self._dim(tensor, name)
            carries = dim is not None and tensor.shape[dim] == call.batch
            weak = leaf.role is WHOLE and _nbytes(tensor) > COPY_LIMIT
            role = (BATCHED, WHOLE, BOUND).index(leaf.role)
            leaves.append((role, -1 if dim is None else dim, carries, weak, leaf.order or (), tensor))
        return parameters, leaves

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments by name: given or default, in the order of the parameters."""
        if len(args) > len(self.positional) and not self.varargs:
            raise Bypass("arguments that the forward does not take")
        named = dict(zip(self.positional, args, strict=False))
        for index, extra in enumerate(args[len(self.positional) :]):
            named[f"*{index}"] = extra
        given = len(named)
        for name, default in self.defaults.items():
            if name not in named:
                by_name = name in kwargs and name not in self.by_position_only
                named[name] = value = kwargs[name] if by_name else default
                if value is _REQUIRED:
                    raise Bypass("arguments that the forward does not take")
                given += by_name
        if given != len(args) + len(kwargs):
            extra = sorted(kwargs.keys() - self.defaults.keys())
            if not self.open or given + len(extra) != len(args) + len(kwargs):
                raise Bypass("arguments that the forward does not take")
            for name in extra:
                named[name] = kwargs[name]
        return named

    def read(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        modes: tuple[Any, ...],
        written: dict[Any, frozenset[int]],
    ) -> BoundCall:
        """Reads one call.

        Args:
            args: as the caller gave them.
            kwargs: likewise.
            modes: everything else that the key has to tell apart.
            written: for each `BoundCall.form`, the positions of the tensors that the forward writes to.

        Raises:
            Unservable: where no graph can serve such a call.
        """
        leaves: list[Tensor] = []
        names: list[str] = []
        kept: list[ObjectArg] = []

        def other(value: Any, name: str) -> ObjectRef | None:
            self.mutation_history.check(type(value))
            passed = ObjectArg.read(value, name)
            if passed is None:
                return None
            kept.append(passed)
            return ObjectRef(len(kept) - 1, passed.shape)

        try:
            named = self._named(args, kwargs)
            parts = [flatten(value, leaves, names, name, other) for name, value in named.items()]
        except NotATree as error:
            raise Bypass(str(error)) from None
        layout = Node(dict, tuple(named), tuple(parts))
        places: dict[int, int] = {}
        same = tuple(places.setdefault(id(tensor), index) for index, tensor in enumerate(leaves))
        by_address = written.get((layout, same), frozenset())
        return self._classify(args, kwargs, layout, leaves, names, same, modes, by_address, kept)

    def _classify(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layout: Any,
        leaves: list[Tensor],
        names: list[str],
        same: tuple[int, ...],
        modes: tuple[Any, ...],
        by_address: frozenset[int],
        kept: list[ObjectArg],
    ) -> BoundCall:
        bound = {
            index
            for index, name in enumerate(names)
            if index in by_address or (self.bind and top_name(name) in self.bind)
        }
        batch = self._batch(leaves, names, bound)
        roles: list[Leaf] = []
        key: list[Any] = [layout, modes, leaves[0].device, same]
        for index, tensor in enumerate(leaves):
            if tensor.layout is not torch.strided:
                raise Bypass(f"{names[index]} has layout {tensor.layout}")
            if tensor.is_quantized:
                raise Bypass(f"{names[index]} is quantised; pass it dequantised")
            if attributes := attributes_of_tensor(tensor):
                raise Bypass(
                    f"{names[index]} is a tensor with attributes ({', '.join(attributes)}); pass them "
                    "as arguments"
                )
            shape = tensor.shape
            dim = self._dim(tensor, names[index])
            if dim is not None and shape[dim] != batch:
                dim = None
            weak = _C.is_weak(tensor)
            if weak and index in bound:
                raise Bypass(f"{names[index]} is bound by address, and is the output of a graph")
            large = dim is None and _nbytes(tensor) > COPY_LIMIT
            if index in bound or (large and not weak):
                roles.append(Leaf(BOUND, dim, None))
                bits = (tensor.is_conj(), tensor.is_neg())
                where = (tensor.data_ptr(), tensor.stride(), dim is not None, *bits)
                key.append((BOUND, tensor.dtype, tuple(shape), where))
                continue
            order = None if tensor.is_contiguous() else _order(tensor)
            if tensor.dim() > _C.MAX_DIMS and not _is_dense(tensor, order):
                raise Bypass(
                    f"{names[index]} has strides over more than {_C.MAX_DIMS} dimensions; "
                    "pass it .contiguous()"
                )
            if dim is None:
                roles.append(Leaf(WHOLE, None, order))
                key.append((WHOLE, tensor.dtype, tuple(shape), order))
            else:
                roles.append(Leaf(BATCHED, dim, order))
                key.append((BATCHED, tensor.dtype, (*shape[:dim], -1, *shape[dim + 1 :]), order))
        return BoundCall(args, kwargs, layout, leaves, names, roles, same, batch, tuple(key), kept)

    def names_batch(self, call: BoundCall) -> bool:
        """Tells whether `batch_dim` names every argument that carries the batch."""
        carriers = (
            name for name, leaf in zip(call.paths, call.roles, strict=True) if leaf.role is BATCHED
        )
        dims = self.batch_dim
        return isinstance(dims, dict) and all(
            by_path(dims, name, _NOT_NAMED) is not _NOT_NAMED for name in carriers
        )

    def _dim(self, tensor: Tensor, name: str) -> int | None:
        dims = self.batch_dim
        dim = by_path(dims, name, 0) if isinstance(dims, dict) else dims
        if dim is not None and dim < 0:
            dim += tensor.dim()
        return dim if dim is not None and 0 <= dim < tensor.dim() else None

    def _batch(self, leaves: list[Tensor], names: list[str], bound: set[int]) -> int:
        if not leaves:
            raise Bypass("no tensor among the arguments")
        for index, tensor in enumerate(leaves):
            dim = self._dim(tensor, names[index])
            if dim is not None and index not in bound:
                return tensor.shape[dim]
        raise Bypass(f"no argument has dimension {self.batch_dim} (batch_dim)")


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_dense(tensor: Tensor, order: tuple[int, ...] | None) -> bool:
    return tensor.permute(order or tuple(range(tensor.dim()))).is_contiguous()


def _order(tensor: Tensor) -> tuple[int, ...] | None:
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim)))
    return None if order == tuple(range(tensor.dim())) or 0 in strides else order
