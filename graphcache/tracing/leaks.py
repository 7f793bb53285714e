"""Finds tensors that a traced forward made and that live on besides its result."""

import gc
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from graphcache import _C
from graphcache.errors import describe
from graphcache.runtime.op_schemas import overrides_dispatch


def has_storage(value: Any) -> bool:
    """Return True if `value` is a tensor that lies in one storage."""
    return (
        issubclass(type(value), Tensor)  # not isinstance: some objects warn when they are asked
        and torch._C._has_storage(value)
        and value.layout is torch.strided
        and not overrides_dispatch(value)
    )


def find_leak(
    made: Mapping[int, StorageWeakRef], result: Iterable[Tensor], reached: Iterable[Tensor]
) -> str | None:
    """Describes a tensor that the forward made and that somebody keeps; None where there is none.

    Call it when nothing of the forward is under way any more.

    Args:
        made: weak references to the storages that the forward made, by their keys.
        result: the tensors of the result; their storages may live.
        reached: tensors of which a gradient may have been made.
    """
    returned = {_C.storage_key(tensor) for tensor in result}

    def alive() -> set[int]:
        return {key for key, storage in made.items() if not storage.expired()} - returned

    if not alive():
        return None
    gc.collect()  # a cycle of objects dies late
    keys = alive()
    objects = gc.get_objects() if keys else []
    for tensor in [object()]:
        usual = sys.getrefcount(tensor)
    for tensor in objects:
        references = sys.getrefcount(tensor) - usual
        if (
            has_storage(tensor)
            and _C.storage_key(tensor) in keys
            and (holder := _holder(tensor, objects, references)) is not None
        ):
            return f"a tensor that it made ({describe(tensor)}) and that a {holder} keeps"
    for tensor in reached:
        # torch holds a gradient where Python does not see.
        grad = tensor.grad if tensor.is_leaf and tensor.requires_grad else None
        if grad is not None and _C.storage_key(grad) in keys:
            return f"a gradient that it made ({describe(grad)}); use torch.autograd.grad inside"
    return None


def _holder(tensor: Tensor, objects: list[Any], references: int) -> str | None:
    """Returns the type of a holder of `tensor` besides `objects`, the caller, and frames that die late.

    Args:
        tensor: the tensor that may be held.
        objects: a list that holds the tensor.
        references: how many more references there are than those two have.
    """
    known = id(objects), id(sys._getframe(0)), id(sys._getframe(1))
    for holder in gc.get_referrers(tensor):
        kind = type(holder).__name__
        if id(holder) not in known and kind not in ("frame", "list_iterator"):
            return kind
    # Frozen objects have no known referrers: then any other reference counts.
    return "container (frozen by gc.freeze)" if references > 0 and gc.get_freeze_count() else None
