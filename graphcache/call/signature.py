"""Reads a call: binds its arguments, finds the role of each tensor, and makes the key of its graphs."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphcache import _C
from graphcache.call.bound_call import BATCHED, BOUND, WHOLE, BoundCall, Leaf
from graphcache.call.object_args import MutationHistory, ObjectArg
from graphcache.call.pytree import Node, NotATree, ObjectRef, attributes_of_tensor, flatten, native
from graphcache.config import BatchDim, by_path, top_name
from graphcache.report.reasons import Bypass, Reason

# An unbatched argument up to this size is copied at each call (a few us); above, its address is bound.
COPY_LIMIT = 4 * 2**20  # bytes

_REQUIRED = inspect.Parameter.empty


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a function; for a builtin without a signature, `*args, **kwargs`."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return inspect.signature(lambda *args, **kwargs: None).parameters


class Signature:
    """The parameters of one forward; brings calls in any style into one order.

    Args:
        function: the forward, bound where it is a method.
        batch_dim: the dimension of the arguments that carries the batch, or a dictionary by argument
            name; negative dimensions count from the end.
        bind: names of parameters that are bound by address.
        read_object: reads an object that holds tensors, given its path; None for any other object.

    Attributes:
        mutation_history: the objects that the forward has changed.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        batch_dim: BatchDim,
        bind: Iterable[str],
        read_object: Callable[[Any, str], ObjectArg | None],
    ) -> None:
        self.batch_dim = batch_dim
        self.read_object = read_object
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

    def native(self, call: BoundCall) -> tuple[list[_C.Parameter], list[_C.Leaf]]:
        """Returns the parameters and the leaves of a call for `graphcache._C.Dispatcher.add`."""
        positions = {name: index for index, name in enumerate(self.positional)}
        parameters = []
        for name, layout in zip(call.layout.keys, call.layout.children, strict=True):
            extra = name.startswith("*")
            parameter = _C.Parameter(
                layout=native(layout, call.static_objects()),
                position=len(positions) + int(name[1:]) if extra else positions.get(name, -1),
                name=None if extra or name in self.by_position_only else name,
            )
            if (default := self.defaults.get(name, _REQUIRED)) is not _REQUIRED:
                parameter.set_default(default)
            parameters.append(parameter)
        dims = map(self._dim, call.tensors, call.paths)
        leaves = [
            _C.Leaf(
                role=leaf.role,
                batch_dim=-1 if dim is None else dim,
                carries_batch=dim is not None and tensor.shape[dim] == call.batch,
                must_be_weak=leaf.role is WHOLE and tensor.nbytes > COPY_LIMIT,
                order=leaf.order or (),
                example=tensor,
            )
            for tensor, leaf, dim in zip(call.tensors, call.roles, dims, strict=True)
        ]
        return parameters, leaves

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments by name, given or default, in the order of the parameters."""
        more = len(args) - len(self.positional)
        names = (*self.positional, *(f"*{index}" for index in range(more)))
        named = dict(zip(names, args, strict=False))
        given = len(named)
        for name, default in self.defaults.items():
            if name not in named:
                by_name = name in kwargs and name not in self.by_position_only
                named[name] = kwargs[name] if by_name else default
                given += by_name
        extras = sorted(kwargs.keys() - self.defaults.keys()) if self.open else []
        named.update((name, kwargs[name]) for name in extras)
        is_whole = all(value is not _REQUIRED for value in named.values())
        takes_all = given + len(extras) == len(args) + len(kwargs) and (more <= 0 or self.varargs)
        if not (is_whole and takes_all):
            raise Bypass(Reason.WRONG_ARGUMENTS)
        return named

    def read(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        modes: tuple[Any, ...],
        mutated: Mapping[Any, frozenset[int]],
    ) -> BoundCall:
        """Reads one call.

        Args:
            args: the arguments as the caller gave them.
            kwargs: likewise.
            modes: everything else that the key has to tell apart.
            mutated: for each `BoundCall.form`, the positions of the tensors that the forward mutates.

        Raises:
            Bypass: where no graph can serve such a call.
        """
        tensors: list[Tensor] = []
        paths: list[str] = []
        objects: list[ObjectArg] = []

        def read_object(value: Any, path: str) -> ObjectRef | None:
            self.mutation_history.check(type(value))
            found = self.read_object(value, path)
            if found is None:
                return None
            objects.append(found)
            return ObjectRef(len(objects) - 1, found.shape)

        try:
            named = self._by_name(args, kwargs)
            parts = [flatten(value, tensors, paths, name, read_object) for name, value in named.items()]
        except NotATree as error:
            raise Bypass(error.reason, str(error)) from None
        layout = Node(dict, tuple(named), tuple(parts))
        firsts: dict[int, int] = {}
        identities = tuple(firsts.setdefault(id(tensor), index) for index, tensor in enumerate(tensors))
        by_address = mutated.get((layout, identities), frozenset())
        bound = [i in by_address or top_name(path) in self.bind for i, path in enumerate(paths)]
        batch = self._batch(tensors, paths, bound)
        roles, key_parts = zip(*map(partial(self._role, batch), tensors, paths, bound), strict=True)
        key = (layout, modes, tensors[0].device, identities, *key_parts)
        return BoundCall(
            args, kwargs, layout, tensors, paths, list(roles), identities, batch, key, objects
        )

    def _role(self, batch: int, tensor: Tensor, path: str, is_bound: bool) -> tuple[Leaf, Any]:
        """Returns the role of one tensor, and its part of the key."""
        if tensor.layout is not torch.strided:
            raise Bypass(Reason.ARGUMENT_TENSOR, f"{path} has layout {tensor.layout}")
        if tensor.is_quantized:
            raise Bypass(Reason.ARGUMENT_TENSOR, f"{path} is quantised; pass it dequantised")
        if attributes := ", ".join(attributes_of_tensor(tensor)):
            detail = f"{path} has attributes ({attributes}); pass them as arguments"
            raise Bypass(Reason.ARGUMENT_TENSOR, detail)
        shape, dim = tuple(tensor.shape), self._dim(tensor, path)
        if dim is not None and shape[dim] != batch:
            dim = None
        is_output = _C.is_weak(tensor)
        if is_output and is_bound:
            raise Bypass(Reason.BOUND_OUTPUT, path)
        if is_bound or (dim is None and not is_output and tensor.nbytes > COPY_LIMIT):
            bits = (tensor.is_conj(), tensor.is_neg())
            address = (tensor.data_ptr(), tensor.stride(), dim is not None, *bits)
            return Leaf(BOUND, dim, None), (BOUND, tensor.dtype, shape, address)
        order = None if tensor.is_contiguous() else _order(tensor)
        by_stride = order or tuple(range(tensor.dim()))
        if tensor.dim() > _C.MAX_DIMS and not tensor.permute(by_stride).is_contiguous():
            detail = f"{path} has strides over more than {_C.MAX_DIMS} dimensions; pass it .contiguous()"
            raise Bypass(Reason.ARGUMENT_TENSOR, detail)
        role = WHOLE if dim is None else BATCHED
        if dim is not None:
            shape = (*shape[:dim], -1, *shape[dim + 1 :])
        return Leaf(role, dim, order), (role, tensor.dtype, shape, order)

    def names_batch(self, call: BoundCall) -> bool:
        """Return True if `batch_dim` names every argument that carries the batch."""
        dims = self.batch_dim
        return isinstance(dims, dict) and all(
            leaf.role is not BATCHED or path in dims or top_name(path) in dims
            for path, leaf in zip(call.paths, call.roles, strict=True)
        )

    def _dim(self, tensor: Tensor, name: str) -> int | None:
        dims = self.batch_dim
        dim = by_path(dims, name, 0) if isinstance(dims, dict) else dims
        if dim is not None and dim < 0:
            dim += tensor.dim()
        return dim if dim is not None and 0 <= dim < tensor.dim() else None

    def _batch(self, tensors: list[Tensor], paths: list[str], bound: list[bool]) -> int:
        """Returns the rows of the first tensor that has the batch dimension and is not bound."""
        for tensor, path, is_bound in zip(tensors, paths, bound, strict=True):
            dim = self._dim(tensor, path)
            if dim is not None and not is_bound:
                return tensor.shape[dim]
        if not tensors:
            raise Bypass(Reason.NO_TENSOR)
        raise Bypass(Reason.NO_BATCH_DIM, f"batch_dim={self.batch_dim}")


def _order(tensor: Tensor) -> tuple[int, ...] | None:
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim)))
    return None if order == tuple(range(tensor.dim())) or 0 in strides else order
