"""Reads a call: binds its arguments, finds the role of each tensor, and makes the key of its graphs."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from graphcache import _C
from graphcache.call.bound_call import BATCHED, BOUND, PACKED, WHOLE, BoundCall, Leaf
from graphcache.call.object_args import MutationHistory, ObjectArg, shared_memory
from graphcache.call.parameters import REQUIRED, Parameters
from graphcache.call.pytree import Node, NotATree, ObjectRef, attributes_of_tensor, flatten, native
from graphcache.config import BatchDim, by_path, top_name
from graphcache.report.reasons import Bypass, Reason

# An unbatched argument up to this size is copied at each call (a few us); above, its address is bound.
COPY_LIMIT = 4 * 2**20  # bytes

# Methods of tensors that show what graphs leave open, unless code that ran names them.
_OFFSET = {"storage_offset", "as_strided"}
_NAMES = _OFFSET | {"stride", "is_inference"}


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
        parameters: the parameters of the forward.
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
        self.parameters = Parameters(function)
        self._names: frozenset[str] = frozenset()  # of _NAMES, those in code that ran

    def native(self, call: BoundCall) -> tuple[list[_C.Parameter], list[_C.Leaf]]:
        """Returns the parameters and the leaves of a call for `graphcache._C.Dispatcher.add`."""
        own = self.parameters
        positions = {name: index for index, name in enumerate(own.positional)}
        parameters = []
        for name, layout in zip(call.layout.keys, call.layout.children, strict=True):
            more = name.startswith("*")
            parameter = _C.Parameter(
                layout=native(layout, call.static_objects()),
                position=len(positions) + int(name[1:]) if more else positions.get(name, -1),
                name=None if more or name in own.by_position_only else name,
                ordered=not more and name not in own.defaults,
            )
            if own.defaults.get(name, REQUIRED) is not REQUIRED:
                from_end = positions[name] - len(positions) if name in positions else name
                parameter.set_default(own.function(), from_end)
            parameters.append(parameter)
        dims = map(self._dim, call.tensors, call.paths)
        leaves = [
            _C.Leaf(
                role=leaf.role,
                batch_dim=-1 if dim is None else dim,
                carries_batch=dim is not None and tensor.shape[dim] == call.batch,
                must_be_weak=leaf.role is WHOLE and tensor.nbytes > COPY_LIMIT,
                pattern=leaf.pattern,
                exact=leaf.exact,
                inference=self._inference(tensor),
                example=tensor,
            )
            for tensor, leaf, dim in zip(call.tensors, call.roles, dims, strict=True)
        ]
        return parameters, leaves

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
        self.parameters.refresh()
        named = self.parameters.by_name(args, kwargs)
        if named is None:
            raise Bypass(Reason.WRONG_ARGUMENTS)
        tensors: list[Tensor] = []
        paths: list[str] = []
        objects: list[ObjectArg] = []

        def read_object(value: Any, path: str) -> ObjectRef | None:
            self.mutation_history.check(type(value))
            found = self.read_object(value, path)
            if found is None:
                return None
            objects.append(found.after(objects))
            return ObjectRef(len(objects) - 1, found.shape)

        try:
            parts = [
                flatten(value, tensors, paths, self.parameters.label(name), read_object)
                for name, value in named.items()
            ]
        except NotATree as error:
            raise Bypass(error.reason, str(error)) from None
        layout = Node(dict, tuple(named), tuple(parts))
        firsts: dict[int, int] = {}
        identities = tuple(firsts.setdefault(id(tensor), index) for index, tensor in enumerate(tensors))
        by_address = mutated.get((layout, identities), frozenset())
        bound = [i in by_address or top_name(path) in self.bind for i, path in enumerate(paths)]
        batch = self._batch(tensors, paths, bound)
        roles, key_parts = zip(*map(partial(self._role, batch), tensors, paths, bound), strict=True)
        shared = shared_memory(objects, tensors)
        key = (layout, modes, tensors[0].device, identities, shared, *key_parts)
        return BoundCall(
            args, kwargs, layout, tensors, paths, list(roles), identities, batch, key, objects
        )

    def _role(self, batch: int, tensor: Tensor, path: str, is_bound: bool) -> tuple[Leaf, Any]:
        """Returns the role of one tensor, and its part of the key."""
        if tensor.layout is not torch.strided:
            raise Bypass(Reason.ARGUMENT_TENSOR, f"{path} has layout {tensor.layout}")
        if tensor.is_quantized:
            raise Bypass(Reason.ARGUMENT_TENSOR, f"{path} is quantised; pass it dequantised")
        if tensor.is_neg() and torch.is_inference_mode_enabled():
            # Under a dispatch mode, torch's own `half()` of such a view has the wrong sign there.
            raise Bypass(Reason.ARGUMENT_TENSOR, f"{path} is a negative view; pass .resolve_neg()")
        if tensor._is_zerotensor():
            raise Bypass(Reason.ARGUMENT_TENSOR, f"{path} has no memory; pass its .clone()")
        if attributes := ", ".join(attributes_of_tensor(tensor)):
            detail = f"{path} has attributes ({attributes}); pass them as arguments"
            raise Bypass(Reason.ARGUMENT_TENSOR, detail)
        shape, dim = tuple(tensor.shape), self._dim(tensor, path)
        if dim is not None and shape[dim] != batch:
            dim = None
        traits = self._traits(tensor)
        is_output = _C.is_weak(tensor)
        if is_output and is_bound:
            raise Bypass(Reason.BOUND_OUTPUT, path)
        if is_bound or (dim is None and not is_output and tensor.nbytes > COPY_LIMIT):
            address = (tensor.data_ptr(), tensor.stride(), dim is not None)
            return Leaf(BOUND, dim), (BOUND, tensor.dtype, shape, address, traits)
        role = WHOLE if dim is None else BATCHED
        leaf = Leaf(role, dim, *self._strides(tensor, dim), bool(self._inference(tensor)))
        if tensor.dim() > _C.MAX_DIMS and not tensor.permute(leaf.order(tensor.dim())).is_contiguous():
            detail = f"{path} has strides over more than {_C.MAX_DIMS} dimensions; pass it .contiguous()"
            raise Bypass(Reason.ARGUMENT_TENSOR, detail)
        if dim is not None:
            shape = (*shape[:dim], -1, *shape[dim + 1 :])
        return leaf, (role, tensor.dtype, shape, leaf.pattern, leaf.exact, traits)

    def _traits(self, tensor: Tensor) -> tuple[Any, ...]:
        """Returns what code can see of a tensor besides its values and its memory."""
        is_leaf, inference = not tensor.requires_grad or tensor.is_leaf, self._inference(tensor)
        bits = tensor.is_conj(), tensor.is_neg()
        return type(tensor), *bits, tensor.requires_grad, is_leaf, inference

    def _inference(self, tensor: Tensor) -> bool | None:
        return tensor.is_inference() if "is_inference" in self._names else None

    def _strides(self, tensor: Tensor, dim: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the pattern of strides, and the numbers that the forward may read; see `Leaf`."""
        pattern = _C.stride_pattern(tensor)
        reads_stride, reads_offset = "stride" in self._names, not _OFFSET.isdisjoint(self._names)
        if not (reads_stride or reads_offset):
            return pattern, ()
        exact = list(tensor.stride() if reads_stride else [-1] * tensor.dim())
        marks = Leaf(WHOLE, None, pattern).marks(tensor.dim())
        for outside, mark in [] if dim is None else takewhile(lambda each: each[0] != dim, marks):
            if mark == PACKED:  # moves with the batch
                exact[outside] = -1
        return pattern, (*exact, int(tensor.storage_offset()) if reads_offset else -1)

    def notice(self, names: frozenset[str]) -> bool:
        """Lets keys tell apart what code with such names can see; return True if that is news."""
        news = (_NAMES & names) - self._names
        self._names |= news
        return bool(news)

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
