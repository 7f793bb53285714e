"""The memory of emulated graphs: blocks that are carved out of segments and used again once freed."""

import torch
from torch import Tensor

from graphcache import _C
from graphcache.runtime.base import Arena, PoolMemory

_ALIGNMENT = 512  # bytes, as in torch's CUDA allocator


class EmulatedArena(Arena):
    """A best-fit allocator; a block is free once nobody holds its storage.

    A block that one capture frees is used again by the next, while graphs go on writing to its address.
    The private pools of torch's CUDA allocator behave in this way.
    """

    def __init__(self, device: torch.device) -> None:
        self.segments: list[Tensor] = []
        self._blocks: list[tuple[int, int, int, Tensor]] = []  # segment, offset, nbytes, owner

    def allocate(self, like: Tensor) -> Tensor:
        """Returns memory of the arena with the sizes, strides and dtype of `like`."""
        extent = _extent(like)
        nbytes = -(-max(extent * like.element_size(), 1) // _ALIGNMENT) * _ALIGNMENT
        self._sweep()
        segment, offset = self._best_fit(nbytes) or self._grow(nbytes)
        owner = _C.carve(self.segments[segment], offset, nbytes)
        self._blocks.append((segment, offset, nbytes, owner))
        return _C.alias(owner.view(like.dtype), like.size(), like.stride(), 0)

    def owns(self, tensor: Tensor) -> bool:
        """Return True if `tensor` lies in the memory of this arena."""
        address = tensor.untyped_storage().data_ptr()
        return any(
            segment.data_ptr() <= address < segment.data_ptr() + segment.numel()
            for segment in self.segments
        )

    def memory(self) -> PoolMemory:
        """Returns the bytes of the segments and of the blocks in use."""
        self._sweep()
        return PoolMemory(
            sum(segment.numel() for segment in self.segments),
            sum(nbytes for _, _, nbytes, _ in self._blocks),
        )

    def _sweep(self) -> None:
        self._blocks = [block for block in self._blocks if _C.is_held(block[3])]

    def _best_fit(self, nbytes: int) -> tuple[int, int] | None:
        gaps = []
        for index, segment in enumerate(self.segments):
            end = 0
            used = sorted(block[1:3] for block in self._blocks if block[0] == index)
            for offset, length in [*used, (segment.numel(), 0)]:
                if offset - end >= nbytes:
                    gaps.append((offset - end, index, end))
                end = offset + length
        return min(gaps)[1:] if gaps else None

    def _grow(self, nbytes: int) -> tuple[int, int]:
        with torch.inference_mode(False):  # written to in any mode
            self.segments.append(torch.empty(nbytes, dtype=torch.uint8))
        return len(self.segments) - 1, 0


def _extent(tensor: Tensor) -> int:
    """Returns the number of storage elements that `tensor` spans."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True)
    )


def copy_memory(target: Tensor, source: Tensor) -> None:
    """Copies `source` over `target`, which has the same strides, even where elements overlap."""
    if source._is_zerotensor():  # without memory
        target.zero_()
        return
    extent = _extent(source)
    _C.alias(target, (extent,), (1,), int(target.storage_offset())).copy_(
        _C.alias(source, (extent,), (1,), int(source.storage_offset()))
    )
