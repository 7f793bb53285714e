"""Reads the schema of an operation: the tensors that it takes and mutates, and its parts."""

import re
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from graphcache.runtime.torch_patches import Patch

_aten = torch.ops.aten


# Their schemas do not declare that they update running statistics in training.
_BATCH_NORMS = (
    _aten.native_batch_norm.default,
    _aten.cudnn_batch_norm.default,
    _aten.miopen_batch_norm.default,
)

# An index out of bounds stops the device there, or reaches past the end of a tensor.
_TAKES_INDICES = re.compile(
    "index|gather|scatter|take|put$|embedding|nll_loss|unpool|repeat_interleave|segment|grouped_mm|ctc"
)
_ASSERTS = re.compile("binary_cross_entropy|assert|multinomial|linalg|bincount")
_LEAVES_NAN_OUT = re.compile("nan|^fmax|^fmin|sign|heaviside")
# Their integers are valid indices, whatever they are given.
_BOUNDED = ("argmax", "argmin", "topk", "sort", "max", "min", "cummax", "cummin", "kthvalue", "median")


def base_name(func: torch._ops.OpOverload) -> str:
    """Returns the name of an operation without namespace, overload and the mark of writes in place."""
    return func._schema.name.rpartition(":")[2].rstrip("_")


def bears_nan(operators: Iterable[torch._ops.OpOverload], *, hidden: bool) -> bool:
    """Return True if NaN in floating point can't make these operations stop the device.

    Args:
        operators: all operations of a forward.
        hidden: whether one of them can hide NaN; see `discretises`.
    """
    if any(getattr(func, "namespace", "") != "aten" for func in operators):
        return False
    names = {base_name(func) for func in operators}
    return not any(_ASSERTS.search(name) or (hidden and _TAKES_INDICES.search(name)) for name in names)


def discretises(func: torch._ops.OpOverload, given: list[Tensor], made: list[Tensor]) -> bool:
    """Return True if an operation can hide NaN: it made integers or booleans of it, or leaves it out."""
    whole = any(not tensor.is_floating_point() and not tensor.is_complex() for tensor in made)
    if whole and any(tensor.is_floating_point() for tensor in given):
        return base_name(func) not in _BOUNDED
    return leaves_nan_out(func)


_LEAVES_OUT: dict[int, bool] = {}  # by address


def leaves_nan_out(func: torch._ops.OpOverload) -> bool:
    """Return True if the name of an operation says that NaN does not reach its result."""
    known = _LEAVES_OUT.get(id(func))
    if known is None:
        known = _LEAVES_OUT[id(func)] = _LEAVES_NAN_OUT.search(base_name(func)) is not None
    return known


def tensors_in(*trees: Any) -> list[Tensor]:
    """Returns the tensors among the arguments or results of one operation, in order."""
    found = []
    for tree in trees:
        if isinstance(tree, Tensor):
            found.append(tree)
        elif isinstance(tree, (list, tuple)) and tree:
            found += tensors_in(*tree)
        elif isinstance(tree, dict) and tree:
            found += tensors_in(*tree.values())
    return found


def overrides_dispatch(tensor: Tensor) -> bool:
    """Return True if the type of `tensor` is a subclass with a `__torch_dispatch__` of its own."""
    return type(tensor).__torch_dispatch__ != Tensor.__torch_dispatch__


@cache
def _mutated_arguments(func: torch._ops.OpOverload) -> tuple[tuple[int, str], ...]:
    if isinstance(func, HigherOrderOperator):
        return ()  # without a schema
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def may_mutate(func: torch._ops.OpOverload) -> bool:
    """Return True if an operation mutates an argument, or may take over a storage."""
    return bool(_mutated_arguments(func)) or func in _BATCH_NORMS


def mutated_by(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """Returns the tensors that this call of `func` mutates, as the schema declares."""
    if func in _BATCH_NORMS:  # (input, weight, bias, running mean, running variance, training, …)
        return [tensor for tensor in args[3:5] if tensor is not None] if args[5] else []
    return [
        tensor
        for index, name in _mutated_arguments(func)
        for tensor in tensors_in(args[index] if index < len(args) else kwargs.get(name))
    ]


@cache
def is_composite(func: torch._ops.OpOverload, backend: str) -> bool:
    """Return True if an operation is made of others on a backend."""
    name = func.name()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(name, "CompositeImplicitAutograd") and not has_kernel(name, backend)


@cache
def _unasked(module: str) -> AbstractContextManager[None]:
    """Answers kernels of higher-order operators that refuse to run under a mode, as torch runs them."""
    name = "_get_current_dispatch_mode"
    asks = hasattr(sys.modules[module], name)
    return Patch(sys.modules[module], name, lambda: None) if asks else nullcontext()


def take_apart(
    func: torch._ops.OpOverload,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: TorchDispatchMode,
) -> Any:
    """Runs `func` under `mode` if `func` is made of other operations; else returns NotImplemented.

    Autograd decomposes operations before a mode gets them; inference mode has no autograd. The kernel
    is that of eager, not a decomposition written in Python. The kernel of a higher-order operator, such
    as `torch.cond`, is Python that calls other operators.
    """
    if isinstance(func, HigherOrderOperator):
        kernel = func.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)
        if kernel is None:
            return NotImplemented
        with mode, _unasked(kernel.__module__):
            return kernel(*args, **kwargs)
    if not torch.is_inference_mode_enabled():
        return NotImplemented
    devices = {tensor.device.type for tensor in tensors_in(args, kwargs)}
    if not is_composite(func, "CUDA" if "cuda" in devices else "CPU"):
        return NotImplemented
    with mode:
        return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
