"""Decides which calls bypass the graphs, and why: all conditions of a call that make it eager."""

import sys
import threading
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from graphcache import _C, config
from graphcache.call.bound_call import BoundCall
from graphcache.call.modes import is_capturing
from graphcache.capture.bucket import Bucket
from graphcache.pool import GraphPool
from graphcache.report.reasons import Bypass, Reason


def check_surroundings(instance: Any) -> None:
    """Raises `Bypass` where somebody watches the operations, which a replay would hide."""
    for reason, holds in (
        (Reason.DISABLED, config.is_disabled),
        (Reason.INSIDE_CAPTURE, is_capturing),
        (Reason.TRACING, lambda: torch._C._get_tracing_state() is not None),
        (Reason.DISPATCH_MODE, lambda: torch._C._len_torch_dispatch_stack() > 0),
        (Reason.FORWARD_AD, lambda: forward_ad._current_level >= 0),
        (Reason.FUNCTION_MODE, lambda: _C.modes(DeviceContext) is None),
        (Reason.FUNC_TRANSFORM, lambda: torch._C._functorch.maybe_current_level() is not None),
        (Reason.REPLICA, lambda: getattr(instance, "_is_replica", False)),
        (Reason.NEEDS_GRAD, lambda: torch.is_grad_enabled() and _wants_grad(instance)),
    ):
        if holds():
            raise Bypass(reason)


def _wants_grad(instance: Any) -> bool:
    return isinstance(instance, nn.Module) and any(p.requires_grad for p in instance.parameters())


def check_no_profiler() -> None:
    """Raises `Bypass` where a first call can't be traced, as a profiler in C is on already."""
    if not (sys.getprofile() is None or callable(sys.getprofile())):
        raise Bypass(Reason.PROFILED)


def check_device(call: BoundCall) -> None:
    """Raises `Bypass` where there are no graphs on the device of a call."""
    device = call.tensors[0].device
    if any(tensor.device != device for tensor in call.tensors):
        raise Bypass(Reason.SEVERAL_DEVICES)
    if device.type == "cpu" and not config.is_emulated():
        raise Bypass(Reason.CPU_TENSORS)
    if device.type not in ("cuda", "cpu"):
        raise Bypass(Reason.OTHER_DEVICE, text=f"tensors on {device.type}")


def check_pool(pool: GraphPool) -> None:
    """Raises `Bypass` while another thread captures, which may wait for this thread."""
    if pool.capturing_thread not in (None, threading.get_ident()):
        raise Bypass(Reason.CAPTURED_ELSEWHERE)


def check_call(call: BoundCall) -> None:
    """Raises `Bypass` for a call that no graph serves, whatever was captured."""
    if call.batch == 0:
        raise Bypass(Reason.EMPTY_BATCH)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in call.tensors):
        raise Bypass(Reason.NEEDS_GRAD)


def check_bucket(bucket: Bucket, call: BoundCall) -> None:
    """Raises `Bypass` where the graph of a call may not run now."""
    if bucket.native.retired:
        raise Bypass(Reason.TOO_SLOW)
    if bucket.dependencies.mutated.overlaps(call.tensors):
        raise Bypass(Reason.OVERLAPS_MUTATED)
