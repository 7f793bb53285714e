"""What one operation does, read off its schema: what it writes, and whether a graph can hold it.

Both runtimes ask here, so what stops a capture on CUDA stops it in emulation in the same way.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

_SYNCHRONISES = {
    _aten._linalg_check_errors.default: "checks for errors on the host (use the *_ex variant)",
}

# Ranks that don't capture, compare and replay at the same calls would wait for each other forever.
_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem")

# torch may drop cuFFT's plan (`cufft_plan_cache`), and with it memory and kernels that a graph needs.
_FFTS = (_aten._fft_r2c, _aten._fft_c2c, _aten._fft_c2r)

# These update their running statistics in training without saying so in their schemas.
_BATCH_NORMS = (
    _aten.native_batch_norm.default,
    _aten.cudnn_batch_norm.default,
    _aten.miopen_batch_norm.default,
)


def tensors_in(*trees: Any) -> Iterator[Tensor]:
    """Yields the tensors among the arguments or results of one operation, which nest only in lists."""
    for tree in trees:
        if isinstance(tree, Tensor):
            yield tree
        elif isinstance(tree, (list, tuple)):
            yield from tensors_in(*tree)
        elif isinstance(tree, dict):
            yield from tensors_in(*tree.values())


def overrides_dispatch(tensor: Tensor) -> bool:
    """Tells whether `tensor` is of a subclass that carries out operations in a way of its own."""
    dispatch = type(tensor).__torch_dispatch__
    return type(tensor) not in (Tensor, nn.Parameter) and dispatch != Tensor.__torch_dispatch__


@cache
def _mutated_arguments(func: torch._ops.OpOverload) -> tuple[tuple[int, str], ...]:
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def mutated_by(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """Returns the tensors that this call of `func` writes into, as its schema declares."""
    if func in _BATCH_NORMS:  # (input, weight, bias, running mean, running variance, training, …)
        return [tensor for tensor in args[3:5] if tensor is not None] if args[5] else []
    return [
        tensor
        for index, name in _mutated_arguments(func)
        for tensor in tensors_in(args[index] if index < len(args) else kwargs.get(name))
    ]


@cache
def _is_composite(func: torch._ops.OpOverload, backend: str) -> bool:
    name = func.name()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(name, "CompositeImplicitAutograd") and not has_kernel(name, backend)


def take_apart(
    func: torch._ops.OpOverload,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: TorchDispatchMode,
) -> Any:
    """Runs `func` under `mode` if it is made of other operations; else returns NotImplemented.

    Autograd does that before a mode sees an operation, and is off under inference mode. The kernel is
    the one that eager would run, not a decomposition written in Python.
    """
    if not torch.is_inference_mode_enabled():
        return NotImplemented
    devices = {tensor.device.type for tensor in tensors_in(args, kwargs)}
    if not _is_composite(func, "CUDA" if "cuda" in devices else "CPU"):
        return NotImplemented
    with mode:
        return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def obstacle(
    func: torch._ops.OpOverload,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
) -> str | None:
    """Says why a graph on `device` can't hold this call, or returns None where it can."""
    on_device = [tensor for tensor in tensors_in(args, kwargs) if tensor.device == device]
    if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
        return f"{func} draws from a torch.Generator of the caller's"
    if func.namespace in _COLLECTIVES:
        return f"{func} waits for other processes, which may not replay a graph at this call"
    if func in (_aten._to_copy.default, _aten.copy_.default, _aten._copy_from.default):
        target = torch.device(kwargs.get("device") or args[0].device)
        source = (args[0] if func is _aten._to_copy.default else args[1]).device
        if target.type != source.type or target.index not in (None, source.index):
            return f"{func} copies between {source} and {target}"
    if not on_device:
        return None
    if func in _SYNCHRONISES:
        return f"{func} {_SYNCHRONISES[func]}"
    if func.overloadpacket in _FFTS:
        return f"{func} runs by a plan that torch.backends.cuda.cufft_plan_cache may drop"
    if func is _aten.index.Tensor:
        return (
            f"{func} with a mask has a shape that depends on values"
            if any(map(_is_mask, args[1]))
            else None
        )
    if func in (_aten.index_put_.default, _aten.index_put.default):
        fills = args[2].numel() == 1  # becomes masked_fill, which needs no value on the host
        return (
            f"{func} with a mask must count it on the host"
            if not fills and any(map(_is_mask, args[1]))
            else None
        )
    if torch.Tag.data_dependent_output in func.tags:
        return f"{func} hands a value to the host"
    if torch.Tag.dynamic_output_shape in func.tags:
        return f"{func} has a shape that depends on values"
    return None
