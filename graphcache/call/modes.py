"""What surrounds a call: modes that its graphs depend on, and those in which it needs eager."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from graphcache import _C, config
from graphcache.report.reasons import Bypass

NEEDS_GRAD = "gradients are needed (torch.no_grad() or inference_mode() is not on)"


def check_nobody_watches(instance: Any) -> None:
    """Raises `Bypass` where somebody watches the operations, which a replay would hide."""
    if config.is_disabled():
        raise Bypass("disabled")
    if is_capturing():
        raise Bypass("inside another capture or first call")
    if torch._C._get_tracing_state() is not None:
        raise Bypass("torch.jit tracing")
    if torch._C._len_torch_dispatch_stack() > 0:
        raise Bypass("a TorchDispatchMode is active")
    if forward_ad._current_level >= 0:
        raise Bypass("forward-mode differentiation")
    if _C.modes(DeviceContext) is None:
        raise Bypass("a TorchFunctionMode is active")
    if torch._C._functorch.maybe_current_level() is not None:
        raise Bypass("a torch.func transform")
    if getattr(instance, "_is_replica", False):
        raise Bypass("a DataParallel replica")
    if torch.is_grad_enabled() and _wants_grad(instance):
        raise Bypass(NEEDS_GRAD)


def check_no_profiler() -> None:
    """Raises `Bypass` where a first call can't be watched, as a profiler in C does already."""
    if not (sys.getprofile() is None or callable(sys.getprofile())):
        raise Bypass("a profiler of Python code is on (cProfile, with_stack=True); captured later")


def modes_of(instance: Any) -> tuple[Any, ...]:
    """Returns the modes that decide what a forward does; each combination has its own graphs."""
    return (getattr(instance, "training", None), _C.modes(DeviceContext))


def _wants_grad(instance: Any) -> bool:
    return isinstance(instance, nn.Module) and any(p.requires_grad for p in instance.parameters())


_HAS_CUDA = torch.backends.cuda.is_built()


def is_capturing() -> bool:
    """Tells whether this thread is inside the first call or the capture of a graphed forward.

    A graphed forward that is called there is inlined: it runs as if it were not decorated.
    """
    return _C.is_inlining() or is_stream_capturing()


def is_stream_capturing() -> bool:
    """Tells whether somebody captures on the current CUDA stream."""
    # Asked before CUDA is initialised, a torch with CUDA raises where there is no driver.
    return _HAS_CUDA and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@contextmanager
def inlining() -> Iterator[None]:
    """Inlines the graphed forwards that are called inside the block, in this thread."""
    before = _C.set_inlining(True)
    try:
        yield
    finally:
        _C.set_inlining(before)
