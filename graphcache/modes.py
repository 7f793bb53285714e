"""What surrounds a call: modes that its graphs depend on, and those in which it needs eager."""

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from graphcache import _C, config
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
    if forward_ad._current_level >= 0:
        raise Unservable("forward-mode differentiation")
    if _C.modes(DeviceContext) is None:
        raise Unservable("a TorchFunctionMode is active")
    if torch._C._functorch.maybe_current_level() is not None:
        raise Unservable("a torch.func transform")
    if getattr(instance, "_is_replica", False):
        raise Unservable("a DataParallel replica")


def modes_of(instance: Any) -> tuple[Any, ...]:
    """Returns the modes that decide what a forward does; each combination has its own graphs."""
    return (getattr(instance, "training", None), _C.modes(DeviceContext))


def wants_grad(instance: Any) -> bool:
    """Tells whether gradients of a module's parameters are wanted, where grad mode is on."""
    return isinstance(instance, nn.Module) and any(p.requires_grad for p in instance.parameters())
