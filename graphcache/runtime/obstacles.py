"""Finds the operations that no graph can hold.

Both runtimes ask here, so that an operation that stops a capture on CUDA stops an emulated one as well.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator

from graphcache.errors import CaptureError
from graphcache.report.reasons import Reason, text_of
from graphcache.runtime.op_schemas import is_composite, may_mutate, tensors_in
from graphcache.runtime.source_lines import user_line

_aten = torch.ops.aten


_READ_OPS = {
    _aten._linalg_check_errors.default: "a check for errors (use the *_ex variant)",
    _aten._local_scalar_dense.default: "a number out of a tensor, as `.item()` does",
}


_INDEX_PUTS = (_aten.index_put_.default, _aten.index_put.default)


# Ranks that don't capture, compare and replay at the same calls would wait for each other forever.
_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem")


# torch may drop cuFFT's plan (`cufft_plan_cache`), and with the plan memory that a graph needs.
_FFTS = (_aten._fft_r2c, _aten._fft_c2c, _aten._fft_c2r)


# What is seen only in the arguments of a call.
_LOOKED_AT = (
    *(_aten._to_copy.default, _aten.copy_.default, _aten._copy_from.default, _aten.index.Tensor),
    *(_aten.lift_fresh.default, *_INDEX_PUTS),
)
_TELLING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# By address, which is known faster than the hash of an operation. Operations live for ever.
_PLAIN: dict[int, bool] = {}


def is_plain(func: torch._ops.OpOverload) -> bool:
    """Return True if an operation only reads tensors and makes others, whatever it is given."""
    known = _PLAIN.get(id(func))
    if known is None:
        known = _PLAIN[id(func)] = _is_plain(func)
    return known


def _is_plain(func: torch._ops.OpOverload) -> bool:
    if isinstance(func, HigherOrderOperator) or func.namespace != "aten":
        return False
    takes_generator = any("Generator" in str(each.type) for each in func._schema.arguments)
    return not (
        takes_generator
        or func in _LOOKED_AT
        or func in _READ_OPS
        or func.overloadpacket in _FFTS
        or _TELLING_TAGS.intersection(func.tags)
        or may_mutate(func)
        or any(is_composite(func, backend) for backend in ("CPU", "CUDA"))
    )


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


class Obstacle(NamedTuple):
    """An operation that no graph can hold.

    Attributes:
        reason: the kind of reason.
        detail: the user's construct, or the operation.
    """

    reason: Reason
    detail: str

    def __str__(self) -> str:
        return text_of(self.reason, self.detail)

    def error(self) -> CaptureError:
        """Returns the error for this obstacle at the user's current line."""
        return CaptureError(f"{self} at {user_line()}", reason=self.reason)


def obstacle(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> Obstacle | None:
    """Returns the reason for which a graph on `device` can't hold this operation; None if it can."""
    if isinstance(func, HigherOrderOperator):
        return Obstacle(Reason.CAPTURE_FAILED, f"{func} is not made of operators")
    if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
        return Obstacle(Reason.CALLERS_GENERATOR, f"{func}")
    if func.namespace in _COLLECTIVES:
        return Obstacle(Reason.COLLECTIVE, f"{func}; they may not replay a graph at this call")
    if func in (_aten._to_copy.default, _aten.copy_.default, _aten._copy_from.default):
        target = torch.device(kwargs.get("device") or args[0].device)
        source = (args[0] if func is _aten._to_copy.default else args[1]).device
        if target.type != source.type:
            return Obstacle(Reason.HOST_COPY, f"{func} copies between {source} and {target}")
        if target.index not in (None, source.index):
            return Obstacle(Reason.TWO_DEVICES, f"{func} copies between {source} and {target}")
    if all(tensor.device != device for tensor in tensors_in(args, kwargs)):
        return None
    if func in _READ_OPS or torch.Tag.data_dependent_output in func.tags:
        return Obstacle(Reason.READS_VALUE, _READ_OPS.get(func, f"{func}"))
    if func.overloadpacket in _FFTS:
        return Obstacle(
            Reason.FFT_PLAN, f"{func} runs by a plan that torch.backends.cuda.cufft_plan_cache may drop"
        )
    if func is _aten.index.Tensor and any(map(_is_mask, args[1])):
        return Obstacle(Reason.VALUE_DEPENDENT_SHAPE, f"`tensor[mask]` ({func})")
    # One value becomes masked_fill, which needs no count of the mask on the host.
    if func in _INDEX_PUTS and args[2].numel() != 1 and any(map(_is_mask, args[1])):
        return Obstacle(Reason.VALUE_DEPENDENT_SHAPE, f"`tensor[mask] = values` ({func})")
    if torch.Tag.dynamic_output_shape in func.tags and func is not _aten.index.Tensor:
        return Obstacle(Reason.VALUE_DEPENDENT_SHAPE, f"{func}")
    return None
