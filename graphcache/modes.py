"""What surrounds a call: modes that its graphs depend on, and those in which it needs eager."""

from typing import Any

import torch
from torch.utils._device import DeviceContext

from graphcache import config
from graphcache.runtime import is_capturing
from graphcache.signature import Unservable


def refuse_where_watched(instance: Any) -> None:
    """Raises `Unservable` where somebody watches the operations, which a replay would hide."""
    if config.is_disabled():
        raise Unservable("disabled")
    if is_capturing():
        raise Unservable("inside another capture or first call")
    if torch._C._get_tracing_state() is not None:
        raise Unservable("torch.jit tracing")
    if torch._C._len_torch_dispatch_stack() > 0:
        raise Unservable("a TorchDispatchMode is active")
    if torch._C._len_torch_function_stack() > 0 and _foreign_function_mode():
        raise Unservable("a TorchFunctionMode is active")
    if torch._C._functorch.maybe_current_level() is not None:
        raise Unservable("a torch.func transform")
    if getattr(instance, "_is_replica", False):
        raise Unservable("a DataParallel replica")


def _foreign_function_mode() -> bool:
    depth = torch._C._len_torch_function_stack()
    modes = [torch._C._get_function_stack_at(level) for level in range(depth)]
    return any(not isinstance(mode, DeviceContext) for mode in modes)  # torch.set_default_device


def modes_of(instance: Any) -> tuple[Any, ...]:
    """Returns the modes that decide what a forward does; each combination has its own graphs."""
    return (
        getattr(instance, "training", None),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
    )
