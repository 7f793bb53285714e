"""Types of the native helper; sizes, strides and offsets are in elements."""

from collections.abc import Sequence
from typing import Any, overload

from torch import Tensor, nn

__all__ = [
    "Guard",
    "alias",
    "carve",
    "end_host_capture",
    "expire",
    "is_expired",
    "is_held",
    "is_weak",
    "materialize",
    "storage_key",
    "weak_ref",
]

@overload
def weak_ref(tensor: Tensor) -> Tensor: ...
@overload
def weak_ref(tensor: Sequence[Tensor]) -> list[Tensor]:
    """Aliases the memory of a tensor without owning it.

    Keeps dtype, device, sizes, strides, offset, and the conjugate and negative bits. Of a list, the
    tensors that share a storage share one afterwards too. After vLLM pull request 9724.

    Raises:
        TypeError: for tensor subclasses and for tensors that are not dense memory.
        RuntimeError: the stored text, if the tensor has expired.
    """

def alias(
    tensor: Tensor,
    sizes: Sequence[int],
    strides: Sequence[int],
    offset: int,
    like: Tensor | None = None,
) -> Tensor:
    """Returns a new tensor on the storage of `tensor`, which is not a view in autograd's sense.

    Its dtype, conjugate and negative bits are those of `like` (default: `tensor`).

    Raises:
        ValueError: if it would reach outside the storage.
    """

def carve(tensor: Tensor, offset: int, nbytes: int) -> Tensor:
    """Returns a weak `uint8` tensor of shape `(nbytes,)` over a part of the storage of `tensor`.

    Args:
        tensor: any tensor with a storage.
        offset: in bytes, from the start of the storage.
        nbytes: its length, in bytes.

    Raises:
        ValueError: if the part lies outside the storage.
    """

def is_weak(tensor: Tensor) -> bool:
    """Tells whether `weak_ref` made the storage of `tensor` and it owns no memory."""

def expire(tensor: Tensor, message: str = ...) -> None:
    """Makes every later data access through the storage of `tensor`, views included, raise.

    Args:
        tensor: any tensor with a storage; its metadata stays readable.
        message: the text of the `RuntimeError`.
    """

def is_expired(tensor: Tensor) -> bool:
    """Tells whether the data of `tensor` may no longer be touched."""

def storage_key(tensor: Tensor) -> int:
    """Identifies the storage of `tensor` for as long as somebody holds it."""

def is_held(tensor: Tensor) -> bool:
    """Tells whether any tensor but this one (another output, a view) shares its storage."""

def materialize(tensor: Tensor) -> None:
    """Moves a weak tensor, with all its views, into memory of its own, on the current stream.

    Raises:
        ValueError: if the tensor is not weak.
    """

def end_host_capture(pool_first: int, pool_second: int) -> None:
    """Ends a failed capture in the allocator of pinned host memory (torch 2.11 does not).

    Args:
        pool_first: the first half of the pool's id.
        pool_second: the second half.

    Raises:
        RuntimeError: if no capture into that pool is under way there.
    """

class Guard:
    """What the graphs of one signature depend on besides their arguments, as it is now.

    Modules are known weakly. An empty guard always holds.

    Args:
        modules: their attributes, parameters, buffers and children have to stay the same objects.
        root: the one of `modules` that may have forward hooks; none of the others may.
        dicts: have to stay as they are.
        places: `(container, key, value)`: `container[key]` has to stay `value`. A closure cell is a
            container too; its key is ignored.
        tensors: have to keep their storage, at its address, and their offset in it.
    """

    @overload
    def __init__(self) -> None: ...
    @overload
    def __init__(
        self,
        *,
        modules: Sequence[nn.Module],
        root: object,
        dicts: Sequence[dict[Any, Any]],
        places: Sequence[tuple[Any, Any, Any]],
        tensors: Sequence[Tensor],
    ) -> None: ...
    def hold(self, grad: bool) -> bool:
        """Tells whether all is as it was; with `grad`, also that nothing requires gradients."""
